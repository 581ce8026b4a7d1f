//! A shard: a store with a name, an identity, time limits and a circuit breaker.
//!
//! The circuit breaker limits the effect of a dead shard to its own dialogs. Once the database does
//! not answer, every call is refused at once, until a probe in the background gets an answer. A
//! slow database is not dead: a slow call is cancelled only when a fresh connection gets no answer
//! either, or at the time limit. A connection that does not open in time counts against a shard
//! only if no other call was answered meanwhile.

use super::read_queue::{Busy, Payer, ReadPermit, ReadQueue};
use super::{
    Appended, BatchResult, Counts, Database, Draft, InboxCursor, LastSeqs, LastSeqsOf, MarkOutcome,
    NewMark, NewMessage, Page, Range, RoomMember, RoomView, ServedSlots, ShardIdentity, ShardInbox,
    SlotSize, StoreError,
};
use crate::config;
use crate::domain::dialog::{DialogId, Seq, UserId};
use crate::domain::ownership::SlotRow;
use crate::domain::slot::Slot;
use crate::metrics::ShardMetrics;
use futures_util::FutureExt;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::Instant;

/// The duration after which a call checks with a fresh connection whether the shard answers at all.
const PATIENCE: Duration = Duration::from_millis(250);

/// The pause between two probes of a shard whose circuit breaker is open.
const PROBE_EVERY: Duration = Duration::from_millis(500);

/// The time limit for counting all rows.
const COUNTING_LIMIT: Duration = Duration::from_secs(300);

/// The limits of a shard.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// The time limit of a call.
    pub answer: Duration,
    /// The time limit for opening a connection.
    pub connect: Duration,
    /// The number of pages that are read at once.
    pub readers: usize,
}

impl From<&config::Store> for Timing {
    fn from(settings: &config::Store) -> Self {
        Self {
            answer: Duration::from_millis(settings.answer_ms),
            connect: Duration::from_millis(settings.connect_ms),
            readers: settings.read_connections,
        }
    }
}

/// Whether a shard answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// It answered the last call.
    Reachable,
    /// It does not answer, for this reason.
    Unreachable(String),
}

/// The reason why a call failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShardError {
    /// The circuit breaker is open, or has just opened.
    #[error("{0} does not answer")]
    Unreachable(String),
    /// This instance, or the payer of the call, has too many requests for it.
    #[error("{0} is busy")]
    Busy(String),
    /// Anything else; see [`StoreError`].
    #[error("{0}: {1}")]
    Failed(String, StoreError),
}

/// A handle; a clone is one more reference.
#[derive(Clone)]
pub struct Shard {
    inner: Arc<Inner>,
}

struct Inner {
    number: u16,
    identity: ShardIdentity,
    store: Arc<dyn Database>,
    timing: Timing,
    runtime: Handle,
    state: watch::Sender<Health>,
    /// When a probe last got an answer. It is locked during a probe, so that callers that wait
    /// share one.
    probed: tokio::sync::Mutex<Option<Instant>>,
    /// When any call last got an answer.
    answered: Mutex<Option<Instant>>,
    metrics: ShardMetrics,
    logged: Mutex<Option<Instant>>,
    read_queue: ReadQueue,
    felt: Mutex<Felt>,
}

/// The duration of transactions of sends, as live traffic observes it.
#[derive(Default)]
struct Felt {
    /// The recent and the usual average, in seconds. The usual one does not rise while a slot
    /// moves.
    late: f64,
    usual: f64,
    /// The number of transactions in that average, up to the number that `USUAL` weighs.
    known: f64,
    at: Option<Instant>,
    moves: usize,
}

/// The weights of a new transaction in the two averages.
const LATE: f64 = 0.1;
const USUAL: f64 = 0.005;

/// Without a transaction for this long, there is no live traffic.
const FELT: Duration = Duration::from_secs(1);

impl Felt {
    fn batch(&mut self, took: Duration, now: Instant) {
        let took = took.as_secs_f64();
        let quiet = self.at.is_none_or(|at| now - at > FELT);
        self.late = if quiet {
            took
        } else {
            self.late + LATE * (took - self.late)
        };
        if self.moves == 0 || self.late < self.usual {
            self.known = (self.known + 1.0).min(1.0 / USUAL);
            self.usual += (took - self.usual) / self.known;
        }
        self.at = Some(now);
    }
}

/// While this exists, a slot of the shard moves.
pub struct Moving(Shard);

impl Drop for Moving {
    fn drop(&mut self) {
        self.0.felt().moves -= 1;
    }
}

impl Shard {
    /// Opens a store that must have this identity. `number` distinguishes it from all others of
    /// this process.
    #[must_use]
    pub fn new(
        number: u16,
        identity: ShardIdentity,
        store: Arc<dyn Database>,
        timing: Timing,
        runtime: Handle,
        metrics: ShardMetrics,
    ) -> Self {
        let state = watch::Sender::new(Health::Reachable);
        let inner = Inner {
            number,
            identity,
            store,
            timing,
            runtime,
            state,
            probed: tokio::sync::Mutex::default(),
            answered: Mutex::default(),
            metrics,
            logged: Mutex::default(),
            read_queue: ReadQueue::new(timing.readers, timing.answer / 2),
            felt: Mutex::default(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// The shard's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.identity.shard_name
    }

    /// Its number in this process; a shard that is opened again under another URL has another
    /// number.
    #[must_use]
    pub fn number(&self) -> u16 {
        self.inner.number
    }

    /// The identity that it must have.
    #[must_use]
    pub fn identity(&self) -> &ShardIdentity {
        &self.inner.identity
    }

    /// Whether it answers.
    #[must_use]
    pub fn state(&self) -> Health {
        self.inner.state.borrow().clone()
    }

    /// Whether it does not.
    #[must_use]
    pub fn is_down(&self) -> bool {
        *self.inner.state.borrow() != Health::Reachable
    }

    /// Waits for a permit to read.
    ///
    /// # Errors
    /// [`ShardError`].
    pub async fn read_permit(&self, payer: Payer) -> Result<ReadPermit, ShardError> {
        if self.is_down() {
            return Err(ShardError::Unreachable(self.name().to_owned()));
        }
        let permit = self.inner.read_queue.take(payer).await;
        permit.map_err(|Busy| ShardError::Busy(self.name().to_owned()))
    }

    fn felt(&self) -> MutexGuard<'_, Felt> {
        self.inner
            .felt
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that a slot of this shard moves.
    #[must_use]
    pub fn moving(&self) -> Moving {
        self.felt().moves += 1;
        Moving(self.clone())
    }

    /// The recent duration of transactions of sends as a multiple of the usual one; 0 without
    /// transactions, and 1 while the usual one is unknown.
    #[must_use]
    pub fn strain(&self) -> f64 {
        let felt = self.felt();
        match felt.at {
            Some(at) if at.elapsed() <= FELT && felt.known > 0.0 => felt.late / felt.usual,
            Some(at) if at.elapsed() <= FELT => 1.0,
            Some(_) | None => 0.0,
        }
    }

    /// Notified when the health changes.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Health> {
        self.inner.state.subscribe()
    }

    /// Opens the circuit breaker: the shard was found not to answer.
    pub fn open(&self, reason: &str) {
        let opened = self.inner.state.send_if_modified(|state| {
            let was_up = *state == Health::Reachable;
            if was_up {
                *state = Health::Unreachable(reason.to_owned());
            }
            was_up
        });
        if opened {
            tracing::warn!(
                shard = self.name(),
                reason,
                "shard down: its dialogs are refused until it answers again"
            );
            self.inner.metrics.circuit_open.set(1);
            self.inner.metrics.opened.inc();
            let shard = self.clone();
            self.inner
                .runtime
                .spawn(async move { shard.probe_until_up().await });
        }
    }

    async fn probe_until_up(self) {
        loop {
            tokio::time::sleep(PROBE_EVERY).await;
            if self.inner.store.ping().await.is_err() {
                continue;
            }
            // It may have been away since before a migration. And it must be the right database:
            // one that was wiped meanwhile must not come back.
            let fit = async {
                self.inner.store.migrate().await?;
                self.inner.store.slots(&self.inner.identity).await
            };
            let found = tokio::time::timeout(self.inner.timing.answer, fit).await;
            match found {
                Ok(Ok(_)) => break,
                Ok(Err(e)) => self.log_once_a_minute(&e),
                Err(_) => {}
            }
        }
        tracing::info!(shard = self.name(), "shard up");
        self.inner.metrics.circuit_open.set(0);
        self.inner.state.send_replace(Health::Reachable);
    }

    fn log_once_a_minute(&self, e: &StoreError) {
        let mut logged = self
            .inner
            .logged
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if logged.is_none_or(|at| at.elapsed() > Duration::from_secs(60)) {
            *logged = Some(Instant::now());
            tracing::warn!(shard = self.name(), reason = %e, "shard answers, but cannot be used");
        }
    }

    fn answered(&self) -> MutexGuard<'_, Option<Instant>> {
        self.inner
            .answered
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a call was answered while a connection that was cancelled was being opened.
    fn answers_others(&self) -> bool {
        self.answered()
            .is_some_and(|at| at.elapsed() < self.inner.timing.connect)
    }

    /// Whether a fresh connection is answered, or another call was answered meanwhile. Callers at
    /// the same time share one probe.
    async fn probe(&self) -> Result<(), StoreError> {
        let mut probed = self.inner.probed.lock().await;
        if probed.is_some_and(|at| at.elapsed() < PATIENCE) {
            return Ok(());
        }
        match self.inner.store.ping().await {
            Err(StoreError::Slow(_)) if self.answers_others() => {}
            result => result?,
        }
        *probed = Some(Instant::now());
        Ok(())
    }

    /// Runs a call on the database runtime, within the time limits and the circuit breaker.
    async fn call<T, F>(&self, call: impl FnOnce(Arc<Inner>) -> F) -> Result<T, ShardError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        if self.is_down() {
            return Err(ShardError::Unreachable(self.name().to_owned()));
        }
        self.call_within(self.inner.timing.answer, call).await
    }

    async fn call_within<T, F>(
        &self,
        limit: Duration,
        call: impl FnOnce(Arc<Inner>) -> F,
    ) -> Result<T, ShardError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        let (shard, work) = (self.clone(), call(self.inner.clone()));
        let work = async move { shard.watched(limit, work).await };
        let result = self.inner.runtime.spawn(work).await;
        let result =
            result.unwrap_or_else(|e| Err(StoreError::Refused(format!("the call failed: {e}"))));
        result.map_err(|e| self.classify(e))
    }

    /// Opens the circuit breaker for an error that counts against the shard.
    fn classify(&self, e: StoreError) -> ShardError {
        match e {
            StoreError::Unreachable(_) | StoreError::WrongIdentity(_) => {
                self.open(&e.to_string());
                ShardError::Unreachable(self.name().to_owned())
            }
            StoreError::Slow(_) if !self.answers_others() => {
                self.open(&e.to_string());
                ShardError::Unreachable(self.name().to_owned())
            }
            StoreError::Busy(_) | StoreError::Slow(_) => ShardError::Busy(self.name().to_owned()),
            StoreError::Conflict(_)
            | StoreError::Lost(_)
            | StoreError::Refused(_)
            | StoreError::OtherTopology(_) => ShardError::Failed(self.name().to_owned(), e),
        }
    }

    async fn watched<T>(
        &self,
        limit: Duration,
        call: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let begun = Instant::now();
        let call = call.inspect(|result| match result {
            Err(
                StoreError::Unreachable(_)
                | StoreError::Slow(_)
                | StoreError::Busy(_)
                | StoreError::Lost(_),
            ) => {}
            Ok(_)
            | Err(
                StoreError::Conflict(_)
                | StoreError::WrongIdentity(_)
                | StoreError::Refused(_)
                | StoreError::OtherTopology(_),
            ) => *self.answered() = Some(Instant::now()),
        });
        let mut call = pin!(call);
        loop {
            tokio::select! {
                biased;
                result = &mut call => return result,
                () = tokio::time::sleep(PATIENCE) => {}
            }
            tokio::select! {
                biased;
                result = &mut call => return result,
                probe = self.probe() => probe?,
            }
            if begun.elapsed() > limit {
                return Err(StoreError::Lost(format!(
                    "no answer within {} ms",
                    limit.as_millis()
                )));
            }
        }
    }

    /// [`super::Store::append`]. Called on the database runtime, and executed in the caller's task.
    ///
    /// # Errors
    /// [`ShardError`].
    pub async fn append(
        &self,
        batch: Arc<Vec<NewMessage>>,
        draft: Draft,
    ) -> Result<Appended, ShardError> {
        let inner = &self.inner;
        self.batch(inner.store.append(&inner.identity, &batch, draft))
            .await
    }

    /// [`super::Store::write`]. Called on the database runtime, and executed in the caller's task.
    ///
    /// # Errors
    /// [`ShardError`].
    pub async fn write(
        &self,
        batch: Arc<Vec<NewMessage>>,
        suspect: bool,
    ) -> Result<BatchResult, ShardError> {
        let inner = &self.inner;
        self.batch(inner.store.write(&inner.identity, &batch, suspect))
            .await
    }

    /// Executes a batch within the time limits and the circuit breaker.
    async fn batch<T>(
        &self,
        work: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, ShardError> {
        if self.is_down() {
            return Err(ShardError::Unreachable(self.name().to_owned()));
        }
        let begun = Instant::now();
        let done = self.watched(self.inner.timing.answer, work).await;
        let now = Instant::now();
        self.felt().batch(now - begun, now);
        if let Some(histogram) = &self.inner.metrics.transaction_seconds {
            histogram.observe(begun.elapsed().as_secs_f64());
        }
        done.map_err(|e| self.classify(e))
    }

    /// [`super::Store::page`]. The caller has a [permit](Shard::read_permit).
    ///
    /// # Errors
    /// [`ShardError`].
    pub async fn page(
        &self,
        dialog: DialogId,
        range: Range,
        limit: u32,
    ) -> Result<Page, ShardError> {
        self.call(move |inner| async move {
            inner
                .store
                .page(&inner.identity, dialog, range, limit)
                .await
        })
        .await
    }

    /// [`super::Store::inbox`].
    ///
    /// # Errors
    /// [`ShardError`].
    pub async fn inbox(
        &self,
        user: UserId,
        below: Option<InboxCursor>,
        limit: u32,
    ) -> Result<ShardInbox, ShardError> {
        let _permit = self.read_permit(Some(user)).await?;
        self.call(move |inner| async move {
            inner.store.inbox(&inner.identity, user, below, limit).await
        })
        .await
    }

    /// [`super::Store::room`].
    ///
    /// # Errors
    /// [`ShardError`].
    pub async fn room(&self, room: DialogId, user: UserId) -> Result<RoomView, ShardError> {
        let _permit = self.read_permit(Some(user)).await?;
        self.call(move |inner| async move { inner.store.room(&inner.identity, room, user).await })
            .await
    }

    /// [`super::Store::room_members`], for `payer`.
    ///
    /// # Errors
    /// [`ShardError`].
    pub async fn room_members(
        &self,
        payer: UserId,
        room: DialogId,
        after: Option<UserId>,
        read_to: Option<Seq>,
        limit: u32,
    ) -> Result<Vec<RoomMember>, ShardError> {
        let _permit = self.read_permit(Some(payer)).await?;
        self.call(move |inner| async move {
            let identity = &inner.identity;
            inner
                .store
                .room_members(identity, room, after, read_to, limit)
                .await
        })
        .await
    }

    /// [`super::Store::last_seqs`].
    ///
    /// # Errors
    /// [`ShardError`].
    pub async fn last_seqs(&self, of: LastSeqsOf) -> Result<LastSeqs, ShardError> {
        let _permit = self.read_permit(None).await?;
        self.call(move |inner| async move { inner.store.last_seqs(&inner.identity, &of).await })
            .await
    }

    /// [`super::Store::mark_read`]. Called on the database runtime, and executed in the caller's
    /// task.
    ///
    /// # Errors
    /// [`ShardError`].
    pub async fn mark_read(&self, marks: &[NewMark]) -> Result<Vec<MarkOutcome>, ShardError> {
        let inner = &self.inner;
        self.batch(inner.store.mark_read(&inner.identity, marks))
            .await
    }

    /// Any other call to the database, within the same limits and the same circuit breaker.
    ///
    /// # Errors
    /// [`ShardError`].
    pub async fn ask<T, F>(
        &self,
        call: impl FnOnce(Arc<dyn Database>, ShardIdentity) -> F,
    ) -> Result<T, ShardError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        self.call(|inner| call(inner.store.clone(), inner.identity.clone()))
            .await
    }

    /// The rows of all slots, and the slots that are not owned here any more but still have rows.
    ///
    /// # Errors
    /// [`ShardError`].
    pub async fn slot_rows(&self) -> Result<(Vec<SlotRow>, Vec<Slot>), ShardError> {
        self.ask(|store, identity| async move {
            let rows = store.rows(&identity, None, None).await?;
            Ok((rows, store.leftovers(&identity, Duration::ZERO).await?))
        })
        .await
    }

    /// [`super::Control::sizes`]; it may take minutes.
    ///
    /// # Errors
    /// [`ShardError`].
    pub async fn sizes(&self) -> Result<BTreeMap<Slot, SlotSize>, ShardError> {
        self.call_within(COUNTING_LIMIT, |inner| async move {
            inner.store.sizes(&inner.identity).await
        })
        .await
    }

    /// [`super::Store::slots`].
    ///
    /// # Errors
    /// [`ShardError`].
    pub async fn slots(&self) -> Result<ServedSlots, ShardError> {
        self.call(move |inner| async move { inner.store.slots(&inner.identity).await })
            .await
    }

    /// [`super::Store::counts`].
    ///
    /// # Errors
    /// [`ShardError`].
    pub async fn counts(&self) -> Result<Counts, ShardError> {
        self.call_within(
            COUNTING_LIMIT,
            |inner| async move { inner.store.counts().await },
        )
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_usual_is_an_average_that_does_not_rise_while_a_slot_moves() {
        let (mut felt, now) = (Felt::default(), Instant::now());
        let usual = |felt: &Felt| (felt.usual * 1000.0).round() as u64;
        felt.batch(Duration::from_millis(30), now);
        (0..9).for_each(|_| felt.batch(Duration::from_millis(10), now));
        assert_eq!(usual(&felt), 12, "the first counts as one of ten");
        felt.moves = 1;
        (0..100).for_each(|_| felt.batch(Duration::from_millis(40), now));
        assert_eq!(usual(&felt), 12);
        assert!(felt.late > 3.0 * felt.usual);
        (0..1000).for_each(|_| felt.batch(Duration::from_millis(2), now));
        assert_eq!(usual(&felt), 2, "it may fall");
    }
}
