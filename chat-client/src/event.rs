//! What a client reports.

use crate::ClientError;
use chat_wire::{Message, Presence, ReadMark};

/// What happens without being asked for.
#[derive(Clone, Debug)]
pub enum Event {
    /// A connection is up, and everything that was not answered is sent again.
    Connected,
    /// It is down; it will be tried again, unless `Closed` follows.
    Disconnected {
        /// The close code of the server, if it gave one.
        code: Option<u16>,
        /// What happened.
        reason: String,
    },
    /// A message of one of our dialogs, our own included, from every session. Each dialog begins
    /// with the first message that arrives, or after the seq of
    /// [`Client::follow`](crate::Client::follow). From there on every message comes once, in order
    /// and without a gap, through every reconnection.
    Message(Message),
    /// An entry of another kind than a message, in the same order: a change of a room. A kind that
    /// this version does not know is not reported.
    Entry(Message),
    /// A user has read.
    Read(ReadMark),
    /// A user is typing in this dialog; for six seconds, unless it is repeated.
    Typing {
        /// The dialog.
        dialog: String,
        /// The user.
        user: u64,
    },
    /// A watched user came or went.
    Presence(Presence),
    /// This dialog must be read from its history: it has many messages of which none was reported,
    /// or its log is shorter than what the client had of it.
    Resync(String),
    /// The server rejects this client; no further attempt is made.
    Closed(ClientError),
}
