//! Reads the messages of a slot in chunks, each of which is written in one transaction.

use super::step::MoveError;
use crate::domain::dialog::{DialogId, Seq};
use crate::domain::slot::Slot;
use crate::store::{self, Chunk, CopiedMessage, DialogRow, Shard, ShardError};
use std::sync::Arc;

/// Messages of a chunk, at most. Its bytes are bounded by [`store::TRANSACTION_BYTES`].
const CHUNK_ROWS: u32 = 1000;

/// Dialogs that one query reads.
const DIALOGS_AT_ONCE: usize = 64;

/// A chunk, and the query that reads its messages, at the source as at the target.
pub(super) struct Piece {
    /// Dialogs, each with the seq above which its messages begin.
    pub above: Vec<(DialogId, Seq)>,
    /// The chunk.
    pub chunk: Arc<Chunk>,
}

/// Walks the dialogs that have changed at the source.
pub(super) struct Reader {
    from: Shard,
    slot: Slot,
    /// Dialogs not begun: the last seq that the target has, and the row at the source.
    rest: std::vec::IntoIter<(Seq, DialogRow)>,
    /// Dialogs begun: the last seq that was read, and the row at the source.
    group: Vec<(Seq, DialogRow)>,
}

impl Reader {
    /// `changed`: for each dialog the last seq that the target has, and the row at the source.
    pub fn new(from: Shard, slot: Slot, changed: Vec<(Seq, DialogRow)>) -> Self {
        Self {
            from,
            slot,
            rest: changed.into_iter(),
            group: Vec::new(),
        }
    }

    /// The next chunk; `None` at the end.
    ///
    /// # Errors
    /// [`MoveError::Shard`]; [`MoveError::Differs`] where the source lacks a message below a
    /// dialog's last seq.
    pub async fn next(&mut self) -> Result<Option<Piece>, MoveError> {
        if self.group.is_empty() {
            self.group.extend(self.rest.by_ref().take(DIALOGS_AT_ONCE));
        }
        if self.group.is_empty() {
            return Ok(None);
        }
        let unread = self.group.iter().filter(|(at, row)| *at < row.last_seq);
        let above: Vec<(DialogId, Seq)> = unread.map(|(at, row)| (row.dialog, *at)).collect();
        let mut messages = Vec::new();
        if !above.is_empty() {
            messages = cut(messages_at(&self.from, self.slot, &above, CHUNK_ROWS).await?);
            if messages.is_empty() {
                return Err(MoveError::Differs(self.slot));
            }
        }
        let dialogs = self.advance(&messages);
        self.group.retain(|(at, row)| *at < row.last_seq);
        let chunk = Arc::new(Chunk { messages, dialogs });
        Ok(Some(Piece { above, chunk }))
    }

    /// The dialog rows that may be written with these messages. A last seq is written when all
    /// messages up to it are there, so that the target has no gap below it.
    fn advance(&mut self, messages: &[CopiedMessage]) -> Vec<DialogRow> {
        let mut reached = Vec::new();
        for (at, row) in &mut self.group {
            let mut newest_first = messages.iter().rev();
            let last = newest_first.find(|message| message.dialog == row.dialog);
            let complete = *at >= row.last_seq;
            if let Some(message) = last {
                *at = message.seq.min(row.last_seq);
            }
            if last.is_some() || complete {
                reached.push(DialogRow {
                    last_seq: *at,
                    ..row.clone()
                });
            }
        }
        reached
    }
}

/// The longest prefix that fits into one transaction, by bytes.
pub(super) fn cut(mut messages: Vec<CopiedMessage>) -> Vec<CopiedMessage> {
    let mut bytes = 0;
    let fits = messages.iter().position(|message| {
        let first = bytes == 0;
        bytes += store::size(&message.text);
        bytes > store::TRANSACTION_BYTES && !first
    });
    messages.truncate(fits.unwrap_or(messages.len()));
    messages
}

/// All dialog rows of a slot.
pub(super) async fn dialog_rows_at(
    shard: &Shard,
    slot: Slot,
) -> Result<Vec<DialogRow>, ShardError> {
    shard
        .ask(move |store, identity| async move { store.dialog_rows(&identity, slot).await })
        .await
}

/// Messages of a slot above these seqs, in order of dialog and seq.
pub(super) async fn messages_at(
    shard: &Shard,
    slot: Slot,
    above: &[(DialogId, Seq)],
    limit: u32,
) -> Result<Vec<CopiedMessage>, ShardError> {
    let above = above.to_vec();
    shard
        .ask(move |store, identity| async move {
            store.messages_of(&identity, slot, &above, limit).await
        })
        .await
}
