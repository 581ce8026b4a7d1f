//! What changes of the shard set ask of a database: topologies, rows of slots, copies, merges,
//! purges.
//!
//! Every step holds the lock of the row it changes and a shared lock on `meta`, and is only taken
//! under the topology that it was decided by. What a step does to a row is not decided here but by
//! [`SlotRow::after`].

use super::{Acceptance, Meta, ShardIdentity, StoreError, corrupt};
use crate::domain::dialog::{DialogId, Key, Seq, TextHash, Timestamp, UserId};
use crate::domain::ownership::{SlotRow, Step, StepRejected};
use crate::domain::room::Member;
use crate::domain::slot::Slot;
use crate::domain::topology::{Phase, TopologyRef};
use async_trait::async_trait;
use chat_wire::{Kind, Role};
use std::collections::BTreeMap;
use std::time::Duration;

/// A message as it is copied from shard to shard: every column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopiedMessage {
    /// The dialog.
    pub dialog: DialogId,
    /// Its place in it.
    pub seq: Seq,
    /// Who wrote it.
    pub author: UserId,
    /// The author's name for it; `None` for one that is a duplicate of another.
    pub key: Option<Key>,
    /// What a retry is compared by.
    pub hash: TextHash,
    /// What it is.
    pub kind: Kind,
    /// The seq of the entry that it is about.
    pub of: Option<Seq>,
    /// What it says.
    pub text: String,
    /// When it was stored.
    pub at: Timestamp,
    /// The seq of the message with the same key, where a shard that was wrongly declared down had
    /// stored it too.
    pub duplicate_of: Option<Seq>,
}

/// A dialog's row and its members, as they are copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DialogRow {
    /// Which.
    pub dialog: DialogId,
    /// Its last seq.
    pub last_seq: Seq,
    /// When that was stored.
    pub last_at: Timestamp,
    /// The seq of the entry that last changed the members of a room, or its settings.
    pub members_rev: Seq,
    /// The settings of a room, as they are stored.
    pub settings: Option<String>,
    /// Its members, by user, with those who have left.
    pub members: Vec<Membership>,
}

/// A user's row in a dialog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// Who.
    pub user: UserId,
    /// Read up to here.
    pub read_seq: Seq,
    /// Since when.
    pub joined_at: Timestamp,
    /// What the user is in a room: the row with the later entry is right.
    pub member: Member,
    /// The entry by which the user has left the room.
    pub until: Option<Seq>,
}

/// A part of a slot on its way: messages in key order, and the rows of their dialogs as far as
/// they are copied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chunk {
    /// In key order.
    pub messages: Vec<CopiedMessage>,
    /// In key order.
    pub dialogs: Vec<DialogRow>,
}

/// What a purge did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PurgeOutcome {
    /// So many rows are gone, and there may be more.
    Some(u64),
    /// Nothing is left.
    All,
    /// The slot left not long ago; reads may still be looking at it.
    TooEarly,
    /// The slot is not `none` here: nothing was touched.
    InUse,
}

/// The size of one slot of a shard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotSize {
    /// Dialogs.
    pub dialogs: u64,
    /// Messages.
    pub messages: u64,
    /// Bytes of their texts.
    pub bytes: u64,
}

/// The turn to change shards: with it an instance saves the others' work; safety never rests on it.
/// Dropped, it is free.
#[async_trait]
pub trait CoordinatorLock: Send + Sync {
    /// Says that we are still there.
    ///
    /// # Errors
    /// [`StoreError`]: another instance may have it now.
    async fn keep(&mut self) -> Result<(), StoreError>;
}

/// What changes of the shard set ask of a shard's database.
#[async_trait]
pub trait Control: Send + Sync + 'static {
    /// Offers a topology; see [`Meta::offered`]. With [`Acceptance::Accept`] it is in effect here,
    /// and this shard fenced if that was asked for, in one transaction.
    async fn accept(&self, identity: &ShardIdentity, new: &Meta) -> Result<Acceptance, StoreError>;

    /// The rows of all slots, or of `only` one, ascending. With `doc` they are evidence: read while
    /// the shard had that topology.
    async fn rows(
        &self,
        identity: &ShardIdentity,
        topology_ref: Option<&TopologyRef>,
        only: Option<Slot>,
    ) -> Result<Vec<SlotRow>, StoreError>;

    /// Takes a step with a slot's row, in one transaction under the locks of the topology and of
    /// the row, and returns the row after it.
    async fn step(
        &self,
        identity: &ShardIdentity,
        topology_ref: &TopologyRef,
        slot: Slot,
        step: &Step,
    ) -> Result<Result<SlotRow, StepRejected>, StoreError>;

    /// All dialogs of a slot, in key order, in one snapshot.
    async fn dialog_rows(
        &self,
        identity: &ShardIdentity,
        slot: Slot,
    ) -> Result<Vec<DialogRow>, StoreError>;

    /// At most `limit` messages of these dialogs of a slot, each above a seq, in key order.
    async fn messages_of(
        &self,
        identity: &ShardIdentity,
        slot: Slot,
        above: &[(DialogId, Seq)],
        limit: u32,
    ) -> Result<Vec<CopiedMessage>, StoreError>;

    /// Adds a part to a slot that is incoming from `from` under `term`: what is there already
    /// stays, last seqs and read marks only rise.
    async fn copy_in(
        &self,
        identity: &ShardIdentity,
        topology_ref: &TopologyRef,
        slot: Slot,
        from: &str,
        term: u64,
        chunk: &Chunk,
    ) -> Result<Result<(), StepRejected>, StoreError>;

    /// Adds a part of a shard that has returned to a slot that is owned here. A message whose key
    /// is stored already comes in as its duplicate. Every message of the part is there afterwards.
    async fn merge_in(
        &self,
        identity: &ShardIdentity,
        topology_ref: &TopologyRef,
        slot: Slot,
        chunk: &Chunk,
    ) -> Result<Result<(), StepRejected>, StoreError>;

    /// Slots that have rows here and have been `none` for at least `grace`.
    async fn leftovers(
        &self,
        identity: &ShardIdentity,
        grace: Duration,
    ) -> Result<Vec<Slot>, StoreError>;

    /// Deletes at most `limit` messages of a slot that is `none` here and was released at least
    /// `grace` ago.
    async fn purge(
        &self,
        identity: &ShardIdentity,
        slot: Slot,
        grace: Duration,
        limit: u32,
    ) -> Result<PurgeOutcome, StoreError>;

    /// The size of each slot. Reads it all: for operators, not for every request.
    async fn sizes(&self, identity: &ShardIdentity)
    -> Result<BTreeMap<Slot, SlotSize>, StoreError>;

    /// Refuses the tokens of users that were issued before a time, in seconds since 1970; a time
    /// only rises.
    async fn revoke(
        &self,
        identity: &ShardIdentity,
        revocations: &[(UserId, u64)],
    ) -> Result<(), StoreError>;

    /// All that is revoked.
    async fn revocations(
        &self,
        identity: &ShardIdentity,
    ) -> Result<BTreeMap<UserId, u64>, StoreError>;

    /// Takes the coordinator lock, if it is free.
    async fn try_lock_coordinator(&self) -> Result<Option<Box<dyn CoordinatorLock>>, StoreError>;
}

/// Whether a shard may take a step that was decided by `doc`: it has the same topology, and a step
/// of a failover is taken during one, any other when that is over.
///
/// # Errors
/// [`StoreError::OtherTopology`].
pub fn fits(
    there: &TopologyRef,
    topology_ref: &TopologyRef,
    step: Option<&Step>,
) -> Result<(), StoreError> {
    let phase = match step {
        Some(step) if step.is_failover() => Phase::Failover,
        Some(_) => Phase::Normal,
        None => topology_ref.phase,
    };
    if there == topology_ref && topology_ref.phase == phase {
        Ok(())
    } else {
        Err(StoreError::OtherTopology(there.clone()))
    }
}

/// The columns of a slot's row, as [`RawSlot`] has them.
pub(super) const SLOT_COLUMNS: &str =
    "state, term, generation, peer, next_term, activated, claimed_generation, history";

/// A slot's row in the table.
pub(super) type RawSlot = (
    String,
    u64,
    u32,
    Option<String>,
    Option<u64>,
    u64,
    u32,
    String,
);

pub(super) fn slot_row(raw: RawSlot) -> Result<SlotRow, StoreError> {
    let (state, term, generation, peer, next_term, activated, claimed_generation, history) = raw;
    Ok(SlotRow {
        state: state.parse().map_err(|_| corrupt("slots.state"))?,
        term,
        generation,
        peer,
        next_term,
        activated,
        claimed_generation,
        history: history.parse().map_err(|_| corrupt("slots.history"))?,
    })
}

/// The columns of a message, as [`RawMessage`] has them.
pub(super) const MESSAGE_COLUMNS: &str =
    "dialog, seq, author, client_key, text_hash, kind, of_seq, text, created_at, duplicate_of";

/// A message in the table.
pub(super) type RawMessage = (
    String,
    u64,
    u64,
    Option<Vec<u8>>,
    Vec<u8>,
    String,
    Option<u64>,
    String,
    i64,
    Option<u64>,
);

pub(super) fn copied(raw: RawMessage) -> Result<CopiedMessage, StoreError> {
    let (dialog, seq, author, key, hash, kind, of, text, at, duplicate_of) = raw;
    Ok(CopiedMessage {
        dialog: dialog.parse().map_err(|_| corrupt("messages.dialog"))?,
        seq: Seq::new(seq),
        author: UserId::new(author).map_err(|_| corrupt("messages.author"))?,
        key: key.map(key_of).transpose()?,
        hash: hash_of(hash)?,
        kind: kind.into(),
        of: of.map(Seq::new),
        text,
        at: Timestamp::from_micros(at),
        duplicate_of: duplicate_of.map(Seq::new),
    })
}

/// The columns of a member, as [`RawMember`] has them.
pub(super) const MEMBER_COLUMNS: &str =
    "dialog, user_id, read_seq, joined_at, role, rev, since_seq, joined_seq, until_seq";

/// A member in the table.
pub(super) type RawMember = (String, u64, u64, i64, String, u64, u64, u64, Option<u64>);

/// The name of the dialog, and the member.
pub(super) fn membership(raw: RawMember) -> Result<(String, Membership), StoreError> {
    let (dialog, user, read, joined_at, role, rev, since, joined, until) = raw;
    let membership = Membership {
        user: UserId::new(user).map_err(|_| corrupt("members.user_id"))?,
        read_seq: Seq::new(read),
        joined_at: Timestamp::from_micros(joined_at),
        member: Member {
            role: role_of(&role)?,
            rev: Seq::new(rev),
            since: Seq::new(since),
            joined: Seq::new(joined),
        },
        until: until.map(Seq::new),
    };
    Ok((dialog, membership))
}

pub(super) fn role_of(name: &str) -> Result<Role, StoreError> {
    let mut roles = [Role::Member, Role::Admin, Role::Owner].into_iter();
    let role = roles.find(|role| role.as_str() == name);
    role.ok_or_else(|| corrupt("members.role"))
}

pub(super) fn key_of(bytes: Vec<u8>) -> Result<Key, StoreError> {
    String::from_utf8(bytes)
        .ok()
        .and_then(|key| Key::new(key).ok())
        .ok_or_else(|| corrupt("messages.client_key"))
}

pub(super) fn hash_of(bytes: Vec<u8>) -> Result<TextHash, StoreError> {
    Ok(TextHash(
        bytes
            .try_into()
            .map_err(|_| corrupt("messages.text_hash"))?,
    ))
}

/// The author and key of the message with a seq: two copies of a message agree in this.
pub type Existing = BTreeMap<(DialogId, Seq), (UserId, TextHash)>;

/// Messages of `chunk` that are not in `there`.
///
/// # Errors
/// [`StoreError::Refused`] if another message has the seq of one of them. This must never happen.
pub fn missing<'a>(
    chunk: &'a Chunk,
    there: &Existing,
) -> Result<Vec<&'a CopiedMessage>, StoreError> {
    let mut missing = Vec::new();
    for message in &chunk.messages {
        match there.get(&(message.dialog, message.seq)) {
            None => missing.push(message),
            Some(found) if *found == (message.author, message.hash) => {}
            Some(_) => {
                return Err(StoreError::Refused(format!(
                    "another message has seq {} in dialog {}",
                    message.seq, message.dialog
                )));
            }
        }
    }
    Ok(missing)
}

/// A message whose key is stored at another place already comes in without it, and says where that
/// is.
#[must_use]
pub fn as_duplicate(message: &CopiedMessage, stored: Option<Seq>) -> CopiedMessage {
    match stored {
        Some(seq) => CopiedMessage {
            key: None,
            duplicate_of: Some(seq),
            ..message.clone()
        },
        None => message.clone(),
    }
}
