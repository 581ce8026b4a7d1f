//! Sending, reading, inboxes and read marks, over all shards: the one thing that sessions and REST call.

use crate::cluster::Cluster;
use crate::config;
use crate::dialog::{BadKey, BadText, BadUser, DialogId, Key, Seq, Text, UserId};
use crate::metrics::Metrics;
use crate::ownership::SlotState;
use crate::ring::{SLOTS, Slot};
use crate::store::{
    InboxCursor, InboxPart, InboxRow, Marked, NewMessage, Page, Place, Range, Shard, ShardDown,
    SlotSet, StoredMessage,
};
use crate::writer::{Answer, Job, OnCommit, Writer};
use chat_wire::{HistoryPage, InboxEntry, InboxPage, Message, ReadMark};
use futures_util::future::{BoxFuture, FutureExt, Shared, join_all};
use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

/// A handle; a clone is one more reference.
#[derive(Clone)]
pub struct Messages {
    inner: Arc<Inner>,
}

struct Inner {
    cluster: Cluster,
    writers: HashMap<String, Writer>,
    limits: config::Limits,
    send_limit: Duration,
    rate: DefaultKeyedRateLimiter<UserId>,
    clock: DefaultClock,
    pages: PagesUnderWay,
    metrics: Arc<Metrics>,
}

/// What was asked for is not done, and why. [`crate::refusal`] gives each its code.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum NotDone {
    #[error(transparent)]
    BadUser(#[from] BadUser),
    #[error(transparent)]
    BadText(#[from] BadText),
    #[error(transparent)]
    BadKey(#[from] BadKey),
    #[error("{0}")]
    BadRequest(&'static str),
    #[error("this key was already used in this dialog for another text")]
    KeyReused,
    #[error("too many sends: at most {limit} a second")]
    RateLimited { limit: u32, retry_after: Duration },
    #[error("too many sends are waiting for the shard of this dialog")]
    Overloaded,
    #[error("the shard of this dialog does not answer")]
    ShardDown,
    #[error("not through in time; it may or may not be done")]
    Unavailable,
    #[error("there is no such dialog yet")]
    NoDialog,
}

/// A send that was stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    /// The dialog.
    pub dialog: DialogId,
    /// Where in it, and when.
    pub place: Place,
    /// Whether an earlier send with this key had stored it.
    pub repeat: bool,
}

/// How often a read that does not add up, or that met a shard which is not the owner, is tried again.
const READ_TRIES: u32 = 3;

/// Between two tries at a slot that is changing hands.
const SEALED_PAUSE: Duration = Duration::from_millis(20);

/// How long a sealed slot is waited for altogether.
const SEALED_LIMIT: Duration = Duration::from_secs(2);

impl Messages {
    /// Starts a writer for each shard. `on_commit` is called for every message that is stored.
    #[must_use]
    pub fn start(
        cluster: Cluster,
        settings: &config::Settings,
        on_commit: &OnCommit,
        runtime: &Handle,
        metrics: Arc<Metrics>,
    ) -> Self {
        let writer = |shard: &Shard| {
            let writer = Writer::start(
                shard,
                &settings.store,
                metrics.writer(shard.name()),
                on_commit,
                runtime,
            );
            (shard.name().to_owned(), writer)
        };
        let writers = cluster.shards().iter().map(writer).collect();
        let at_least_one = |n: u32| NonZeroU32::new(n).unwrap_or(NonZeroU32::MIN);
        let quota = Quota::per_second(at_least_one(settings.limits.sends_per_second))
            .allow_burst(at_least_one(settings.limits.sends_burst));
        let inner = Inner {
            cluster,
            writers,
            limits: settings.limits.clone(),
            send_limit: Duration::from_millis(settings.store.send_ms),
            rate: RateLimiter::keyed(quota),
            clock: DefaultClock::default(),
            pages: PagesUnderWay::default(),
            metrics,
        };
        let messages = Self {
            inner: Arc::new(inner),
        };
        runtime.spawn(forget_the_idle(Arc::downgrade(&messages.inner)));
        messages
    }

    /// The shards below.
    #[must_use]
    pub fn cluster(&self) -> &Cluster {
        &self.inner.cluster
    }

    /// Stores a message of `me` to `to`. What is wrong with it is said at once; otherwise it has taken its place in the
    /// queue when this returns, and the future waits for the commit.
    ///
    /// # Errors
    /// [`NotDone`]. After a retryable one the same key may be sent again.
    ///
    /// # Cancel safety
    /// Dropping the future withdraws nothing: the message is stored and delivered all the same.
    pub fn send(
        &self,
        me: UserId,
        to: u64,
        key: String,
        text: String,
        origin: Option<u64>,
    ) -> Result<impl Future<Output = Result<Sent, NotDone>> + Send + 'static + use<>, NotDone> {
        let arrived = Instant::now();
        let to = UserId::new(to)?;
        let key = Key::new(key)?;
        let text = Text::new(text, self.inner.limits.text_chars as usize)?;
        if let Err(until) = self.inner.rate.check_key(&me) {
            return Err(NotDone::RateLimited {
                limit: self.inner.limits.sends_per_second,
                retry_after: until.wait_time_from(self.inner.clock.now()),
            });
        }
        let dialog = DialogId::between(me, to);
        let deadline = arrived + self.inner.send_limit;
        let first = self.submit(NewMessage::new(dialog, me, key, text), origin, deadline)?;
        let messages = self.clone();
        Ok(async move {
            let sent = messages.see_through(first, dialog, origin, deadline).await;
            messages
                .inner
                .metrics
                .send_seconds
                .observe(arrived.elapsed());
            sent
        })
    }

    /// Puts a message into the queue of the shard that is thought to own its slot.
    fn submit(
        &self,
        message: NewMessage,
        origin: Option<u64>,
        deadline: Instant,
    ) -> Result<oneshot::Receiver<Answer>, NotDone> {
        let shard = self
            .inner
            .cluster
            .route(message.slot)
            .ok_or(NotDone::Unavailable)?;
        if shard.is_down() {
            return Err(NotDone::ShardDown);
        }
        let (answer, receiver) = oneshot::channel();
        let writer = self
            .inner
            .writers
            .get(shard.name())
            .ok_or(NotDone::Unavailable)?;
        writer
            .submit(Job {
                message,
                origin,
                deadline,
                answer,
            })
            .map_err(|_| NotDone::Overloaded)?;
        Ok(receiver)
    }

    /// Waits for the answer; goes after a slot that is elsewhere or changing hands.
    async fn see_through(
        &self,
        mut answer: oneshot::Receiver<Answer>,
        dialog: DialogId,
        origin: Option<u64>,
        deadline: Instant,
    ) -> Result<Sent, NotDone> {
        let sealed_until = Instant::now() + SEALED_LIMIT;
        loop {
            let (message, state) = match answer.await.unwrap_or(Answer::Unavailable) {
                Answer::Stored { place, repeat } => {
                    return Ok(Sent {
                        dialog,
                        place,
                        repeat,
                    });
                }
                Answer::KeyReused => return Err(NotDone::KeyReused),
                Answer::ShardDown => return Err(NotDone::ShardDown),
                Answer::Unavailable => return Err(NotDone::Unavailable),
                Answer::NotOwner(message, state) => (message, state),
            };
            let now = Instant::now();
            if now >= deadline || now >= sealed_until {
                return Err(NotDone::Unavailable);
            }
            if state == Some(SlotState::Sealed) {
                tokio::time::sleep(SEALED_PAUSE).await;
            }
            self.inner.cluster.refresh().await;
            answer = self.submit(message, origin, deadline)?;
        }
    }

    /// A page of the dialog of `me` with `with`, ascending, whole and without a hole.
    ///
    /// # Errors
    /// [`NotDone`].
    pub async fn history(
        &self,
        me: UserId,
        with: u64,
        range: Range,
        limit: Option<u32>,
    ) -> Result<HistoryPage, NotDone> {
        let dialog = DialogId::between(me, UserId::new(with)?);
        let limit = page_limit(limit, self.inner.limits.history_page)?;
        // One more than asked for tells whether there is more.
        let page = self.page(dialog, range, limit + 1).await?;
        Ok(self.present(dialog, range, limit, &page))
    }

    /// Reads a page from the shard that owns the slot, and checks that it adds up.
    async fn page(&self, dialog: DialogId, range: Range, limit: u32) -> Result<Arc<Page>, NotDone> {
        let slot = Slot::of(dialog);
        for _ in 0..READ_TRIES {
            let shard = self
                .inner
                .cluster
                .route(slot)
                .ok_or(NotDone::Unavailable)?
                .clone();
            let page = self
                .inner
                .pages
                .read(shard, dialog, range, limit, &self.inner.metrics)
                .await
                .map_err(not_done)?;
            if page.slot.is_some_and(|view| view.state.answers_reads()) {
                if adds_up(&page, range, limit) {
                    return Ok(page);
                }
                self.inner.metrics.history_torn.inc();
                tracing::error!(%dialog, "a page does not add up");
            }
            self.inner.cluster.refresh().await;
        }
        Err(NotDone::Unavailable)
    }

    /// Cuts a page to what was asked for and to what an answer may weigh, and gives it the form of the wire.
    fn present(&self, dialog: DialogId, range: Range, limit: u32, page: &Page) -> HistoryPage {
        let mut budget = self.inner.limits.history_page_bytes;
        let mut fits = |message: &&StoredMessage| {
            let fits = budget > 0;
            budget = budget.saturating_sub(message.text.len());
            fits
        };
        let mut kept: Vec<&StoredMessage> = match range {
            Range::After(_) => page
                .messages
                .iter()
                .take(limit as usize)
                .take_while(&mut fits)
                .collect(),
            Range::Newest | Range::Before(_) => page
                .messages
                .iter()
                .rev()
                .take(limit as usize)
                .take_while(&mut fits)
                .collect(),
        };
        kept.sort_by_key(|message| message.seq);
        HistoryPage {
            dialog: dialog.to_string(),
            first: kept.first().map_or(0, |message| message.seq.get()),
            last: kept.last().map_or(0, |message| message.seq.get()),
            more: kept.len() < page.messages.len(),
            gap: page.slot.is_some_and(|view| !view.complete),
            messages: kept
                .into_iter()
                .map(|message| wire(dialog, message))
                .collect(),
        }
    }

    /// A page of the dialogs of `me`, newest first, from all shards together.
    ///
    /// # Errors
    /// [`NotDone`]. A shard that does not answer is no error: its name is in `incomplete`.
    pub async fn inbox(
        &self,
        me: UserId,
        limit: Option<u32>,
        cursor: Option<&str>,
    ) -> Result<InboxPage, NotDone> {
        let limit = page_limit(limit, self.inner.limits.inbox_page)?;
        let below = cursor.map(parse_cursor).transpose()?;
        for _ in 0..READ_TRIES {
            let asked = self
                .inner
                .cluster
                .shards()
                .iter()
                .map(|shard| shard.inbox(me, below, limit + 1));
            let answers = join_all(asked).await;
            let mut incomplete: Vec<String> =
                self.inner.cluster.strangers().map(str::to_owned).collect();
            let mut parts = Vec::new();
            for (shard, answer) in self.inner.cluster.shards().iter().zip(answers) {
                match answer {
                    Ok(part) => parts.push(part),
                    Err(_) => incomplete.push(shard.name().to_owned()),
                }
            }
            if !covers_each_slot_once(&parts, incomplete.is_empty()) {
                // A slot changed hands between two of the answers.
                tokio::time::sleep(SEALED_PAUSE).await;
                continue;
            }
            let mut rows: Vec<InboxRow> = parts.into_iter().flat_map(|part| part.rows).collect();
            rows.sort_by(|a, b| {
                (b.last_at, b.dialog.to_string()).cmp(&(a.last_at, a.dialog.to_string()))
            });
            let more = rows.len() > limit as usize;
            rows.truncate(limit as usize);
            let cursor = rows
                .last()
                .filter(|_| more)
                .map(|row| format!("{}.{}", row.last_at.micros(), row.dialog));
            let dialogs = rows.iter().map(|row| InboxEntry {
                dialog: row.dialog.to_string(),
                with: row.dialog.counterpart(me).get(),
                last: wire(row.dialog, &row.last),
                read: row.read_seq.get(),
                unread: row.unread,
            });
            return Ok(InboxPage {
                dialogs: dialogs.collect(),
                cursor,
                incomplete,
            });
        }
        Err(NotDone::Unavailable)
    }

    /// Marks the dialog of `me` with `with` as read up to `seq`: forward only, and not beyond the last message.
    ///
    /// # Errors
    /// [`NotDone`].
    pub async fn mark_read(
        &self,
        me: UserId,
        with: u64,
        seq: u64,
    ) -> Result<(DialogId, ReadMark), NotDone> {
        let dialog = DialogId::between(me, UserId::new(with)?);
        let sealed_until = Instant::now() + SEALED_LIMIT;
        loop {
            let shard = self
                .inner
                .cluster
                .route(Slot::of(dialog))
                .ok_or(NotDone::Unavailable)?;
            match shard
                .mark_read(dialog, me, Seq::new(seq))
                .await
                .map_err(not_done)?
            {
                Marked::At(seq) => {
                    return Ok((
                        dialog,
                        ReadMark {
                            dialog: dialog.to_string(),
                            user: me.get(),
                            seq: seq.get(),
                        },
                    ));
                }
                Marked::NoDialog => return Err(NotDone::NoDialog),
                Marked::NotOwner(_) if Instant::now() >= sealed_until => {
                    return Err(NotDone::Unavailable);
                }
                Marked::NotOwner(_) => {
                    tokio::time::sleep(SEALED_PAUSE).await;
                    self.inner.cluster.refresh().await;
                }
            }
        }
    }
}

/// Users who have been quiet for a while need no place in the rate limiter.
async fn forget_the_idle(inner: std::sync::Weak<Inner>) {
    loop {
        tokio::time::sleep(Duration::from_secs(60)).await;
        let Some(inner) = inner.upgrade() else { return };
        inner.rate.retain_recent();
        inner.rate.shrink_to_fit();
    }
}

/// A message in the form of the wire.
#[must_use]
pub fn wire(dialog: DialogId, message: &StoredMessage) -> Message {
    Message {
        dialog: dialog.to_string(),
        seq: message.seq.get(),
        from: message.author.get(),
        to: dialog.counterpart(message.author).get(),
        text: message.text.clone(),
        at: message.at.to_string(),
        key: message.key.clone(),
    }
}

fn not_done(e: ShardDown) -> NotDone {
    match e {
        ShardDown::Down(_) => NotDone::ShardDown,
        ShardDown::Failed(shard, e) => {
            tracing::warn!(%shard, reason = %e, "read failed");
            NotDone::Unavailable
        }
    }
}

fn page_limit(asked: Option<u32>, most: u32) -> Result<u32, NotDone> {
    match asked {
        Some(0) => Err(NotDone::BadRequest("limit must be at least 1")),
        Some(limit) => Ok(limit.min(most)),
        None => Ok(most.min(50)),
    }
}

fn parse_cursor(cursor: &str) -> Result<InboxCursor, NotDone> {
    let parse = || {
        let (at, dialog) = cursor.split_once('.')?;
        let last_at = crate::dialog::Timestamp::from_micros(at.parse().ok()?);
        Some(InboxCursor {
            last_at,
            dialog: dialog.parse().ok()?,
        })
    };
    parse().ok_or(NotDone::BadRequest(
        "the cursor is not one of ours; use the one of the page before",
    ))
}

/// Whether a page is whole: seqs are dense, so that a hole shows. `limit` is what the shard was asked for.
fn adds_up(page: &Page, range: Range, limit: u32) -> bool {
    let seqs: Vec<Seq> = page.messages.iter().map(|message| message.seq).collect();
    let dense = seqs.windows(2).all(|pair| pair[1].follows(pair[0]));
    let short = (seqs.len() as u32) < limit;
    let from_the_start = seqs.first().is_none_or(|first| first.follows(Seq::ZERO));
    let to_the_end =
        |after: Seq| seqs.last().copied().unwrap_or(after.min(page.last_seq)) == page.last_seq;
    dense
        && match range {
            Range::Newest => to_the_end(Seq::ZERO) && (!short || from_the_start),
            Range::Before(before) => {
                let reaches = match seqs.last() {
                    Some(last) => before.follows(*last) || *last == page.last_seq,
                    // Nothing below: there is no message at all, or the bound is not above the first.
                    None => page.last_seq == Seq::ZERO || before <= Seq::ZERO.next(0),
                };
                reaches && (!short || from_the_start)
            }
            Range::After(after) => {
                seqs.first().is_none_or(|first| first.follows(after))
                    && (!short || to_the_end(after))
            }
        }
}

/// Whether the shards that answered own every slot once together; with one missing, none twice at least.
fn covers_each_slot_once(parts: &[InboxPart], all_answered: bool) -> bool {
    let mut union = SlotSet::empty();
    let once = parts
        .iter()
        .flat_map(|part| part.slots.iter())
        .all(|slot| union.insert(slot));
    once && (!all_answered || union.len() == SLOTS)
}

type PageKey = (String, DialogId, Range, u32);
type SharedPage = Shared<BoxFuture<'static, Result<Arc<Page>, ShardDown>>>;

/// Reads that were asked for and have not begun. Whoever asks for the same meanwhile waits for the same read; nobody joins
/// one that has begun, because it may not see what was stored since.
#[derive(Clone, Default)]
struct PagesUnderWay {
    waiting: Arc<Mutex<HashMap<PageKey, SharedPage>>>,
}

impl PagesUnderWay {
    async fn read(
        &self,
        shard: Shard,
        dialog: DialogId,
        range: Range,
        limit: u32,
        metrics: &Arc<Metrics>,
    ) -> Result<Arc<Page>, ShardDown> {
        let key = (shard.name().to_owned(), dialog, range, limit);
        let page = {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(page) = waiting.get(&key) {
                metrics.history_shared.inc();
                page.clone()
            } else {
                metrics.history_reads.inc();
                let begins = Begins {
                    pages: self.clone(),
                    key: key.clone(),
                };
                let page = async move {
                    // The turn comes when a connection is free: until then others may join.
                    let turn = shard.turn().await;
                    drop(begins);
                    let page = shard.page(dialog, range, limit).await;
                    drop(turn);
                    page.map(Arc::new)
                };
                let page = page.boxed().shared();
                waiting.insert(key, page.clone());
                page
            }
        };
        page.await
    }
}

/// Takes a read off the list when it begins, and also when everyone who waited for it has gone.
struct Begins {
    pages: PagesUnderWay,
    key: PageKey,
}

impl Drop for Begins {
    fn drop(&mut self) {
        self.pages
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialog::Timestamp;
    use crate::ownership::SlotView;

    fn page(seqs: &[u64], last_seq: u64) -> Page {
        let message = |seq: &u64| StoredMessage {
            seq: Seq::new(*seq),
            author: UserId::new(1).unwrap(),
            key: None,
            text: "x".into(),
            at: Timestamp::from_micros(0),
        };
        let slot = Some(SlotView {
            state: SlotState::Owner,
            generation: 0,
            complete: true,
        });
        Page {
            slot,
            last_seq: Seq::new(last_seq),
            messages: seqs.iter().map(message).collect(),
        }
    }

    #[test]
    fn a_page_with_a_hole_is_noticed() {
        let (newest, before, after) = (
            Range::Newest,
            |n| Range::Before(Seq::new(n)),
            |n| Range::After(Seq::new(n)),
        );
        for (seqs, last, range, whole) in [
            (&[][..], 0, newest, true),
            (&[1, 2, 3], 3, newest, true),
            (&[2, 3, 4, 5, 6], 6, newest, true), // full: there is more below
            (&[2, 3], 3, newest, false),         // short, but does not begin at the first
            (&[1, 3], 3, newest, false),
            (&[1, 2], 3, newest, false),
            (&[], 3, newest, false),
            (&[1, 2], 9, before(3), true),
            (&[1], 9, before(3), false),
            (&[], 9, before(1), true),
            (&[], 9, before(2), false),
            (&[1, 2, 3], 3, before(100), true),
            (&[1, 2], 3, before(100), false),
            (&[4, 5], 5, after(3), true),
            (&[5], 5, after(3), false),
            (&[4], 5, after(3), false),
            (&[], 5, after(5), true),
            (&[], 5, after(50), true),
            (&[], 5, after(3), false),
            (&[4, 5, 6, 7, 8], 20, after(3), true),
            (&[1, 2, (1 << 40) + 1], (1 << 40) + 1, newest, true),
        ] {
            assert_eq!(
                adds_up(&page(seqs, last), range, 5),
                whole,
                "{seqs:?} of {last}, {range:?}"
            );
        }
    }

    #[test]
    fn an_inbox_covers_every_slot_exactly_once() {
        let part = |slots: &mut dyn Iterator<Item = Slot>| {
            let mut set = SlotSet::empty();
            slots.for_each(|slot| assert!(set.insert(slot)));
            InboxPart {
                rows: Vec::new(),
                slots: set,
            }
        };
        let low = part(&mut Slot::all().filter(|slot| slot.get() < 2000));
        let high = part(&mut Slot::all().filter(|slot| slot.get() >= 2000));
        let overlap = part(&mut Slot::all().filter(|slot| slot.get() >= 1999));
        assert!(covers_each_slot_once(&[low.clone(), high], true));
        assert!(!covers_each_slot_once(&[low.clone(), overlap], true));
        assert!(!covers_each_slot_once(std::slice::from_ref(&low), true));
        assert!(covers_each_slot_once(&[low], false));
    }
}
