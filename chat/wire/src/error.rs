//! The error codes: one list for WebSocket and REST.

use serde::{Deserialize, Serialize};
use std::fmt;

/// What went wrong, as a program should see it. Codes are stable; the text beside them is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The frame or body is not understood: bad JSON, an unknown type, a missing or ill-typed field.
    BadRequest,
    /// No token, a bad one, or an expired one.
    Unauthenticated,
    /// The token is good, but not for this.
    Forbidden,
    /// No such route or thing.
    NotFound,
    /// A message needs at least one character.
    TextEmpty,
    /// A message over the limit of characters.
    TextTooLong,
    /// A user id outside 1 … 2^53-1.
    BadUser,
    /// The same key was already used in this dialog for another text.
    KeyReused,
    /// Too many sends in too short a time.
    RateLimited,
    /// A queue of the server is full. Nothing was stored; repeat with the same key.
    Overloaded,
    /// The shard of this dialog does not answer. Repeat with the same key.
    ShardDown,
    /// Not through in time. It may or may not be stored: repeat with the same key.
    Unavailable,
    /// A WebSocket frame or request body over the limit.
    FrameTooLarge,
    /// A fault of the server's own.
    Internal,
}

impl ErrorCode {
    /// Every code, for documentation and metrics.
    pub const ALL: [ErrorCode; 14] = [
        ErrorCode::BadRequest,
        ErrorCode::Unauthenticated,
        ErrorCode::Forbidden,
        ErrorCode::NotFound,
        ErrorCode::TextEmpty,
        ErrorCode::TextTooLong,
        ErrorCode::BadUser,
        ErrorCode::KeyReused,
        ErrorCode::RateLimited,
        ErrorCode::Overloaded,
        ErrorCode::ShardDown,
        ErrorCode::Unavailable,
        ErrorCode::FrameTooLarge,
        ErrorCode::Internal,
    ];

    /// The code as it stands on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            ErrorCode::BadRequest => "bad_request",
            ErrorCode::Unauthenticated => "unauthenticated",
            ErrorCode::Forbidden => "forbidden",
            ErrorCode::NotFound => "not_found",
            ErrorCode::TextEmpty => "text_empty",
            ErrorCode::TextTooLong => "text_too_long",
            ErrorCode::BadUser => "bad_user",
            ErrorCode::KeyReused => "key_reused",
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
    /// What a program acts on.
    pub code: ErrorCode,
    /// What a person reads.
    pub message: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// How long to wait before trying again, in milliseconds, where the server knows.
    pub retry_after_ms: Option<u64>,
    /// The key of the send that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The id of the request that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}
