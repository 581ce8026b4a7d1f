//! Everything on its way to one session: what it has in sight, and the queue of what is to be sent.

use crate::dialog::{DialogId, Seq, Timestamp, UserId};
use crate::news::News;
use crate::outbox::Outbox;
use crate::sight::{Bounds, Missing, Sight};
use crate::store::now;
use bytestring::ByteString;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// See the module. Whoever has something for the session calls it, and waits for nothing.
pub struct Feed {
    outbox: Arc<Outbox>,
    sight: Mutex<Sight>,
    /// Wakes who reads what is missing.
    due: Notify,
    /// Wakes who waits for dialogs to be level.
    level: Notify,
}

/// How far the clocks of shards and instances may be apart, in microseconds.
pub const CLOCKS_APART: i64 = 1_000_000;

/// How long a message may be on its way, hints and all, in microseconds.
const ON_ITS_WAY: i64 = 5_000_000;

impl Feed {
    /// A feed of a session that begins now. `lossless`: see [`Sight::new`].
    #[must_use]
    pub fn new(outbox: Arc<Outbox>, bounds: Bounds, lossless: bool) -> Self {
        let since = Timestamp::from_micros(now().micros() - CLOCKS_APART);
        Self {
            outbox,
            sight: Mutex::new(Sight::new(bounds, since, lossless)),
            due: Notify::new(),
            level: Notify::new(),
        }
    }

    /// The queue.
    #[must_use]
    pub fn outbox(&self) -> &Arc<Outbox> {
        &self.outbox
    }

    fn sight(&self) -> MutexGuard<'_, Sight> {
        self.sight.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with the sight; what it sends goes to the outbox while nobody else may send.
    fn with<T>(&self, work: impl FnOnce(&mut Sight, &mut dyn FnMut(ByteString)) -> T) -> T {
        let mut sight = self.sight();
        let done = work(&mut sight, &mut |frame| self.outbox.push(frame));
        if sight.is_crowded() {
            let since = now().micros() - ON_ITS_WAY - CLOCKS_APART;
            sight.forget_some(Timestamp::from_micros(since));
        }
        done
    }

    /// Takes news.
    pub fn take(&self, news: &News) {
        let due = match news {
            News::Message { dialog, seq, frame } => {
                self.with(|sight, send| sight.live(*dialog, *seq, frame.clone(), false, send))
            }
            News::Head { dialog, seq } => self.with(|sight, _| sight.head(*dialog, *seq)),
            News::Read {
                dialog,
                user,
                seq,
                frame,
            } => {
                if self.sight().read(*dialog, *user, *seq) {
                    self.outbox.push(frame.clone());
                }
                false
            }
            News::Passing { frame } => {
                self.outbox.push_if_idle(frame);
                false
            }
        };
        if due {
            self.due.notify_one();
        }
    }

    /// The answer to a send of this session; `again` if it was stored before.
    pub fn sent(&self, dialog: DialogId, seq: Seq, frame: ByteString, again: bool) {
        let due = self.with(|sight, send| {
            if again {
                sight.again(dialog, seq, frame, send)
            } else {
                sight.live(dialog, seq, frame, true, send)
            }
        });
        if due {
            self.due.notify_one();
        }
    }

    /// See [`Sight::position`].
    pub fn position(&self, dialog: DialogId, seq: Seq) -> u32 {
        self.with(|sight, send| sight.position(dialog, seq, send))
    }

    /// See [`Sight::away_since`]. `since` is by the clock of an instance.
    pub fn away_since(&self, since: Timestamp) {
        let since = Timestamp::from_micros(since.micros().saturating_sub(CLOCKS_APART));
        self.sight().away_since(since);
    }

    /// See [`Sight::shown`].
    pub fn shown(&self, dialog: DialogId, seq: Seq) {
        self.with(|sight, _| sight.shown(dialog, seq));
    }

    /// The session has been told of a read mark otherwise.
    pub fn knows_read(&self, dialog: DialogId, user: UserId, seq: Seq) {
        self.sight().read(dialog, user, seq);
    }

    /// The next dialog to be read, when there is one.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn due(&self) -> DialogId {
        loop {
            let due = self.due.notified();
            if let Some(dialog) = self.sight().next_due() {
                return dialog;
            }
            due.await;
        }
    }

    /// See [`Sight::missing`].
    #[must_use]
    pub fn missing(&self, dialog: DialogId) -> Option<Missing> {
        self.sight().missing(dialog)
    }

    /// Sends a message that was read, once there is room for it; `false` if it is not wanted any more.
    pub async fn found(
        &self,
        dialog: DialogId,
        missing: Missing,
        seq: Seq,
        frame: ByteString,
    ) -> bool {
        self.outbox.room().await;
        self.with(|sight, send| sight.found(dialog, missing.epoch, seq, frame, send))
    }

    /// See [`Sight::read_through`].
    pub fn read_through(&self, dialog: DialogId, missing: Missing, end: Seq) {
        self.with(|sight, send| sight.read_through(dialog, missing, end, send));
        self.level.notify_waiters();
    }

    /// See [`Sight::give_up`].
    pub fn give_up(&self, dialog: DialogId, epoch: u32, head: Seq) -> bool {
        let given_up = self.with(|sight, send| sight.give_up(dialog, epoch, head, send));
        self.level.notify_waiters();
        given_up
    }

    /// See [`Sight::failed`].
    pub fn failed(&self, dialog: DialogId) {
        self.with(|sight, send| sight.failed(dialog, send));
    }

    /// See [`Sight::release`].
    pub fn release(&self) {
        self.with(|sight, send| sight.release(send));
    }

    /// Up to where the session has everything of a dialog.
    #[must_use]
    pub fn last(&self, dialog: DialogId) -> Option<Seq> {
        self.sight().last(dialog)
    }

    /// Waits until the session has everything up to these.
    pub async fn level(&self, heads: &[(DialogId, Seq)]) {
        loop {
            let level = self.level.notified();
            tokio::pin!(level);
            level.as_mut().enable();
            let reached = {
                let sight = self.sight();
                heads
                    .iter()
                    .all(|(dialog, head)| sight.last(*dialog).is_some_and(|last| last >= *head))
            };
            if reached {
                return;
            }
            level.await;
        }
    }
}
