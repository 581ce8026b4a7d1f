//! Events that instances publish for a user: a line with the kind and the ids, and the frame for
//! the user's sessions, encoded once.

use crate::domain::dialog::{DialogId, Key, Seq, Timestamp, UserId};
use bytes::Bytes;
use bytestring::ByteString;
use chat_wire::{Kind, ReadMark, ServerFrame};

/// An event for the sessions of a user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BusEvent {
    /// An entry is stored.
    Message {
        /// The dialog.
        dialog: DialogId,
        /// The seq of the entry.
        seq: Seq,
        /// What it is.
        kind: Kind,
        /// The frame `message` or `entry`.
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
            BusEvent::Message {
                dialog, seq, frame, ..
            } => (format!("message {dialog} {seq}"), Some(frame)),
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

    /// Reads a payload from the bus; `None` if it is not what an instance publishes, or if it is
    /// published for `user` and does not concern that user, as far as the id of the dialog says
    /// that. The frame is made anew from its parts: the bytes of another instance, or of somebody
    /// else who reaches the bus, never reach a client as they are.
    #[must_use]
    pub fn decode(bytes: &Bytes, user: Option<UserId>) -> Option<Self> {
        let end = bytes.iter().position(|byte| *byte == b'\n')?;
        let frame = std::str::from_utf8(&bytes[end + 1..]).ok()?;
        let line = std::str::from_utf8(&bytes[..end]).ok()?;
        let mut words = line.split(' ');
        let kind = words.next()?;
        if kind == "ephemeral" {
            let event = BusEvent::Ephemeral {
                frame: typing(frame, user?)?,
            };
            return words.next().is_none().then_some(event);
        }
        let dialog: DialogId = words.next()?.parse().ok()?;
        let concerns = |user| dialog.is_room() || dialog.names(user);
        let event = match kind {
            "message" => {
                let seq = seq(words.next())?;
                let (kind, frame) = message(frame, dialog, seq)?;
                BusEvent::Message {
                    dialog,
                    seq,
                    kind,
                    frame,
                }
            }
            "last_seq" => BusEvent::LastSeq {
                dialog,
                seq: seq(words.next())?,
            },
            "read" => {
                let (user, seq) = (words.next()?.parse().ok()?, seq(words.next())?);
                let frame = read(frame, dialog, user, seq)?;
                BusEvent::Read {
                    dialog,
                    user,
                    seq,
                    frame,
                }
            }
            _ => return None,
        };
        (user.is_none_or(concerns) && words.next().is_none()).then_some(event)
    }
}

fn parsed(frame: &str) -> Option<ServerFrame> {
    serde_json::from_str(frame).ok()
}

fn encoded(frame: &ServerFrame) -> Option<ByteString> {
    serde_json::to_string(frame).ok().map(Into::into)
}

/// The frame of an entry at this place, by a user of the dialog to the other.
fn message(frame: &str, dialog: DialogId, seq: Seq) -> Option<(Kind, ByteString)> {
    let (ServerFrame::Message(message) | ServerFrame::Entry(message)) = parsed(frame)? else {
        return None;
    };
    let from = UserId::new(message.from).ok()?;
    let fits = (dialog.is_room() || dialog.names(from))
        && message.dialog == dialog.to_string()
        && message.seq == seq.get()
        && message.to == dialog.counterpart(from).map(UserId::get)
        && message.at.parse::<Timestamp>().is_ok()
        && message
            .key
            .as_ref()
            .is_none_or(|key| Key::new(key.clone()).is_ok());
    let kind = message.kind.clone();
    fits.then(|| Some((kind, encoded(&ServerFrame::entry(message))?)))?
}

/// The frame of a read mark of a member of the dialog.
fn read(frame: &str, dialog: DialogId, user: UserId, seq: Seq) -> Option<ByteString> {
    let ServerFrame::Read(mark) = parsed(frame)? else {
        return None;
    };
    let expected = ReadMark {
        dialog: dialog.to_string(),
        user: user.get(),
        seq: seq.get(),
    };
    let fits = mark == expected && (dialog.is_room() || dialog.names(user));
    fits.then(|| encoded(&ServerFrame::Read(mark)))?
}

/// The frame that says that another member of a dialog of `user` is typing.
fn typing(frame: &str, user: UserId) -> Option<ByteString> {
    let ServerFrame::Typing { dialog, user: who } = parsed(frame)? else {
        return None;
    };
    let members: DialogId = dialog.parse().ok()?;
    let who_id = UserId::new(who).ok()?;
    let fits =
        members.is_room() || (members.names(user) && members.counterpart(user) == Some(who_id));
    fits.then(|| encoded(&ServerFrame::Typing { dialog, user: who }))?
}

fn seq(word: Option<&str>) -> Option<Seq> {
    word?.parse().ok().filter(|seq| *seq > 0).map(Seq::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MESSAGE: &str = r#"{"type":"message","dialog":"7_42","seq":9,"from":7,"to":42,"text":"a\nb","at":"2026-11-21T05:00:00.123456Z","key":"k"}"#;
    const READ: &str = r#"{"type":"read","dialog":"7_42","user":42,"seq":9}"#;
    const TYPING: &str = r#"{"type":"typing","dialog":"7_42","user":42}"#;

    fn user(id: u64) -> UserId {
        UserId::new(id).unwrap()
    }

    fn decoded(payload: &str, for_user: u64) -> Option<BusEvent> {
        BusEvent::decode(&Bytes::from(payload.to_owned()), Some(user(for_user)))
    }

    #[test]
    fn every_event_decodes_to_itself_for_a_member_and_for_nobody_else() {
        let (dialog, seq) = ("7_42".parse().unwrap(), Seq::new(9));
        for event in [
            BusEvent::Message {
                dialog,
                seq,
                kind: Kind::Text,
                frame: MESSAGE.into(),
            },
            BusEvent::LastSeq { dialog, seq },
            BusEvent::Read {
                dialog,
                user: user(42),
                seq,
                frame: READ.into(),
            },
            BusEvent::Ephemeral {
                frame: TYPING.into(),
            },
        ] {
            assert_eq!(
                BusEvent::decode(&event.encode(), Some(user(7))),
                Some(event.clone())
            );
            assert_eq!(BusEvent::decode(&event.encode(), Some(user(8))), None);
        }
    }

    #[test]
    fn what_no_instance_publishes_is_dropped() {
        for strange in [
            "",
            "message 7_42 9",
            "message 42_7 9\n",
            "message 7_42 0\n",
            "last_seq 7_42 x\n",
            "last_seq 7_42 9 9\n",
            "reaction 7_42 9\n",
            "ephemeral\n",
            "message 7_42 9\n{}",
            r#"ephemeral
{"type":"welcome","user":7,"session":"1","protocol":"chat.v1","limits":{}}"#,
        ] {
            assert_eq!(decoded(strange, 7), None, "{strange}");
        }
        assert_eq!(
            BusEvent::decode(&Bytes::from_static(b"ephemeral\n\xff"), Some(user(7))),
            None
        );
        // A frame that does not say what its line says, or what it cannot be.
        for (line, frame, from, to) in [
            ("message 7_42 9", MESSAGE, "\"seq\":9", "\"seq\":10"),
            ("message 7_42 9", MESSAGE, "7_42", "7_43"),
            ("message 7_42 9", MESSAGE, "\"from\":7", "\"from\":8"),
            ("message 7_42 9", MESSAGE, "\"to\":42", "\"to\":7"),
            ("message 7_42 9", MESSAGE, "2026-11-21", "yesterday"),
            ("message 7_42 9", MESSAGE, "\"k\"", "\"\""),
            ("message 7_42 9", MESSAGE, "message", "error"),
            ("read 7_42 42 9", READ, "\"user\":42", "\"user\":7"),
            ("read 7_42 42 9", READ, "\"seq\":9", "\"seq\":8"),
            ("read 7_42 43 9", READ, "\"user\":42", "\"user\":43"),
            ("ephemeral", TYPING, "\"user\":42", "\"user\":7"),
            ("ephemeral", TYPING, "7_42", "8_42"),
            ("ephemeral", MESSAGE, "", ""),
        ] {
            let forged = format!("{line}\n{}", frame.replacen(from, to, 1));
            assert_eq!(decoded(&forged, 7), None, "{forged}");
        }
        // What is added to a frame does not reach the client.
        let more = MESSAGE.replacen('{', r#"{"html":"<b>","#, 1);
        let event = decoded(&format!("message 7_42 9\n{more}"), 7);
        let Some(BusEvent::Message { frame, .. }) = event else {
            panic!("{event:?}");
        };
        assert_eq!(frame, MESSAGE);
    }
}
