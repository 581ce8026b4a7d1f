//! A shard in memory, for simulations: whole transactions, one after the other, at the end of a
//! line that may be slow, break, or be dead. The contract of the stores is tested on it too, so it
//! behaves like the real ones.

use async_trait::async_trait;
use chat::domain::dialog::{DialogId, Key, Seq, Timestamp, UserId};
use chat::domain::ownership::{ReleaseStamp, SlotRow, SlotState, Step, StepRejected};
use chat::domain::room::{Member, Room, Settings};
use chat::domain::slot::{Slot, SlotSet};
use chat::domain::topology::{Phase, TopologyRef};
use chat::store::{
    Acceptance, Appended, BatchPlan, BatchResult, Chunk, Control, CoordinatorLock, CopiedMessage,
    Counts, DialogLastSeq, DialogRow, Draft, Existing, Head, InboxCursor, InboxRow, KnownRoom,
    LastSeqs, LastSeqsOf, MarkOutcome, MemberState, Membership, Meta, Mismatch, NewMark,
    NewMessage, Page, PurgeOutcome, Range, Receipt, RoomMember, RoomView, ServedSlots,
    ShardIdentity, ShardInbox, SlotSize, Store, StoreError, StoredKey, StoredMessage, UNREAD_CAP,
    UNREAD_LOOK, as_duplicate, fits, missing,
};
use chat_wire::Role;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::Instant;

/// The network between an instance and a shard. A fault concerns a transaction as a whole.
#[async_trait]
pub trait Link: Send + Sync + 'static {
    /// On the way there; after an error nothing was done.
    async fn there(&self) -> Result<(), StoreError>;

    /// On the way back; what was done stays done.
    async fn back(&self) -> Result<(), StoreError>;
}

/// A line on which nothing happens.
pub struct Calm;

#[async_trait]
impl Link for Calm {
    async fn there(&self) -> Result<(), StoreError> {
        Ok(())
    }

    async fn back(&self) -> Result<(), StoreError> {
        Ok(())
    }
}

/// What protects the messages, each of which a simulation can do without, to see that it notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guard {
    /// A write is stored by the owner of its slot only.
    OwnerOfWrites,
    /// A page says whether it comes from the owner.
    OwnerOfPages,
    /// An inbox says which slots it covers.
    OwnerOfInboxes,
    /// A key is looked up before it is stored.
    KeysOfWrites,
    /// Only what is not owned is purged.
    StateOfPurges,
    /// Who was declared down owns nothing when it returns.
    FenceOnReturn,
    /// What is merged is looked up by key.
    KeysOfMerges,
    /// A draft for a room is stored only with the members that it was worked out with.
    MembersOfAppends,
    /// A draft is stored only under the term of its slot that it was worked out with.
    TermOfAppends,
    /// A text ends at its first error, before COMMIT.
    StopAtError,
    /// A read mark that comes late does not move it back.
    MarksGoForward,
    /// A read mark is not beyond the last message.
    MarksEndAtTheLast,
}

/// A database server.
pub struct Server {
    data: Mutex<Data>,
    up: AtomicBool,
    begun: Instant,
    turns: AtomicU64,
}

/// Dialogs are kept by name, because that is the order in which databases have them.
#[derive(Default)]
struct Data {
    off: Option<Guard>,
    meta: Option<Meta>,
    slots: Vec<(SlotRow, Timestamp)>,
    dialogs: BTreeMap<(Slot, String), DialogData>,
    members: BTreeMap<(Slot, String, UserId), Membership>,
    messages: BTreeMap<(Slot, String, Seq), CopiedMessage>,
    keys: BTreeMap<(Slot, String, UserId, Key), Seq>,
    turn: Option<(u64, Instant)>,
    revocations: BTreeMap<UserId, u64>,
}

/// A row of dialogs.
#[derive(Clone, Debug)]
struct DialogData {
    last_seq: Seq,
    last_at: Timestamp,
    members_rev: Seq,
    settings: Option<String>,
}

/// How long the server keeps the coordinator lock of an instance that sends nothing.
const TURN: Duration = Duration::from_secs(5);

impl Server {
    pub fn new() -> Arc<Self> {
        Self::without(None)
    }

    /// A server that lacks a guard.
    pub fn without(off: Option<Guard>) -> Arc<Self> {
        Arc::new(Self {
            data: Mutex::new(Data {
                off,
                ..Data::default()
            }),
            up: AtomicBool::new(true),
            begun: Instant::now(),
            turns: AtomicU64::new(0),
        })
    }

    /// Whether it answers; what it has committed it keeps.
    pub fn set_up(&self, up: bool) {
        self.up.store(up, Ordering::Relaxed);
        if !up {
            self.data.lock().unwrap().turn = None;
        }
    }

    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_micros(1_000_000 + self.begun.elapsed().as_micros() as i64)
    }

    /// Every row of slots.
    pub fn rows(&self) -> Vec<SlotRow> {
        let data = self.data.lock().unwrap();
        data.slots.iter().map(|(row, _)| row.clone()).collect()
    }

    /// Who it is.
    pub fn meta(&self) -> Option<Meta> {
        self.data.lock().unwrap().meta.clone()
    }

    /// How far a user has read, if the dialog is here.
    pub fn read_mark(&self, dialog: DialogId, user: UserId) -> Option<Seq> {
        let data = self.data.lock().unwrap();
        let place = (Slot::of(dialog), dialog.to_string(), user);
        data.members.get(&place).map(|member| member.read_seq)
    }

    /// Sets the time of the last entry of a dialog, as a clock that is ahead would.
    pub fn set_last_at(&self, dialog: DialogId, at: Timestamp) {
        let mut data = self.data.lock().unwrap();
        let place = (Slot::of(dialog), dialog.to_string());
        data.dialogs.get_mut(&place).unwrap().last_at = at;
    }

    /// Every message there is.
    pub fn messages(&self) -> Vec<(Slot, CopiedMessage)> {
        let data = self.data.lock().unwrap();
        let messages = data.messages.iter();
        messages
            .map(|((slot, ..), message)| (*slot, message.clone()))
            .collect()
    }

    /// Slots that have a row in any table.
    pub fn slots_with_rows(&self) -> SlotSet {
        let data = self.data.lock().unwrap();
        let mut slots = SlotSet::empty();
        for (slot, _) in data.dialogs.keys() {
            slots.insert(*slot);
        }
        for (slot, ..) in data.members.keys() {
            slots.insert(*slot);
        }
        for (slot, ..) in data.messages.keys() {
            slots.insert(*slot);
        }
        slots
    }
}

/// One end of a line to a server.
pub struct MemoryStore {
    server: Arc<Server>,
    line: Arc<dyn Link>,
}

impl MemoryStore {
    pub fn new(server: Arc<Server>, line: Arc<dyn Link>) -> Self {
        Self { server, line }
    }

    /// A transaction. `work` changes nothing where it fails.
    async fn transact<T: Send>(
        &self,
        work: impl FnOnce(&mut Data, Timestamp) -> Result<T, StoreError> + Send,
    ) -> Result<T, StoreError> {
        self.line.there().await?;
        if !self.server.is_up() {
            return Err(StoreError::Unreachable("it is not there".into()));
        }
        let result = work(&mut self.server.data.lock().unwrap(), self.server.now());
        self.line.back().await?;
        result
    }
}

impl Data {
    fn is_off(&self, guard: Guard) -> bool {
        self.off == Some(guard)
    }

    fn check(&self, identity: &ShardIdentity) -> Result<&Meta, StoreError> {
        match &self.meta {
            Some(meta)
                if meta.cluster_id == identity.cluster_id
                    && meta.shard_name == identity.shard_name =>
            {
                Ok(meta)
            }
            Some(meta) => Err(StoreError::WrongIdentity(format!(
                "it is {} of cluster {}",
                meta.shard_name, meta.cluster_id
            ))),
            None => Err(StoreError::WrongIdentity("it is empty".into())),
        }
    }

    fn row(&self, slot: Slot) -> &SlotRow {
        &self.slots[slot.index()].0
    }

    fn holding(&self) -> ServedSlots {
        let mut holding = ServedSlots {
            owned: SlotSet::empty(),
            sealed: SlotSet::empty(),
            missing_from: Default::default(),
        };
        for (slot, (row, _)) in Slot::all().zip(&self.slots) {
            let state = if self.is_off(Guard::OwnerOfInboxes) {
                SlotState::Owner
            } else {
                row.state
            };
            match state {
                SlotState::Owner => holding.owned.insert(slot),
                SlotState::Sealed => holding.sealed.insert(slot),
                SlotState::None | SlotState::Incoming | SlotState::Fenced => continue,
            };
            holding
                .missing_from
                .extend(row.history.missing.iter().cloned());
        }
        holding
    }

    fn take(
        &mut self,
        identity: &ShardIdentity,
        topology_ref: &TopologyRef,
        slot: Slot,
        step: &Step,
        now: Timestamp,
    ) -> Result<Result<SlotRow, StepRejected>, StoreError> {
        fits(
            &self.check(identity)?.topology_ref(),
            topology_ref,
            Some(step),
        )?;
        let holds_rows = self.dialog_rows_of(slot).next().is_some();
        Ok(self.row(slot).after(step, holds_rows).inspect(|after| {
            let released = match step.release_stamp() {
                ReleaseStamp::Keep => self.slots[slot.index()].1,
                ReleaseStamp::Now => now,
                ReleaseStamp::Never => Timestamp::from_micros(0),
            };
            self.slots[slot.index()] = (after.clone(), released);
        }))
    }

    fn dialog_rows_of(&self, slot: Slot) -> impl Iterator<Item = DialogRow> {
        let of_slot = self.dialogs.range((slot, String::new())..);
        of_slot
            .take_while(move |((of, _), _)| *of == slot)
            .map(move |((_, name), row)| DialogRow {
                dialog: name.parse().unwrap(),
                last_seq: row.last_seq,
                last_at: row.last_at,
                members_rev: row.members_rev,
                settings: row.settings.clone(),
                members: self.members_of(slot, name),
            })
    }

    fn members_of(&self, slot: Slot, name: &str) -> Vec<Membership> {
        let first = UserId::new(1).unwrap();
        let from = self.members.range((slot, name.to_owned(), first)..);
        from.take_while(|((of, dialog, _), _)| *of == slot && dialog == name)
            .map(|(_, member)| member.clone())
            .collect()
    }

    /// The messages of a dialog above a seq.
    fn above<'a>(
        &'a self,
        slot: Slot,
        name: &'a str,
        seq: Seq,
    ) -> impl DoubleEndedIterator<Item = &'a CopiedMessage> {
        let (from, to) = (
            (slot, name.to_owned(), Seq::new(seq.get().saturating_add(1))),
            (slot, name.to_owned(), Seq::new(u64::MAX)),
        );
        self.messages.range(from..=to).map(|(_, message)| message)
    }

    fn insert(&mut self, slot: Slot, message: CopiedMessage) {
        let name = message.dialog.to_string();
        if self
            .messages
            .contains_key(&(slot, name.clone(), message.seq))
        {
            return;
        }
        if let Some(key) = &message.key {
            let key = (slot, name.clone(), message.author, key.clone());
            let doubles = self.is_off(Guard::KeysOfWrites) || self.is_off(Guard::KeysOfMerges);
            if self.keys.contains_key(&key) && !doubles {
                return;
            }
            self.keys.insert(key, message.seq);
        }
        self.messages.insert((slot, name, message.seq), message);
    }

    /// Stores what a batch becomes.
    fn store(&mut self, batch: &[NewMessage], plan: &BatchPlan, now: Timestamp) {
        for row in &plan.rows {
            let new = &batch[row.index];
            let message = CopiedMessage {
                dialog: new.dialog,
                seq: row.place.seq,
                author: new.author,
                key: Some(new.key.clone()),
                hash: new.hash,
                kind: new.body.kind(),
                of: None,
                text: row.text(batch).to_owned(),
                at: row.place.at,
                duplicate_of: None,
            };
            self.insert(new.slot, message);
        }
        self.raise_to(plan, now);
        for ((dialog, user), row) in &plan.members {
            let membership = Membership {
                user: *user,
                read_seq: row.member.joined,
                joined_at: now,
                member: row.member,
                until: row.until,
            };
            let place = (Slot::of(*dialog), dialog.to_string(), *user);
            let there = self.members.entry(place).or_insert(membership.clone());
            there.read_seq = there.read_seq.max(row.member.joined);
            (there.member, there.until) = (row.member, row.until);
        }
        for (dialog, room) in plan.changed_rooms() {
            let place = (Slot::of(dialog), dialog.to_string());
            let there = self.dialogs.get_mut(&place).unwrap();
            there.members_rev = room.rev;
            there.settings = Some(room.settings.to_text());
        }
    }

    /// What is known of a dialog.
    fn head(&self, slot: Slot, dialog: DialogId) -> Head {
        let name = dialog.to_string();
        let Some(row) = self.dialogs.get(&(slot, name.clone())) else {
            return Head::nothing();
        };
        let members = self.members_of(slot, &name).into_iter();
        let members = members.filter(|member| member.until.is_none());
        let room = (dialog.is_room() && row.last_seq > Seq::ZERO).then(|| Room {
            rev: row.members_rev,
            settings: Settings::parse(row.settings.as_deref()),
            members: members.map(|member| (member.user, member.member)).collect(),
        });
        Head {
            last_seq: row.last_seq,
            last_at: row.last_at,
            room: room.map(KnownRoom::Read),
        }
    }

    /// Moves a read mark in a slot that is owned.
    fn mark_read(&mut self, mark: &NewMark) -> MarkOutcome {
        let name = mark.dialog.to_string();
        let last = self.dialogs.get(&(mark.slot, name.clone()));
        let last = last.map_or(Seq::ZERO, |row| row.last_seq);
        let (backward, beyond) = (
            self.is_off(Guard::MarksGoForward),
            self.is_off(Guard::MarksEndAtTheLast),
        );
        let member = self.members.get_mut(&(mark.slot, name, mark.user));
        let Some(member) = member.filter(|member| member.until.is_none()) else {
            return MarkOutcome::NoDialog;
        };
        let read = if backward { Seq::ZERO } else { member.read_seq };
        let marked = mark.on(read, if beyond { mark.seq } else { last });
        if let MarkOutcome::At { seq, moved: true } = marked {
            member.read_seq = seq;
        }
        marked
    }

    fn raise_to(&mut self, plan: &BatchPlan, now: Timestamp) {
        for ((slot, dialog), place) in &plan.last_seqs {
            let member = |user| Membership {
                user,
                read_seq: Seq::ZERO,
                joined_at: now,
                member: Member {
                    role: Role::Member,
                    rev: Seq::ZERO,
                    since: Seq::ZERO,
                    joined: Seq::ZERO,
                },
                until: None,
            };
            let head = DialogRow {
                dialog: *dialog,
                last_seq: place.seq,
                last_at: place.at,
                members_rev: Seq::ZERO,
                settings: None,
                members: dialog.users().map(member).collect(),
            };
            self.raise(*slot, &head);
        }
    }

    fn raise(&mut self, slot: Slot, head: &DialogRow) {
        let name = head.dialog.to_string();
        let there = self
            .dialogs
            .entry((slot, name.clone()))
            .or_insert(DialogData {
                last_seq: head.last_seq,
                last_at: head.last_at,
                members_rev: head.members_rev,
                settings: head.settings.clone(),
            });
        there.last_seq = there.last_seq.max(head.last_seq);
        there.last_at = there.last_at.max(head.last_at);
        if head.members_rev > there.members_rev {
            there.members_rev = head.members_rev;
            there.settings.clone_from(&head.settings);
        }
        for member in &head.members {
            let there = self
                .members
                .entry((slot, name.clone(), member.user))
                .or_insert(member.clone());
            there.read_seq = there.read_seq.max(member.read_seq);
            there.joined_at = there.joined_at.min(member.joined_at);
            if member.member.rev > there.member.rev {
                (there.member, there.until) = (member.member, member.until);
            }
        }
    }

    fn standing(&self, slot: Slot, messages: &[CopiedMessage]) -> Existing {
        let found = messages.iter().filter_map(|message| {
            let there = self
                .messages
                .get(&(slot, message.dialog.to_string(), message.seq))?;
            Some(((message.dialog, message.seq), (there.author, there.hash)))
        });
        found.collect()
    }

    fn key_of(&self, slot: Slot, message: &NewMessage) -> Option<StoredKey> {
        let name = message.dialog.to_string();
        let key = (slot, name.clone(), message.author, message.key.clone());
        let seq = *self.keys.get(&key)?;
        let stored = self.messages.get(&(slot, name, seq))?;
        Some(StoredKey {
            place: Receipt { seq, at: stored.at },
            hash: stored.hash,
        })
    }
}

fn room_member(row: &Membership) -> RoomMember {
    RoomMember {
        user: row.user,
        role: row.member.role,
        since: row.member.since,
        until: row.until,
        read: row.read_seq,
    }
}

fn stored(message: &CopiedMessage) -> StoredMessage {
    StoredMessage {
        seq: message.seq,
        author: message.author,
        key: message.key.as_ref().map(|key| key.as_str().to_owned()),
        kind: message.kind.clone(),
        of: message.of,
        text: message.text.clone(),
        at: message.at,
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn migrate(&self) -> Result<(), StoreError> {
        self.transact(|_, _| Ok(())).await
    }

    async fn ping(&self) -> Result<(), StoreError> {
        self.transact(|_, _| Ok(())).await
    }

    async fn warnings(&self) -> Result<Vec<String>, StoreError> {
        Ok(Vec::new())
    }

    async fn meta(&self) -> Result<Option<Meta>, StoreError> {
        self.transact(|data, _| Ok(data.meta.clone())).await
    }

    async fn initialize(&self, meta: &Meta, owned: &SlotSet) -> Result<Meta, StoreError> {
        let (meta, owned) = (meta.clone(), owned.clone());
        self.transact(move |data, _| {
            if data.meta.is_none() {
                let row = |slot| {
                    (
                        SlotRow::initial(owned.contains(slot)),
                        Timestamp::from_micros(0),
                    )
                };
                data.slots = Slot::all().map(row).collect();
            }
            Ok(data.meta.get_or_insert(meta).clone())
        })
        .await
    }

    async fn advance(&self, version: u64, hash: &str, phase: Phase) -> Result<(), StoreError> {
        let hash = hash.to_owned();
        self.transact(move |data, _| {
            if let Some(meta) = &mut data.meta
                && (
                    meta.topology_version,
                    &meta.topology_hash,
                    meta.topology_phase,
                ) == (version, &hash, Phase::Initializing)
                && phase == Phase::Normal
            {
                meta.topology_phase = phase;
            }
            Ok(())
        })
        .await
    }

    async fn slots(&self, identity: &ShardIdentity) -> Result<ServedSlots, StoreError> {
        self.transact(|data, _| {
            data.check(identity)?;
            Ok(data.holding())
        })
        .await
    }

    async fn append(
        &self,
        identity: &ShardIdentity,
        batch: &[NewMessage],
        draft: Draft,
    ) -> Result<Appended, StoreError> {
        self.transact(|data, now| {
            let mismatch = |what| Ok(Appended::Mismatch(what));
            if data.check(identity).is_err() {
                return mismatch(Mismatch::Term);
            }
            for (slot, term) in &draft.terms {
                let row = data.row(*slot);
                let sealed = data.is_off(Guard::OwnerOfWrites) && row.state == SlotState::Sealed;
                let owns = sealed || row.state.takes_writes();
                if !owns || (row.term != term.number && !data.is_off(Guard::TermOfAppends)) {
                    return mismatch(Mismatch::Term);
                }
            }
            let mut last = BTreeMap::new();
            for ((slot, dialog), planned) in &draft.plan.last_seqs {
                let there = data.dialogs.get(&(*slot, dialog.to_string()));
                let nothing = (Seq::ZERO, Timestamp::from_micros(0), Seq::ZERO);
                let (seq, at, rev) =
                    there.map_or(nothing, |row| (row.last_seq, row.last_at, row.members_rev));
                if at > now {
                    return mismatch(Mismatch::LastSeq);
                }
                match draft.expected.get(dialog) {
                    Some(expected)
                        if expected.last_seq != seq
                            || at.hour() != now.hour()
                            || (expected.members_rev() != rev
                                && !data.is_off(Guard::MembersOfAppends)) =>
                    {
                        return mismatch(Mismatch::LastSeq);
                    }
                    Some(_) => {}
                    None => {
                        let beginning = Seq::beginning(draft.terms[slot].generation);
                        let count = draft.count(*slot, planned.seq);
                        last.insert(*dialog, Seq::new(seq.max(beginning).get() + count));
                    }
                }
            }
            let marks = draft.marks.clone();
            let written = draft.settle(batch, now, &last.into_iter().collect());
            let plan = BatchPlan::of(batch, written.clone());
            // What a database's unique keys refuse.
            let taken = plan.rows.iter().any(|row| {
                let new = &batch[row.index];
                let place = (new.slot, new.dialog.to_string(), row.place.seq);
                let known = data.key_of(new.slot, new).is_some();
                data.messages.contains_key(&place) || (known && !data.is_off(Guard::KeysOfWrites))
            });
            if taken {
                if data.is_off(Guard::StopAtError) {
                    // The last seqs were raised before, and COMMIT follows.
                    data.raise_to(&plan, now);
                }
                return mismatch(Mismatch::Key);
            }
            data.store(batch, &plan, now);
            let marked = marks.iter().map(|mark| data.mark_read(mark)).collect();
            Ok(Appended::Stored {
                written,
                marked,
                now,
            })
        })
        .await
    }

    async fn write(
        &self,
        identity: &ShardIdentity,
        batch: &[NewMessage],
        _suspect: bool,
    ) -> Result<BatchResult, StoreError> {
        self.transact(|data, now| {
            data.check(identity)?;
            let slots = batch
                .iter()
                .map(|message| {
                    let mut view = data.row(message.slot).view();
                    if data.is_off(Guard::OwnerOfWrites) && view.state == SlotState::Sealed {
                        view.state = SlotState::Owner;
                    }
                    (message.slot, view)
                })
                .collect();
            let heads = batch
                .iter()
                .map(|entry| (entry.dialog, data.head(entry.slot, entry.dialog)));
            let keys = batch.iter().filter_map(|message| {
                let name = (message.dialog, message.author, message.key.clone());
                let known = data.key_of(message.slot, message)?;
                (!data.is_off(Guard::KeysOfWrites)).then_some((name, known))
            });
            let (heads, keys) = (heads.collect(), keys.collect());
            let plan = BatchPlan::new(batch, &slots, &heads, &keys, now);
            data.store(batch, &plan, now);
            Ok(plan.result(&slots, now))
        })
        .await
    }

    async fn page(
        &self,
        identity: &ShardIdentity,
        dialog: DialogId,
        range: Range,
        limit: u32,
    ) -> Result<Page, StoreError> {
        self.transact(|data, _| {
            data.check(identity)?;
            let (slot, name) = (Slot::of(dialog), dialog.to_string());
            let limit = limit as usize;
            let mut messages: Vec<StoredMessage> = match range {
                Range::Newest => data
                    .above(slot, &name, Seq::ZERO)
                    .rev()
                    .take(limit)
                    .map(stored)
                    .collect(),
                Range::Before(before) => data
                    .above(slot, &name, Seq::ZERO)
                    .rev()
                    .skip_while(|message| message.seq >= before)
                    .take(limit)
                    .map(stored)
                    .collect(),
                Range::After(after) => data
                    .above(slot, &name, after)
                    .take(limit)
                    .map(stored)
                    .collect(),
            };
            messages.sort_by_key(|message| message.seq);
            let mut view = data.row(slot).view();
            if data.is_off(Guard::OwnerOfPages) {
                view.state = SlotState::Owner;
            }
            Ok(Page {
                slot: Some(view),
                last_seq: data
                    .dialogs
                    .get(&(slot, name))
                    .map_or(Seq::ZERO, |row| row.last_seq),
                messages,
            })
        })
        .await
    }

    async fn inbox(
        &self,
        identity: &ShardIdentity,
        user: UserId,
        below: Option<InboxCursor>,
        limit: u32,
    ) -> Result<ShardInbox, StoreError> {
        self.transact(|data, _| {
            data.check(identity)?;
            let below = below.map(|below| (below.last_at, below.dialog.to_string()));
            let mut rows = Vec::new();
            for ((slot, name, member), membership) in &data.members {
                let Some(row) = data.dialogs.get(&(*slot, name.clone())) else {
                    continue;
                };
                let (last_seq, last_at) = (&row.last_seq, &row.last_at);
                let serves = data.row(*slot).state.answers_reads() && membership.until.is_none();
                let matches = below
                    .as_ref()
                    .is_none_or(|below| (last_at, name) < (&below.0, &below.1));
                let last = data.messages.get(&(*slot, name.clone(), *last_seq));
                if let Some(last) = last.filter(|_| *member == user && serves && matches) {
                    let unread = data
                        .above(*slot, name, membership.read_seq)
                        .take(UNREAD_LOOK as usize)
                        .filter(|entry| entry.author != user && entry.kind.is_text());
                    rows.push(InboxRow {
                        dialog: name.parse().unwrap(),
                        last_at: *last_at,
                        last: stored(last),
                        read_seq: membership.read_seq,
                        unread: unread.take(UNREAD_CAP as usize).count() as u32,
                        title: Settings::parse(row.settings.as_deref()).title,
                    });
                }
            }
            rows.sort_by_key(|row| std::cmp::Reverse((row.last_at, row.dialog.to_string())));
            rows.truncate(limit as usize);
            Ok(ShardInbox {
                rows,
                slots: data.holding(),
            })
        })
        .await
    }

    async fn last_seqs(
        &self,
        identity: &ShardIdentity,
        of: &LastSeqsOf,
    ) -> Result<LastSeqs, StoreError> {
        self.transact(|data, now| {
            data.check(identity)?;
            let mut slots = data.holding();
            let mut last_seqs = Vec::new();
            for ((slot, name), row) in &data.dialogs {
                let dialog: DialogId = name.parse().unwrap();
                let asked = |member: &Membership| of.users().contains(&member.user);
                let members = data.members_of(*slot, name);
                let members: Vec<MemberState> = members
                    .iter()
                    .filter(|member| !dialog.is_room() || asked(member))
                    .map(|member| MemberState {
                        user: member.user,
                        read: member.read_seq,
                        since: member.member.since,
                        until: member.until,
                    })
                    .collect();
                let matches = match of {
                    LastSeqsOf::Dialogs { dialogs, .. } => dialogs.contains(&dialog),
                    LastSeqsOf::Users { users, within } => {
                        members.iter().any(|member| users.contains(&member.user))
                            && row.last_at.micros() >= now.micros() - within.as_micros() as i64
                    }
                };
                let answers = data.row(*slot).state.answers_reads();
                // As in the databases, which join the members.
                if matches && row.last_seq > Seq::ZERO && answers && !members.is_empty() {
                    last_seqs.push(DialogLastSeq {
                        dialog,
                        last_seq: row.last_seq,
                        last_at: row.last_at,
                        members,
                    });
                }
            }
            if let LastSeqsOf::Dialogs { dialogs, .. } = of {
                let mut asked = SlotSet::empty();
                dialogs.iter().for_each(|dialog| {
                    asked.insert(Slot::of(*dialog));
                });
                slots.owned.retain(&asked);
                slots.sealed.retain(&asked);
            }
            Ok(LastSeqs {
                dialogs: last_seqs,
                now,
                slots,
            })
        })
        .await
    }

    async fn room(
        &self,
        identity: &ShardIdentity,
        room: DialogId,
        user: UserId,
    ) -> Result<RoomView, StoreError> {
        self.transact(|data, _| {
            data.check(identity)?;
            let (slot, name) = (Slot::of(room), room.to_string());
            let row = data.dialogs.get(&(slot, name.clone()));
            let members = data.members_of(slot, &name);
            let settings = row.and_then(|row| row.settings.as_deref());
            Ok(RoomView {
                slot: Some(data.row(slot).view()),
                last_seq: row.map_or(Seq::ZERO, |row| row.last_seq),
                settings: Settings::parse(settings),
                members: members.iter().filter(|it| it.until.is_none()).count() as u64,
                me: members.iter().find(|it| it.user == user).map(room_member),
            })
        })
        .await
    }

    async fn room_members(
        &self,
        identity: &ShardIdentity,
        room: DialogId,
        after: Option<UserId>,
        read_to: Option<Seq>,
        limit: u32,
    ) -> Result<Vec<RoomMember>, StoreError> {
        self.transact(|data, _| {
            data.check(identity)?;
            let members = data.members_of(Slot::of(room), &room.to_string());
            let there = members.iter().filter(|it| {
                it.until.is_none()
                    && after.is_none_or(|after| it.user > after)
                    && it.read_seq >= read_to.unwrap_or_default()
            });
            Ok(there.take(limit as usize).map(room_member).collect())
        })
        .await
    }

    async fn mark_read(
        &self,
        identity: &ShardIdentity,
        marks: &[NewMark],
    ) -> Result<Vec<MarkOutcome>, StoreError> {
        self.transact(|data, _| {
            data.check(identity)?;
            let marked = marks.iter().map(|mark| {
                let state = data.row(mark.slot).state;
                if state.takes_writes() {
                    data.mark_read(mark)
                } else {
                    MarkOutcome::NotOwner(Some(state))
                }
            });
            Ok(marked.collect())
        })
        .await
    }

    async fn counts(&self) -> Result<Counts, StoreError> {
        self.transact(|data, _| {
            let owned = |slot: Slot| data.row(slot).state == SlotState::Owner;
            Ok(Counts {
                slots: Slot::all().filter(|slot| owned(*slot)).count() as u64,
                dialogs: data
                    .dialogs
                    .iter()
                    .filter(|((slot, _), row)| owned(*slot) && row.last_seq > Seq::ZERO)
                    .count() as u64,
                messages: data
                    .messages
                    .keys()
                    .filter(|(slot, ..)| owned(*slot))
                    .count() as u64,
            })
        })
        .await
    }
}

#[async_trait]
impl Control for MemoryStore {
    async fn accept(&self, identity: &ShardIdentity, new: &Meta) -> Result<Acceptance, StoreError> {
        self.transact(|data, _| {
            let acceptance = data.check(identity)?.offered(new)?;
            if let Acceptance::Accept { fence } = acceptance {
                if fence && !data.is_off(Guard::FenceOnReturn) {
                    for (row, _) in &mut data.slots {
                        *row = row.fenced();
                    }
                }
                data.meta = Some(Meta {
                    topology_version: new.topology_version,
                    topology_phase: new.topology_phase,
                    topology_hash: new.topology_hash.clone(),
                    topology: new.topology.clone(),
                    ..data.meta.clone().unwrap()
                });
            }
            Ok(acceptance)
        })
        .await
    }

    async fn rows(
        &self,
        identity: &ShardIdentity,
        topology_ref: Option<&TopologyRef>,
        only: Option<Slot>,
    ) -> Result<Vec<SlotRow>, StoreError> {
        self.transact(|data, _| {
            let there = data.check(identity)?.topology_ref();
            if let Some(topology_ref) = topology_ref {
                fits(&there, topology_ref, None)?;
            }
            Ok(match only {
                Some(slot) => vec![data.row(slot).clone()],
                None => data.slots.iter().map(|(row, _)| row.clone()).collect(),
            })
        })
        .await
    }

    async fn step(
        &self,
        identity: &ShardIdentity,
        topology_ref: &TopologyRef,
        slot: Slot,
        step: &Step,
    ) -> Result<Result<SlotRow, StepRejected>, StoreError> {
        self.transact(|data, now| data.take(identity, topology_ref, slot, step, now))
            .await
    }

    async fn dialog_rows(
        &self,
        identity: &ShardIdentity,
        slot: Slot,
    ) -> Result<Vec<DialogRow>, StoreError> {
        self.transact(|data, _| {
            data.check(identity)?;
            Ok(data.dialog_rows_of(slot).collect())
        })
        .await
    }

    async fn messages_of(
        &self,
        identity: &ShardIdentity,
        slot: Slot,
        above: &[(DialogId, Seq)],
        limit: u32,
    ) -> Result<Vec<CopiedMessage>, StoreError> {
        self.transact(|data, _| {
            data.check(identity)?;
            let mut above: Vec<(String, Seq)> = above
                .iter()
                .map(|(dialog, seq)| (dialog.to_string(), *seq))
                .collect();
            above.sort();
            let messages = above
                .iter()
                .flat_map(|(name, seq)| data.above(slot, name, *seq));
            Ok(messages.take(limit as usize).cloned().collect())
        })
        .await
    }

    async fn copy_in(
        &self,
        identity: &ShardIdentity,
        topology_ref: &TopologyRef,
        slot: Slot,
        from: &str,
        term: u64,
        chunk: &Chunk,
    ) -> Result<Result<(), StepRejected>, StoreError> {
        self.transact(|data, _| {
            fits(&data.check(identity)?.topology_ref(), topology_ref, None)?;
            if !data.row(slot).is_incoming(from, term) {
                return Ok(Err(StepRejected(data.row(slot).clone())));
            }
            for message in &chunk.messages {
                data.insert(slot, message.clone());
            }
            for head in &chunk.dialogs {
                data.raise(slot, head);
            }
            Ok(Ok(()))
        })
        .await
    }

    async fn merge_in(
        &self,
        identity: &ShardIdentity,
        topology_ref: &TopologyRef,
        slot: Slot,
        chunk: &Chunk,
    ) -> Result<Result<(), StepRejected>, StoreError> {
        self.transact(|data, now| {
            let new: Vec<CopiedMessage> = missing(chunk, &data.standing(slot, &chunk.messages))?
                .into_iter()
                .map(|message| {
                    let stored = message.key.as_ref().and_then(|key| {
                        let name = message.dialog.to_string();
                        data.keys.get(&(slot, name, message.author, key.clone()))
                    });
                    let stored = stored.filter(|_| !data.is_off(Guard::KeysOfMerges));
                    as_duplicate(message, stored.copied())
                })
                .collect();
            if let Err(refused) = data.take(identity, topology_ref, slot, &Step::MergedIn, now)? {
                return Ok(Err(refused));
            }
            for message in new {
                data.insert(slot, message);
            }
            for head in &chunk.dialogs {
                data.raise(slot, head);
            }
            Ok(Ok(()))
        })
        .await
    }

    async fn leftovers(
        &self,
        identity: &ShardIdentity,
        grace: Duration,
    ) -> Result<Vec<Slot>, StoreError> {
        self.transact(|data, now| {
            data.check(identity)?;
            let left = |slot: &Slot| {
                let any = data.is_off(Guard::StateOfPurges);
                let released = data.slots[slot.index()].1.micros();
                (any || data.row(*slot).state == SlotState::None)
                    && released + grace.as_micros() as i64 <= now.micros()
                    && data.dialog_rows_of(*slot).next().is_some()
            };
            Ok(Slot::all().filter(left).collect())
        })
        .await
    }

    async fn purge(
        &self,
        identity: &ShardIdentity,
        slot: Slot,
        grace: Duration,
        limit: u32,
    ) -> Result<PurgeOutcome, StoreError> {
        self.transact(|data, now| {
            data.check(identity)?;
            let (row, released) = &data.slots[slot.index()];
            if row.state != SlotState::None && !data.is_off(Guard::StateOfPurges) {
                return Ok(PurgeOutcome::InUse);
            }
            if released.micros() + grace.as_micros() as i64 > now.micros() {
                return Ok(PurgeOutcome::TooEarly);
            }
            let places: Vec<_> = data
                .messages
                .range((slot, String::new(), Seq::ZERO)..)
                .take_while(|((of, ..), _)| *of == slot)
                .take(limit as usize)
                .map(|(place, _)| place.clone())
                .collect();
            for place in &places {
                if let Some(CopiedMessage {
                    key: Some(key),
                    author,
                    ..
                }) = data.messages.remove(place)
                {
                    data.keys.remove(&(slot, place.1.clone(), author, key));
                }
            }
            if places.len() as u64 == u64::from(limit) {
                return Ok(PurgeOutcome::Some(u64::from(limit)));
            }
            data.members.retain(|(of, ..), _| *of != slot);
            data.dialogs.retain(|(of, _), _| *of != slot);
            Ok(PurgeOutcome::All)
        })
        .await
    }

    async fn sizes(
        &self,
        identity: &ShardIdentity,
    ) -> Result<BTreeMap<Slot, SlotSize>, StoreError> {
        self.transact(|data, _| {
            data.check(identity)?;
            let mut sizes = BTreeMap::<Slot, SlotSize>::new();
            for (slot, _) in data.dialogs.keys() {
                sizes.entry(*slot).or_default().dialogs += 1;
            }
            for ((slot, ..), message) in &data.messages {
                let size = sizes.entry(*slot).or_default();
                size.messages += 1;
                size.bytes += message.text.len() as u64;
            }
            Ok(sizes)
        })
        .await
    }

    async fn revoke(
        &self,
        identity: &ShardIdentity,
        revocations: &[(UserId, u64)],
    ) -> Result<(), StoreError> {
        self.transact(|data, _| {
            data.check(identity)?;
            for (user, time) in revocations {
                let known = data.revocations.entry(*user).or_default();
                *known = (*known).max(*time);
            }
            Ok(())
        })
        .await
    }

    async fn revocations(
        &self,
        identity: &ShardIdentity,
    ) -> Result<BTreeMap<UserId, u64>, StoreError> {
        self.transact(|data, _| {
            data.check(identity)?;
            Ok(data.revocations.clone())
        })
        .await
    }

    async fn try_lock_coordinator(&self) -> Result<Option<Box<dyn CoordinatorLock>>, StoreError> {
        let id = self.server.turns.fetch_add(1, Ordering::Relaxed);
        let taken = self
            .transact(|data, _| {
                let now = Instant::now();
                let free = data.turn.is_none_or(|(_, until)| until <= now);
                if free {
                    data.turn = Some((id, now + TURN));
                }
                Ok(free)
            })
            .await?;
        Ok(taken.then(|| {
            Box::new(MemoryTurn {
                id,
                store: MemoryStore::new(self.server.clone(), self.line.clone()),
            }) as Box<dyn CoordinatorLock>
        }))
    }
}

struct MemoryTurn {
    id: u64,
    store: MemoryStore,
}

#[async_trait]
impl CoordinatorLock for MemoryTurn {
    async fn keep(&mut self) -> Result<(), StoreError> {
        let id = self.id;
        self.store
            .transact(move |data, _| match &mut data.turn {
                Some((holder, until)) if *holder == id => {
                    *until = Instant::now() + TURN;
                    Ok(())
                }
                Some(_) | None => Err(StoreError::Lost("the turn is another's".into())),
            })
            .await
    }
}
