//! The client of the dialog messaging service: [`Client`] keeps a WebSocket open through
//! everything, repeats what was not answered, and delivers every message once and in order; [`Api`]
//! asks over REST. The binary `chat-client` is built from these.

mod to;
mod request;
mod access;
mod api;
pub mod checker;
mod streams;
mod connection;
mod event;
mod backlog;
mod actor;
mod client;

pub use access::{Access, TokenSource};
pub use api::Api;
pub use client::{Client, Events};
pub use event::Event;
pub use to::To;

use chat_wire::ErrorBody;

/// Why a request got no answer of its kind.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ClientError {
    /// The server refused, for good.
    #[error("{}: {}", .0.code, .0.message)]
    Refused(Box<ErrorBody>),
    /// The request is larger than a frame may be.
    #[error("too large: {0}")]
    TooLarge(String),
    /// The server cannot be reached, or speaks another protocol.
    #[error("{0}")]
    Connection(String),
    /// The client was closed before the answer came.
    #[error("the client is closed")]
    Closed,
}
