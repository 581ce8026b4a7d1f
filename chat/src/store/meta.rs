//! The identity of a database, the topology that it has accepted, and which one it accepts next.

use super::StoreError;
use crate::domain::topology::{Phase, Topology, TopologyRef};

/// The identity of a shard. Every transaction and every read compares it, so that a URL that
/// suddenly leads to another database is noticed at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardIdentity {
    /// The service.
    pub cluster_id: String,
    /// The shard.
    pub shard_name: String,
}

/// The row of the table `meta`: the identity of a database, and the topology that it has accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meta {
    /// The same in all shards of a service.
    pub cluster_id: String,
    /// The name of the shard; it never changes.
    pub shard_name: String,
    /// How dialogs are placed; see [`crate::domain::ring::ALGORITHM`].
    pub slot_algorithm: String,
    /// The topology's version, from 1.
    pub topology_version: u64,
    /// The phase of the topology.
    pub topology_phase: Phase,
    /// [`crate::domain::topology::Topology::hash`].
    pub topology_hash: String,
    /// [`crate::domain::topology::Topology::to_json`].
    pub topology: String,
}

impl Meta {
    /// Identifies the topology.
    #[must_use]
    pub fn topology_ref(&self) -> TopologyRef {
        TopologyRef {
            version: self.topology_version,
            phase: self.topology_phase,
            hash: self.topology_hash.clone(),
        }
    }

    /// The answer of a shard with this row to a topology that is offered.
    ///
    /// # Errors
    /// [`StoreError::Refused`] for a topology that cannot be read.
    pub fn offered(&self, new: &Meta) -> Result<Acceptance, StoreError> {
        let (ours, theirs) = (self.topology_version, new.topology_version);
        if ours > theirs || (self.is_same(new) && self.topology_phase >= new.topology_phase) {
            return Ok(if self.topology_ref() == new.topology_ref() {
                Acceptance::There
            } else {
                Acceptance::Newer(self.clone())
            });
        }
        if self.is_same(new) {
            return Ok(Acceptance::Accept { fence: false });
        }
        let (known, topology) = (self.topology()?, new.topology()?);
        let down_in = |topology: &Topology| {
            let member = topology.shards.get(&self.shard_name);
            member.map_or(0, |member| member.down_generation)
        };
        // A shard that was declared down accepts whatever happened since, and is fenced.
        let fence = down_in(&topology) > down_in(&known);
        if fence || topology.descends_from(ours, &self.topology_hash) {
            Ok(Acceptance::Accept { fence })
        } else {
            Ok(Acceptance::Conflict(self.clone()))
        }
    }

    fn is_same(&self, other: &Meta) -> bool {
        (self.topology_version, &self.topology_hash)
            == (other.topology_version, &other.topology_hash)
    }

    /// The topology.
    ///
    /// # Errors
    /// [`StoreError::Refused`] if it cannot be read.
    pub fn topology(&self) -> Result<Topology, StoreError> {
        serde_json::from_str(&self.topology)
            .map_err(|e| StoreError::Refused(format!("the topology in meta is not readable: {e}")))
    }
}

/// The answer of a shard to a topology that is offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Acceptance {
    /// It accepts the topology.
    Accept {
        /// It was declared down since the topology that it had: it owns none of its slots any more.
        fence: bool,
    },
    /// It has this topology already.
    There,
    /// It has a later topology.
    Newer(Meta),
    /// It has a topology that is no ancestor of the offered one.
    Conflict(Meta),
}

pub(super) fn phase(value: &str) -> Result<Phase, StoreError> {
    let known = Phase::ALL.into_iter().find(|phase| phase.as_str() == value);
    known.ok_or_else(|| {
        StoreError::Refused(format!(
            "unknown phase '{value}' in meta; it was written by a newer version"
        ))
    })
}
