//! Batches the sends for one shard into transactions.
//!
//! A writer is one task. While its transactions are in flight, sends of other slots are queued, so
//! batches size themselves: an idle writer adds no delay, a busy one spreads the cost of a commit
//! over many sends. The number of transactions in flight (`concurrency`) and the delay between two
//! of them (`commit_delay`) are measured. Read marks go with the next batch of sends, or in a
//! transaction of their own a moment later.

use crate::config;
use crate::domain::dialog::{DialogId, UserId};
use crate::domain::slot::Slot;
use crate::messages::commit_delay::CommitDelay;
use crate::messages::concurrency::InFlight;
use crate::messages::slot_queue::{
    Answer, Job, MarkJob, Most, QueuePermit, Requester, Settled, SlotQueues, Taken, Then, Unsettled,
};
use crate::metrics::WriterMetrics;
use crate::rng;
use crate::store::{
    self, Appended, Audience, MarkOutcome, Mismatch, NewMark, NewMessage, SeqCache, Shard,
    ShardError, StoreError, WriteOutcome,
};
use futures_util::future::{BoxFuture, FutureExt};
use futures_util::stream::{FuturesUnordered, StreamExt};
use prometheus_client::metrics::gauge::Gauge;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// A commit, as reported to delivery.
pub enum Committed<'a> {
    /// An entry.
    Message(Stored<'a>),
    /// A read mark that has moved.
    Mark(NewMark),
}

/// A committed message.
pub struct Stored<'a> {
    /// The message.
    pub message: &'a NewMessage,
    /// Its place.
    pub place: store::Receipt,
    /// The session that sent it.
    pub origin: Option<&'a Requester>,
    /// Whether an earlier send with this key had stored it.
    pub repeat: bool,
    /// Who is sent it.
    pub audience: &'a Audience,
}

/// Called after COMMIT and before the answer, on the database runtime: it must not block.
pub type OnCommit = Arc<dyn Fn(Committed<'_>) + Send + Sync>;

/// Called with the next step of a slot that was in flight. It must not block.
pub type OnLanded = Arc<dyn Fn(Slot, Then) + Send + Sync>;

/// Shared by the writers of all shards.
#[derive(Clone)]
pub struct Shared {
    /// The queues of the slots.
    pub queues: SlotQueues,
    /// Delivers a commit.
    pub on_commit: OnCommit,
    /// Performs the next step of a slot.
    pub on_landed: OnLanded,
}

/// The writer of one shard. A clone is one more reference.
#[derive(Clone)]
pub struct Writer {
    ready: mpsc::UnboundedSender<Ready>,
    /// Sends without an answer, and their limit.
    waiting: Gauge,
    most_waiting: usize,
    seq_cache: Arc<SeqCache>,
}

/// A slot that is ready, and what its queue holds.
enum Ready {
    /// Sends.
    Sends(Slot),
    /// Only read marks, which may wait.
    Marks(Slot),
}

impl Writer {
    /// Starts the writer on the database runtime. It ends when the last clone is dropped and no
    /// slot is ready or in flight.
    #[must_use]
    pub fn start(
        shard: Shard,
        settings: &config::Store,
        metrics: WriterMetrics,
        shared: Shared,
        runtime: &Handle,
    ) -> Self {
        // A slot is in the channel twice at most: that bounds it.
        let (ready, is_ready) = mpsc::unbounded_channel();
        let (seq_cache, waiting) = (Arc::new(SeqCache::default()), metrics.queue_length.clone());
        let line = Line {
            shard,
            seq_cache: seq_cache.clone(),
            metrics,
        };
        let now = Instant::now();
        let work = Work {
            line: Arc::new(line),
            is_ready,
            ready: VecDeque::new(),
            gathering: VecDeque::new(),
            batch_rows: settings.batch_rows.max(1),
            in_flight: InFlight::new(settings.lanes_min, settings.lanes, now),
            delay: CommitDelay::new(now),
            in_flight_batches: FuturesUnordered::new(),
            shared,
        };
        runtime.spawn(work.run());
        Self {
            ready,
            waiting,
            most_waiting: settings.queue_rows,
            seq_cache,
        }
    }

    /// A permit for a send; `None` if too many sends wait for this shard.
    #[must_use]
    pub fn place(&self) -> Option<QueuePermit> {
        QueuePermit::take(&self.waiting, self.most_waiting)
    }

    /// Notifies the writer of a slot with sends for this shard.
    pub fn ready(&self, slot: Slot) {
        // The task ends only with its runtime: then no request waits any more.
        let _ = self.ready.send(Ready::Sends(slot));
    }

    /// Notifies the writer of a slot with read marks for this shard and no sends.
    pub fn gather(&self, slot: Slot) {
        let _ = self.ready.send(Ready::Marks(slot));
    }

    /// The last seqs of dialogs and terms of slots that are remembered for optimistic writes.
    #[must_use]
    pub fn seq_cache(&self) -> &SeqCache {
        &self.seq_cache
    }
}

struct Work {
    line: Arc<Line>,
    is_ready: mpsc::UnboundedReceiver<Ready>,
    ready: VecDeque<Slot>,
    /// Slots with read marks and no sends, and since when they wait.
    gathering: VecDeque<(Instant, Slot)>,
    batch_rows: usize,
    in_flight: InFlight,
    delay: CommitDelay,
    in_flight_batches: FuturesUnordered<BoxFuture<'static, Landed>>,
    shared: Shared,
}

/// How long read marks wait for a batch of sends.
const GATHER: Duration = Duration::from_millis(50);

/// The largest number of read marks in a transaction.
const MARKS: usize = 64;

/// A batch that is settled, except for slots that the shard does not own.
struct Landed {
    slots: Vec<Slot>,
    rows: usize,
    outcomes: Outcomes,
    /// Whether other sends had to wait when it began.
    waited_for: bool,
    took: Duration,
}

/// The outcome of a batch.
#[derive(Default)]
struct Outcomes {
    sends: Vec<(Job, Answer<WriteOutcome>)>,
    marks: Vec<(MarkJob, Answer<MarkOutcome>)>,
}

impl Work {
    async fn run(mut self) {
        let mut closed = false;
        loop {
            let due = loop {
                let may_begin = self.in_flight_batches.len() < self.in_flight.limit();
                match self.due(closed) {
                    Some(due) if may_begin && due <= Instant::now() => self.begin(),
                    due => break due.filter(|_| may_begin),
                }
            };
            tokio::select! {
                biased;
                Some(landed) = self.in_flight_batches.next() => self.land(landed),
                slot = self.is_ready.recv(), if !closed => match slot {
                    Some(slot) => {
                        self.note(slot);
                        while let Ok(slot) = self.is_ready.try_recv() {
                            self.note(slot);
                        }
                    }
                    None => closed = true,
                },
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
                else => return,
            }
        }
    }

    fn note(&mut self, slot: Ready) {
        match slot {
            Ready::Sends(slot) => self.ready.push_back(slot),
            Ready::Marks(slot) => self.gathering.push_back((Instant::now(), slot)),
        }
    }

    /// When the next transaction may begin, if there is one; when `closed`, read marks do not wait
    /// for sends.
    fn due(&self, closed: bool) -> Option<Instant> {
        let may = self.delay.until();
        if !self.ready.is_empty() {
            return Some(may);
        }
        let (since, _) = self.gathering.front()?;
        Some(if closed {
            may
        } else {
            may.max(*since + GATHER)
        })
    }

    /// Starts a transaction with the sends of ready slots, as many as fit, and their read marks.
    fn begin(&mut self) {
        let (mut slots, mut taken) = (Vec::new(), Taken::default());
        let most = Most {
            jobs: self.batch_rows,
            bytes: store::TRANSACTION_BYTES,
            marks: MARKS,
        };
        let mut room = true;
        while room
            && taken.jobs.len() < most.jobs
            && let Some(slot) = self.ready.pop_front()
        {
            slots.push(slot);
            room = self.shared.queues.of(slot).take_off(most, &mut taken);
        }
        while taken.marks.len() < MARKS {
            let Some((_, slot)) = self.gathering.pop_front() else {
                break;
            };
            // Sends may have been queued for the slot meanwhile, and have taken its read marks with
            // them.
            if self
                .shared
                .queues
                .of(slot)
                .take_marks_off(MARKS, &mut taken)
            {
                slots.push(slot);
            }
        }
        if slots.is_empty() {
            return;
        }
        let waited_for =
            !self.ready.is_empty() && self.in_flight_batches.len() + 1 >= self.in_flight.limit();
        let rows = taken.jobs.len();
        if rows > 0 {
            self.line.metrics.batch_size.observe(rows as f64);
        }
        let (line, begun) = (self.line.clone(), Instant::now());
        self.in_flight_batches.push(Box::pin(async move {
            // After a panic in there, too, the slots go on, and dropped requests are answered with
            // a timeout.
            let outcomes = AssertUnwindSafe(line.carry_out(taken)).catch_unwind().await;
            Landed {
                slots,
                rows,
                outcomes: outcomes.unwrap_or_default(),
                waited_for,
                took: begun.elapsed(),
            }
        }));
    }

    /// Delivers and answers a settled batch, and releases its slots.
    fn land(&mut self, landed: Landed) {
        let now = Instant::now();
        if landed.rows > 0 {
            let waiting = landed.waited_for || !self.ready.is_empty();
            self.in_flight.ended(landed.rows, waiting, now);
            // A batch that was refused at once or timed out says nothing about the duration of a
            // transaction.
            if landed.outcomes.sends.iter().any(|(_, sent)| sent.is_ok()) {
                self.delay.ended(landed.rows, landed.took, now);
            }
        }
        self.line
            .metrics
            .in_flight_limit
            .set(self.in_flight.limit() as i64);
        let mut refused = BTreeMap::<Slot, Taken>::new();
        for (job, outcome) in landed.outcomes.sends {
            match outcome {
                Ok(WriteOutcome::NotOwner(_)) => {
                    let refused = refused.entry(job.message.slot).or_default();
                    refused.jobs.push(job);
                }
                Ok(written) => self.settle(job, written),
                Err(unsettled) => job.reply.answer(Err(unsettled)),
            }
        }
        for (job, outcome) in landed.outcomes.marks {
            match outcome {
                Ok(MarkOutcome::NotOwner(_)) => {
                    let refused = refused.entry(job.mark.slot).or_default();
                    refused.marks.push(job);
                }
                Ok(marked) => self.settle_mark(job, marked),
                Err(unsettled) => job.answer(Err(unsettled)),
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

    fn settle_mark(&self, job: MarkJob, marked: MarkOutcome) {
        if let MarkOutcome::At { seq, moved: true } = marked {
            (self.shared.on_commit)(Committed::Mark(NewMark { seq, ..job.mark }));
        }
        job.answer(Ok(marked));
    }

    fn settle(&self, job: Job, written: WriteOutcome) {
        let metrics = &self.line.metrics;
        let (place, audience, repeat) = match written {
            WriteOutcome::Stored(place, audience) => (place, audience, false),
            WriteOutcome::Repeat(place, audience) => (place, audience, true),
            WriteOutcome::Unchanged => return job.reply.answer(Ok(Settled::Unchanged)),
            WriteOutcome::Refused(refusal) => {
                return job.reply.answer(Ok(Settled::Refused(refusal)));
            }
            WriteOutcome::KeyReused | WriteOutcome::NotOwner(_) => {
                return job.reply.answer(Ok(Settled::KeyReused));
            }
        };
        if repeat {
            metrics.repeats.inc();
        } else {
            metrics.stored.inc();
        }
        // A repeat is delivered again: the instance that stored it may have died before it
        // published it. Receivers that have the message know it by its seq.
        (self.shared.on_commit)(Committed::Message(Stored {
            message: &job.message,
            place,
            origin: job.origin.as_ref(),
            repeat,
            audience: &audience,
        }));
        job.reply.answer(Ok(Settled::Stored { place, repeat }));
    }
}

/// Executes batches at a shard.
struct Line {
    shard: Shard,
    seq_cache: Arc<SeqCache>,
    metrics: WriterMetrics,
}

/// The pause after a transaction that met a conflict, or got no connection in time.
const CONFLICT_PAUSE: Duration = Duration::from_millis(5);

/// The pause after a transaction whose connection was lost.
const LOST_PAUSE: Duration = Duration::from_millis(50);

impl Line {
    /// Stores a batch and returns the outcome of each of its parts, after retries.
    async fn carry_out(&self, taken: Taken) -> Outcomes {
        let now = Instant::now();
        let mut outcomes = Outcomes::default();
        let late = |deadline: Instant| deadline <= now;
        let (late, jobs): (Vec<_>, Vec<_>) = taken
            .jobs
            .into_iter()
            .partition(|job| late(job.reply.deadline));
        let late = late.into_iter();
        outcomes
            .sends
            .extend(late.map(|job| (job, Err(Unsettled::Unavailable))));
        let (mut marks, mut suspect) = (taken.marks, false);
        if !jobs.is_empty() {
            self.store_all(jobs, &mut marks, &mut suspect, &mut outcomes)
                .await;
        }
        if !marks.is_empty() {
            self.mark_all(marks, suspect, &mut outcomes).await;
        }
        outcomes
    }

    /// Removes from `marks` those that were stored with the sends; sets `suspect` if others of them
    /// may have been stored.
    async fn store_all(
        &self,
        jobs: Vec<Job>,
        marks: &mut Vec<MarkJob>,
        suspect: &mut bool,
        outcomes: &mut Outcomes,
    ) {
        let deadline = jobs.iter().map(|job| job.reply.deadline).min();
        let (batch, replies): (Vec<_>, Vec<_>) = jobs
            .into_iter()
            .map(|job| (job.message, (job.origin, job.reply)))
            .unzip();
        let (batch, new_marks) = (Arc::new(batch), marks.iter().map(|job| job.mark).collect());
        let stored = self.store(&batch, new_marks, deadline, suspect).await;
        let batch = Arc::unwrap_or_clone(batch);
        let jobs = batch.into_iter().zip(replies);
        let jobs = jobs.map(|(message, (origin, reply))| Job {
            message,
            origin,
            reply,
        });
        match stored {
            Ok((written, marked)) => {
                outcomes.sends.extend(jobs.zip(written.into_iter().map(Ok)));
                let with_them = marks.extract_if(.., |job| marked.contains_key(&key_of(&job.mark)));
                outcomes.marks.extend(with_them.map(|job| {
                    let marked = marked[&key_of(&job.mark)];
                    (job, Ok(marked))
                }));
            }
            // The database refuses one of the messages: the others are stored without it.
            Err(ShardError::Failed(_, StoreError::Refused(_))) if jobs.len() > 1 => {
                for job in jobs {
                    let (deadline, alone) =
                        (job.reply.deadline, Arc::new(vec![job.message.clone()]));
                    let outcome = match self
                        .store(&alone, Vec::new(), Some(deadline), &mut false)
                        .await
                    {
                        Ok((mut written, _)) => written.pop().ok_or(Unsettled::Unavailable),
                        Err(e) => Err(self.failed(1, &e)),
                    };
                    outcomes.sends.push((job, outcome));
                }
            }
            Err(e) => {
                let unsettled = self.failed(jobs.len(), &e);
                outcomes.sends.extend(jobs.map(|job| (job, Err(unsettled))));
            }
        }
    }

    /// Stores read marks that did not go with sends. `suspect`: they may have been stored before.
    async fn mark_all(&self, jobs: Vec<MarkJob>, mut suspect: bool, outcomes: &mut Outcomes) {
        let marks: Vec<NewMark> = jobs.iter().map(|job| job.mark).collect();
        let replies = jobs.iter().flat_map(|job| &job.replies);
        let deadline = replies.map(|reply| reply.deadline).max();
        let marked = loop {
            match self.shard.mark_read(&marks).await {
                Ok(marked) => break Ok(marked),
                Err(e) => {
                    suspect |= may_be_stored(&e);
                    if let Err(e) = self.again(e, deadline).await {
                        break Err(e);
                    }
                }
            }
        };
        match marked {
            Ok(marked) => {
                outcomes
                    .marks
                    .extend(jobs.into_iter().zip(marked).map(|(job, mut marked)| {
                        // This request may have moved the mark itself, without publishing it.
                        if let MarkOutcome::At { seq, moved } = &mut marked {
                            *moved |= suspect && *seq == job.mark.seq;
                        }
                        (job, Ok(marked))
                    }))
            }
            Err(e) => {
                let unsettled = self.failed(jobs.len(), &e);
                let jobs = jobs.into_iter();
                outcomes.marks.extend(jobs.map(|job| (job, Err(unsettled))));
            }
        }
    }

    fn failed(&self, parts: usize, e: &ShardError) -> Unsettled {
        match e {
            ShardError::Unreachable(_) => Unsettled::ShardDown,
            ShardError::Busy(_) | ShardError::Failed(..) => {
                tracing::warn!(shard = self.shard.name(), parts, reason = %e, "sends or read marks not stored in time");
                Unsettled::Unavailable
            }
        }
    }

    /// A transaction, repeated as a whole while that is safe and there is time. The keys stay the
    /// same, so that a commit without an answer is found and not stored twice.
    async fn store(
        &self,
        batch: &Arc<Vec<NewMessage>>,
        marks: Vec<NewMark>,
        deadline: Option<Instant>,
        suspect: &mut bool,
    ) -> Result<(Vec<WriteOutcome>, MarkedOf), ShardError> {
        loop {
            match self.attempt(batch, &marks, *suspect).await {
                Ok(stored) => return Ok(stored),
                Err(e) => {
                    *suspect |= may_be_stored(&e);
                    self.again(e, deadline).await?;
                }
            }
        }
    }

    /// Waits until a failed transaction may be tried again.
    async fn again(&self, e: ShardError, deadline: Option<Instant>) -> Result<(), ShardError> {
        let pause = match &e {
            // Nothing is written. A machine under full load opens connections slowly: requests with
            // time left are not refused for that.
            ShardError::Busy(_) | ShardError::Failed(_, StoreError::Conflict(_)) => CONFLICT_PAUSE,
            ShardError::Failed(_, StoreError::Lost(_)) => {
                self.seq_cache.clear();
                LOST_PAUSE
            }
            ShardError::Unreachable(_) => {
                // The connection may work again.
                self.seq_cache.clear();
                return Err(e);
            }
            ShardError::Failed(
                _,
                StoreError::Unreachable(_)
                | StoreError::Busy(_)
                | StoreError::Slow(_)
                | StoreError::WrongIdentity(_)
                | StoreError::Refused(_)
                | StoreError::OtherTopology(_),
            ) => return Err(e),
        };
        let pause = pause.mul_f64(1.0 + rng::fraction());
        if deadline.is_none_or(|deadline| Instant::now() + pause >= deadline) {
            return Err(e);
        }
        tracing::debug!(shard = self.shard.name(), reason = %e, "transaction repeated");
        tokio::time::sleep(pause).await;
        Ok(())
    }

    /// Stores the batch in one round trip with the remembered state. If the shard's state differs,
    /// a second attempt reads it under locks.
    async fn attempt(
        &self,
        batch: &Arc<Vec<NewMessage>>,
        marks: &[NewMark],
        mut suspect: bool,
    ) -> Result<(Vec<WriteOutcome>, MarkedOf), ShardError> {
        while !suspect {
            let Some(draft) = self.seq_cache.draft(batch, marks) else {
                break;
            };
            let (expects, of) = (!draft.expected.is_empty(), draft.marks.clone());
            match self.shard.append(batch.clone(), draft).await? {
                Appended::Stored {
                    written,
                    marked,
                    now,
                } => {
                    self.seq_cache.stored(batch, &written, now);
                    return Ok((written, of.iter().map(key_of).zip(marked).collect()));
                }
                Appended::Mismatch(mismatch) => {
                    self.metrics.redone(mismatch.as_str());
                    match mismatch {
                        Mismatch::Term => {
                            let slots = batch.iter().map(|message| message.slot);
                            self.seq_cache
                                .forget_terms(slots.chain(of.iter().map(|mark| mark.slot)));
                        }
                        // Once more, with seqs from the shard.
                        Mismatch::LastSeq if expects => self.seq_cache.forget_last_seqs(batch),
                        Mismatch::LastSeq | Mismatch::Key => suspect = true,
                    }
                }
            }
        }
        let receipt = self.shard.write(batch.clone(), suspect).await?;
        self.seq_cache.learn(batch, &receipt);
        Ok((receipt.written, MarkedOf::new()))
    }
}

/// Whether a failed transaction may have been committed.
fn may_be_stored(e: &ShardError) -> bool {
    matches!(e, ShardError::Failed(_, StoreError::Lost(_)))
}

/// The outcomes of the read marks that went with sends.
type MarkedOf = HashMap<(DialogId, UserId), MarkOutcome>;

fn key_of(mark: &NewMark) -> (DialogId, UserId) {
    (mark.dialog, mark.user)
}
