//! What goes into a shard and comes out of it: messages, read marks, pages, inboxes.

use super::served_slots::ServedSlots;
use super::{StoreError, corrupt};
use crate::domain::dialog::{DialogId, Key, Seq, Text, TextHash, Timestamp, UserId};
use crate::domain::ownership::{SlotState, SlotView, Term};
use crate::domain::room::{Refusal, Room, RoomChange, RoomRequest, Settings};
use crate::domain::slot::Slot;
use chat_wire::{Kind, Role};
use std::sync::Arc;
use std::time::Duration;

/// Bytes of messages that one transaction takes, by [`size`], but for a single message: as hex they
/// are twice as many in a statement, and MariaDB takes statements of 16 MiB (`max_allowed_packet`).
pub const TRANSACTION_BYTES: usize = 1 << 20;

/// What a message with this text counts for in [`TRANSACTION_BYTES`].
#[must_use]
pub fn size(text: &str) -> usize {
    /// Key, dialog and numbers.
    const BESIDE_TEXT: usize = 100;
    text.len() + BESIDE_TEXT
}

/// An entry on its way into a shard.
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
    /// What it is.
    pub body: Body,
    /// What a retry is compared by.
    pub hash: TextHash,
}

/// What an entry is.
#[derive(Clone, Debug)]
pub enum Body {
    /// A message.
    Text(Text),
    /// What is asked of a room. Its entry holds what becomes of it.
    Room {
        /// What is asked.
        request: RoomRequest,
        /// The largest number of members.
        limit: usize,
    },
}

impl Body {
    /// The text of a message; nothing of an entry whose content is only known once it is stored.
    #[must_use]
    pub fn text(&self) -> &str {
        match self {
            Body::Text(text) => text.as_str(),
            Body::Room { .. } => "",
        }
    }

    /// Whether it makes a room.
    #[must_use]
    pub fn makes_room(&self) -> bool {
        match self {
            Body::Room { request, .. } => request.creates(),
            Body::Text(_) => false,
        }
    }

    /// The kind of its entry.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Body::Text(_) => Kind::Text,
            Body::Room { .. } => Kind::Member,
        }
    }

    fn hash(&self) -> TextHash {
        match self {
            Body::Text(text) => text.hash(),
            Body::Room { request, .. } => {
                // Its keys are strings or numbers, and every value is one that JSON can write.
                let request = serde_json::to_string(request).unwrap_or_default();
                TextHash::of(&["room", &request])
            }
        }
    }
}

impl NewMessage {
    /// Works out slot and hash.
    #[must_use]
    pub fn new(dialog: DialogId, author: UserId, key: Key, body: Body) -> Self {
        Self {
            slot: Slot::of(dialog),
            dialog,
            author,
            key,
            hash: body.hash(),
            body,
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

    /// What becomes of it, if the user has `read` so far and the dialog ends at `last_seq`: it goes
    /// forward only, and not beyond the last message.
    #[must_use]
    pub fn on(&self, read: Seq, last_seq: Seq) -> MarkOutcome {
        let seq = self.seq.min(last_seq).max(read);
        MarkOutcome::At {
            seq,
            moved: seq > read,
        }
    }
}

/// Who is sent an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Audience {
    /// The users whom the id of the dialog names.
    Named,
    /// These members of a room.
    Members(Arc<[UserId]>),
    /// The members of a room after a change of it, and those who have left with it.
    Changed(Arc<[UserId]>, Box<RoomChange>),
}

impl Audience {
    /// Each of them once.
    pub fn users(&self, dialog: DialogId) -> impl Iterator<Item = UserId> + Clone {
        let members = match self {
            Audience::Named => &[][..],
            Audience::Members(users) | Audience::Changed(users, _) => users,
        };
        dialog.users().chain(members.iter().copied())
    }
}

/// The members of a room after an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoomMembers {
    /// The seq of the entry that last changed them.
    pub rev: Seq,
    /// By user id.
    pub users: Arc<[UserId]>,
}

impl RoomMembers {
    /// Those of a room.
    #[must_use]
    pub fn of(room: &Room) -> Self {
        Self {
            rev: room.rev,
            users: room.members.keys().copied().collect(),
        }
    }

    /// Whether a user is among them.
    #[must_use]
    pub fn has(&self, user: UserId) -> bool {
        self.users.binary_search(&user).is_ok()
    }
}

/// What became of one entry of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WriteOutcome {
    /// It is committed, here.
    Stored(Receipt, Audience),
    /// The same (dialog, author, key) with the same text was committed before, there.
    Repeat(Receipt, Audience),
    /// The same (dialog, author, key) was committed before with another text.
    KeyReused,
    /// A request that changes nothing: there is no entry.
    Unchanged,
    /// The room does not take it.
    Refused(Refusal),
    /// This shard does not own the slot: nothing was written. `None` if it has no row for it.
    NotOwner(Option<SlotState>),
}

/// Where and when a message was stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// Its place in the dialog.
    pub seq: Seq,
    /// By the shard's clock.
    pub at: Timestamp,
}

/// What a write did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchResult {
    /// What became of each message, in order.
    pub written: Vec<WriteOutcome>,
    /// The terms of the slots that take writes here.
    pub terms: Vec<(Slot, Term)>,
    /// The members of its rooms after it.
    pub rooms: Vec<(DialogId, RoomMembers)>,
    /// The shard's clock.
    pub now: Timestamp,
}

/// What became of a draft.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Appended {
    /// All of it is committed.
    Stored {
        /// What became of each message, in order.
        written: Vec<WriteOutcome>,
        /// What became of each read mark of the draft, in order.
        marked: Vec<MarkOutcome>,
        /// The shard's clock.
        now: Timestamp,
    },
    /// Nothing was written: something is not as the draft takes it to be.
    Mismatch(Mismatch),
}

/// What is not as a draft takes it to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mismatch {
    /// The shard does not own a slot under the term, or is another shard.
    Term,
    /// A dialog has another last seq, had no message yet in this hour, or has one of a later time;
    /// or a room has other members.
    LastSeq,
    /// A key is stored already.
    Key,
}

impl Mismatch {
    /// The value of the label `mismatch`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Mismatch::Term => "term",
            Mismatch::LastSeq => "last_seq",
            Mismatch::Key => "key",
        }
    }
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
    /// What it is.
    pub kind: Kind,
    /// The seq of the entry that it is about.
    pub of: Option<Seq>,
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
    /// The title of a room.
    pub title: Option<String>,
}

/// Unread messages are counted up to here, which is shown as "99+".
pub const UNREAD_CAP: u32 = 100;

/// The largest number of entries that are looked at for that.
pub const UNREAD_LOOK: u32 = 400;

/// Where an inbox page begins: strictly below (`last_at`, `dialog`), which is how inboxes are
/// ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InboxCursor {
    /// Of the last row of the page before.
    pub last_at: Timestamp,
    /// Of the last row of the page before; breaks ties.
    pub dialog: DialogId,
}

/// One shard's part of an inbox, read in one snapshot together with the slots it answers for.
#[derive(Clone, Debug)]
pub struct ShardInbox {
    /// Newest first, at most as many as were asked for.
    pub rows: Vec<InboxRow>,
    /// The slots that it answers for.
    pub slots: ServedSlots,
}

/// The dialogs whose last seqs are requested.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LastSeqsOf {
    /// These, of which rooms only as far as these users are or were in them.
    Dialogs {
        /// Which.
        dialogs: Vec<DialogId>,
        /// For whom.
        users: Vec<UserId>,
    },
    /// The dialogs of these users with recent messages, newest first and at most [`LAST_SEQS_CAP`].
    Users {
        /// Whose.
        users: Vec<UserId>,
        /// How lately, by the shard's clock.
        within: Duration,
    },
}

impl LastSeqsOf {
    /// For whom.
    #[must_use]
    pub fn users(&self) -> &[UserId] {
        match self {
            LastSeqsOf::Dialogs { users, .. } | LastSeqsOf::Users { users, .. } => users,
        }
    }
}

/// Dialogs that [`LastSeqsOf::Users`] gives at most.
pub const LAST_SEQS_CAP: u32 = 20_000;

/// How far a dialog has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DialogLastSeq {
    /// Which.
    pub dialog: DialogId,
    /// Its last message.
    pub last_seq: Seq,
    /// When that was stored.
    pub last_at: Timestamp,
    /// Its members; of a room only those who were asked for.
    pub members: Vec<MemberState>,
}

/// How far a dialog has come for a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemberState {
    /// Who.
    pub user: UserId,
    /// Read up to here.
    pub read: Seq,
    /// Entries from here on can be read.
    pub since: Seq,
    /// The entry by which the user has left.
    pub until: Option<Seq>,
}

impl DialogLastSeq {
    /// Whether a user is or was in it.
    #[must_use]
    pub fn has(&self, user: UserId) -> bool {
        self.members.iter().any(|member| member.user == user)
    }

    /// Whether entries above a seq, which a user has not read yet, cannot be read any more: the
    /// user has left the room meanwhile, and has joined again.
    #[must_use]
    pub fn skips(&self, user: UserId, above: Seq) -> bool {
        let member = self.members.iter().find(|member| member.user == user);
        member.is_some_and(|member| member.since.get() > above.get().saturating_add(1))
    }

    /// The last entry that a user may read.
    #[must_use]
    pub fn last_for(&self, user: UserId) -> Seq {
        let member = self.members.iter().find(|member| member.user == user);
        let until = member.and_then(|member| member.until);
        until.map_or(self.last_seq, |until| until.min(self.last_seq))
    }

    /// Of a dialog without a message.
    #[must_use]
    pub fn nothing(dialog: DialogId) -> Self {
        Self {
            dialog,
            last_seq: Seq::ZERO,
            last_at: Timestamp::from_micros(0),
            members: Vec::new(),
        }
    }
}

/// A dialog and one of its members: its id, last seq and the time of that; the user, the read mark,
/// and the entries between which the user may read.
pub(super) type LastSeqRow = (String, u64, i64, u64, u64, u64, Option<u64>);

/// The last seqs that were requested of a shard, in one snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastSeqs {
    /// Of dialogs in slots that it answers for.
    pub dialogs: Vec<DialogLastSeq>,
    /// The shard's clock.
    pub now: Timestamp,
    /// The slots that it answers for; for [`LastSeqsOf::Dialogs`], of those that were asked for.
    pub slots: ServedSlots,
}

impl LastSeqs {
    /// Puts together what was read a member at a time, in the order of dialogs.
    pub(super) fn of(
        rows: Vec<LastSeqRow>,
        now: Timestamp,
        slots: ServedSlots,
    ) -> Result<Self, StoreError> {
        let mut dialogs: Vec<DialogLastSeq> = Vec::new();
        for (dialog, last_seq, last_at, user, read_seq, since, until) in rows {
            let dialog = dialog.parse().map_err(|_| corrupt("dialogs.dialog"))?;
            let user = UserId::new(user).map_err(|_| corrupt("members.user_id"))?;
            let member = MemberState {
                user,
                read: Seq::new(read_seq),
                since: Seq::new(since),
                until: until.map(Seq::new),
            };
            match dialogs.last_mut().filter(|last| last.dialog == dialog) {
                Some(last) => last.members.push(member),
                None => dialogs.push(DialogLastSeq {
                    dialog,
                    last_seq: Seq::new(last_seq),
                    last_at: Timestamp::from_micros(last_at),
                    members: vec![member],
                }),
            }
        }
        Ok(Self {
            dialogs,
            now,
            slots,
        })
    }
}

/// How a read mark ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MarkOutcome {
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

/// What a user is in a room, read in one snapshot together with the slot's row.
#[derive(Clone, Debug)]
pub struct RoomView {
    /// What the shard is to the slot; `None` if it has no row for it.
    pub slot: Option<SlotView>,
    /// The last entry of the room; zero if there is no such room.
    pub last_seq: Seq,
    /// Its settings.
    pub settings: Settings,
    /// How many members it has.
    pub members: u64,
    /// The user who asks, if that user is or was in it.
    pub me: Option<RoomMember>,
}

impl RoomView {
    /// Of a shard that has no row for the slot.
    #[must_use]
    pub fn nothing() -> Self {
        Self {
            slot: None,
            last_seq: Seq::ZERO,
            settings: Settings::default(),
            members: 0,
            me: None,
        }
    }
}

/// A user's row in a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoomMember {
    /// Who.
    pub user: UserId,
    /// What the user may do.
    pub role: Role,
    /// Entries from here on can be read.
    pub since: Seq,
    /// Entries up to here; `None` while the user is a member.
    pub until: Option<Seq>,
    /// Read up to here.
    pub read: Seq,
}

/// The size of a shard, for operators.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Slots it owns.
    pub slots: u64,
    /// Dialogs in them.
    pub dialogs: u64,
    /// Messages in those.
    pub messages: u64,
}
