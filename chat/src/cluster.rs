//! The shards as one: founding them, knowing them again, and which of them owns a slot.
//!
//! What is known here of ownership is a hint: the slot's row in the shard decides (see [`crate::ownership`]). A wrong hint
//! costs a refused write and a look at the shards, nothing else.

use crate::config;
use crate::metrics::Metrics;
use crate::ring::{ALGORITHM, Placement, SLOTS, Slot};
use crate::store::{
    Identity, Meta, MysqlStore, Phase, Shard, ShardState, SlotSet, SqliteStore, Store, StoreError,
    Timing,
};
use crate::topology::{Document, ShardState as Wanted, StoreUrl, Topology};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use tokio::runtime::Handle;

/// A handle; a clone is one more reference.
#[derive(Clone)]
pub struct Cluster {
    inner: Arc<Inner>,
}

struct Inner {
    version: u64,
    document: Document,
    placement: Placement,
    shards: Vec<Shard>,
    /// For each slot the index in `shards` of its owner, as far as known. Read by every message, hence without a lock.
    owners: Vec<AtomicU16>,
    refreshing: tokio::sync::Mutex<()>,
    /// Rounds of asking that have ended.
    rounds: AtomicU64,
    metrics: Arc<Metrics>,
}

/// No shard is known to own the slot.
const NOBODY: u16 = u16::MAX;

/// Why the shards could not be taken into service. Each is one line: what, where, and how to mend it.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// It may pass by itself.
    #[error("{0}")]
    Wait(String),
    /// It will not.
    #[error("{0}")]
    Fatal(String),
}

/// What is done with databases that were never founded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Founding {
    /// They become the shards of a new service.
    Allowed,
    /// They are an error; for commands that only look.
    Refused,
}

impl Cluster {
    /// Takes the shards of a file into service: founds them if they are new, otherwise checks who they are. A shard that
    /// does not answer is taken into service down, unless this is the founding, which needs them all.
    ///
    /// # Errors
    /// [`StartError`]: `Wait` while a database that is needed does not answer, `Fatal` for what must be mended first.
    pub async fn start(
        topology: &Topology,
        settings: &config::Store,
        founding: Founding,
        runtime: &Handle,
        metrics: &Arc<Metrics>,
    ) -> Result<Self, StartError> {
        let mut stores = BTreeMap::new();
        for (name, shard) in &topology.shards {
            stores.insert(name.clone(), open(name, &shard.url, settings, runtime)?);
        }
        let mut found = look_at_all(&stores, founding, runtime).await;
        let agreed = match agree(topology, &found) {
            Ok(agreed) => agreed,
            // Another instance may have been founding while we looked from shard to shard.
            Err(_) => {
                found = look_at_all(&stores, founding, runtime).await;
                agree(topology, &found)?
            }
        };
        let (version, document, cluster_id) = match agreed {
            Agreed::InForce {
                version,
                document,
                cluster_id,
            } => (version, document, cluster_id),
            Agreed::ToFound { .. } if founding == Founding::Refused => {
                return Err(StartError::Fatal(
                    "these databases are empty; start the server once to found them".into(),
                ));
            }
            Agreed::ToFound {
                document,
                cluster_id,
            } => {
                let cluster_id = establish(&stores, &document, cluster_id, runtime).await?;
                found.values_mut().for_each(|seen| {
                    *seen = Ok(Seen {
                        meta: None,
                        warnings: Vec::new(),
                    })
                });
                (1, document, cluster_id)
            }
        };
        let placement = document.placement().ok_or_else(|| {
            StartError::Fatal("the installed document has no active shard".into())
        })?;

        let mut shards = Vec::new();
        for (name, store) in stores
            .into_iter()
            .filter(|(name, _)| document.shards.contains_key(name))
        {
            let identity = Identity {
                cluster_id: cluster_id.clone(),
                shard_name: name.clone(),
            };
            let shard = Shard::new(
                identity,
                store,
                Timing::from(settings),
                runtime.clone(),
                metrics.shard(&name),
            );
            match &found[&name] {
                Err(e) => shard.open(&e.to_string()),
                Ok(seen) => seen
                    .warnings
                    .iter()
                    .for_each(|line| tracing::warn!(shard = %name, "{line}")),
            }
            shards.push(shard);
        }
        for name in document
            .shards
            .keys()
            .filter(|name| !topology.shards.contains_key(*name))
        {
            tracing::warn!(shard = %name, "the shards know it, but shards.toml does not: its dialogs are unavailable here");
        }
        if let Some(difference) = document.difference(&topology.document()) {
            tracing::warn!(
                difference,
                "shards.toml differs from the document in force, which stays in force"
            );
        }

        let owners = Slot::all().map(|_| AtomicU16::new(NOBODY)).collect();
        metrics.document_version.set(version as i64);
        let inner = Inner {
            version,
            document,
            placement,
            shards,
            owners,
            refreshing: tokio::sync::Mutex::default(),
            rounds: AtomicU64::new(0),
            metrics: metrics.clone(),
        };
        let cluster = Self {
            inner: Arc::new(inner),
        };
        cluster.refresh().await;
        for shard in &cluster.inner.shards {
            runtime.spawn(cluster.clone().refresh_when_up(shard.clone()));
        }
        Ok(cluster)
    }

    /// A shard that comes back may own other slots than before.
    async fn refresh_when_up(self, shard: Shard) {
        let mut state = shard.watch();
        while state.changed().await.is_ok() {
            if *state.borrow_and_update() == ShardState::Up {
                self.refresh().await;
            }
        }
    }

    /// The shards this instance can reach by its file, by name.
    #[must_use]
    pub fn shards(&self) -> &[Shard] {
        &self.inner.shards
    }

    /// Names of shards that the document has and this instance's file has not.
    pub fn strangers(&self) -> impl Iterator<Item = &str> {
        let known = |name: &str| self.inner.shards.iter().any(|shard| shard.name() == name);
        self.inner
            .document
            .shards
            .keys()
            .map(String::as_str)
            .filter(move |name| !known(name))
    }

    /// The document in force, and its version.
    #[must_use]
    pub fn document(&self) -> (u64, &Document) {
        (self.inner.version, &self.inner.document)
    }

    /// The shard that the ring wants for a slot.
    #[must_use]
    pub fn wanted(&self, slot: Slot) -> &str {
        self.inner.placement.wanted(slot)
    }

    /// The shard that is known to own a slot.
    #[must_use]
    pub fn known_owner(&self, slot: Slot) -> Option<&Shard> {
        let index = self.inner.owners[slot.index()].load(Ordering::Relaxed);
        self.inner.shards.get(usize::from(index))
    }

    /// Where to try a slot: at its owner, or else at the wanted shard, which says no if it is not. `None` if this
    /// instance's file lacks that shard.
    #[must_use]
    pub fn route(&self, slot: Slot) -> Option<&Shard> {
        self.known_owner(slot).or_else(|| {
            let wanted = self.wanted(slot);
            self.inner
                .shards
                .iter()
                .find(|shard| shard.name() == wanted)
        })
    }

    /// Asks all shards which slots they own. Callers at the same time share one round.
    pub async fn refresh(&self) {
        // Who waits here while a round is under way must not share it: it may have asked before what they were refused.
        // Two that wait share the next.
        let seen = self.inner.rounds.load(Ordering::Acquire);
        let _turn = self.inner.refreshing.lock().await;
        if self.inner.rounds.load(Ordering::Acquire) > seen + 1 {
            return;
        }
        let asked = self
            .inner
            .shards
            .iter()
            .map(|shard| async move { shard.slots().await });
        let answers = futures_util::future::join_all(asked).await;
        for (index, (shard, answer)) in self.inner.shards.iter().zip(answers).enumerate() {
            let Ok(slots) = answer else { continue };
            let index = index as u16;
            for slot in Slot::all() {
                let owner = &self.inner.owners[slot.index()];
                if slots.contains(slot) {
                    owner.store(index, Ordering::Relaxed);
                } else {
                    // Only what we believed of this very shard is known to be wrong.
                    let _ =
                        owner.compare_exchange(index, NOBODY, Ordering::Relaxed, Ordering::Relaxed);
                }
            }
            self.inner
                .metrics
                .slots(shard.name())
                .set(slots.len() as i64);
        }
        self.inner.rounds.fetch_add(1, Ordering::Release);
    }
}

/// What was seen of one database at the start.
struct Seen {
    meta: Option<Meta>,
    warnings: Vec<String>,
}

async fn look_at_all(
    stores: &BTreeMap<String, Arc<dyn Store>>,
    founding: Founding,
    runtime: &Handle,
) -> BTreeMap<String, Result<Seen, StoreError>> {
    let looks = stores.iter().map(|(name, store)| {
        let store = store.clone();
        let look = runtime.spawn(async move { look(&*store, founding).await });
        async move {
            (
                name.clone(),
                look.await
                    .unwrap_or_else(|e| Err(StoreError::Refused(e.to_string()))),
            )
        }
    });
    futures_util::future::join_all(looks)
        .await
        .into_iter()
        .collect()
}

async fn look(store: &dyn Store, founding: Founding) -> Result<Seen, StoreError> {
    store.ping().await?;
    if founding == Founding::Allowed {
        store.migrate().await?;
    }
    Ok(Seen {
        meta: store.meta().await?,
        warnings: store.warnings().await?,
    })
}

fn open(
    name: &str,
    url: &StoreUrl,
    settings: &config::Store,
    runtime: &Handle,
) -> Result<Arc<dyn Store>, StartError> {
    Ok(match url {
        StoreUrl::Mysql(url) => Arc::new(
            MysqlStore::new(url, settings, runtime.clone())
                .map_err(|e| StartError::Fatal(format!("{name}: {e}")))?,
        ),
        StoreUrl::Sqlite(path) => Arc::new(SqliteStore::new(path, settings, runtime.clone())),
    })
}

/// What the databases say, taken together.
enum Agreed {
    /// They are a service already.
    InForce {
        version: u64,
        document: Document,
        cluster_id: String,
    },
    /// They are new, or their founding was not finished.
    ToFound {
        document: Document,
        cluster_id: String,
    },
}

fn agree(
    topology: &Topology,
    found: &BTreeMap<String, Result<Seen, StoreError>>,
) -> Result<Agreed, StartError> {
    let fatal = |what: String| Err(StartError::Fatal(what));
    let mut metas = Vec::<(&str, &Meta)>::new();
    let mut empty = Vec::new();
    let mut unreachable = Vec::new();
    for (name, seen) in found {
        match seen {
            Ok(Seen {
                meta: Some(meta), ..
            }) => metas.push((name, meta)),
            Ok(Seen { meta: None, .. }) => empty.push(name.as_str()),
            Err(StoreError::Refused(reason)) => return fatal(format!("{name}: {reason}")),
            Err(e) => unreachable.push(format!("{name} ({e})")),
        }
    }
    for (name, meta) in &metas {
        if meta.shard_name != *name {
            return fatal(format!(
                "the url of {name} leads to the database of {}; every shard needs its own",
                meta.shard_name
            ));
        }
        if meta.slot_algorithm != ALGORITHM {
            return fatal(format!(
                "{name} places dialogs by '{}', this version by '{ALGORITHM}'",
                meta.slot_algorithm
            ));
        }
        let (first, founder) = metas[0];
        if meta.cluster_id != founder.cluster_id {
            return fatal(format!(
                "{name} belongs to another service than {first}; its url leads to a foreign database"
            ));
        }
    }
    let newest = metas
        .iter()
        .map(|(_, meta)| *meta)
        .max_by_key(|meta| (meta.doc_version, meta.doc_phase));
    let parse = |meta: &Meta| {
        serde_json::from_str::<Document>(&meta.doc).map_err(|e| {
            StartError::Fatal(format!(
                "the document in {} is not readable: {e}",
                meta.shard_name
            ))
        })
    };
    match newest {
        Some(meta) if meta.doc_phase > Phase::Founding => {
            let document = parse(meta)?;
            if let Some(name) = empty
                .iter()
                .find(|name| document.shards.contains_key(**name))
            {
                return fatal(format!(
                    "the database of {name} is empty, but it is a shard of this service: it was wiped, or its url leads to another"
                ));
            }
            Ok(Agreed::InForce {
                version: meta.doc_version,
                document,
                cluster_id: meta.cluster_id.clone(),
            })
        }
        // A shard that does not answer may be one that was founded long ago: only all of them together are new.
        _ if !unreachable.is_empty() => Err(StartError::Wait(format!(
            "cannot be founded or known again without {}",
            unreachable.join(", ")
        ))),
        Some(meta) => {
            let document = parse(meta)?;
            if let Some(difference) = document.difference(&topology.document()) {
                return fatal(format!(
                    "the founding of this service was begun with another shards.toml: now {difference}"
                ));
            }
            Ok(Agreed::ToFound {
                document,
                cluster_id: meta.cluster_id.clone(),
            })
        }
        None => {
            if let Some((name, _)) = topology
                .shards
                .iter()
                .find(|(_, shard)| shard.state == Wanted::Down)
            {
                return fatal(format!(
                    "{name} is down in shards.toml, but a new service needs all its shards"
                ));
            }
            let cluster_id = format!("{:032x}", rand::random::<u128>());
            Ok(Agreed::ToFound {
                document: topology.document(),
                cluster_id,
            })
        }
    }
}

/// Founds every shard in name order, then puts the document in force on all. The first shard decides between instances
/// that do so at the same moment; whoever is interrupted is continued by the next to start.
async fn establish(
    stores: &BTreeMap<String, Arc<dyn Store>>,
    document: &Document,
    mut cluster_id: String,
    runtime: &Handle,
) -> Result<String, StartError> {
    let wait = |name: &str, e: StoreError| StartError::Wait(format!("{name}: {e}"));
    let placement = document
        .placement()
        .ok_or_else(|| StartError::Fatal("no active shard".into()))?;
    for (name, store) in stores {
        let mut owned = SlotSet::empty();
        Slot::all()
            .filter(|slot| placement.wanted(*slot) == name)
            .for_each(|slot| {
                owned.insert(slot);
            });
        let meta = Meta {
            cluster_id: cluster_id.clone(),
            shard_name: name.clone(),
            slot_algorithm: ALGORITHM.to_owned(),
            doc_version: 1,
            doc_phase: Phase::Founding,
            doc_hash: document.hash(),
            doc: document.to_json(),
        };
        let (store, ours) = (store.clone(), meta.clone());
        let there = runtime.spawn(async move { store.found(&ours, &owned).await });
        let there = there
            .await
            .unwrap_or_else(|e| Err(StoreError::Refused(e.to_string())))
            .map_err(|e| wait(name, e))?;
        if there.shard_name != *name {
            return Err(StartError::Fatal(format!(
                "the urls of {name} and {} lead to one database; every shard needs its own",
                there.shard_name
            )));
        }
        if there.doc_version != 1 || there.doc_hash != meta.doc_hash {
            return Err(StartError::Fatal(
                "another instance founds this service with another shards.toml; give both the same"
                    .into(),
            ));
        }
        if there.cluster_id != cluster_id {
            if stores.keys().next() != Some(name) {
                return Err(StartError::Fatal(format!(
                    "{name} belongs to another service; its url leads to a foreign database"
                )));
            }
            cluster_id = there.cluster_id;
        }
    }
    for (name, store) in stores {
        let (store, hash) = (store.clone(), document.hash());
        let advanced = runtime.spawn(async move { store.advance(1, &hash, Phase::Normal).await });
        advanced
            .await
            .unwrap_or_else(|e| Err(StoreError::Refused(e.to_string())))
            .map_err(|e| wait(name, e))?;
    }
    tracing::info!(
        shards = stores.len(),
        slots = SLOTS,
        "founded a new service"
    );
    Ok(cluster_id)
}
