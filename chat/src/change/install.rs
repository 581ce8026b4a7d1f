//! Puts a document in force: on every shard that it does not declare down, in name order, each in its own transaction.
//!
//! Whoever is interrupted is continued by the next who looks. Two that are made at once cannot both be accepted by a shard; who
//! loses looks again.

use super::fault::point;
use super::rivals::{self, Verdict};
use crate::chance;
use crate::cluster::{Cluster, StartError, View};
use crate::ownership::SlotState;
use crate::ring::ALGORITHM;
use crate::store::{Acceptance, DocRef, Meta, Phase, Shard, ShardDown, SlotSet};
use crate::topology::{Document, Held, ShardState, Topology};
use std::time::Duration;

/// What became of a file that was proposed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proposed {
    /// It says what is in force.
    InForce,
    /// It was put in force.
    Installed(DocRef),
}

/// Why a file is not in force.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotInForce {
    /// The operator must change it.
    #[error("{0}")]
    Refused(String),
    /// Something must come back first; it is tried again.
    #[error("{0}")]
    Waiting(String),
}

impl From<ShardDown> for NotInForce {
    fn from(e: ShardDown) -> Self {
        NotInForce::Waiting(e.to_string())
    }
}

impl From<StartError> for NotInForce {
    fn from(e: StartError) -> Self {
        match e {
            StartError::Wait(what) => NotInForce::Waiting(what),
            StartError::Fatal(what) => NotInForce::Refused(what),
        }
    }
}

/// How often two that propose at once try again.
const TRIES: u32 = 8;

/// Proposes what a file says: works out the next document and installs it.
///
/// # Errors
/// [`NotInForce`]; the document that was in force still is.
pub async fn propose(cluster: &Cluster, file: &Topology) -> Result<Proposed, NotInForce> {
    for _ in 0..TRIES {
        catch_up(cluster).await?;
        cluster.open(file).await?;
        let view = cluster.view();
        if view.document.difference(&file.document()).is_none() {
            return Ok(Proposed::InForce);
        }
        let mut held = Vec::new();
        for name in view
            .document
            .shards
            .keys()
            .filter(|name| !file.shards.contains_key(*name))
        {
            held.push((name.clone(), held_by(cluster, name).await));
        }
        let of = |name: &str| {
            let found = held.iter().find(|(held, _)| held == name);
            found.map_or_else(
                || Held::Unknown("it is not asked".into()),
                |(_, held)| held.clone(),
            )
        };
        let judging = view.doc.phase == Phase::Adjudicate;
        let (next, judges) = view
            .document
            .next(file, judging, &of)
            .map_err(|e| NotInForce::Refused(e.to_string()))?;
        check_members(cluster, &view, &next).await?;
        match install(cluster, &view, &next, judges).await? {
            Some(doc) => return Ok(Proposed::Installed(doc)),
            None => back_off().await,
        }
    }
    Err(NotInForce::Waiting(
        "conflict: other instances propose other files; give all of them the same".into(),
    ))
}

/// Halts or resumes all moves, by a document that says so.
///
/// # Errors
/// [`NotInForce`].
pub async fn pause(cluster: &Cluster, paused: bool) -> Result<(), NotInForce> {
    for _ in 0..TRIES {
        catch_up(cluster).await?;
        let view = cluster.view();
        if view.document.paused == paused {
            return Ok(());
        }
        let next = Document {
            paused,
            ..view.document.clone()
        };
        match install(cluster, &view, &next, view.doc.phase == Phase::Adjudicate).await? {
            Some(_) => return Ok(()),
            None => back_off().await,
        }
    }
    Err(NotInForce::Waiting(
        "conflict: other instances propose other documents at the same time".into(),
    ))
}

/// Installs `next` above the document that `view` goes by; `None` if somebody else was faster.
async fn install(
    cluster: &Cluster,
    view: &View,
    next: &Document,
    judges: bool,
) -> Result<Option<DocRef>, NotInForce> {
    let mut next = next.clone();
    next.put_above(view.doc.version, &view.doc.hash);
    let meta = Meta {
        cluster_id: cluster.id().to_owned(),
        shard_name: String::new(),
        slot_algorithm: ALGORITHM.to_owned(),
        doc_version: view.doc.version + 1,
        doc_phase: if judges {
            Phase::Adjudicate
        } else {
            Phase::Normal
        },
        doc_hash: next.hash(),
        doc: next.to_json(),
    };
    point("installing");
    // First they become shards of this service, without a part in it: from then on an empty database of a shard was wiped.
    for name in next
        .live()
        .filter(|name| !view.document.shards.contains_key(*name))
    {
        if let Some(shard) = cluster.opened_shard(name) {
            found(&shard, &meta_of(cluster, view)).await?;
        }
    }
    for name in next.live() {
        let Some(shard) = cluster.opened_shard(name) else {
            return Err(NotInForce::Refused(format!(
                "{name} is not in our shards.toml"
            )));
        };
        match offer(&shard, &meta).await? {
            Acceptance::Accept { .. } | Acceptance::There => point("installed"),
            Acceptance::Newer(_) | Acceptance::Conflict(_) => return Ok(None),
        }
    }
    let doc = meta.doc_ref();
    adopt(cluster, doc.clone(), next)?;
    Ok(Some(doc))
}

/// Takes a document on to its next phase on every shard that it does not declare down.
///
/// # Errors
/// [`NotInForce`].
pub async fn advance(cluster: &Cluster, view: &View, phase: Phase) -> Result<(), NotInForce> {
    let mut meta = meta_of(cluster, view);
    meta.doc_phase = phase;
    for shard in &view.shards {
        offer(shard, &meta).await?;
        point("judged");
    }
    adopt(cluster, meta.doc_ref(), view.document.clone())
}

fn meta_of(cluster: &Cluster, view: &View) -> Meta {
    Meta {
        cluster_id: cluster.id().to_owned(),
        shard_name: String::new(),
        slot_algorithm: ALGORITHM.to_owned(),
        doc_version: view.doc.version,
        doc_phase: view.doc.phase,
        doc_hash: view.doc.hash.clone(),
        doc: view.document.to_json(),
    }
}

/// Offers a document to a shard.
async fn offer(shard: &Shard, meta: &Meta) -> Result<Acceptance, NotInForce> {
    let meta = Meta {
        shard_name: shard.name().to_owned(),
        ..meta.clone()
    };
    Ok(shard
        .ask(move |store, identity| async move { store.accept(&identity, &meta).await })
        .await?)
}

/// Makes an empty database a shard of this service that owns nothing.
async fn found(shard: &Shard, meta: &Meta) -> Result<(), NotInForce> {
    let meta = Meta {
        shard_name: shard.name().to_owned(),
        ..meta.clone()
    };
    let founded = meta.clone();
    let there = shard
        .ask(move |store, _| async move { store.found(&founded, &SlotSet::empty()).await })
        .await?;
    if there.cluster_id != meta.cluster_id || there.shard_name != meta.shard_name {
        return Err(foreign(shard, &there));
    }
    Ok(())
}

async fn stored_meta(shard: &Shard) -> Result<Option<Meta>, ShardDown> {
    shard
        .ask(|store, _| async move { store.meta().await })
        .await
}

fn foreign(shard: &Shard, there: &Meta) -> NotInForce {
    NotInForce::Refused(format!(
        "the url of {} leads to the database of {} of service {}; every shard needs its own",
        shard.name(),
        there.shard_name,
        there.cluster_id
    ))
}

/// Every shard that the next document does not declare down must answer, and be who it is.
async fn check_members(cluster: &Cluster, view: &View, next: &Document) -> Result<(), NotInForce> {
    for name in next.live() {
        let Some(shard) = cluster.opened_shard(name) else {
            return Err(NotInForce::Refused(format!(
                "{name} is not in our shards.toml"
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
                NotInForce::Waiting(format!("{e}; every shard that is not declared down must answer before an edit is in force"))
            })?;
        let known = view.document.shards.contains_key(name);
        match found {
            Some(meta) if meta.cluster_id != cluster.id() || meta.shard_name != name => {
                return Err(foreign(&shard, &meta));
            }
            Some(_) => {}
            None if known => {
                return Err(NotInForce::Refused(format!(
                    "the database of {name} is empty, but it is a shard of this service: it was wiped, or its url leads to another"
                )));
            }
            None if view.document.retired.contains(name) => {
                return Err(NotInForce::Refused(format!(
                    "{name} was the name of a shard before; a new database needs a new name"
                )));
            }
            None => {}
        }
    }
    Ok(())
}

/// Reads the documents of all shards, adopts the one that stands above the others, and completes it where it is missing. Where
/// none does, see [`rivals`].
///
/// # Errors
/// [`NotInForce`].
pub async fn catch_up(cluster: &Cluster) -> Result<(), NotInForce> {
    let view = cluster.view();
    // Also those that take no part: one that is to come back may have accepted what the others have not heard of.
    // But not those that were removed: their servers may be gone for good.
    let mut asked = cluster.all_opened();
    asked.retain(|shard| !view.document.retired.contains(shard.name()));
    let looks = asked.into_iter().map(|shard| async move {
        // One that does not answer has nothing to say; a later look will tell.
        let meta = stored_meta(&shard).await.ok().flatten();
        meta.map(|meta| (shard.name().to_owned(), meta))
    });
    let mut metas = Vec::new();
    for (name, meta) in futures_util::future::join_all(looks)
        .await
        .into_iter()
        .flatten()
    {
        if meta.cluster_id == cluster.id() && meta.shard_name == name {
            metas.push((name, meta));
        }
    }
    let found = rivals::read(metas).map_err(|e| NotInForce::Waiting(e.to_string()))?;
    let (meta, document) = match rivals::decide(&found) {
        None => return Ok(()),
        Some(Verdict::Agreed(meta, document)) => (meta, document),
        Some(Verdict::Settle(meta, document)) => {
            tracing::warn!(
                version = meta.doc_version,
                "shards have documents that were proposed at the same time: one is put above them"
            );
            (meta, document)
        }
        Some(Verdict::Ask(name, meta)) => {
            if let Some(shard) = cluster.opened_shard(&name) {
                offer(&shard, &meta).await?;
            }
            return Err(NotInForce::Waiting(
                "shards have documents that were proposed at the same time".into(),
            ));
        }
        Some(Verdict::Wait(names)) => {
            return Err(NotInForce::Waiting(format!(
                "shards have documents that were proposed at the same time; {} must answer to tell which of them is in force",
                names.join(" or ")
            )));
        }
    };
    for name in document.live() {
        let has_it = found
            .get(name)
            .is_some_and(|(there, _)| there.doc_ref() == meta.doc_ref());
        let shard = cluster.opened_shard(name).filter(|shard| !shard.is_down());
        if let Some(shard) = shard.filter(|_| !has_it) {
            match offer(&shard, &meta).await? {
                Acceptance::Accept { .. } => tracing::info!(
                    shard = name,
                    version = meta.doc_version,
                    "document completed"
                ),
                Acceptance::There => {}
                Acceptance::Newer(_) | Acceptance::Conflict(_) => {
                    return Err(NotInForce::Waiting(
                        "another document is being put in force".into(),
                    ));
                }
            }
        }
    }
    let later = (meta.doc_version, meta.doc_phase) > (view.doc.version, view.doc.phase);
    // One that was never in force may have a higher version than the one that is.
    let astray = !view.document.stands_above(meta.doc_version, &meta.doc_hash);
    if view.doc != meta.doc_ref() && (later || (astray && view.doc.hash != meta.doc_hash)) {
        return adopt(cluster, meta.doc_ref(), document);
    }
    Ok(())
}

fn adopt(cluster: &Cluster, doc: DocRef, document: Document) -> Result<(), NotInForce> {
    let shards: Vec<String> = document
        .shards
        .iter()
        .map(|(name, member)| match member.state {
            ShardState::Active => name.clone(),
            ShardState::Draining => format!("{name} draining"),
            ShardState::Down => format!("{name} down"),
        })
        .collect();
    tracing::info!(
        version = doc.version,
        phase = doc.phase.as_str(),
        shards = shards.join(", "),
        "document in force"
    );
    Ok(cluster.adopt(doc, document)?)
}

/// What a shard still has.
async fn held_by(cluster: &Cluster, name: &str) -> Held {
    let Some(shard) = cluster.opened_shard(name) else {
        return Held::Unknown("it is not in our shards.toml; put it back as draining".into());
    };
    let rows = shard
        .ask(|store, identity| async move { store.rows(&identity, None, None).await })
        .await;
    let leftovers = shard
        .ask(|store, identity| async move { store.leftovers(&identity, Duration::ZERO).await })
        .await;
    match (rows, leftovers) {
        (Ok(rows), Ok(leftovers)) => Held::Slots {
            slots: rows
                .iter()
                .filter(|row| row.state != SlotState::None)
                .count(),
            with_rows: leftovers.len(),
        },
        (Err(e), _) | (_, Err(e)) => Held::Unknown(e.to_string()),
    }
}

async fn back_off() {
    tokio::time::sleep(Duration::from_millis(50).mul_f64(1.0 + 5.0 * chance::fraction())).await;
}
