//! What is remembered of a shard, so that the seqs of a batch can be given before the shard is
//! asked.
//!
//! Nothing rests on it: the transaction that stores a [`Draft`] compares everything the draft was
//! worked out from. What is remembered wrongly costs a round trip.

use super::batch_plan::Draft;
use super::{BatchResult, Body, Expected, NewMark, NewMessage, RoomMembers, WriteOutcome};
use crate::clock::now;
use crate::domain::dialog::{DialogId, Seq, Timestamp};
use crate::domain::ownership::Term;
use crate::domain::slot::Slot;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The terms and last seqs that are remembered of one shard.
pub struct SeqCache {
    /// Cut by slot, so that no single lock sees every message.
    stripes: Vec<Mutex<Stripe>>,
    /// By how many microseconds the shard's clock is ahead of ours.
    ahead: AtomicI64,
}

#[derive(Default)]
struct Stripe {
    terms: HashMap<Slot, Term>,
    /// Of rooms that are remembered, the members, with the term of the slot. Bounded as the last
    /// seqs are, but fewer: each may have a hundred members.
    rooms: HashMap<DialogId, (Term, RoomMembers)>,
    older_rooms: HashMap<DialogId, (Term, RoomMembers)>,
    /// Two generations of entries: when the young are many, the old are forgotten, and the young
    /// are the old.
    young: HashMap<DialogId, Remembered>,
    old: HashMap<DialogId, Remembered>,
}

#[derive(Clone, Copy)]
struct Remembered {
    last_seq: Seq,
    /// The hour of the last message: the first of a later one has more to write.
    hour: i64,
}

const STRIPES: usize = 16;

/// Young last seqs of a stripe. All in all a shard has at most two times sixteen times as many, of
/// 48 bytes each.
const YOUNG: usize = 4096;

/// Young rooms of a stripe.
const YOUNG_ROOMS: usize = 256;

impl Default for SeqCache {
    fn default() -> Self {
        Self {
            stripes: (0..STRIPES).map(|_| Mutex::default()).collect(),
            ahead: AtomicI64::new(0),
        }
    }
}

impl SeqCache {
    fn stripe(&self, slot: Slot) -> MutexGuard<'_, Stripe> {
        let stripe = &self.stripes[slot.index() % STRIPES];
        stripe.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works out a batch by what is remembered; `None` if the term of a slot is not, or if it has
    /// more for a room than messages of members that are remembered. Of the read marks, those go
    /// with it whose slot's term is remembered.
    #[must_use]
    pub fn draft(&self, batch: &[NewMessage], marks: &[NewMark]) -> Option<Draft> {
        let shard_now = now().micros() + self.ahead.load(Ordering::Relaxed);
        let hour = Timestamp::from_micros(shard_now).hour();
        let mut terms = BTreeMap::new();
        let mut expected = HashMap::with_capacity(batch.len());
        for message in batch {
            let stripe = self.stripe(message.slot);
            let term = *stripe.terms.get(&message.slot)?;
            terms.insert(message.slot, term);
            let remembered = stripe
                .get(message.dialog)
                .filter(|remembered| remembered.hour == hour);
            let last_seq = remembered.map(|remembered| remembered.last_seq);
            let room = if message.dialog.is_room() {
                let members = stripe.members(message.dialog, term)?;
                let is_message = matches!(message.body, Body::Text(_));
                if !(is_message && last_seq.is_some() && members.has(message.author)) {
                    return None;
                }
                Some(members)
            } else {
                None
            };
            if let Some(last_seq) = last_seq {
                expected.insert(message.dialog, Expected { last_seq, room });
            }
        }
        let mut with_them = Vec::new();
        for mark in marks {
            if let Some(term) = self.stripe(mark.slot).terms.get(&mark.slot) {
                terms.insert(mark.slot, *term);
                with_them.push(*mark);
            }
        }
        Some(Draft {
            marks: with_them,
            ..Draft::new(batch, terms, expected)
        })
    }

    /// Remembers the terms that a write has shown, and where it stored its messages.
    pub fn learn(&self, batch: &[NewMessage], receipt: &BatchResult) {
        for (slot, term) in &receipt.terms {
            self.stripe(*slot).terms.insert(*slot, *term);
        }
        for (room, members) in &receipt.rooms {
            let slot = Slot::of(*room);
            let mut stripe = self.stripe(slot);
            if let Some(term) = stripe.terms.get(&slot).copied() {
                stripe.keep_members(*room, term, members.clone());
            }
        }
        self.stored(batch, &receipt.written, receipt.now);
    }

    /// The members of a room, as far as they are remembered.
    #[must_use]
    pub fn members(&self, room: DialogId) -> Option<RoomMembers> {
        let slot = Slot::of(room);
        let stripe = self.stripe(slot);
        let term = stripe.terms.get(&slot)?;
        stripe.members(room, *term)
    }

    /// The members of a room have changed.
    pub fn forget_members(&self, room: DialogId) {
        let mut stripe = self.stripe(Slot::of(room));
        stripe.rooms.remove(&room);
        stripe.older_rooms.remove(&room);
    }

    /// Remembers where messages were stored.
    pub fn stored(&self, batch: &[NewMessage], written: &[WriteOutcome], shard_now: Timestamp) {
        let ahead = shard_now.micros() - now().micros();
        self.ahead.store(ahead, Ordering::Relaxed);
        for (message, written) in batch.iter().zip(written) {
            if let WriteOutcome::Stored(place, _) = written {
                let remembered = Remembered {
                    last_seq: place.seq,
                    hour: place.at.hour(),
                };
                self.stripe(message.slot).keep(message.dialog, remembered);
            }
        }
    }

    /// Another instance has stored a message of a dialog that is remembered here.
    pub fn remote_message(&self, dialog: DialogId, seq: Seq) {
        let mut stripe = self.stripe(Slot::of(dialog));
        if let Some(remembered) = stripe
            .get(dialog)
            .filter(|remembered| remembered.last_seq < seq)
        {
            // It is known to be recent: messages are published as soon as they are stored.
            let shard_now = now().micros() + self.ahead.load(Ordering::Relaxed);
            let hour = Timestamp::from_micros(shard_now).hour();
            let last_seq = seq;
            stripe.keep(
                dialog,
                Remembered {
                    last_seq,
                    hour: hour.max(remembered.hour),
                },
            );
        }
    }

    /// Forgets the last seqs of these dialogs.
    pub fn forget_last_seqs(&self, batch: &[NewMessage]) {
        for message in batch {
            let mut stripe = self.stripe(message.slot);
            stripe.young.remove(&message.dialog);
            stripe.old.remove(&message.dialog);
            stripe.rooms.remove(&message.dialog);
            stripe.older_rooms.remove(&message.dialog);
        }
    }

    /// Forgets the terms of these slots.
    pub fn forget_terms(&self, slots: impl IntoIterator<Item = Slot>) {
        for slot in slots {
            self.stripe(slot).terms.remove(&slot);
        }
    }

    /// Forgets everything: the connection was lost, and with it the certainty that the shard is as
    /// it was.
    pub fn clear(&self) {
        for stripe in &self.stripes {
            *stripe.lock().unwrap_or_else(PoisonError::into_inner) = Stripe::default();
        }
    }
}

impl Stripe {
    fn get(&self, dialog: DialogId) -> Option<Remembered> {
        let remembered = self.young.get(&dialog).or_else(|| self.old.get(&dialog));
        remembered.copied()
    }

    fn members(&self, room: DialogId, term: Term) -> Option<RoomMembers> {
        let known = self
            .rooms
            .get(&room)
            .or_else(|| self.older_rooms.get(&room));
        let (of, members) = known?;
        (*of == term).then(|| members.clone())
    }

    fn keep_members(&mut self, room: DialogId, term: Term, members: RoomMembers) {
        if self.rooms.len() >= YOUNG_ROOMS && !self.rooms.contains_key(&room) {
            self.older_rooms = std::mem::take(&mut self.rooms);
        }
        self.rooms.insert(room, (term, members));
    }

    fn keep(&mut self, dialog: DialogId, remembered: Remembered) {
        if self.young.len() >= YOUNG && !self.young.contains_key(&dialog) {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(dialog, remembered);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::dialog::{Key, Text, UserId};
    use crate::store::{Audience, Receipt};

    const TERM: Term = Term {
        number: 3,
        generation: 0,
    };

    fn message(dialog: &str, key: &str) -> NewMessage {
        let dialog: DialogId = dialog.parse().unwrap();
        let author = dialog.users().next().unwrap();
        let (key, text) = (
            Key::new(key.into()).unwrap(),
            Text::new("x".into(), 1).unwrap(),
        );
        NewMessage::new(dialog, author, key, Body::Text(text))
    }

    fn stored(seq: u64) -> WriteOutcome {
        let seq = Seq::new(seq);
        WriteOutcome::Stored(Receipt { seq, at: now() }, Audience::Named)
    }

    fn receipt(batch: &[NewMessage], written: Vec<WriteOutcome>) -> BatchResult {
        BatchResult {
            written,
            terms: batch.iter().map(|message| (message.slot, TERM)).collect(),
            rooms: Vec::new(),
            now: now(),
        }
    }

    #[test]
    fn what_was_stored_is_gone_on_from_and_what_another_instance_stored_too() {
        let (seq_cache, batch) = (SeqCache::default(), [message("7_42", "a")]);
        assert!(seq_cache.draft(&batch, &[]).is_none(), "no term is known");
        seq_cache.learn(&batch, &receipt(&batch, vec![stored(5)]));
        let draft = seq_cache.draft(&batch, &[]).unwrap();
        assert_eq!(draft.terms[&batch[0].slot], TERM);
        assert_eq!(draft.plan.rows[0].place.seq, Seq::new(6));
        seq_cache.remote_message(batch[0].dialog, Seq::new(8));
        seq_cache.remote_message(batch[0].dialog, Seq::new(7));
        let draft = seq_cache.draft(&batch, &[]).unwrap();
        assert_eq!(draft.expected[&batch[0].dialog].last_seq, Seq::new(8));
        seq_cache.forget_last_seqs(&batch);
        seq_cache.remote_message(batch[0].dialog, Seq::new(9));
        assert!(seq_cache.draft(&batch, &[]).unwrap().expected.is_empty());
        seq_cache.forget_terms([batch[0].slot]);
        assert!(seq_cache.draft(&batch, &[]).is_none());
    }

    #[test]
    fn the_first_message_of_an_hour_expects_nothing() {
        let (seq_cache, batch) = (SeqCache::default(), [message("7_42", "a")]);
        let before = Timestamp::from_micros(now().micros() - Timestamp::HOUR);
        let place = Receipt {
            seq: Seq::new(5),
            at: before,
        };
        seq_cache.learn(
            &batch,
            &receipt(&batch, vec![WriteOutcome::Stored(place, Audience::Named)]),
        );
        assert!(seq_cache.draft(&batch, &[]).unwrap().expected.is_empty());
    }

    #[test]
    fn seqs_that_the_shard_gives_are_counted_from_the_beginning_and_shifted() {
        let batch = [
            message("7_42", "a"),
            message("7_9", "b"),
            message("7_42", "c"),
        ];
        let terms = batch.iter().map(|message| (message.slot, TERM)).collect();
        let four = Expected {
            last_seq: Seq::new(4),
            room: None,
        };
        let expected = HashMap::from([(batch[1].dialog, four)]);
        let draft = Draft::new(&batch, terms, expected);
        assert_eq!(draft.count(batch[0].slot, Seq::new(2)), 2);
        let at = Timestamp::from_micros(9);
        let last = HashMap::from([(batch[0].dialog, Seq::new(12))]);
        let seqs: Vec<u64> = draft
            .settle(&batch, at, &last)
            .into_iter()
            .filter_map(|written| match written {
                WriteOutcome::Stored(place, _) if place.at == at => Some(place.seq.get()),
                WriteOutcome::Stored(..)
                | WriteOutcome::Repeat(..)
                | WriteOutcome::KeyReused
                | WriteOutcome::Unchanged
                | WriteOutcome::Refused(_)
                | WriteOutcome::NotOwner(_) => None,
            })
            .collect();
        assert_eq!(seqs, [11, 5, 12]);
    }

    #[test]
    fn it_is_bounded() {
        let seq_cache = SeqCache::default();
        for n in 1..3 * YOUNG * STRIPES {
            let dialog = DialogId::between(UserId::new(1).unwrap(), UserId::new(n as u64).unwrap());
            let remembered = Remembered {
                last_seq: Seq::new(1),
                hour: 0,
            };
            seq_cache.stripe(Slot::of(dialog)).keep(dialog, remembered);
        }
        for stripe in &seq_cache.stripes {
            let stripe = stripe.lock().unwrap();
            assert!(stripe.young.len() <= YOUNG && stripe.old.len() <= YOUNG);
        }
    }
}
