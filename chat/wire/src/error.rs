//! The error codes: one list for WebSocket and REST.

use serde::{Deserialize, Serialize};
use std::fmt;

/// The kind of an error. Codes are stable; the text beside them is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The frame or body is malformed: bad JSON, an unknown type, a missing field or one of the
    /// wrong type.
    BadRequest,
    /// The token is missing, invalid or expired.
    Unauthenticated,
    /// The token is valid, but does not allow this request.
    Forbidden,
    /// The route or the resource does not exist.
    NotFound,
    /// The route does not have this method; `Allow` has its methods.
    MethodNotAllowed,
    /// The request did not arrive in time.
    RequestTimeout,
    /// The message has no character.
    TextEmpty,
    /// The message has more characters than the limit.
    TextTooLong,
    /// A user id outside 1 … 2^53-1.
    BadUser,
    /// The same key was already used in this dialog for another text.
    KeyReused,
    /// The user is not a member of the room.
    NotMember,
    /// The room would have too many members.
    RoomFull,
    /// The shard that holds the members of the room is declared down. Repeat with the same key.
    RoomUnavailable,
    /// The user has exceeded a rate limit.
    RateLimited,
    /// A queue of the server is full. Nothing was stored: repeat with the same key.
    Overloaded,
    /// The shard of this dialog does not answer. Repeat with the same key.
    ShardDown,
    /// The request timed out. A message may or may not be stored: repeat with the same key.
    Unavailable,
    /// A WebSocket frame or request body is larger than the limit.
    FrameTooLarge,
    /// A defect of the server.
    Internal,
}

impl ErrorCode {
    /// All codes.
    pub const ALL: [ErrorCode; 19] = [
        ErrorCode::BadRequest,
        ErrorCode::Unauthenticated,
        ErrorCode::Forbidden,
        ErrorCode::NotFound,
        ErrorCode::MethodNotAllowed,
        ErrorCode::RequestTimeout,
        ErrorCode::TextEmpty,
        ErrorCode::TextTooLong,
        ErrorCode::BadUser,
        ErrorCode::KeyReused,
        ErrorCode::NotMember,
        ErrorCode::RoomFull,
        ErrorCode::RoomUnavailable,
        ErrorCode::RateLimited,
        ErrorCode::Overloaded,
        ErrorCode::ShardDown,
        ErrorCode::Unavailable,
        ErrorCode::FrameTooLarge,
        ErrorCode::Internal,
    ];

    /// The code on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            ErrorCode::BadRequest => "bad_request",
            ErrorCode::Unauthenticated => "unauthenticated",
            ErrorCode::Forbidden => "forbidden",
            ErrorCode::NotFound => "not_found",
            ErrorCode::MethodNotAllowed => "method_not_allowed",
            ErrorCode::RequestTimeout => "request_timeout",
            ErrorCode::TextEmpty => "text_empty",
            ErrorCode::TextTooLong => "text_too_long",
            ErrorCode::BadUser => "bad_user",
            ErrorCode::KeyReused => "key_reused",
            ErrorCode::NotMember => "not_member",
            ErrorCode::RoomFull => "room_full",
            ErrorCode::RoomUnavailable => "room_unavailable",
            ErrorCode::RateLimited => "rate_limited",
            ErrorCode::Overloaded => "overloaded",
            ErrorCode::ShardDown => "shard_down",
            ErrorCode::Unavailable => "unavailable",
            ErrorCode::FrameTooLarge => "frame_too_large",
            ErrorCode::Internal => "internal",
        }
    }

    /// Whether the same request, with the same key, may succeed later.
    #[must_use]
    pub const fn retryable(self) -> bool {
        matches!(
            self,
            ErrorCode::RateLimited
                | ErrorCode::RoomUnavailable
                | ErrorCode::RequestTimeout
                | ErrorCode::Overloaded
                | ErrorCode::ShardDown
                | ErrorCode::Unavailable
        )
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An error as a client receives it, over WebSocket (as the frame `error`) and REST (as the body).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ErrorBody {
    /// The code, for programs.
    pub code: ErrorCode,
    /// The explanation, for people.
    pub message: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// The time to wait before a repetition, in milliseconds, if the server knows it.
    pub retry_after_ms: Option<u64>,
    /// The key of the send that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The dialog of the request that failed, if it names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dialog: Option<String>,
    /// The id of the request that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}
