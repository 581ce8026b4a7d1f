//! Bodies of the REST API; pages are the same over WebSocket.

use crate::{InboxEntry, Message};
use serde::{Deserialize, Serialize};

/// Body of `POST /v1/dialogs/{user}/messages`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SendRequest {
    /// 1 to 64 bytes, unique per author and dialog.
    pub key: String,
    /// 1 to 4,000 characters.
    pub text: String,
}

/// The answer to a send: the place of the message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Sent {
    /// The dialog, e.g. `7_42`.
    pub dialog: String,
    /// The place of the message in it.
    pub seq: u64,
    /// When it was stored.
    pub at: String,
}

/// A page of a dialog, ascending by seq.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct HistoryPage {
    /// The dialog.
    pub dialog: String,
    /// The messages, ascending.
    pub messages: Vec<Message>,
    /// The seq of the first message of the page; 0 for an empty one.
    pub first: u64,
    /// The seq of the last message of the page; 0 for an empty one.
    pub last: u64,
    /// Whether there is more in the direction that was asked for.
    pub more: bool,
    /// Whether messages are known to be missing, because a shard that holds some was declared down.
    pub gap: bool,
}

/// A page of an inbox, newest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct InboxPage {
    /// The dialogs, by the time of their last message, newest first.
    pub dialogs: Vec<InboxEntry>,
    /// Ask again with this for the next page; null at the end.
    pub cursor: Option<String>,
    /// Names of shards that did not answer, whose dialogs are missing here.
    pub incomplete: Vec<String>,
}

/// Body of `PUT /v1/dialogs/{user}/read`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ReadRequest {
    /// The last seq that was read.
    pub seq: u64,
}

/// How far a user has read in a dialog.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ReadMark {
    /// The dialog.
    pub dialog: String,
    /// Who read.
    pub user: u64,
    /// Up to which seq.
    pub seq: u64,
}

/// Body of `POST /v1/dev/token` (embedded mode on loopback only).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DevTokenRequest {
    /// The user.
    pub user: u64,
}

/// A token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Token {
    /// The JWT.
    pub token: String,
}

/// Whether a user has a session anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Presence {
    /// Who.
    pub user: u64,
    /// Whether.
    pub online: bool,
}
