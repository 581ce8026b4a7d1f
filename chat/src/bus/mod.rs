//! What instances publish to each other: one contract, two buses. `tests/bus_contract.rs` runs the
//! same cases on both.
//!
//! A bus is a hint and may lose anything: the shard is the truth. Nothing here waits, and nothing
//! rests on an answer.

pub mod event;

mod local;
mod nats;

pub use local::LocalBus;
pub use nats::NatsBus;

use crate::domain::dialog::UserId;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{broadcast, watch};

/// What is listened for and published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Topic {
    /// What concerns a user. Who listens has a session of that user.
    User(UserId),
    /// Whether a user comes or goes.
    Presence(UserId),
    /// Heartbeats of instances.
    Heartbeats,
    /// Tokens that are refused, and sessions that end.
    Revocations,
    /// The last seqs of dialogs whose messages were published a while ago.
    Hints,
}

/// Takes what comes for a topic. Called on the bus's own tasks: it must not wait.
pub type Sink = Arc<dyn Fn(Bytes) + Send + Sync>;

/// Whether the bus connects this instance with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BusState {
    /// There is only this instance, by configuration.
    Standalone,
    /// It does.
    Connected,
    /// It does not now; it will again.
    Disconnected,
}

/// Something may have been lost for anybody here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// The bus was away for so long.
    Disconnected(Duration),
    /// A listener here was too slow.
    SlowConsumer,
}

/// Interest in a topic; leaves when it is dropped.
pub struct Listening {
    effective: watch::Receiver<bool>,
    _end: Box<dyn Send + Sync>,
}

impl Listening {
    fn until_dropped(end: impl Send + Sync + 'static, effective: watch::Receiver<bool>) -> Self {
        Self {
            effective,
            _end: Box::new(end),
        }
    }

    /// Becomes true once publications of others are received, or after a limit.
    #[must_use]
    pub fn effective(&self) -> watch::Receiver<bool> {
        self.effective.clone()
    }
}

/// What an instance asks of a bus.
pub trait Bus: Send + Sync + 'static {
    /// Publishes to the other instances that subscribe to `topic`; never to this one.
    fn publish(&self, topic: Topic, payload: Bytes);

    /// Subscribes to the publications of others for `topic`.
    fn listen(&self, topic: Topic, sink: Sink) -> Listening;

    /// Waits until everything that was published is on its way; only as long as that is worth it.
    fn flush(&self) -> BoxFuture<'static, ()>;

    /// Whether another instance listens for `topic`; `None` while that is unknown.
    fn ask(&self, topic: Topic) -> BoxFuture<'static, Option<bool>>;

    /// Subscribes to reports that publications may have been lost.
    fn losses(&self) -> broadcast::Receiver<Loss>;

    /// Whether others can be reached.
    fn state(&self) -> BusState;
}
