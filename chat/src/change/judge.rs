//! A shard was declared down: for every slot it is decided who owns it now (A2 to A4 of `docs/SHARDING.md`).

use super::fault::point;
use super::mover::{NotMoved, take};
use crate::cluster::View;
use crate::ownership::{SlotRow, SlotState, Step, adjudicate};
use crate::ring::Slot;
use crate::store::Shard;
use futures_util::StreamExt;
use std::collections::{BTreeMap, BTreeSet};

/// All rows of all live shards: by shard, and in it by slot.
pub type Rows = BTreeMap<String, Vec<SlotRow>>;

/// Steps that are taken at once.
pub const AT_ONCE: usize = 16;

/// Judges every slot by `rows`, which must be those of all live shards. `true` when there is nothing left to do: every slot is
/// owned, or on its way between live shards.
///
/// # Errors
/// [`NotMoved`] of the first step that could not be taken: look at all rows anew, and judge again.
pub async fn judge(view: &View, rows: &Rows) -> Result<bool, NotMoved> {
    let missing: BTreeSet<String> = view.document.down().map(str::to_owned).collect();
    let mut steps: Vec<(Shard, Slot, Step)> = Vec::new();
    for slot in Slot::all() {
        let live: BTreeMap<String, SlotRow> = rows
            .iter()
            .map(|(name, rows)| (name.clone(), rows[slot.index()].clone()))
            .collect();
        let judgement = adjudicate(&live, view.wanted(slot));
        if let Some(shard) = judgement
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
            let generation = view.document.generation;
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
        for (name, seen) in judgement.fence {
            if let Some(shard) = view.shard(&name).cloned() {
                steps.push((shard, slot, Step::Fence { seen }));
            }
        }
    }
    let nothing_left = steps.is_empty();
    let mut taken = futures_util::stream::iter(steps)
        .map(|(shard, slot, step)| async move {
            let taken = take(&shard, &view.doc, slot, &step).await;
            point("claimed");
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
pub fn owner_of<'a>(view: &'a View, rows: &Rows, slot: Slot) -> Option<(&'a Shard, SlotRow)> {
    let (name, row) = rows.iter().find_map(|(name, rows)| {
        let row = &rows[slot.index()];
        (row.state == SlotState::Owner).then_some((name, row))
    })?;
    Some((view.shard(name)?, row.clone()))
}
