//! Hints: the position of a dialog, published again after a burst. The loss of the last message
//! before a silence is not revealed by a next one.
//!
//! A hint is cheap because it is not a message. All hints that are due go out as one publication to
//! all instances; each instance looks up whether one of the users has a session there.

use crate::bus::event::BusEvent;
use crate::bus::{Bus, BusState, Listening, Sink, Topic};
use crate::delivery::registry::Registry;
use crate::domain::dialog::{DialogId, Seq, UserId};
use crate::domain::slot::Slot;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::time::Instant;

/// The delays after the last message of a burst at which hints are published.
const HINT_AFTER: [Duration; 3] = [
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
];

/// The interval between two checks for due hints.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// A publication of this many bytes takes no further hint. A NATS server accepts 1 MiB by default.
const PUBLICATION: usize = 64 * 1024;

/// Dialogs that are checked before other tasks have their turn.
const TURN: usize = 1024;

const STRIPES: usize = 64;

/// Dialogs of a stripe, at most. After a long time without a bus there may be more: those are
/// compared with the shards when the bus is back.
const DIALOGS: usize = 4096;

/// A handle; a clone is a few references.
#[derive(Clone)]
pub struct Hints {
    inner: Arc<Inner>,
    _listening: Arc<Listening>,
}

/// The dialogs with recent events, in stripes so that no single lock is taken for every message.
struct Inner {
    /// Whether there are other instances.
    enabled: bool,
    stripes: Vec<Mutex<HashMap<DialogId, Burst>>>,
}

/// The recent events of one dialog since it was last silent.
struct Burst {
    newest: Seq,
    reads: Vec<(UserId, BusEvent)>,
    last: Instant,
    hinted: usize,
}

impl Hints {
    /// Publishes hints for events of this instance, and applies the hints of other instances to the
    /// sessions of `registry`.
    pub fn start(registry: Registry, bus: Arc<dyn Bus>, runtime: &Handle) -> Self {
        let inner = Arc::new(Inner {
            enabled: bus.state() != BusState::Standalone,
            stripes: (0..STRIPES).map(|_| Mutex::default()).collect(),
        });
        let sink: Sink = Arc::new(move |payload| take(payload, &registry));
        let listening = bus.listen(Topic::Hints, sink);
        runtime.spawn(hint(Arc::downgrade(&inner), bus));
        Self {
            inner,
            _listening: Arc::new(listening),
        }
    }

    /// Records a message.
    pub fn message(&self, dialog: DialogId, seq: Seq) {
        self.inner
            .note(dialog, |burst| burst.newest = burst.newest.max(seq));
    }

    /// Records a read mark of `user`.
    pub fn read(&self, dialog: DialogId, user: UserId, mark: BusEvent) {
        self.inner.note(dialog, |burst| {
            burst.reads.retain(|(reader, _)| *reader != user);
            burst.reads.push((user, mark));
        });
    }
}

impl Inner {
    fn note(&self, dialog: DialogId, change: impl FnOnce(&mut Burst)) {
        if !self.enabled {
            return;
        }
        let mut stripe = lock(&self.stripes[Slot::of(dialog).index() % STRIPES]);
        if stripe.len() >= DIALOGS && !stripe.contains_key(&dialog) {
            return;
        }
        let burst = stripe.entry(dialog).or_insert_with(|| Burst {
            newest: Seq::ZERO,
            reads: Vec::new(),
            last: Instant::now(),
            hinted: 0,
        });
        burst.last = Instant::now();
        burst.hinted = 0;
        change(burst);
    }

    /// Returns the number of dialogs and the hints that are due; removes dialogs whose last hint
    /// has been published.
    fn due(&self, stripe: &Mutex<HashMap<DialogId, Burst>>) -> (usize, Vec<BusEvent>) {
        let mut due = Vec::new();
        let mut stripe = lock(stripe);
        let dialogs = stripe.len();
        stripe.retain(|dialog, burst| {
            if burst.last.elapsed() >= HINT_AFTER[burst.hinted] {
                burst.hinted += 1;
                if burst.newest > Seq::ZERO {
                    due.push(BusEvent::LastSeq {
                        dialog: *dialog,
                        seq: burst.newest,
                    });
                }
                due.extend(burst.reads.iter().map(|(_, mark)| mark.clone()));
            }
            burst.hinted < HINT_AFTER.len()
        });
        (dialogs, due)
    }
}

fn lock(stripe: &Mutex<HashMap<DialogId, Burst>>) -> MutexGuard<'_, HashMap<DialogId, Burst>> {
    stripe.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Publishes due hints while there are other instances. While the bus is disconnected, due hints
/// wait.
async fn hint(hints: Weak<Inner>, bus: Arc<dyn Bus>) {
    let mut publication = BytesMut::new();
    let mut looked_at = 0;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let Some(hints) = hints.upgrade().filter(|hints| hints.enabled) else {
            return;
        };
        for stripe in &hints.stripes {
            if bus.state() != BusState::Connected {
                break;
            }
            let (dialogs, due) = hints.due(stripe);
            for event in &due {
                pack(&mut publication, event);
                if publication.len() >= PUBLICATION {
                    bus.publish(Topic::Hints, publication.split().freeze());
                }
            }
            looked_at += dialogs;
            if looked_at >= TURN {
                looked_at = 0;
                tokio::task::yield_now().await;
            }
        }
        if !publication.is_empty() {
            bus.publish(Topic::Hints, publication.split().freeze());
        }
    }
}

/// Appends an event to a publication: its length in 32 bits, then its bytes.
fn pack(publication: &mut BytesMut, event: &BusEvent) {
    let event = event.encode();
    publication.put_u32(event.len() as u32);
    publication.put(event);
}

/// Takes the first event from a publication; `None` at the end, or if it cannot be decoded.
fn unpack(publication: &mut Bytes) -> Option<Bytes> {
    let length = publication.try_get_u32().ok()? as usize;
    (length <= publication.len()).then(|| publication.split_to(length))
}

/// Applies the hints of another instance to the sessions on this one.
fn take(mut publication: Bytes, registry: &Registry) {
    while let Some(event) = unpack(&mut publication) {
        let event = BusEvent::decode(&event, None);
        if let Some(event @ (BusEvent::LastSeq { dialog, .. } | BusEvent::Read { dialog, .. })) =
            event
        {
            for user in dialog.members() {
                registry.deliver(user, &event, None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_publication_is_what_was_packed_and_ends_where_it_is_cut() {
        let event: Vec<BusEvent> = (1..4)
            .map(|seq| BusEvent::LastSeq {
                dialog: "7_42".parse().unwrap(),
                seq: Seq::new(seq),
            })
            .collect();
        let mut publication = BytesMut::new();
        event.iter().for_each(|event| pack(&mut publication, event));
        let publication = publication.freeze();
        let received = |mut bytes: Bytes| {
            let mut received = Vec::new();
            while let Some(event) = unpack(&mut bytes) {
                received.extend(BusEvent::decode(&event, None));
            }
            received
        };
        assert_eq!(received(publication.clone()), event);
        for end in 0..publication.len() {
            let cut = received(publication.slice(..end));
            assert!(cut.len() < event.len() && event.starts_with(&cut), "{end}");
        }
    }
}
