//! Inboxes: the dialogs of a user, merged from all shards.

use super::error::RequestError;
use super::history::wire;
use super::service::{Messages, page_limit};
use crate::budget::cost;
use crate::cluster::OwnerRetry;
use crate::domain::dialog::{Timestamp, UserId};
use crate::domain::slot::{Slot, SlotSet};
use crate::store::{InboxCursor, InboxRow, ServedSlots, ShardError, ShardInbox};
use chat_wire::{InboxEntry, InboxPage};
use futures_util::future::join_all;
use std::collections::BTreeSet;

impl Messages {
    /// A page of the dialogs of `me`, newest first, from all shards together.
    ///
    /// # Errors
    /// [`RequestError`]. A shard that does not answer, or that was declared down and holds a part
    /// of its own, is no error: its name is in `incomplete`.
    pub async fn inbox(
        &self,
        me: UserId,
        limit: Option<u32>,
        cursor: Option<&str>,
    ) -> Result<InboxPage, RequestError> {
        let limit = page_limit(limit, self.inner.limits.inbox_page)?;
        let below = cursor.map(parse_cursor).transpose()?;
        let shards = u32::try_from(self.inner.cluster.view().shards.len()).unwrap_or(u32::MAX);
        self.afford(me, cost::STATEMENT.saturating_mul(shards))?;
        let mut gathered = Gathered::default();
        let mut retry = OwnerRetry::default();
        while retry.next().await {
            let view = self.inner.cluster.view();
            let asked = view
                .shards
                .iter()
                .map(|shard| shard.inbox(me, below, limit + 1));
            let answers = join_all(asked).await;
            let mut incomplete: Vec<String> = view
                .unconfigured()
                .chain(view.topology.down())
                .map(str::to_owned)
                .collect();
            let mut parts = Vec::new();
            for (shard, answer) in view.shards.iter().zip(answers) {
                match answer {
                    Ok(part) => {
                        self.inner.budgets.charge(me, cost::inbox(part.rows.len()));
                        parts.push(part);
                    }
                    Err(ShardError::Busy(_)) => return Err(RequestError::Overloaded),
                    Err(ShardError::Unreachable(_) | ShardError::Failed(..)) => {
                        incomplete.push(shard.name().to_owned())
                    }
                }
            }
            gathered.add(parts);
            // Missing slots may have moved between two of the answers, or belong to a shard that
            // does not answer.
            let lies_there = |slot: Slot| match self.inner.cluster.known_owner(slot) {
                Some(shard) => incomplete.iter().any(|name| name == shard.name()),
                None => !incomplete.is_empty(),
            };
            if !gathered.missing().all(lies_there) {
                continue;
            }
            let mut incomplete: BTreeSet<String> = if gathered.missing().next().is_some() {
                incomplete.into_iter().collect()
            } else {
                // A shard that does not answer and owns no slot hides nothing.
                BTreeSet::new()
            };
            // Other shards own its slots now, but do not have the messages that only it holds.
            incomplete.append(&mut gathered.missing_from);
            let incomplete = incomplete.into_iter().collect();
            return Ok(inbox_page(me, gathered.rows, limit as usize, incomplete));
        }
        Err(RequestError::Unavailable)
    }
}

fn parse_cursor(cursor: &str) -> Result<InboxCursor, RequestError> {
    let parse = || {
        let (at, dialog) = cursor.split_once('.')?;
        let last_at = Timestamp::from_micros(at.parse().ok()?);
        Some(InboxCursor {
            last_at,
            dialog: dialog.parse().ok()?,
        })
    };
    parse().ok_or(RequestError::BadRequest(
        "the cursor is not one of ours; use the one of the page before",
    ))
}

/// The parts of an inbox, merged slot by slot: the rows of each slot come from one answer,
/// whichever shards have answered for it meanwhile.
#[derive(Default)]
struct Gathered {
    covered: SlotSet,
    rows: Vec<InboxRow>,
    missing_from: BTreeSet<String>,
}

impl Gathered {
    /// Takes each slot that is not covered yet from its owner, or, if there is none, from the shard
    /// where it is sealed: no owner had taken it over when this request began.
    fn add(&mut self, parts: Vec<ShardInbox>) {
        let mut parts: Vec<(ServedSlots, Vec<InboxRow>)> = parts
            .into_iter()
            .map(|part| (part.slots, part.rows))
            .collect();
        for (holding, _) in &parts {
            self.missing_from
                .extend(holding.missing_from.iter().cloned());
        }
        for of in [
            |holding: &ServedSlots| holding.owned.clone(),
            |holding: &ServedSlots| holding.sealed.clone(),
        ] {
            for (holding, rows) in &mut parts {
                let mut taken = SlotSet::empty();
                for slot in of(holding).iter().filter(|slot| self.covered.insert(*slot)) {
                    taken.insert(slot);
                }
                let (ours, others) = std::mem::take(rows)
                    .into_iter()
                    .partition(|row| taken.contains(Slot::of(row.dialog)));
                self.rows.extend::<Vec<_>>(ours);
                *rows = others;
            }
        }
    }

    fn missing(&self) -> impl Iterator<Item = Slot> {
        Slot::all().filter(|slot| !self.covered.contains(*slot))
    }
}

fn inbox_page(
    me: UserId,
    mut rows: Vec<InboxRow>,
    limit: usize,
    incomplete: Vec<String>,
) -> InboxPage {
    rows.sort_by_key(|row| std::cmp::Reverse((row.last_at, row.dialog.to_string())));
    let more = rows.len() > limit;
    rows.truncate(limit);
    let cursor = rows
        .last()
        .filter(|_| more)
        .map(|row| format!("{}.{}", row.last_at.micros(), row.dialog));
    let dialogs = rows.iter().map(|row| InboxEntry {
        dialog: row.dialog.to_string(),
        with: row.dialog.counterpart(me).map(UserId::get),
        title: row.title.clone(),
        last: wire(row.dialog, &row.last),
        read: row.read_seq.get(),
        unread: row.unread,
    });
    InboxPage {
        dialogs: dialogs.collect(),
        cursor,
        incomplete,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::dialog::{DialogId, Seq};
    use crate::store::StoredMessage;

    #[test]
    fn an_inbox_takes_each_slot_from_one_answer() {
        let set = |slots: &dyn Fn(Slot) -> bool| {
            let mut set = SlotSet::empty();
            Slot::all()
                .filter(|slot| slots(*slot))
                .for_each(|slot| assert!(set.insert(slot)));
            set
        };
        let dialog: DialogId = "7_42".parse().unwrap();
        let theirs = Slot::of(dialog);
        let row = |seq: u64| InboxRow {
            dialog,
            last_at: Timestamp::from_micros(seq as i64),
            last: StoredMessage {
                seq: Seq::new(seq),
                author: UserId::new(7).unwrap(),
                key: None,
                kind: chat_wire::Kind::Text,
                of: None,
                text: "x".into(),
                at: Timestamp::from_micros(0),
            },
            read_seq: Seq::ZERO,
            unread: 0,
            title: None,
        };
        let part = |owned: SlotSet, sealed: SlotSet, seq: u64| ShardInbox {
            rows: vec![row(seq)],
            slots: ServedSlots {
                owned,
                sealed,
                missing_from: BTreeSet::new(),
            },
        };
        let (none, all) = (SlotSet::empty(), set(&|_| true));
        let (others, the_slot) = (set(&|slot| slot != theirs), set(&|slot| slot == theirs));
        for (parts, missing, rows) in [
            (vec![part(all.clone(), none.clone(), 5)], 0, vec![5]),
            // It moved between the two answers, so both shards report to own it: one of them is
            // taken.
            (
                vec![
                    part(all.clone(), none.clone(), 5),
                    part(the_slot.clone(), none.clone(), 6),
                ],
                0,
                vec![5],
            ),
            // Sealed, and taken over: the new owner's answer counts.
            (
                vec![
                    part(others.clone(), the_slot.clone(), 5),
                    part(the_slot.clone(), none.clone(), 6),
                ],
                0,
                vec![6],
            ),
            // Sealed, and not taken over yet.
            (vec![part(others.clone(), the_slot, 5)], 0, vec![5]),
            // Not owned by the shard that answered: it has no rows of the slot, which is read again
            // from another shard.
            (vec![part(others.clone(), none.clone(), 5)], 1, vec![]),
        ] {
            let mut gathered = Gathered::default();
            gathered.add(parts);
            assert_eq!(gathered.missing().count(), missing);
            assert_eq!(
                gathered
                    .rows
                    .iter()
                    .map(|row| row.last.seq.get())
                    .collect::<Vec<_>>(),
                rows
            );
        }
        let mut gathered = Gathered::default();
        gathered.add(vec![part(others, none.clone(), 5)]);
        gathered.add(vec![part(all, none, 6)]);
        assert_eq!(gathered.missing().count(), 0);
        assert_eq!(
            gathered.rows[0].last.seq.get(),
            6,
            "asked for again, and found"
        );
    }
}
