//! A shard's database: one contract, two stores. `tests/store_contract.rs` runs the same cases on both.
//!
//! - [`Store`]: what the service asks of a database. No method decides anything; the rules are pure and stand in
//!   [`crate::ownership`] and [`BatchPlan`].
//! - [`MysqlStore`] and [`SqliteStore`]: the two.
//! - [`Sequencer`]: what is remembered of a shard's dialogs, so that seqs can be given before it is asked.
//! - [`Shard`]: a store with its name, its time limits and its circuit, as everything above uses it.

mod control;
mod migrate;
mod mysql;
mod plan;
mod sequencer;
mod shard;
mod sqlite;
mod turns;

pub use control::{
    Acceptance, Control, CopiedMessage, DocRef, Head, Membership, Part, Purged, SlotSize, Standing,
    Turn, absent, as_duplicate, fits,
};
pub use mysql::MysqlStore;
pub use plan::{BatchPlan, Draft, Known, Row};
pub use sequencer::Sequencer;
pub use shard::{Shard, ShardDown, ShardMetrics, ShardState, Timing};
pub use sqlite::SqliteStore;
pub use turns::{Busy, Payer, Turn as ReadTurn, Turns};

use crate::dialog::{DialogId, Key, Seq, Text, TextHash, Timestamp, UserId};
use crate::ownership::{COMPLETE, History, SlotState, SlotView, Term};
use crate::ring::{SLOTS, Slot};
use async_trait::async_trait;
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Bytes of messages that one transaction takes, by [`size`], but for a single message: as hex they are twice as many in a
/// statement, and MariaDB takes statements of 16 MiB (`max_allowed_packet`).
pub const TRANSACTION_BYTES: usize = 1 << 20;

/// What a message with this text counts for in [`TRANSACTION_BYTES`].
#[must_use]
pub fn size(text: &str) -> usize {
    /// Key, dialog and numbers.
    const BESIDE_TEXT: usize = 100;
    text.len() + BESIDE_TEXT
}

/// A message on its way into a shard.
#[derive(Clone, Debug)]
pub struct NewMessage {
    /// The slot of `dialog`.
    pub slot: Slot,
    /// Where it belongs.
    pub dialog: DialogId,
    /// Who wrote it.
    pub author: UserId,
    /// The author's name for it.
    pub key: Key,
    /// What it says.
    pub text: Text,
    /// What a retry is compared by.
    pub hash: TextHash,
}

impl NewMessage {
    /// Works out slot and hash.
    #[must_use]
    pub fn new(dialog: DialogId, author: UserId, key: Key, text: Text) -> Self {
        Self {
            slot: Slot::of(dialog),
            dialog,
            author,
            key,
            hash: text.hash(),
            text,
        }
    }
}

/// A read mark on its way into a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewMark {
    /// The slot of `dialog`.
    pub slot: Slot,
    /// Where it belongs.
    pub dialog: DialogId,
    /// The user who has read.
    pub user: UserId,
    /// Up to here.
    pub seq: Seq,
}

impl NewMark {
    /// Works out the slot.
    #[must_use]
    pub fn new(dialog: DialogId, user: UserId, seq: Seq) -> Self {
        Self {
            slot: Slot::of(dialog),
            dialog,
            user,
            seq,
        }
    }

    /// What becomes of it, if the user has `read` so far and the dialog ends at `last_seq`: it goes forward only, and not beyond
    /// the last message.
    #[must_use]
    pub fn on(&self, read: Seq, last_seq: Seq) -> Marked {
        let seq = self.seq.min(last_seq).max(read);
        Marked::At {
            seq,
            moved: seq > read,
        }
    }
}

/// What became of one message of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// It is committed, here.
    Stored(Place),
    /// The same (dialog, author, key) with the same text was committed before, there.
    Repeat(Place),
    /// The same (dialog, author, key) was committed before with another text.
    KeyReused,
    /// This shard does not own the slot: nothing was written. `None` if it has no row for it.
    NotOwner(Option<SlotState>),
}

/// Where and when a message was stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its place in the dialog.
    pub seq: Seq,
    /// By the shard's clock.
    pub at: Timestamp,
}

/// What a write did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// What became of each message, in order.
    pub written: Vec<Written>,
    /// The terms of the slots that take writes here.
    pub terms: Vec<(Slot, Term)>,
    /// The shard's clock.
    pub now: Timestamp,
}

impl Receipt {
    /// Of a batch in these slots.
    #[must_use]
    pub fn new(written: Vec<Written>, slots: &HashMap<Slot, SlotView>, now: Timestamp) -> Self {
        let terms = slots
            .iter()
            .filter_map(|(slot, view)| Some((*slot, view.writable()?)))
            .collect();
        Self {
            written,
            terms,
            now,
        }
    }
}

/// What became of a draft.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Appended {
    /// All of it is committed.
    Stored {
        /// What became of each message, in order.
        written: Vec<Written>,
        /// What became of each read mark of the draft, in order.
        marked: Vec<Marked>,
        /// The shard's clock.
        now: Timestamp,
    },
    /// Nothing was written: something is not as the draft takes it to be.
    Unlike(Unlike),
}

/// What is not as a draft takes it to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unlike {
    /// The shard does not own a slot under the term, or is another shard.
    Term,
    /// A dialog has another last seq, or had no message yet in this hour.
    Head,
    /// A key is stored already.
    Key,
}

/// A message as a shard holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredMessage {
    /// Its place in the dialog.
    pub seq: Seq,
    /// Who wrote it.
    pub author: UserId,
    /// The author's name for it.
    pub key: Option<String>,
    /// What it says.
    pub text: String,
    /// When it was stored.
    pub at: Timestamp,
}

/// Which part of a dialog to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Range {
    /// The newest messages.
    Newest,
    /// The newest of those below.
    Before(Seq),
    /// The oldest of those above.
    After(Seq),
}

/// A range of a dialog, read in one snapshot together with the slot's row.
#[derive(Clone, Debug)]
pub struct Page {
    /// What the shard is to the slot; `None` if it has no row for it.
    pub slot: Option<SlotView>,
    /// The dialog's last seq; zero if there is no such dialog.
    pub last_seq: Seq,
    /// Ascending, at most as many as were asked for.
    pub messages: Vec<StoredMessage>,
}

/// A dialog of a user.
#[derive(Clone, Debug)]
pub struct InboxRow {
    /// Which.
    pub dialog: DialogId,
    /// When the last message was stored.
    pub last_at: Timestamp,
    /// The last message.
    pub last: StoredMessage,
    /// Up to where the user has read.
    pub read_seq: Seq,
    /// Messages of others above that, counted up to [`UNREAD_CAP`].
    pub unread: u32,
}

/// Unread messages are counted up to here, which is shown as "99+".
pub const UNREAD_CAP: u32 = 100;

/// Where an inbox page begins: strictly below (`last_at`, `dialog`), which is how inboxes are ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InboxCursor {
    /// Of the last row of the page before.
    pub last_at: Timestamp,
    /// Of the last row of the page before; breaks ties.
    pub dialog: DialogId,
}

/// One shard's part of an inbox, read in one snapshot together with the slots it answers for.
#[derive(Clone, Debug)]
pub struct InboxPart {
    /// Newest first, at most as many as were asked for.
    pub rows: Vec<InboxRow>,
    /// The slots that it answers for.
    pub slots: Holding,
}

/// Which dialogs' heads are asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeadsOf {
    /// These.
    Dialogs(Vec<DialogId>),
    /// Those of these users that something was said in lately, newest first and at most [`HEADS_CAP`].
    Users {
        /// Whose.
        users: Vec<UserId>,
        /// How lately, by the shard's clock.
        within: Duration,
    },
}

/// Dialogs that [`HeadsOf::Users`] gives at most.
pub const HEADS_CAP: u32 = 20_000;

/// How far a dialog has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DialogHead {
    /// Which.
    pub dialog: DialogId,
    /// Its last message.
    pub last_seq: Seq,
    /// When that was stored.
    pub last_at: Timestamp,
    /// How far its members have read.
    pub reads: Vec<(UserId, Seq)>,
}

impl DialogHead {
    /// Of a dialog that nothing was said in yet.
    #[must_use]
    pub fn nothing(dialog: DialogId) -> Self {
        Self {
            dialog,
            last_seq: Seq::ZERO,
            last_at: Timestamp::from_micros(0),
            reads: Vec::new(),
        }
    }
}

/// What a shard knows of the heads that were asked for, in one snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Of dialogs in slots that it answers for.
    pub heads: Vec<DialogHead>,
    /// The shard's clock.
    pub now: Timestamp,
    /// The slots that it answers for; for [`HeadsOf::Dialogs`], of those that were asked for.
    pub slots: Holding,
}

impl Heads {
    /// Puts together what was read a member at a time, in the order of dialogs.
    fn of(
        rows: Vec<(String, u64, i64, u64, u64)>,
        now: Timestamp,
        slots: Holding,
    ) -> Result<Self, StoreError> {
        let mut heads: Vec<DialogHead> = Vec::new();
        for (dialog, last_seq, last_at, user, read_seq) in rows {
            let dialog = dialog.parse().map_err(|_| corrupt("dialogs.dialog"))?;
            let user = UserId::new(user).map_err(|_| corrupt("members.user_id"))?;
            let read = (user, Seq::new(read_seq));
            match heads.last_mut().filter(|head| head.dialog == dialog) {
                Some(head) => head.reads.push(read),
                None => heads.push(DialogHead {
                    dialog,
                    last_seq: Seq::new(last_seq),
                    last_at: Timestamp::from_micros(last_at),
                    reads: vec![read],
                }),
            }
        }
        Ok(Self { heads, now, slots })
    }
}

/// The slots that a shard answers reads for, in one snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holding {
    /// Those it owned.
    pub owned: SlotSet,
    /// Those it had sealed: its answer counts until the target has one.
    pub sealed: SlotSet,
    /// Shards that were declared down and may hold dialogs of those it owned.
    pub lacking: BTreeSet<String>,
}

impl Holding {
    fn nothing() -> Self {
        Self {
            owned: SlotSet::empty(),
            sealed: SlotSet::empty(),
            lacking: BTreeSet::new(),
        }
    }

    /// Leaves only these slots.
    fn keep(&mut self, slots: impl Iterator<Item = Slot>) {
        let mut kept = SlotSet::empty();
        slots.for_each(|slot| {
            kept.insert(slot);
        });
        self.owned.retain(&kept);
        self.sealed.retain(&kept);
    }

    /// Adds slots that have the same state and history.
    fn add(&mut self, state: &str, history: &str, slots: &[u16]) -> Result<(), StoreError> {
        let set = match state.parse() {
            Ok(SlotState::Owner) => &mut self.owned,
            Ok(SlotState::Sealed) => &mut self.sealed,
            Ok(SlotState::None | SlotState::Incoming | SlotState::Fenced) | Err(_) => {
                return Err(corrupt("slots.state"));
            }
        };
        for slot in slots {
            set.insert(Slot::new(*slot).ok_or_else(|| corrupt("slots.slot"))?);
        }
        if history != COMPLETE {
            let history: History = history.parse().map_err(|_| corrupt("slots.history"))?;
            self.lacking.extend(history.missing);
        }
        Ok(())
    }
}

/// The slots that a shard answered for when they were last read, and the revision that they were read under: they are 4,096
/// rows, and change only when a slot changes hands.
#[derive(Default)]
struct HeldSlots(Mutex<Option<(u64, Holding)>>);

impl HeldSlots {
    /// What they are under a revision, if they were read under it.
    fn of(&self, revision: u64) -> Option<Holding> {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let held = held.as_ref().filter(|(of, _)| *of == revision);
        held.map(|(_, holding)| holding.clone())
    }

    fn keep(&self, revision: u64, holding: &Holding) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *held = Some((revision, holding.clone()));
    }
}

/// How a read mark ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marked {
    /// The user has read up to `seq`; not less than before, and not beyond the last message.
    At {
        /// Where the mark is.
        seq: Seq,
        /// Whether it was below before.
        moved: bool,
    },
    /// There is no such dialog yet, or the user is not in it.
    NoDialog,
    /// This shard does not own the slot: nothing was written.
    NotOwner(Option<SlotState>),
}

/// A set of slots.
#[derive(Clone, PartialEq, Eq)]
pub struct SlotSet([u64; SLOTS / 64]);

impl Default for SlotSet {
    fn default() -> Self {
        Self::empty()
    }
}

impl SlotSet {
    /// No slot.
    #[must_use]
    pub fn empty() -> Self {
        Self([0; SLOTS / 64])
    }

    /// Adds a slot; `false` if it was in already.
    pub fn insert(&mut self, slot: Slot) -> bool {
        let (word, bit) = (&mut self.0[slot.index() / 64], 1 << (slot.index() % 64));
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// Whether the slot is in.
    #[must_use]
    pub fn contains(&self, slot: Slot) -> bool {
        self.0[slot.index() / 64] & (1 << (slot.index() % 64)) != 0
    }

    /// Adds all of those.
    pub fn add(&mut self, others: &SlotSet) {
        for (word, other) in self.0.iter_mut().zip(others.0) {
            *word |= other;
        }
    }

    /// Whether every slot is in.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.0.iter().all(|word| *word == u64::MAX)
    }

    /// Leaves only those that are in `others` too.
    pub fn retain(&mut self, others: &SlotSet) {
        for (word, other) in self.0.iter_mut().zip(others.0) {
            *word &= other;
        }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// The slots, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Slot> {
        Slot::all().filter(|slot| self.contains(*slot))
    }
}

impl fmt::Debug for SlotSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SlotSet({} slots)", self.len())
    }
}

/// Who a database is, and the document it has accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meta {
    /// The same in all shards of a service.
    pub cluster_id: String,
    /// This shard's name, for ever.
    pub shard_name: String,
    /// How dialogs are placed; see [`crate::ring::ALGORITHM`].
    pub slot_algorithm: String,
    /// The document's version, from 1.
    pub doc_version: u64,
    /// How far it is carried out.
    pub doc_phase: Phase,
    /// [`crate::topology::Document::hash`].
    pub doc_hash: String,
    /// [`crate::topology::Document::to_json`].
    pub doc: String,
}

/// How far a document is carried out. Phases only go forward within a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Version 1, and not every shard may have it yet: an empty database is expected, and filled in.
    Founding,
    /// A shard was declared down: slots that nobody owns any more are being claimed, and no slot moves.
    Adjudicate,
    /// In force.
    Normal,
}

impl Phase {
    /// As it stands in the table.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Phase::Founding => "founding",
            Phase::Adjudicate => "adjudicate",
            Phase::Normal => "normal",
        }
    }

    fn parse(s: &str) -> Result<Self, StoreError> {
        match s {
            "founding" => Ok(Phase::Founding),
            "adjudicate" => Ok(Phase::Adjudicate),
            "normal" => Ok(Phase::Normal),
            other => Err(StoreError::Refused(format!(
                "unknown phase '{other}' in meta; it was written by a newer version"
            ))),
        }
    }
}

/// How much lies in a shard, for operators.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Slots it owns.
    pub slots: u64,
    /// Dialogs in them.
    pub dialogs: u64,
    /// Messages in those.
    pub messages: u64,
}

/// Who a store's data must belong to. Every transaction and every read compares it: a URL that leads to another database
/// than the one it led to before is noticed at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The service.
    pub cluster_id: String,
    /// The shard.
    pub shard_name: String,
}

/// Why a store did not do what it was asked. Texts name no URL, no password and no message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// A deadlock or a lock wait that took too long: nothing was written, the whole transaction may be repeated.
    #[error("conflict: {0}")]
    Conflict(String),
    /// No connection: nothing was written.
    #[error("unreachable: {0}")]
    Unreachable(String),
    /// No connection in time: nothing was written. The database is dead, or it is slow.
    #[error("unreachable: {0}")]
    Slow(String),
    /// All connections that this instance may have are in use: nothing was written, and it says nothing about the database.
    #[error("busy: {0}")]
    Busy(String),
    /// The connection broke in the middle: whether it was written is not known. Repeat it with the same keys.
    #[error("connection lost: {0}")]
    Lost(String),
    /// The database is not the one it should be.
    #[error("{0}")]
    WrongIdentity(String),
    /// The database said no, and why.
    #[error("refused: {0}")]
    Refused(String),
    /// The shard has another document than the step was decided by: nothing was done; look again.
    #[error("the shard has document {0}")]
    OtherDocument(DocRef),
}

/// The clock of this machine: that of every shard in a file, and what a session's beginning is measured by.
#[must_use]
pub fn now() -> Timestamp {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Timestamp::from_micros(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
}

fn corrupt(column: &str) -> StoreError {
    StoreError::Refused(format!("{column} holds what this version never writes"))
}

/// What the service asks of a shard's database.
///
/// # Cancel safety
/// A future that is dropped may leave its transaction unfinished on its connection; the store never lets a later
/// transaction continue it.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Brings the tables up to this version's; several instances may do so at once.
    async fn migrate(&self) -> Result<(), StoreError>;

    /// A round trip on a fresh connection: whether the database is there at all.
    async fn ping(&self) -> Result<(), StoreError>;

    /// What the operator should know about the server's settings, one line each.
    async fn warnings(&self) -> Result<Vec<String>, StoreError>;

    /// Who this is; `None` for a database that was never founded.
    async fn meta(&self) -> Result<Option<Meta>, StoreError>;

    /// Makes an empty database a shard: `meta`, and all 4096 slots, of which it owns `owned`, in one transaction. Returns
    /// the `meta` that is there afterwards, which is another's if another was faster.
    async fn found(&self, meta: &Meta, owned: &SlotSet) -> Result<Meta, StoreError>;

    /// Takes the document of `version` and `hash` on to `phase`; nothing happens where it is there already or further.
    async fn advance(&self, version: u64, hash: &str, phase: Phase) -> Result<(), StoreError>;

    /// The slots this shard owns, and those it has sealed.
    async fn slots(&self, identity: &Identity) -> Result<Holding, StoreError>;

    /// Stores a batch and moves the draft's read marks in one transaction as it was drafted, or nothing of it: the transaction compares
    /// the identity, the term of every slot, the last seq of every dialog that is expected to have one and the hour of its last message, and the keys.
    async fn append(
        &self,
        identity: &Identity,
        batch: &[NewMessage],
        draft: Draft,
    ) -> Result<Appended, StoreError>;

    /// Stores a batch in one transaction, and nothing of what is in slots of others. `suspect` says that some messages
    /// may be stored already, so that their keys are looked up first; otherwise they are looked up on a duplicate key.
    async fn write(
        &self,
        identity: &Identity,
        batch: &[NewMessage],
        suspect: bool,
    ) -> Result<Receipt, StoreError>;

    /// Reads at most `limit` messages of a dialog in one snapshot.
    async fn page(
        &self,
        identity: &Identity,
        dialog: DialogId,
        range: Range,
        limit: u32,
    ) -> Result<Page, StoreError>;

    /// Reads at most `limit` dialogs of a user below `below` in one snapshot.
    async fn inbox(
        &self,
        identity: &Identity,
        user: UserId,
        below: Option<InboxCursor>,
        limit: u32,
    ) -> Result<InboxPart, StoreError>;

    /// How far dialogs have come, in one snapshot.
    async fn dialog_heads(&self, identity: &Identity, of: &HeadsOf) -> Result<Heads, StoreError>;

    /// Moves read marks forward in one transaction, each as [`NewMark::on`] says, and none in slots of others. A dialog and user
    /// stand among them once.
    async fn mark_read(
        &self,
        identity: &Identity,
        marks: &[NewMark],
    ) -> Result<Vec<Marked>, StoreError>;

    /// How much lies in the slots that this shard owns. Reads it all: for operators, not for every request.
    async fn counts(&self) -> Result<Counts, StoreError>;
}

/// A shard's database: what sends and reads need of it, and what changes of the shard set need.
pub trait Database: Store + Control {}

impl<T: Store + Control> Database for T {}
