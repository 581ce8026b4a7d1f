//! Routes each send and read mark to the writer of the shard that owns its slot, also while the
//! slot moves.
//!
//! Sends of a slot keep their order on the way ([`crate::messages::slot_queue`]). Requests that a
//! shard refuses because it does not own the slot any more are buffered, and so are later ones,
//! until the new owner is known. Then all of them go there.

use crate::cluster::Cluster;
use crate::config;
use crate::domain::dialog::{DialogId, Seq};
use crate::domain::slot::Slot;
use crate::messages::slot_queue::{
    Answer, Job, MarkJob, Reply, Requester, Settled, SlotQueues, Taken, Then, Unsettled,
};
use crate::messages::writer::{OnCommit, OnLanded, Shared, Writer};
use crate::metrics::Metrics;
use crate::store::{MarkOutcome, NewMark, NewMessage, RoomMembers, SeqCache, Shard};
use arc_swap::ArcSwap;
use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::time::Instant;

/// A handle; a clone is one more reference.
#[derive(Clone)]
pub struct Dispatch {
    inner: Arc<Inner>,
}

struct Inner {
    cluster: Cluster,
    queues: SlotQueues,
    /// By the number of the shard.
    writers: ArcSwap<HashMap<u16, Writer>>,
    settings: config::Store,
    on_commit: OnCommit,
    runtime: Handle,
    metrics: Arc<Metrics>,
}

/// The reason why a send or read mark is not queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubmitError {
    /// No shard of the file is known to own the slot.
    NoRoute,
    /// Its shard does not answer.
    ShardDown,
    /// Too many requests wait already.
    Full,
}

/// The time for which a send or read mark may be buffered in total.
const BUFFER_LIMIT: Duration = Duration::from_secs(2);

/// The pause between the first two lookups of the owner of a buffered slot, and the longest one
/// between later lookups. The pause doubles, because hundreds of slots are buffered when a shard is
/// lost. A notification of a new owner also triggers a lookup.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(160));

impl Dispatch {
    /// Starts a writer for each shard of the topology. `on_commit` is called for every message that
    /// is stored and every read mark that moves.
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
            queues: SlotQueues::default(),
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

    /// Adds a message to the queue of its slot, behind earlier ones. If it is queued, `answer` is
    /// called once; it must not block.
    ///
    /// # Errors
    /// [`SubmitError`].
    pub fn submit(
        &self,
        message: NewMessage,
        origin: Option<Requester>,
        deadline: Instant,
        answer: impl FnOnce(Answer<Settled>) + Send + 'static,
    ) -> Result<(), SubmitError> {
        let slot = message.slot;
        let writer = self.writer_of(slot)?;
        let place = writer.place().ok_or(SubmitError::Full)?;
        let job = Job {
            message,
            origin,
            reply: Reply::new(deadline, place, Box::new(answer)),
        };
        let then = self.inner.queues.of(slot).push(job);
        notify(&writer, slot, then);
        Ok(())
    }

    /// Adds a read mark to the queue of its slot. If it is queued, `answer` is called once; it must
    /// not block.
    ///
    /// # Errors
    /// [`SubmitError`].
    pub fn submit_mark(
        &self,
        mark: NewMark,
        deadline: Instant,
        answer: impl FnOnce(Answer<MarkOutcome>) + Send + 'static,
    ) -> Result<(), SubmitError> {
        let slot = mark.slot;
        let writer = self.writer_of(slot)?;
        let place = writer.place().ok_or(SubmitError::Full)?;
        let job = MarkJob {
            mark,
            replies: vec![Reply::new(deadline, place, Box::new(answer))],
        };
        let then = self.inner.queues.of(slot).push_mark(job);
        notify(&writer, slot, then);
        Ok(())
    }

    fn writer_of(&self, slot: Slot) -> Result<Writer, SubmitError> {
        let shard = self.inner.cluster.route(slot).ok_or(SubmitError::NoRoute)?;
        if shard.is_down() {
            return Err(SubmitError::ShardDown);
        }
        Ok(self.inner.writer(&shard))
    }

    /// Another instance has stored an entry; `changes_room`: it changes the members of a room.
    pub fn remote_message(&self, dialog: DialogId, seq: Seq, changes_room: bool) {
        self.with_cache(dialog, |seq_cache| {
            seq_cache.remote_message(dialog, seq);
            if changes_room {
                seq_cache.forget_members(dialog);
            }
        });
    }

    /// The members of a room, as far as they are remembered since its last message.
    #[must_use]
    pub fn members(&self, room: DialogId) -> Option<RoomMembers> {
        self.with_cache(room, |seq_cache| seq_cache.members(room))
            .flatten()
    }

    fn with_cache<T>(&self, dialog: DialogId, work: impl FnOnce(&SeqCache) -> T) -> Option<T> {
        let shard = self.inner.cluster.known_owner(Slot::of(dialog))?;
        let writers = self.inner.writers.load();
        writers
            .get(&shard.number())
            .map(|writer| work(writer.seq_cache()))
    }
}

/// Notifies a writer of a slot.
fn notify(writer: &Writer, slot: Slot, then: Then) {
    match then {
        Then::TellWriter => writer.ready(slot),
        Then::Gather => writer.gather(slot),
        Then::Nothing | Then::FindOwner => {}
    }
}

impl Inner {
    fn writer(self: &Arc<Self>, shard: &Shard) -> Writer {
        if let Some(writer) = self.writers.load().get(&shard.number()) {
            return writer.clone();
        }
        let inner = Arc::downgrade(self);
        let on_landed: OnLanded = Arc::new(move |slot, then| {
            if let Some(inner) = Weak::upgrade(&inner) {
                inner.go_on(slot, then);
            }
        });
        let shared = Shared {
            queues: self.queues.clone(),
            on_commit: self.on_commit.clone(),
            on_landed,
        };
        let metrics = self.metrics.writer(shard.name());
        let writer = Writer::start(
            shard.clone(),
            &self.settings,
            metrics,
            shared,
            &self.runtime,
        );
        // Two threads may start a writer at the same moment: both use the first that is inserted.
        let mut entered = writer;
        self.writers.rcu(|writers| {
            let mut writers = HashMap::clone(writers);
            let view = self.cluster.view();
            // Writers of removed shards end when no slot is ready for them.
            writers.retain(|number, _| view.shards.iter().any(|shard| shard.number() == *number));
            entered = writers
                .entry(shard.number())
                .or_insert_with(|| entered.clone())
                .clone();
            writers
        });
        entered
    }

    /// Performs the next step of a slot.
    fn go_on(self: &Arc<Self>, slot: Slot, then: Then) {
        match then {
            Then::Nothing => {}
            Then::TellWriter | Then::Gather => match self.cluster.route(slot) {
                Some(shard) => notify(&self.writer(&shard), slot, then),
                None => self.fail(slot),
            },
            Then::FindOwner => {
                self.metrics.slots_buffering.inc();
                self.runtime.spawn(see_on(Arc::downgrade(self), slot));
            }
        }
    }

    /// No shard is known that could process the queue.
    fn fail(&self, slot: Slot) {
        let given_up = self.queues.of(slot).give_all_up();
        drop(given_up);
    }

    /// Releases a buffered slot to its owner, if that is known.
    fn release(self: &Arc<Self>, slot: Slot) -> bool {
        // Not to an owner that is only assumed, nor to a shard that is handing over: refused
        // requests would be buffered again.
        let owner = self.cluster.known_writable(slot);
        let Some(shard) = owner.filter(|shard| !shard.is_down()) else {
            return false;
        };
        let then = self.queues.of(slot).release();
        notify(&self.writer(&shard), slot, then);
        true
    }

    /// Gives up requests that have been buffered for too long; `true` if none is left.
    fn give_up_late(&self, slot: Slot) -> bool {
        let now = Instant::now();
        let buffered_before = now.checked_sub(BUFFER_LIMIT).unwrap_or(now);
        let mut late = Taken::default();
        let idle = self
            .queues
            .of(slot)
            .give_up(buffered_before, now, &mut late);
        for job in late.jobs {
            job.reply.answer(Err(Unsettled::Unavailable));
        }
        for job in late.marks {
            job.answer(Err(Unsettled::Unavailable));
        }
        idle
    }
}

/// Retries a buffered slot until its queue is released or empty.
async fn see_on(inner: Weak<Inner>, slot: Slot) {
    let (mut looked, mut pause) = (false, LOOK_AGAIN.0);
    loop {
        let Some(inner) = inner.upgrade() else { return };
        // Only after a first lookup at the shards: until then the map names the shard that has just
        // refused.
        if (looked && inner.release(slot)) || inner.give_up_late(slot) {
            inner.metrics.slots_buffering.dec();
            return;
        }
        let mut changed = inner.cluster.owners_changed();
        inner.cluster.find(slot).await;
        if inner.release(slot) {
            inner.metrics.slots_buffering.dec();
            return;
        }
        looked = true;
        drop(inner);
        tokio::select! {
            biased;
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(LOOK_AGAIN.1),
            _ = changed.changed() => {}
        }
    }
}
