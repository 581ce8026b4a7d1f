//! Bodies of the REST API; pages are the same over WebSocket.

use crate::{InboxEntry, Message, Role, RoomHistory};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

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

/// Makes a room; body of `POST /v1/rooms`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct CreateRoomRequest {
    /// The idempotency key: 1 to 64 bytes. The same user and key name the same room.
    #[cfg_attr(
        feature = "openapi",
        schema(min_length = 1, max_length = 64, example = "c1")
    )]
    pub key: String,
    /// 1 to 128 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(
        feature = "openapi",
        schema(min_length = 1, max_length = 128, example = "lunch")
    )]
    pub title: Option<String>,
    /// User ids of the first members, beside the user who makes it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub members: Vec<u64>,
    /// What those who join may read; everything by default.
    #[serde(default)]
    pub history: RoomHistory,
}

/// Changes a room; body of `POST /v1/rooms/{room}/members`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ChangeRoomRequest {
    /// The idempotency key: 1 to 64 bytes, unique per author and room.
    #[cfg_attr(
        feature = "openapi",
        schema(min_length = 1, max_length = 64, example = "c1")
    )]
    pub key: String,
    /// User ids to add. Those who are members already stay.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub add: Vec<u64>,
    /// User ids to remove; one's own to leave.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remove: Vec<u64>,
    /// New roles, by user id.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub roles: BTreeMap<String, Role>,
    /// A new title of 1 to 128 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(
        feature = "openapi",
        schema(min_length = 1, max_length = 128, example = "lunch")
    )]
    pub title: Option<String>,
}

/// A room, as one of its members sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Room {
    /// The id of the room.
    #[cfg_attr(feature = "openapi", schema(example = "raaaaaaaaaaaaaaaaaaaaaaaaaa"))]
    pub dialog: String,
    /// Its title.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// What those who join may read.
    pub history: RoomHistory,
    /// The number of members.
    pub members: u64,
    /// The role of the user who asks.
    pub role: Role,
    /// The seq up to which this user has read.
    pub read: u64,
}

/// A member of a room.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct RoomMember {
    /// The user id.
    #[cfg_attr(
        feature = "openapi",
        schema(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 42)
    )]
    pub user: u64,
    /// What the user may do.
    pub role: Role,
    /// The seq up to which the user has read.
    pub read: u64,
}

/// Members of a room, by user id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct RoomMembersPage {
    /// The members.
    pub members: Vec<RoomMember>,
    /// `after` of the next page; null on the last page.
    pub next: Option<u64>,
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
