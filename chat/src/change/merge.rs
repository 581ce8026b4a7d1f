//! A shard that was declared down is back: what it alone holds goes to those who own its slots now (A6 of
//! `docs/SHARDING.md`).

use super::copy::cut;
use super::fault::point;
use super::mover::{NotMoved, take};
use super::pace::Pace;
use crate::dialog::{DialogId, Seq};
use crate::ownership::{SlotRow, Step};
use crate::ring::Slot;
use crate::store::{DocRef, Head, Part, Shard};
use std::collections::BTreeMap;
use tokio::time::Instant;

/// Messages that go over in one transaction, at most.
const PART_ROWS: u32 = 500;

/// Dialogs that go over together.
const DIALOGS_AT_ONCE: usize = 32;

/// Brings everything of a fenced slot at `from` to its owner, and lets go of it. Returns how many messages were looked at.
///
/// # Errors
/// [`NotMoved`]; what was brought over stays, and the rest is brought the next time.
pub async fn merge(
    doc: &DocRef,
    slot: Slot,
    from: &Shard,
    fenced: &SlotRow,
    owner: &Shard,
    pace: Pace,
) -> Result<u64, NotMoved> {
    let heads: Vec<Head> = from
        .ask(move |store, identity| async move { store.heads(&identity, slot).await })
        .await?;
    let (mut merged, _moving) = (0, (from.moving(), owner.moving()));
    for group in heads.chunks(DIALOGS_AT_ONCE) {
        let mut above: BTreeMap<DialogId, Seq> =
            group.iter().map(|head| (head.dialog, Seq::ZERO)).collect();
        loop {
            let begun = Instant::now();
            let asked: Vec<(DialogId, Seq)> =
                above.iter().map(|(dialog, seq)| (*dialog, *seq)).collect();
            let messages = from
                .ask(move |store, identity| async move {
                    store.messages_of(&identity, slot, &asked, PART_ROWS).await
                })
                .await?;
            let read = messages.len();
            let messages = cut(messages);
            for message in &messages {
                above.insert(message.dialog, message.seq);
            }
            let count = messages.len();
            merged += count as u64;
            let (doc, part) = (
                doc.clone(),
                Part {
                    messages,
                    heads: group.to_vec(),
                },
            );
            let taken = owner
                .ask(move |store, identity| async move {
                    store.merge_in(&identity, &doc, slot, &part).await
                })
                .await?;
            taken.map_err(|refused| NotMoved::Refused {
                step: "merge",
                shard: owner.name().to_owned(),
                refused,
            })?;
            point("merging");
            pace.rest(&[from, owner], begun.elapsed()).await;
            if count == read && read < PART_ROWS as usize {
                break;
            }
        }
    }
    take(from, doc, slot, &Step::MergedOut { term: fenced.term }).await?;
    Ok(merged)
}
