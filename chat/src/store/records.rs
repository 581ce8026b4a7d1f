//! What goes into a shard and comes out of it: messages, read marks, pages, inboxes.

use super::served_slots::ServedSlots;
use super::{StoreError, corrupt};
use crate::domain::dialog::{DialogId, Key, Seq, Text, TextHash, Timestamp, UserId};
use crate::domain::ownership::{SlotState, SlotView, Term};
use crate::domain::slot::Slot;
use std::collections::HashMap;
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

/// What became of one message of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteOutcome {
    /// It is committed, here.
    Stored(Receipt),
    /// The same (dialog, author, key) with the same text was committed before, there.
    Repeat(Receipt),
    /// The same (dialog, author, key) was committed before with another text.
    KeyReused,
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
    /// The shard's clock.
    pub now: Timestamp,
}

impl BatchResult {
    /// Of a batch in these slots.
    #[must_use]
    pub fn new(
        written: Vec<WriteOutcome>,
        slots: &HashMap<Slot, SlotView>,
        now: Timestamp,
    ) -> Self {
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
    /// A dialog has another last seq, or had no message yet in this hour.
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
    /// These.
    Dialogs(Vec<DialogId>),
    /// The dialogs of these users with recent messages, newest first and at most [`LAST_SEQS_CAP`].
    Users {
        /// Whose.
        users: Vec<UserId>,
        /// How lately, by the shard's clock.
        within: Duration,
    },
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
    /// How far its members have read.
    pub reads: Vec<(UserId, Seq)>,
}

impl DialogLastSeq {
    /// Of a dialog without a message.
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
        rows: Vec<(String, u64, i64, u64, u64)>,
        now: Timestamp,
        slots: ServedSlots,
    ) -> Result<Self, StoreError> {
        let mut dialogs: Vec<DialogLastSeq> = Vec::new();
        for (dialog, last_seq, last_at, user, read_seq) in rows {
            let dialog = dialog.parse().map_err(|_| corrupt("dialogs.dialog"))?;
            let user = UserId::new(user).map_err(|_| corrupt("members.user_id"))?;
            let read = (user, Seq::new(read_seq));
            match dialogs.last_mut().filter(|last| last.dialog == dialog) {
                Some(last) => last.reads.push(read),
                None => dialogs.push(DialogLastSeq {
                    dialog,
                    last_seq: Seq::new(last_seq),
                    last_at: Timestamp::from_micros(last_at),
                    reads: vec![read],
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
