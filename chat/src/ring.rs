//! Where a dialog belongs: dialog -> one of 4096 slots, for ever; slot -> the shard the ring wants it on.
//!
//! Hashing here is a contract with the data that is already stored. Every byte that is hashed is fed by us, in one write,
//! to SipHash-2-4 with the zero key; `tests/data/placement.tsv` pins a thousand results.

use crate::dialog::DialogId;
use hashring::HashRing;
use siphasher::sip::SipHasher24;
use std::collections::BTreeMap;
use std::fmt;
use std::hash::{BuildHasher, Hash, Hasher};

/// How many slots there are. It never changes.
pub const SLOTS: usize = 4096;

/// The name of this way of placing dialogs, stored in every shard: a shard placed otherwise is refused.
pub const ALGORITHM: &str = "siphash-2-4/4096/1000";

/// Points on the ring per unit of weight. With 1000, four equal shards differ from their mean by about 3 %.
pub const POINTS_PER_WEIGHT: u32 = 1000;

/// One of 4096 fixed groups of dialogs: the unit that is owned and moved.
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

    /// The slot of that number; `None` from 4096 on.
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

    /// The number, to index a table of all slots.
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

/// SipHash-2-4 with the zero key, for the ring.
#[derive(Clone, Copy)]
struct Sip24;

impl BuildHasher for Sip24 {
    type Hasher = SipHasher24;

    fn build_hasher(&self) -> SipHasher24 {
        SipHasher24::new()
    }
}

/// One of a shard's points; hashes as the bytes of `name#i`.
struct Point {
    label: String,
    shard: usize,
}

impl Hash for Point {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(self.label.as_bytes());
    }
}

/// What the ring is asked with: the slot's number as two big-endian bytes.
struct Probe(Slot);

impl Hash for Probe {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(&self.0.0.to_be_bytes());
    }
}

/// The wanted shard of every slot, worked out once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    names: Vec<String>,
    wanted: Vec<usize>,
}

impl Placement {
    /// Places all slots on `weights` (name and weight of each shard that takes slots), then applies `pins`, which name a
    /// dialog and pin its whole slot. `None` without a shard, or with a pin to a shard that is not among them.
    #[must_use]
    pub fn new(weights: &BTreeMap<String, u32>, pins: &[(DialogId, String)]) -> Option<Self> {
        let names: Vec<String> = weights.keys().cloned().collect();
        let mut ring = HashRing::with_hasher(Sip24);
        // `batch_add` sorts once; `add` would sort at every point.
        ring.batch_add(
            weights
                .values()
                .enumerate()
                .flat_map(|(shard, weight)| {
                    (0..weight * POINTS_PER_WEIGHT).map(move |i| (shard, i))
                })
                .map(|(shard, i)| Point {
                    label: format!("{}#{i}", names[shard]),
                    shard,
                })
                .collect(),
        );
        let mut wanted: Vec<usize> = Slot::all()
            .map(|slot| ring.get(&Probe(slot)).map(|point| point.shard))
            .collect::<Option<_>>()?;
        for (dialog, shard) in pins {
            wanted[Slot::of(*dialog).index()] = names.iter().position(|name| name == shard)?;
        }
        Some(Self { names, wanted })
    }

    /// The shard the slot is wanted on.
    #[must_use]
    pub fn wanted(&self, slot: Slot) -> &str {
        &self.names[self.wanted[slot.index()]]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn equal(names: &[&str]) -> BTreeMap<String, u32> {
        names.iter().map(|name| ((*name).to_owned(), 1)).collect()
    }

    fn four() -> Placement {
        Placement::new(&equal(&["shard1", "shard2", "shard3", "shard4"]), &[]).unwrap()
    }

    /// The vectors were written by an implementation of their own (`dev/placement_vectors.py`).
    #[test]
    fn a_thousand_pinned_dialogs_stay_where_they_are() {
        let placement = four();
        let pinned = include_str!("../tests/data/placement.tsv");
        let mut count = 0;
        for line in pinned.lines() {
            let [dialog, slot, shard] = line.split('\t').collect::<Vec<_>>()[..] else {
                panic!("{line}")
            };
            let dialog: DialogId = dialog.parse().unwrap();
            assert_eq!(Slot::of(dialog).to_string(), slot, "{dialog}");
            assert_eq!(placement.wanted(Slot::of(dialog)), shard, "{dialog}");
            count += 1;
        }
        assert_eq!(count, 1000);
    }

    #[test]
    fn four_equal_shards_get_balanced_shares_of_a_million_dialogs() {
        let placement = four();
        let mut shares = BTreeMap::<&str, u64>::new();
        for low in 1..=1000u64 {
            for high in 1001..=2000u64 {
                let dialog = DialogId::between(
                    crate::dialog::UserId::new(low).unwrap(),
                    crate::dialog::UserId::new(high).unwrap(),
                );
                *shares
                    .entry(placement.wanted(Slot::of(dialog)))
                    .or_default() += 1;
            }
        }
        let max = *shares.values().max().unwrap() as f64;
        assert_eq!(shares.len(), 4);
        assert!(max / 250_000.0 <= 1.08, "{shares:?}");
    }

    #[test]
    fn a_fifth_shard_takes_a_fifth_and_nothing_moves_between_the_old() {
        let before = four();
        let after = Placement::new(
            &equal(&["shard1", "shard2", "shard3", "shard4", "shard5"]),
            &[],
        )
        .unwrap();
        let mut moved = 0;
        for slot in Slot::all() {
            if before.wanted(slot) != after.wanted(slot) {
                assert_eq!(after.wanted(slot), "shard5");
                moved += 1;
            }
        }
        let share = f64::from(moved) / SLOTS as f64;
        assert!((0.17..=0.23).contains(&share), "{share}");
    }

    #[test]
    fn a_pin_overrules_the_ring_and_must_name_a_shard_of_it() {
        let dialog: DialogId = "17_99".parse().unwrap();
        let weights = equal(&["shard1", "shard2"]);
        for shard in ["shard1", "shard2"] {
            let placement = Placement::new(&weights, &[(dialog, shard.to_owned())]).unwrap();
            assert_eq!(placement.wanted(Slot::of(dialog)), shard);
        }
        assert_eq!(
            Placement::new(&weights, &[(dialog, "shard3".to_owned())]),
            None
        );
        assert_eq!(Placement::new(&BTreeMap::new(), &[]), None);
    }

    #[test]
    fn twice_the_weight_takes_about_twice_the_slots() {
        let weights = BTreeMap::from([("a".to_owned(), 2), ("b".to_owned(), 1)]);
        let placement = Placement::new(&weights, &[]).unwrap();
        let of_a = Slot::all()
            .filter(|slot| placement.wanted(*slot) == "a")
            .count() as f64;
        assert!((0.62..=0.71).contains(&(of_a / SLOTS as f64)), "{of_a}");
    }
}
