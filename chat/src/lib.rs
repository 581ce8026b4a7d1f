//! A dialog messaging server: durable before acknowledged, stored once, ordered and dense, on sharded MySQL.

pub mod bus;
pub mod cluster;
pub mod config;
pub mod delivery;
pub mod dialog;
pub mod http;
pub mod messages;
pub mod metrics;
pub mod outbox;
pub mod ownership;
pub mod refusal;
pub mod registry;
pub mod ring;
pub mod server;
pub mod session;
pub mod store;
pub mod topology;
pub mod writer;
