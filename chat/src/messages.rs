//! Sending, reading, inboxes and read marks, over all shards: the one thing that sessions and REST call.

use crate::budget::{Budgets, cost};
use crate::cluster::Cluster;
use crate::config;
use crate::dialog::{BadKey, BadText, BadUser, DialogId, Key, Seq, Text, UserId};
use crate::dispatch::{Dispatch, NotTaken};
use crate::metrics::Metrics;
use crate::ownership::{SlotState, SlotView};
use crate::rate::Rates;
use crate::ring::Slot;
use crate::slot_queue::{Answer, Settled, Unsettled};
use crate::store::{
    Holding, InboxCursor, InboxPart, InboxRow, Marked, NewMark, NewMessage, Page, Place, Range,
    Shard, ShardDown, SlotSet, StoredMessage,
};
use crate::writer::OnCommit;
use chat_wire::{HistoryPage, InboxEntry, InboxPage, Message, ReadMark};
use futures_util::future::{BoxFuture, FutureExt, WeakShared, join_all};
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// A handle; a clone is one more reference.
#[derive(Clone)]
pub struct Messages {
    inner: Arc<Inner>,
}

struct Inner {
    cluster: Cluster,
    dispatch: Dispatch,
    limits: config::Limits,
    send_limit: Duration,
    rates: Rates<UserId>,
    budgets: Budgets,
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
    #[error(
        "too much work: each user has a budget for reads, marks and watches; see the limits in welcome"
    )]
    TooMuchWork { retry_after: Duration },
    #[error("too much is waiting for the shard already")]
    Overloaded,
    #[error("the shard of this dialog does not answer")]
    ShardDown,
    #[error("not through in time; it may or may not be done")]
    Unavailable,
    #[error("there is no such dialog yet")]
    NoDialog,
}

impl From<NotTaken> for NotDone {
    fn from(not_taken: NotTaken) -> Self {
        match not_taken {
            NotTaken::NoRoute => NotDone::Unavailable,
            NotTaken::ShardDown => NotDone::ShardDown,
            NotTaken::Full => NotDone::Overloaded,
        }
    }
}

impl From<Unsettled> for NotDone {
    fn from(unsettled: Unsettled) -> Self {
        match unsettled {
            Unsettled::ShardDown => NotDone::ShardDown,
            Unsettled::Unavailable => NotDone::Unavailable,
        }
    }
}

/// A send, as it comes from the outside.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// To which user.
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
    /// Where in it, and when.
    pub place: Place,
    /// Whether an earlier send with this key had stored it.
    pub repeat: bool,
}

/// Where a read mark is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadUpTo {
    /// The dialog.
    pub dialog: DialogId,
    /// Its user has read up to here.
    pub seq: Seq,
    /// Whether the mark was below before.
    pub moved: bool,
}

impl ReadUpTo {
    /// The mark of `user` in the form of the wire.
    #[must_use]
    pub fn wire(&self, user: UserId) -> ReadMark {
        ReadMark {
            dialog: self.dialog.to_string(),
            user: user.get(),
            seq: self.seq.get(),
        }
    }
}

/// How often a read that does not add up, or that met a shard which is not the owner, is tried again.
const READ_TRIES: u32 = 8;

/// Before a slot that is changing hands is looked at again; grows with each try.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

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
            rates: Rates::new(
                settings.limits.sends_per_second,
                settings.limits.sends_burst,
            ),
            budgets: Budgets::new(settings.limits.work_per_second, settings.limits.work_burst),
            pages: PagesUnderWay::default(),
            metrics,
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// The shards below.
    #[must_use]
    pub fn cluster(&self) -> &Cluster {
        &self.inner.cluster
    }

    /// Stores a message of `me` to `to`. What is wrong with it is said at once; otherwise it has taken its place in the
    /// queue when this returns, and `answer` is called once, when it is settled. It must not wait.
    ///
    /// # Errors
    /// [`NotDone`]. After a retryable one the same key may be sent again.
    pub fn send(
        &self,
        me: UserId,
        message: Outgoing,
        origin: Option<u64>,
        answer: impl FnOnce(Result<Sent, NotDone>) + Send + 'static,
    ) -> Result<(), NotDone> {
        let arrived = Instant::now();
        let to = UserId::new(message.to)?;
        let key = Key::new(message.key)?;
        let text = Text::new(message.text, self.inner.limits.text_chars as usize)?;
        if let Err(retry_after) = self.inner.rates.take(&me) {
            return Err(NotDone::RateLimited {
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
                Ok(Settled::KeyReused) => Err(NotDone::KeyReused),
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
    /// [`NotDone`].
    ///
    /// # Cancel safety
    /// Dropping the future withdraws nothing: the message is stored and delivered all the same.
    pub fn sending(
        &self,
        me: UserId,
        message: Outgoing,
    ) -> Result<impl Future<Output = Result<Sent, NotDone>> + Send + 'static + use<>, NotDone> {
        let (settled, settling) = oneshot::channel();
        // The caller may have gone.
        self.send(me, message, None, |sent| drop(settled.send(sent)))?;
        Ok(async move { settling.await.unwrap_or(Err(NotDone::Unavailable)) })
    }

    /// Takes from the budget of a user what a request costs at least.
    ///
    /// # Errors
    /// [`NotDone::TooMuchWork`].
    pub fn afford(&self, user: UserId, units: u32) -> Result<(), NotDone> {
        let taken = self.inner.budgets.take(user, units);
        taken.map_err(|retry_after| {
            self.inner.metrics.over_budget.inc();
            NotDone::TooMuchWork { retry_after }
        })
    }

    /// Takes from the budget of a user what a request turned out to cost.
    pub fn charge(&self, user: UserId, units: u32) {
        self.inner.budgets.charge(user, units);
    }

    /// Another instance has stored a message.
    pub fn heard(&self, dialog: DialogId, seq: Seq) {
        self.inner.dispatch.heard(dialog, seq);
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
        self.afford(me, cost::STATEMENT)?;
        let page = self.page(me, dialog, range, limit + 1).await?;
        let bytes = page.messages.iter().map(|message| message.text.len()).sum();
        self.inner
            .budgets
            .charge(me, cost::answer(page.messages.len(), bytes));
        Ok(self.present(dialog, range, limit, &page))
    }

    /// Reads a page from the shard that owns the slot, and checks that it adds up.
    async fn page(
        &self,
        payer: UserId,
        dialog: DialogId,
        range: Range,
        limit: u32,
    ) -> Result<Arc<Page>, NotDone> {
        let slot = Slot::of(dialog);
        let cluster = &self.inner.cluster;
        for attempt in 0..READ_TRIES {
            if attempt > 0 {
                tokio::time::sleep(LOOK_AGAIN * attempt).await;
                cluster.find(slot).await;
            }
            let shard = cluster.route(slot).ok_or(NotDone::Unavailable)?;
            let page = self.read(payer, shard, dialog, range, limit).await?;
            let Some(view) = &page.slot else { continue };
            let page = match (view.state, &view.peer) {
                (SlotState::Owner, _) => page,
                (SlotState::Sealed, Some(peer)) => {
                    // Nothing was written since it was sealed, unless the target has taken over already.
                    let Some(peer) = cluster.view().shard(peer).cloned() else {
                        return Err(NotDone::Unavailable);
                    };
                    let theirs = self.read(payer, peer, dialog, range, limit).await?;
                    let state = theirs.slot.as_ref().map(|view| view.state);
                    match state {
                        Some(SlotState::Owner) => theirs,
                        Some(SlotState::Incoming) => page,
                        Some(SlotState::None | SlotState::Sealed | SlotState::Fenced) | None => {
                            continue;
                        }
                    }
                }
                (
                    SlotState::None | SlotState::Sealed | SlotState::Incoming | SlotState::Fenced,
                    _,
                ) => continue,
            };
            if adds_up(&page, range, limit) {
                return Ok(page);
            }
            self.inner.metrics.history_torn.inc();
            tracing::error!(%dialog, "a page does not add up");
        }
        Err(NotDone::Unavailable)
    }

    async fn read(
        &self,
        payer: UserId,
        shard: Shard,
        dialog: DialogId,
        range: Range,
        limit: u32,
    ) -> Result<Arc<Page>, NotDone> {
        let pages = &self.inner.pages;
        let page = pages.read(payer, shard, dialog, range, limit, &self.inner.metrics);
        page.await.map_err(not_done)
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
        let more = kept.len() < page.messages.len();
        let first = kept.first().map(|message| message.seq);
        HistoryPage {
            dialog: dialog.to_string(),
            first: kept.first().map_or(0, |message| message.seq.get()),
            last: kept.last().map_or(0, |message| message.seq.get()),
            more,
            gap: page
                .slot
                .as_ref()
                .is_some_and(|view| may_lack(view, range, first, more)),
            messages: kept
                .into_iter()
                .map(|message| wire(dialog, message))
                .collect(),
        }
    }

    /// A page of the dialogs of `me`, newest first, from all shards together.
    ///
    /// # Errors
    /// [`NotDone`]. A shard that does not answer, or that was declared down and alone holds a part, is no error: its name is
    /// in `incomplete`.
    pub async fn inbox(
        &self,
        me: UserId,
        limit: Option<u32>,
        cursor: Option<&str>,
    ) -> Result<InboxPage, NotDone> {
        let limit = page_limit(limit, self.inner.limits.inbox_page)?;
        let below = cursor.map(parse_cursor).transpose()?;
        let shards = u32::try_from(self.inner.cluster.view().shards.len()).unwrap_or(u32::MAX);
        self.afford(me, cost::STATEMENT.saturating_mul(shards))?;
        let mut gathered = Gathered::default();
        for attempt in 0..READ_TRIES {
            if attempt > 0 {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            let view = self.inner.cluster.view();
            let asked = view
                .shards
                .iter()
                .map(|shard| shard.inbox(me, below, limit + 1));
            let answers = join_all(asked).await;
            let mut incomplete: Vec<String> = view
                .strangers()
                .chain(view.document.down())
                .map(str::to_owned)
                .collect();
            let mut parts = Vec::new();
            for (shard, answer) in view.shards.iter().zip(answers) {
                match answer {
                    Ok(part) => {
                        self.inner.budgets.charge(me, cost::inbox(part.rows.len()));
                        parts.push(part);
                    }
                    Err(ShardDown::Busy(_)) => return Err(NotDone::Overloaded),
                    Err(ShardDown::Down(_) | ShardDown::Failed(..)) => {
                        incomplete.push(shard.name().to_owned())
                    }
                }
            }
            gathered.add(parts);
            // What is missing may have changed hands between two of the answers, or lie where nobody answers.
            let lies_there = |slot: Slot| match self.inner.cluster.known_owner(slot) {
                Some(shard) => incomplete.iter().any(|name| name == shard.name()),
                None => !incomplete.is_empty(),
            };
            if !gathered.missing().all(lies_there) {
                continue;
            }
            let mut incomplete: BTreeSet<String> = if gathered.missing().next().is_some() {
                incomplete.into_iter().collect()
            } else {
                // A shard that does not answer and owns nothing takes nothing away.
                BTreeSet::new()
            };
            // Others have its slots now, but not what it alone holds of them.
            incomplete.append(&mut gathered.lacking);
            let incomplete = incomplete.into_iter().collect();
            return Ok(inbox_page(me, gathered.rows, limit as usize, incomplete));
        }
        Err(NotDone::Unavailable)
    }

    /// Marks the dialog of `me` with `with` as read up to `seq`: forward only, and not beyond the last message. Everybody in the
    /// dialog has been told if the mark has moved. Of many that come within a moment the highest is stored.
    ///
    /// # Errors
    /// [`NotDone`].
    pub async fn mark_read(&self, me: UserId, with: u64, seq: u64) -> Result<ReadUpTo, NotDone> {
        let dialog = DialogId::between(me, UserId::new(with)?);
        self.afford(me, cost::MARK)?;
        let mark = NewMark::new(dialog, me, Seq::new(seq));
        let deadline = Instant::now() + self.inner.send_limit;
        let (settled, settling) = oneshot::channel();
        // The caller may have gone.
        let answer = |marked| {
            let _ = settled.send(marked);
        };
        self.inner.dispatch.submit_mark(mark, deadline, answer)?;
        match settling.await.unwrap_or(Err(Unsettled::Unavailable))? {
            Marked::At { seq, moved } => Ok(ReadUpTo { dialog, seq, moved }),
            Marked::NoDialog => Err(NotDone::NoDialog),
            Marked::NotOwner(_) => Err(NotDone::Unavailable),
        }
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
        ShardDown::Busy(_) => NotDone::Overloaded,
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

/// Whether messages may be missing from a page that begins with `first`. While a slot lacks some, that is so of every page but
/// one that lies within the generation that began when they were lost, and does not reach down to its beginning.
fn may_lack(slot: &SlotView, range: Range, first: Option<Seq>, more: bool) -> bool {
    let begins_within = match (range, first) {
        (_, None) => false,
        (Range::After(after), Some(first)) => first.get() == after.get() + 1,
        (Range::Newest | Range::Before(_), Some(_)) => more,
    };
    let of_this_generation = first.is_some_and(|first| first.generation() == slot.generation);
    !(slot.complete || begins_within && of_this_generation)
}

/// Whether a page is whole: seqs are dense, so that a hole shows. `limit` is what the shard was asked for.
fn adds_up(page: &Page, range: Range, limit: u32) -> bool {
    let seqs: Vec<Seq> = page.messages.iter().map(|message| message.seq).collect();
    // While a shard that was declared down holds some of them, holes are known, and the answer says so: but for those that were
    // stored since.
    if let Some(view) = page.slot.as_ref().filter(|view| !view.complete) {
        return seqs.windows(2).all(|pair| {
            let since = pair[0].generation() >= view.generation;
            pair[0] < pair[1] && (!since || pair[1].follows(pair[0]))
        });
    }
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

/// The parts of an inbox, taken together slot by slot: each slot's rows come from one answer, whichever shards have answered
/// for it meanwhile.
#[derive(Default)]
struct Gathered {
    covered: SlotSet,
    rows: Vec<InboxRow>,
    lacking: BTreeSet<String>,
}

impl Gathered {
    /// Takes what is not covered yet from its owners; where there is none, from where it is sealed: no owner had taken it
    /// over when this request began.
    fn add(&mut self, parts: Vec<InboxPart>) {
        let mut parts: Vec<(Holding, Vec<InboxRow>)> = parts
            .into_iter()
            .map(|part| (part.slots, part.rows))
            .collect();
        for (holding, _) in &parts {
            self.lacking.extend(holding.lacking.iter().cloned());
        }
        for of in [
            |holding: &Holding| holding.owned.clone(),
            |holding: &Holding| holding.sealed.clone(),
        ] {
            for (holding, rows) in &mut parts {
                let mut taken = SlotSet::empty();
                for slot in of(holding).iter().filter(|slot| self.covered.insert(*slot)) {
                    taken.insert(slot);
                }
                let (ours, others) = std::mem::take(rows)
                    .into_iter()
                    .partition(|row| taken.contains(Slot::of(row.dialog)));
                self.rows.extend::<Vec<_>>(ours);
                *rows = others;
            }
        }
    }

    fn missing(&self) -> impl Iterator<Item = Slot> {
        Slot::all().filter(|slot| !self.covered.contains(*slot))
    }
}

fn inbox_page(
    me: UserId,
    mut rows: Vec<InboxRow>,
    limit: usize,
    incomplete: Vec<String>,
) -> InboxPage {
    rows.sort_by_key(|row| std::cmp::Reverse((row.last_at, row.dialog.to_string())));
    let more = rows.len() > limit;
    rows.truncate(limit);
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
    InboxPage {
        dialogs: dialogs.collect(),
        cursor,
        incomplete,
    }
}

type PageKey = (String, DialogId, Range, u32);
type PageRead = BoxFuture<'static, Result<Arc<Page>, ShardDown>>;

/// Reads that were asked for and have not begun. Whoever asks for the same meanwhile waits for the same read; nobody joins
/// one that has begun, because it may not see what was stored since.
#[derive(Clone, Default)]
struct PagesUnderWay {
    waiting: Arc<Mutex<HashMap<PageKey, WeakShared<PageRead>>>>,
}

impl PagesUnderWay {
    async fn read(
        &self,
        payer: UserId,
        shard: Shard,
        dialog: DialogId,
        range: Range,
        limit: u32,
        metrics: &Arc<Metrics>,
    ) -> Result<Arc<Page>, ShardDown> {
        let key = (shard.name().to_owned(), dialog, range, limit);
        let page = {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(page) = waiting.get(&key).and_then(WeakShared::upgrade) {
                metrics.history_shared.inc();
                page
            } else {
                metrics.history_reads.inc();
                let begins = Begins {
                    pages: self.clone(),
                    key: key.clone(),
                };
                let page = async move {
                    // The turn comes when a connection is free: until then others may join.
                    let turn = shard.turn(Some(payer)).await;
                    drop(begins);
                    let turn = turn?;
                    let page = shard.page(dialog, range, limit).await;
                    drop(turn);
                    page.map(Arc::new)
                };
                let page = page.boxed().shared();
                // Weak: when everyone who waits has gone, so has the read, and its turn.
                if let Some(weak) = page.downgrade() {
                    waiting.insert(key, weak);
                }
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

    fn page(seqs: &[u64], last_seq: u64) -> Page {
        let message = |seq: &u64| StoredMessage {
            seq: Seq::new(*seq),
            author: UserId::new(1).unwrap(),
            key: None,
            text: "x".into(),
            at: Timestamp::from_micros(0),
        };
        let slot = Some(SlotView {
            term: 1,
            state: SlotState::Owner,
            generation: 0,
            complete: true,
            peer: None,
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
    fn a_hole_in_what_was_stored_since_a_loss_is_noticed() {
        let since = 1 << 40;
        for (seqs, whole) in [
            (vec![3, 7, since + 1, since + 2], true),
            (vec![since + 4, since + 5], true),
            (vec![since + 4, since + 6], false),
            (vec![3, since + 1, since + 3], false),
        ] {
            let mut page = page(&seqs, *seqs.last().unwrap());
            page.slot = Some(SlotView {
                term: 1,
                state: SlotState::Owner,
                generation: 1,
                complete: false,
                peer: None,
            });
            assert_eq!(adds_up(&page, Range::Newest, 5), whole, "{seqs:?}");
        }
    }

    #[test]
    fn a_page_says_that_messages_may_be_missing_where_they_may_be() {
        let of = |generation: u32, n: u64| Seq::new((u64::from(generation) << 40) + n);
        let after = |generation, n| Range::After(of(generation, n));
        let (newest, before) = (Range::Newest, Range::Before(of(1, 9)));
        for (complete, range, first, more, lacks) in [
            (true, newest, None, false, false),
            (true, newest, Some(of(0, 1)), false, false),
            (false, newest, None, false, true),
            // What came since the loss is whole, but for its beginning.
            (false, newest, Some(of(1, 3)), true, false),
            (false, before, Some(of(1, 3)), true, false),
            (false, newest, Some(of(1, 1)), false, true),
            (false, after(1, 3), Some(of(1, 4)), false, false),
            (false, after(0, 7), Some(of(1, 1)), false, true),
            (false, after(0, 0), Some(of(0, 1)), true, true),
            (false, before, Some(of(0, 3)), true, true),
        ] {
            let slot = SlotView {
                term: 1,
                state: SlotState::Owner,
                generation: 1,
                complete,
                peer: None,
            };
            assert_eq!(
                may_lack(&slot, range, first, more),
                lacks,
                "{complete} {range:?} {first:?} {more}"
            );
        }
    }

    #[test]
    fn an_inbox_takes_each_slot_from_one_answer() {
        let set = |slots: &dyn Fn(Slot) -> bool| {
            let mut set = SlotSet::empty();
            Slot::all()
                .filter(|slot| slots(*slot))
                .for_each(|slot| assert!(set.insert(slot)));
            set
        };
        let dialog: DialogId = "7_42".parse().unwrap();
        let theirs = Slot::of(dialog);
        let row = |seq: u64| InboxRow {
            dialog,
            last_at: Timestamp::from_micros(seq as i64),
            last: page(&[seq], seq).messages[0].clone(),
            read_seq: Seq::ZERO,
            unread: 0,
        };
        let part = |owned: SlotSet, sealed: SlotSet, seq: u64| InboxPart {
            rows: vec![row(seq)],
            slots: Holding {
                owned,
                sealed,
                lacking: BTreeSet::new(),
            },
        };
        let (none, all) = (SlotSet::empty(), set(&|_| true));
        let (others, the_slot) = (set(&|slot| slot != theirs), set(&|slot| slot == theirs));
        for (parts, missing, rows) in [
            (vec![part(all.clone(), none.clone(), 5)], 0, vec![5]),
            // It has moved between the two answers, and both call themselves owners: one of them is taken.
            (
                vec![
                    part(all.clone(), none.clone(), 5),
                    part(the_slot.clone(), none.clone(), 6),
                ],
                0,
                vec![5],
            ),
            // Sealed, and taken over: the new owner's answer counts.
            (
                vec![
                    part(others.clone(), the_slot.clone(), 5),
                    part(the_slot.clone(), none.clone(), 6),
                ],
                0,
                vec![6],
            ),
            // Sealed, and not taken over yet.
            (vec![part(others.clone(), the_slot, 5)], 0, vec![5]),
            // Not owned by whoever answered: it is asked for again, and its rows here are none.
            (vec![part(others.clone(), none.clone(), 5)], 1, vec![]),
        ] {
            let mut gathered = Gathered::default();
            gathered.add(parts);
            assert_eq!(gathered.missing().count(), missing);
            assert_eq!(
                gathered
                    .rows
                    .iter()
                    .map(|row| row.last.seq.get())
                    .collect::<Vec<_>>(),
                rows
            );
        }
        let mut gathered = Gathered::default();
        gathered.add(vec![part(others, none.clone(), 5)]);
        gathered.add(vec![part(all, none, 6)]);
        assert_eq!(gathered.missing().count(), 0);
        assert_eq!(
            gathered.rows[0].last.seq.get(),
            6,
            "asked for again, and found"
        );
    }
}
