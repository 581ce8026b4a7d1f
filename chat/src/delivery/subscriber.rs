//! The delivery state of one session: the order of its dialogs (the sequencer), and its queue of
//! outgoing frames.

use crate::bus::event::BusEvent;
use crate::clock::now;
use crate::delivery::outbound_queue::OutboundQueue;
use crate::delivery::read_marks::ReadMarks;
use crate::delivery::sequencer::{Bounds, Gap, Sequencer};
use crate::domain::dialog::{DialogId, Seq, Timestamp, UserId};
use bytestring::ByteString;
use chat_wire::ReadMark;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// See the module. No caller of it waits.
pub struct Subscriber {
    outbound: Arc<OutboundQueue>,
    sequencer: Mutex<Sequencer>,
    read_marks: Mutex<ReadMarks>,
    /// When the token of the session was issued, in seconds since 1970.
    issued: AtomicU64,
    /// Wakes the task that reads missing messages.
    due: Notify,
    /// Wakes the tasks that wait until dialogs are complete.
    advanced: Notify,
}

/// The largest difference between the clocks of shards and instances, in microseconds.
pub const CLOCKS_APART: i64 = 1_000_000;

/// The longest time for which a message is on its way, including its hints, in microseconds.
const ON_ITS_WAY: i64 = 5_000_000;

impl Subscriber {
    /// The subscriber of a session that begins now. `lossless`: see [`Sequencer::new`]; `away`: see
    /// [`Subscriber::away_since`].
    #[must_use]
    pub fn new(
        outbound: Arc<OutboundQueue>,
        bounds: Bounds,
        lossless: bool,
        away: Option<Timestamp>,
    ) -> Self {
        let since = Timestamp::from_micros(now().micros() - CLOCKS_APART);
        let subscriber = Self {
            outbound,
            read_marks: Mutex::new(ReadMarks::new(bounds.dialogs)),
            sequencer: Mutex::new(Sequencer::new(bounds, since, lossless)),
            issued: AtomicU64::new(0),
            due: Notify::new(),
            advanced: Notify::new(),
        };
        if let Some(since) = away {
            subscriber.away_since(since);
        }
        subscriber
    }

    /// The queue of outgoing frames.
    #[must_use]
    pub fn outbound(&self) -> &Arc<OutboundQueue> {
        &self.outbound
    }

    /// The session has a token that was issued at this time, in seconds since 1970.
    pub fn set_issued(&self, issued: u64) {
        self.issued.store(issued, Ordering::Relaxed);
    }

    /// When the token of the session was issued, in seconds since 1970; 0 if that is not known.
    #[must_use]
    pub fn issued(&self) -> u64 {
        self.issued.load(Ordering::Relaxed)
    }

    fn sequencer(&self) -> MutexGuard<'_, Sequencer> {
        self.sequencer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn read_marks(&self) -> MutexGuard<'_, ReadMarks> {
        self.read_marks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `work` with the sequencer. Its frames enter the queue in one piece: no other thread
    /// can send in between.
    fn with<T>(&self, work: impl FnOnce(&mut Sequencer, &mut dyn FnMut(ByteString)) -> T) -> T {
        let mut sequencer = self.sequencer();
        let done = work(&mut sequencer, &mut |frame| self.outbound.push(frame));
        if sequencer.is_crowded() {
            let since = now().micros() - ON_ITS_WAY - CLOCKS_APART;
            sequencer.forget_some(Timestamp::from_micros(since));
        }
        done
    }

    /// Applies an event.
    pub fn take(&self, event: &BusEvent) {
        let due = match event {
            BusEvent::Message {
                dialog, seq, frame, ..
            } => self.with(|sequencer, send| {
                sequencer.on_message(*dialog, *seq, frame.clone(), false, send)
            }),
            BusEvent::LastSeq { dialog, seq } => {
                self.with(|sequencer, _| sequencer.on_last_seq(*dialog, *seq))
            }
            BusEvent::Read {
                dialog,
                user,
                seq,
                frame,
            } => {
                // Queued under the lock: no lower mark comes after a higher one.
                let mut marks = self.read_marks();
                if marks.advance(*dialog, *user, *seq) {
                    self.outbound.push(frame.clone());
                }
                false
            }
            BusEvent::Ephemeral { frame } => {
                self.outbound.push_if_idle(frame);
                false
            }
        };
        if due {
            self.due.notify_one();
        }
    }

    /// The answer to a send of this session.
    pub fn sent(&self, dialog: DialogId, seq: Seq, answer: ByteString) {
        let due =
            self.with(|sequencer, send| sequencer.on_message(dialog, seq, answer, true, send));
        if due {
            self.due.notify_one();
        }
    }

    /// The answer to a send of this session whose message, `frame`, was stored before.
    pub fn repeated(&self, dialog: DialogId, seq: Seq, frame: ByteString, answer: ByteString) {
        let due =
            self.with(|sequencer, send| sequencer.on_repeat(dialog, seq, frame, answer, send));
        if due {
            self.due.notify_one();
        }
    }

    /// See [`Sequencer::position`].
    pub fn position(&self, dialog: DialogId, seq: Seq) -> u32 {
        self.with(|sequencer, send| sequencer.position(dialog, seq, send))
    }

    /// See [`Sequencer::away_since`]. `since` is by the clock of an instance.
    pub fn away_since(&self, since: Timestamp) {
        let since = Timestamp::from_micros(since.micros().saturating_sub(CLOCKS_APART));
        self.sequencer().away_since(since);
    }

    /// See [`Sequencer::track`].
    pub fn track(&self, dialog: DialogId, seq: Seq) {
        self.with(|sequencer, _| sequencer.track(dialog, seq));
    }

    /// Sends a frame with read marks that were read from a shard, once there is room. `frame` gets
    /// them, or the later ones that the session has by then.
    pub async fn send_with_marks(
        &self,
        marks: &[(DialogId, UserId, Seq)],
        frame: impl FnOnce(Vec<ReadMark>) -> ByteString,
    ) {
        self.outbound.room().await;
        let mut known = self.read_marks();
        let marks = marks.iter().map(|(dialog, user, seq)| ReadMark {
            dialog: dialog.to_string(),
            user: user.get(),
            seq: known.at_least(*dialog, *user, *seq).get(),
        });
        self.outbound.push(frame(marks.collect()));
    }

    /// The next dialog to be read, when there is one.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn due(&self) -> DialogId {
        loop {
            let due = self.due.notified();
            if let Some(dialog) = self.sequencer().next_gap() {
                return dialog;
            }
            due.await;
        }
    }

    /// See [`Sequencer::gap`].
    #[must_use]
    pub fn gap(&self, dialog: DialogId) -> Option<Gap> {
        self.sequencer().gap(dialog)
    }

    /// Sends a message that was read from a shard, once there is room; `false` if it is not needed
    /// any more.
    pub async fn found(&self, dialog: DialogId, gap: Gap, seq: Seq, frame: ByteString) -> bool {
        self.outbound.room().await;
        self.with(|sequencer, send| sequencer.found(dialog, gap.epoch, seq, frame, send))
    }

    /// See [`Sequencer::read_through`].
    pub fn read_through(&self, dialog: DialogId, gap: Gap, end: Seq) {
        self.with(|sequencer, send| sequencer.read_through(dialog, gap, end, send));
        self.advanced.notify_waiters();
    }

    /// See [`Sequencer::skip_to`].
    pub fn skip_to(&self, dialog: DialogId, epoch: u32, newest: Seq) -> bool {
        let skipped = self.with(|sequencer, send| sequencer.skip_to(dialog, epoch, newest, send));
        self.advanced.notify_waiters();
        skipped
    }

    /// See [`Sequencer::failed`].
    pub fn failed(&self, dialog: DialogId) {
        self.with(|sequencer, send| sequencer.failed(dialog, send));
    }

    /// See [`Sequencer::release`].
    pub fn release(&self) {
        self.with(|sequencer, send| sequencer.release(send));
    }

    /// The position up to which the session has every message of a dialog.
    #[must_use]
    pub fn last(&self, dialog: DialogId) -> Option<Seq> {
        self.sequencer().last(dialog)
    }

    /// Waits until the session has every message up to these positions.
    pub async fn caught_up(&self, positions: &[(DialogId, Seq)]) {
        loop {
            let advanced = self.advanced.notified();
            tokio::pin!(advanced);
            advanced.as_mut().enable();
            let reached = {
                let sequencer = self.sequencer();
                positions.iter().all(|(dialog, newest)| {
                    sequencer.last(*dialog).is_some_and(|last| last >= *newest)
                })
            };
            if reached {
                return;
            }
            advanced.await;
        }
    }
}
