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
use crate::messages::writer::{Committed, Stored};
use crate::store::NewMark;
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

    /// Sends an event to both users of the dialog.
    pub fn committed(&self, committed: &Committed<'_>) {
        match committed {
            Committed::Message(message) => self.message(message),
            Committed::Mark(mark) => self.read_mark(*mark),
        }
    }

    /// Sends a committed message to both users of the dialog. It is encoded once for all receivers;
    /// the session that sent it gets `sent` instead.
    fn message(&self, committed: &Stored<'_>) {
        let (message, place) = (committed.message, committed.place);
        let dialog = message.dialog;
        let (name, at) = (dialog.to_string(), place.at.to_string());
        let key = message.key.as_str();
        let origin = committed.origin.map(|requester| Origin {
            session: requester.session,
            answer: encode(&ServerFrame::Sent {
                id: requester.id.clone(),
                key: key.to_owned(),
                dialog: name.clone(),
                seq: place.seq.get(),
                at: at.clone(),
            }),
            repeat: committed.repeat,
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
        let event = BusEvent::Message {
            dialog,
            seq: place.seq,
            frame,
        };
        self.deliver_local(dialog, &event, origin.as_ref());
        self.hints.message(dialog, place.seq);
    }

    /// Sends a read mark to both users of the dialog, and to the sessions that requested it.
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
        self.deliver_local(dialog, &event, None);
        self.hints.read(dialog, user, event);
    }

    /// Sends to the other user of the dialog that `user` is typing.
    pub fn typing(&self, dialog: DialogId, user: UserId) {
        let event = BusEvent::Ephemeral {
            frame: encode(&ServerFrame::Typing {
                dialog: dialog.to_string(),
                user: user.get(),
            }),
        };
        let others = || dialog.members().filter(|member| *member != user);
        others().for_each(|other| self.registry.deliver(other, &event, None));
        publish(&*self.bus, others(), &event);
    }

    /// Sends the last position of a dialog to the sessions on this instance.
    pub fn last_seq(&self, dialog: DialogId, seq: Seq) {
        for user in dialog.members() {
            self.registry
                .deliver(user, &BusEvent::LastSeq { dialog, seq }, None);
        }
    }

    fn deliver_local(&self, dialog: DialogId, event: &BusEvent, origin: Option<&Origin>) {
        for user in dialog.members() {
            self.registry.deliver(user, event, origin);
        }
        publish(&*self.bus, dialog.members(), event);
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
