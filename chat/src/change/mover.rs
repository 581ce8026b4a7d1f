//! Moves one slot from shard to shard: R0 to R5 of `docs/SHARDING.md`.
//!
//! Everything up to the seal happens beside live traffic. From the seal to the activation the slot takes no writes; only what
//! changed since the last pass is copied then, and what was compared before is not compared again.

use super::copy::{Piece, Reader};
use super::fault::point;
use super::pace::Pace;
use crate::dialog::{DialogId, Seq};
use crate::ownership::{Refused, SlotRow, SlotState, Step, Verdict, judge_sealed};
use crate::ring::Slot;
use crate::store::{CopiedMessage, DocRef, Head, Purged, Shard, ShardDown};
use std::collections::HashMap;
use std::time::Duration;
use tokio::time::Instant;

/// One slot's move.
#[derive(Clone)]
pub struct Move {
    /// Under which document.
    pub doc: DocRef,
    /// What moves.
    pub slot: Slot,
    /// From here.
    pub from: Shard,
    /// To there.
    pub to: Shard,
    /// How.
    pub pace: Pace,
}

/// What a move did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Moved {
    /// Messages that were copied.
    pub messages: u64,
    /// How long the slot took no writes.
    pub frozen: Duration,
}

/// Why a slot has not moved. Nothing is lost: it is looked at again.
#[derive(Clone, Debug, thiserror::Error)]
pub enum NotMoved {
    /// A shard could not be asked, or has another document.
    #[error(transparent)]
    Shard(#[from] ShardDown),
    /// Somebody else has changed the slot's row.
    #[error("{step} refused by {shard}: {refused}")]
    Refused {
        /// What was tried.
        step: &'static str,
        /// Where.
        shard: String,
        /// What the row is.
        refused: Refused,
    },
    /// Rows of an earlier stay are still at the target, and reads may be looking at them.
    #[error("rows of an earlier stay are not purged yet")]
    Leftovers,
    /// The last delta took too long.
    #[error("it took longer than {0:?} to bring over what had changed")]
    TooSlow(Duration),
    /// What was copied is not what is there.
    #[error("the copy of slot {0} differs from its source")]
    Differs(Slot),
}

/// A pass that is shorter than this is the last before the seal.
const SHORT_PASS: Duration = Duration::from_millis(100);

/// Passes before the seal, however long they are.
const MAX_PASSES: u32 = 20;

/// Rows that are purged in one transaction.
const PURGE_ROWS: u32 = 2000;

/// What is known to be at the target, equal to the source: each dialog's row and members, and its messages up to its last seq.
type Done = HashMap<DialogId, Head>;

impl Move {
    /// Moves the slot.
    ///
    /// # Errors
    /// [`NotMoved`]. What was begun is taken back as far as that is possible now; the rest is settled by whoever looks next.
    pub async fn run(&self) -> Result<Moved, NotMoved> {
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
        point("prepared");
        let moved = self.copy_and_hand_over(source.term, term).await;
        if moved.is_err() {
            self.take_back(term).await;
        }
        moved
    }

    async fn copy_and_hand_over(&self, owned_since: u64, term: u64) -> Result<Moved, NotMoved> {
        let mut moved = Moved::default();
        let mut done = Done::new();
        for _ in 0..MAX_PASSES {
            let begun = Instant::now();
            moved.messages += self.pass(term, &mut done, None).await?;
            if begun.elapsed() < SHORT_PASS {
                break;
            }
        }
        point("copied");
        let asked = Instant::now();
        let seal = Step::Seal {
            owned_since,
            to: self.to.name().to_owned(),
            term,
        };
        let sealed = self.take(&self.from, &seal).await?;
        point("sealed");
        moved.messages += self.hand_over(&sealed, term, &mut done).await?;
        // From asking for the seal on, which waits for sends that are inside.
        moved.frozen = asked.elapsed();
        point("activated");
        self.take(
            &self.from,
            &Step::Release {
                to: self.to.name().to_owned(),
                term,
            },
        )
        .await?;
        point("released");
        Ok(moved)
    }

    /// The source is sealed: the last delta, the comparison, the activation (I4).
    async fn hand_over(
        &self,
        sealed: &SlotRow,
        term: u64,
        done: &mut Done,
    ) -> Result<u64, NotMoved> {
        let until = Instant::now() + self.pace.freeze;
        let messages = self.pass(term, done, Some(until)).await?;
        let heads = self.heads_at(&self.to).await?;
        let same = heads.len() == done.len()
            && heads
                .iter()
                .all(|head| done.get(&head.dialog) == Some(head));
        if !same {
            return Err(NotMoved::Differs(self.slot));
        }
        point("compared");
        let activate = Step::Activate {
            from: self.from.name().to_owned(),
            term,
            generation: sealed.generation,
            history: sealed.history.clone(),
        };
        self.take(&self.to, &activate).await?;
        Ok(messages)
    }

    /// Settles a slot that was found sealed: by the evidence at its target, whatever became of who sealed it (R5).
    ///
    /// # Errors
    /// [`NotMoved`].
    pub async fn settle(&self, sealed: &SlotRow) -> Result<Verdict, NotMoved> {
        let Some(term) = sealed.next_term else {
            return Ok(Verdict::Dead);
        };
        let mut verdict = self.judge(term).await?;
        if verdict == Verdict::UnderWay {
            // Within the time that a slot may be frozen, everything is compared anew; else the attempt is given up.
            match self.hand_over(sealed, term, &mut Done::new()).await {
                Ok(_) => verdict = Verdict::TookOver,
                Err(_) => {
                    self.take_back(term).await;
                    return Ok(Verdict::Dead);
                }
            }
        }
        let to = self.to.name().to_owned();
        match verdict {
            Verdict::TookOver => drop(self.take(&self.from, &Step::Release { to, term }).await?),
            Verdict::Dead | Verdict::UnderWay => self.unseal(sealed, term).await?,
        }
        Ok(verdict)
    }

    async fn judge(&self, term: u64) -> Result<Verdict, NotMoved> {
        Ok(judge_sealed(
            self.from.name(),
            term,
            &self.row_at(&self.to).await?,
        ))
    }

    /// Gives the attempt up: first the target, then, once that expects the slot no more, the source.
    async fn take_back(&self, term: u64) {
        let cancel = Step::Cancel {
            from: self.from.name().to_owned(),
            term,
        };
        let undone = async {
            // Refused where it was activated after all: then the evidence says so.
            let _ = self.take(&self.to, &cancel).await;
            let source = self.row_at(&self.from).await?;
            if source.is_sealed(self.to.name(), term) {
                match self.judge(term).await? {
                    Verdict::Dead => self.unseal(&source, term).await?,
                    Verdict::TookOver => {
                        let release = Step::Release {
                            to: self.to.name().to_owned(),
                            term,
                        };
                        drop(self.take(&self.from, &release).await?);
                    }
                    Verdict::UnderWay => {}
                }
            }
            Ok::<(), NotMoved>(())
        };
        if let Err(e) = undone.await {
            tracing::debug!(slot = %self.slot, reason = %e, "a move was not taken back; it will be settled");
        }
    }

    async fn unseal(&self, sealed: &SlotRow, term: u64) -> Result<(), NotMoved> {
        let target = self.row_at(&self.to).await?;
        let new_term = sealed.term.max(term).max(target.term) + 1;
        let unseal = Step::Unseal {
            to: self.to.name().to_owned(),
            term,
            new_term,
        };
        self.take(&self.from, &unseal).await.map(drop)
    }

    /// Rows that an earlier stay left at the target.
    async fn clear_target(&self) -> Result<(), NotMoved> {
        let (slot, grace) = (self.slot, self.pace.purge_after);
        loop {
            let purged = self.to.ask(move |store, identity| async move {
                store.purge(&identity, slot, grace, PURGE_ROWS).await
            });
            match purged.await? {
                Purged::Some(_) => {}
                Purged::All | Purged::InUse => return Ok(()),
                Purged::TooEarly => {
                    let held = self.to.ask(move |store, identity| async move {
                        store.heads(&identity, slot).await
                    });
                    return if held.await?.is_empty() {
                        Ok(())
                    } else {
                        Err(NotMoved::Leftovers)
                    };
                }
            }
        }
    }

    /// Brings the target up to what the source has now; `until` bounds it while the slot is sealed.
    ///
    /// Three parts are under way at once: one is read, the one before is written, the one before that is read back.
    async fn pass(
        &self,
        term: u64,
        done: &mut Done,
        until: Option<Instant>,
    ) -> Result<u64, NotMoved> {
        let mut copied = 0;
        let heads = self.heads_at(&self.from).await?;
        let changed = heads
            .into_iter()
            .filter(|head| done.get(&head.dialog) != Some(head))
            .map(|head| {
                let there = done.get(&head.dialog).map(|head| head.last_seq);
                (there.unwrap_or(Seq::ZERO), head)
            })
            .collect();
        let mut reader = Reader::new(changed);
        let (mut written, mut read) = (None, reader.next(self).await?);
        while read.is_some() || written.is_some() {
            if until.is_some_and(|until| Instant::now() > until) {
                return Err(NotMoved::TooSlow(self.pace.freeze));
            }
            let begun = Instant::now();
            let (next, wrote, compared) = tokio::join!(
                reader.next(self),
                self.write(term, read.as_ref()),
                self.read_back(written.as_ref()),
            );
            compared?;
            wrote?;
            if let Some(piece) = written {
                copied += piece.part.messages.len() as u64;
                let heads = piece.part.heads.iter();
                done.extend(heads.map(|head| (head.dialog, head.clone())));
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

    async fn write(&self, term: u64, piece: Option<&Piece>) -> Result<(), NotMoved> {
        let Some(piece) = piece else { return Ok(()) };
        let (doc, slot, part) = (self.doc.clone(), self.slot, piece.part.clone());
        let from = self.from.name().to_owned();
        let copied = self.to.ask(move |store, identity| async move {
            store
                .copy_in(&identity, &doc, slot, &from, term, &part)
                .await
        });
        copied.await?.map_err(|refused| NotMoved::Refused {
            step: "copy",
            shard: self.to.name().to_owned(),
            refused,
        })
    }

    /// Compares what stands at the target with what was read at the source.
    async fn read_back(&self, piece: Option<&Piece>) -> Result<(), NotMoved> {
        let Some(piece) = piece else { return Ok(()) };
        let sent = &piece.part.messages;
        if sent.is_empty() {
            return Ok(());
        }
        let there = self.messages_at(&self.to, &piece.above, sent.len() as u32);
        if there.await? != *sent {
            return Err(NotMoved::Differs(self.slot));
        }
        Ok(())
    }

    async fn heads_at(&self, shard: &Shard) -> Result<Vec<Head>, NotMoved> {
        let slot = self.slot;
        Ok(shard
            .ask(move |store, identity| async move { store.heads(&identity, slot).await })
            .await?)
    }

    pub(super) async fn messages_at(
        &self,
        shard: &Shard,
        above: &[(DialogId, Seq)],
        limit: u32,
    ) -> Result<Vec<CopiedMessage>, NotMoved> {
        let (slot, above) = (self.slot, above.to_vec());
        Ok(shard
            .ask(move |store, identity| async move {
                store.messages_of(&identity, slot, &above, limit).await
            })
            .await?)
    }

    async fn row_at(&self, shard: &Shard) -> Result<SlotRow, NotMoved> {
        Ok(row_at(shard, &self.doc, self.slot).await?)
    }

    async fn take(&self, shard: &Shard, step: &Step) -> Result<SlotRow, NotMoved> {
        take(shard, &self.doc, self.slot, step).await
    }
}

/// A slot's row, as evidence under a document.
///
/// # Errors
/// [`ShardDown`].
pub async fn row_at(shard: &Shard, doc: &DocRef, slot: Slot) -> Result<SlotRow, ShardDown> {
    let doc = doc.clone();
    let rows =
        shard
            .ask(move |store, identity| async move {
                store.rows(&identity, Some(&doc), Some(slot)).await
            })
            .await?;
    rows.into_iter()
        .next()
        .ok_or_else(|| ShardDown::Down(shard.name().to_owned()))
}

/// Takes a step under a document.
///
/// # Errors
/// [`NotMoved`].
pub async fn take(
    shard: &Shard,
    doc: &DocRef,
    slot: Slot,
    step: &Step,
) -> Result<SlotRow, NotMoved> {
    let (doc, asked) = (doc.clone(), step.clone());
    let taken = shard
        .ask(move |store, identity| async move { store.step(&identity, &doc, slot, &asked).await })
        .await?;
    taken.map_err(|refused| NotMoved::Refused {
        step: step.name(),
        shard: shard.name().to_owned(),
        refused,
    })
}

/// Purges what lies in a slot that left; returns how many messages went.
///
/// # Errors
/// [`ShardDown`].
pub async fn purge(shard: &Shard, slot: Slot, pace: Pace) -> Result<u64, ShardDown> {
    let (mut gone, _moving) = (0, shard.moving());
    loop {
        let begun = Instant::now();
        let purged = shard.ask(move |store, identity| async move {
            store
                .purge(&identity, slot, pace.purge_after, PURGE_ROWS)
                .await
        });
        match purged.await? {
            Purged::Some(rows) => {
                gone += rows;
                point("purging");
                pace.rest(&[shard], begun.elapsed()).await;
            }
            Purged::All => {
                point("purging");
                pace.rest(&[shard], begun.elapsed()).await;
                return Ok(gone);
            }
            Purged::TooEarly | Purged::InUse => return Ok(gone),
        }
    }
}
