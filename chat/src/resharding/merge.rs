//! A shard that was declared down returns: the messages that only it has are merged into the owners
//! of its slots.

use super::copy::{cut, dialog_rows_at, messages_at};
use super::failpoint::failpoint;
use super::pace::Pace;
use super::step::{MoveError, take};
use crate::domain::dialog::{DialogId, Seq};
use crate::domain::ownership::{SlotRow, Step};
use crate::domain::slot::Slot;
use crate::domain::topology::TopologyRef;
use crate::store::{Chunk, Shard};
use std::collections::BTreeMap;
use tokio::time::Instant;

/// The largest number of messages of a chunk.
const CHUNK_ROWS: u32 = 500;

/// The number of dialogs that one query reads.
const DIALOGS_AT_ONCE: usize = 32;

/// Merges all rows of a fenced slot at `from` into its owner, then releases the slot. Returns the
/// number of messages read.
///
/// # Errors
/// [`MoveError`]. Messages that were merged stay; the others are merged by the next attempt.
pub async fn merge(
    topology_ref: &TopologyRef,
    slot: Slot,
    from: &Shard,
    fenced: &SlotRow,
    owner: &Shard,
    pace: Pace,
) -> Result<u64, MoveError> {
    let rows = dialog_rows_at(from, slot).await?;
    let (mut merged, _moving) = (0, (from.moving(), owner.moving()));
    for group in rows.chunks(DIALOGS_AT_ONCE) {
        let mut above: BTreeMap<DialogId, Seq> =
            group.iter().map(|row| (row.dialog, Seq::ZERO)).collect();
        loop {
            let begun = Instant::now();
            let asked: Vec<(DialogId, Seq)> =
                above.iter().map(|(dialog, seq)| (*dialog, *seq)).collect();
            let messages = messages_at(from, slot, &asked, CHUNK_ROWS).await?;
            let read = messages.len();
            let messages = cut(messages);
            for message in &messages {
                above.insert(message.dialog, message.seq);
            }
            let count = messages.len();
            merged += count as u64;
            let (topology_ref, chunk) = (
                topology_ref.clone(),
                Chunk {
                    messages,
                    dialogs: group.to_vec(),
                },
            );
            let taken = owner
                .ask(move |store, identity| async move {
                    store.merge_in(&identity, &topology_ref, slot, &chunk).await
                })
                .await?;
            taken.map_err(|rejected| MoveError::Rejected {
                step: "merge",
                shard: owner.name().to_owned(),
                rejected,
            })?;
            failpoint("merging");
            pace.rest(&[from, owner], begun.elapsed()).await;
            if count == read && read < CHUNK_ROWS as usize {
                break;
            }
        }
    }
    take(
        from,
        topology_ref,
        slot,
        &Step::MergedOut { term: fenced.term },
    )
    .await?;
    Ok(merged)
}
