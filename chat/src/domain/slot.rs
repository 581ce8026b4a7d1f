//! The 4096 slots: a dialog belongs to one of them for ever. A slot is the unit that a shard owns
//! and that moves.

use super::dialog::DialogId;
use siphasher::sip::SipHasher24;
use std::fmt;
use std::hash::Hasher;

/// The number of slots. It never changes.
pub const SLOTS: usize = 4096;

/// One of 4096 fixed groups of dialogs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(u16);

impl Slot {
    /// The slot of a dialog: SipHash-2-4 of its canonical text, modulo 4096.
    #[must_use]
    pub fn of(dialog: DialogId) -> Self {
        let mut hasher = SipHasher24::new();
        hasher.write(dialog.to_string().as_bytes());
        Self((hasher.finish() % SLOTS as u64) as u16)
    }

    /// The slot with this number; `None` from 4096 on.
    #[must_use]
    pub fn new(number: u16) -> Option<Self> {
        (usize::from(number) < SLOTS).then_some(Self(number))
    }

    /// All slots, ascending.
    pub fn all() -> impl Iterator<Item = Slot> {
        (0..SLOTS as u16).map(Slot)
    }

    /// The number.
    #[must_use]
    pub fn get(self) -> u16 {
        self.0
    }

    /// The number, as an index into a table of all slots.
    #[must_use]
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A set of slots.
#[derive(Clone, PartialEq, Eq)]
pub struct SlotSet([u64; SLOTS / 64]);

impl Default for SlotSet {
    fn default() -> Self {
        Self::empty()
    }
}

impl SlotSet {
    /// No slot.
    #[must_use]
    pub fn empty() -> Self {
        Self([0; SLOTS / 64])
    }

    /// Adds a slot; `false` if the set had it already.
    pub fn insert(&mut self, slot: Slot) -> bool {
        let (word, bit) = (&mut self.0[slot.index() / 64], 1 << (slot.index() % 64));
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// Whether it has the slot.
    #[must_use]
    pub fn contains(&self, slot: Slot) -> bool {
        self.0[slot.index() / 64] & (1 << (slot.index() % 64)) != 0
    }

    /// Adds all slots of another set.
    pub fn add(&mut self, others: &SlotSet) {
        for (word, other) in self.0.iter_mut().zip(others.0) {
            *word |= other;
        }
    }

    /// Whether it has all slots.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.0.iter().all(|word| *word == u64::MAX)
    }

    /// Removes the slots that are not in `others`.
    pub fn retain(&mut self, others: &SlotSet) {
        for (word, other) in self.0.iter_mut().zip(others.0) {
            *word &= other;
        }
    }

    /// The number of slots in the set.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Whether the set is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// The slots, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Slot> {
        Slot::all().filter(|slot| self.contains(*slot))
    }
}

impl fmt::Debug for SlotSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SlotSet({} slots)", self.len())
    }
}
