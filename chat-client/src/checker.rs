//! Checks that acknowledged messages are stored: each once, where it was acknowledged, in logs
//! without a gap.

use crate::{Access, Api, ClientError};
use chat_wire::{Message, follows};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};

/// An acknowledged send.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acknowledged {
    /// The author.
    pub from: u64,
    /// The other user.
    pub to: u64,
    /// The idempotency key.
    pub key: String,
    /// The text.
    pub text: String,
    /// The seq in the acknowledgement.
    pub seq: u64,
}

/// A promise that a log breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Two neighbours in a log that do not follow each other.
    #[error("seq {seq} comes after {before}")]
    Gap {
        /// The seq before, or 0.
        before: u64,
        /// The seq that does not follow it.
        seq: u64,
    },
    /// An acknowledged message is not at its seq, or has another author or text there.
    #[error("the message with key {key} is not at its seq {seq}")]
    Lost {
        /// Its key.
        key: String,
        /// The acknowledged seq.
        seq: u64,
    },
    /// A key is in the log more than once, or at another seq than the acknowledged one.
    #[error("the message with key {key} is stored at {seqs:?}")]
    Duplicate {
        /// The key.
        key: String,
        /// The seqs.
        seqs: Vec<u64>,
    },
    /// The same log reads differently for another user, in the other direction, or through another
    /// instance.
    #[error("read as user {user} through {url}, the log is another")]
    Differs {
        /// The user.
        user: u64,
        /// The instance.
        url: String,
    },
}

/// The dialogs of acknowledged sends, by their smaller and larger user.
#[must_use]
pub fn by_dialog(acknowledged: &[Acknowledged]) -> BTreeMap<(u64, u64), Vec<&Acknowledged>> {
    let mut dialogs = BTreeMap::<_, Vec<_>>::new();
    for one in acknowledged {
        let users = (one.from.min(one.to), one.from.max(one.to));
        dialogs.entry(users).or_default().push(one);
    }
    dialogs
}

/// The faults of a log, read from its first message on. Seqs begin anew in a later generation, when
/// a shard was declared down: that is no gap.
#[must_use]
pub fn gaps(log: &[Message]) -> Vec<Fault> {
    let before = [0].into_iter().chain(log.iter().map(|message| message.seq));
    let pairs = before.zip(log.iter().map(|message| message.seq));
    pairs
        .filter(|(before, seq)| !follows(*before, *seq))
        .map(|(before, seq)| Fault::Gap { before, seq })
        .collect()
}

/// The faults of a log beside what was acknowledged in this dialog.
///
/// A message that only a lost shard had may have been sent again meanwhile. It is then stored twice
/// when the shard returns: at its seq without a key, and with the key where it was sent again.
#[must_use]
pub fn faults(log: &[Message], acknowledged: &[&Acknowledged]) -> Vec<Fault> {
    let mut faults = gaps(log);
    let by_seq: HashMap<u64, &Message> = log.iter().map(|message| (message.seq, message)).collect();
    let mut by_key = BTreeMap::<(u64, &str), Vec<u64>>::new();
    for message in log {
        if let Some(key) = &message.key {
            let seqs = by_key.entry((message.from, key)).or_default();
            seqs.push(message.seq);
        }
    }
    for one in acknowledged {
        let key = || one.key.clone();
        let Some(there) = by_seq.get(&one.seq).filter(|there| {
            there.from == one.from && there.to == Some(one.to) && there.text == one.text
        }) else {
            faults.push(Fault::Lost {
                key: key(),
                seq: one.seq,
            });
            continue;
        };
        match by_key.get(&(one.from, one.key.as_str())).map(Vec::as_slice) {
            Some([seq]) if *seq == one.seq || there.key.is_none() => {}
            seqs => faults.push(Fault::Duplicate {
                key: key(),
                seqs: seqs.unwrap_or_default().to_vec(),
            }),
        }
    }
    // Keys that were never acknowledged count, too.
    let acknowledged_twice = |author: u64, key: &str| {
        let mut known = acknowledged.iter();
        known.any(|one| one.from == author && one.key == key)
    };
    for ((author, key), seqs) in by_key.iter().filter(|(_, seqs)| seqs.len() > 1) {
        if !acknowledged_twice(*author, key) {
            faults.push(Fault::Duplicate {
                key: (*key).to_owned(),
                seqs: seqs.clone(),
            });
        }
    }
    faults
}

/// What the readings of a dialog have in common.
pub struct Reading {
    /// The log, from the first message on.
    pub log: Vec<Message>,
    /// How many messages were read, all readings together.
    pub read: u64,
    /// The readings that differ from the first.
    pub faults: Vec<Fault>,
}

/// Reads a dialog as both users, upwards and downwards, through every instance.
///
/// # Errors
/// [`ClientError`], if an instance does not answer or refuses.
pub async fn read_everywhere(
    instances: &[Access],
    users: (u64, u64),
) -> Result<Reading, ClientError> {
    let mut first: Option<Vec<Message>> = None;
    let (mut read, mut faults) = (0, Vec::new());
    for instance in instances {
        for (user, with) in [users, (users.1, users.0)] {
            let api = Api::new(instance.clone(), user).await?;
            for log in [api.log_upwards(with).await?, api.log_downwards(with).await?] {
                read += log.len() as u64;
                match &first {
                    Some(first) if *first != log => faults.push(Fault::Differs {
                        user,
                        url: instance.url(""),
                    }),
                    Some(_) => {}
                    None => first = Some(log),
                }
            }
        }
    }
    let log = first.unwrap_or_default();
    Ok(Reading { log, read, faults })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATER: u64 = 1 << 40;

    fn message(seq: u64, key: Option<&str>) -> Message {
        Message {
            dialog: "7_42".into(),
            seq,
            from: 7,
            to: Some(42),
            text: "hi".into(),
            at: String::new(),
            key: key.map(str::to_owned),
            ..Message::default()
        }
    }

    fn acknowledged(key: &str, seq: u64) -> Acknowledged {
        Acknowledged {
            from: 7,
            to: 42,
            key: key.into(),
            text: "hi".into(),
            seq,
        }
    }

    fn faults_of(log: &[(u64, Option<&str>)], sent: &[(&str, u64)]) -> Vec<Fault> {
        let log: Vec<Message> = log.iter().map(|(seq, key)| message(*seq, *key)).collect();
        let sent: Vec<Acknowledged> = sent
            .iter()
            .map(|(key, seq)| acknowledged(key, *seq))
            .collect();
        faults(&log, &sent.iter().collect::<Vec<_>>())
    }

    #[test]
    fn a_log_with_everything_once_has_no_fault() {
        assert_eq!(faults_of(&[], &[]), []);
        let log = [(1, Some("a")), (2, Some("b")), (LATER + 1, Some("c"))];
        assert_eq!(faults_of(&log, &[("a", 1), ("b", 2), ("c", LATER + 1)]), []);
    }

    #[test]
    fn a_gap_is_a_fault_and_a_new_generation_is_none() {
        let gap = |before, seq| vec![Fault::Gap { before, seq }];
        assert_eq!(faults_of(&[(1, None), (3, None)], &[]), gap(1, 3));
        assert_eq!(faults_of(&[(2, None)], &[]), gap(0, 2));
        assert_eq!(faults_of(&[(2, None), (1, None)], &[]).len(), 2);
        assert_eq!(
            faults_of(&[(1, None), (LATER + 2, None)], &[]),
            gap(1, LATER + 2)
        );
        assert_eq!(faults_of(&[(1, None), (LATER + 1, None)], &[]), []);
    }

    #[test]
    fn a_message_that_is_lost_moved_or_stored_twice_is_a_fault() {
        let lost = |key: &str, seq| Fault::Lost {
            key: key.into(),
            seq,
        };
        let stored = |key: &str, seqs: &[u64]| Fault::Duplicate {
            key: key.into(),
            seqs: seqs.to_vec(),
        };
        assert_eq!(
            faults_of(&[(1, Some("a"))], &[("a", 1), ("b", 2)]),
            [lost("b", 2)]
        );
        let twice = [(1, Some("a")), (2, Some("a"))];
        assert_eq!(faults_of(&twice, &[("a", 1)]), [stored("a", &[1, 2])]);
        assert_eq!(faults_of(&twice, &[]), [stored("a", &[1, 2])]);
        assert_eq!(
            faults_of(&[(1, Some("b"))], &[("a", 1)]),
            [stored("a", &[])]
        );
        let mut other = acknowledged("a", 1);
        other.text = "ho".into();
        assert_eq!(faults(&[message(1, Some("a"))], &[&other]), [lost("a", 1)]);
    }

    #[test]
    fn a_message_of_a_lost_shard_that_was_sent_again_may_be_there_twice() {
        let log = [(1, None), (LATER + 1, Some("a"))];
        assert_eq!(faults_of(&log, &[("a", 1)]), []);
        assert_eq!(
            faults_of(&[(1, None)], &[("a", 1)]).len(),
            1,
            "the key is nowhere"
        );
    }
}
