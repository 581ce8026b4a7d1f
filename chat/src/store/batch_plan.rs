//! What a batch becomes, worked out without a database: which entries are stored under which seq,
//! which are repeats, and which this shard may not take. Both stores write exactly what this says.

use super::{Audience, BatchResult, Body, NewMark, NewMessage, Receipt, RoomMembers, WriteOutcome};
use crate::domain::dialog::{DialogId, Key, Seq, TextHash, Timestamp, UserId};
use crate::domain::ownership::{SlotView, Term};
use crate::domain::room::{Member, Refusal, Room, RoomChange};
use crate::domain::slot::Slot;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// A key that was found in the shard, with its message.
#[derive(Clone, Copy, Debug)]
pub struct StoredKey {
    /// The place of that message.
    pub place: Receipt,
    /// What its text was.
    pub hash: TextHash,
}

/// An entry that is to be inserted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Its index in the batch.
    pub index: usize,
    /// Its place.
    pub place: Receipt,
    /// Its text, if that is not the text of the message in the batch.
    pub text: Option<String>,
}

impl Row {
    /// The text that is stored.
    #[must_use]
    pub fn text<'a>(&'a self, batch: &'a [NewMessage]) -> &'a str {
        match &self.text {
            Some(text) => text,
            None => batch[self.index].body.text(),
        }
    }
}

/// What was read of a dialog behind its lock.
#[derive(Clone, Debug)]
pub struct Head {
    /// Its last seq.
    pub last_seq: Seq,
    /// When that was stored.
    pub last_at: Timestamp,
    /// What is known of it, if it is a room.
    pub room: Option<KnownRoom>,
}

/// What is known of a room.
#[derive(Clone, Debug)]
pub enum KnownRoom {
    /// Its members, by what is remembered of it: enough for messages.
    Remembered(RoomMembers),
    /// All of it, by its rows.
    Read(Room),
}

impl KnownRoom {
    fn has(&self, user: UserId) -> bool {
        match self {
            KnownRoom::Remembered(members) => members.has(user),
            KnownRoom::Read(room) => room.members.contains_key(&user),
        }
    }
}

impl Head {
    /// Of a dialog without an entry.
    #[must_use]
    pub fn nothing() -> Self {
        Self {
            last_seq: Seq::ZERO,
            last_at: UNKNOWN,
            room: None,
        }
    }
}

/// A member's row that a batch changes, as it is after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemberRow {
    /// The member.
    pub member: Member,
    /// The entry by which the user has left; `None` if the user is in the room.
    pub until: Option<Seq>,
}

/// What a batch becomes.
#[derive(Debug, Default)]
pub struct BatchPlan {
    /// What to insert, in key order: (slot, dialog, seq).
    pub rows: Vec<Row>,
    /// The last seq of every dialog that gets an entry, in key order, and the time of that entry.
    pub last_seqs: BTreeMap<(Slot, DialogId), Receipt>,
    /// What to answer once that is committed, one for each entry of the batch.
    pub outcomes: Vec<WriteOutcome>,
    /// The rooms of the batch as they are after it.
    pub rooms: BTreeMap<DialogId, KnownRoom>,
    /// Those of them that the batch changes.
    pub changed: BTreeSet<DialogId>,
    /// The rows of members that change.
    pub members: BTreeMap<(DialogId, UserId), MemberRow>,
}

impl BatchPlan {
    /// Plans a batch, given what was read under the locks: the rows of its `slots`, the `heads` of
    /// its dialogs, the `keys` that are known to be stored, and the shard's time.
    #[must_use]
    pub fn new(
        batch: &[NewMessage],
        slots: &HashMap<Slot, SlotView>,
        heads: &HashMap<DialogId, Head>,
        keys: &HashMap<(DialogId, UserId, Key), StoredKey>,
        now: Timestamp,
    ) -> Self {
        let mut plan = Self {
            rows: Vec::with_capacity(batch.len()),
            outcomes: Vec::with_capacity(batch.len()),
            ..Self::default()
        };
        for (dialog, head) in heads {
            if let Some(room) = &head.room {
                plan.rooms.insert(*dialog, room.clone());
            }
        }
        // A batch may have a key twice: the second is a repeat of the first.
        let mut fresh = HashMap::<(DialogId, UserId, &str), StoredKey>::with_capacity(batch.len());
        for (index, message) in batch.iter().enumerate() {
            let view = slots.get(&message.slot);
            let Some(view) = view.filter(|view| view.state.takes_writes()) else {
                plan.outcomes
                    .push(WriteOutcome::NotOwner(view.map(|view| view.state)));
                continue;
            };
            let stored = if keys.is_empty() {
                None
            } else {
                keys.get(&(message.dialog, message.author, message.key.clone()))
            };
            let name = (message.dialog, message.author, message.key.as_str());
            if let Some(known) = stored.or_else(|| fresh.get(&name)) {
                plan.outcomes.push(if known.hash == message.hash {
                    let audience = plan.audience(message.dialog, known.place.seq);
                    WriteOutcome::Repeat(known.place, audience)
                } else {
                    WriteOutcome::KeyReused
                });
                continue;
            }
            let head = heads.get(&message.dialog);
            let before = plan.last_seqs.get(&(message.slot, message.dialog));
            let last_seq = before.map_or_else(
                || head.map_or(Seq::ZERO, |head| head.last_seq),
                |before| before.seq,
            );
            // The time does not step back within a dialog, whichever clock gave the last one.
            let last_at = head.map_or(UNKNOWN, |head| head.last_at);
            let place = Receipt {
                seq: last_seq.next(view.generation),
                at: now.max(last_at),
            };
            let change = match plan.take(message, view, place.seq) {
                Ok(taken) => taken,
                Err(refused) => {
                    plan.outcomes.push(refused);
                    continue;
                }
            };
            plan.last_seqs.insert((message.slot, message.dialog), place);
            fresh.insert(
                name,
                StoredKey {
                    place,
                    hash: message.hash,
                },
            );
            let mut audience = plan.audience(message.dialog, place.seq);
            let text = change.as_ref().map(RoomChange::to_text);
            if let (Audience::Members(users), Some(change)) = (&audience, change) {
                // The last entry that those who leave are sent is their leaving.
                let left = change
                    .left
                    .iter()
                    .filter_map(|user| UserId::new(*user).ok());
                let users = users.iter().copied().chain(left).collect();
                audience = Audience::Changed(users, Box::new(change));
            }
            plan.rows.push(Row { index, place, text });
            plan.outcomes.push(WriteOutcome::Stored(place, audience));
        }
        plan.sort_rows(batch);
        plan
    }

    /// Applies an entry to its room, if it is in one. Returns what it changes.
    fn take(
        &mut self,
        message: &NewMessage,
        view: &SlotView,
        seq: Seq,
    ) -> Result<Option<RoomChange>, WriteOutcome> {
        if !message.dialog.is_room() {
            return Ok(None);
        }
        // Who is in a room is only known with all of its log.
        if view.unmerged {
            return Err(WriteOutcome::Refused(Refusal::Unavailable));
        }
        let room = self.rooms.get(&message.dialog);
        match &message.body {
            Body::Text(_) => match room {
                None => Err(WriteOutcome::Refused(Refusal::NoRoom)),
                Some(room) if room.has(message.author) => Ok(None),
                Some(_) => Err(WriteOutcome::Refused(Refusal::NotMember)),
            },
            Body::Room { request, limit } => {
                // Made with the same key by the same author: the same room, and its key is stored.
                if room.is_some() && request.creates() {
                    return Err(WriteOutcome::KeyReused);
                }
                let before = match room {
                    Some(KnownRoom::Read(room)) => Some(room),
                    Some(KnownRoom::Remembered(_)) | None => None,
                };
                let change = Room::decide(before, message.author, request, *limit)
                    .map_err(WriteOutcome::Refused)?;
                if change.is_empty() {
                    return Err(WriteOutcome::Unchanged);
                }
                let before = before.cloned().unwrap_or_default();
                let mut room = before.clone();
                room.apply(&change, seq);
                for user in change.users() {
                    let (is, was) = (room.members.get(&user), before.members.get(&user));
                    let row = match (is, was) {
                        (Some(member), _) => MemberRow {
                            member: *member,
                            until: None,
                        },
                        (None, Some(member)) => MemberRow {
                            member: Member {
                                rev: seq,
                                ..*member
                            },
                            until: Some(seq),
                        },
                        (None, None) => continue,
                    };
                    self.members.insert((message.dialog, user), row);
                }
                self.changed.insert(message.dialog);
                self.rooms.insert(message.dialog, KnownRoom::Read(room));
                Ok(Some(change))
            }
        }
    }

    /// The rooms that have a change.
    pub fn changed_rooms(&self) -> impl Iterator<Item = (DialogId, &Room)> {
        let changed = self.changed.iter();
        changed.filter_map(|room| match self.rooms.get(room)? {
            KnownRoom::Read(known) => Some((*room, known)),
            KnownRoom::Remembered(_) => None,
        })
    }

    /// Who is sent an entry with this seq.
    fn audience(&self, dialog: DialogId, seq: Seq) -> Audience {
        match self.rooms.get(&dialog) {
            Some(KnownRoom::Remembered(members)) => Audience::Members(members.users.clone()),
            Some(KnownRoom::Read(room)) => Audience::Members(room.readers(seq).collect()),
            None => Audience::Named,
        }
    }

    /// Whether an entry is refused that may be stored already: a key that is stored is answered,
    /// also to an author who has left since.
    #[must_use]
    pub fn doubts(&self) -> bool {
        let refused = |outcome: &WriteOutcome| {
            matches!(
                outcome,
                WriteOutcome::Refused(_) | WriteOutcome::Unchanged | WriteOutcome::KeyReused
            )
        };
        self.outcomes.iter().any(refused)
    }

    /// The answer to a batch that became this, in these slots.
    #[must_use]
    pub fn result(self, slots: &HashMap<Slot, SlotView>, now: Timestamp) -> BatchResult {
        let terms = slots
            .iter()
            .filter_map(|(slot, view)| Some((*slot, view.writable()?)));
        let rooms = self.rooms.into_iter().map(|(dialog, room)| match room {
            KnownRoom::Remembered(members) => (dialog, members),
            KnownRoom::Read(room) => (dialog, RoomMembers::of(&room)),
        });
        BatchResult {
            written: self.outcomes,
            terms: terms.collect(),
            rooms: rooms.collect(),
            now,
        }
    }

    /// The plan with these outcomes.
    #[must_use]
    pub fn of(batch: &[NewMessage], outcomes: Vec<WriteOutcome>) -> Self {
        let mut plan = Self::default();
        for (index, (message, outcome)) in batch.iter().zip(&outcomes).enumerate() {
            if let WriteOutcome::Stored(place, _) = *outcome {
                let text = None;
                plan.rows.push(Row { index, place, text });
                plan.last_seqs.insert((message.slot, message.dialog), place);
            }
        }
        plan.outcomes = outcomes;
        plan.sort_rows(batch);
        plan
    }

    /// Neighbouring keys are inserted one after the other, and every transaction takes them in the
    /// same order.
    fn sort_rows(&mut self, batch: &[NewMessage]) {
        self.rows.sort_by_key(|row| {
            (
                batch[row.index].slot,
                batch[row.index].dialog,
                row.place.seq,
            )
        });
    }
}

/// What a draft takes a dialog to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Its last seq.
    pub last_seq: Seq,
    /// The members of a room. The author of every message of the draft is among them.
    pub room: Option<RoomMembers>,
}

impl Expected {
    /// The value of `members_rev`.
    #[must_use]
    pub fn members_rev(&self) -> Seq {
        self.room.as_ref().map_or(Seq::ZERO, |room| room.rev)
    }

    fn head(&self) -> Head {
        Head {
            last_seq: self.last_seq,
            last_at: UNKNOWN,
            room: self.room.clone().map(KnownRoom::Remembered),
        }
    }
}

/// A batch whose seqs are worked out before the shard is asked. The shard stores it in one round
/// trip, and only if everything that it was worked out from is so.
#[derive(Debug)]
pub struct Draft {
    /// The term under which each slot of the batch must be owned.
    pub terms: BTreeMap<Slot, Term>,
    /// What dialogs must be like. Of other dialogs the shard gives the seqs: theirs are numbered
    /// here from the beginning of the generation, and shifted by [`Draft::settle`].
    pub expected: HashMap<DialogId, Expected>,
    /// What to store.
    pub plan: BatchPlan,
    /// Read marks to move after that; their slots are among those of `terms`.
    pub marks: Vec<NewMark>,
}

impl Draft {
    /// Works out a batch from the `terms` of all its slots and what is `expected` of some of its
    /// dialogs. Of rooms, which must all be expected, it has messages of members only.
    #[must_use]
    pub fn new(
        batch: &[NewMessage],
        terms: BTreeMap<Slot, Term>,
        expected: HashMap<DialogId, Expected>,
    ) -> Self {
        let views = terms
            .iter()
            .map(|(slot, term)| (*slot, SlotView::owner(*term)))
            .collect();
        let heads = expected
            .iter()
            .map(|(dialog, expected)| (*dialog, expected.head()));
        let plan = BatchPlan::new(batch, &views, &heads.collect(), &HashMap::new(), UNKNOWN);
        Self {
            terms,
            expected,
            plan,
            marks: Vec::new(),
        }
    }

    /// How many messages a dialog gets whose last seq is not expected.
    #[must_use]
    pub fn count(&self, slot: Slot, last: Seq) -> u64 {
        let generation = self.terms.get(&slot).map_or(0, |term| term.generation);
        last.get() - Seq::beginning(generation).get()
    }

    /// What became of the batch, once it is stored: `now` by the shard's clock, and the `last` seqs
    /// that the shard gave to dialogs whose were not expected.
    #[must_use]
    pub fn settle(
        self,
        batch: &[NewMessage],
        now: Timestamp,
        last: &HashMap<DialogId, Seq>,
    ) -> Vec<WriteOutcome> {
        let shifts: HashMap<DialogId, u64> = self
            .plan
            .last_seqs
            .iter()
            .filter_map(|((_, dialog), planned)| {
                Some((*dialog, last.get(dialog)?.get() - planned.seq.get()))
            })
            .collect();
        let placed = |dialog: DialogId, place: Receipt| Receipt {
            seq: Seq::new(place.seq.get() + shifts.get(&dialog).copied().unwrap_or(0)),
            at: now,
        };
        let settled = batch.iter().zip(self.plan.outcomes);
        settled
            .map(|(message, outcome)| match outcome {
                WriteOutcome::Stored(place, audience) => {
                    WriteOutcome::Stored(placed(message.dialog, place), audience)
                }
                WriteOutcome::Repeat(place, audience) => {
                    WriteOutcome::Repeat(placed(message.dialog, place), audience)
                }
                other @ (WriteOutcome::KeyReused
                | WriteOutcome::Unchanged
                | WriteOutcome::Refused(_)
                | WriteOutcome::NotOwner(_)) => other,
            })
            .collect()
    }
}

/// The time of a batch that is not stored yet.
const UNKNOWN: Timestamp = Timestamp::from_micros(0);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::dialog::Text;
    use crate::domain::ownership::SlotState;

    const NOW: Timestamp = Timestamp::from_micros(1);

    fn message(dialog: &str, author: u64, key: &str, text: &str) -> NewMessage {
        NewMessage::new(
            dialog.parse().unwrap(),
            UserId::new(author).unwrap(),
            Key::new(key.into()).unwrap(),
            Body::Text(Text::new(text.into(), 100).unwrap()),
        )
    }

    fn heads(last_seqs: &[(&str, u64)]) -> HashMap<DialogId, Head> {
        let head = |(dialog, seq): &(&str, u64)| {
            let last_seq = Seq::new(*seq);
            (
                dialog.parse().unwrap(),
                Head {
                    last_seq,
                    ..Head::nothing()
                },
            )
        };
        last_seqs.iter().map(head).collect()
    }

    fn owner(generation: u32) -> SlotView {
        SlotView::owner(Term {
            number: 1,
            generation,
        })
    }

    fn views(batch: &[NewMessage], view: SlotView) -> HashMap<Slot, SlotView> {
        batch
            .iter()
            .map(|message| (message.slot, view.clone()))
            .collect()
    }

    fn stored(seq: u64) -> WriteOutcome {
        let seq = Seq::new(seq);
        WriteOutcome::Stored(Receipt { seq, at: NOW }, Audience::Named)
    }

    #[test]
    fn seqs_are_dense_per_dialog_and_go_on_from_the_head() {
        let batch = [
            message("7_42", 7, "a", "1"),
            message("7_9", 9, "a", "2"),
            message("7_42", 42, "a", "3"),
        ];
        let last_seqs = heads(&[("7_42", 5)]);
        let plan = BatchPlan::new(
            &batch,
            &views(&batch, owner(0)),
            &last_seqs,
            &HashMap::new(),
            NOW,
        );
        assert_eq!(plan.outcomes, [stored(6), stored(1), stored(7)]);
        assert_eq!(plan.rows.len(), 3);
    }

    #[test]
    fn a_repeat_gets_the_first_answer_and_another_text_is_refused() {
        let batch = [
            message("7_42", 7, "a", "old"),
            message("7_42", 7, "b", "new"),
            message("7_42", 7, "b", "new"),
            message("7_42", 7, "b", "other"),
            message("7_42", 42, "b", "the other author's own key"),
        ];
        let place = Receipt {
            seq: Seq::new(3),
            at: NOW,
        };
        let name = (batch[0].dialog, batch[0].author, batch[0].key.clone());
        let keys = HashMap::from([(
            name,
            StoredKey {
                place,
                hash: batch[0].hash,
            },
        )]);
        let last_seqs = heads(&[("7_42", 9)]);
        let plan = BatchPlan::new(&batch, &views(&batch, owner(0)), &last_seqs, &keys, NOW);
        let place_of_b = Receipt {
            seq: Seq::new(10),
            at: NOW,
        };
        let repeat_of_b = WriteOutcome::Repeat(place_of_b, Audience::Named);
        assert_eq!(
            plan.outcomes,
            [
                WriteOutcome::Repeat(place, Audience::Named),
                stored(10),
                repeat_of_b,
                WriteOutcome::KeyReused,
                stored(11)
            ]
        );
        assert_eq!(
            plan.rows.iter().map(|row| row.index).collect::<Vec<_>>(),
            [1, 4]
        );
    }

    #[test]
    fn what_is_not_owned_leaves_the_batch_and_the_rest_goes_on() {
        let batch = [message("7_42", 7, "a", "1"), message("7_9", 9, "a", "2")];
        assert_ne!(batch[0].slot, batch[1].slot);
        let mut slots = views(&batch, owner(0));
        slots.get_mut(&batch[0].slot).unwrap().state = SlotState::Sealed;
        let plan = BatchPlan::new(&batch, &slots, &HashMap::new(), &HashMap::new(), NOW);
        assert_eq!(
            plan.outcomes,
            [WriteOutcome::NotOwner(Some(SlotState::Sealed)), stored(1)]
        );
        slots.clear();
        let plan = BatchPlan::new(&batch, &slots, &HashMap::new(), &HashMap::new(), NOW);
        assert_eq!(
            plan.outcomes,
            [WriteOutcome::NotOwner(None), WriteOutcome::NotOwner(None)]
        );
        assert!(plan.rows.is_empty() && plan.last_seqs.is_empty());
    }

    #[test]
    fn a_new_generation_begins_above_everything_before() {
        let batch = [message("7_42", 7, "a", "1"), message("7_42", 7, "b", "2")];
        let last_seqs = heads(&[("7_42", 5)]);
        let plan = BatchPlan::new(
            &batch,
            &views(&batch, owner(2)),
            &last_seqs,
            &HashMap::new(),
            NOW,
        );
        assert_eq!(
            plan.outcomes,
            [stored((2 << 40) + 1), stored((2 << 40) + 2)]
        );
    }
}
