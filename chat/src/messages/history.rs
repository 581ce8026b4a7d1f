//! History pages: read from the shard that owns the slot, checked for gaps, and shared by requests
//! for the same page at the same time.

use super::error::RequestError;
use super::service::{Messages, page_limit};
use crate::budget::cost;
use crate::domain::dialog::{DialogId, Seq, UserId};
use crate::domain::ownership::SlotView;
use crate::domain::room::RoomChange;
use crate::domain::slot::Slot;
use crate::store::{Page, Range, Shard, StoredMessage};
use chat_wire::{HistoryPage, Kind, Message};
use std::sync::Arc;

impl Messages {
    /// A page of a dialog of `me`, in ascending order and without a gap. Of a room it has what `me`
    /// may read.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn history(
        &self,
        me: UserId,
        dialog: DialogId,
        range: Range,
        limit: Option<u32>,
    ) -> Result<HistoryPage, RequestError> {
        let limit = page_limit(limit, self.inner.limits.history_page)?;
        self.afford(me, cost::STATEMENT)?;
        // One message more than requested shows whether there are more.
        let (page, range) = if dialog.is_room() {
            self.room_page(me, dialog, range, limit + 1).await?
        } else {
            (self.page(me, dialog, range, limit + 1).await?, range)
        };
        let bytes = page.messages.iter().map(|message| message.text.len()).sum();
        self.inner
            .budgets
            .charge(me, cost::answer(page.messages.len(), bytes));
        Ok(self.present(dialog, range, limit, &page))
    }

    /// A page of a room, cut to what `me` may read; and the range that was read.
    ///
    /// The page is read first and the membership after it: what a membership allows is right for a
    /// page of before. So pages stay the same for all, and are shared.
    async fn room_page(
        &self,
        me: UserId,
        room: DialogId,
        mut range: Range,
        limit: u32,
    ) -> Result<(Arc<Page>, Range), RequestError> {
        for _ in 0..MEMBERSHIP_TRIES {
            let page = self.page(me, room, range, limit).await?;
            self.charge(me, cost::STATEMENT);
            let (_, member) = self.membership(me, room).await?;
            let readable = member.clamp(range);
            if readable != range {
                range = readable;
                continue;
            }
            if page.messages.iter().all(|entry| member.reads(entry.seq)) {
                return Ok((page, range));
            }
            let mut cut = Page::clone(&page);
            cut.messages.retain(|entry| member.reads(entry.seq));
            return Ok((Arc::new(cut), range));
        }
        Err(RequestError::Unavailable)
    }

    /// Reads a page from the shard that owns the slot, and checks that it has no gap.
    async fn page(
        &self,
        payer: UserId,
        dialog: DialogId,
        range: Range,
        limit: u32,
    ) -> Result<Arc<Page>, RequestError> {
        let is_whole = |page: &Arc<Page>| {
            let is_whole = is_contiguous(page, range, limit);
            if !is_whole {
                self.inner.metrics.history_gap_retries.inc();
                tracing::error!(%dialog, "a page has a gap");
            }
            is_whole
        };
        self.read_at_owner(
            Slot::of(dialog),
            |shard| self.read(payer, shard, dialog, range, limit),
            |page| page.slot.clone(),
            is_whole,
        )
        .await
    }

    async fn read(
        &self,
        payer: UserId,
        shard: Shard,
        dialog: DialogId,
        range: Range,
        limit: u32,
    ) -> Result<Arc<Page>, RequestError> {
        let pages = &self.inner.pages;
        let page = pages.read(payer, shard, dialog, range, limit, &self.inner.metrics);
        Ok(page.await?)
    }

    /// Limits a page to the requested number and to the bytes of an answer, and converts it to the
    /// wire format.
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
}

/// How often a page of a room is read, if the membership changes meanwhile.
const MEMBERSHIP_TRIES: u32 = 3;

/// An entry in the wire format.
#[must_use]
pub fn wire(dialog: DialogId, entry: &StoredMessage) -> Message {
    let mut message = Message {
        dialog: dialog.to_string(),
        seq: entry.seq.get(),
        from: entry.author.get(),
        to: dialog.counterpart(entry.author).map(UserId::get),
        kind: entry.kind.clone(),
        of: entry.of.map(Seq::get),
        at: entry.at.to_string(),
        key: entry.key.clone(),
        ..Message::default()
    };
    match entry.kind {
        Kind::Text => message.text.clone_from(&entry.text),
        Kind::Member => RoomChange::parse(&entry.text).describe(&mut message),
        // A later version says what it is.
        Kind::Other(_) => {}
    }
    message
}

/// Whether messages may be missing from a page that begins with `first`. While a slot lacks some,
/// this is the case for every page except one within the generation that began with the loss,
/// without its first message.
fn may_lack(slot: &SlotView, range: Range, first: Option<Seq>, more: bool) -> bool {
    let begins_within = match (range, first) {
        (_, None) => false,
        (Range::After(after), Some(first)) => first.get() == after.get() + 1,
        (Range::Newest | Range::Before(_), Some(_)) => more,
    };
    let of_this_generation = first.is_some_and(|first| first.generation() == slot.generation);
    !(slot.complete || begins_within && of_this_generation)
}

/// Whether a page is complete: seqs are consecutive, so a gap is visible. `limit` is the number of
/// messages that the shard was asked for.
fn is_contiguous(page: &Page, range: Range, limit: u32) -> bool {
    let seqs: Vec<Seq> = page.messages.iter().map(|message| message.seq).collect();
    // While a shard that was declared down holds some of the messages, gaps are known and reported
    // in the answer; messages stored after the loss have none.
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
                    // There are no messages below: the dialog is empty, or the bound is not above
                    // its first message.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::dialog::Timestamp;
    use crate::domain::ownership::SlotState;

    fn page(seqs: &[u64], last_seq: u64) -> Page {
        let message = |seq: &u64| StoredMessage {
            seq: Seq::new(*seq),
            author: UserId::new(1).unwrap(),
            key: None,
            kind: Kind::Text,
            of: None,
            text: "x".into(),
            at: Timestamp::from_micros(0),
        };
        let slot = Some(SlotView {
            term: 1,
            state: SlotState::Owner,
            generation: 0,
            complete: true,
            unmerged: false,
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
                is_contiguous(&page(seqs, last), range, 5),
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
                unmerged: true,
                peer: None,
            });
            assert_eq!(is_contiguous(&page, Range::Newest, 5), whole, "{seqs:?}");
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
            // Messages since the loss are complete, except for the first.
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
                unmerged: !complete,
                peer: None,
            };
            assert_eq!(
                may_lack(&slot, range, first, more),
                lacks,
                "{complete} {range:?} {first:?} {more}"
            );
        }
    }
}
