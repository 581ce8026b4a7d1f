//! The shards as one: founding them, knowing them again, and which of them owns a slot.
//!
//! What is known here of ownership is a hint: the slot's row in the shard decides (see [`crate::ownership`]). A wrong hint
//! costs a refused write and a look at the shards, nothing else.

use crate::chance;
use crate::config;
use crate::metrics::Metrics;
use crate::ownership::SlotState;
use crate::ring::{ALGORITHM, Placement, SLOTS, Slot};
use crate::store::{
    Database, DocRef, Holding, Identity, Meta, MysqlStore, Phase, Shard, ShardState, SlotSet,
    SqliteStore, StoreError, Timing,
};
use crate::topology::{Document, ShardState as Wanted, StoreUrl, Topology};
use arc_swap::ArcSwap;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};

/// A handle; a clone is one more reference.
#[derive(Clone)]
pub struct Cluster {
    inner: Arc<Inner>,
}

struct Inner {
    cluster_id: String,
    settings: config::Store,
    open: Open,
    runtime: Handle,
    /// The document that this instance goes by, and the shards it names. Read by every message, hence without a lock.
    view: ArcSwap<View>,
    /// Every shard that this process has opened, by number: owners are named by it.
    roster: ArcSwap<Vec<Shard>>,
    /// By name, what the file says, and the shard that was opened for it; held while view or roster change.
    opened: Mutex<BTreeMap<String, (StoreUrl, Shard)>>,
    /// For each slot the number of its owner, as far as known; with [`SEALED`] where it was last seen handing over.
    owners: Vec<AtomicU16>,
    refreshing: tokio::sync::Mutex<()>,
    /// Rounds of asking that have ended.
    rounds: AtomicU64,
    finding: Semaphore,
    /// Tells when an owner was noted.
    noted: watch::Sender<()>,
    metrics: Arc<Metrics>,
}

/// A document, as this instance can carry it out.
pub struct View {
    /// Which.
    pub doc: DocRef,
    /// What it says.
    pub document: Document,
    /// Those of its shards that are not declared down and that our file has a URL for, by name.
    pub shards: Vec<Shard>,
    placement: Placement,
}

impl View {
    /// The shard that the ring wants for a slot.
    #[must_use]
    pub fn wanted(&self, slot: Slot) -> &str {
        self.placement.wanted(slot)
    }

    /// One of its shards.
    #[must_use]
    pub fn shard(&self, name: &str) -> Option<&Shard> {
        self.shards.iter().find(|shard| shard.name() == name)
    }

    /// Names of shards that are not declared down, and that our file has not.
    pub fn strangers(&self) -> impl Iterator<Item = &str> {
        self.document
            .live()
            .filter(|name| self.shard(name).is_none())
    }
}

/// No shard is known to own the slot.
const NOBODY: u16 = SEALED - 1;

/// Beside the number of a shard: it takes no writes for the slot, but is read there until the next owner is known.
const SEALED: u16 = 1 << 15;

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

/// So many slots are looked for one by one at the same time; beyond, all rows cost less.
const FINDING: usize = 8;

/// How often it is looked at least before what is found at the start is taken for wrong, and the pause after the first look.
const LOOKS: u32 = 4;
const LOOK_AGAIN: Duration = Duration::from_millis(100);

impl Cluster {
    /// Takes the shards of a file into service: founds them if they are new, otherwise checks who they are. A shard that
    /// does not answer is taken into service down, unless this is the founding, which needs them all.
    ///
    /// # Errors
    /// [`StartError`]: `Wait` while a database that is needed does not answer, `Fatal` for what must be mended first.
    pub async fn start(
        topology: &Topology,
        open: Open,
        settings: &config::Store,
        founding: Founding,
        runtime: &Handle,
        metrics: &Arc<Metrics>,
    ) -> Result<Self, StartError> {
        let mut stores = BTreeMap::new();
        for (name, shard) in &topology.shards {
            stores.insert(name.clone(), open(name, &shard.url)?);
        }
        // Another instance may be founding while we look from shard to shard: what is wrong is wrong only if it stays so.
        let (mut wrong, mut looks) = (None, 0);
        let (mut found, agreed) = loop {
            let found = look_at_all(&stores, founding, runtime).await;
            let agreed = agree(topology, &found);
            let now_wrong = agreed.as_ref().err().map(ToString::to_string);
            looks += 1;
            if now_wrong.is_none() || (looks >= LOOKS && now_wrong == wrong) || looks == 3 * LOOKS {
                break (found, agreed);
            }
            wrong = now_wrong;
            tokio::time::sleep(LOOK_AGAIN * looks.min(LOOKS)).await;
        };
        let agreed = agreed?;
        let (doc, document, cluster_id) = match agreed {
            Agreed::InForce {
                doc,
                document,
                cluster_id,
            } => (doc, document, cluster_id),
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
                let doc = DocRef {
                    version: 1,
                    phase: Phase::Normal,
                    hash: document.hash(),
                };
                (doc, document, cluster_id)
            }
        };
        let inner = Inner {
            cluster_id,
            settings: settings.clone(),
            open,
            runtime: runtime.clone(),
            view: ArcSwap::from_pointee(view_of(doc, document, Vec::new())?),
            roster: ArcSwap::default(),
            opened: Mutex::default(),
            owners: Slot::all().map(|_| AtomicU16::new(NOBODY)).collect(),
            refreshing: tokio::sync::Mutex::default(),
            rounds: AtomicU64::new(0),
            finding: Semaphore::new(FINDING),
            noted: watch::Sender::default(),
            metrics: metrics.clone(),
        };
        let cluster = Self {
            inner: Arc::new(inner),
        };
        for (name, store) in stores {
            let shard = cluster.enlist(&name, &topology.shards[&name].url, store);
            match &found[&name] {
                Err(e) => shard.open(&e.to_string()),
                Ok(seen) => seen
                    .warnings
                    .iter()
                    .for_each(|line| tracing::warn!(shard = %name, "{line}")),
            }
        }
        cluster.look_with(|view| (view.doc.clone(), view.document.clone()))?;
        cluster.refresh().await;
        Ok(cluster)
    }

    /// Opens the shards of a file that are not open yet, or that have another URL than before. A shard of the document under
    /// another URL must be the one that it was. What is no longer in the file stays open: it may still be needed.
    ///
    /// # Errors
    /// `Fatal` for a URL that cannot be one or leads elsewhere, `Wait` for one that does not answer; all stays as it was.
    pub async fn open(&self, topology: &Topology) -> Result<(), StartError> {
        let mut opened = Vec::new();
        for (name, shard) in &topology.shards {
            let known = self.opened().get(name).map(|(url, _)| url.clone());
            if known.as_ref() == Some(&shard.url) {
                continue;
            }
            let store = (self.inner.open)(name, &shard.url)?;
            if known.is_some() && self.view().document.shards.contains_key(name) {
                self.recognize(name, &store).await?;
            }
            opened.push((name, &shard.url, store));
        }
        if !opened.is_empty() {
            for (name, url, store) in opened {
                self.enlist(name, url, store);
            }
            self.look_with(|view| (view.doc.clone(), view.document.clone()))?;
            self.refresh().await;
        }
        Ok(())
    }

    async fn recognize(&self, name: &str, store: &Arc<dyn Database>) -> Result<(), StartError> {
        let asked = store.clone();
        let found = self.inner.runtime.spawn(async move { asked.meta().await });
        let found = found
            .await
            .unwrap_or_else(|e| Err(StoreError::Refused(e.to_string())))
            .map_err(|e| StartError::Wait(format!("the new url of {name}: {e}")))?;
        match found {
            Some(meta) if meta.cluster_id == self.inner.cluster_id && meta.shard_name == name => {
                Ok(())
            }
            Some(meta) => Err(StartError::Fatal(format!(
                "the new url of {name} leads to the database of {}; it must be the same database",
                meta.shard_name
            ))),
            None => Err(StartError::Fatal(format!(
                "the new url of {name} leads to an empty database; it must be the same database"
            ))),
        }
    }

    fn enlist(&self, name: &str, url: &StoreUrl, store: Arc<dyn Database>) -> Shard {
        let mut opened = self.opened();
        let mut roster = Vec::clone(&self.inner.roster.load());
        let identity = Identity {
            cluster_id: self.inner.cluster_id.clone(),
            shard_name: name.to_owned(),
        };
        // A process would have to open thirty thousand to run out of numbers; then the last is used again, and owners go wrong,
        // which costs refused writes.
        let number =
            u16::try_from(roster.len()).map_or(NOBODY - 1, |number| number.min(NOBODY - 1));
        let shard = Shard::new(
            number,
            identity,
            store,
            Timing::from(&self.inner.settings),
            self.inner.runtime.clone(),
            self.inner.metrics.shard(name),
        );
        roster.push(shard.clone());
        self.inner.roster.store(Arc::new(roster));
        opened.insert(name.to_owned(), (url.clone(), shard.clone()));
        self.inner
            .runtime
            .spawn(refresh_when_up(Arc::downgrade(&self.inner), shard.clone()));
        shard
    }

    fn opened(&self) -> MutexGuard<'_, BTreeMap<String, (StoreUrl, Shard)>> {
        self.inner
            .opened
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A shard that our file names or named, whether or not it is in the document.
    #[must_use]
    pub fn opened_shard(&self, name: &str) -> Option<Shard> {
        self.opened().get(name).map(|(_, shard)| shard.clone())
    }

    /// All of them, by name.
    #[must_use]
    pub fn all_opened(&self) -> Vec<Shard> {
        let opened = self.opened();
        opened.values().map(|(_, shard)| shard.clone()).collect()
    }

    /// Goes by a document from now on.
    ///
    /// # Errors
    /// It names no active shard.
    pub fn adopt(&self, doc: DocRef, document: Document) -> Result<(), StartError> {
        self.look_with(|_| (doc, document))
    }

    /// Changes the view, under the lock that shards are opened under: neither may be lost on the other.
    fn look_with(&self, next: impl FnOnce(&View) -> (DocRef, Document)) -> Result<(), StartError> {
        let opened = self.opened();
        let (doc, document) = next(&self.view());
        let shards: Vec<Shard> = document
            .live()
            .filter_map(|name| opened.get(name).map(|(_, shard)| shard.clone()))
            .collect();
        let numbers: Vec<u16> = shards.iter().map(Shard::number).collect();
        let metrics = &self.inner.metrics;
        metrics.document_version.set(doc.version as i64);
        let judging = doc.phase == Phase::Adjudicate;
        metrics.adjudicating.set(i64::from(judging));
        let view = view_of(doc, document, shards)?;
        self.inner.view.store(Arc::new(view));
        for owner in &self.inner.owners {
            let number = owner.load(Ordering::Relaxed) & !SEALED;
            if number != NOBODY && !numbers.contains(&number) {
                owner.store(NOBODY, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// The document this instance goes by.
    #[must_use]
    pub fn view(&self) -> Arc<View> {
        self.inner.view.load_full()
    }

    /// The id of the service.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.inner.cluster_id
    }

    /// The shard that is known to own a slot, or to hand it over just now.
    #[must_use]
    pub fn known_owner(&self, slot: Slot) -> Option<Shard> {
        let number = self.inner.owners[slot.index()].load(Ordering::Relaxed) & !SEALED;
        self.inner.roster.load().get(usize::from(number)).cloned()
    }

    /// The shard that is known to take writes for a slot.
    #[must_use]
    pub fn known_writable(&self, slot: Slot) -> Option<Shard> {
        // With SEALED it is the number of no shard.
        let number = self.inner.owners[slot.index()].load(Ordering::Relaxed);
        self.inner.roster.load().get(usize::from(number)).cloned()
    }

    /// Notes an owner that was seen.
    pub fn note_owner(&self, slot: Slot, shard: &Shard) {
        self.inner.owners[slot.index()].store(shard.number(), Ordering::Relaxed);
        self.inner.noted.send_replace(());
    }

    /// Tells when [`Cluster::note_owner`] was called.
    #[must_use]
    pub fn owners_changed(&self) -> watch::Receiver<()> {
        self.inner.noted.subscribe()
    }

    /// Where to try a slot: at its owner, or else at the wanted shard, which says no if it is not. `None` if this
    /// instance's file lacks that shard.
    #[must_use]
    pub fn route(&self, slot: Slot) -> Option<Shard> {
        self.known_owner(slot).or_else(|| {
            let view = self.inner.view.load();
            view.shard(view.wanted(slot)).cloned()
        })
    }

    /// Asks all shards who owns a slot. While many are looked for, this is [`Cluster::refresh`].
    pub async fn find(&self, slot: Slot) {
        let Ok(_one) = self.inner.finding.try_acquire() else {
            return self.refresh().await;
        };
        let view = self.view();
        let asked = view.shards.iter().map(|shard| async move {
            let asked = shard.ask(move |store, identity| async move {
                store.rows(&identity, None, Some(slot)).await
            });
            let row = asked.await.ok()?.pop()?;
            Some((shard.number(), row.state))
        });
        let answers = futures_util::future::join_all(asked).await;
        let answered: Vec<(u16, SlotState)> = answers.into_iter().flatten().collect();
        let holder = |in_state| {
            let holds = answered.iter().find(|(_, state)| *state == in_state);
            holds.map(|(number, _)| *number)
        };
        note(
            &self.inner.owners[slot.index()],
            holder(SlotState::Owner),
            holder(SlotState::Sealed),
            |number| answered.iter().any(|(of, _)| *of == number),
        );
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
        let view = self.view();
        let asked = view
            .shards
            .iter()
            .map(|shard| async move { shard.slots().await.ok() });
        let answers = futures_util::future::join_all(asked).await;
        let answered: Vec<(&Shard, &Holding)> = view
            .shards
            .iter()
            .zip(&answers)
            .filter_map(|(shard, holding)| Some((shard, holding.as_ref()?)))
            .collect();
        for slot in Slot::all() {
            let owner = &self.inner.owners[slot.index()];
            let holder = |of: fn(&Holding) -> &SlotSet| {
                let holds = answered
                    .iter()
                    .find(|(_, holding)| of(holding).contains(slot));
                holds.map(|(shard, _)| shard.number())
            };
            let (owned, sealed) = (
                holder(|holding| &holding.owned),
                holder(|holding| &holding.sealed),
            );
            let has_answered = |number| answered.iter().any(|(shard, _)| shard.number() == number);
            note(owner, owned, sealed, has_answered);
        }
        for (shard, holding) in answered {
            self.inner
                .metrics
                .slots(shard.name())
                .set(holding.owned.len() as i64);
        }
        self.inner.rounds.fetch_add(1, Ordering::Release);
    }
}

/// Notes what shards have answered of a slot: the numbers of its owner and of the shard that hands it over.
fn note(
    slot: &AtomicU16,
    owned: Option<u16>,
    sealed: Option<u16>,
    has_answered: impl Fn(u16) -> bool,
) {
    // A sealed slot is still read where it is sealed, until its target has it.
    match owned.or(sealed.map(|number| number | SEALED)) {
        Some(number) => slot.store(number, Ordering::Relaxed),
        // Only what we believed of a shard that has answered is known to be wrong.
        None if has_answered(slot.load(Ordering::Relaxed) & !SEALED) => {
            slot.store(NOBODY, Ordering::Relaxed);
        }
        None => {}
    }
}

/// A shard that comes back may own other slots than before.
async fn refresh_when_up(cluster: Weak<Inner>, shard: Shard) {
    let mut state = shard.watch();
    drop(shard);
    while state.changed().await.is_ok() {
        let up = *state.borrow_and_update() == ShardState::Up;
        let Some(inner) = cluster.upgrade() else {
            return;
        };
        if up {
            Cluster { inner }.refresh().await;
        }
    }
}

fn view_of(doc: DocRef, document: Document, shards: Vec<Shard>) -> Result<View, StartError> {
    let placement = document
        .placement()
        .ok_or_else(|| StartError::Fatal("the document has no active shard".into()))?;
    Ok(View {
        doc,
        document,
        shards,
        placement,
    })
}

/// What was seen of one database at the start.
struct Seen {
    meta: Option<Meta>,
    warnings: Vec<String>,
}

async fn look_at_all(
    stores: &BTreeMap<String, Arc<dyn Database>>,
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

async fn look(store: &dyn Database, founding: Founding) -> Result<Seen, StoreError> {
    store.ping().await?;
    if founding == Founding::Allowed {
        store.migrate().await?;
    }
    Ok(Seen {
        meta: store.meta().await?,
        warnings: store.warnings().await?,
    })
}

/// Makes a store for a shard's name and URL; opens no connection yet.
pub type Open = Arc<dyn Fn(&str, &StoreUrl) -> Result<Arc<dyn Database>, StartError> + Send + Sync>;

/// The stores there are, with connections on `runtime`.
#[must_use]
pub fn stores(settings: &config::Store, runtime: &Handle) -> Open {
    let (settings, runtime) = (settings.clone(), runtime.clone());
    Arc::new(move |name, url| {
        Ok(match url {
            StoreUrl::Mysql(url) => Arc::new(
                MysqlStore::new(url, &settings, runtime.clone())
                    .map_err(|e| StartError::Fatal(format!("{name}: {e}")))?,
            ),
            StoreUrl::Sqlite(path) => Arc::new(SqliteStore::new(path, &settings, runtime.clone())),
        })
    })
}

/// What the databases say, taken together.
enum Agreed {
    /// They are a service already.
    InForce {
        doc: DocRef,
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
                doc: meta.doc_ref(),
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
            let cluster_id = format!("{:032x}", chance::number());
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
    stores: &BTreeMap<String, Arc<dyn Database>>,
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
