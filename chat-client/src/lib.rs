//! The client of the dialog messaging service: [`Client`] keeps a WebSocket open through everything, repeats what was not
//! answered, and tells of every message once and in order; [`Api`] asks over REST. The binary `chat-client` is built from these.

mod access;
mod api;
mod client;
mod connection;
mod streams;

pub use access::{Access, TokenSource};
pub use api::Api;
pub use client::{Client, Event, Events};

use chat_wire::ErrorBody;

/// Why a request got no answer of its kind.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ClientError {
    /// The server said no, for good.
    #[error("{}: {}", .0.code, .0.message)]
    Refused(Box<ErrorBody>),
    /// The server cannot be reached, or speaks another language.
    #[error("{0}")]
    Connection(String),
    /// The client was closed before the answer came.
    #[error("the client is closed")]
    Closed,
}
