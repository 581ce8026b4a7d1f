//! Who may write to a slot: the row that a shard keeps for each of the 4096, and what it permits.
//!
//! Safety rests on this row alone. A write holds a shared lock on it and must see `owner`; no file, no map in memory and
//! no clock is asked. The states and the invariants I1 … I16 are described in `docs/SHARDING.md`.

use std::fmt;
use std::str::FromStr;

/// What a shard is to a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SlotState {
    /// Nothing: its rows, if any, are left-overs.
    None,
    /// Reads and writes are served here, and nowhere else.
    Owner,
    /// Was owner, is handing over: no more writes; reads ask the peer first.
    Sealed,
    /// Is receiving a copy.
    Incoming,
    /// Was owner when it was declared down: its rows wait to be merged.
    Fenced,
}

impl SlotState {
    /// As it stands in the table.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            SlotState::None => "none",
            SlotState::Owner => "owner",
            SlotState::Sealed => "sealed",
            SlotState::Incoming => "incoming",
            SlotState::Fenced => "fenced",
        }
    }

    /// Whether a send may be stored here.
    #[must_use]
    pub const fn takes_writes(self) -> bool {
        matches!(self, SlotState::Owner)
    }

    /// Whether a page or an inbox may be answered from here.
    #[must_use]
    pub const fn answers_reads(self) -> bool {
        matches!(self, SlotState::Owner | SlotState::Sealed)
    }
}

/// A word in the table that is none of the states.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no state of a slot")]
pub struct BadState(pub String);

impl FromStr for SlotState {
    type Err = BadState;

    fn from_str(s: &str) -> Result<Self, BadState> {
        [
            SlotState::None,
            SlotState::Owner,
            SlotState::Sealed,
            SlotState::Incoming,
            SlotState::Fenced,
        ]
        .into_iter()
        .find(|state| state.as_str() == s)
        .ok_or_else(|| BadState(s.to_owned()))
    }
}

impl fmt::Display for SlotState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What the data plane needs of a slot's row, read under its lock or in the snapshot of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotView {
    /// What the shard is to the slot.
    pub state: SlotState,
    /// Seqs of new messages are above `generation << 40`.
    pub generation: u32,
    /// Whether all messages are here that were ever acknowledged; not so while a shard that was declared down holds some.
    pub complete: bool,
}

/// The value of the column `history` while nothing is missing.
pub const COMPLETE: &str = "complete";

/// The term a slot's first owner starts with; all others start with 0.
pub const FIRST_TERM: u64 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_reads_back_as_it_was_written() {
        for state in [
            SlotState::None,
            SlotState::Owner,
            SlotState::Sealed,
            SlotState::Incoming,
            SlotState::Fenced,
        ] {
            assert_eq!(state.as_str().parse(), Ok(state));
        }
        assert_eq!("Owner".parse::<SlotState>(), Err(BadState("Owner".into())));
    }

    #[test]
    fn only_the_owner_takes_writes() {
        let all = [
            SlotState::None,
            SlotState::Owner,
            SlotState::Sealed,
            SlotState::Incoming,
            SlotState::Fenced,
        ];
        assert_eq!(
            all.map(SlotState::takes_writes),
            [false, true, false, false, false]
        );
        assert_eq!(
            all.map(SlotState::answers_reads),
            [false, true, true, false, false]
        );
    }
}
