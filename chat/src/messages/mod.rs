//! Sends, history, inboxes and read marks: what sessions and REST call. The write path in reading
//! order: [`Dispatch`] routes a message to the queue of its slot, a [`writer`] per shard batches
//! the queues into transactions.

pub mod slot_queue;
mod concurrency;
mod commit_delay;
pub mod writer;
mod dispatch;

mod error;
mod pending_reads;
mod service;
mod owner_read;
mod rooms;
mod history;
mod inbox;
pub mod last_seqs;

pub use dispatch::{Dispatch, SubmitError};
pub use error::RequestError;
pub use history::wire;
pub use service::{Done, Messages, Outgoing, ReadUpTo, Sent, Target};
pub use slot_queue::Requester;
