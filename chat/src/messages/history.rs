//! History pages: read from the shard that owns the slot, checked for gaps, and shared by requests
//! for the same page at the same time.

use super::error::RequestError;
use super::service::{Messages, page_limit};
use crate::budget::cost;
use crate::cluster::OwnerRetry;
use crate::domain::dialog::{DialogId, Seq, UserId};
use crate::domain::ownership::{SlotState, SlotView};
use crate::domain::slot::Slot;
use crate::store::{Page, Range, Shard, StoredMessage};
use chat_wire::{HistoryPage, Message};
use std::sync::Arc;

impl Messages {
    /// A page of the dialog of `me` with `with`, in ascending order and without a gap.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn history(
        &self,
        me: UserId,
        with: u64,
        range: Range,
        limit: Option<u32>,
    ) -> Result<HistoryPage, RequestError> {
        let dialog = DialogId::between(me, UserId::new(with)?);
        let limit = page_limit(limit, self.inner.limits.history_page)?;
        // One message more than requested shows whether there are more.
        self.afford(me, cost::STATEMENT)?;
        let page = self.page(me, dialog, range, limit + 1).await?;
        let bytes = page.messages.iter().map(|message| message.text.len()).sum();
        self.inner
            .budgets
            .charge(me, cost::answer(page.messages.len(), bytes));
        Ok(self.present(dialog, range, limit, &page))
    }

    /// Reads a page from the shard that owns the slot, and checks that it has no gap.
    async fn page(
        &self,
        payer: UserId,
        dialog: DialogId,
        range: Range,
        limit: u32,
    ) -> Result<Arc<Page>, RequestError> {
        let slot = Slot::of(dialog);
        let cluster = &self.inner.cluster;
        let mut retry = OwnerRetry::default();
        while retry.next().await {
            if retry.is_repeat() {
                cluster.find(slot).await;
            }
            let shard = cluster.route(slot).ok_or(RequestError::Unavailable)?;
            let page = self.read(payer, shard, dialog, range, limit).await?;
            let Some(view) = &page.slot else { continue };
            let page = match (view.state, &view.peer) {
                (SlotState::Owner, _) => page,
                (SlotState::Sealed, Some(peer)) => {
                    // It was not written to since it was sealed, unless the target has taken over
                    // already.
                    let Some(peer) = cluster.view().shard(peer).cloned() else {
                        return Err(RequestError::Unavailable);
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
            if is_contiguous(&page, range, limit) {
                return Ok(page);
            }
            self.inner.metrics.history_gap_retries.inc();
            tracing::error!(%dialog, "a page has a gap");
        }
        Err(RequestError::Unavailable)
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

/// A message in the wire format.
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
