//! The frames of a WebSocket.

use crate::ErrorBody;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A frame from client to server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ClientFrame {
    /// Stores a message in the dialog with `to`, and delivers it.
    Send {
        /// Repeated in the answer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(max_length = 64))]
        id: Option<String>,
        /// 1 to 64 bytes, chosen by the client, unique per author and dialog. A repeat is stored
        /// once.
        #[cfg_attr(
            feature = "openapi",
            schema(min_length = 1, max_length = 64, example = "c1")
        )]
        key: String,
        /// The user id of the recipient; the user's own id for notes to self.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(
            feature = "openapi",
            schema(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 42)
        )]
        to: Option<u64>,
        /// Instead of `to`: the id of the dialog, also of a room.
        #[serde(default, rename = "in", skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(max_length = 40, example = "7_42"))]
        dialog: Option<String>,
        /// 1 to 4,000 characters, stored exactly as sent.
        #[cfg_attr(
            feature = "openapi",
            schema(min_length = 1, max_length = 16_383, example = "hi")
        )]
        text: String,
    },
    /// Makes a room, with the user as its owner. The same `key` always names the same room.
    Create {
        /// Repeated in the answer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(max_length = 64))]
        id: Option<String>,
        /// The request itself.
        #[serde(flatten)]
        room: crate::CreateRoomRequest,
    },
    /// Changes a room: its members, their roles, its title.
    Members {
        /// Repeated in the answer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(max_length = 64))]
        id: Option<String>,
        /// The id of the room.
        #[serde(rename = "in")]
        #[cfg_attr(
            feature = "openapi",
            schema(max_length = 40, example = "raaaaaaaaaaaaaaaaaaaaaaaaaa")
        )]
        dialog: String,
        /// The request itself.
        #[serde(flatten)]
        change: crate::ChangeRoomRequest,
    },
    /// Requests a page of the dialog with `with`: below `before`, above `after`, or the newest
    /// messages.
    History {
        /// Repeated in the answer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(max_length = 64))]
        id: Option<String>,
        /// The user id of the other participant.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(
            feature = "openapi",
            schema(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 42)
        )]
        with: Option<u64>,
        /// Instead of `with`: the id of the dialog, also of a room.
        #[serde(default, rename = "in", skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(max_length = 40, example = "7_42"))]
        dialog: Option<String>,
        /// Messages with a smaller seq, the newest of them.
        #[serde(default)]
        before: Option<u64>,
        /// Messages with a larger seq, the oldest of them.
        #[serde(default)]
        after: Option<u64>,
        /// The largest number of messages; the server's limit is in `welcome`.
        #[serde(default)]
        #[cfg_attr(feature = "openapi", schema(minimum = 1))]
        limit: Option<u32>,
    },
    /// Requests a page of the user's dialogs, newest first.
    Inbox {
        /// Repeated in the answer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(max_length = 64))]
        id: Option<String>,
        /// The largest number of dialogs; the server's limit is in `welcome`.
        #[serde(default)]
        #[cfg_attr(feature = "openapi", schema(minimum = 1))]
        limit: Option<u32>,
        /// The `cursor` of the page before.
        #[serde(default)]
        cursor: Option<String>,
    },
    /// Marks the dialog with `with` as read up to `seq`.
    Read {
        /// Repeated in the answer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(max_length = 64))]
        id: Option<String>,
        /// The user id of the other participant.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(
            feature = "openapi",
            schema(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 42)
        )]
        with: Option<u64>,
        /// Instead of `with`: the id of the dialog, also of a room.
        #[serde(default, rename = "in", skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(max_length = 40, example = "7_42"))]
        dialog: Option<String>,
        /// The seq of the last message that was read. A smaller one than before has no effect.
        #[cfg_attr(feature = "openapi", schema(minimum = 0, example = 118))]
        seq: u64,
    },
    /// Requests all messages after these positions, and from then on live messages without a gap.
    /// Sent on a new connection and when a dialog is opened.
    Resume {
        /// Repeated in the answer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(max_length = 64))]
        id: Option<String>,
        /// For each dialog, the seq up to which the client has every message. Their number is
        /// limited by `resume_dialogs` of `welcome`.
        positions: BTreeMap<String, u64>,
        /// The `now` of the last `welcome` or `resumed`. In dialogs without a position, messages
        /// stored since then are sent.
        #[serde(default)]
        since: Option<String>,
    },
    /// The user is writing to `with`. Delivered, never stored.
    Typing {
        /// Repeated in the answer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(max_length = 64))]
        id: Option<String>,
        /// The user id of the other participant.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(
            feature = "openapi",
            schema(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 42)
        )]
        with: Option<u64>,
        /// Instead of `with`: the id of the dialog, also of a room.
        #[serde(default, rename = "in", skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(max_length = 40, example = "7_42"))]
        dialog: Option<String>,
    },
    /// Subscribes to the presence of these users: their state now, and each change.
    Watch {
        /// Repeated in the answer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(max_length = 64))]
        id: Option<String>,
        /// User ids.
        users: Vec<u64>,
    },
    /// Ends the subscription to the presence of these users.
    Unwatch {
        /// Repeated in the answer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(max_length = 64))]
        id: Option<String>,
        /// User ids.
        users: Vec<u64>,
    },
    /// Replaces the token of the session by a new one for the same user, before the old one
    /// expires.
    Auth {
        /// Repeated in the answer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(max_length = 64))]
        id: Option<String>,
        /// The new token.
        token: String,
    },
    /// Requests a `pong`.
    Ping {
        /// Repeated in the answer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(max_length = 64))]
        id: Option<String>,
    },
}

/// A stored entry of a dialog: a message, or what its `kind` says. Its identity is (`dialog`,
/// `seq`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Message {
    /// The dialog, e.g. `7_42`.
    #[cfg_attr(feature = "openapi", schema(example = "7_42"))]
    pub dialog: String,
    /// 1, 2, 3 … within the dialog.
    #[cfg_attr(feature = "openapi", schema(minimum = 0, example = 118))]
    pub seq: u64,
    /// The user id of the author.
    #[cfg_attr(
        feature = "openapi",
        schema(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 42)
    )]
    pub from: u64,
    /// The user id of the recipient, in a dialog between two users.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(
        feature = "openapi",
        schema(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 42)
    )]
    pub to: Option<u64>,
    /// What the entry is; missing for a message. A client shows nothing for a kind that it does not
    /// know.
    #[serde(default, skip_serializing_if = "Kind::is_text")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>, example = "member"))]
    pub kind: Kind,
    /// The seq of the entry that this one is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 1, example = 118))]
    pub of: Option<u64>,
    /// The text, exactly as it was sent. An entry of another kind may have none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[cfg_attr(feature = "openapi", schema(max_length = 16_383, example = "hi"))]
    pub text: String,
    /// The time of storing by the shard's clock, RFC 3339 in UTC with microseconds. It is for
    /// display; the order is by `seq`.
    #[cfg_attr(feature = "openapi", schema(format = DateTime, example = "2026-11-21T05:00:00.123456Z"))]
    pub at: String,
    /// The idempotency key that the author chose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Of a change of a room (`member`): the users who have joined.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub joined: Vec<u64>,
    /// Of a change of a room: the users who have left or were removed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left: Vec<u64>,
    /// Of a change of a room: new roles, by user id. A user who has joined is a member otherwise.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub roles: BTreeMap<String, Role>,
    /// Of a change of a room: its new title.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
}

/// What a member of a room may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Reads and writes, and may leave.
    Member,
    /// Also adds members, removes them, and changes the title.
    Admin,
    /// Also gives and takes roles. A room has one.
    Owner,
}

impl Role {
    /// The name, on the wire and in the tables.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Role::Member => "member",
            Role::Admin => "admin",
            Role::Owner => "owner",
        }
    }
}

/// What those who join a room may read of it.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum RoomHistory {
    /// Everything.
    #[default]
    All,
    /// What is written from then on.
    Since,
}

/// What an entry is. Later versions have kinds that this one does not know.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Kind {
    /// A message.
    #[default]
    Text,
    /// A change of a room: its members, their roles, its title.
    Member,
    /// A kind of a later version.
    Other(String),
}

impl Kind {
    /// The name, on the wire and in the tables.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Kind::Text => "text",
            Kind::Member => "member",
            Kind::Other(name) => name,
        }
    }

    /// Whether it is a message.
    #[must_use]
    pub fn is_text(&self) -> bool {
        *self == Kind::Text
    }
}

impl From<String> for Kind {
    fn from(name: String) -> Self {
        match name.as_str() {
            "text" => Kind::Text,
            "member" => Kind::Member,
            _ => Kind::Other(name),
        }
    }
}

impl From<Kind> for String {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Other(name) => name,
            Kind::Text | Kind::Member => kind.as_str().to_owned(),
        }
    }
}

/// One dialog in an inbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct InboxEntry {
    /// The dialog, e.g. `7_42`.
    #[cfg_attr(feature = "openapi", schema(example = "7_42"))]
    pub dialog: String,
    /// The user id of the other participant, in a dialog between two users.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(
        feature = "openapi",
        schema(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 42)
    )]
    pub with: Option<u64>,
    /// The title of a room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// The newest entry.
    pub last: Message,
    /// The seq up to which this user has read.
    pub read: u64,
    /// The number of messages of the other user above `read`; counted up to 100, which means "99+".
    pub unread: u32,
}

/// The limits of the server that concern clients.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Limits {
    /// Characters (Unicode scalar values) of a message.
    pub text_chars: u32,
    /// Bytes of a WebSocket message from the client.
    pub frame_bytes: u32,
    /// Messages of a history page.
    pub history_page: u32,
    /// Dialogs of an inbox page.
    pub inbox_page: u32,
    /// Sends of a user per second, in the long run.
    pub sends_per_second: u32,
    /// Frames of a session per second.
    pub frames_per_second: u32,
    /// Dialogs of a `resume`.
    #[serde(default)]
    pub resume_dialogs: u32,
    /// Messages of a dialog that a `resume` replays; a client that is further behind must read the
    /// history.
    #[serde(default)]
    pub resume_messages: u32,
    /// Users whose presence a session may watch.
    #[serde(default)]
    pub watched_users: u32,
    /// Members of a room.
    #[serde(default)]
    pub room_members: u32,
    /// The greatest age of `since` in a `resume`, in hours.
    #[serde(default)]
    pub resume_hours: u32,
    /// Units of work of a user per second, over all sessions and REST; docs/PROTOCOL.md defines the
    /// unit.
    #[serde(default)]
    pub work_per_second: u32,
    /// Units of work of a user at once.
    #[serde(default)]
    pub work_burst: u32,
}

/// A frame from server to client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ServerFrame {
    /// The first frame of a session.
    Welcome {
        /// The user id in the token.
        #[cfg_attr(
            feature = "openapi",
            schema(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 42)
        )]
        user: u64,
        /// The id of this session in the server's logs.
        session: String,
        /// `chat.v1`.
        protocol: String,
        /// The limits that the server enforces.
        limits: Limits,
        /// The time by the server's clock, for `since` of a later `resume`.
        #[serde(default)]
        #[cfg_attr(feature = "openapi", schema(format = DateTime, example = "2026-11-21T05:00:00.123456Z"))]
        now: String,
    },
    /// The answer to `send`, after the shard's COMMIT.
    Sent {
        /// The request's id.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(max_length = 64))]
        id: Option<String>,
        /// The idempotency key of the send.
        #[cfg_attr(
            feature = "openapi",
            schema(min_length = 1, max_length = 64, example = "c1")
        )]
        key: String,
        /// The dialog, e.g. `7_42`.
        #[cfg_attr(feature = "openapi", schema(example = "7_42"))]
        dialog: String,
        /// The seq of the message.
        #[cfg_attr(feature = "openapi", schema(minimum = 0, example = 118))]
        seq: u64,
        /// The time of storing.
        #[cfg_attr(feature = "openapi", schema(format = DateTime, example = "2026-11-21T05:00:00.123456Z"))]
        at: String,
        /// The answer does not take the place of the message in the order of the dialog: the
        /// message was sent before, or comes as `message`.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        early: bool,
    },
    /// The answer to `create`, after the shard's COMMIT.
    Created {
        /// The request's id.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(max_length = 64))]
        id: Option<String>,
        /// The idempotency key of the request.
        #[cfg_attr(
            feature = "openapi",
            schema(min_length = 1, max_length = 64, example = "c1")
        )]
        key: String,
        /// The id of the room.
        #[cfg_attr(feature = "openapi", schema(example = "raaaaaaaaaaaaaaaaaaaaaaaaaa"))]
        dialog: String,
        /// The seq of its first entry.
        #[cfg_attr(feature = "openapi", schema(minimum = 0, example = 1))]
        seq: u64,
        /// The time of storing.
        #[cfg_attr(feature = "openapi", schema(format = DateTime, example = "2026-11-21T05:00:00.123456Z"))]
        at: String,
    },
    /// A message for this user, or one that this user sent from another session.
    Message(Message),
    /// An entry of another kind than a message. It takes its `seq` in the order of the dialog.
    Entry(Message),
    /// The answer to `history`.
    History {
        /// The request's id.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(max_length = 64))]
        id: Option<String>,
        /// The page.
        #[serde(flatten)]
        page: crate::HistoryPage,
    },
    /// The answer to `inbox`.
    Inbox {
        /// The request's id.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(max_length = 64))]
        id: Option<String>,
        /// The page.
        #[serde(flatten)]
        page: crate::InboxPage,
    },
    /// The answer to `resume`, after the missed messages. Without a request, and without `id`, if
    /// the session lost its position in a dialog.
    Resumed {
        /// The request's id.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(max_length = 64))]
        id: Option<String>,
        /// For each dialog, the seq up to which the client has every message now.
        positions: BTreeMap<String, u64>,
        /// Dialogs whose position is too far behind or beyond the last message: the client must
        /// read their history.
        resync: Vec<String>,
        /// The read marks of both participants in the dialogs of `positions`.
        reads: Vec<crate::ReadMark>,
        /// Shards that do not answer. The missed messages of their dialogs follow when they do.
        incomplete: Vec<String>,
        /// The time by the server's clock, for `since` of a later `resume`.
        #[cfg_attr(feature = "openapi", schema(format = DateTime, example = "2026-11-21T05:00:00.123456Z"))]
        now: String,
    },
    /// A participant has read up to `seq`.
    Read(crate::ReadMark),
    /// A user is typing. Valid for six seconds.
    Typing {
        /// The dialog, e.g. `7_42`.
        #[cfg_attr(feature = "openapi", schema(example = "7_42"))]
        dialog: String,
        /// The user who is typing.
        #[cfg_attr(
            feature = "openapi",
            schema(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 42)
        )]
        user: u64,
    },
    /// The presence of a watched user.
    Presence(crate::Presence),
    /// The answer to `auth`: the session lasts until the new token expires.
    Authenticated {
        /// The request's id.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(max_length = 64))]
        id: Option<String>,
        /// The expiry of the new token, in seconds since 1970.
        expires: u64,
    },
    /// The answer to `ping`.
    Pong {
        /// The request's id.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(max_length = 64))]
        id: Option<String>,
    },
    /// The answer to a `members`, `read`, `typing`, `watch` or `unwatch` that has an `id`: it is
    /// carried out.
    Done {
        /// The request's id.
        id: String,
    },
    /// A request failed; the session goes on.
    Error(ErrorBody),
}

impl ServerFrame {
    /// The frame of a stored entry.
    #[must_use]
    pub fn entry(entry: Message) -> Self {
        if entry.kind.is_text() {
            ServerFrame::Message(entry)
        } else {
            ServerFrame::Entry(entry)
        }
    }
}
