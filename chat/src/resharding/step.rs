//! One step of a move, a failover or a merge: a compare-and-set on a slot's row in one shard.

use crate::domain::ownership::{SlotRow, Step, StepRejected};
use crate::domain::slot::Slot;
use crate::domain::topology::TopologyRef;
use crate::store::{Shard, ShardError};
use std::time::Duration;

/// Why a slot has not moved. Nothing is lost: it is looked at again.
#[derive(Clone, Debug, thiserror::Error)]
pub enum MoveError {
    /// A shard could not be asked, or has another topology.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// Another instance has changed the slot's row.
    #[error("{step} rejected by {shard}: {rejected}")]
    Rejected {
        /// The step.
        step: &'static str,
        /// The shard.
        shard: String,
        /// The row.
        rejected: StepRejected,
    },
    /// The target still has rows of an earlier ownership, and reads may be using them.
    #[error("the target has rows that are not purged yet")]
    Leftovers,
    /// The last delta took too long.
    #[error("copying the last changes took longer than {0:?}")]
    TooSlow(Duration),
    /// The copy is not equal to its source.
    #[error("the copy of slot {0} differs from its source")]
    Differs(Slot),
}

/// A slot's row, read while the shard has the topology: evidence for a decision.
///
/// # Errors
/// [`ShardError`].
pub async fn row_at(
    shard: &Shard,
    topology_ref: &TopologyRef,
    slot: Slot,
) -> Result<SlotRow, ShardError> {
    let topology_ref = topology_ref.clone();
    let rows = shard
        .ask(move |store, identity| async move {
            store.rows(&identity, Some(&topology_ref), Some(slot)).await
        })
        .await?;
    rows.into_iter()
        .next()
        .ok_or_else(|| ShardError::Unreachable(shard.name().to_owned()))
}

/// Takes a step, if the shard has the topology.
///
/// # Errors
/// [`MoveError`].
pub async fn take(
    shard: &Shard,
    topology_ref: &TopologyRef,
    slot: Slot,
    step: &Step,
) -> Result<SlotRow, MoveError> {
    let (topology_ref, asked) = (topology_ref.clone(), step.clone());
    let taken = shard
        .ask(move |store, identity| async move {
            store.step(&identity, &topology_ref, slot, &asked).await
        })
        .await?;
    taken.map_err(|rejected| MoveError::Rejected {
        step: step.name(),
        shard: shard.name().to_owned(),
        rejected,
    })
}
