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
        #[cfg_attr(
            feature = "openapi",
            schema(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 42)
        )]
        to: u64,
        /// 1 to 4,000 characters, stored exactly as sent.
        #[cfg_attr(
            feature = "openapi",
            schema(min_length = 1, max_length = 16_383, example = "hi")
        )]
        text: String,
    },
    /// Requests a page of the dialog with `with`: below `before`, above `after`, or the newest
    /// messages.
    History {
        /// Repeated in the answer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(max_length = 64))]
        id: Option<String>,
        /// The user id of the other participant.
        #[cfg_attr(
            feature = "openapi",
            schema(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 42)
        )]
        with: u64,
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
        #[cfg_attr(
            feature = "openapi",
            schema(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 42)
        )]
        with: u64,
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
        #[cfg_attr(
            feature = "openapi",
            schema(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 42)
        )]
        with: u64,
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

/// A stored message. Its identity is (`dialog`, `seq`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// The user id of the recipient.
    #[cfg_attr(
        feature = "openapi",
        schema(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 42)
    )]
    pub to: u64,
    /// The text, exactly as it was sent.
    #[cfg_attr(
        feature = "openapi",
        schema(min_length = 1, max_length = 16_383, example = "hi")
    )]
    pub text: String,
    /// The time of storing by the shard's clock, RFC 3339 in UTC with microseconds. It is for
    /// display; the order is by `seq`.
    #[cfg_attr(feature = "openapi", schema(format = DateTime, example = "2026-11-21T05:00:00.123456Z"))]
    pub at: String,
    /// The idempotency key that the author chose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}

/// One dialog in an inbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct InboxEntry {
    /// The dialog, e.g. `7_42`.
    #[cfg_attr(feature = "openapi", schema(example = "7_42"))]
    pub dialog: String,
    /// The user id of the other participant.
    #[cfg_attr(
        feature = "openapi",
        schema(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 42)
    )]
    pub with: u64,
    /// The newest message.
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
    },
    /// A message for this user, or one that this user sent from another session.
    Message(Message),
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
    /// The answer to a `read`, `typing`, `watch` or `unwatch` that has an `id`: it is carried out.
    Done {
        /// The request's id.
        id: String,
    },
    /// A request failed; the session goes on.
    Error(ErrorBody),
}
