//! The frames of the `chat.v1` subprotocol, the bodies of the REST API, and the error codes both
//! share.
//!
//! One JSON object a text frame, `type` is its kind. Unknown fields are ignored, so that either
//! side may be newer. `docs/PROTOCOL.md` describes every frame in prose; a test of the server holds
//! that page and these types together.
//!
//! This crate knows serde and nothing else: the server, the Rust client and the tests all speak
//! through it.

mod close;
mod error;
mod frame;
mod rest;

pub use close::Close;
pub use error::{ErrorBody, ErrorCode};
pub use frame::{ClientFrame, InboxEntry, Kind, Limits, Message, Role, RoomHistory, ServerFrame};
pub use rest::{
    ChangeRoomRequest, CreateRoomRequest, DevTokenRequest, HistoryPage, InboxPage, Presence,
    ReadMark, ReadRequest, Room, RoomMember, RoomMembersPage, SendRequest, Sent, Token,
};

/// The WebSocket subprotocol a client offers and the server echoes.
pub const PROTOCOL: &str = "chat.v1";

/// A browser cannot set headers on a WebSocket: it offers `bearer.<jwt>` as a second subprotocol
/// instead.
pub const BEARER_PROTOCOL_PREFIX: &str = "bearer.";

/// Seqs of a later generation begin above a multiple of this; a generation begins when a shard is
/// declared down.
pub const GENERATION: u64 = 1 << 40;

/// Whether a message with `seq` may be the next one of a dialog after `before`: one more, or the
/// first of a later generation.
#[must_use]
pub fn follows(before: u64, seq: u64) -> bool {
    before.checked_add(1) == Some(seq) || (seq % GENERATION == 1 && seq > before)
}

/// The largest user id: 2^53 - 1, the largest integer that JavaScript holds exactly.
pub const MAX_USER_ID: u64 = (1 << 53) - 1;
