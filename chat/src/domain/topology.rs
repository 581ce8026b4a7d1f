//! The cluster topology: the shards with their states, weights and pins, as every shard stores it.
//! It is versioned, and each version names the versions that it was derived from. It contains no
//! URL and no password.

use super::dialog::DialogId;
use super::ring::{ALGORITHM, Placement};
use super::shards_file::{DeclaredState, FileError, ShardConfig, ShardsFile};
use serde::{Deserialize, Serialize};
use siphasher::sip128::{Hasher128, SipHasher24};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::hash::Hasher;

/// The cluster topology. Two instances agree on it by [`Topology::hash`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// How dialogs are placed; see [`ALGORITHM`].
    pub algorithm: String,
    /// How many times shards were declared down.
    pub generation: u32,
    /// By name.
    pub shards: BTreeMap<String, ShardEntry>,
    /// Exceptions to the ring.
    pub pins: Vec<Pin>,
    /// The `version` of the file, where one is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file_version: Option<u64>,
    /// Names of removed shards. They are never given to another database.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub retired: BTreeSet<String>,
    /// [`Topology::fingerprint`] of earlier files, the latest last: an instance that starts with an
    /// old file has not seen an edit.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier: Vec<String>,
    /// Slot moves are paused until the operator resumes them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
    /// The topologies that this one was derived from, by version and hash, the latest last. A shard
    /// accepts it only if the shard's own topology is among them, so that a decision made without
    /// knowing a topology cannot undo it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ancestors: Vec<(u64, String)>,
}

/// A shard in the topology.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// The state that the operator declares.
    pub state: DeclaredState,
    /// Its share of the slots, relative to the other shards.
    pub weight: u32,
    /// The generation in which it was last declared down; 0 if it never was.
    pub down_generation: u32,
    /// The messages that only this shard has are forgotten.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub forget: bool,
}

/// A pin in the topology.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// The dialog whose slot is pinned.
    pub dialog: String,
    /// The shard that it is pinned to.
    pub shard: String,
}

/// How far a topology is carried out. Phases only go forward within a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Version 1, and some shards may not have it yet: an empty database is expected, and
    /// initialized.
    Initializing,
    /// A shard was declared down: slots without an owner are being claimed, and no slot moves.
    Failover,
    /// In effect.
    Normal,
}

impl Phase {
    /// All of them, in order.
    pub const ALL: [Phase; 3] = [Phase::Initializing, Phase::Failover, Phase::Normal];

    /// The value in the table `meta`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Phase::Initializing => "initializing",
            Phase::Failover => "failover",
            Phase::Normal => "normal",
        }
    }
}

/// Identifies a topology. A control step is only taken on a shard that has the topology by which it
/// was decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopologyRef {
    /// From 1.
    pub version: u64,
    /// How far it is carried out.
    pub phase: Phase,
    /// [`Topology::hash`].
    pub hash: String,
}

impl fmt::Display for TopologyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "version {} {}", self.version, self.phase.as_str())
    }
}

/// How many earlier files a topology remembers.
const EARLIER: usize = 64;

/// How many ancestors a topology remembers.
const ANCESTORS: usize = 64;

/// What a shard that is to be removed from the topology still holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remaining {
    /// The shard does not answer, and why.
    Unknown(String),
    /// Numbers of slots.
    Slots {
        /// Owned, sealed, incoming or fenced.
        slots: usize,
        /// With rows that are not purged yet.
        with_rows: usize,
    },
}

impl ShardsFile {
    /// The topology of a new service with this file.
    #[must_use]
    pub fn topology(&self) -> Topology {
        let entry = |shard: &ShardConfig| ShardEntry {
            state: shard.state,
            weight: shard.weight,
            down_generation: 0,
            forget: shard.forget,
        };
        let pin = |(dialog, shard): &(DialogId, String)| Pin {
            dialog: dialog.to_string(),
            shard: shard.clone(),
        };
        let shards = self.shards.iter();
        Topology {
            algorithm: ALGORITHM.to_owned(),
            generation: 0,
            shards: shards
                .map(|(name, shard)| (name.clone(), entry(shard)))
                .collect(),
            pins: self.pins.iter().map(pin).collect(),
            file_version: self.version,
            retired: BTreeSet::new(),
            earlier: Vec::new(),
            paused: false,
            ancestors: Vec::new(),
        }
    }
}

fn refuse<T>(reason: String) -> Result<T, FileError> {
    Err(FileError { line: None, reason })
}

impl Topology {
    /// The next topology and the phase that it begins in, if the operator may replace this one,
    /// which is in `phase`, by `file`. `remaining` returns what a shard that is no longer in the
    /// file still holds.
    ///
    /// # Errors
    /// [`FileError`] that says what prevents it.
    pub fn next(
        &self,
        file: &ShardsFile,
        phase: Phase,
        remaining: &dyn Fn(&str) -> Remaining,
    ) -> Result<(Topology, Phase), FileError> {
        self.check_version(file)?;
        let mut next = file.topology();
        next.generation = self.generation;
        next.paused = self.paused;
        next.ancestors.clone_from(&self.ancestors);
        next.retired.clone_from(&self.retired);
        next.retired.extend(self.removable(file, remaining)?);
        let newly_down = next.declare_down(self)?;
        if newly_down {
            next.generation += 1;
            self.check_majority(&next, file.force)?;
        }
        next.earlier.clone_from(&self.earlier);
        next.earlier.push(self.fingerprint());
        let surplus = next.earlier.len().saturating_sub(EARLIER);
        next.earlier.drain(..surplus);
        let failover = newly_down || phase == Phase::Failover;
        let phase = if failover {
            Phase::Failover
        } else {
            Phase::Normal
        };
        Ok((next, phase))
    }

    /// A file with a `version` replaces only a lower one.
    fn check_version(&self, file: &ShardsFile) -> Result<(), FileError> {
        match (self.file_version, file.version) {
            (Some(known), Some(new))
                if new <= known && self.difference(&file.topology()).is_some() =>
            {
                refuse(format!(
                    "version = {new}, but version {known} is in effect: set a higher version with every edit"
                ))
            }
            (Some(_) | None, Some(_) | None) => Ok(()),
        }
    }

    /// The shards that are no longer in the file. A shard may be removed when it is drained or
    /// forgotten.
    fn removable(
        &self,
        file: &ShardsFile,
        remaining: &dyn Fn(&str) -> Remaining,
    ) -> Result<Vec<String>, FileError> {
        let gone = self.shards.iter();
        let gone = gone.filter(|(name, _)| !file.shards.contains_key(*name));
        gone.map(|(name, entry)| match (entry.state, remaining(name)) {
            (DeclaredState::Active, _) => refuse(format!(
                "{name} is missing in the file but active: set state = \"draining\", and remove it once it is drained"
            )),
            (DeclaredState::Down, _) if !entry.forget => refuse(format!(
                "{name} is missing in the file but down, and may hold messages: bring it back, or give them up with forget = true"
            )),
            (DeclaredState::Draining, Remaining::Unknown(why)) => refuse(format!(
                "{name} is missing in the file, and whether it is drained is not known: {why}"
            )),
            (DeclaredState::Draining, Remaining::Slots { slots, with_rows })
                if slots + with_rows > 0 =>
            {
                refuse(format!(
                    "{name} is missing in the file but still owns {slots} slots and holds rows of {with_rows}: keep it as \"draining\" until it is drained"
                ))
            }
            (DeclaredState::Draining | DeclaredState::Down, _) => Ok(name.clone()),
        })
        .collect()
    }

    /// Notes the generation of shards that are down. `true` if one of them was not down `before`.
    fn declare_down(&mut self, before: &Topology) -> Result<bool, FileError> {
        let mut newly_down = false;
        for (name, entry) in &mut self.shards {
            let known = before.shards.get(name);
            entry.down_generation = known.map_or(0, |known| known.down_generation);
            if entry.state == DeclaredState::Down {
                match known {
                    None => return refuse(format!("{name} is new and cannot be down")),
                    Some(known) if known.state != DeclaredState::Down => {
                        newly_down = true;
                        entry.down_generation = before.generation + 1;
                    }
                    Some(_) => {}
                }
            }
        }
        Ok(newly_down)
    }

    /// More than half of the active shards must remain. Then any two topologies that are derived
    /// from this one have a shard in common, and at most one of them takes effect.
    fn check_majority(&self, next: &Topology, force: bool) -> Result<(), FileError> {
        let active = self.shards.iter();
        let active = active.filter(|(_, entry)| entry.state == DeclaredState::Active);
        let active: Vec<&String> = active.map(|(name, _)| name).collect();
        let remains = |name: &&&String| next.live().any(|live| live == **name);
        let left = active.iter().filter(remains).count();
        if left * 2 > active.len() || force {
            return Ok(());
        }
        refuse(format!(
            "only {left} of {} active shards would remain; if this is intended, and no other edit is made at the same time, add force = true at the top of the file",
            active.len()
        ))
    }

    /// Whether it was derived from that topology, directly or not. One that is older than all
    /// remembered ancestors is taken for an ancestor.
    #[must_use]
    pub fn descends_from(&self, version: u64, hash: &str) -> bool {
        let oldest = self.ancestors.first().map_or(0, |(oldest, _)| *oldest);
        (self.ancestors.len() >= ANCESTORS && version < oldest)
            || self
                .ancestors
                .iter()
                .any(|(of, known)| (*of, known.as_str()) == (version, hash))
    }

    /// Adds a topology that it was derived from.
    pub fn add_ancestor(&mut self, version: u64, hash: &str) {
        self.ancestors.push((version, hash.to_owned()));
        self.ancestors.sort();
        self.ancestors.dedup();
        let surplus = self.ancestors.len().saturating_sub(ANCESTORS);
        self.ancestors.drain(..surplus);
    }

    /// Whether the content of `file` was in effect before: an instance that starts with it has not
    /// seen an edit.
    #[must_use]
    pub fn remembers(&self, file: &Topology) -> bool {
        self.earlier.contains(&file.fingerprint())
    }

    /// 32 hex digits over the content of a file: the shards with state and weight, and the pins.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let shards: Vec<_> = self
            .shards
            .iter()
            .map(|(name, entry)| (name, entry.state, entry.weight, entry.forget))
            .collect();
        // Strings, numbers and booleans always serialize.
        let text = serde_json::to_string(&(shards, &self.pins)).unwrap_or_default();
        digest(&text)
    }

    /// Names of the shards that are not declared down.
    pub fn live(&self) -> impl Iterator<Item = &str> {
        let live = |(_, entry): &(&String, &ShardEntry)| entry.state != DeclaredState::Down;
        self.shards
            .iter()
            .filter(live)
            .map(|(name, _)| name.as_str())
    }

    /// Names of the shards that are declared down.
    pub fn down(&self) -> impl Iterator<Item = &str> {
        let down = |(_, entry): &(&String, &ShardEntry)| entry.state == DeclaredState::Down;
        self.shards
            .iter()
            .filter(down)
            .map(|(name, _)| name.as_str())
    }

    /// 32 hex digits over the content: equal for equal topologies.
    #[must_use]
    pub fn hash(&self) -> String {
        digest(&self.to_json())
    }

    /// The canonical text: maps in key order, fields in the order of this type.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a topology has only strings for keys")
    }

    /// The target shard of every slot; `None` if no shard is active or a pin names a shard that is
    /// not.
    #[must_use]
    pub fn placement(&self) -> Option<Placement> {
        let weights = self
            .shards
            .iter()
            .filter(|(_, entry)| entry.state == DeclaredState::Active)
            .map(|(name, entry)| (name.clone(), entry.weight))
            .collect();
        let pins: Vec<_> = self
            .pins
            .iter()
            .map(|pin| Some((pin.dialog.parse().ok()?, pin.shard.clone())))
            .collect::<Option<_>>()?;
        Placement::new(&weights, &pins)
    }

    /// How the topology of a file differs from this one, in one line; `None` if it does not.
    #[must_use]
    pub fn difference(&self, file: &Topology) -> Option<String> {
        let mut parts = Vec::new();
        for (name, entry) in &file.shards {
            match self.shards.get(name) {
                None => parts.push(format!("{name} is new")),
                Some(known) if known.state != entry.state => {
                    parts.push(format!("{name} becomes {:?}", entry.state).to_lowercase())
                }
                Some(known) if known.weight != entry.weight => {
                    parts.push(format!("{name} has weight {}", entry.weight))
                }
                Some(known) if known.forget != entry.forget => {
                    parts.push(format!("{name} is forgotten"))
                }
                Some(_) => {}
            }
        }
        parts.extend(
            self.shards
                .keys()
                .filter(|name| !file.shards.contains_key(*name))
                .map(|name| format!("{name} is removed")),
        );
        if self.pins != file.pins {
            parts.push("the pins differ".to_owned());
        }
        (!parts.is_empty()).then(|| parts.join(", "))
    }
}

fn digest(text: &str) -> String {
    let mut hasher = SipHasher24::new();
    hasher.write(text.as_bytes());
    format!("{:032x}", hasher.finish128().as_u128())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = include_str!("../../../shards.toml");

    fn env(_: &str) -> Option<String> {
        Some("s3cret".to_owned())
    }

    #[test]
    fn a_topology_contains_no_address_and_no_password() {
        let topology = ShardsFile::parse(GOOD, &env).unwrap().topology();
        assert!(topology.placement().is_some());
        let text = topology.to_json();
        assert!(!text.contains("s3cret") && !text.contains("3306"), "{text}");
    }

    #[test]
    fn a_topology_says_how_a_file_differs_from_it() {
        let topology = ShardsFile::parse(GOOD, &env).unwrap().topology();
        assert_eq!(topology.difference(&topology), None);
        let edited = GOOD.replacen(
            "name = \"shard4\"",
            "state = \"draining\"\nname = \"shard9\"",
            1,
        );
        let difference = topology
            .difference(&ShardsFile::parse(&edited, &env).unwrap().topology())
            .unwrap();
        assert_eq!(difference, "shard9 is new, shard4 is removed");
    }

    fn shards(states: &[(&str, &str)]) -> ShardsFile {
        let entry = |(name, more): &(&str, &str)| {
            format!("[[shard]]\nname = \"{name}\"\nurl = \"sqlite:{name}\"\n{more}\n")
        };
        ShardsFile::parse(&states.iter().map(entry).collect::<String>(), &|_| None).unwrap()
    }

    /// Two topologies that are derived from one and declare different shards down must share a
    /// shard, or both would take effect.
    #[test]
    fn more_than_half_of_the_active_shards_must_be_left() {
        let (down, draining) = ("state = \"down\"", "state = \"draining\"");
        for (before, after, allowed) in [
            (["", "", "", ""], [down, "", "", ""], true),
            (["", "", "", ""], [down, down, "", ""], false),
            (["", "", "", ""], [down, down, down, ""], false),
            // A draining shard does not count.
            (
                ["", "", draining, draining],
                [down, "", draining, draining],
                false,
            ),
            (["", "", "", draining], [down, "", "", draining], true),
            // A shard that is down already is not declared down again.
            ([down, down, "", ""], [down, down, "", ""], true),
            ([down, "", "", ""], [down, "", draining, ""], true),
        ] {
            let with = |states: [&'static str; 4]| ["a", "b", "c", "d"].into_iter().zip(states);
            let of = |states| shards(&with(states).collect::<Vec<_>>());
            let (topology, mut file) = (of(before).topology(), of(after));
            let held = |_: &str| Remaining::Unknown("not asked".into());
            let next = topology.next(&file, Phase::Normal, &held);
            assert_eq!(next.is_ok(), allowed, "{before:?} {after:?}: {next:?}");
            file.force = true;
            assert!(topology.next(&file, Phase::Normal, &held).is_ok());
        }
    }

    #[test]
    fn a_topology_knows_its_ancestors_and_takes_older_ones_for_ancestors() {
        let mut topology = shards(&[("a", "")]).topology();
        assert!(!topology.descends_from(1, "h1"));
        for version in 1..=ANCESTORS as u64 {
            topology.add_ancestor(version, &format!("h{version}"));
        }
        assert!(topology.descends_from(1, "h1") && !topology.descends_from(1, "other"));
        topology.add_ancestor(ANCESTORS as u64 + 1, "next");
        assert_eq!(topology.ancestors.len(), ANCESTORS);
        assert!(topology.descends_from(1, "forgotten") && topology.descends_from(2, "h2"));
        assert!(!topology.descends_from(2, "other"));
        assert_eq!(
            serde_json::from_str::<Topology>(&topology.to_json()).unwrap(),
            topology
        );
    }
}
