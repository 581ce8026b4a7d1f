//! What instances tell each other: one contract, two buses. `tests/bus_contract.rs` runs the same cases on both.
//!
//! A bus is a hint and may lose anything: the shard is the truth. Nothing here waits, and nothing rests on an answer.

mod local;
mod nats;

pub use local::LocalBus;
pub use nats::NatsBus;

use crate::dialog::UserId;
use bytes::Bytes;
use std::sync::Arc;

/// What is listened for and published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Topic {
    /// What concerns a user.
    User(UserId),
    /// What instances tell each other about themselves.
    Instances,
}

/// Takes what comes for a topic. Called on the bus's own tasks: it must not wait.
pub type Sink = Arc<dyn Fn(Bytes) + Send + Sync>;

/// Whether the bus connects this instance with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BusState {
    /// There is only this instance, by configuration.
    Alone,
    /// It does.
    Connected,
    /// It does not now; it will again.
    Away,
}

/// Interest in a topic; leaves when it is dropped.
pub struct Listening {
    _end: Box<dyn Send + Sync>,
}

impl Listening {
    fn until_dropped(end: impl Send + Sync + 'static) -> Self {
        Self {
            _end: Box::new(end),
        }
    }
}

/// What an instance asks of a bus.
pub trait Bus: Send + Sync + 'static {
    /// Tells the other instances that listen for `topic`; never this one.
    fn publish(&self, topic: Topic, payload: Bytes);

    /// Hears from now on what others publish for `topic`.
    fn listen(&self, topic: Topic, sink: Sink) -> Listening;

    /// Whether others can be reached.
    fn state(&self) -> BusState;
}
