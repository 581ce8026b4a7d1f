//! Messages: sends and read marks. History and inboxes are in modules of their own.

use super::dispatch::Dispatch;
use super::error::RequestError;
use super::pending_reads::PendingReads;
use super::slot_queue::{Answer, Requester, Settled, Unsettled};
use super::writer::OnCommit;
use crate::budget::{Budgets, cost};
use crate::cluster::Cluster;
use crate::config;
use crate::domain::dialog::{DialogId, Key, Seq, Text, UserId};
use crate::metrics::Metrics;
use crate::rate_limit::RateLimiter;
use crate::store::{MarkOutcome, NewMark, NewMessage, Receipt};
use chat_wire::ReadMark;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// A handle; a clone is one more reference.
#[derive(Clone)]
pub struct Messages {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) cluster: Cluster,
    dispatch: Dispatch,
    pub(super) limits: config::Limits,
    send_limit: Duration,
    rates: RateLimiter<UserId>,
    pub(super) budgets: Budgets,
    pub(super) pages: PendingReads,
    pub(super) metrics: Arc<Metrics>,
}

/// A request to send a message.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// The receiver.
    pub to: u64,
    /// See [`Key`].
    pub key: String,
    /// See [`Text`].
    pub text: String,
}

/// A send that was stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    /// The dialog.
    pub dialog: DialogId,
    /// Its place in the dialog, and its time.
    pub place: Receipt,
    /// Whether an earlier send with this key had stored it.
    pub repeat: bool,
}

/// The position of a read mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadUpTo {
    /// The dialog.
    pub dialog: DialogId,
    /// The user has read up to here.
    pub seq: Seq,
    /// Whether the mark has moved.
    pub moved: bool,
}

impl ReadUpTo {
    /// The mark of `user` in the wire format.
    #[must_use]
    pub fn wire(&self, user: UserId) -> ReadMark {
        ReadMark {
            dialog: self.dialog.to_string(),
            user: user.get(),
            seq: self.seq.get(),
        }
    }
}

impl Messages {
    /// Starts a writer for each shard. `on_commit` is called for every message that is stored.
    #[must_use]
    pub fn start(
        cluster: Cluster,
        settings: &config::Settings,
        on_commit: OnCommit,
        runtime: &Handle,
        metrics: Arc<Metrics>,
    ) -> Self {
        let dispatch = Dispatch::start(
            cluster.clone(),
            &settings.store,
            on_commit,
            runtime,
            metrics.clone(),
        );
        let inner = Inner {
            cluster,
            dispatch,
            limits: settings.limits.clone(),
            send_limit: Duration::from_millis(settings.store.send_ms),
            rates: RateLimiter::new(
                settings.limits.sends_per_second,
                settings.limits.sends_burst,
            ),
            budgets: Budgets::new(settings.limits.work_per_second, settings.limits.work_burst),
            pages: PendingReads::default(),
            metrics,
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// The cluster of shards.
    #[must_use]
    pub fn cluster(&self) -> &Cluster {
        &self.inner.cluster
    }

    /// Stores a message of `me` to `to`. Invalid requests are refused at once; otherwise the
    /// message is in the queue when this returns, and `answer` is called once, when the send is
    /// settled. It must not block.
    ///
    /// # Errors
    /// [`RequestError`]. After a retryable one the same key may be sent again.
    pub fn send(
        &self,
        me: UserId,
        message: Outgoing,
        origin: Option<Requester>,
        answer: impl FnOnce(Result<Sent, RequestError>) + Send + 'static,
    ) -> Result<(), RequestError> {
        let arrived = Instant::now();
        let to = UserId::new(message.to)?;
        let key = Key::new(message.key)?;
        let text = Text::new(message.text, self.inner.limits.text_chars as usize)?;
        if let Err(retry_after) = self.inner.rates.check(&me) {
            return Err(RequestError::RateLimited {
                limit: self.inner.limits.sends_per_second,
                retry_after,
            });
        }
        let dialog = DialogId::between(me, to);
        let deadline = arrived + self.inner.send_limit;
        let message = NewMessage::new(dialog, me, key, text);
        let metrics = self.inner.metrics.clone();
        let settled = move |settled: Answer<Settled>| {
            metrics.send_seconds.observe(arrived.elapsed());
            answer(match settled {
                Ok(Settled::Stored { place, repeat }) => Ok(Sent {
                    dialog,
                    place,
                    repeat,
                }),
                Ok(Settled::KeyReused) => Err(RequestError::KeyReused),
                Err(unsettled) => Err(unsettled.into()),
            });
        };
        Ok(self
            .inner
            .dispatch
            .submit(message, origin, deadline, settled)?)
    }

    /// As [`Messages::send`], for callers that wait: the future ends when the send is settled.
    ///
    /// # Errors
    /// [`RequestError`].
    ///
    /// # Cancel safety
    /// Dropping the future does not withdraw the message: it is stored and delivered all the same.
    pub fn sending(
        &self,
        me: UserId,
        message: Outgoing,
    ) -> Result<
        impl Future<Output = Result<Sent, RequestError>> + Send + 'static + use<>,
        RequestError,
    > {
        let (settled, settling) = oneshot::channel();
        // The caller may have been dropped.
        self.send(me, message, None, |sent| drop(settled.send(sent)))?;
        Ok(async move { settling.await.unwrap_or(Err(RequestError::Unavailable)) })
    }

    /// Takes the minimal cost of a request from the budget of a user.
    ///
    /// # Errors
    /// [`RequestError::TooMuchWork`].
    pub fn afford(&self, user: UserId, units: u32) -> Result<(), RequestError> {
        let taken = self.inner.budgets.take(user, units);
        taken.map_err(|retry_after| {
            self.inner.metrics.requests_over_budget.inc();
            RequestError::TooMuchWork { retry_after }
        })
    }

    /// Takes the rest of the actual cost of a request from the budget of a user.
    pub fn charge(&self, user: UserId, units: u32) {
        self.inner.budgets.charge(user, units);
    }

    /// Another instance has stored a message.
    pub fn remote_message(&self, dialog: DialogId, seq: Seq) {
        self.inner.dispatch.remote_message(dialog, seq);
    }

    /// Marks the dialog of `me` with `with` as read up to `seq`: forward only, and not beyond the
    /// last message. A mark that has moved is delivered to both users. Of several marks within a
    /// moment the highest is stored.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn mark_read(
        &self,
        me: UserId,
        with: u64,
        seq: u64,
    ) -> Result<ReadUpTo, RequestError> {
        let dialog = DialogId::between(me, UserId::new(with)?);
        self.afford(me, cost::MARK)?;
        let mark = NewMark::new(dialog, me, Seq::new(seq));
        let deadline = Instant::now() + self.inner.send_limit;
        let (settled, settling) = oneshot::channel();
        // The caller may have been dropped.
        let answer = |marked| {
            let _ = settled.send(marked);
        };
        self.inner.dispatch.submit_mark(mark, deadline, answer)?;
        match settling.await.unwrap_or(Err(Unsettled::Unavailable))? {
            MarkOutcome::At { seq, moved } => Ok(ReadUpTo { dialog, seq, moved }),
            MarkOutcome::NoDialog => Err(RequestError::NoDialog),
            MarkOutcome::NotOwner(_) => Err(RequestError::Unavailable),
        }
    }
}

pub(super) fn page_limit(asked: Option<u32>, most: u32) -> Result<u32, RequestError> {
    match asked {
        Some(0) => Err(RequestError::BadRequest("limit must be at least 1")),
        Some(limit) => Ok(limit.min(most)),
        None => Ok(most.min(50)),
    }
}
