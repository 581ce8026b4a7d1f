//! Batches the sends for one shard into transactions.
//!
//! A writer is one task. While its transactions are in flight the sends of other slots gather, so batches size themselves: an
//! idle writer adds no delay, a busy one spreads the cost of a commit over many. How many are in flight is measured
//! ([`InFlight`]).

use crate::chance;
use crate::config;
use crate::in_flight::InFlight;
use crate::metrics::WriterMetrics;
use crate::ring::Slot;
use crate::slot_queue::{Answer, Job, Place, Reply, SlotQueues, Then};
use crate::store::{
    self, Appended, NewMessage, Sequencer, Shard, ShardDown, StoreError, Unlike, Written,
};
use futures_util::future::{BoxFuture, FutureExt};
use futures_util::stream::{FuturesUnordered, StreamExt};
use prometheus_client::metrics::gauge::Gauge;
use std::collections::{BTreeMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// A message that is committed, as delivery is told of it.
pub struct Committed<'a> {
    /// The message.
    pub message: &'a NewMessage,
    /// Where it lies.
    pub place: store::Place,
    /// The session it came from.
    pub origin: Option<u64>,
    /// An earlier send with this key had stored it.
    pub repeat: bool,
}

/// Called after COMMIT and before the answer, on the database runtime: it must not wait.
pub type OnCommit = Arc<dyn Fn(Committed<'_>) + Send + Sync>;

/// Called when a slot that was in flight needs something. It must not wait.
pub type OnLanded = Arc<dyn Fn(Slot, Then) + Send + Sync>;

/// What the writers of all shards share.
#[derive(Clone)]
pub struct Shared {
    /// The sends, by slot.
    pub queues: SlotQueues,
    /// Tells people.
    pub on_commit: OnCommit,
    /// Takes slots on.
    pub on_landed: OnLanded,
}

/// The writer of one shard. A clone is one more reference.
#[derive(Clone)]
pub struct Writer {
    ready: mpsc::UnboundedSender<Slot>,
    /// Sends that are not settled yet, and how many may be.
    waiting: Gauge,
    most_waiting: usize,
    sequencer: Arc<Sequencer>,
}

impl Writer {
    /// Starts it on the database runtime. It ends when the last clone is gone and nothing is ready or in flight.
    #[must_use]
    pub fn start(
        shard: Shard,
        settings: &config::Store,
        metrics: WriterMetrics,
        shared: Shared,
        runtime: &Handle,
    ) -> Self {
        // A slot is in it once at most: that bounds it.
        let (ready, is_ready) = mpsc::unbounded_channel();
        let (sequencer, waiting) = (Arc::new(Sequencer::default()), metrics.queue_rows.clone());
        let line = Line {
            shard,
            sequencer: sequencer.clone(),
            metrics,
        };
        let work = Work {
            line: Arc::new(line),
            is_ready,
            ready: VecDeque::new(),
            batch_rows: settings.batch_rows.max(1),
            in_flight: InFlight::new(settings.lanes, Instant::now()),
            under_way: FuturesUnordered::new(),
            shared,
        };
        runtime.spawn(work.run());
        Self {
            ready,
            waiting,
            most_waiting: settings.queue_rows,
            sequencer,
        }
    }

    /// A place for a send among those that wait for this shard; `None` if too many do.
    #[must_use]
    pub fn place(&self) -> Option<Place> {
        Place::take(&self.waiting, self.most_waiting)
    }

    /// A slot has sends for this shard.
    pub fn ready(&self, slot: Slot) {
        // It has ended only if the runtime has: then nobody waits any more.
        let _ = self.ready.send(slot);
    }

    /// What is remembered of the shard.
    #[must_use]
    pub fn sequencer(&self) -> &Sequencer {
        &self.sequencer
    }
}

struct Work {
    line: Arc<Line>,
    is_ready: mpsc::UnboundedReceiver<Slot>,
    ready: VecDeque<Slot>,
    batch_rows: usize,
    in_flight: InFlight,
    under_way: FuturesUnordered<BoxFuture<'static, Landed>>,
    shared: Shared,
}

/// A batch whose sends are settled, but for those that the shard does not own.
struct Landed {
    slots: Vec<Slot>,
    rows: usize,
    settled: Vec<Settled>,
    /// Others had to wait when it began.
    waited_for: bool,
}

type Settled = (Job, Outcome);

enum Outcome {
    Written(Written),
    Answer(Answer),
}

impl Work {
    async fn run(mut self) {
        loop {
            while !self.ready.is_empty() && self.under_way.len() < self.in_flight.limit() {
                self.begin();
            }
            tokio::select! {
                biased;
                Some(landed) = self.under_way.next() => self.land(landed),
                slot = self.is_ready.recv() => match slot {
                    Some(slot) => {
                        self.ready.push_back(slot);
                        while let Ok(slot) = self.is_ready.try_recv() {
                            self.ready.push_back(slot);
                        }
                    }
                    None if self.under_way.is_empty() => return,
                    None => {
                        if let Some(landed) = self.under_way.next().await {
                            self.land(landed);
                        }
                    }
                },
            }
        }
    }

    /// Puts the sends of ready slots under way, as many as a transaction takes.
    fn begin(&mut self) {
        let (mut slots, mut jobs) = (Vec::new(), Vec::new());
        while jobs.len() < self.batch_rows {
            let Some(slot) = self.ready.pop_front() else {
                break;
            };
            slots.push(slot);
            let room = self.batch_rows - jobs.len();
            self.shared.queues.of(slot).take_off(room, &mut jobs);
        }
        let waited_for =
            !self.ready.is_empty() && self.under_way.len() + 1 >= self.in_flight.limit();
        self.line.metrics.batch_rows.observe(jobs.len() as f64);
        let line = self.line.clone();
        self.under_way.push(Box::pin(async move {
            let rows = jobs.len();
            // Whatever happens in there: the slots go on, and jobs that are dropped answer that they are not through.
            let settled = AssertUnwindSafe(line.carry_out(jobs)).catch_unwind().await;
            let settled = settled.unwrap_or_default();
            Landed {
                slots,
                rows,
                settled,
                waited_for,
            }
        }));
    }

    /// Tells everybody what became of a batch, and lets its slots go on.
    fn land(&mut self, landed: Landed) {
        let now = Instant::now();
        let waiting = landed.waited_for || !self.ready.is_empty();
        self.in_flight.ended(landed.rows, waiting, now);
        self.line
            .metrics
            .in_flight
            .set(self.in_flight.limit() as i64);
        let mut refused = BTreeMap::<Slot, Vec<Job>>::new();
        for (job, outcome) in landed.settled {
            match outcome {
                Outcome::Written(Written::NotOwner(_)) => {
                    refused.entry(job.message.slot).or_default().push(job);
                }
                Outcome::Written(written) => self.settle(job, written),
                Outcome::Answer(answer) => job.reply.answer(answer),
            }
        }
        for slot in landed.slots {
            let refused = refused.remove(&slot).unwrap_or_default();
            let then = self.shared.queues.of(slot).landed(refused, now);
            if then != Then::Nothing {
                (self.shared.on_landed)(slot, then);
            }
        }
    }

    fn settle(&self, job: Job, written: Written) {
        let metrics = &self.line.metrics;
        let (place, repeat) = match written {
            Written::Stored(place) => (place, false),
            Written::Repeat(place) => (place, true),
            Written::KeyReused | Written::NotOwner(_) => {
                return job.reply.answer(Answer::KeyReused);
            }
        };
        if repeat {
            metrics.repeats.inc();
        } else {
            metrics.stored.inc();
        }
        // A repeat is told again too: the instance that stored it may have died before it told anybody. Receivers that have
        // it know it by its seq.
        (self.shared.on_commit)(Committed {
            message: &job.message,
            place,
            origin: job.reply.origin,
            repeat,
        });
        job.reply.answer(Answer::Stored { place, repeat });
    }
}

/// The way of batches into a shard.
struct Line {
    shard: Shard,
    sequencer: Arc<Sequencer>,
    metrics: WriterMetrics,
}

/// Between two tries of a transaction that met a conflict.
const CONFLICT_PAUSE: Duration = Duration::from_millis(5);

/// Between two tries of a transaction whose connection was lost.
const LOST_PAUSE: Duration = Duration::from_millis(50);

impl Line {
    /// Stores a batch and says what became of each of its sends, whatever happens.
    async fn carry_out(&self, jobs: Vec<Job>) -> Vec<Settled> {
        let now = Instant::now();
        let (late, jobs): (Vec<_>, Vec<_>) =
            jobs.into_iter().partition(|job| job.reply.deadline <= now);
        let late = late.into_iter();
        let mut settled: Vec<Settled> = late
            .map(|job| (job, Outcome::Answer(Answer::Unavailable)))
            .collect();
        if !jobs.is_empty() {
            let (batch, replies) = jobs.into_iter().map(|job| (job.message, job.reply)).unzip();
            self.store_all(batch, replies, &mut settled).await;
        }
        settled
    }

    async fn store_all(
        &self,
        batch: Vec<NewMessage>,
        replies: Vec<Reply>,
        settled: &mut Vec<Settled>,
    ) {
        let deadline = replies.iter().map(|reply| reply.deadline).min();
        let batch = Arc::new(batch);
        let stored = self.store(&batch, deadline).await;
        let batch = Arc::unwrap_or_clone(batch);
        let jobs = batch
            .into_iter()
            .zip(replies)
            .map(|(message, reply)| Job { message, reply });
        match stored {
            Ok(written) => {
                settled.extend(jobs.zip(written.into_iter().map(Outcome::Written)));
            }
            // One message that the database will not have must not take the others with it.
            Err(ShardDown::Failed(_, StoreError::Refused(_))) if jobs.len() > 1 => {
                for job in jobs {
                    let (deadline, alone) =
                        (job.reply.deadline, Arc::new(vec![job.message.clone()]));
                    let outcome = match self.store(&alone, Some(deadline)).await {
                        Ok(mut written) => written
                            .pop()
                            .map_or(Outcome::Answer(Answer::Unavailable), Outcome::Written),
                        Err(e) => Outcome::Answer(self.failed(1, &e)),
                    };
                    settled.push((job, outcome));
                }
            }
            Err(e) => {
                let answer = self.failed(jobs.len(), &e);
                settled.extend(jobs.map(|job| (job, Outcome::Answer(answer))));
            }
        }
    }

    fn failed(&self, sends: usize, e: &ShardDown) -> Answer {
        match e {
            ShardDown::Down(_) => Answer::ShardDown,
            ShardDown::Busy(_) | ShardDown::Failed(..) => {
                tracing::warn!(shard = self.shard.name(), sends, reason = %e, "sends not stored in time");
                Answer::Unavailable
            }
        }
    }

    /// One transaction, repeated as a whole while that is safe and there is time: always with the same keys, so that a
    /// commit whose answer was lost is found and not repeated.
    async fn store(
        &self,
        batch: &Arc<Vec<NewMessage>>,
        deadline: Option<Instant>,
    ) -> Result<Vec<Written>, ShardDown> {
        let mut suspect = false;
        loop {
            let failed = match self.attempt(batch, suspect).await {
                Err(ShardDown::Failed(shard, e)) => (shard, e),
                Err(down @ ShardDown::Down(_)) => {
                    // It may come back as it was at another time.
                    self.sequencer.clear();
                    return Err(down);
                }
                settled => return settled,
            };
            let pause = match &failed.1 {
                StoreError::Conflict(_) | StoreError::Busy(_) => CONFLICT_PAUSE,
                StoreError::Lost(_) => {
                    suspect = true;
                    self.sequencer.clear();
                    LOST_PAUSE
                }
                StoreError::Unreachable(_)
                | StoreError::WrongIdentity(_)
                | StoreError::Refused(_)
                | StoreError::OtherDocument(_) => {
                    return Err(ShardDown::Failed(failed.0, failed.1));
                }
            };
            let pause = pause.mul_f64(1.0 + chance::fraction());
            if deadline.is_none_or(|deadline| Instant::now() + pause >= deadline) {
                return Err(ShardDown::Failed(failed.0, failed.1));
            }
            tracing::debug!(shard = self.shard.name(), reason = %failed.1, "transaction repeated");
            tokio::time::sleep(pause).await;
        }
    }

    /// In one round trip, by what is remembered; if that is not as it was, by what the shard's locks show.
    async fn attempt(
        &self,
        batch: &Arc<Vec<NewMessage>>,
        mut suspect: bool,
    ) -> Result<Vec<Written>, ShardDown> {
        while !suspect {
            let Some(draft) = self.sequencer.draft(batch) else {
                break;
            };
            let expects = !draft.expected.is_empty();
            match self.shard.append(batch.clone(), draft).await? {
                Appended::Stored { written, now } => {
                    self.sequencer.stored(batch, &written, now);
                    return Ok(written);
                }
                Appended::Unlike(unlike) => {
                    self.metrics.drafts_unlike(unlike);
                    match unlike {
                        Unlike::Term => self.sequencer.forget_terms(batch),
                        // Once more, with seqs that the shard gives.
                        Unlike::Head if expects => self.sequencer.forget_heads(batch),
                        Unlike::Head | Unlike::Key => suspect = true,
                    }
                }
            }
        }
        let receipt = self.shard.write(batch.clone(), suspect).await?;
        self.sequencer.learn(batch, &receipt);
        Ok(receipt.written)
    }
}
