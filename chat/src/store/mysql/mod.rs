//! A shard in MySQL (8.4, 9) or MariaDB (10.11, 11), in the SQL that both understand.
//!
//! Transactions are texts of several statements, so that they take few round trips; prepared
//! statements cannot be combined. What users wrote enters them as hexadecimal literals only, so
//! that there is nothing to escape.

mod error;
mod sql;
mod connection;
mod marks;
mod write;
mod control;
mod store;

pub use connection::MysqlStore;
