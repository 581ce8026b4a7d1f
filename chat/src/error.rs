//! One place that turns reasons into answers: every error that a client may meet, with its code,
//! for WebSocket and REST.

use crate::domain::dialog::DialogId;
use crate::domain::room::Refusal;
use crate::messages::RequestError;
use chat_wire::{ErrorBody, ErrorCode};
use std::time::Duration;

/// A request that was refused, as the client sees it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct ApiError {
    /// What a program acts on.
    pub code: ErrorCode,
    /// What a person reads.
    pub message: String,
    /// When to try again, where it is known.
    pub retry_after: Option<Duration>,
}

/// While a shard is down a probe asks every half second.
const SHARD_DOWN_RETRY: Duration = Duration::from_millis(500);

/// A queue that is full now has moved on by then.
const OVERLOADED_RETRY: Duration = Duration::from_millis(250);

/// The same key may be sent again at once.
const UNAVAILABLE_RETRY: Duration = Duration::from_millis(100);

/// An operator decides when the shard returns.
const ROOM_UNAVAILABLE_RETRY: Duration = Duration::from_secs(5);

impl ApiError {
    /// A refusal that does not say when to try again.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            retry_after: None,
        }
    }

    /// Says when to try again.
    #[must_use]
    pub fn retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }

    /// The body of an answer to a request.
    #[must_use]
    pub fn body(self, request: RequestName) -> ErrorBody {
        ErrorBody {
            code: self.code,
            retryable: self.code.retryable(),
            retry_after_ms: self
                .retry_after
                .map(|after| u64::try_from(after.as_millis()).unwrap_or(u64::MAX).max(1)),
            message: self.message,
            key: request.key,
            dialog: request.dialog.map(|dialog| dialog.to_string()),
            id: request.id,
        }
    }
}

/// The parts of a request by which the client finds it when it reads the error.
#[derive(Clone, Debug, Default)]
pub struct RequestName {
    /// Its `id`.
    pub id: Option<String>,
    /// The idempotency key of a send.
    pub key: Option<String>,
    /// The dialog, if it is about one.
    pub dialog: Option<DialogId>,
}

impl From<RequestError> for ApiError {
    fn from(reason: RequestError) -> Self {
        use crate::domain::dialog::InvalidText;
        let (code, retry_after) = match &reason {
            RequestError::InvalidUserId(_) => (ErrorCode::BadUser, None),
            RequestError::InvalidText(InvalidText::Empty) => (ErrorCode::TextEmpty, None),
            RequestError::InvalidText(InvalidText::TooLong { .. }) => {
                (ErrorCode::TextTooLong, None)
            }
            RequestError::InvalidKey(_) | RequestError::BadRequest(_) => {
                (ErrorCode::BadRequest, None)
            }
            RequestError::KeyReused => (ErrorCode::KeyReused, None),
            RequestError::RateLimited { retry_after, .. }
            | RequestError::TooMuchWork { retry_after } => {
                (ErrorCode::RateLimited, Some(*retry_after))
            }
            RequestError::Overloaded => (ErrorCode::Overloaded, Some(OVERLOADED_RETRY)),
            RequestError::ShardDown => (ErrorCode::ShardDown, Some(SHARD_DOWN_RETRY)),
            RequestError::Unavailable => (ErrorCode::Unavailable, Some(UNAVAILABLE_RETRY)),
            RequestError::NoDialog | RequestError::Refused(Refusal::NoRoom) => {
                (ErrorCode::NotFound, None)
            }
            RequestError::NotYours | RequestError::Refused(Refusal::Role(_)) => {
                (ErrorCode::Forbidden, None)
            }
            RequestError::Refused(Refusal::NotMember) => (ErrorCode::NotMember, None),
            RequestError::Refused(Refusal::Absent(_)) => (ErrorCode::BadRequest, None),
            RequestError::Refused(Refusal::Full(_)) => (ErrorCode::RoomFull, None),
            RequestError::Refused(Refusal::Unavailable) => {
                (ErrorCode::RoomUnavailable, Some(ROOM_UNAVAILABLE_RETRY))
            }
        };
        Self {
            code,
            message: reason.to_string(),
            retry_after,
        }
    }
}
