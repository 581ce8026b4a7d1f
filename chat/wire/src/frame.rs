//! The frames of a WebSocket.

use crate::ErrorBody;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A frame from client to server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ClientFrame {
    /// Store a message in the dialog with `to`, and deliver it.
    Send {
        /// 1 to 64 bytes, chosen by the client, unique per author and dialog. A repeat is stored once.
        key: String,
        /// The other user; one's own id for notes to self.
        to: u64,
        /// 1 to 4,000 characters, stored exactly as sent.
        text: String,
    },
    /// A page of the dialog with `with`: below `before`, above `after`, or the newest.
    History {
        /// Comes back in the answer.
        #[serde(default)]
        id: Option<String>,
        /// The other user.
        with: u64,
        /// Messages with a smaller seq, the newest of them.
        #[serde(default)]
        before: Option<u64>,
        /// Messages with a larger seq, the oldest of them.
        #[serde(default)]
        after: Option<u64>,
        /// At most so many.
        #[serde(default)]
        limit: Option<u32>,
    },
    /// A page of the user's dialogs, newest first.
    Inbox {
        /// Comes back in the answer.
        #[serde(default)]
        id: Option<String>,
        /// At most so many.
        #[serde(default)]
        limit: Option<u32>,
        /// The `cursor` of the page before.
        #[serde(default)]
        cursor: Option<String>,
    },
    /// Everything up to `seq` in the dialog with `with` was read.
    Read {
        /// The other user.
        with: u64,
        /// The last seq that was read. A smaller one than before changes nothing.
        seq: u64,
    },
    /// Everything after these positions, and from then on whatever comes, in order and without a hole. On a new connection,
    /// and on entering a dialog.
    Resume {
        /// Comes back in the answer.
        #[serde(default)]
        id: Option<String>,
        /// By dialog, the seq up to which the client has everything; at most as many as `welcome` says.
        positions: BTreeMap<String, u64>,
        /// The `now` of the last `welcome` or `resumed` before: messages since then in dialogs without a position are sent too.
        #[serde(default)]
        since: Option<String>,
    },
    /// The user is writing to `with`. Passed on, never stored.
    Typing {
        /// The other user.
        with: u64,
    },
    /// Send the presence of these users, now and after every change.
    Watch {
        /// The users.
        users: Vec<u64>,
    },
    /// Stop sending the presence of these users.
    Unwatch {
        /// The users.
        users: Vec<u64>,
    },
    /// A fresh token for the same user, before the old one expires.
    Auth {
        /// The new token.
        token: String,
    },
    /// Answered by `pong`.
    Ping {
        /// Comes back in the answer.
        #[serde(default)]
        id: Option<String>,
    },
}

/// A stored message. Its identity is (`dialog`, `seq`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Message {
    /// The dialog, e.g. `7_42`.
    pub dialog: String,
    /// 1, 2, 3 … within the dialog.
    pub seq: u64,
    /// The author.
    pub from: u64,
    /// The other user.
    pub to: u64,
    /// The text, exactly as it was sent.
    pub text: String,
    /// When it was stored, by the shard's clock: RFC 3339 in UTC with microseconds. For showing; order is by `seq`.
    pub at: String,
    /// The author's key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}

/// One dialog in an inbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct InboxEntry {
    /// The dialog, e.g. `7_42`.
    pub dialog: String,
    /// The other user.
    pub with: u64,
    /// The newest message.
    pub last: Message,
    /// Up to which seq this user has read.
    pub read: u64,
    /// The number of messages of the other user above `read`; counted up to 100, which means "99+".
    pub unread: u32,
}

/// The limits that a client should know, in `welcome`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Limits {
    /// Characters (Unicode scalar values) of a message.
    pub text_chars: u32,
    /// Bytes of a WebSocket message from the client.
    pub frame_bytes: u32,
    /// Messages a history page has at most.
    pub history_page: u32,
    /// Dialogs an inbox page has at most.
    pub inbox_page: u32,
    /// Sends a second and user, in the long run.
    pub sends_per_second: u32,
    /// Frames a second and session.
    pub frames_per_second: u32,
    /// Dialogs of a `resume`.
    #[serde(default)]
    pub resume_dialogs: u32,
    /// Messages of a dialog that a `resume` replays; a client that is further behind must read the history.
    #[serde(default)]
    pub resume_messages: u32,
    /// The number of users that a session may watch.
    #[serde(default)]
    pub watched_users: u32,
    /// How far back the `since` of a `resume` reaches, in hours.
    #[serde(default)]
    pub resume_hours: u32,
    /// Units of work a second and user, over all sessions and REST: see the limits in PROTOCOL.
    #[serde(default)]
    pub work_per_second: u32,
    /// Units of work at once.
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
        /// Who the token says the client is.
        user: u64,
        /// The name of this session, for logs.
        session: String,
        /// `chat.v1`.
        protocol: String,
        /// What the server will not accept more of.
        limits: Limits,
        /// The server's clock: for `since` of a later `resume`.
        #[serde(default)]
        now: String,
    },
    /// The answer to `send`, after the shard's COMMIT.
    Sent {
        /// The client's key.
        key: String,
        /// The dialog.
        dialog: String,
        /// The place of the message in the dialog.
        seq: u64,
        /// When it was stored.
        at: String,
    },
    /// A message for this user, or one that this user sent from another session.
    Message(Message),
    /// The answer to `history`.
    History {
        /// The request's id.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<String>,
        /// The page.
        #[serde(flatten)]
        page: crate::HistoryPage,
    },
    /// The answer to `inbox`.
    Inbox {
        /// The request's id.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<String>,
        /// The page.
        #[serde(flatten)]
        page: crate::InboxPage,
    },
    /// The answer to `resume`; what was missed comes before it. Without an `id` when nobody asked: the session could not be
    /// kept level in a dialog.
    Resumed {
        /// The request's id.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<String>,
        /// By dialog, up to where the client has everything now.
        positions: BTreeMap<String, u64>,
        /// Dialogs that are too far behind, or whose position is beyond the log: read their history.
        resync: Vec<String>,
        /// How far both sides of the dialogs in `positions` have read, where they have.
        reads: Vec<crate::ReadMark>,
        /// Shards that do not answer: what is missed in their dialogs comes when they do.
        incomplete: Vec<String>,
        /// The server's clock: for `since` of a later `resume`.
        now: String,
    },
    /// A participant has read up to `seq`.
    Read(crate::ReadMark),
    /// A user is typing; for six seconds, unless it is repeated.
    Typing {
        /// Where.
        dialog: String,
        /// Who.
        user: u64,
    },
    /// Whether a watched user has a session anywhere.
    Presence(crate::Presence),
    /// The answer to `auth`: the session now lasts as long as the new token.
    Authenticated {
        /// When the new token expires, in seconds since 1970.
        expires: u64,
    },
    /// The answer to `ping`.
    Pong {
        /// The request's id.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<String>,
    },
    /// A request failed; the session goes on.
    Error(ErrorBody),
}
