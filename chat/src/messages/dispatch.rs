//! Takes each send and read mark to the writer of the shard that owns its slot, and after the slot when it moves.
//!
//! Sends of a slot keep their order on the way ([`crate::messages::slot_queue`]). What a shard gives back because it does not own the
//! slot any more is buffered, and so is what comes after it, until the new owner is known; then all of it goes there.

use crate::cluster::Cluster;
use crate::config;
use crate::domain::dialog::{DialogId, Seq};
use crate::domain::slot::Slot;
use crate::messages::slot_queue::{
    Answer, Job, MarkJob, Reply, Settled, SlotQueues, Taken, Then, Unsettled,
};
use crate::messages::writer::{OnCommit, OnLanded, Shared, Writer};
use crate::metrics::Metrics;
use crate::store::{MarkOutcome, NewMark, NewMessage, Shard};
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

/// A send or read mark that cannot be taken now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubmitError {
    /// No shard is known for the slot that our file has.
    NoRoute,
    /// Its shard does not answer.
    ShardDown,
    /// Too many wait already.
    Full,
}

/// How long a send or read mark may be buffered altogether.
const BUFFER_LIMIT: Duration = Duration::from_secs(2);

/// Between the first two looks at who owns a buffered slot, and between later ones at most: the pause doubles, because with
/// a slot whose owner is lost hundreds are buffered. It is also looked at when this instance hears of a new owner.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(160));

impl Dispatch {
    /// Starts with a writer for each shard of the topology; `on_commit` is called for every message that is stored, and every read mark
    /// that moves.
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

    /// Puts a message into the queue of its slot, behind those that came before. `answer` is called once, if it is taken; it must
    /// not wait.
    ///
    /// # Errors
    /// [`SubmitError`].
    pub fn submit(
        &self,
        message: NewMessage,
        origin: Option<u64>,
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
        tell(&writer, slot, then);
        Ok(())
    }

    /// Puts a read mark into the queue of its slot. `answer` is called once, if it is taken; it must not wait.
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
        tell(&writer, slot, then);
        Ok(())
    }

    fn writer_of(&self, slot: Slot) -> Result<Writer, SubmitError> {
        let shard = self.inner.cluster.route(slot).ok_or(SubmitError::NoRoute)?;
        if shard.is_down() {
            return Err(SubmitError::ShardDown);
        }
        Ok(self.inner.writer(&shard))
    }

    /// Another instance has stored a message.
    pub fn remote_message(&self, dialog: DialogId, seq: Seq) {
        let shard = self.inner.cluster.known_owner(Slot::of(dialog));
        let writers = self.inner.writers.load();
        if let Some(writer) = shard.and_then(|shard| writers.get(&shard.number())) {
            writer.seq_cache().remote_message(dialog, seq);
        }
    }
}

/// Tells a writer of a slot that needs it.
fn tell(writer: &Writer, slot: Slot, then: Then) {
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
        // Two may have started one at the same moment: the first that is entered is used by all.
        let mut entered = writer;
        self.writers.rcu(|writers| {
            let mut writers = HashMap::clone(writers);
            let view = self.cluster.view();
            // Those of shards that are gone end when nothing is ready for them.
            writers.retain(|number, _| view.shards.iter().any(|shard| shard.number() == *number));
            entered = writers
                .entry(shard.number())
                .or_insert_with(|| entered.clone())
                .clone();
            writers
        });
        entered
    }

    /// Does what a slot needs.
    fn go_on(self: &Arc<Self>, slot: Slot, then: Then) {
        match then {
            Then::Nothing => {}
            Then::TellWriter | Then::Gather => match self.cluster.route(slot) {
                Some(shard) => tell(&self.writer(&shard), slot, then),
                None => self.fail(slot),
            },
            Then::FindOwner => {
                self.metrics.slots_buffering.inc();
                self.runtime.spawn(see_on(Arc::downgrade(self), slot));
            }
        }
    }

    /// Nobody is known who could take what is queued.
    fn fail(&self, slot: Slot) {
        let given_up = self.queues.of(slot).give_all_up();
        drop(given_up);
    }

    /// Lets a buffered slot go to its owner, if that is known.
    fn release(self: &Arc<Self>, slot: Slot) -> bool {
        // Not on a guess, nor to a shard that is handing over: what is refused there would come back and wait anew.
        let owner = self.cluster.known_writable(slot);
        let Some(shard) = owner.filter(|shard| !shard.is_down()) else {
            return false;
        };
        let then = self.queues.of(slot).release();
        tell(&self.writer(&shard), slot, then);
        true
    }

    /// Gives up what has been buffered for too long; `true` if nothing is left.
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

/// Looks after a buffered slot until nothing of it is buffered.
async fn see_on(inner: Weak<Inner>, slot: Slot) {
    let (mut looked, mut pause) = (false, LOOK_AGAIN.0);
    loop {
        let Some(inner) = inner.upgrade() else { return };
        // Not before the first look at the shards: until then the map names the one that has just refused.
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
