//! Reads messages that a session has missed from the shards: after a lost event, and after a
//! reconnection.

use crate::budget::cost;
use crate::bus::event::BusEvent;
use crate::clock::now;
use crate::delivery::encode;
use crate::delivery::sequencer::{Gap, Start};
use crate::delivery::subscriber::{CLOCKS_APART, Subscriber};
use crate::domain::dialog::{DialogId, Seq, Timestamp, UserId};
use crate::messages::last_seqs::LastSeqReader;
use crate::messages::{Messages, RequestError};
use crate::metrics::Metrics;
use crate::rng;
use crate::store::{DialogLastSeq, MemberState, Range};
use chat_wire::{Message, ServerFrame};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

/// The session that catches up, and what it needs for that. A clone is a few references.
#[derive(Clone)]
pub struct CatchUp {
    /// Reads messages.
    pub messages: Messages,
    /// Reads the last seqs of dialogs.
    pub last_seqs: LastSeqReader,
    /// The subscriber of the session.
    pub subscriber: Arc<Subscriber>,
    /// The user of the session.
    pub me: UserId,
    /// The number of missed messages of a dialog that are sent. If more are missed, the client is
    /// asked to reload the dialog.
    pub replay: u64,
    /// The number of dialogs that a session tracks.
    pub replay_dialogs: usize,
    /// How many dialogs are read at once.
    pub permits: Arc<Semaphore>,
    /// The metrics.
    pub metrics: Arc<Metrics>,
}

/// A message out of order arrives within this time, and need not be read.
const OVERTAKEN: Duration = Duration::from_millis(20);

/// The pause before a shard that does not answer is read again.
const TRY_AGAIN: Duration = Duration::from_millis(500);

/// How long a `resume` waits for missed messages before it is answered. The rest follows when it
/// can be read.
const RESUME_LIMIT: Duration = Duration::from_secs(5);

impl CatchUp {
    /// Reads the missing messages of the dialogs that are queued for it, one dialog after the
    /// other.
    pub async fn dialog(self, dialog: DialogId) {
        let mut waited = false;
        while let Some(gap) = self.subscriber.gap(dialog) {
            if !waited && matches!(gap.from, Start::After(_)) {
                waited = true;
                sleep(OVERTAKEN).await;
                continue;
            }
            let read = {
                let Ok(_permit) = self.permits.acquire().await else {
                    return;
                };
                self.read(dialog, gap).await
            };
            if let Err(e) = read {
                tracing::debug!(%dialog, reason = %e, "a gap cannot be read now");
                self.subscriber.failed(dialog);
                sleep(TRY_AGAIN.mul_f64(1.0 + rng::fraction())).await;
            }
        }
    }

    async fn read(&self, dialog: DialogId, gap: Gap) -> Result<(), RequestError> {
        match gap.from {
            Start::After(after) => self.read_after(dialog, gap, after).await,
            Start::Since(since) => self.read_since(dialog, gap, since).await,
        }
    }

    async fn read_after(
        &self,
        dialog: DialogId,
        gap: Gap,
        mut after: Seq,
    ) -> Result<(), RequestError> {
        let mut replayed = 0;
        if self.too_far(after, gap.newest) {
            self.send_resync(dialog, gap, gap.newest);
            return Ok(());
        }
        loop {
            let page = self
                .messages
                .history(self.me, dialog, Range::After(after), None)
                .await?;
            replayed += page.messages.len() as u64;
            for message in page.messages {
                after = Seq::new(message.seq);
                if !self.found(dialog, gap, message).await {
                    return Ok(());
                }
            }
            if !page.more {
                self.subscriber.read_through(dialog, gap, after);
                return Ok(());
            }
            if replayed >= self.replay {
                self.send_resync(dialog, gap, gap.newest.max(after));
                return Ok(());
            }
        }
    }

    async fn read_since(
        &self,
        dialog: DialogId,
        gap: Gap,
        since: Timestamp,
    ) -> Result<(), RequestError> {
        let up_to = Range::Before(Seq::new(gap.newest.get().saturating_add(1)));
        let page = self.messages.history(self.me, dialog, up_to, None).await?;
        // Both have the same format, so their texts sort by time.
        let since = since.to_string();
        let older = page
            .messages
            .iter()
            .filter(|message| message.at < since)
            .count();
        if older == 0 && page.more {
            self.send_resync(dialog, gap, gap.newest);
            return Ok(());
        }
        let end = Seq::new(page.last);
        for message in page.messages.into_iter().skip(older) {
            if !self.found(dialog, gap, message).await {
                return Ok(());
            }
        }
        self.subscriber.read_through(dialog, gap, end);
        Ok(())
    }

    async fn found(&self, dialog: DialogId, gap: Gap, message: Message) -> bool {
        self.metrics.messages_caught_up.inc();
        let seq = Seq::new(message.seq);
        let frame = encode(&ServerFrame::entry(message));
        self.subscriber.found(dialog, gap, seq, frame).await
    }

    /// Whether more messages are missed than are sent, as far as this is known without reading.
    /// Across generations it is not: the messages are read and counted.
    fn too_far(&self, from: Seq, to: Seq) -> bool {
        from.generation() == to.generation() && to.get() - from.get() > self.replay
    }

    /// More messages are missed than are sent, without a request of the client.
    fn send_resync(&self, dialog: DialogId, gap: Gap, newest: Seq) {
        if !self.subscriber.skip_to(dialog, gap.epoch, newest) {
            return;
        }
        self.metrics.resyncs.inc();
        self.subscriber
            .outbound()
            .push(encode(&ServerFrame::Resumed {
                id: None,
                positions: BTreeMap::new(),
                resync: vec![dialog.to_string()],
                reads: Vec::new(),
                incomplete: Vec::new(),
                now: now().to_string(),
            }));
    }

    /// Takes the positions of the client, sends the messages above them, and answers with the
    /// positions after that.
    pub async fn resume(
        self,
        id: Option<String>,
        positions: Vec<(DialogId, Seq)>,
        since: Option<Timestamp>,
    ) {
        // From here on live events follow these positions. Earlier messages are found below.
        if let Some(since) = since {
            self.subscriber.away_since(since);
        }
        let mut found = self.positions(&positions).await;
        if let Some(since) = since {
            self.recent(&positions, since, &mut found).await;
        }
        let positions = &found.positions;
        let _ = timeout(RESUME_LIMIT, self.subscriber.caught_up(positions)).await;
        let position = |dialog: &DialogId| {
            let last = self.subscriber.last(*dialog)?;
            Some((dialog.to_string(), last.get()))
        };
        found.resync.sort_unstable();
        let (positions, resync) = (positions.iter(), found.resync.iter());
        let resumed = |reads| ServerFrame::Resumed {
            id,
            positions: positions
                .filter_map(|(dialog, _)| position(dialog))
                .collect(),
            resync: resync.map(ToString::to_string).collect(),
            reads,
            incomplete: found.incomplete.into_iter().collect(),
            now: now().to_string(),
        };
        let frame = |reads| encode(&resumed(reads));
        self.subscriber.send_with_marks(&found.reads, frame).await;
    }

    /// Sets the positions of the client, and has the messages above them read.
    async fn positions(&self, positions: &[(DialogId, Seq)]) -> Resumption {
        let epochs: Vec<u32> = positions
            .iter()
            .map(|(dialog, seq)| self.subscriber.position(*dialog, *seq))
            .collect();
        let dialogs: Vec<DialogId> = positions.iter().map(|(dialog, _)| *dialog).collect();
        let current = self.last_seqs.of_dialogs(&dialogs, self.me).await;
        let mut found = Resumption {
            incomplete: current.incomplete,
            ..Resumption::default()
        };
        for ((dialog, seq), epoch) in positions.iter().zip(epochs) {
            let Some(state) = current.of.get(dialog) else {
                // Its shard does not answer: the read is repeated until it does.
                self.subscriber.take(&BusEvent::LastSeq {
                    dialog: *dialog,
                    seq: Seq::new(seq.get().saturating_add(1)),
                });
                continue;
            };
            // Of a room, one's own mark.
            let told = |member: &&MemberState| {
                member.read > Seq::ZERO && (!dialog.is_room() || member.user == self.me)
            };
            for member in state.members.iter().filter(told) {
                found.reads.push((*dialog, member.user, member.read));
            }
            let last_seq = state.last_for(self.me);
            // The history of a room that the user was never in says so.
            let strange = dialog.is_room() && !state.has(self.me);
            let too_far = last_seq > *seq && self.too_far(*seq, last_seq);
            if last_seq < *seq || too_far || strange || state.skips(self.me, *seq) {
                self.metrics.resyncs.inc();
                self.subscriber.skip_to(*dialog, epoch, last_seq);
                found.resync.push(*dialog);
            } else {
                self.subscriber.take(&BusEvent::LastSeq {
                    dialog: *dialog,
                    seq: last_seq,
                });
                found.positions.push((*dialog, last_seq));
            }
        }
        found
    }

    /// Has the messages since a time read, in dialogs without a position.
    async fn recent(
        &self,
        positions: &[(DialogId, Seq)],
        since: Timestamp,
        found: &mut Resumption,
    ) {
        let micros = now().micros().saturating_sub(since.micros());
        let micros = micros.saturating_add(2 * CLOCKS_APART);
        let within = Duration::from_micros(u64::try_from(micros).unwrap_or(0));
        let recent = self.last_seqs.of_users(&[self.me], within).await;
        self.messages.charge(self.me, cost::inbox(recent.of.len()));
        found.incomplete.extend(recent.incomplete);
        // The positions are ordered by dialog.
        let known =
            |dialog: DialogId| positions.binary_search_by_key(&dialog, |(dialog, _)| *dialog);
        let unknown = |state: &&DialogLastSeq| known(state.dialog).is_err() && state.has(self.me);
        for (n, state) in recent.of.values().filter(unknown).enumerate() {
            if positions.len() + n < self.replay_dialogs {
                let seq = state.last_for(self.me);
                self.subscriber.take(&BusEvent::LastSeq {
                    dialog: state.dialog,
                    seq,
                });
                found.positions.push((state.dialog, seq));
            } else {
                found.resync.push(state.dialog);
            }
        }
    }
}

/// What a `resume` has found so far.
#[derive(Default)]
struct Resumption {
    /// Dialogs that are read up to these seqs before the answer.
    positions: Vec<(DialogId, Seq)>,
    /// Dialogs that the client must read.
    resync: Vec<DialogId>,
    reads: Vec<(DialogId, UserId, Seq)>,
    /// Shards that do not answer.
    incomplete: BTreeSet<String>,
}
