//! Two topologies that are proposed at the same time can each be accepted by some shards. The
//! winner is decided by the topologies stored in the shards, never by the instance that checks: one
//! that may have taken effect must not be lost, because slots may have been claimed under it.
//!
//! A topology is in effect when every shard that it does not declare down has accepted it, and a
//! shard accepts only descendants of its own. So a topology that a competing one has blocked on one
//! of its shards can never take effect. If both may have taken effect, they have a shard in common
//! that has accepted neither, because each keeps more than half of the active shards
//! (`Topology::next`); that shard decides.

use crate::domain::topology::Phase;
use crate::domain::topology::Topology;
use crate::store::{Meta, StoreError};
use std::collections::BTreeMap;

/// The topologies of the shards that answered, by name.
pub type Found = BTreeMap<String, (Meta, Topology)>;

/// The decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// One topology descends from all others.
    Agreed(Meta, Topology),
    /// This topology is to be installed: it descends from all others and has the content of the one
    /// that may be in effect.
    Settle(Meta, Topology),
    /// Several may be in effect. This shard has none of them yet; the one that it accepts first
    /// wins.
    Ask(String, Meta),
    /// Several may be in effect. One of these shards must answer first.
    Wait(Vec<String>),
}

/// Reads the topologies of the shards that answered.
///
/// # Errors
/// [`StoreError::Refused`] for one that cannot be read.
pub fn read(metas: Vec<(String, Meta)>) -> Result<Found, StoreError> {
    let read = |(name, meta): (String, Meta)| {
        let topology = meta.topology()?;
        Ok((name, (meta, topology)))
    };
    metas.into_iter().map(read).collect()
}

/// Decides; `None` if no shard has answered.
#[must_use]
pub fn decide(found: &Found) -> Option<Resolution> {
    let above = |a: &(Meta, Topology), b: &(Meta, Topology)| {
        a.1.descends_from(b.0.topology_version, &b.0.topology_hash)
    };
    let same = |a: &Meta, b: &Meta| {
        (a.topology_version, &a.topology_hash) == (b.topology_version, &b.topology_hash)
    };
    let mut tips: Vec<&(Meta, Topology)> = Vec::new();
    for one in found.values() {
        if !found.values().any(|other| above(other, one)) {
            match tips.iter_mut().find(|tip| same(&tip.0, &one.0)) {
                Some(tip) if tip.0.topology_phase < one.0.topology_phase => *tip = one,
                Some(_) => {}
                None => tips.push(one),
            }
        }
    }
    // Every instance takes them in the same order.
    tips.sort_by_key(|(meta, _)| {
        (
            std::cmp::Reverse(meta.topology_version),
            meta.topology_hash.clone(),
        )
    });
    let (newest, topology) = tips.first()?;
    if tips.len() == 1 {
        return Some(Resolution::Agreed(newest.clone(), topology.clone()));
    }
    let may_be_in_force = |tip: &&&(Meta, Topology)| {
        tip.1.live().all(|name| {
            found
                .get(name)
                .is_none_or(|there| same(&there.0, &tip.0) || above(tip, there))
        })
    };
    let alive: Vec<&&(Meta, Topology)> = tips.iter().filter(may_be_in_force).collect();
    let kept = match alive[..] {
        [] => tips[0],
        [only] => only,
        [first, second, ..] => {
            let shared: Vec<&str> = first
                .1
                .live()
                .filter(|name| second.1.live().any(|other| other == *name))
                .collect();
            let silent = |name: &&str| !found.contains_key(*name);
            return Some(match shared.iter().find(|name| !silent(name)) {
                Some(name) => Resolution::Ask((*name).to_owned(), first.0.clone()),
                None => Resolution::Wait(shared.into_iter().map(str::to_owned).collect()),
            });
        }
    };
    let mut topology = kept.1.clone();
    for (meta, tip) in &tips {
        for (version, hash) in &tip.ancestors {
            topology.add_ancestor(*version, hash);
        }
        topology.add_ancestor(meta.topology_version, &meta.topology_hash);
    }
    let meta = Meta {
        topology_version: newest.topology_version + 1,
        topology_phase: kept.0.topology_phase.max(Phase::Failover),
        topology_hash: topology.hash(),
        topology: topology.to_json(),
        ..kept.0.clone()
    };
    Some(Resolution::Settle(meta, topology))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::shards_file::{DeclaredState, ShardsFile};

    fn topology(down: &[&str]) -> Topology {
        let text: String = ["a", "b", "c"]
            .map(|name| format!("[[shard]]\nname = \"{name}\"\nurl = \"sqlite:{name}\"\n"))
            .concat();
        let mut topology = ShardsFile::parse(&text, &|_| None).unwrap().topology();
        for name in down {
            topology.shards.get_mut(*name).unwrap().state = DeclaredState::Down;
        }
        topology
    }

    fn meta(version: u64, phase: Phase, topology: &Topology) -> (Meta, Topology) {
        let meta = Meta {
            cluster_id: "c".into(),
            shard_name: "any".into(),
            slot_algorithm: "s".into(),
            topology_version: version,
            topology_phase: phase,
            topology_hash: topology.hash(),
            topology: topology.to_json(),
        };
        (meta, topology.clone())
    }

    fn child(of: &(Meta, Topology), mut topology: Topology, phase: Phase) -> (Meta, Topology) {
        topology.ancestors = of.1.ancestors.clone();
        topology.add_ancestor(of.0.topology_version, &of.0.topology_hash);
        meta(of.0.topology_version + 1, phase, &topology)
    }

    fn found(what: &[(&str, &(Meta, Topology))]) -> Found {
        what.iter()
            .map(|(name, one)| ((*name).to_owned(), (*one).clone()))
            .collect()
    }

    #[test]
    fn the_topology_that_may_be_in_effect_is_kept() {
        let first = meta(1, Phase::Normal, &topology(&[]));
        let lost = child(&first, topology(&["a"]), Phase::Failover);
        let mut weighed = topology(&[]);
        weighed.shards.get_mut("b").unwrap().weight = 2;
        let weighed = child(&first, weighed, Phase::Normal);

        // Shards with an older topology get the newer one.
        for shards in [
            &[("a", &first), ("b", &first)][..],
            &[("a", &first), ("b", &weighed), ("c", &first)],
        ] {
            let newest = shards
                .iter()
                .map(|(_, one)| *one)
                .max_by_key(|one| one.0.topology_version);
            let (meta, topology) = newest.unwrap().clone();
            let resolution = decide(&found(shards)).unwrap();
            assert_eq!(resolution, Resolution::Agreed(meta, topology));
        }

        // Both shards that the first one needs have it: it is in effect, and the one that `a`
        // accepted instead never is.
        let kept = |shards: &[(&str, &(Meta, Topology))], of: &Topology| {
            let Some(Resolution::Settle(meta, topology)) = decide(&found(shards)) else {
                panic!("{:?}", decide(&found(shards)));
            };
            assert_eq!(meta.topology_version, 3);
            assert_eq!((&topology.shards, &topology.pins), (&of.shards, &of.pins));
            for (_, one) in shards {
                assert!(topology.descends_from(one.0.topology_version, &one.0.topology_hash));
            }
            meta.topology_phase
        };
        let taken = [("a", &weighed), ("b", &lost), ("c", &lost)];
        assert_eq!(kept(&taken, &lost.1), Phase::Failover);
        // It may be, by the shards that answered.
        kept(&[("a", &weighed), ("b", &lost), ("c", &first)], &lost.1);
        kept(&[("a", &weighed), ("b", &lost)], &lost.1);
        // Here neither can have taken effect: either may be kept.
        let neither = found(&[("a", &weighed), ("b", &weighed), ("c", &lost)]);
        let Some(Resolution::Settle(_, either)) = decide(&neither) else {
            panic!("{:?}", decide(&neither));
        };
        let candidates = [&lost.1.shards, &weighed.1.shards];
        assert!(candidates.contains(&&either.shards));

        // Two that lost different shards: the shard that they have in common decides.
        let other = child(&first, topology(&["b"]), Phase::Failover);
        let both = [("a", &other), ("b", &lost)];
        assert_eq!(
            decide(&found(&both)),
            Some(Resolution::Wait(vec!["c".to_owned()]))
        );
        let asked = found(&[("a", &other), ("b", &lost), ("c", &first)]);
        assert!(matches!(decide(&asked), Some(Resolution::Ask(name, _)) if name == "c"));
        kept(&[("a", &other), ("b", &lost), ("c", &lost)], &lost.1);
        kept(&[("a", &other), ("b", &lost), ("c", &other)], &other.1);
        assert_eq!(decide(&Found::new()), None);
    }
}
