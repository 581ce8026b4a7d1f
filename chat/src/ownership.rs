//! Who may write to a slot: the row that a shard keeps for each of the 4096, and what it permits.
//!
//! Safety rests on this row alone. A write holds a shared lock on it and must see `owner`; no file, no map in memory and
//! no clock is asked. The states and the invariants I1 … I16 are described in `docs/SHARDING.md`.

use std::collections::{BTreeMap, BTreeSet};
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotView {
    /// What the shard is to the slot.
    pub state: SlotState,
    /// See [`SlotRow::term`].
    pub term: u64,
    /// Seqs of new messages are above `generation << 40`.
    pub generation: u32,
    /// Whether all messages are here that were ever acknowledged; see [`History`].
    pub complete: bool,
    /// Where a sealed slot goes.
    pub peer: Option<String>,
}

/// The term under which a shard owns a slot, with the generation that seqs have under it. A term never has two generations: a
/// claim, which begins one, raises the term.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Term {
    /// [`SlotRow::term`].
    pub number: u64,
    /// [`SlotRow::generation`].
    pub generation: u32,
}

impl SlotView {
    /// The view of an owner whose term is known.
    #[must_use]
    pub fn owner(term: Term) -> Self {
        Self {
            state: SlotState::Owner,
            term: term.number,
            generation: term.generation,
            complete: true,
            peer: None,
        }
    }

    /// The term under which the shard takes writes, if it does.
    #[must_use]
    pub fn writable(&self) -> Option<Term> {
        self.state.takes_writes().then_some(Term {
            number: self.term,
            generation: self.generation,
        })
    }
}

/// A shard's row for a slot: all that changes of ownership are decided by.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotRow {
    /// What the shard is to the slot.
    pub state: SlotState,
    /// Never falls on a shard; every attempt to move the slot has a greater one than source and target had.
    pub term: u64,
    /// Seqs of new messages are above `generation << 40`.
    pub generation: u32,
    /// Sealed: where the slot goes. Incoming: where it comes from.
    pub peer: Option<String>,
    /// Sealed: the term of the move.
    pub next_term: Option<u64>,
    /// The term of the last move that ended here, by activation and nothing else: the evidence of a take-over.
    pub activated: u64,
    /// The generation under which the slot was last claimed here.
    pub claimed_generation: u32,
    /// Which acknowledged messages may not be here.
    pub history: History,
}

/// Whether a slot has all messages that were ever acknowledged in it, and if not, who may have the rest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct History {
    /// Shards that were declared down and may hold some: when one returns, it is merged.
    pub missing: BTreeSet<String>,
    /// Shards that were given up: what they alone held is lost.
    pub forgotten: BTreeSet<String>,
}

impl History {
    /// Nothing is missing, and nothing was given up.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty() && self.forgotten.is_empty()
    }
}

/// The value of the column `history` while nothing is missing.
pub const COMPLETE: &str = "complete";

const MISSING: &str = "incomplete: ";
const FORGOTTEN: &str = "forgotten: ";

/// As it stands in the table: `complete`, or `incomplete: a b`, `forgotten: c`, or both with `; ` between.
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

/// A text that is no [`History`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' says nothing about a history")]
pub struct BadHistory(pub String);

impl FromStr for History {
    type Err = BadHistory;

    fn from_str(s: &str) -> Result<Self, BadHistory> {
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
                return Err(BadHistory(s.to_owned()));
            };
            into.extend(names.split_whitespace().map(str::to_owned));
        }
        Ok(history)
    }
}

impl SlotRow {
    /// The row that a shard is founded with.
    #[must_use]
    pub fn founded(owner: bool) -> Self {
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

    /// The data plane's part of it.
    #[must_use]
    pub fn view(&self) -> SlotView {
        SlotView {
            state: self.state,
            term: self.term,
            generation: self.generation,
            complete: self.history.is_complete(),
            peer: self.peer.clone(),
        }
    }

    /// The row after `step`. `holds_rows` tells whether dialogs of the slot lie on this shard.
    ///
    /// # Errors
    /// [`Refused`]: the row is not the one the step was meant for, and nothing may be changed. Trying again is not the
    /// answer; looking again is.
    pub fn after(&self, step: &Step, holds_rows: bool) -> Result<SlotRow, Refused> {
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
                // The rows of another shard have come in below the heads: a copy that was made before is not whole.
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
            Err(Refused(self.clone()))
        }
    }

    /// The row after the shard has accepted a document in which it was declared down later than it knew.
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

    /// Whether it is receiving from `from` under `term`.
    #[must_use]
    pub fn is_incoming(&self, from: &str, term: u64) -> bool {
        self.state == SlotState::Incoming && self.peer.as_deref() == Some(from) && self.term == term
    }

    /// Whether it is sealed for `to` under `term`.
    #[must_use]
    pub fn is_sealed(&self, to: &str, term: u64) -> bool {
        self.state == SlotState::Sealed
            && self.peer.as_deref() == Some(to)
            && self.next_term == Some(term)
    }
}

/// A change of a slot's row, each made in a transaction that holds the row's lock and the document's.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// R1, at the target: expect the slot. Only where nothing of it is: a copy that somebody else began may be of a source
    /// that has changed hands since.
    Prepare {
        /// The source.
        from: String,
        /// The term of the move.
        term: u64,
    },
    /// R3, at the source: no more writes.
    Seal {
        /// The term under which the slot was owned when the copy began.
        owned_since: u64,
        /// The target.
        to: String,
        /// The term of the move.
        term: u64,
    },
    /// R4, at the target: it is yours. Only after a last delta and a comparison that were made while the source was sealed.
    Activate {
        /// The source.
        from: String,
        /// The term of the move.
        term: u64,
        /// The source's.
        generation: u32,
        /// The source's.
        history: History,
    },
    /// R5a, at the source, once the target was seen to have activated.
    Release {
        /// The target.
        to: String,
        /// The term of the move.
        term: u64,
    },
    /// R5c, at the source, once the target was seen not to expect the slot any more.
    Unseal {
        /// The target.
        to: String,
        /// The term of the move.
        term: u64,
        /// Greater than that: the attempt is over for ever.
        new_term: u64,
    },
    /// At the target: the move is given up.
    Cancel {
        /// The source.
        from: String,
        /// The term of the move.
        term: u64,
    },
    /// A3, while adjudicating: the owner is lost; own the slot in a new generation.
    Claim {
        /// Greater than any that was seen.
        term: u64,
        /// The document's.
        generation: u32,
        /// The shards that are down.
        missing: BTreeSet<String>,
    },
    /// A4, while adjudicating: what is left of a move with a shard that is down. `seen` is what was judged.
    Fence {
        /// The row that was judged.
        seen: SlotRow,
    },
    /// A6, at the owner: rows of a returned shard have come in.
    MergedIn,
    /// A6, at the returned shard: everything it had is at the owner.
    MergedOut {
        /// The term it was fenced under.
        term: u64,
    },
    /// A6, at the owner: nothing of `shard` is missing any more.
    Heal {
        /// The shard that has returned.
        shard: String,
    },
    /// At the owner: what `shard` alone held will not come back.
    Forget {
        /// The shard that an operator has given up.
        shard: String,
    },
}

impl Step {
    /// For log lines, metrics and fail points.
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

    /// What happens to the note of when the slot was released: set to now, to never, or left.
    #[must_use]
    pub const fn released(&self) -> Option<bool> {
        match self {
            Step::Release { .. } => Some(true),
            // Nobody reads a slot that was incoming or fenced.
            Step::Cancel { .. } | Step::MergedOut { .. } => Some(false),
            Step::Prepare { .. }
            | Step::Seal { .. }
            | Step::Activate { .. }
            | Step::Unseal { .. }
            | Step::Claim { .. }
            | Step::Fence { .. }
            | Step::MergedIn
            | Step::Heal { .. }
            | Step::Forget { .. } => None,
        }
    }

    /// Whether it may be taken while shards that are down are being judged; all others only when that is over.
    #[must_use]
    pub const fn adjudicates(&self) -> bool {
        matches!(self, Step::Claim { .. } | Step::Fence { .. })
    }
}

/// The row was not as the step expected; here it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the slot is {} under term {}", .0.state, .0.term)]
pub struct Refused(pub SlotRow);

/// What becomes of a sealed slot is read off its target, never off a clock (R5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// The target took over: release.
    TookOver,
    /// The target still expects it: finish the move, or cancel it.
    UnderWay,
    /// The attempt is dead: un-seal.
    Dead,
}

/// Judges a slot that is sealed for a target under `term`, by the target's row.
#[must_use]
pub fn judge_sealed(source: &str, term: u64, target: &SlotRow) -> Verdict {
    if target.activated >= term {
        Verdict::TookOver
    } else if target.is_incoming(source, term) {
        Verdict::UnderWay
    } else {
        Verdict::Dead
    }
}

/// What is to be done about one slot while shards that were declared down are judged (A2 to A4).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Judgement {
    /// The shard that must claim the slot; `None` if there is an owner, or a live move that will bring one.
    pub claim: Option<String>,
    /// Rows that are left over from moves with shards that are down.
    pub fence: Vec<(String, SlotRow)>,
}

/// Judges one slot: `live` are the rows on all shards that are not down, `wanted` the shard that the ring names.
#[must_use]
pub fn adjudicate(live: &BTreeMap<String, SlotRow>, wanted: &str) -> Judgement {
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
        Some(last.map_or_else(|| wanted.to_owned(), |(name, _)| name.clone()))
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
    Judgement {
        claim,
        fence: fence.collect(),
    }
}

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
        assert_eq!("".parse::<History>(), Err(BadHistory(String::new())));
    }

    #[test]
    fn what_was_forgotten_stays_known_until_it_returns_after_all() {
        let mut row = SlotRow::founded(true);
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
