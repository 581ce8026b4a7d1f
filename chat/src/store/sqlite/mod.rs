//! A shard in a SQLite file: the embedded default, with the same tables, the same steps and the
//! same outcomes as MySQL.
//!
//! SQLite has one writer at a time, so the locks of the protocol come with `BEGIN IMMEDIATE`;
//! readers see snapshots (WAL) and are not in the writer's way. Commits are flushed to the disk
//! before they are acknowledged.

mod connection;
mod rows;
mod control;
mod store;

pub use connection::SqliteStore;
