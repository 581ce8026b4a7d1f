//! Failover: a shard was declared down, and other shards claim its slots.

use super::failpoint::failpoint;
use super::step::{MoveError, take};
use crate::cluster::TopologyView;
use crate::domain::failover::plan_failover;
use crate::domain::ownership::{SlotRow, SlotState, Step};
use crate::domain::slot::Slot;
use crate::store::Shard;
use futures_util::StreamExt;
use std::collections::{BTreeMap, BTreeSet};

/// All rows of all live shards: by shard, and in it by slot.
pub type Rows = BTreeMap<String, Vec<SlotRow>>;

/// Steps that are taken at once.
pub const AT_ONCE: usize = 16;

/// Claims the slots that have no owner by `rows`, which must be those of all live shards. `true` if
/// there was nothing to do: every slot has an owner, or moves between live shards.
///
/// # Errors
/// [`MoveError`] of the first step that failed: read all rows again, and repeat.
pub async fn run(view: &TopologyView, rows: &Rows) -> Result<bool, MoveError> {
    let missing: BTreeSet<String> = view.topology.down().map(str::to_owned).collect();
    let mut steps: Vec<(Shard, Slot, Step)> = Vec::new();
    for slot in Slot::all() {
        let live: BTreeMap<String, SlotRow> = rows
            .iter()
            .map(|(name, rows)| (name.clone(), rows[slot.index()].clone()))
            .collect();
        let plan = plan_failover(&live, view.target(slot));
        if let Some(shard) = plan
            .claim
            .as_deref()
            .and_then(|name| view.shard(name))
            .cloned()
        {
            let term = live
                .values()
                .map(|row| row.term.max(row.next_term.unwrap_or(0)))
                .max()
                .unwrap_or(0)
                + 1;
            let generation = view.topology.generation;
            steps.push((
                shard,
                slot,
                Step::Claim {
                    term,
                    generation,
                    missing: missing.clone(),
                },
            ));
        }
        for (name, seen) in plan.fence {
            if let Some(shard) = view.shard(&name).cloned() {
                steps.push((shard, slot, Step::Fence { seen }));
            }
        }
    }
    let nothing_left = steps.is_empty();
    let mut taken = futures_util::stream::iter(steps)
        .map(|(shard, slot, step)| async move {
            let taken = take(&shard, &view.topology_ref, slot, &step).await;
            failpoint("claimed");
            taken
        })
        .buffer_unordered(AT_ONCE);
    let mut failed = None;
    while let Some(taken) = taken.next().await {
        if let Err(e) = taken {
            failed.get_or_insert(e);
        }
    }
    failed.map_or(Ok(nothing_left), Err)
}

/// The shard that owns a slot, by rows that were read together.
#[must_use]
pub fn owner_of<'a>(
    view: &'a TopologyView,
    rows: &Rows,
    slot: Slot,
) -> Option<(&'a Shard, SlotRow)> {
    let (name, row) = rows.iter().find_map(|(name, rows)| {
        let row = &rows[slot.index()];
        (row.state == SlotState::Owner).then_some((name, row))
    })?;
    Some((view.shard(name)?, row.clone()))
}
