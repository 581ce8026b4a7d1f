//! The slots that a shard answers for.

use super::{StoreError, corrupt};
use crate::domain::ownership::{COMPLETE, History, SlotState};
use crate::domain::slot::{Slot, SlotSet};
use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

/// The slots that a shard answers reads for, in one snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServedSlots {
    /// Those it owned.
    pub owned: SlotSet,
    /// Those it had sealed: its answer counts until the target has one.
    pub sealed: SlotSet,
    /// Shards that were declared down and may hold dialogs of those it owned.
    pub missing_from: BTreeSet<String>,
}

impl ServedSlots {
    pub(super) fn nothing() -> Self {
        Self {
            owned: SlotSet::empty(),
            sealed: SlotSet::empty(),
            missing_from: BTreeSet::new(),
        }
    }

    /// Leaves only these slots.
    pub(super) fn keep(&mut self, slots: impl Iterator<Item = Slot>) {
        let mut kept = SlotSet::empty();
        slots.for_each(|slot| {
            kept.insert(slot);
        });
        self.owned.retain(&kept);
        self.sealed.retain(&kept);
    }

    /// Adds slots that have the same state and history.
    pub(super) fn add(
        &mut self,
        state: &str,
        history: &str,
        slots: &[u16],
    ) -> Result<(), StoreError> {
        let set = match state.parse() {
            Ok(SlotState::Owner) => &mut self.owned,
            Ok(SlotState::Sealed) => &mut self.sealed,
            Ok(SlotState::None | SlotState::Incoming | SlotState::Fenced) | Err(_) => {
                return Err(corrupt("slots.state"));
            }
        };
        for slot in slots {
            set.insert(Slot::new(*slot).ok_or_else(|| corrupt("slots.slot"))?);
        }
        if history != COMPLETE {
            let history: History = history.parse().map_err(|_| corrupt("slots.history"))?;
            self.missing_from.extend(history.missing);
        }
        Ok(())
    }
}

/// The slots that a shard answered for when they were last read, and the revision that they were
/// read under: they are 4,096 rows, and change only when a slot changes hands.
#[derive(Default)]
pub(super) struct ServedSlotsCache(Mutex<Option<(u64, ServedSlots)>>);

impl ServedSlotsCache {
    /// What they are under a revision, if they were read under it.
    pub(super) fn of(&self, revision: u64) -> Option<ServedSlots> {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let held = held.as_ref().filter(|(of, _)| *of == revision);
        held.map(|(_, holding)| holding.clone())
    }

    pub(super) fn keep(&self, revision: u64, holding: &ServedSlots) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *held = Some((revision, holding.clone()));
    }
}
