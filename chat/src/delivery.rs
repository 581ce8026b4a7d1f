//! Telling people: first those who are connected here, then the other instances.
//!
//! The bus may lose anything. A message that is lost is betrayed by the next one of its dialog; the last one of a burst has no
//! next, so a while later it is hinted at how far the dialog has come, a few times.

use crate::bus::{Bus, BusState, Topic};
use crate::dialog::{DialogId, Seq, UserId};
use crate::news::News;
use crate::registry::{Origin, Registry};
use crate::ring::Slot;
use crate::store::NewMark;
use crate::writer::{Committed, Stored};
use bytestring::ByteString;
use chat_wire::{Message, ReadMark, ServerFrame};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::time::Instant;

/// A handle; a clone is a few references.
#[derive(Clone)]
pub struct Delivery {
    registry: Registry,
    bus: Arc<dyn Bus>,
    hints: Arc<Hints>,
}

impl Delivery {
    /// Delivers to the sessions of `registry` and to what listens on `bus`.
    #[must_use]
    pub fn start(registry: Registry, bus: Arc<dyn Bus>, runtime: &Handle) -> Self {
        let hints = Arc::new(Hints::new(bus.state() != BusState::Alone));
        runtime.spawn(hint(Arc::downgrade(&hints), bus.clone()));
        Self {
            registry,
            bus,
            hints,
        }
    }

    /// The sessions here.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Whether other instances can be reached.
    #[must_use]
    pub fn bus(&self) -> BusState {
        self.bus.state()
    }

    /// Tells everyone in the dialog.
    pub fn committed(&self, committed: &Committed<'_>) {
        match committed {
            Committed::Message(message) => self.message(message),
            Committed::Mark(mark) => self.read_mark(*mark),
        }
    }

    /// Tells everyone in the dialog of a message that was committed. Encoded once, shared by all; the session that sent it is
    /// told so instead.
    fn message(&self, committed: &Stored<'_>) {
        let (message, place) = (committed.message, committed.place);
        let dialog = message.dialog;
        let (name, at) = (dialog.to_string(), place.at.to_string());
        let key = message.key.as_str();
        let origin = committed.origin.map(|session| Origin {
            session,
            frame: encode(&ServerFrame::Sent {
                key: key.to_owned(),
                dialog: name.clone(),
                seq: place.seq.get(),
                at: at.clone(),
            }),
            again: committed.repeat,
        });
        let frame = encode(&ServerFrame::Message(Message {
            dialog: name,
            seq: place.seq.get(),
            from: message.author.get(),
            to: dialog.counterpart(message.author).get(),
            text: message.text.as_str().to_owned(),
            at,
            key: Some(key.to_owned()),
        }));
        let news = News::Message {
            dialog,
            seq: place.seq,
            frame,
        };
        self.tell(dialog, &news, origin.as_ref());
        self.hints
            .note(dialog, |burst| burst.head = burst.head.max(place.seq));
    }

    /// Tells everyone in the dialog how far somebody has read; those sessions too that asked for it.
    fn read_mark(&self, mark: NewMark) {
        let NewMark {
            dialog, user, seq, ..
        } = mark;
        self.tell(dialog, &read_news(dialog, user, seq), None);
        self.hints.note(dialog, |burst| {
            burst.reads.retain(|(who, _)| *who != user);
            burst.reads.push((user, seq));
        });
    }

    /// Tells the other users of the dialog that `user` is typing.
    pub fn typing(&self, dialog: DialogId, user: UserId) {
        let news = News::Passing {
            frame: encode(&ServerFrame::Typing {
                dialog: dialog.to_string(),
                user: user.get(),
            }),
        };
        let others = || dialog.members().filter(|member| *member != user);
        others().for_each(|other| self.registry.deliver(other, &news, None));
        publish(&*self.bus, others(), &news);
    }

    /// Tells the sessions of this instance how far a dialog has come.
    pub fn head(&self, dialog: DialogId, seq: Seq) {
        for user in dialog.members() {
            self.registry
                .deliver(user, &News::Head { dialog, seq }, None);
        }
    }

    fn tell(&self, dialog: DialogId, news: &News, origin: Option<&Origin>) {
        for user in dialog.members() {
            self.registry.deliver(user, news, origin);
        }
        publish(&*self.bus, dialog.members(), news);
    }
}

/// Tells the other instances, if there may be any.
fn publish(bus: &dyn Bus, users: impl Iterator<Item = UserId>, news: &News) {
    if bus.state() != BusState::Alone {
        let payload = news.encode();
        users.for_each(|user| bus.publish(Topic::User(user), payload.clone()));
    }
}

/// A read mark, as it is told.
fn read_news(dialog: DialogId, user: UserId, seq: Seq) -> News {
    let frame = encode(&ServerFrame::Read(ReadMark {
        dialog: dialog.to_string(),
        user: user.get(),
        seq: seq.get(),
    }));
    News::Read {
        dialog,
        user,
        seq,
        frame,
    }
}

/// A frame as it goes over the wire.
#[must_use]
pub fn encode(frame: &ServerFrame) -> ByteString {
    // Frames have only strings for keys, and no value that JSON cannot write.
    serde_json::to_string(frame)
        .expect("a frame is JSON")
        .into()
}

/// What was told lately, by dialog; cut into parts so that no single lock sees every message.
struct Hints {
    /// Whether there is anybody to be hinted at anything.
    wanted: bool,
    parts: Vec<Mutex<HashMap<DialogId, Burst>>>,
}

/// What was told in one dialog since it was last silent.
struct Burst {
    head: Seq,
    reads: Vec<(UserId, Seq)>,
    last: Instant,
    hinted: usize,
}

/// So long after the last message of a burst it is hinted at.
const HINT_AFTER: [Duration; 3] = [
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
];

/// How often it is looked whether hints are due.
const LOOK_EVERY: Duration = Duration::from_millis(200);

const PARTS: usize = 64;

/// Dialogs of a part. What is beyond, after a long time without a bus, is found when its return is told.
const DIALOGS: usize = 4096;

impl Hints {
    fn new(wanted: bool) -> Self {
        Self {
            wanted,
            parts: (0..PARTS).map(|_| Mutex::default()).collect(),
        }
    }

    fn note(&self, dialog: DialogId, told: impl FnOnce(&mut Burst)) {
        if !self.wanted {
            return;
        }
        let mut part = lock(&self.parts[Slot::of(dialog).index() % PARTS]);
        if part.len() >= DIALOGS && !part.contains_key(&dialog) {
            return;
        }
        let burst = part.entry(dialog).or_insert_with(|| Burst {
            head: Seq::ZERO,
            reads: Vec::new(),
            last: Instant::now(),
            hinted: 0,
        });
        burst.last = Instant::now();
        burst.hinted = 0;
        told(burst);
    }

    /// What is due; forgets what was hinted at often enough.
    fn due(&self, part: &Mutex<HashMap<DialogId, Burst>>) -> Vec<(DialogId, News)> {
        let mut due = Vec::new();
        lock(part).retain(|dialog, burst| {
            if burst.last.elapsed() >= HINT_AFTER[burst.hinted] {
                burst.hinted += 1;
                if burst.head > Seq::ZERO {
                    let head = News::Head {
                        dialog: *dialog,
                        seq: burst.head,
                    };
                    due.push((*dialog, head));
                }
                let reads = burst.reads.iter();
                due.extend(reads.map(|(user, seq)| (*dialog, read_news(*dialog, *user, *seq))));
            }
            burst.hinted < HINT_AFTER.len()
        });
        due
    }
}

fn lock(part: &Mutex<HashMap<DialogId, Burst>>) -> MutexGuard<'_, HashMap<DialogId, Burst>> {
    part.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hints at what was told, while there are others to hear it; what falls due without a bus waits for it.
async fn hint(hints: Weak<Hints>, bus: Arc<dyn Bus>) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let Some(hints) = hints.upgrade().filter(|hints| hints.wanted) else {
            return;
        };
        for part in &hints.parts {
            if bus.state() == BusState::Connected {
                for (dialog, news) in hints.due(part) {
                    publish(&*bus, dialog.members(), &news);
                }
            }
            tokio::task::yield_now().await;
        }
    }
}
