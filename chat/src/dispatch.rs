//! Takes each send to the writer of the shard that owns its slot, and after the slot when it moves.
//!
//! Sends of a slot keep their order on the way: while some are under way to one shard, none is sent to another. What a shard
//! gives back because it does not own the slot any more is parked, and so is what comes after it, until the new owner is known;
//! then all of it goes there in the order in which it came.

use crate::cluster::Cluster;
use crate::config;
use crate::gate::Gates;
use crate::metrics::Metrics;
use crate::ring::Slot;
use crate::store::{NewMessage, Shard};
use crate::writer::{Answer, GiveBack, Job, OnCommit, Writer};
use arc_swap::ArcSwap;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// A handle; a clone is one more reference.
#[derive(Clone)]
pub struct Dispatch {
    inner: Arc<Inner>,
}

struct Inner {
    cluster: Cluster,
    gates: Gates,
    /// By slot, what waits for its new owner, by ticket. Touched only while a slot changes hands.
    parked: Vec<Mutex<Parked>>,
    /// By the number of the shard.
    writers: ArcSwap<HashMap<u16, Writer>>,
    settings: config::Store,
    on_commit: OnCommit,
    runtime: Handle,
    metrics: Arc<Metrics>,
}

type Parked = BTreeMap<u64, (Instant, Job)>;

/// A send that cannot be taken now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotTaken {
    /// No shard is known for the slot that our file has.
    NoRoute,
    /// Its shard does not answer.
    ShardDown,
    /// Too many wait already.
    Full,
}

/// How long a send may be parked altogether.
const PARK_LIMIT: Duration = Duration::from_secs(2);

/// Between two looks at who owns a parked slot; it is also looked at when this instance hears of a new owner.
const LOOK_EVERY: Duration = Duration::from_millis(10);

impl Dispatch {
    /// Starts with a writer for each shard of the document; `on_commit` is called for every message that is stored.
    #[must_use]
    pub fn start(
        cluster: Cluster,
        settings: &config::Store,
        on_commit: OnCommit,
        runtime: &Handle,
        metrics: Arc<Metrics>,
    ) -> Self {
        let inner = Inner {
            cluster,
            gates: Gates::default(),
            parked: Slot::all().map(|_| Mutex::default()).collect(),
            writers: ArcSwap::default(),
            settings: settings.clone(),
            on_commit,
            runtime: runtime.clone(),
            metrics,
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Puts a message into the queue of its shard, behind those of its slot that came before.
    ///
    /// # Errors
    /// [`NotTaken`].
    pub fn submit(
        &self,
        message: NewMessage,
        origin: Option<u64>,
        deadline: Instant,
    ) -> Result<oneshot::Receiver<Answer>, NotTaken> {
        let slot = message.slot;
        let shard = self.inner.cluster.route(slot).ok_or(NotTaken::NoRoute)?;
        if shard.is_down() {
            return Err(NotTaken::ShardDown);
        }
        let gate = self.inner.gates.of(slot);
        let (answer, receiver) = oneshot::channel();
        let ticket = gate.ticket();
        let job = |hold| Job {
            message,
            ticket,
            origin,
            deadline,
            answer,
            hold,
        };
        if gate.enter(shard.number()) {
            let hold = self.inner.gates.hold(slot);
            let submitted = self.inner.writer(&shard).submit(job(Some(hold)));
            submitted.map_err(|_| NotTaken::Full)?;
        } else {
            self.inner.park(job(None));
        }
        Ok(receiver)
    }
}

impl Inner {
    fn writer(self: &Arc<Self>, shard: &Shard) -> Writer {
        if let Some(writer) = self.writers.load().get(&shard.number()) {
            return writer.clone();
        }
        let inner = Arc::downgrade(self);
        let give_back: GiveBack = Arc::new(move |job| {
            if let Some(inner) = Weak::upgrade(&inner) {
                inner.park(job);
            }
        });
        let writer = Writer::start(
            shard,
            &self.settings,
            self.metrics.writer(shard.name()),
            &self.on_commit,
            give_back,
            &self.runtime,
        );
        // Two may have started one at the same moment: the first that is entered is used by all, and keeps the order.
        let mut entered = writer;
        self.writers.rcu(|writers| {
            let mut writers = HashMap::clone(writers);
            let view = self.cluster.view();
            // Those of shards that are gone end when their queues are empty.
            writers.retain(|number, _| view.shards.iter().any(|shard| shard.number() == *number));
            entered = writers
                .entry(shard.number())
                .or_insert_with(|| entered.clone())
                .clone();
            writers
        });
        entered
    }

    fn parked(&self, slot: Slot) -> MutexGuard<'_, Parked> {
        self.parked[slot.index()]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a send until the owner of its slot is known.
    fn park(self: &Arc<Self>, mut job: Job) {
        let slot = job.message.slot;
        let gate = self.gates.of(slot);
        let first = {
            let mut parked = self.parked(slot);
            let first = gate.close();
            // After the gate is closed: nobody may slip past this one.
            let hold = job.hold.take();
            parked.insert(job.ticket, (Instant::now(), job));
            drop(hold);
            first
        };
        if first {
            self.metrics.slots_parked.inc();
            self.runtime.spawn(see_on(Arc::downgrade(self), slot));
        }
    }

    /// Sends what is parked to the owner, if that is known and nothing is under way to another shard. `true` when done.
    fn unpark(self: &Arc<Self>, slot: Slot) -> bool {
        let gate = self.gates.of(slot);
        let mut parked = self.parked(slot);
        if gate.under_way() > 0 {
            return false;
        }
        // Not on a guess, nor to a shard that is handing over: what is refused there would come back and wait anew.
        let owner = self.cluster.known_writable(slot);
        let Some(shard) = owner.filter(|shard| !shard.is_down()) else {
            return false;
        };
        let writer = self.writer(&shard);
        gate.admit(shard.number(), parked.len());
        for (_, (_, mut job)) in std::mem::take(&mut *parked) {
            job.hold = Some(self.gates.hold(slot));
            // A full queue answers by dropping: whoever waits is told that it is not through.
            let _ = writer.submit(job);
        }
        // Not before all of them are in the queue: a later send must not slip in between.
        gate.open();
        true
    }

    /// Gives up what has been parked for too long; `true` if nothing is left.
    fn give_up_late(&self, slot: Slot) -> bool {
        let gate = self.gates.of(slot);
        let mut parked = self.parked(slot);
        let now = Instant::now();
        let late: Vec<u64> = parked
            .iter()
            .filter(|(_, (since, job))| {
                now >= job.deadline || now.duration_since(*since) >= PARK_LIMIT
            })
            .map(|(ticket, _)| *ticket)
            .collect();
        for ticket in late {
            if let Some((_, job)) = parked.remove(&ticket) {
                // Whoever asked may have gone.
                let _ = job.answer.send(Answer::Unavailable);
            }
        }
        if parked.is_empty() && gate.under_way() == 0 {
            gate.open();
            return true;
        }
        false
    }
}

/// Looks after a parked slot until nothing of it is parked.
async fn see_on(inner: Weak<Inner>, slot: Slot) {
    let mut looked = false;
    loop {
        let Some(inner) = inner.upgrade() else { return };
        // Not before the first look at the shards: until then the map names the one that has just refused.
        if (looked && inner.unpark(slot)) || inner.give_up_late(slot) {
            inner.metrics.slots_parked.dec();
            return;
        }
        let mut changed = inner.cluster.owners_changed();
        inner.cluster.refresh().await;
        if inner.unpark(slot) {
            inner.metrics.slots_parked.dec();
            return;
        }
        looked = true;
        drop(inner);
        tokio::select! {
            biased;
            () = tokio::time::sleep(LOOK_EVERY) => {}
            _ = changed.changed() => {}
        }
    }
}
