//! Why a store did not carry out a call.

use crate::domain::topology::TopologyRef;

/// Why a store did not do what it was asked. Texts name no URL, no password and no message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// A deadlock or a lock wait that took too long: nothing was written, the whole transaction may
    /// be repeated.
    #[error("conflict: {0}")]
    Conflict(String),
    /// No connection: nothing was written.
    #[error("unreachable: {0}")]
    Unreachable(String),
    /// No connection in time: nothing was written. The database is dead, or it is slow.
    #[error("unreachable: {0}")]
    Slow(String),
    /// All connections that this instance may have are in use: nothing was written, and it says
    /// nothing about the database.
    #[error("busy: {0}")]
    Busy(String),
    /// The connection broke in the middle: whether it was written is not known. Repeat it with the
    /// same keys.
    #[error("connection lost: {0}")]
    Lost(String),
    /// The database is not the one it should be.
    #[error("{0}")]
    WrongIdentity(String),
    /// The database refused it, for this reason.
    #[error("refused: {0}")]
    Refused(String),
    /// The shard has another topology than the step was decided by: nothing was done; look again.
    #[error("the shard has topology {0}")]
    OtherTopology(TopologyRef),
}

/// A value that this version never writes.
pub(super) fn corrupt(column: &str) -> StoreError {
    StoreError::Refused(format!(
        "{column} holds a value that this version never writes"
    ))
}
