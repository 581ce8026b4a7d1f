//! What a batch becomes, worked out without a database: which messages are stored under which seq,
//! which are repeats, and which this shard may not take. Both stores write exactly what this says.

use super::{NewMark, NewMessage, Receipt, WriteOutcome};
use crate::domain::dialog::{DialogId, Key, Seq, TextHash, Timestamp, UserId};
use crate::domain::ownership::{SlotView, Term};
use crate::domain::slot::Slot;
use std::collections::{BTreeMap, HashMap};

/// A key that was found in the shard, with its message.
#[derive(Clone, Copy, Debug)]
pub struct StoredKey {
    /// The place of that message.
    pub place: Receipt,
    /// What its text was.
    pub hash: TextHash,
}

/// A message that is to be inserted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Its index in the batch.
    pub index: usize,
    /// The seq it gets.
    pub seq: Seq,
}

/// What a batch becomes.
#[derive(Debug, Default)]
pub struct BatchPlan {
    /// What to insert, in key order: (slot, dialog, seq).
    pub rows: Vec<Row>,
    /// The last seq of every dialog that gets a message, in key order.
    pub last_seqs: BTreeMap<(Slot, DialogId), Seq>,
    /// What to answer once that is committed, one for each message of the batch.
    pub outcomes: Vec<WriteOutcome>,
}

impl BatchPlan {
    /// Plans a batch, given what was read under the locks: the rows of its `slots`, the `last_seqs`
    /// (last seqs) of its dialogs, the `keys` that are known to be stored, and the shard's time.
    #[must_use]
    pub fn new(
        batch: &[NewMessage],
        slots: &HashMap<Slot, SlotView>,
        last_seqs: &HashMap<DialogId, Seq>,
        keys: &HashMap<(DialogId, UserId, Key), StoredKey>,
        now: Timestamp,
    ) -> Self {
        let mut plan = Self {
            rows: Vec::with_capacity(batch.len()),
            last_seqs: BTreeMap::new(),
            outcomes: Vec::with_capacity(batch.len()),
        };
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
                    WriteOutcome::Repeat(known.place)
                } else {
                    WriteOutcome::KeyReused
                });
                continue;
            }
            let last_seq = plan
                .last_seqs
                .entry((message.slot, message.dialog))
                .or_insert_with(|| last_seqs.get(&message.dialog).copied().unwrap_or_default());
            *last_seq = last_seq.next(view.generation);
            let place = Receipt {
                seq: *last_seq,
                at: now,
            };
            fresh.insert(
                name,
                StoredKey {
                    place,
                    hash: message.hash,
                },
            );
            plan.rows.push(Row {
                index,
                seq: place.seq,
            });
            plan.outcomes.push(WriteOutcome::Stored(place));
        }
        plan.sort_rows(batch);
        plan
    }

    /// The plan with these outcomes.
    #[must_use]
    pub fn of(batch: &[NewMessage], outcomes: Vec<WriteOutcome>) -> Self {
        let mut plan = Self::default();
        for (index, (message, outcome)) in batch.iter().zip(&outcomes).enumerate() {
            if let WriteOutcome::Stored(Receipt { seq, .. }) = *outcome {
                plan.rows.push(Row { index, seq });
                plan.last_seqs.insert((message.slot, message.dialog), seq);
            }
        }
        plan.outcomes = outcomes;
        plan.sort_rows(batch);
        plan
    }

    /// Neighbouring keys are inserted one after the other, and every transaction takes them in the
    /// same order.
    fn sort_rows(&mut self, batch: &[NewMessage]) {
        self.rows
            .sort_by_key(|row| (batch[row.index].slot, batch[row.index].dialog, row.seq));
    }
}

/// A batch whose seqs are worked out before the shard is asked. The shard stores it in one round
/// trip, and only if everything that it was worked out from is so.
#[derive(Debug)]
pub struct Draft {
    /// The term under which each slot of the batch must be owned.
    pub terms: BTreeMap<Slot, Term>,
    /// The last seqs that dialogs must have. Of other dialogs the shard gives the seqs: theirs are
    /// numbered here from the beginning of the generation, and shifted by [`Draft::settle`].
    pub expected: HashMap<DialogId, Seq>,
    /// What to store.
    pub plan: BatchPlan,
    /// Read marks to move after that; their slots are among those of `terms`.
    pub marks: Vec<NewMark>,
}

impl Draft {
    /// Works out a batch from the `terms` of all its slots and the `expected` last seqs of some of
    /// its dialogs.
    #[must_use]
    pub fn new(
        batch: &[NewMessage],
        terms: BTreeMap<Slot, Term>,
        expected: HashMap<DialogId, Seq>,
    ) -> Self {
        let views = terms
            .iter()
            .map(|(slot, term)| (*slot, SlotView::owner(*term)))
            .collect();
        let plan = BatchPlan::new(batch, &views, &expected, &HashMap::new(), UNKNOWN);
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
                Some((*dialog, last.get(dialog)?.get() - planned.get()))
            })
            .collect();
        let placed = |dialog: DialogId, place: Receipt| Receipt {
            seq: Seq::new(place.seq.get() + shifts.get(&dialog).copied().unwrap_or(0)),
            at: now,
        };
        let settled = batch.iter().zip(self.plan.outcomes);
        settled
            .map(|(message, outcome)| match outcome {
                WriteOutcome::Stored(place) => WriteOutcome::Stored(placed(message.dialog, place)),
                WriteOutcome::Repeat(place) => WriteOutcome::Repeat(placed(message.dialog, place)),
                other @ (WriteOutcome::KeyReused | WriteOutcome::NotOwner(_)) => other,
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
            Text::new(text.into(), 100).unwrap(),
        )
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
        WriteOutcome::Stored(Receipt {
            seq: Seq::new(seq),
            at: NOW,
        })
    }

    #[test]
    fn seqs_are_dense_per_dialog_and_go_on_from_the_head() {
        let batch = [
            message("7_42", 7, "a", "1"),
            message("7_9", 9, "a", "2"),
            message("7_42", 42, "a", "3"),
        ];
        let last_seqs = HashMap::from([("7_42".parse().unwrap(), Seq::new(5))]);
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
        let last_seqs = HashMap::from([(batch[0].dialog, Seq::new(9))]);
        let plan = BatchPlan::new(&batch, &views(&batch, owner(0)), &last_seqs, &keys, NOW);
        let repeat_of_b = WriteOutcome::Repeat(Receipt {
            seq: Seq::new(10),
            at: NOW,
        });
        assert_eq!(
            plan.outcomes,
            [
                WriteOutcome::Repeat(place),
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
        let last_seqs = HashMap::from([(batch[0].dialog, Seq::new(5))]);
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
