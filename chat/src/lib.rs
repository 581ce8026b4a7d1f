//! A dialog messaging server: durable before acknowledged, stored once, ordered and dense, on sharded MySQL.
//!
//! The modules in reading order, which is the import order too: each uses only what stands above it, and a test holds
//! that. `docs/ARCHITECTURE.md` walks one message and one edit of `shards.toml` through them.

// What can be set.
pub mod config;

// Chance, in one place.
pub mod chance;

// Pure: no async, no clock, no chance, no file.
pub mod dialog;

pub mod ring;

pub mod topology;

pub mod ownership;

// Below this line the world begins: a shard's database, …
pub mod store;

pub mod metrics;

// … all of them together, …
pub mod cluster;

// … and what is done with them.
pub mod slot_queue;

pub mod in_flight;

pub mod commit_delay;

pub mod writer;

pub mod dispatch;

pub mod rate;

pub mod budget;

pub mod messages;

pub mod heads;

pub mod refusal;

// Telling people.
pub mod bus;

pub mod change;

pub mod outbox;

pub mod sight;

pub mod news;

pub mod feed;

pub mod registry;

pub mod hints;

pub mod delivery;

pub mod presence;

pub mod catchup;

pub mod reconcile;

pub mod session;

// The outside.
pub mod http;

pub mod server;
