//! A shard's database: one contract, two stores. `tests/store_contract.rs` runs the same cases on
//! both.
//!
//! - [`Store`]: the calls of sends and reads. [`Control`]: those of resharding. No method decides
//!   anything; the rules are pure and are in [`crate::domain::ownership`] and [`BatchPlan`].
//! - [`MysqlStore`] and [`SqliteStore`]: the two stores.
//! - [`SeqCache`]: the last seqs that are remembered of a shard's dialogs, so that seqs can be
//!   assigned before it is asked.
//! - [`Shard`]: a store with its name, its time limits and its circuit breaker, as everything above
//!   uses it.

mod error;
mod meta;
mod served_slots;
mod records;
mod batch_plan;
mod seq_cache;
mod control;

mod migrate;
mod mysql;
mod sqlite;

mod read_queue;
mod shard;

pub use batch_plan::{BatchPlan, Draft, Expected, Head, KnownRoom, MemberRow, Row, StoredKey};
pub use control::{
    Chunk, Control, CoordinatorLock, CopiedMessage, DialogRow, Existing, Membership, PurgeOutcome,
    SlotSize, as_duplicate, fits, missing,
};
pub use error::StoreError;
pub use meta::{Acceptance, Meta, ShardIdentity};
pub use mysql::MysqlStore;
pub use read_queue::{Busy, Payer, ReadPermit, ReadQueue};
pub use records::{
    Appended, Audience, BatchResult, Body, Counts, DialogLastSeq, InboxCursor, InboxRow,
    LAST_SEQS_CAP, LastSeqs, LastSeqsOf, MarkOutcome, MemberState, Mismatch, NewMark, NewMessage,
    Page, Range, Receipt, RoomMember, RoomMembers, RoomView, ShardInbox, StoredMessage,
    TRANSACTION_BYTES, UNREAD_CAP, UNREAD_LOOK, WriteOutcome, size,
};
pub use seq_cache::SeqCache;
pub use served_slots::ServedSlots;
pub use shard::{Health, Shard, ShardError, Timing};
pub use sqlite::SqliteStore;

use crate::domain::dialog::{DialogId, Seq, UserId};
use crate::domain::slot::SlotSet;
use crate::domain::topology::Phase;
use async_trait::async_trait;
use error::corrupt;

/// What the service asks of a shard's database.
///
/// # Cancel safety
/// A future that is dropped may leave its transaction unfinished on its connection; the store never
/// lets a later transaction continue it.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Brings the tables up to this version's; several instances may do so at once.
    async fn migrate(&self) -> Result<(), StoreError>;

    /// A round trip on a fresh connection: whether the database is there at all.
    async fn ping(&self) -> Result<(), StoreError>;

    /// What the operator should know about the server's settings, one line each.
    async fn warnings(&self) -> Result<Vec<String>, StoreError>;

    /// The identity of this database; `None` if it was never initialized.
    async fn meta(&self) -> Result<Option<Meta>, StoreError>;

    /// Makes an empty database a shard: `meta`, and all 4096 slots, of which it owns `owned`, in
    /// one transaction. Returns the `meta` that is there afterwards, which is another's if another
    /// was faster.
    async fn initialize(&self, meta: &Meta, owned: &SlotSet) -> Result<Meta, StoreError>;

    /// Takes the topology of `version` and `hash` on to `phase`; nothing happens where it is there
    /// already or further.
    async fn advance(&self, version: u64, hash: &str, phase: Phase) -> Result<(), StoreError>;

    /// The slots this shard owns, and those it has sealed.
    async fn slots(&self, identity: &ShardIdentity) -> Result<ServedSlots, StoreError>;

    /// Stores a batch and moves the draft's read marks in one transaction as it was drafted, or
    /// nothing of it: the transaction compares the identity, the term of every slot, the last seq
    /// of every dialog that is expected to have one and the hour of its last message, and the keys.
    async fn append(
        &self,
        identity: &ShardIdentity,
        batch: &[NewMessage],
        draft: Draft,
    ) -> Result<Appended, StoreError>;

    /// Stores a batch in one transaction, and nothing of what is in slots of others. `suspect` says
    /// that some messages may be stored already, so that their keys are looked up first; otherwise
    /// they are looked up on a duplicate key.
    async fn write(
        &self,
        identity: &ShardIdentity,
        batch: &[NewMessage],
        suspect: bool,
    ) -> Result<BatchResult, StoreError>;

    /// Reads at most `limit` messages of a dialog in one snapshot.
    async fn page(
        &self,
        identity: &ShardIdentity,
        dialog: DialogId,
        range: Range,
        limit: u32,
    ) -> Result<Page, StoreError>;

    /// Reads at most `limit` dialogs of a user below `below` in one snapshot.
    async fn inbox(
        &self,
        identity: &ShardIdentity,
        user: UserId,
        below: Option<InboxCursor>,
        limit: u32,
    ) -> Result<ShardInbox, StoreError>;

    /// How far dialogs have come, in one snapshot.
    async fn last_seqs(
        &self,
        identity: &ShardIdentity,
        of: &LastSeqsOf,
    ) -> Result<LastSeqs, StoreError>;

    /// What a user is in a room, and what the room is, in one snapshot.
    async fn room(
        &self,
        identity: &ShardIdentity,
        room: DialogId,
        user: UserId,
    ) -> Result<RoomView, StoreError>;

    /// At most `limit` members of a room, by user above `after`; with `read_to`, only those who
    /// have read up to there.
    async fn room_members(
        &self,
        identity: &ShardIdentity,
        room: DialogId,
        after: Option<UserId>,
        read_to: Option<Seq>,
        limit: u32,
    ) -> Result<Vec<RoomMember>, StoreError>;

    /// Moves read marks forward in one transaction, each as [`NewMark::on`] says, and none in slots
    /// of others. A dialog and user are among them once.
    async fn mark_read(
        &self,
        identity: &ShardIdentity,
        marks: &[NewMark],
    ) -> Result<Vec<MarkOutcome>, StoreError>;

    /// The size of the slots that this shard owns. Reads it all: for operators, not for every
    /// request.
    async fn counts(&self) -> Result<Counts, StoreError>;
}

/// A shard's database: what sends and reads need of it, and what changes of the shard set need.
pub trait Database: Store + Control {}

impl<T: Store + Control> Database for T {}
