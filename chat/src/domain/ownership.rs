//! Ownership of a slot: the row that a shard keeps for each of the 4096 slots, and what it permits.
//!
//! Safety depends on this row alone. A write holds a shared lock on it and must see `owner`; no
//! file, no map in memory and no clock decides. `docs/SHARDING.md` describes the states and steps.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

/// The state of a slot on a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SlotState {
    /// The slot is elsewhere; rows of it, if any, wait to be purged.
    None,
    /// This shard serves reads and writes of the slot, and no other does.
    Owner,
    /// The slot leaves: no more writes; a read must ask the target too.
    Sealed,
    /// The slot comes: rows of it are an unfinished copy.
    Incoming,
    /// The shard was declared down; rows of the slot wait to be merged into its owner.
    Fenced,
}

impl SlotState {
    /// The value in the table.
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

/// A value in the table that is no state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no state of a slot")]
pub struct InvalidSlotState(pub String);

impl FromStr for SlotState {
    type Err = InvalidSlotState;

    fn from_str(s: &str) -> Result<Self, InvalidSlotState> {
        [
            SlotState::None,
            SlotState::Owner,
            SlotState::Sealed,
            SlotState::Incoming,
            SlotState::Fenced,
        ]
        .into_iter()
        .find(|state| state.as_str() == s)
        .ok_or_else(|| InvalidSlotState(s.to_owned()))
    }
}

impl fmt::Display for SlotState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The part of a slot's row that sends and reads use, read under its lock or in the snapshot of a
/// read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotView {
    /// The state of the slot on the shard.
    pub state: SlotState,
    /// See [`SlotRow::term`].
    pub term: u64,
    /// Seqs of new messages are above `generation << 40`.
    pub generation: u32,
    /// Whether the slot has all messages that were ever acknowledged; see [`History`].
    pub complete: bool,
    /// Whether a shard that was declared down may still return with messages of the slot.
    pub unmerged: bool,
    /// The target of a sealed slot.
    pub peer: Option<String>,
}

/// The term under which a shard owns a slot, with the generation that seqs have under it. A term
/// never has two generations: a claim, which begins one, raises the term.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Term {
    /// [`SlotRow::term`].
    pub number: u64,
    /// [`SlotRow::generation`].
    pub generation: u32,
}

impl SlotView {
    /// The view of an owner under a term.
    #[must_use]
    pub fn owner(term: Term) -> Self {
        Self {
            state: SlotState::Owner,
            term: term.number,
            generation: term.generation,
            complete: true,
            unmerged: false,
            peer: None,
        }
    }

    /// The term under which the shard takes writes; `None` if it does not.
    #[must_use]
    pub fn writable(&self) -> Option<Term> {
        self.state.takes_writes().then_some(Term {
            number: self.term,
            generation: self.generation,
        })
    }
}

/// A shard's row for a slot. Every change of ownership is decided by such rows.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotRow {
    /// The state of the slot on the shard.
    pub state: SlotState,
    /// Never falls on a shard. Every attempt to move the slot has a term above those of source and
    /// target.
    pub term: u64,
    /// Seqs of new messages are above `generation << 40`.
    pub generation: u32,
    /// Sealed: the target. Incoming: the source.
    pub peer: Option<String>,
    /// Sealed: the term of the move.
    pub next_term: Option<u64>,
    /// The term of the last move that was activated here: the evidence that the move completed.
    pub activated: u64,
    /// The generation under which the slot was last claimed here.
    pub claimed_generation: u32,
    /// Which acknowledged messages may be missing.
    pub history: History,
}

/// Whether a slot has all messages that were ever acknowledged in it, and if not, which shards may
/// have the others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct History {
    /// Shards that were declared down and may have some of them. A shard that returns is merged.
    pub missing: BTreeSet<String>,
    /// Shards that were forgotten: messages that only they had are lost.
    pub forgotten: BTreeSet<String>,
}

impl History {
    /// No message is missing.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty() && self.forgotten.is_empty()
    }
}

/// The value of the column `history` while no message is missing.
pub const COMPLETE: &str = "complete";

const MISSING: &str = "incomplete: ";
const FORGOTTEN: &str = "forgotten: ";

/// The value in the table: `complete`, or `incomplete: a b`, `forgotten: c`, or both with `; `
/// between.
impl fmt::Display for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_complete() {
            return f.write_str(COMPLETE);
        }
        let part = |begins: &str, names: &BTreeSet<String>| {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            (!names.is_empty()).then(|| format!("{begins}{}", names.join(" ")))
        };
        let parts: Vec<String> = [
            part(MISSING, &self.missing),
            part(FORGOTTEN, &self.forgotten),
        ]
        .into_iter()
        .flatten()
        .collect();
        f.write_str(&parts.join("; "))
    }
}

/// A value in the table that is no [`History`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no history of a slot")]
pub struct InvalidHistory(pub String);

impl FromStr for History {
    type Err = InvalidHistory;

    fn from_str(s: &str) -> Result<Self, InvalidHistory> {
        let mut history = Self::default();
        if s == COMPLETE {
            return Ok(history);
        }
        for part in s.split("; ") {
            let (names, into) = if let Some(names) = part.strip_prefix(MISSING) {
                (names, &mut history.missing)
            } else if let Some(names) = part.strip_prefix(FORGOTTEN) {
                (names, &mut history.forgotten)
            } else {
                return Err(InvalidHistory(s.to_owned()));
            };
            into.extend(names.split_whitespace().map(str::to_owned));
        }
        Ok(history)
    }
}

impl SlotRow {
    /// The row of a shard that is initialized.
    #[must_use]
    pub fn initial(owner: bool) -> Self {
        Self {
            state: if owner {
                SlotState::Owner
            } else {
                SlotState::None
            },
            term: if owner { FIRST_TERM } else { 0 },
            generation: 0,
            peer: None,
            next_term: None,
            activated: 0,
            claimed_generation: 0,
            history: History::default(),
        }
    }

    /// The part for sends and reads.
    #[must_use]
    pub fn view(&self) -> SlotView {
        SlotView {
            state: self.state,
            term: self.term,
            generation: self.generation,
            complete: self.history.is_complete(),
            unmerged: !self.history.missing.is_empty(),
            peer: self.peer.clone(),
        }
    }

    /// The row after `step`. `holds_rows` is whether the shard has dialogs of the slot.
    ///
    /// # Errors
    /// [`StepRejected`]: the row is not as the step expects. The caller must read the rows again
    /// before it decides again.
    pub fn after(&self, step: &Step, holds_rows: bool) -> Result<SlotRow, StepRejected> {
        let mut row = self.clone();
        let to = |state: SlotState, row: &mut SlotRow| {
            row.state = state;
            row.peer = None;
            row.next_term = None;
        };
        let allowed = match step {
            Step::Prepare { from, term } => {
                let free = self.state == SlotState::None && self.term < *term && !holds_rows;
                if free {
                    to(SlotState::Incoming, &mut row);
                    row.term = *term;
                    row.peer = Some(from.clone());
                }
                free
            }
            Step::Seal {
                owned_since,
                to: target,
                term,
            } => {
                to(SlotState::Sealed, &mut row);
                row.peer = Some(target.clone());
                row.next_term = Some(*term);
                self.state == SlotState::Owner && self.term == *owned_since && self.term < *term
            }
            Step::Activate {
                from,
                term,
                generation,
                history,
            } => {
                to(SlotState::Owner, &mut row);
                row.activated = *term;
                row.generation = *generation;
                row.history = history.clone();
                self.is_incoming(from, *term)
            }
            Step::Release { to: target, term } => {
                to(SlotState::None, &mut row);
                row.term = *term;
                row.history = History::default();
                self.is_sealed(target, *term)
            }
            Step::Unseal {
                to: target,
                term,
                new_term,
            } => {
                to(SlotState::Owner, &mut row);
                row.term = *new_term;
                self.is_sealed(target, *term) && *new_term > *term
            }
            Step::Cancel { from, term } => {
                to(SlotState::None, &mut row);
                row.history = History::default();
                self.is_incoming(from, *term)
            }
            Step::Claim {
                term,
                generation,
                missing,
            } => {
                to(SlotState::Owner, &mut row);
                row.term = *term;
                row.generation = *generation;
                row.claimed_generation = *generation;
                row.history.missing.extend(missing.iter().cloned());
                self.state != SlotState::Owner
                    && self.claimed_generation < *generation
                    && self.generation < *generation
                    && self.term < *term
            }
            Step::Fence { seen } => {
                to(SlotState::Fenced, &mut row);
                self == seen && matches!(self.state, SlotState::Sealed | SlotState::Incoming)
            }
            Step::MergedIn => {
                // Messages of another shard came in below the last seqs: a copy that was made
                // before is not complete.
                row.term += 1;
                self.state == SlotState::Owner
            }
            Step::MergedOut { term } => {
                to(SlotState::None, &mut row);
                row.history = History::default();
                self.state == SlotState::Fenced && self.term == *term
            }
            Step::Heal { shard } => {
                row.term += 1;
                let missing = row.history.missing.remove(shard);
                let forgotten = row.history.forgotten.remove(shard);
                self.state == SlotState::Owner && (missing || forgotten)
            }
            Step::Forget { shard } => {
                row.term += 1;
                let missing = row.history.missing.remove(shard);
                row.history.forgotten.insert(shard.clone());
                self.state == SlotState::Owner && missing
            }
        };
        if allowed {
            Ok(row)
        } else {
            Err(StepRejected(self.clone()))
        }
    }

    /// The row after the shard has accepted a topology in which it was declared down since the one
    /// that it had.
    #[must_use]
    pub fn fenced(&self) -> SlotRow {
        let mut row = self.clone();
        if matches!(
            self.state,
            SlotState::Owner | SlotState::Sealed | SlotState::Incoming
        ) {
            row.state = SlotState::Fenced;
            row.peer = None;
            row.next_term = None;
        }
        row
    }

    /// Whether the slot comes from `from` under `term`.
    #[must_use]
    pub fn is_incoming(&self, from: &str, term: u64) -> bool {
        self.state == SlotState::Incoming && self.peer.as_deref() == Some(from) && self.term == term
    }

    /// Whether the slot is sealed for `to` under `term`.
    #[must_use]
    pub fn is_sealed(&self, to: &str, term: u64) -> bool {
        self.state == SlotState::Sealed
            && self.peer.as_deref() == Some(to)
            && self.next_term == Some(term)
    }
}

/// A change of a slot's row, made in a transaction that holds the locks of the row and of the
/// topology.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// At the target: a copy begins. Only if the target has no rows of the slot: an older copy may
    /// be of another source.
    Prepare {
        /// The source.
        from: String,
        /// The term of the move.
        term: u64,
    },
    /// At the source: no more writes.
    Seal {
        /// The term under which the slot was owned when the copy began.
        owned_since: u64,
        /// The target.
        to: String,
        /// The term of the move.
        term: u64,
    },
    /// At the target: it owns the slot. Only after the last changes were copied and compared while
    /// the source was sealed.
    Activate {
        /// The source.
        from: String,
        /// The term of the move.
        term: u64,
        /// The source's generation.
        generation: u32,
        /// The source's history.
        history: History,
    },
    /// At the source: the slot left. Only after the target was seen to have activated.
    Release {
        /// The target.
        to: String,
        /// The term of the move.
        term: u64,
    },
    /// At the source: the move failed. Only after the target was seen not to expect the slot any
    /// more.
    Unseal {
        /// The target.
        to: String,
        /// The term of the move.
        term: u64,
        /// Above `term`, so that the target can never activate under it.
        new_term: u64,
    },
    /// At the target: the move failed.
    Cancel {
        /// The source.
        from: String,
        /// The term of the move.
        term: u64,
    },
    /// During failover: the owner is lost; this shard owns the slot in a new generation.
    Claim {
        /// Above every term that was seen.
        term: u64,
        /// The topology's generation.
        generation: u32,
        /// The shards that are declared down.
        missing: BTreeSet<String>,
    },
    /// During failover: fences the rest of a move from or to a shard that is down.
    Fence {
        /// The row that was read.
        seen: SlotRow,
    },
    /// At the owner: messages of a returned shard came in.
    MergedIn,
    /// At the returned shard: the owner has all its messages.
    MergedOut {
        /// The term under which it was fenced.
        term: u64,
    },
    /// At the owner: no message of `shard` is missing any more.
    Heal {
        /// The shard that has returned.
        shard: String,
    },
    /// At the owner: the messages that only `shard` had are forgotten.
    Forget {
        /// The shard that an operator has forgotten.
        shard: String,
    },
}

impl Step {
    /// The name in logs.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Step::Prepare { .. } => "prepare",
            Step::Seal { .. } => "seal",
            Step::Activate { .. } => "activate",
            Step::Release { .. } => "release",
            Step::Unseal { .. } => "unseal",
            Step::Cancel { .. } => "cancel",
            Step::Claim { .. } => "claim",
            Step::Fence { .. } => "fence",
            Step::MergedIn => "merged-in",
            Step::MergedOut { .. } => "merged-out",
            Step::Heal { .. } => "heal",
            Step::Forget { .. } => "forget",
        }
    }

    /// What happens to the time at which the slot was released.
    #[must_use]
    pub const fn release_stamp(&self) -> ReleaseStamp {
        match self {
            Step::Release { .. } => ReleaseStamp::Now,
            Step::Cancel { .. } | Step::MergedOut { .. } => ReleaseStamp::Never,
            Step::Prepare { .. }
            | Step::Seal { .. }
            | Step::Activate { .. }
            | Step::Unseal { .. }
            | Step::Claim { .. }
            | Step::Fence { .. }
            | Step::MergedIn
            | Step::Heal { .. }
            | Step::Forget { .. } => ReleaseStamp::Keep,
        }
    }

    /// Whether the step belongs to the failover phase. All other steps belong to the normal phase.
    #[must_use]
    pub const fn is_failover(&self) -> bool {
        matches!(self, Step::Claim { .. } | Step::Fence { .. })
    }
}

/// What a step does to the time at which a slot was released, which is when its rows may be purged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReleaseStamp {
    /// Set to the time of the step: reads may still use the rows.
    Now,
    /// Set to 0: a slot that was incoming or fenced was never read.
    Never,
    /// Not changed.
    Keep,
}

/// The row was not as the step expected. Holds the row.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the slot is {} under term {}", .0.state, .0.term)]
pub struct StepRejected(pub SlotRow);

/// The term of a slot's first owner. All other shards begin with 0.
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
        assert_eq!(
            "Owner".parse::<SlotState>(),
            Err(InvalidSlotState("Owner".into()))
        );
    }

    #[test]
    fn every_history_reads_back_as_it_was_written() {
        let names = |names: &str| names.split_whitespace().map(str::to_owned).collect();
        for (missing, forgotten, text) in [
            ("", "", "complete"),
            ("a b", "", "incomplete: a b"),
            ("", "c", "forgotten: c"),
            ("a", "b c", "incomplete: a; forgotten: b c"),
        ] {
            let history = History {
                missing: names(missing),
                forgotten: names(forgotten),
            };
            assert_eq!(history.to_string(), text);
            assert_eq!(text.parse(), Ok(history));
        }
        assert_eq!("".parse::<History>(), Err(InvalidHistory(String::new())));
    }

    #[test]
    fn what_was_forgotten_stays_known_until_it_returns_after_all() {
        let mut row = SlotRow::initial(true);
        row.history.missing.insert("a".into());
        let forget = Step::Forget { shard: "a".into() };
        let heal = Step::Heal { shard: "a".into() };
        let forgotten = row.after(&forget, true).unwrap();
        assert!(!forgotten.view().complete && forgotten.history.missing.is_empty());
        assert!(forgotten.after(&forget, true).is_err(), "once is enough");
        assert!(forgotten.after(&heal, true).unwrap().view().complete);
        assert!(row.after(&heal, true).unwrap().view().complete);
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
