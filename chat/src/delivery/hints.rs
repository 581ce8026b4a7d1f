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
use crate::store::Audience;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::collections::{BTreeMap, HashMap};
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
    /// The members of a room who are sent its newest entry.
    members: Arc<[UserId]>,
    /// Those who have left meanwhile, with their last entry.
    left: BTreeMap<UserId, Seq>,
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

    /// Records an entry.
    pub fn message(&self, dialog: DialogId, seq: Seq, audience: &Audience) {
        self.inner.note(dialog, |burst| burst.entry(seq, audience));
    }

    /// Records a read mark of `user`.
    pub fn read(&self, dialog: DialogId, user: UserId, mark: BusEvent) {
        self.inner.note(dialog, |burst| {
            burst.reads.retain(|(reader, _)| *reader != user);
            burst.reads.push((user, mark));
        });
    }
}

impl Burst {
    fn entry(&mut self, seq: Seq, audience: &Audience) {
        if let Audience::Members(users) | Audience::Changed(users, _) = audience
            && seq > self.newest
        {
            let before = std::mem::replace(&mut self.members, users.clone());
            if !Arc::ptr_eq(&before, users) {
                let newest = self.newest;
                let gone = before.iter().filter(|user| !users.contains(user));
                self.left.extend(gone.map(|user| (*user, newest)));
            }
        }
        self.newest = self.newest.max(seq);
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
            members: Arc::default(),
            left: BTreeMap::new(),
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
    fn due(&self, stripe: &Mutex<HashMap<DialogId, Burst>>) -> (usize, Vec<Hint>) {
        let mut due = Vec::new();
        let mut stripe = lock(stripe);
        let dialogs = stripe.len();
        stripe.retain(|dialog, burst| {
            if burst.last.elapsed() >= HINT_AFTER[burst.hinted] {
                burst.hinted += 1;
                let last_seq = |users, seq| Hint {
                    users,
                    event: BusEvent::LastSeq {
                        dialog: *dialog,
                        seq,
                    },
                };
                if burst.newest > Seq::ZERO {
                    due.push(last_seq(burst.members.clone(), burst.newest));
                }
                let left = burst.left.iter();
                due.extend(left.map(|(user, seq)| last_seq(Arc::new([*user]), *seq)));
                due.extend(burst.reads.iter().map(|(reader, mark)| Hint {
                    users: if dialog.is_room() {
                        Arc::new([*reader])
                    } else {
                        Arc::default()
                    },
                    event: mark.clone(),
                }));
            }
            burst.hinted < HINT_AFTER.len()
        });
        (dialogs, due)
    }
}

/// An event that is published again.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hint {
    /// The users whom it is for, beside those whom the id of the dialog names.
    users: Arc<[UserId]>,
    event: BusEvent,
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
            for hint in &due {
                pack(&mut publication, hint);
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

/// Appends a hint to a publication: the number of its users in 32 bits, then each in 64; the length
/// of its event in 32 bits, then its bytes.
fn pack(publication: &mut BytesMut, hint: &Hint) {
    publication.put_u32(hint.users.len() as u32);
    for user in hint.users.iter() {
        publication.put_u64(user.get());
    }
    let event = hint.event.encode();
    publication.put_u32(event.len() as u32);
    publication.put(event);
}

/// Takes the first hint from a publication; `None` at the end, or if it cannot be decoded.
fn unpack(publication: &mut Bytes) -> Option<Hint> {
    let users = publication.try_get_u32().ok()? as usize;
    if users > publication.len() / size_of::<u64>() {
        return None;
    }
    let users = (0..users).map(|_| publication.try_get_u64().ok());
    let users: Option<Vec<UserId>> = users.map(|user| UserId::new(user?).ok()).collect();
    let length = publication.try_get_u32().ok()? as usize;
    let event = (length <= publication.len()).then(|| publication.split_to(length))?;
    Some(Hint {
        users: users?.into(),
        event: BusEvent::decode(&event, None)?,
    })
}

/// Applies the hints of another instance to the sessions on this one.
fn take(mut publication: Bytes, registry: &Registry) {
    while let Some(Hint { users, event }) = unpack(&mut publication) {
        if let BusEvent::LastSeq { dialog, .. } | BusEvent::Read { dialog, .. } = event {
            for user in dialog.users().chain(users.iter().copied()) {
                registry.deliver(user, &event, None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(id: u64) -> UserId {
        UserId::new(id).unwrap()
    }

    #[test]
    fn a_publication_is_what_was_packed_and_ends_where_it_is_cut() {
        let hints: Vec<Hint> = (1..4)
            .map(|seq| Hint {
                users: (1..seq).map(user).collect(),
                event: BusEvent::LastSeq {
                    dialog: "7_42".parse().unwrap(),
                    seq: Seq::new(seq),
                },
            })
            .collect();
        let mut publication = BytesMut::new();
        hints.iter().for_each(|hint| pack(&mut publication, hint));
        let publication = publication.freeze();
        let received = |mut bytes: Bytes| {
            let mut received = Vec::new();
            while let Some(hint) = unpack(&mut bytes) {
                received.push(hint);
            }
            received
        };
        assert_eq!(received(publication.clone()), hints);
        for end in 0..publication.len() {
            let cut = received(publication.slice(..end));
            assert!(cut.len() < hints.len() && hints.starts_with(&cut), "{end}");
        }
    }

    #[test]
    fn those_who_leave_are_hinted_at_their_last_entry() {
        let mut burst = Burst {
            newest: Seq::ZERO,
            members: Arc::default(),
            left: BTreeMap::new(),
            reads: Vec::new(),
            last: Instant::now(),
            hinted: 0,
        };
        let of = |users: &[u64]| Audience::Members(users.iter().copied().map(user).collect());
        burst.entry(Seq::new(1), &of(&[7, 8, 9]));
        burst.entry(Seq::new(2), &of(&[7, 8, 9]));
        burst.entry(Seq::new(3), &of(&[7, 9]));
        burst.entry(Seq::new(2), &of(&[7, 8, 9]));
        burst.entry(Seq::new(4), &of(&[9]));
        let left: Vec<_> = burst
            .left
            .iter()
            .map(|(user, seq)| (user.get(), seq.get()))
            .collect();
        assert_eq!(left, [(7, 3), (8, 2)]);
        assert_eq!((burst.newest.get(), burst.members.len()), (4, 1));
    }
}
