//! Reads what a slot holds in parts that go over in one transaction each.

use super::mover::{Move, NotMoved};
use crate::dialog::{DialogId, Seq};
use crate::store::{self, CopiedMessage, Head, Part};
use std::sync::Arc;

/// Messages that go over in one transaction, at most.
const PART_ROWS: u32 = 1000;

/// Dialogs that are asked for in one query.
const DIALOGS_AT_ONCE: usize = 64;

/// A part, and the query that finds its messages, at the source as at the target.
pub(super) struct Piece {
    /// Dialogs, each with the seq above which its messages begin.
    pub above: Vec<(DialogId, Seq)>,
    /// What goes over.
    pub part: Arc<Part>,
}

/// Walks the dialogs that have changed at the source.
pub(super) struct Reader {
    /// Dialogs not begun: up to where the target has each, and its head at the source.
    rest: std::vec::IntoIter<(Seq, Head)>,
    /// Dialogs begun, up to where they are read.
    group: Vec<(Seq, Head)>,
}

impl Reader {
    /// `changed`: up to where the target has each dialog, and its head at the source.
    pub fn new(changed: Vec<(Seq, Head)>) -> Self {
        Self {
            rest: changed.into_iter(),
            group: Vec::new(),
        }
    }

    /// The next part; `None` when all is read.
    ///
    /// # Errors
    /// [`NotMoved::Shard`]; [`NotMoved::Differs`] where the source lacks a message below a head.
    pub async fn next(&mut self, slot: &Move) -> Result<Option<Piece>, NotMoved> {
        if self.group.is_empty() {
            self.group.extend(self.rest.by_ref().take(DIALOGS_AT_ONCE));
        }
        if self.group.is_empty() {
            return Ok(None);
        }
        let unread = self.group.iter().filter(|(at, head)| *at < head.last_seq);
        let above: Vec<(DialogId, Seq)> = unread.map(|(at, head)| (head.dialog, *at)).collect();
        let mut messages = Vec::new();
        if !above.is_empty() {
            messages = cut(slot.messages_at(&slot.from, &above, PART_ROWS).await?);
            if messages.is_empty() {
                return Err(NotMoved::Differs(slot.slot));
            }
        }
        let heads = self.advance(&messages);
        self.group.retain(|(at, head)| *at < head.last_seq);
        let part = Arc::new(Part { messages, heads });
        Ok(Some(Piece { above, part }))
    }

    /// Heads that may be written with these messages. A head is written when all below it is there, so that what is at the
    /// target is whole up to its head.
    fn advance(&mut self, messages: &[CopiedMessage]) -> Vec<Head> {
        let mut reached = Vec::new();
        for (at, head) in &mut self.group {
            let last = messages
                .iter()
                .rev()
                .find(|message| message.dialog == head.dialog);
            let complete = *at >= head.last_seq;
            if let Some(message) = last {
                *at = message.seq.min(head.last_seq);
            }
            if last.is_some() || complete {
                reached.push(Head {
                    last_seq: *at,
                    ..head.clone()
                });
            }
        }
        reached
    }
}

/// As many from the front as may go over at once.
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
