//! All shards together: their initialization, and which of them owns a slot.

mod bootstrap;
mod retry;
mod routing;
mod peers;
mod revocations;

pub use bootstrap::{IfEmpty, StartError, StoreFactory, stores};
pub use peers::{HEARTBEAT, HEARTBEAT_TIMEOUT, PeerEvent, Peers};
pub use retry::OwnerRetry;
pub use revocations::{Notice, Revocations, Unstored};
pub use routing::{Cluster, TopologyView};
