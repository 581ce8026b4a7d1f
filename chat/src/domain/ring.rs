//! Placement: the target shard of each slot, by a consistent-hash ring.
//!
//! The hash is a contract with the data that is already stored: SipHash-2-4 with the zero key over
//! bytes that are written in one call. `tests/data/placement.tsv` pins a thousand results.

use super::dialog::DialogId;
use super::slot::Slot;
use hashring::HashRing;
use siphasher::sip::SipHasher24;
use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hash, Hasher};

/// The name of this algorithm. Every shard stores it; a shard with another name is rejected.
pub const ALGORITHM: &str = "siphash-2-4/4096/1000";

/// Points on the ring per unit of weight. With 1000, four equal shards differ from their mean by
/// about 3 %.
pub const POINTS_PER_WEIGHT: u32 = 1000;

/// SipHash-2-4 with the zero key, for the ring.
#[derive(Clone, Copy)]
struct Sip24;

impl BuildHasher for Sip24 {
    type Hasher = SipHasher24;

    fn build_hasher(&self) -> SipHasher24 {
        SipHasher24::new()
    }
}

/// A point of a shard on the ring; hashes as the bytes of `name#i`.
struct Point {
    label: String,
    shard: usize,
}

impl Hash for Point {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(self.label.as_bytes());
    }
}

/// A lookup on the ring; hashes as the slot's number in two big-endian bytes.
struct Probe(Slot);

impl Hash for Probe {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(&self.0.get().to_be_bytes());
    }
}

/// The target shard of every slot, computed once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    names: Vec<String>,
    target: Vec<usize>,
}

impl Placement {
    /// Places all slots on the shards of `weights` (name and weight), then applies `pins`: each
    /// names a dialog, and pins its whole slot. `None` without a shard, or with a pin to a shard
    /// that is not in `weights`.
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
        let mut target: Vec<usize> = Slot::all()
            .map(|slot| ring.get(&Probe(slot)).map(|point| point.shard))
            .collect::<Option<_>>()?;
        for (dialog, shard) in pins {
            target[Slot::of(*dialog).index()] = names.iter().position(|name| name == shard)?;
        }
        Some(Self { names, target })
    }

    /// The target shard of a slot.
    #[must_use]
    pub fn target(&self, slot: Slot) -> &str {
        &self.names[self.target[slot.index()]]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::slot::SLOTS;

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
        let pinned = include_str!("../../tests/data/placement.tsv");
        let mut count = 0;
        for line in pinned.lines() {
            let [dialog, slot, shard] = line.split('\t').collect::<Vec<_>>()[..] else {
                panic!("{line}")
            };
            let dialog: DialogId = dialog.parse().unwrap();
            assert_eq!(Slot::of(dialog).to_string(), slot, "{dialog}");
            assert_eq!(placement.target(Slot::of(dialog)), shard, "{dialog}");
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
                    crate::domain::dialog::UserId::new(low).unwrap(),
                    crate::domain::dialog::UserId::new(high).unwrap(),
                );
                *shares
                    .entry(placement.target(Slot::of(dialog)))
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
            if before.target(slot) != after.target(slot) {
                assert_eq!(after.target(slot), "shard5");
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
            assert_eq!(placement.target(Slot::of(dialog)), shard);
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
            .filter(|slot| placement.target(*slot) == "a")
            .count() as f64;
        assert!((0.62..=0.71).contains(&(of_a / SLOTS as f64)), "{of_a}");
    }
}
