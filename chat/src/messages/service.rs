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
use crate::domain::room::Refusal;
use crate::metrics::Metrics;
use crate::rate_limit::RateLimiter;
use crate::store::{Body, MarkOutcome, NewMark, NewMessage, Receipt};
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
    pub(super) dispatch: Dispatch,
    pub(super) limits: config::Limits,
    send_limit: Duration,
    rates: RateLimiter<UserId>,
    pub(super) budgets: Budgets,
    pub(super) pages: PendingReads,
    pub(super) metrics: Arc<Metrics>,
}

/// The dialog of a request, as the client names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// By the other user.
    User(u64),
    /// By its id.
    Dialog(String),
}

impl Target {
    /// The target of a frame, which names the user or the dialog.
    ///
    /// # Errors
    /// [`RequestError::BadRequest`] if it names both or none.
    pub fn of(user: Option<u64>, dialog: Option<String>) -> Result<Self, RequestError> {
        match (user, dialog) {
            (Some(user), None) => Ok(Target::User(user)),
            (None, Some(dialog)) => Ok(Target::Dialog(dialog)),
            (None, None) => Err(RequestError::BadRequest(
                "a dialog is named by its other user (`to`, `with`) or by its id (`in`)",
            )),
            (Some(_), Some(_)) => Err(RequestError::BadRequest(
                "a dialog is named either by its other user or by its id",
            )),
        }
    }

    /// The dialog, seen from `me`. A dialog between two users must be one of `me`; who is in a room
    /// is for its shard to say.
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn dialog(&self, me: UserId) -> Result<DialogId, RequestError> {
        match self {
            Target::User(user) => Ok(DialogId::between(me, UserId::new(*user)?)),
            Target::Dialog(name) => match name.parse() {
                Ok(dialog @ DialogId::Pair(_)) if dialog.names(me) => Ok(dialog),
                Ok(DialogId::Pair(_)) => Err(RequestError::NotYours),
                Ok(dialog @ DialogId::Room(_)) => Ok(dialog),
                // Feeds come with a later version; an id of one is known, and leads nowhere.
                Ok(DialogId::Feed(_)) => Err(RequestError::NoDialog),
                Err(_) => Err(RequestError::BadRequest("in is not the id of a dialog")),
            },
        }
    }
}

/// A request to send a message.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// Where to.
    pub to: Target,
    /// See [`Key`].
    pub key: String,
    /// See [`Text`].
    pub text: String,
}

/// What became of a request for an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// Its entry is stored.
    Stored(Sent),
    /// It changes nothing.
    Unchanged,
}

/// An entry that was stored.
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
        let dialog = message.to.dialog(me)?;
        let key = Key::new(message.key)?;
        let text = Text::new(message.text, self.inner.limits.text_chars as usize)?;
        self.submit(dialog, me, key, Body::Text(text), origin, |done| {
            answer(done.and_then(|done| match done {
                Done::Stored(sent) => Ok(sent),
                // A message always changes something.
                Done::Unchanged => Err(RequestError::Unavailable),
            }));
        })
    }

    /// Puts an entry into the queue of its slot, as [`Messages::send`].
    pub(super) fn submit(
        &self,
        dialog: DialogId,
        me: UserId,
        key: Key,
        body: Body,
        origin: Option<Requester>,
        answer: impl FnOnce(Result<Done, RequestError>) + Send + 'static,
    ) -> Result<(), RequestError> {
        let arrived = Instant::now();
        if let Err(retry_after) = self.inner.rates.check(&me) {
            return Err(RequestError::RateLimited {
                limit: self.inner.limits.sends_per_second,
                retry_after,
            });
        }
        let deadline = arrived + self.inner.send_limit;
        let message = NewMessage::new(dialog, me, key, body);
        let metrics = self.inner.metrics.clone();
        let settled = move |settled: Answer<Settled>| {
            metrics.send_seconds.observe(arrived.elapsed());
            answer(match settled {
                Ok(Settled::Stored { place, repeat }) => Ok(Done::Stored(Sent {
                    dialog,
                    place,
                    repeat,
                })),
                Ok(Settled::Unchanged) => Ok(Done::Unchanged),
                Ok(Settled::KeyReused) => Err(RequestError::KeyReused),
                Ok(Settled::Refused(refusal)) => Err(refusal.into()),
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

    /// Another instance has stored an entry; `changes_room`: it changes the members of a room.
    pub fn remote_message(&self, dialog: DialogId, seq: Seq, changes_room: bool) {
        self.inner
            .dispatch
            .remote_message(dialog, seq, changes_room);
    }

    /// Marks a dialog of `me` as read up to `seq`: forward only, and not beyond the last message. A
    /// mark that has moved is delivered to both users; in a room to the user who has read. Of
    /// several marks within a moment the highest is stored.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn mark_read(
        &self,
        me: UserId,
        of: &Target,
        seq: u64,
    ) -> Result<ReadUpTo, RequestError> {
        let dialog = of.dialog(me)?;
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
            MarkOutcome::NoDialog if dialog.is_room() => Err(Refusal::NotMember.into()),
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
