//! Fan-out of events: to the sessions on this instance first, then to the other instances over the
//! bus.
//!
//! The bus may lose any event. The next message of the dialog reveals the loss of one before it.
//! The last message of a burst has no next one, so the position of the dialog is published again a
//! few times after it (`hints`).

use crate::bus::event::BusEvent;
use crate::bus::{Bus, BusState, Loss, Topic};
use crate::delivery::hints::Hints;
use crate::delivery::registry::{Origin, Registry};
use crate::domain::dialog::{DialogId, Seq, UserId};
use crate::domain::room::RoomChange;
use crate::messages::writer::{Committed, Stored};
use crate::store::{Audience, Body, DialogLastSeq, NewMark};
use bytestring::ByteString;
use chat_wire::{Message, ReadMark, ServerFrame};
use std::sync::Arc;
use tokio::runtime::Handle;
use tokio::sync::broadcast;

/// A handle; a clone is a few references.
#[derive(Clone)]
pub struct Delivery {
    registry: Registry,
    bus: Arc<dyn Bus>,
    hints: Hints,
}

impl Delivery {
    /// Delivers to the sessions of `registry` and publishes on `bus`.
    #[must_use]
    pub fn start(registry: Registry, bus: Arc<dyn Bus>, runtime: &Handle) -> Self {
        let hints = Hints::start(registry.clone(), bus.clone(), runtime);
        Self {
            registry,
            bus,
            hints,
        }
    }

    /// The sessions on this instance.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Whether the bus is connected and other instances can be reached.
    #[must_use]
    pub fn bus(&self) -> BusState {
        self.bus.state()
    }

    /// Receives a notification whenever publications may have been lost.
    #[must_use]
    pub fn losses(&self) -> broadcast::Receiver<Loss> {
        self.bus.losses()
    }

    /// Sends an event to those whom it concerns.
    pub fn committed(&self, committed: &Committed<'_>) {
        match committed {
            Committed::Message(entry) => self.entry(entry),
            Committed::Mark(mark) => self.read_mark(*mark),
        }
    }

    /// Sends a committed entry to its audience. It is encoded once for all receivers; the session
    /// that sent it gets `sent` instead.
    fn entry(&self, committed: &Stored<'_>) {
        let (entry, place) = (committed.message, committed.place);
        let dialog = entry.dialog;
        let (name, at) = (dialog.to_string(), place.at.to_string());
        let key = entry.key.as_str();
        let origin = committed.origin.map(|requester| Origin {
            session: requester.session,
            answer: encode(&ServerFrame::Sent {
                id: requester.id.clone(),
                key: key.to_owned(),
                dialog: name.clone(),
                seq: place.seq.get(),
                at: at.clone(),
                early: committed.repeat,
            }),
            repeat: committed.repeat,
        });
        let mut message = Message {
            dialog: name,
            seq: place.seq.get(),
            from: entry.author.get(),
            to: dialog.counterpart(entry.author).map(UserId::get),
            kind: entry.body.kind(),
            text: entry.body.text().to_owned(),
            at,
            key: Some(key.to_owned()),
            ..Message::default()
        };
        let audience = committed.audience;
        let seq = place.seq;
        let event = match (&entry.body, audience) {
            (Body::Room { .. }, Audience::Changed(_, change)) => {
                RoomChange::clone(change).describe(&mut message);
                entry_event(dialog, seq, message)
            }
            // A repeat, whose content only the shard knows: it is read from there.
            (Body::Room { .. }, Audience::Named | Audience::Members(_)) => {
                BusEvent::LastSeq { dialog, seq }
            }
            (Body::Text(_), _) => entry_event(dialog, seq, message),
        };
        self.deliver_local(audience.users(dialog), &event, origin.as_ref());
        self.hints.message(dialog, place.seq, audience);
    }

    /// Sends a read mark to both users of the dialog, and to the sessions that requested it. In a
    /// room it is sent to the user who has read: a hundred members who read each message would cost
    /// a hundred times a hundred frames.
    fn read_mark(&self, mark: NewMark) {
        let NewMark {
            dialog, user, seq, ..
        } = mark;
        let frame = encode(&ServerFrame::Read(ReadMark {
            dialog: dialog.to_string(),
            user: user.get(),
            seq: seq.get(),
        }));
        let event = BusEvent::Read {
            dialog,
            user,
            seq,
            frame,
        };
        if dialog.is_room() {
            self.deliver_local(std::iter::once(user), &event, None);
        } else {
            self.deliver_local(dialog.users(), &event, None);
        }
        self.hints.read(dialog, user, event);
    }

    /// Sends to `others` that `user` is typing.
    pub fn typing(
        &self,
        dialog: DialogId,
        user: UserId,
        others: impl Iterator<Item = UserId> + Clone,
    ) {
        let event = BusEvent::Ephemeral {
            frame: encode(&ServerFrame::Typing {
                dialog: dialog.to_string(),
                user: user.get(),
            }),
        };
        let others = others.filter(|other| *other != user);
        self.deliver_local(others, &event, None);
    }

    /// Sends the last position of a dialog to the sessions of its members on this instance.
    pub fn last_seq(&self, dialog: &DialogLastSeq) {
        for member in &dialog.members {
            let event = BusEvent::LastSeq {
                dialog: dialog.dialog,
                seq: dialog.last_for(member.user),
            };
            self.registry.deliver(member.user, &event, None);
        }
    }

    fn deliver_local(
        &self,
        users: impl Iterator<Item = UserId> + Clone,
        event: &BusEvent,
        origin: Option<&Origin>,
    ) {
        for user in users.clone() {
            self.registry.deliver(user, event, origin);
        }
        publish(&*self.bus, users, event);
    }
}

fn entry_event(dialog: DialogId, seq: Seq, message: Message) -> BusEvent {
    let kind = message.kind.clone();
    let frame = encode(&ServerFrame::entry(message));
    BusEvent::Message {
        dialog,
        seq,
        kind,
        frame,
    }
}

/// Publishes an event, if there are other instances.
fn publish(bus: &dyn Bus, users: impl Iterator<Item = UserId>, event: &BusEvent) {
    if bus.state() != BusState::Standalone {
        let payload = event.encode();
        users.for_each(|user| bus.publish(Topic::User(user), payload.clone()));
    }
}

/// A frame as it is sent over the wire.
#[must_use]
pub fn encode(frame: &ServerFrame) -> ByteString {
    // Frames have only strings for keys, and no value that JSON cannot write.
    serde_json::to_string(frame)
        .expect("a frame is JSON")
        .into()
}
