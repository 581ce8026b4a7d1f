//! Moves one slot from shard to shard, in the steps of `docs/SHARDING.md`.
//!
//! Everything up to the seal happens beside live traffic. From the seal to the activation the slot
//! takes no writes; only the changes since the last pass are copied and compared then.

use super::copy::{Piece, Reader, dialog_rows_at, messages_at};
use super::failpoint::failpoint;
use super::pace::Pace;
use super::step::{MoveError, row_at, take};
use crate::domain::dialog::{DialogId, Seq};
use crate::domain::failover::{SealedOutcome, resolve_sealed};
use crate::domain::ownership::{SlotRow, SlotState, Step};
use crate::domain::slot::Slot;
use crate::domain::topology::TopologyRef;
use crate::store::{DialogRow, PurgeOutcome, Shard, ShardError};
use std::collections::HashMap;
use std::time::Duration;
use tokio::time::Instant;

/// One slot's move.
#[derive(Clone)]
pub struct Move {
    /// The topology that asks for the move.
    pub topology_ref: TopologyRef,
    /// The slot.
    pub slot: Slot,
    /// The source.
    pub from: Shard,
    /// The target.
    pub to: Shard,
    /// How fast.
    pub pace: Pace,
}

/// The result of a move.
#[derive(Clone, Copy, Debug, Default)]
pub struct Moved {
    /// Messages that were copied.
    pub messages: u64,
    /// How long the slot took no writes.
    pub frozen: Duration,
}

/// A pass that takes less time is the last before the seal.
const SHORT_PASS: Duration = Duration::from_millis(100);

/// Passes before the seal, at most.
const MAX_PASSES: u32 = 20;

/// Rows that are purged in one transaction.
const PURGE_ROWS: u32 = 2000;

/// The dialogs whose row, members and messages are known to be the same at source and target.
type Done = HashMap<DialogId, DialogRow>;

impl Move {
    /// Moves the slot.
    ///
    /// # Errors
    /// [`MoveError`]. The attempt is undone as far as possible; a later round settles the rest.
    pub async fn run(&self) -> Result<Moved, MoveError> {
        let _moving = (self.from.moving(), self.to.moving());
        let (source, target) = (self.row_at(&self.from).await?, self.row_at(&self.to).await?);
        let term = source.term.max(target.term) + 1;
        if target.state == SlotState::None {
            self.clear_target().await?;
        }
        self.take(
            &self.to,
            &Step::Prepare {
                from: self.from.name().to_owned(),
                term,
            },
        )
        .await?;
        failpoint("prepared");
        let moved = self.copy_and_hand_over(source.term, term).await;
        if moved.is_err() {
            self.take_back(term).await;
        }
        moved
    }

    async fn copy_and_hand_over(&self, owned_since: u64, term: u64) -> Result<Moved, MoveError> {
        let mut moved = Moved::default();
        let mut done = Done::new();
        for _ in 0..MAX_PASSES {
            let begun = Instant::now();
            moved.messages += self.pass(term, &mut done, None).await?;
            if begun.elapsed() < SHORT_PASS {
                break;
            }
        }
        failpoint("copied");
        let asked = Instant::now();
        let seal = Step::Seal {
            owned_since,
            to: self.to.name().to_owned(),
            term,
        };
        let sealed = self.take(&self.from, &seal).await?;
        failpoint("sealed");
        moved.messages += self.hand_over(&sealed, term, &mut done).await?;
        // The seal waits for transactions that are in flight: that counts too.
        moved.frozen = asked.elapsed();
        failpoint("activated");
        self.take(
            &self.from,
            &Step::Release {
                to: self.to.name().to_owned(),
                term,
            },
        )
        .await?;
        failpoint("released");
        Ok(moved)
    }

    /// The source is sealed: copies and compares the last changes, and activates the target.
    async fn hand_over(
        &self,
        sealed: &SlotRow,
        term: u64,
        done: &mut Done,
    ) -> Result<u64, MoveError> {
        let until = Instant::now() + self.pace.freeze;
        let messages = self.pass(term, done, Some(until)).await?;
        let rows = dialog_rows_at(&self.to, self.slot).await?;
        let same =
            rows.len() == done.len() && rows.iter().all(|row| done.get(&row.dialog) == Some(row));
        if !same {
            return Err(MoveError::Differs(self.slot));
        }
        failpoint("compared");
        let activate = Step::Activate {
            from: self.from.name().to_owned(),
            term,
            generation: sealed.generation,
            history: sealed.history.clone(),
        };
        self.take(&self.to, &activate).await?;
        Ok(messages)
    }

    /// Settles a slot that was found sealed, by the evidence at its target.
    ///
    /// # Errors
    /// [`MoveError`].
    pub async fn settle(&self, sealed: &SlotRow) -> Result<SealedOutcome, MoveError> {
        let Some(term) = sealed.next_term else {
            return Ok(SealedOutcome::Abandoned);
        };
        let mut outcome = self.resolve_sealed(term).await?;
        if outcome == SealedOutcome::InProgress {
            // Everything is compared again, within the time that a slot may be frozen; otherwise
            // the attempt is undone.
            match self.hand_over(sealed, term, &mut Done::new()).await {
                Ok(_) => outcome = SealedOutcome::Completed,
                Err(_) => {
                    self.take_back(term).await;
                    return Ok(SealedOutcome::Abandoned);
                }
            }
        }
        let to = self.to.name().to_owned();
        match outcome {
            SealedOutcome::Completed => {
                drop(self.take(&self.from, &Step::Release { to, term }).await?)
            }
            SealedOutcome::Abandoned | SealedOutcome::InProgress => {
                self.unseal(sealed, term).await?
            }
        }
        Ok(outcome)
    }

    async fn resolve_sealed(&self, term: u64) -> Result<SealedOutcome, MoveError> {
        Ok(resolve_sealed(
            self.from.name(),
            term,
            &self.row_at(&self.to).await?,
        ))
    }

    /// Undoes the attempt: at the target first; then, if the target does not expect the slot any
    /// more, at the source.
    async fn take_back(&self, term: u64) {
        let cancel = Step::Cancel {
            from: self.from.name().to_owned(),
            term,
        };
        let undone = async {
            // Rejected if the target has activated after all; the evidence then says so.
            let _ = self.take(&self.to, &cancel).await;
            let source = self.row_at(&self.from).await?;
            if source.is_sealed(self.to.name(), term) {
                match self.resolve_sealed(term).await? {
                    SealedOutcome::Abandoned => self.unseal(&source, term).await?,
                    SealedOutcome::Completed => {
                        let release = Step::Release {
                            to: self.to.name().to_owned(),
                            term,
                        };
                        drop(self.take(&self.from, &release).await?);
                    }
                    SealedOutcome::InProgress => {}
                }
            }
            Ok::<(), MoveError>(())
        };
        if let Err(e) = undone.await {
            tracing::debug!(slot = %self.slot, reason = %e, "a failed move is not undone yet; a later round settles it");
        }
    }

    async fn unseal(&self, sealed: &SlotRow, term: u64) -> Result<(), MoveError> {
        let target = self.row_at(&self.to).await?;
        let new_term = sealed.term.max(term).max(target.term) + 1;
        let unseal = Step::Unseal {
            to: self.to.name().to_owned(),
            term,
            new_term,
        };
        self.take(&self.from, &unseal).await.map(drop)
    }

    /// Purges rows of an earlier ownership at the target.
    async fn clear_target(&self) -> Result<(), MoveError> {
        let (slot, grace) = (self.slot, self.pace.purge_after);
        loop {
            let purged = self.to.ask(move |store, identity| async move {
                store.purge(&identity, slot, grace, PURGE_ROWS).await
            });
            match purged.await? {
                PurgeOutcome::Some(_) => {}
                PurgeOutcome::All | PurgeOutcome::InUse => return Ok(()),
                PurgeOutcome::TooEarly => {
                    let held = self.to.ask(move |store, identity| async move {
                        store.dialog_rows(&identity, slot).await
                    });
                    return if held.await?.is_empty() {
                        Ok(())
                    } else {
                        Err(MoveError::Leftovers)
                    };
                }
            }
        }
    }

    /// Copies what the source has now and the target has not; `until` bounds it while the slot is
    /// sealed.
    ///
    /// A pipeline of three chunks: one is read, the one before is written, the one before that is
    /// read back and compared.
    async fn pass(
        &self,
        term: u64,
        done: &mut Done,
        until: Option<Instant>,
    ) -> Result<u64, MoveError> {
        let mut copied = 0;
        let rows = dialog_rows_at(&self.from, self.slot).await?;
        let changed = rows
            .into_iter()
            .filter(|row| done.get(&row.dialog) != Some(row))
            .map(|row| {
                let there = done.get(&row.dialog).map(|row| row.last_seq);
                (there.unwrap_or(Seq::ZERO), row)
            })
            .collect();
        let mut reader = Reader::new(self.from.clone(), self.slot, changed);
        let (mut written, mut read) = (None, reader.next().await?);
        while read.is_some() || written.is_some() {
            if until.is_some_and(|until| Instant::now() > until) {
                return Err(MoveError::TooSlow(self.pace.freeze));
            }
            let begun = Instant::now();
            let (next, wrote, compared) = tokio::join!(
                reader.next(),
                self.write(term, read.as_ref()),
                self.read_back(written.as_ref()),
            );
            compared?;
            wrote?;
            if let Some(piece) = written {
                copied += piece.chunk.messages.len() as u64;
                let rows = piece.chunk.dialogs.iter();
                done.extend(rows.map(|row| (row.dialog, row.clone())));
            }
            (written, read) = (read, next?);
            if until.is_none() {
                self.pace
                    .rest(&[&self.from, &self.to], begun.elapsed())
                    .await;
            }
        }
        Ok(copied)
    }

    async fn write(&self, term: u64, piece: Option<&Piece>) -> Result<(), MoveError> {
        let Some(piece) = piece else { return Ok(()) };
        let (topology_ref, slot, chunk) =
            (self.topology_ref.clone(), self.slot, piece.chunk.clone());
        let from = self.from.name().to_owned();
        let copied = self.to.ask(move |store, identity| async move {
            store
                .copy_in(&identity, &topology_ref, slot, &from, term, &chunk)
                .await
        });
        copied.await?.map_err(|rejected| MoveError::Rejected {
            step: "copy",
            shard: self.to.name().to_owned(),
            rejected,
        })
    }

    /// Compares a chunk at the target with what was read at the source.
    async fn read_back(&self, piece: Option<&Piece>) -> Result<(), MoveError> {
        let Some(piece) = piece else { return Ok(()) };
        let sent = &piece.chunk.messages;
        if sent.is_empty() {
            return Ok(());
        }
        let there = messages_at(&self.to, self.slot, &piece.above, sent.len() as u32);
        if there.await? != *sent {
            return Err(MoveError::Differs(self.slot));
        }
        Ok(())
    }

    async fn row_at(&self, shard: &Shard) -> Result<SlotRow, MoveError> {
        Ok(row_at(shard, &self.topology_ref, self.slot).await?)
    }

    async fn take(&self, shard: &Shard, step: &Step) -> Result<SlotRow, MoveError> {
        take(shard, &self.topology_ref, self.slot, step).await
    }
}

/// Purges the rows of a slot that left; returns the number of deleted messages.
///
/// # Errors
/// [`ShardError`].
pub async fn purge(shard: &Shard, slot: Slot, pace: Pace) -> Result<u64, ShardError> {
    let (mut gone, _moving) = (0, shard.moving());
    loop {
        let begun = Instant::now();
        let purged = shard.ask(move |store, identity| async move {
            store
                .purge(&identity, slot, pace.purge_after, PURGE_ROWS)
                .await
        });
        match purged.await? {
            PurgeOutcome::Some(rows) => {
                gone += rows;
                failpoint("purging");
                pace.rest(&[shard], begun.elapsed()).await;
            }
            PurgeOutcome::All => {
                failpoint("purging");
                pace.rest(&[shard], begun.elapsed()).await;
                return Ok(gone);
            }
            PurgeOutcome::TooEarly | PurgeOutcome::InUse => return Ok(gone),
        }
    }
}
