//! Bodies of the REST API; pages are the same over WebSocket.

use crate::{InboxEntry, Message};
use serde::{Deserialize, Serialize};

/// Body of `POST /v1/dialogs/{user}/messages`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SendRequest {
    /// The idempotency key: 1 to 64 bytes, unique per author and dialog.
    #[cfg_attr(
        feature = "openapi",
        schema(min_length = 1, max_length = 64, example = "c1")
    )]
    pub key: String,
    /// 1 to 4,000 characters, stored exactly as sent.
    #[cfg_attr(
        feature = "openapi",
        schema(min_length = 1, max_length = 16_383, example = "hi")
    )]
    pub text: String,
}

/// The answer to a send: the place of the message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Sent {
    /// The dialog, e.g. `7_42`.
    #[cfg_attr(feature = "openapi", schema(example = "7_42"))]
    pub dialog: String,
    /// The seq of the message.
    #[cfg_attr(feature = "openapi", schema(minimum = 0, example = 118))]
    pub seq: u64,
    /// The time of storing, RFC 3339 in UTC with microseconds.
    #[cfg_attr(feature = "openapi", schema(format = DateTime, example = "2026-11-21T05:00:00.123456Z"))]
    pub at: String,
}

/// A page of a dialog, ascending by seq.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct HistoryPage {
    /// The dialog, e.g. `7_42`.
    #[cfg_attr(feature = "openapi", schema(example = "7_42"))]
    pub dialog: String,
    /// The messages, ascending.
    pub messages: Vec<Message>,
    /// The seq of the first message of the page; 0 for an empty one.
    pub first: u64,
    /// The seq of the last message of the page; 0 for an empty one.
    pub last: u64,
    /// Whether the dialog has more messages in the requested direction.
    pub more: bool,
    /// Whether messages are missing because the shard that holds them is declared down.
    pub gap: bool,
}

/// A page of an inbox, newest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct InboxPage {
    /// The dialogs, by the time of their last message, newest first.
    pub dialogs: Vec<InboxEntry>,
    /// The cursor of the next page; null on the last page.
    pub cursor: Option<String>,
    /// Names of shards that did not answer. Their dialogs are missing from this page.
    pub incomplete: Vec<String>,
}

/// Body of `PUT /v1/dialogs/{user}/read`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ReadRequest {
    /// The seq of the last message that was read.
    #[cfg_attr(feature = "openapi", schema(minimum = 0, example = 118))]
    pub seq: u64,
}

/// The seq up to which a user has read a dialog.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ReadMark {
    /// The dialog, e.g. `7_42`.
    #[cfg_attr(feature = "openapi", schema(example = "7_42"))]
    pub dialog: String,
    /// The user who has read.
    #[cfg_attr(
        feature = "openapi",
        schema(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 42)
    )]
    pub user: u64,
    /// The seq of the last message that the user has read.
    #[cfg_attr(feature = "openapi", schema(minimum = 0, example = 118))]
    pub seq: u64,
}

/// Body of `POST /v1/dev/token` (embedded mode on loopback only).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DevTokenRequest {
    /// The user id that the token is for.
    #[cfg_attr(
        feature = "openapi",
        schema(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 42)
    )]
    pub user: u64,
}

/// A bearer token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Token {
    /// The JWT.
    pub token: String,
}

/// Whether a user is online: has a session on any instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Presence {
    /// The user id.
    #[cfg_attr(
        feature = "openapi",
        schema(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 42)
    )]
    pub user: u64,
    /// Whether the user has a session.
    pub online: bool,
}
