//! Events that instances publish for a user: a line with the kind and the ids, and the frame for
//! the user's sessions, encoded once.

use crate::domain::dialog::{DialogId, Seq, UserId};
use bytes::Bytes;
use bytestring::ByteString;

/// An event for the sessions of a user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BusEvent {
    /// A message is stored.
    Message {
        /// The dialog.
        dialog: DialogId,
        /// The seq of the message.
        seq: Seq,
        /// The frame `message`.
        frame: ByteString,
    },
    /// The last seq of the dialog. Sent after a burst: if its last message is lost, no later
    /// message reveals the gap.
    LastSeq {
        /// The dialog.
        dialog: DialogId,
        /// The last seq.
        seq: Seq,
    },
    /// A read mark has moved.
    Read {
        /// The dialog.
        dialog: DialogId,
        /// The user.
        user: UserId,
        /// The seq that the user has read up to.
        seq: Seq,
        /// The frame `read`.
        frame: ByteString,
    },
    /// A frame that is dropped if the session is busy, such as `typing`.
    Ephemeral {
        /// The frame.
        frame: ByteString,
    },
}

impl BusEvent {
    /// The payload for the bus.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let (line, frame) = match self {
            BusEvent::Message { dialog, seq, frame } => {
                (format!("message {dialog} {seq}"), Some(frame))
            }
            BusEvent::LastSeq { dialog, seq } => (format!("last_seq {dialog} {seq}"), None),
            BusEvent::Read {
                dialog,
                user,
                seq,
                frame,
            } => (format!("read {dialog} {user} {seq}"), Some(frame)),
            BusEvent::Ephemeral { frame } => ("ephemeral".to_owned(), Some(frame)),
        };
        let mut bytes = line.into_bytes();
        bytes.push(b'\n');
        bytes.extend_from_slice(frame.map_or(&[][..], |frame| frame.as_bytes()));
        bytes.into()
    }

    /// Reads a payload from the bus; `None` if this version does not know it.
    #[must_use]
    pub fn decode(bytes: &Bytes) -> Option<Self> {
        let end = bytes.iter().position(|byte| *byte == b'\n')?;
        let frame = ByteString::try_from(bytes.slice(end + 1..)).ok()?;
        let line = std::str::from_utf8(&bytes[..end]).ok()?;
        let mut words = line.split(' ');
        let kind = words.next()?;
        if kind == "ephemeral" {
            return Some(BusEvent::Ephemeral { frame });
        }
        let dialog = words.next()?.parse().ok()?;
        match kind {
            "message" => Some(BusEvent::Message {
                dialog,
                seq: seq(words.next())?,
                frame,
            }),
            "last_seq" => Some(BusEvent::LastSeq {
                dialog,
                seq: seq(words.next())?,
            }),
            "read" => Some(BusEvent::Read {
                dialog,
                user: words.next()?.parse().ok()?,
                seq: seq(words.next())?,
                frame,
            }),
            _ => None,
        }
    }
}

fn seq(word: Option<&str>) -> Option<Seq> {
    word?.parse().ok().filter(|seq| *seq > 0).map(Seq::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_decodes_to_itself_and_an_unknown_payload_to_none() {
        let (dialog, seq, frame) = (
            "7_42".parse().unwrap(),
            Seq::new(9),
            ByteString::from("{\n}"),
        );
        for event in [
            BusEvent::Message {
                dialog,
                seq,
                frame: frame.clone(),
            },
            BusEvent::LastSeq { dialog, seq },
            BusEvent::Read {
                dialog,
                user: UserId::new(42).unwrap(),
                seq,
                frame: frame.clone(),
            },
            BusEvent::Ephemeral { frame },
        ] {
            assert_eq!(BusEvent::decode(&event.encode()), Some(event));
        }
        for strange in [
            "",
            "message 7_42 9",
            "message 42_7 9\n",
            "message 7_42 0\n",
            "last_seq 7_42 x\n",
            "reaction 7_42 9\n",
        ] {
            assert_eq!(
                BusEvent::decode(&Bytes::from(strange.to_owned())),
                None,
                "{strange}"
            );
        }
        assert_eq!(
            BusEvent::decode(&Bytes::from_static(b"ephemeral\n\xff")),
            None
        );
    }
}
