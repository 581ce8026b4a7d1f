//! What instances tell each other for a user: a line that says what it is, and the frame for the user's sessions, encoded once.

use crate::dialog::{DialogId, Seq, UserId};
use bytes::Bytes;
use bytestring::ByteString;

/// Something that concerns a user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// A message is stored.
    Message {
        /// Where.
        dialog: DialogId,
        /// Its place there.
        seq: Seq,
        /// The frame `message`.
        frame: ByteString,
    },
    /// The dialog has come up to here. Follows the last message of a burst, whose loss no successor would betray.
    Head {
        /// Where.
        dialog: DialogId,
        /// The last message.
        seq: Seq,
    },
    /// Somebody has read.
    Read {
        /// Where.
        dialog: DialogId,
        /// Who.
        user: UserId,
        /// Up to where.
        seq: Seq,
        /// The frame `read`.
        frame: ByteString,
    },
    /// Of the moment only: somebody is typing.
    Passing {
        /// The frame.
        frame: ByteString,
    },
}

impl News {
    /// As it goes over the bus.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let (line, frame) = match self {
            News::Message { dialog, seq, frame } => {
                (format!("message {dialog} {seq}"), Some(frame))
            }
            News::Head { dialog, seq } => (format!("head {dialog} {seq}"), None),
            News::Read {
                dialog,
                user,
                seq,
                frame,
            } => (format!("read {dialog} {user} {seq}"), Some(frame)),
            News::Passing { frame } => ("passing".to_owned(), Some(frame)),
        };
        let mut bytes = line.into_bytes();
        bytes.push(b'\n');
        bytes.extend_from_slice(frame.map_or(&[][..], |frame| frame.as_bytes()));
        bytes.into()
    }

    /// What came over the bus; `None` if it is not understood: another version of this software may say more.
    #[must_use]
    pub fn decode(bytes: &Bytes) -> Option<Self> {
        let end = bytes.iter().position(|byte| *byte == b'\n')?;
        let frame = ByteString::try_from(bytes.slice(end + 1..)).ok()?;
        let line = std::str::from_utf8(&bytes[..end]).ok()?;
        let mut words = line.split(' ');
        let kind = words.next()?;
        if kind == "passing" {
            return Some(News::Passing { frame });
        }
        let dialog = words.next()?.parse().ok()?;
        match kind {
            "message" => Some(News::Message {
                dialog,
                seq: seq(words.next())?,
                frame,
            }),
            "head" => Some(News::Head {
                dialog,
                seq: seq(words.next())?,
            }),
            "read" => Some(News::Read {
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
    fn what_is_told_is_heard_and_what_is_not_understood_is_left_alone() {
        let (dialog, seq, frame) = (
            "7_42".parse().unwrap(),
            Seq::new(9),
            ByteString::from("{\n}"),
        );
        for news in [
            News::Message {
                dialog,
                seq,
                frame: frame.clone(),
            },
            News::Head { dialog, seq },
            News::Read {
                dialog,
                user: UserId::new(42).unwrap(),
                seq,
                frame: frame.clone(),
            },
            News::Passing { frame },
        ] {
            assert_eq!(News::decode(&news.encode()), Some(news));
        }
        for strange in [
            "",
            "message 7_42 9",
            "message 42_7 9\n",
            "message 7_42 0\n",
            "head 7_42 x\n",
            "reaction 7_42 9\n",
        ] {
            assert_eq!(
                News::decode(&Bytes::from(strange.to_owned())),
                None,
                "{strange}"
            );
        }
        assert_eq!(News::decode(&Bytes::from_static(b"passing\n\xff")), None);
    }
}
