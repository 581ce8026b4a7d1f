//! Batches the sends for one shard into transactions.
//!
//! A writer has a few lanes, and a slot always takes the same one. While a lane's transaction is in flight its next batch
//! gathers, so batches size themselves: an idle lane adds no delay, a busy one spreads the cost of a commit over many.

use crate::chance;
use crate::config;
use crate::gate::Hold;
use crate::metrics::WriterMetrics;
use crate::store::{NewMessage, Place, Shard, ShardDown, StoreError, Written};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

/// A send on its way.
pub struct Job {
    /// What to store.
    pub message: NewMessage,
    /// Its place among the sends of its slot.
    pub ticket: u64,
    /// The session it came from, which gets `sent` and not `message`; `None` for REST.
    pub origin: Option<u64>,
    /// After this, whoever waits is told that it is not through.
    pub deadline: Instant,
    /// Where the answer goes.
    pub answer: oneshot::Sender<Answer>,
    /// Dropped with the job, when it is answered or given back.
    pub hold: Option<Hold>,
}

/// Takes back a job whose slot the shard does not own. Called in the order of the queue; it must not wait.
pub type GiveBack = Arc<dyn Fn(Job) + Send + Sync>;

/// What became of a send.
#[derive(Debug)]
pub enum Answer {
    /// It is stored; `repeat` if it was before.
    Stored {
        /// Where.
        place: Place,
        /// Whether an earlier send with this key had stored it.
        repeat: bool,
    },
    /// The key stands for another text.
    KeyReused,
    /// The shard does not answer.
    ShardDown,
    /// Not through in time, or refused by the database; the reason is in the log.
    Unavailable,
}

/// A message that is committed, as delivery is told of it.
pub struct Committed<'a> {
    /// The message.
    pub message: &'a NewMessage,
    /// Where it lies.
    pub place: Place,
    /// The session it came from.
    pub origin: Option<u64>,
    /// An earlier send with this key had stored it.
    pub repeat: bool,
}

/// Called after COMMIT and before the answer, on the database runtime: it must not wait.
pub type OnCommit = Arc<dyn Fn(Committed<'_>) + Send + Sync>;

/// The writer of one shard. A clone is one more reference.
#[derive(Clone)]
pub struct Writer {
    inner: Arc<Inner>,
}

struct Inner {
    lanes: Vec<mpsc::Sender<Job>>,
    metrics: WriterMetrics,
}

impl Writer {
    /// Starts the lanes on the database runtime. They end when the last clone is gone and the queues are empty.
    #[must_use]
    pub fn start(
        shard: &Shard,
        settings: &config::Store,
        metrics: WriterMetrics,
        on_commit: &OnCommit,
        give_back: GiveBack,
        runtime: &Handle,
    ) -> Self {
        let lanes = settings.lanes.max(1);
        let lane = |_| {
            let (sender, queue) = mpsc::channel((settings.queue_rows / lanes).max(1));
            let lane = Lane {
                shard: shard.clone(),
                queue,
                batch_rows: settings.batch_rows.max(1),
                metrics: metrics.clone(),
                on_commit: on_commit.clone(),
                give_back: give_back.clone(),
            };
            runtime.spawn(lane.run());
            sender
        };
        let inner = Inner {
            lanes: (0..lanes).map(lane).collect(),
            metrics: metrics.clone(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Puts a send into its lane's queue, behind those that came before.
    ///
    /// # Errors
    /// The job itself, if the queue is full.
    pub fn submit(&self, job: Job) -> Result<(), Box<Job>> {
        let lanes = &self.inner.lanes;
        let lane = &lanes[job.message.slot.index() % lanes.len()];
        match lane.try_send(job) {
            Ok(()) => {
                self.inner.metrics.queue_rows.inc();
                Ok(())
            }
            Err(mpsc::error::TrySendError::Full(job) | mpsc::error::TrySendError::Closed(job)) => {
                Err(Box::new(job))
            }
        }
    }
}

struct Lane {
    shard: Shard,
    queue: mpsc::Receiver<Job>,
    batch_rows: usize,
    metrics: WriterMetrics,
    on_commit: OnCommit,
    give_back: GiveBack,
}

/// Between two tries of a transaction that met a conflict.
const CONFLICT_PAUSE: Duration = Duration::from_millis(5);

/// Between two tries of a transaction whose connection was lost.
const LOST_PAUSE: Duration = Duration::from_millis(50);

impl Lane {
    async fn run(mut self) {
        let mut jobs = Vec::with_capacity(self.batch_rows);
        while self.queue.recv_many(&mut jobs, self.batch_rows).await > 0 {
            self.metrics.queue_rows.dec_by(jobs.len() as i64);
            let now = Instant::now();
            let (batch, late): (Vec<_>, Vec<_>) =
                jobs.drain(..).partition(|job| job.deadline > now);
            late.into_iter()
                .for_each(|job| answer(job.answer, Answer::Unavailable));
            if !batch.is_empty() {
                self.metrics.batch_rows.observe(batch.len() as f64);
                self.carry_out(batch).await;
            }
        }
    }

    /// Stores a batch and answers everyone in it, whatever happens.
    async fn carry_out(&self, jobs: Vec<Job>) {
        let (messages, waiting) = split(jobs);
        match self
            .store(
                &messages,
                waiting.iter().map(|waiting| waiting.deadline).min(),
            )
            .await
        {
            Ok(written) => self.settle(messages, waiting, &written),
            Err(ShardDown::Down(_)) => waiting
                .into_iter()
                .for_each(|waiting| answer(waiting.answer, Answer::ShardDown)),
            // One message that the database will not have must not take the others with it.
            Err(ShardDown::Failed(_, StoreError::Refused(_))) if waiting.len() > 1 => {
                let messages = Arc::unwrap_or_clone(messages);
                for (message, waiting) in messages.into_iter().zip(waiting) {
                    let message = Arc::new(vec![message]);
                    match self.store(&message, Some(waiting.deadline)).await {
                        Ok(written) => self.settle(message, vec![waiting], &written),
                        Err(ShardDown::Down(_)) => answer(waiting.answer, Answer::ShardDown),
                        Err(e) => self.give_up(vec![waiting], &e),
                    }
                }
            }
            Err(e) => self.give_up(waiting, &e),
        }
    }

    /// One transaction, repeated as a whole while that is safe and there is time: always with the same keys, so that a
    /// commit whose answer was lost is found and not repeated.
    async fn store(
        &self,
        messages: &Arc<Vec<NewMessage>>,
        deadline: Option<Instant>,
    ) -> Result<Vec<Written>, ShardDown> {
        let mut suspect = false;
        loop {
            let failed = match self.shard.write(messages.clone(), suspect).await {
                Err(ShardDown::Failed(shard, e)) => (shard, e),
                settled => return settled,
            };
            let pause = match &failed.1 {
                StoreError::Conflict(_) => CONFLICT_PAUSE,
                StoreError::Lost(_) => {
                    suspect = true;
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

    fn settle(&self, messages: Arc<Vec<NewMessage>>, waiting: Vec<Waiting>, written: &[Written]) {
        let messages = Arc::unwrap_or_clone(messages);
        for ((message, waiting), written) in messages.into_iter().zip(waiting).zip(written) {
            let (place, repeat) = match *written {
                Written::Stored(place) => (place, false),
                Written::Repeat(place) => (place, true),
                Written::KeyReused => {
                    answer(waiting.answer, Answer::KeyReused);
                    continue;
                }
                Written::NotOwner(_) => {
                    (self.give_back)(waiting.job(message));
                    continue;
                }
            };
            if repeat {
                self.metrics.repeats.inc()
            } else {
                self.metrics.stored.inc()
            };
            // A repeat is told again too: the instance that stored it may have died before it told anybody. Who has it
            // already knows it by its seq.
            (self.on_commit)(Committed {
                message: &message,
                place,
                origin: waiting.origin,
                repeat,
            });
            answer(waiting.answer, Answer::Stored { place, repeat });
        }
    }

    fn give_up(&self, waiting: Vec<Waiting>, e: &ShardDown) {
        tracing::warn!(shard = self.shard.name(), sends = waiting.len(), reason = %e, "sends not stored in time");
        waiting
            .into_iter()
            .for_each(|waiting| answer(waiting.answer, Answer::Unavailable));
    }
}

/// A job without its message.
struct Waiting {
    ticket: u64,
    origin: Option<u64>,
    deadline: Instant,
    answer: oneshot::Sender<Answer>,
    hold: Option<Hold>,
}

impl Waiting {
    fn job(self, message: NewMessage) -> Job {
        let Self {
            ticket,
            origin,
            deadline,
            answer,
            hold,
        } = self;
        Job {
            message,
            ticket,
            origin,
            deadline,
            answer,
            hold,
        }
    }
}

fn split(jobs: Vec<Job>) -> (Arc<Vec<NewMessage>>, Vec<Waiting>) {
    let part = |job: Job| {
        let Job {
            message,
            ticket,
            origin,
            deadline,
            answer,
            hold,
        } = job;
        let waiting = Waiting {
            ticket,
            origin,
            deadline,
            answer,
            hold,
        };
        (message, waiting)
    };
    let (messages, waiting) = jobs.into_iter().map(part).unzip();
    (Arc::new(messages), waiting)
}

/// Whoever asked may have gone; what is stored stays stored.
fn answer(to: oneshot::Sender<Answer>, answer: Answer) {
    let _ = to.send(answer);
}
