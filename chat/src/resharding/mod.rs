//! Changes of the shard set while the service runs: an edit of `shards.toml` becomes a topology, a
//! topology becomes slot moves.
//!
//! Every instance follows its file and the topology in effect. One instance at a time holds the
//! coordinator lock and carries a topology out; the lock avoids duplicate work, and safety does not
//! depend on it: each step is a compare-and-set in a shard (`docs/SHARDING.md`).

mod failpoint;
pub mod pace;

pub mod step;
mod copy;
pub mod mover;
mod merge;
pub mod failover;

pub mod conflict;
pub mod install;
pub mod watcher;
pub mod estimate;
mod progress;

mod lock;
mod coordinator;
mod service;

pub use failpoint::FAILPOINTS;
pub use progress::Report;
pub use service::{Resharding, Status};
