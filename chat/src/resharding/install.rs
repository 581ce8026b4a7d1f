//! Installs a topology: on every shard that it does not declare down, in name order, each in its
//! own transaction.
//!
//! If an instance dies halfway, the next one to check finishes the installation. Of two topologies
//! that are proposed at the same time a shard accepts one; the instance whose topology loses begins
//! again.

use super::conflict::{self, Resolution};
use super::failpoint::failpoint;
use crate::cluster::{Cluster, StartError, TopologyView};
use crate::domain::ownership::SlotState;
use crate::domain::ring::ALGORITHM;
use crate::domain::shards_file::{DeclaredState, ShardsFile};
use crate::domain::slot::SlotSet;
use crate::domain::topology::{Phase, TopologyRef};
use crate::domain::topology::{Remaining, Topology};
use crate::rng;
use crate::store::{Acceptance, Meta, Shard, ShardError};
use std::time::Duration;

/// The outcome of a proposal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proposed {
    /// The content is in effect already.
    InEffect,
    /// It took effect.
    Installed(TopologyRef),
}

/// Why a topology did not take effect.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InstallError {
    /// The operator must change the file.
    #[error("{0}")]
    Rejected(String),
    /// It may succeed later; the caller tries again.
    #[error("{0}")]
    Waiting(String),
}

impl From<ShardError> for InstallError {
    fn from(e: ShardError) -> Self {
        InstallError::Waiting(e.to_string())
    }
}

impl From<StartError> for InstallError {
    fn from(e: StartError) -> Self {
        match e {
            StartError::Wait(what) => InstallError::Waiting(what),
            StartError::Fatal(what) => InstallError::Rejected(what),
        }
    }
}

/// How often a proposal is repeated when another instance proposes at the same time.
const TRIES: u32 = 8;

/// Derives the next topology from a file and installs it.
///
/// # Errors
/// [`InstallError`]; the topology in effect stays.
pub async fn propose(cluster: &Cluster, file: &ShardsFile) -> Result<Proposed, InstallError> {
    for _ in 0..TRIES {
        catch_up(cluster).await?;
        cluster.open(file).await?;
        let view = cluster.view();
        if view.topology.difference(&file.topology()).is_none() {
            return Ok(Proposed::InEffect);
        }
        let mut held = Vec::new();
        for name in view
            .topology
            .shards
            .keys()
            .filter(|name| !file.shards.contains_key(*name))
        {
            held.push((name.clone(), remaining_at(cluster, name).await));
        }
        let of = |name: &str| {
            let found = held.iter().find(|(held, _)| held == name);
            found.map_or_else(
                || Remaining::Unknown("it is not asked".into()),
                |(_, held)| held.clone(),
            )
        };
        let (next, phase) = view
            .topology
            .next(file, view.topology_ref.phase, &of)
            .map_err(|e| InstallError::Rejected(e.to_string()))?;
        check_members(cluster, &view, &next).await?;
        match install(cluster, &view, &next, phase).await? {
            Some(topology_ref) => return Ok(Proposed::Installed(topology_ref)),
            None => back_off().await,
        }
    }
    Err(InstallError::Waiting(
        "conflict: other instances propose other files; give all of them the same".into(),
    ))
}

/// Pauses or resumes all moves, by a new version of the topology.
///
/// # Errors
/// [`InstallError`].
pub async fn pause(cluster: &Cluster, paused: bool) -> Result<(), InstallError> {
    for _ in 0..TRIES {
        catch_up(cluster).await?;
        let view = cluster.view();
        if view.topology.paused == paused {
            return Ok(());
        }
        let next = Topology {
            paused,
            ..view.topology.clone()
        };
        match install(cluster, &view, &next, view.topology_ref.phase).await? {
            Some(_) => return Ok(()),
            None => back_off().await,
        }
    }
    Err(InstallError::Waiting(
        "conflict: other instances propose other topologies at the same time; try again".into(),
    ))
}

/// Installs `next` as the successor of the topology of `view`; `None` if another instance was
/// faster.
async fn install(
    cluster: &Cluster,
    view: &TopologyView,
    next: &Topology,
    phase: Phase,
) -> Result<Option<TopologyRef>, InstallError> {
    let mut next = next.clone();
    next.add_ancestor(view.topology_ref.version, &view.topology_ref.hash);
    let meta = Meta {
        cluster_id: cluster.id().to_owned(),
        shard_name: String::new(),
        slot_algorithm: ALGORITHM.to_owned(),
        topology_version: view.topology_ref.version + 1,
        topology_phase: phase,
        topology_hash: next.hash(),
        topology: next.to_json(),
    };
    failpoint("installing");
    // New databases become shards of this service first, without slots. From then on an empty
    // database of a shard was wiped.
    for name in next
        .live()
        .filter(|name| !view.topology.shards.contains_key(*name))
    {
        if let Some(shard) = cluster.opened_shard(name) {
            initialize(&shard, &meta_of(cluster, view)).await?;
        }
    }
    for name in next.live() {
        let Some(shard) = cluster.opened_shard(name) else {
            return Err(InstallError::Rejected(format!(
                "{name} is not in the shards.toml of this instance"
            )));
        };
        match offer(&shard, &meta).await? {
            Acceptance::Accept { .. } | Acceptance::There => failpoint("installed"),
            Acceptance::Newer(_) | Acceptance::Conflict(_) => return Ok(None),
        }
    }
    let topology_ref = meta.topology_ref();
    adopt(cluster, topology_ref.clone(), next)?;
    Ok(Some(topology_ref))
}

/// Advances a topology to its next phase, on every shard that it does not declare down.
///
/// # Errors
/// [`InstallError`].
pub async fn advance(
    cluster: &Cluster,
    view: &TopologyView,
    phase: Phase,
) -> Result<(), InstallError> {
    let mut meta = meta_of(cluster, view);
    meta.topology_phase = phase;
    for shard in &view.shards {
        offer(shard, &meta).await?;
        failpoint("failover_decided");
    }
    adopt(cluster, meta.topology_ref(), view.topology.clone())
}

fn meta_of(cluster: &Cluster, view: &TopologyView) -> Meta {
    Meta {
        cluster_id: cluster.id().to_owned(),
        shard_name: String::new(),
        slot_algorithm: ALGORITHM.to_owned(),
        topology_version: view.topology_ref.version,
        topology_phase: view.topology_ref.phase,
        topology_hash: view.topology_ref.hash.clone(),
        topology: view.topology.to_json(),
    }
}

/// Offers a topology to a shard.
async fn offer(shard: &Shard, meta: &Meta) -> Result<Acceptance, InstallError> {
    let meta = Meta {
        shard_name: shard.name().to_owned(),
        ..meta.clone()
    };
    Ok(shard
        .ask(move |store, identity| async move { store.accept(&identity, &meta).await })
        .await?)
}

/// Initializes an empty database as a shard of this service that owns no slot.
async fn initialize(shard: &Shard, meta: &Meta) -> Result<(), InstallError> {
    let meta = Meta {
        shard_name: shard.name().to_owned(),
        ..meta.clone()
    };
    let initial = meta.clone();
    let there = shard
        .ask(move |store, _| async move { store.initialize(&initial, &SlotSet::empty()).await })
        .await?;
    if there.cluster_id != meta.cluster_id || there.shard_name != meta.shard_name {
        return Err(foreign(shard, &there));
    }
    Ok(())
}

async fn stored_meta(shard: &Shard) -> Result<Option<Meta>, ShardError> {
    shard
        .ask(|store, _| async move { store.meta().await })
        .await
}

fn foreign(shard: &Shard, there: &Meta) -> InstallError {
    InstallError::Rejected(format!(
        "the url of {} leads to the database of {} of service {}; every shard needs its own",
        shard.name(),
        there.shard_name,
        there.cluster_id
    ))
}

/// Every shard that the next topology does not declare down must answer, and be the database that
/// it is expected to be.
async fn check_members(
    cluster: &Cluster,
    view: &TopologyView,
    next: &Topology,
) -> Result<(), InstallError> {
    for name in next.live() {
        let Some(shard) = cluster.opened_shard(name) else {
            return Err(InstallError::Rejected(format!(
                "{name} is not in the shards.toml of this instance"
            )));
        };
        let found = shard
            .ask(|store, _| async move {
                store.ping().await?;
                store.migrate().await?;
                store.meta().await
            })
            .await
            .map_err(|e| {
                InstallError::Waiting(format!("{e}; every shard that is not declared down must answer before an edit takes effect"))
            })?;
        let known = view.topology.shards.contains_key(name);
        match found {
            Some(meta) if meta.cluster_id != cluster.id() || meta.shard_name != name => {
                return Err(foreign(&shard, &meta));
            }
            Some(_) => {}
            None if known => {
                return Err(InstallError::Rejected(format!(
                    "the database of {name} is empty, but it is a shard of this service: it was wiped, or its url leads to another"
                )));
            }
            None if view.topology.retired.contains(name) => {
                return Err(InstallError::Rejected(format!(
                    "{name} was the name of a shard before; a new database needs a new name"
                )));
            }
            None => {}
        }
    }
    Ok(())
}

/// Reads the topologies of all shards, adopts the one that descends from all others, and installs
/// it where it is missing. If no topology does, see [`conflict`].
///
/// # Errors
/// [`InstallError`].
pub async fn catch_up(cluster: &Cluster) -> Result<(), InstallError> {
    let view = cluster.view();
    let found = conflict::read(stored_topologies(cluster, &view).await)
        .map_err(|e| InstallError::Waiting(e.to_string()))?;
    let (meta, topology) = match conflict::decide(&found) {
        None => return Ok(()),
        Some(Resolution::Agreed(meta, topology)) => (meta, topology),
        Some(Resolution::Settle(meta, topology)) => {
            tracing::warn!(
                version = meta.topology_version,
                "shards have topologies that were proposed at the same time: a common successor is installed"
            );
            (meta, topology)
        }
        Some(Resolution::Ask(name, meta)) => {
            if let Some(shard) = cluster.opened_shard(&name) {
                offer(&shard, &meta).await?;
            }
            return Err(InstallError::Waiting(
                "shards have topologies that were proposed at the same time".into(),
            ));
        }
        Some(Resolution::Wait(names)) => {
            return Err(InstallError::Waiting(format!(
                "shards have topologies that were proposed at the same time; {} must answer before it is known which of them is in effect",
                names.join(" or ")
            )));
        }
    };
    for name in topology.live() {
        let has_it = found
            .get(name)
            .is_some_and(|(there, _)| there.topology_ref() == meta.topology_ref());
        if !has_it {
            complete(cluster, name, &meta).await?;
        }
    }
    let later = (meta.topology_version, meta.topology_phase)
        > (view.topology_ref.version, view.topology_ref.phase);
    // A topology that never took effect may have a higher version than the one in effect.
    let astray = !view
        .topology
        .descends_from(meta.topology_version, &meta.topology_hash);
    if view.topology_ref != meta.topology_ref()
        && (later || (astray && view.topology_ref.hash != meta.topology_hash))
    {
        return adopt(cluster, meta.topology_ref(), topology);
    }
    Ok(())
}

/// The topologies that the shards have stored, by name of the shard.
async fn stored_topologies(cluster: &Cluster, view: &TopologyView) -> Vec<(String, Meta)> {
    // Shards that are declared down too: one that returns may have accepted a topology that the
    // others do not know. But not those that were removed: their servers may be gone for good.
    let mut asked = cluster.all_opened();
    asked.retain(|shard| !view.topology.retired.contains(shard.name()));
    let reads = asked.into_iter().map(|shard| async move {
        // A shard that does not answer is read in a later round.
        let meta = stored_meta(&shard).await.ok().flatten();
        meta.map(|meta| (shard.name().to_owned(), meta))
    });
    let metas = futures_util::future::join_all(reads).await;
    metas
        .into_iter()
        .flatten()
        .filter(|(name, meta)| meta.cluster_id == cluster.id() && meta.shard_name == *name)
        .collect()
}

/// Stores the topology in a shard that does not have it yet. A shard that is down gets it in a
/// later round.
async fn complete(cluster: &Cluster, name: &str, meta: &Meta) -> Result<(), InstallError> {
    let Some(shard) = cluster.opened_shard(name).filter(|shard| !shard.is_down()) else {
        return Ok(());
    };
    match offer(&shard, meta).await? {
        Acceptance::Accept { .. } => tracing::info!(
            shard = name,
            version = meta.topology_version,
            "topology completed"
        ),
        Acceptance::There => {}
        Acceptance::Newer(_) | Acceptance::Conflict(_) => {
            return Err(InstallError::Waiting(
                "another topology is being installed".into(),
            ));
        }
    }
    Ok(())
}

fn adopt(
    cluster: &Cluster,
    topology_ref: TopologyRef,
    topology: Topology,
) -> Result<(), InstallError> {
    let shards: Vec<String> = topology
        .shards
        .iter()
        .map(|(name, member)| match member.state {
            DeclaredState::Active => name.clone(),
            DeclaredState::Draining => format!("{name} draining"),
            DeclaredState::Down => format!("{name} down"),
        })
        .collect();
    tracing::info!(
        version = topology_ref.version,
        phase = topology_ref.phase.as_str(),
        shards = shards.join(", "),
        "topology in effect"
    );
    Ok(cluster.adopt(topology_ref, topology)?)
}

/// What a shard still holds.
async fn remaining_at(cluster: &Cluster, name: &str) -> Remaining {
    let Some(shard) = cluster.opened_shard(name) else {
        return Remaining::Unknown(
            "it is not in the shards.toml of this instance; put it back as draining".into(),
        );
    };
    match shard.slot_rows().await {
        Ok((rows, to_purge)) => Remaining::Slots {
            slots: rows
                .iter()
                .filter(|row| row.state != SlotState::None)
                .count(),
            with_rows: to_purge.len(),
        },
        Err(e) => Remaining::Unknown(e.to_string()),
    }
}

async fn back_off() {
    tokio::time::sleep(Duration::from_millis(50).mul_f64(1.0 + 5.0 * rng::fraction())).await;
}
