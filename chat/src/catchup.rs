//! Reads from the shards what a session missed: where something was lost on the way, and after a reconnection.

use crate::budget::cost;
use crate::chance;
use crate::delivery::encode;
use crate::dialog::{DialogId, Seq, Timestamp, UserId};
use crate::feed::{CLOCKS_APART, Feed};
use crate::heads::Heads;
use crate::messages::{Messages, NotDone};
use crate::metrics::Metrics;
use crate::news::News;
use crate::sight::{From, Missing};
use crate::store::{DialogHead, Range, now};
use chat_wire::{Message, ReadMark, ServerFrame};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

/// Who catches up, and by what means. A clone is a few references.
#[derive(Clone)]
pub struct CatchUp {
    /// Reads messages.
    pub messages: Messages,
    /// Reads how far dialogs have come.
    pub heads: Heads,
    /// Of the session.
    pub feed: Arc<Feed>,
    /// Whose session it is.
    pub me: UserId,
    /// Messages of a dialog that are replayed; who is further behind is told to look.
    pub replay: u64,
    /// Dialogs that are kept level at once.
    pub replay_dialogs: usize,
    /// How many dialogs are read at once.
    pub turns: Arc<Semaphore>,
    /// What is measured.
    pub metrics: Arc<Metrics>,
}

/// A message that was overtaken is here by then, and need not be read.
const OVERTAKEN: Duration = Duration::from_millis(20);

/// Between two tries to read from a shard that does not answer.
const TRY_AGAIN: Duration = Duration::from_millis(500);

/// How long a `resume` waits for what was missed before it is answered all the same; the rest comes when it can be read.
const RESUME_LIMIT: Duration = Duration::from_secs(5);

impl CatchUp {
    /// Reads what is missing of a dialog that is due, until nothing is.
    pub async fn dialog(self, dialog: DialogId) {
        let mut waited = false;
        while let Some(missing) = self.feed.missing(dialog) {
            if !waited && matches!(missing.from, From::After(_)) {
                waited = true;
                sleep(OVERTAKEN).await;
                continue;
            }
            let read = {
                let Ok(_turn) = self.turns.acquire().await else {
                    return;
                };
                self.read(dialog, missing).await
            };
            if let Err(e) = read {
                tracing::debug!(%dialog, reason = %e, "a gap cannot be read now");
                self.feed.failed(dialog);
                sleep(TRY_AGAIN.mul_f64(1.0 + chance::fraction())).await;
            }
        }
    }

    async fn read(&self, dialog: DialogId, missing: Missing) -> Result<(), NotDone> {
        match missing.from {
            From::After(after) => self.read_after(dialog, missing, after).await,
            From::Since(since) => self.read_since(dialog, missing, since).await,
        }
    }

    async fn read_after(
        &self,
        dialog: DialogId,
        missing: Missing,
        mut after: Seq,
    ) -> Result<(), NotDone> {
        let with = dialog.counterpart(self.me).get();
        let mut replayed = 0;
        if self.too_far(after, missing.head) {
            self.look_yourself(dialog, missing, missing.head);
            return Ok(());
        }
        loop {
            let page = self
                .messages
                .history(self.me, with, Range::After(after), None)
                .await?;
            replayed += page.messages.len() as u64;
            for message in page.messages {
                after = Seq::new(message.seq);
                if !self.found(dialog, missing, message).await {
                    return Ok(());
                }
            }
            if !page.more {
                self.feed.read_through(dialog, missing, after);
                return Ok(());
            }
            if replayed >= self.replay {
                self.look_yourself(dialog, missing, missing.head.max(after));
                return Ok(());
            }
        }
    }

    async fn read_since(
        &self,
        dialog: DialogId,
        missing: Missing,
        since: Timestamp,
    ) -> Result<(), NotDone> {
        let with = dialog.counterpart(self.me).get();
        let up_to = Range::Before(Seq::new(missing.head.get().saturating_add(1)));
        let page = self.messages.history(self.me, with, up_to, None).await?;
        // Both are written alike, so that their texts are in the order of time.
        let since = since.to_string();
        let older = page
            .messages
            .iter()
            .filter(|message| message.at < since)
            .count();
        if older == 0 && page.more {
            self.look_yourself(dialog, missing, missing.head);
            return Ok(());
        }
        let end = Seq::new(page.last);
        for message in page.messages.into_iter().skip(older) {
            if !self.found(dialog, missing, message).await {
                return Ok(());
            }
        }
        self.feed.read_through(dialog, missing, end);
        Ok(())
    }

    async fn found(&self, dialog: DialogId, missing: Missing, message: Message) -> bool {
        self.metrics.caught_up.inc();
        let seq = Seq::new(message.seq);
        let frame = encode(&ServerFrame::Message(message));
        self.feed.found(dialog, missing, seq, frame).await
    }

    /// Whether it is known beforehand that more is missed than is replayed. Between generations it is not: what was not lost is
    /// read, and counted on the way.
    fn too_far(&self, from: Seq, to: Seq) -> bool {
        from.generation() == to.generation() && to.get() - from.get() > self.replay
    }

    /// Nobody asked, but more was missed than is replayed.
    fn look_yourself(&self, dialog: DialogId, missing: Missing, head: Seq) {
        if !self.feed.give_up(dialog, missing.epoch, head) {
            return;
        }
        self.metrics.resyncs.inc();
        self.feed.outbox().push(encode(&ServerFrame::Resumed {
            id: None,
            positions: BTreeMap::new(),
            resync: vec![dialog.to_string()],
            reads: Vec::new(),
            incomplete: Vec::new(),
            now: now().to_string(),
        }));
    }

    /// Takes the client's word for what it has, sends what it misses, and says how it stands then.
    pub async fn resume(
        self,
        id: Option<String>,
        positions: Vec<(DialogId, Seq)>,
        since: Option<Timestamp>,
    ) -> ServerFrame {
        // From here on what is told live follows these positions; what was stored before is found below.
        if let Some(since) = since {
            self.feed.away_since(since);
        }
        let epochs: Vec<u32> = positions
            .iter()
            .map(|(dialog, seq)| self.feed.position(*dialog, *seq))
            .collect();
        let dialogs: Vec<DialogId> = positions.iter().map(|(dialog, _)| *dialog).collect();
        let mut heads = self.heads.of_dialogs(&dialogs).await;
        let (mut level, mut resync, mut reads) = (Vec::new(), Vec::new(), Vec::new());
        for ((dialog, seq), epoch) in positions.iter().zip(epochs) {
            let Some(head) = heads.of.get(dialog) else {
                // Its shard is away: it is asked until it answers.
                self.feed.take(&News::Head {
                    dialog: *dialog,
                    seq: Seq::new(seq.get().saturating_add(1)),
                });
                continue;
            };
            for (user, seq) in head.reads.iter().filter(|(_, seq)| *seq > Seq::ZERO) {
                reads.push(ReadMark {
                    dialog: dialog.to_string(),
                    user: user.get(),
                    seq: seq.get(),
                });
                // A mark that is told late is not told again.
                self.feed.knows_read(*dialog, *user, *seq);
            }
            if head.last_seq < *seq || (head.last_seq > *seq && self.too_far(*seq, head.last_seq)) {
                self.metrics.resyncs.inc();
                self.feed.give_up(*dialog, epoch, head.last_seq);
                resync.push(*dialog);
            } else {
                self.feed.take(&News::Head {
                    dialog: *dialog,
                    seq: head.last_seq,
                });
                level.push((*dialog, head.last_seq));
            }
        }
        if let Some(since) = since {
            let micros = now().micros().saturating_sub(since.micros());
            let micros = micros.saturating_add(2 * CLOCKS_APART);
            let within = Duration::from_micros(u64::try_from(micros).unwrap_or(0));
            let recent = self.heads.of_users(&[self.me], within).await;
            self.messages.charge(self.me, cost::inbox(recent.of.len()));
            heads.incomplete.extend(recent.incomplete);
            let unknown = |head: &&DialogHead| dialogs.binary_search(&head.dialog).is_err();
            for (n, head) in recent.of.values().filter(unknown).enumerate() {
                if positions.len() + n < self.replay_dialogs {
                    self.feed.take(&News::Head {
                        dialog: head.dialog,
                        seq: head.last_seq,
                    });
                    level.push((head.dialog, head.last_seq));
                } else {
                    resync.push(head.dialog);
                }
            }
        }
        let _ = timeout(RESUME_LIMIT, self.feed.level(&level)).await;
        let stands = |dialog: &DialogId| {
            let last = self.feed.last(*dialog)?;
            Some((dialog.to_string(), last.get()))
        };
        resync.sort_unstable();
        ServerFrame::Resumed {
            id,
            positions: level
                .iter()
                .filter_map(|(dialog, _)| stands(dialog))
                .collect(),
            resync: resync.iter().map(ToString::to_string).collect(),
            reads,
            incomplete: heads.incomplete.into_iter().collect(),
            now: now().to_string(),
        }
    }
}
