//! All shards, and the known owner of each slot.
//!
//! The owners that are known here are hints: the slot's row in the shard decides (see
//! [`crate::domain::ownership`]). A wrong hint costs a rejected write and a query of the shards,
//! nothing else.

use super::bootstrap::{self, IfEmpty, Opened, StartError, StoreFactory};
use crate::config;
use crate::domain::ownership::SlotState;
use crate::domain::ring::Placement;
use crate::domain::shards_file::{ShardsFile, StoreUrl};
use crate::domain::slot::{Slot, SlotSet};
use crate::domain::topology::{Phase, Topology, TopologyRef};
use crate::metrics::Metrics;
use crate::store::{Database, Health, ServedSlots, Shard, ShardIdentity, Timing};
use arc_swap::ArcSwap;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
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
    open: StoreFactory,
    runtime: Handle,
    /// The topology that this instance has adopted, and its shards. Every message reads it, hence
    /// without a lock.
    view: ArcSwap<TopologyView>,
    /// Every shard that this process has opened, by number: owners are named by it.
    shards_by_number: ArcSwap<Vec<Shard>>,
    /// By name, the URL in the file and the shard that was opened for it. Locked while the view or
    /// the shards by number change.
    opened: Mutex<BTreeMap<String, (StoreUrl, Shard)>>,
    /// For each slot the number of its owner, as far as known; with [`SEALED`] where it was last
    /// seen handing over.
    owners: Vec<AtomicU16>,
    refreshing: tokio::sync::Mutex<()>,
    /// The number of finished rounds of asking all shards.
    rounds: AtomicU64,
    finding: Semaphore,
    /// Notified when an owner was noted.
    noted: watch::Sender<()>,
    metrics: Arc<Metrics>,
}

/// The topology that this instance has adopted, with the shards that its file has URLs for.
pub struct TopologyView {
    /// Identifies the topology.
    pub topology_ref: TopologyRef,
    /// The topology.
    pub topology: Topology,
    /// Those of its shards that are not declared down and that our file has a URL for, by name.
    pub shards: Vec<Shard>,
    placement: Placement,
}

impl TopologyView {
    /// The target shard of a slot.
    #[must_use]
    pub fn target(&self, slot: Slot) -> &str {
        self.placement.target(slot)
    }

    /// One of its shards.
    #[must_use]
    pub fn shard(&self, name: &str) -> Option<&Shard> {
        self.shards.iter().find(|shard| shard.name() == name)
    }

    /// Names of shards that are not declared down, and that the file of this instance lacks.
    pub fn unconfigured(&self) -> impl Iterator<Item = &str> {
        self.topology
            .live()
            .filter(|name| self.shard(name).is_none())
    }
}

/// No shard is known to own the slot.
const NO_OWNER: u16 = SEALED - 1;

/// Beside the number of a shard: it takes no writes for the slot, but is read there until the next
/// owner is known.
const SEALED: u16 = 1 << 15;

/// Up to this number of slots are asked for one by one; for more, reading all rows costs less.
const FINDING: usize = 8;

impl Cluster {
    /// Takes the shards of a file into service. A shard that does not answer begins with an open
    /// circuit breaker, unless the service is new: its initialization needs all shards.
    ///
    /// # Errors
    /// [`StartError`]: `Wait` while a database that is needed does not answer, `Fatal` for what
    /// must be fixed first.
    pub async fn start(
        file: &ShardsFile,
        open: StoreFactory,
        settings: &config::Store,
        if_empty: IfEmpty,
        runtime: &Handle,
        metrics: &Arc<Metrics>,
    ) -> Result<Self, StartError> {
        let started = bootstrap::start(file, &open, if_empty, runtime).await?;
        let view = view_of(started.topology_ref, started.topology, Vec::new())?;
        let inner = Inner {
            cluster_id: started.cluster_id,
            settings: settings.clone(),
            open,
            runtime: runtime.clone(),
            view: ArcSwap::from_pointee(view),
            shards_by_number: ArcSwap::default(),
            opened: Mutex::default(),
            owners: Slot::all().map(|_| AtomicU16::new(NO_OWNER)).collect(),
            refreshing: tokio::sync::Mutex::default(),
            rounds: AtomicU64::new(0),
            finding: Semaphore::new(FINDING),
            noted: watch::Sender::default(),
            metrics: metrics.clone(),
        };
        let cluster = Self {
            inner: Arc::new(inner),
        };
        for (name, Opened { store, answer }) in started.stores {
            let shard = cluster.register(&name, &file.shards[&name].url, store);
            match answer {
                Err(e) => shard.open(&e.to_string()),
                Ok(warnings) => {
                    for line in warnings {
                        tracing::warn!(shard = %name, "{line}");
                    }
                }
            }
        }
        cluster.update_view(|view| (view.topology_ref.clone(), view.topology.clone()))?;
        cluster.refresh().await;
        Ok(cluster)
    }

    /// Opens the shards of a file that are not open yet, or that have another URL than before. A
    /// shard of the topology under another URL must be the one that it was. What is no longer in
    /// the file stays open: it may still be needed.
    ///
    /// # Errors
    /// `Fatal` for a URL that cannot be one or leads elsewhere, `Wait` for one that does not
    /// answer; all stays as it was.
    pub async fn open(&self, file: &ShardsFile) -> Result<(), StartError> {
        let mut opened = Vec::new();
        for (name, shard) in &file.shards {
            let known = self.opened().get(name).map(|(url, _)| url.clone());
            if known.as_ref() == Some(&shard.url) {
                continue;
            }
            let store = (self.inner.open)(name, &shard.url)?;
            if known.is_some() && self.view().topology.shards.contains_key(name) {
                self.verify_identity(name, &store).await?;
            }
            opened.push((name, &shard.url, store));
        }
        if !opened.is_empty() {
            for (name, url, store) in opened {
                self.register(name, url, store);
            }
            self.update_view(|view| (view.topology_ref.clone(), view.topology.clone()))?;
            self.refresh().await;
        }
        Ok(())
    }

    async fn verify_identity(
        &self,
        name: &str,
        store: &Arc<dyn Database>,
    ) -> Result<(), StartError> {
        let asked = store.clone();
        let found = bootstrap::on(&self.inner.runtime, async move { asked.meta().await });
        let found = found
            .await
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

    fn register(&self, name: &str, url: &StoreUrl, store: Arc<dyn Database>) -> Shard {
        let mut opened = self.opened();
        let mut shards_by_number = Vec::clone(&self.inner.shards_by_number.load());
        let identity = ShardIdentity {
            cluster_id: self.inner.cluster_id.clone(),
            shard_name: name.to_owned(),
        };
        // After thirty thousand shards a process has no numbers left. Then the last one is used
        // again, and known owners are wrong, which costs refused writes.
        let number = u16::try_from(shards_by_number.len())
            .map_or(NO_OWNER - 1, |number| number.min(NO_OWNER - 1));
        let shard = Shard::new(
            number,
            identity,
            store,
            Timing::from(&self.inner.settings),
            self.inner.runtime.clone(),
            self.inner.metrics.shard(name),
        );
        shards_by_number.push(shard.clone());
        self.inner
            .shards_by_number
            .store(Arc::new(shards_by_number));
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

    /// A shard that the file names or named, whether or not it is in the topology.
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

    /// Adopts a topology.
    ///
    /// # Errors
    /// The topology names no active shard.
    pub fn adopt(&self, topology_ref: TopologyRef, topology: Topology) -> Result<(), StartError> {
        self.update_view(|_| (topology_ref, topology))
    }

    /// Changes the view, under the lock of opened shards: otherwise one of two concurrent changes
    /// could be lost.
    fn update_view(
        &self,
        next: impl FnOnce(&TopologyView) -> (TopologyRef, Topology),
    ) -> Result<(), StartError> {
        let opened = self.opened();
        let (topology_ref, topology) = next(&self.view());
        let shards: Vec<Shard> = topology
            .live()
            .filter_map(|name| opened.get(name).map(|(_, shard)| shard.clone()))
            .collect();
        let numbers: Vec<u16> = shards.iter().map(Shard::number).collect();
        let metrics = &self.inner.metrics;
        metrics.topology_version.set(topology_ref.version as i64);
        let failover = topology_ref.phase == Phase::Failover;
        metrics.failover_in_progress.set(i64::from(failover));
        let view = view_of(topology_ref, topology, shards)?;
        self.inner.view.store(Arc::new(view));
        for owner in &self.inner.owners {
            let number = owner.load(Ordering::Relaxed) & !SEALED;
            if number != NO_OWNER && !numbers.contains(&number) {
                owner.store(NO_OWNER, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// The topology that this instance has adopted.
    #[must_use]
    pub fn view(&self) -> Arc<TopologyView> {
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
        self.inner
            .shards_by_number
            .load()
            .get(usize::from(number))
            .cloned()
    }

    /// The shard that is known to take writes for a slot.
    #[must_use]
    pub fn known_writable(&self, slot: Slot) -> Option<Shard> {
        // With SEALED it is the number of no shard.
        let number = self.inner.owners[slot.index()].load(Ordering::Relaxed);
        self.inner
            .shards_by_number
            .load()
            .get(usize::from(number))
            .cloned()
    }

    /// Notes the owner of a slot.
    pub fn note_owner(&self, slot: Slot, shard: &Shard) {
        self.inner.owners[slot.index()].store(shard.number(), Ordering::Relaxed);
        self.inner.noted.send_replace(());
    }

    /// Notified by [`Cluster::note_owner`].
    #[must_use]
    pub fn owners_changed(&self) -> watch::Receiver<()> {
        self.inner.noted.subscribe()
    }

    /// The shard to try for a slot: its known owner, or else the target shard, which refuses if it
    /// is not the owner. `None` if this instance's file lacks that shard.
    #[must_use]
    pub fn route(&self, slot: Slot) -> Option<Shard> {
        self.known_owner(slot).or_else(|| {
            let view = self.inner.view.load();
            view.shard(view.target(slot)).cloned()
        })
    }

    /// Asks all shards for the owner of a slot. While many owners are asked for, this is
    /// [`Cluster::refresh`].
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

    /// Asks all shards for the slots that they own. Callers at the same time share one round.
    pub async fn refresh(&self) {
        // A caller that waits here must not share the round in progress, which may have asked
        // before the caller was refused. Two callers that wait share the next one.
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
        let answered: Vec<(&Shard, &ServedSlots)> = view
            .shards
            .iter()
            .zip(&answers)
            .filter_map(|(shard, holding)| Some((shard, holding.as_ref()?)))
            .collect();
        for slot in Slot::all() {
            let owner = &self.inner.owners[slot.index()];
            let holder = |of: fn(&ServedSlots) -> &SlotSet| {
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

/// Notes the answers of shards about a slot: the numbers of its owner and of the shard that hands
/// it over.
fn note(
    slot: &AtomicU16,
    owned: Option<u16>,
    sealed: Option<u16>,
    has_answered: impl Fn(u16) -> bool,
) {
    // A sealed slot is still read where it is sealed, until its target has it.
    match owned.or(sealed.map(|number| number | SEALED)) {
        Some(number) => slot.store(number, Ordering::Relaxed),
        // Only knowledge about a shard that has answered is replaced.
        None if has_answered(slot.load(Ordering::Relaxed) & !SEALED) => {
            slot.store(NO_OWNER, Ordering::Relaxed);
        }
        None => {}
    }
}

/// A shard that returns may own other slots than before.
async fn refresh_when_up(cluster: Weak<Inner>, shard: Shard) {
    let mut state = shard.watch();
    drop(shard);
    while state.changed().await.is_ok() {
        let up = *state.borrow_and_update() == Health::Reachable;
        let Some(inner) = cluster.upgrade() else {
            return;
        };
        if up {
            Cluster { inner }.refresh().await;
        }
    }
}

fn view_of(
    topology_ref: TopologyRef,
    topology: Topology,
    shards: Vec<Shard>,
) -> Result<TopologyView, StartError> {
    let placement = topology
        .placement()
        .ok_or_else(|| StartError::Fatal("the topology has no active shard".into()))?;
    Ok(TopologyView {
        topology_ref,
        topology,
        shards,
        placement,
    })
}
