//! What happens to a slot when a move was interrupted or a shard was declared down: decided from
//! the shards' rows alone.

use super::ownership::{SlotRow, SlotState};
use std::collections::BTreeMap;

/// The outcome of the move of a sealed slot, by the evidence at its target. No clock decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SealedOutcome {
    /// The target owns the slot: release the source.
    Completed,
    /// The target still expects the slot: finish the move, or undo it.
    InProgress,
    /// The target does not expect the slot any more: un-seal the source.
    Abandoned,
}

/// The outcome of a move from `source` under `term`, by the target's row.
#[must_use]
pub fn resolve_sealed(source: &str, term: u64, target: &SlotRow) -> SealedOutcome {
    if target.activated >= term {
        SealedOutcome::Completed
    } else if target.is_incoming(source, term) {
        SealedOutcome::InProgress
    } else {
        SealedOutcome::Abandoned
    }
}

/// The steps of a failover for one slot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FailoverPlan {
    /// The shard that claims the slot; `None` if it has an owner, or a move between live shards
    /// will give it one.
    pub claim: Option<String>,
    /// Rows of moves from or to shards that are down, which are fenced.
    pub fence: Vec<(String, SlotRow)>,
}

/// Plans the failover of one slot: `live` are its rows on all shards that are not down, `target` is
/// the shard on the ring. A live owner keeps the slot. Without one, the shard that was sealed for a
/// dead shard claims it, or else the target.
#[must_use]
pub fn plan_failover(live: &BTreeMap<String, SlotRow>, target: &str) -> FailoverPlan {
    let owner = live.iter().find(|(_, row)| row.state == SlotState::Owner);
    let sealed = |row: &SlotRow| {
        (row.state == SlotState::Sealed)
            .then(|| row.peer.clone().zip(row.next_term))
            .flatten()
    };
    let under_way = |row: &SlotRow| {
        sealed(row).is_some_and(|(peer, term)| {
            live.get(&peer)
                .is_some_and(|target| target.activated < term)
        })
    };
    let moving = live.iter().find(|(_, row)| under_way(row));
    let keeper = owner.or(moving).map(|(name, _)| name.clone());
    let claim = if keeper.is_some() {
        None
    } else {
        let to_the_dead = live
            .iter()
            .filter(|(_, row)| sealed(row).is_some_and(|(peer, _)| !live.contains_key(&peer)));
        let last = to_the_dead.max_by_key(|(_, row)| row.next_term);
        Some(last.map_or_else(|| target.to_owned(), |(name, _)| name.clone()))
    };
    let winner = keeper.or_else(|| claim.clone());
    let left_over = |name: &String, row: &SlotRow| {
        Some(name) != winner.as_ref()
            && match row.state {
                SlotState::Sealed => {
                    !under_way(row)
                        && row
                            .peer
                            .as_ref()
                            .is_some_and(|peer| !live.contains_key(peer))
                }
                SlotState::Incoming => row
                    .peer
                    .as_ref()
                    .is_some_and(|peer| !live.contains_key(peer)),
                SlotState::None | SlotState::Owner | SlotState::Fenced => false,
            }
    };
    let fence = live
        .iter()
        .filter(|(name, row)| left_over(name, row))
        .map(|(name, row)| (name.clone(), row.clone()));
    FailoverPlan {
        claim,
        fence: fence.collect(),
    }
}
