//! Telling people: first those who are connected here, then the other instances.

use crate::bus::{Bus, BusState, Topic};
use crate::dialog::{DialogId, UserId};
use crate::outbox::Outbox;
use crate::registry::{Joined, Registry, TooMany};
use crate::writer::Committed;
use bytestring::ByteString;
use chat_wire::{Message, ReadMark, ServerFrame};
use std::sync::Arc;

/// A handle; a clone is a few references.
#[derive(Clone)]
pub struct Delivery {
    registry: Registry,
    bus: Arc<dyn Bus>,
}

impl Delivery {
    /// Delivers to the sessions of `registry` and to what listens on `bus`.
    #[must_use]
    pub fn new(registry: Registry, bus: Arc<dyn Bus>) -> Self {
        Self { registry, bus }
    }

    /// Makes a session hear what is for `user`.
    ///
    /// # Errors
    /// [`TooMany`].
    pub fn join(&self, user: UserId, outbox: Arc<Outbox>) -> Result<Joined, TooMany> {
        self.registry.join(user, outbox, &*self.bus)
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

    /// Tells everyone in the dialog of a message that was committed. Encoded once, shared by all.
    pub fn message(&self, committed: &Committed<'_>) {
        let message = committed.message;
        let frame = encode(&ServerFrame::Message(Message {
            dialog: message.dialog.to_string(),
            seq: committed.place.seq.get(),
            from: message.author.get(),
            to: message.dialog.counterpart(message.author).get(),
            text: message.text.as_str().to_owned(),
            at: committed.place.at.to_string(),
            key: Some(message.key.as_str().to_owned()),
        }));
        self.tell(message.dialog, &frame, committed.origin);
    }

    /// Tells everyone in the dialog how far somebody has read.
    pub fn read_mark(&self, dialog: DialogId, mark: ReadMark, origin: Option<u64>) {
        self.tell(dialog, &encode(&ServerFrame::Read(mark)), origin);
    }

    fn tell(&self, dialog: DialogId, frame: &ByteString, origin: Option<u64>) {
        for user in dialog.members() {
            self.registry.deliver(user, frame, origin);
        }
        for user in dialog.members() {
            self.bus
                .publish(Topic::User(user), frame.as_bytes().clone());
        }
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
