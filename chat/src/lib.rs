//! A dialog messaging server: a message is durable before it is acknowledged, stored once, and
//! numbered without gaps, on sharded MySQL.
//!
//! The modules are declared in import order: each uses only those above it, inside the folders too.
//! A test enforces this. `docs/ARCHITECTURE.md` walks one message and one edit of `shards.toml`
//! through them.

// The ground floor.
pub mod config;
mod descriptors;
pub mod rng;
mod threads;

// The rules. Pure: no async, no clock, no randomness, no file.
pub mod domain;

mod clock;
mod rate_limit;
pub mod audit;
mod budget;
pub mod metrics;

// One shard's database, and the bus between instances.
pub mod store;
pub mod bus;

// All shards together.
pub mod cluster;

// Sends, history, inboxes, read marks.
pub mod messages;

// Changes of the shard set.
pub mod resharding;

// From a stored message to the screens.
mod delivery;

// A connection.
mod error;
mod session;

// The outside.
pub mod http;
pub mod server;
