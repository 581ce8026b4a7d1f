//! The contract of sends and reads.

use super::connection::{SqliteStore, classify, immediate};
use super::rows::{
    check_identity, clamp, insert, known_keys, last_seq, message, owned, select_meta, view,
};
use crate::clock::now;
use crate::domain::dialog::{DialogId, Seq, Timestamp, UserId};
use crate::domain::ownership::{COMPLETE, FIRST_TERM, SlotState};
use crate::domain::slot::{Slot, SlotSet};
use crate::domain::topology::Phase;
use crate::store::batch_plan::BatchPlan;
use crate::store::{
    Appended, BatchResult, Counts, Draft, InboxCursor, InboxRow, LAST_SEQS_CAP, LastSeqs,
    LastSeqsOf, MarkOutcome, Meta, Mismatch, NewMark, NewMessage, Page, Range, ServedSlots,
    ShardIdentity, ShardInbox, Store, StoreError, UNREAD_CAP, corrupt, migrate,
};
use async_trait::async_trait;
use rusqlite::{OptionalExtension, Transaction, params};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::time::Duration;

/// How often a migration is tried that another process may be doing at the same moment.
const MIGRATION_TRIES: u32 = 10;

#[async_trait]
impl Store for SqliteStore {
    async fn migrate(&self) -> Result<(), StoreError> {
        self.write_on(|connection| {
            let mut migrated = Ok(());
            for _ in 0..MIGRATION_TRIES {
                migrated = migrate::sqlite::migrations::runner()
                    // A later version has added to the tables: this one does without (a way back).
                    .set_abort_missing(false)
                    .run(connection)
                    .map(drop);
                if migrated.is_ok() {
                    break;
                }
                // Another process may have been faster by a step: what it did is there the next
                // time.
                std::thread::sleep(Duration::from_millis(20));
            }
            migrated.map_err(|e| StoreError::Refused(format!("migration: {e}")))
        })
        .await
    }

    async fn ping(&self) -> Result<(), StoreError> {
        self.read_on(|snapshot| {
            snapshot
                .query_row("SELECT 1", [], |_| Ok(()))
                .map_err(|e| classify(&e))
        })
        .await
    }

    async fn warnings(&self) -> Result<Vec<String>, StoreError> {
        Ok(Vec::new())
    }

    async fn meta(&self) -> Result<Option<Meta>, StoreError> {
        self.read_on(|snapshot| {
            // A file of no tables is one that was never migrated. Only a statement looks whether
            // the schema is still as this connection knows it: rusqlite's `table_exists` does not.
            let has_tables = snapshot
                .prepare_cached(
                    "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'meta'",
                )
                .and_then(|mut select| select.exists([]))
                .map_err(|e| classify(&e))?;
            if has_tables {
                select_meta(snapshot)
            } else {
                Ok(None)
            }
        })
        .await
    }

    async fn initialize(&self, meta: &Meta, owned: &SlotSet) -> Result<Meta, StoreError> {
        let (meta, owned) = (meta.clone(), owned.clone());
        self.write_on(move |connection| {
            let tx = immediate(connection)?;
            let inserted = tx
                .execute(
                    "INSERT OR IGNORE INTO meta (id, cluster_id, shard_name, slot_algorithm, topology_version, topology_phase, topology_hash, topology)
                     VALUES (1, ?, ?, ?, ?, ?, ?, ?)",
                    params![
                        meta.cluster_id,
                        meta.shard_name,
                        meta.slot_algorithm,
                        meta.topology_version,
                        meta.topology_phase.as_str(),
                        meta.topology_hash,
                        meta.topology
                    ],
                )
                .map_err(|e| classify(&e))?;
            if inserted == 1 {
                let mut insert = tx
                    .prepare(
                        "INSERT INTO slots (slot, state, term, generation, activated, claimed_generation, history)
                         VALUES (?, ?, ?, 0, 0, 0, ?)",
                    )
                    .map_err(|e| classify(&e))?;
                for slot in Slot::all() {
                    let (state, term) = if owned.contains(slot) { (SlotState::Owner, FIRST_TERM) } else { (SlotState::None, 0) };
                    insert.execute(params![slot.get(), state.as_str(), term, COMPLETE]).map_err(|e| classify(&e))?;
                }
            }
            let found = select_meta(&tx)?;
            tx.commit().map_err(|e| classify(&e))?;
            found.ok_or_else(|| StoreError::Refused("the row of meta vanished".into()))
        })
        .await
    }

    async fn advance(&self, version: u64, hash: &str, phase: Phase) -> Result<(), StoreError> {
        let allowed = match phase {
            Phase::Initializing | Phase::Failover => return Ok(()),
            Phase::Normal => Phase::Initializing.as_str(),
        };
        let hash = hash.to_owned();
        self.write_on(move |connection| {
            connection
                .execute(
                    "UPDATE meta SET topology_phase = ? WHERE id = 1 AND topology_version = ? AND topology_hash = ? AND topology_phase = ?",
                    params![phase.as_str(), version, hash, allowed],
                )
                .map(drop)
                .map_err(|e| classify(&e))
        })
        .await
    }

    async fn slots(&self, identity: &ShardIdentity) -> Result<ServedSlots, StoreError> {
        let (identity, held) = (identity.clone(), self.held.clone());
        self.read_on(move |snapshot| {
            check_identity(snapshot, &identity)?;
            owned(snapshot, &held)
        })
        .await
    }

    async fn append(
        &self,
        identity: &ShardIdentity,
        batch: &[NewMessage],
        draft: Draft,
    ) -> Result<Appended, StoreError> {
        let (identity, batch) = (identity.clone(), batch.to_vec());
        self.write_on(move |connection| {
            let tx = immediate(connection)?;
            let mismatch = |what| Ok(Appended::Mismatch(what));
            if check_identity(&tx, &identity).is_err() {
                return mismatch(Mismatch::Term);
            }
            for (slot, term) in &draft.terms {
                if view(&tx, *slot)?.and_then(|view| view.writable()) != Some(*term) {
                    return mismatch(Mismatch::Term);
                }
            }
            let now = now();
            let mut last = HashMap::new();
            for ((slot, dialog), planned) in &draft.plan.last_seqs {
                let (there, at) = last_seq(&tx, *slot, *dialog)?;
                match draft.expected.get(dialog) {
                    Some(expected) if *expected != there || at.hour() != now.hour() => {
                        return mismatch(Mismatch::LastSeq);
                    }
                    Some(_) => {}
                    None => {
                        let beginning = draft.terms.get(slot).map_or(0, |term| term.generation);
                        let base = there.max(Seq::beginning(beginning));
                        let count = draft.count(*slot, *planned);
                        last.insert(*dialog, Seq::new(base.get() + count));
                    }
                }
            }
            if !known_keys(&tx, &batch)?.is_empty() {
                return mismatch(Mismatch::Key);
            }
            let marks = draft.marks.clone();
            let plan = BatchPlan::of(&batch, draft.settle(&batch, now, &last));
            insert(&tx, &batch, &plan, now).map_err(|e| classify(&e))?;
            let marked = marks
                .iter()
                .map(|mark| mark_read(&tx, mark))
                .collect::<Result<_, _>>()?;
            tx.commit().map_err(|e| classify(&e))?;
            Ok(Appended::Stored {
                written: plan.outcomes,
                marked,
                now,
            })
        })
        .await
    }

    async fn write(
        &self,
        identity: &ShardIdentity,
        batch: &[NewMessage],
        _suspect: bool,
    ) -> Result<BatchResult, StoreError> {
        let (identity, batch) = (identity.clone(), batch.to_vec());
        self.write_on(move |connection| {
            let tx = immediate(connection)?;
            check_identity(&tx, &identity)?;
            let slots = batch.iter().map(|message| message.slot);
            let slots = slots
                .filter_map(|slot| view(&tx, slot).transpose().map(|view| Ok((slot, view?))))
                .collect::<Result<_, _>>()?;
            let last_seqs = batch
                .iter()
                .map(|message| {
                    Ok((
                        message.dialog,
                        last_seq(&tx, message.slot, message.dialog)?.0,
                    ))
                })
                .collect::<Result<_, StoreError>>()?;
            // A look-up is a step in the same process: there is nothing to gain by waiting for the
            // duplicate key.
            let keys = known_keys(&tx, &batch)?;
            let now = now();
            let plan = BatchPlan::new(&batch, &slots, &last_seqs, &keys, now);
            insert(&tx, &batch, &plan, now).map_err(|e| classify(&e))?;
            tx.commit().map_err(|e| classify(&e))?;
            Ok(BatchResult::new(plan.outcomes, &slots, now))
        })
        .await
    }

    async fn page(
        &self,
        identity: &ShardIdentity,
        dialog: DialogId,
        range: Range,
        limit: u32,
    ) -> Result<Page, StoreError> {
        let identity = identity.clone();
        self.read_on(move |snapshot| {
            check_identity(snapshot, &identity)?;
            let slot = Slot::of(dialog);
            let (condition, bound, order) = match range {
                Range::Newest => ("seq >= ?", 0, "DESC"),
                Range::Before(seq) => ("seq < ?", seq.get(), "DESC"),
                Range::After(seq) => ("seq > ?", seq.get(), "ASC"),
            };
            let mut messages = snapshot
                .prepare_cached(&format!(
                    "SELECT seq, author, client_key, text, created_at FROM messages
                      WHERE slot = ? AND dialog = ? AND {condition} ORDER BY seq {order} LIMIT ?"
                ))
                .and_then(|mut select| {
                    select
                        .query_map(
                            params![slot.get(), dialog.to_string(), clamp(bound), limit],
                            |row| message(row, 0),
                        )?
                        .collect::<Result<Vec<_>, _>>()
                })
                .map_err(|e| classify(&e))?;
            messages.sort_by_key(|message| message.seq);
            Ok(Page {
                slot: view(snapshot, slot)?,
                last_seq: last_seq(snapshot, slot, dialog)?.0,
                messages,
            })
        })
        .await
    }

    async fn inbox(
        &self,
        identity: &ShardIdentity,
        user: UserId,
        below: Option<InboxCursor>,
        limit: u32,
    ) -> Result<ShardInbox, StoreError> {
        let (identity, held) = (identity.clone(), self.held.clone());
        self.read_on(move |snapshot| {
            check_identity(snapshot, &identity)?;
            let slots = owned(snapshot, &held)?;
            let (at, dialog) = below.map_or((i64::MAX, String::new()), |below| (below.last_at.micros(), below.dialog.to_string()));
            // Hours are read whole, the newest first, until they hold a page; that of the cursor
            // may hold what is above it.
            let hour = Timestamp::from_micros(at).hour();
            let rows = snapshot
                .prepare_cached(
                    "SELECT t.dialog, t.last_at, t.read_seq, t.unread, m.seq, m.author, m.client_key, m.text, m.created_at
                       FROM (SELECT d.slot, d.dialog, d.last_seq, d.last_at, u.read_seq,
                                    (SELECT COUNT(*) FROM (SELECT 1 FROM messages x WHERE x.slot = d.slot AND x.dialog = d.dialog
                                        AND x.seq > u.read_seq AND x.author <> u.user_id LIMIT ?5)) AS unread
                               FROM members u INDEXED BY members_by_recency
                               CROSS JOIN slots s ON s.slot = u.slot AND s.state IN ('owner', 'sealed')
                               CROSS JOIN dialogs d ON d.slot = u.slot AND d.dialog = u.dialog
                              WHERE u.user_id = ?1 AND d.last_seq > 0 AND (d.last_at, d.dialog) < (?2, ?3) AND u.last_hour <= ?6
                                AND u.last_hour >= COALESCE(
                                    (SELECT e.last_hour FROM members e INDEXED BY members_by_recency
                                       CROSS JOIN slots s ON s.slot = e.slot AND s.state IN ('owner', 'sealed')
                                      WHERE e.user_id = ?1 AND e.last_hour < ?6 ORDER BY e.last_hour DESC LIMIT 1 OFFSET ?7), 0)
                              ORDER BY d.last_at DESC, d.dialog DESC LIMIT ?4) t
                       JOIN messages m ON m.slot = t.slot AND m.dialog = t.dialog AND m.seq = t.last_seq
                      ORDER BY t.last_at DESC, t.dialog DESC",
                )
                .and_then(|mut select| {
                    select
                        .query_map(params![user.get(), at, dialog, limit, UNREAD_CAP, hour, limit.saturating_sub(1)], |row| {
                            Ok((row.get::<_, String>(0)?, row.get(1)?, row.get::<_, u64>(2)?, row.get(3)?, message(row, 4)?))
                        })?
                        .collect::<Result<Vec<_>, _>>()
                })
                .map_err(|e| classify(&e))?;
            let rows = rows
                .into_iter()
                .map(|(dialog, last_at, read_seq, unread, last)| {
                    let dialog = dialog.parse().map_err(|_| corrupt("dialogs.dialog"))?;
                    Ok(InboxRow { dialog, last_at: Timestamp::from_micros(last_at), last, read_seq: Seq::new(read_seq), unread })
                })
                .collect::<Result<_, StoreError>>()?;
            Ok(ShardInbox { rows, slots })
        })
        .await
    }

    async fn last_seqs(
        &self,
        identity: &ShardIdentity,
        of: &LastSeqsOf,
    ) -> Result<LastSeqs, StoreError> {
        let (identity, of, held) = (identity.clone(), of.clone(), self.held.clone());
        self.read_on(move |snapshot| {
            check_identity(snapshot, &identity)?;
            let mut slots = owned(snapshot, &held)?;
            let selected = match &of {
                LastSeqsOf::Dialogs(dialogs) => {
                    slots.keep(dialogs.iter().map(|dialog| Slot::of(*dialog)));
                    let mut keys = String::new();
                    for dialog in dialogs {
                        let comma = if keys.is_empty() { "" } else { "," };
                        let _ = write!(keys, "{comma}({},'{dialog}')", Slot::of(*dialog));
                    }
                    format!("SELECT slot, dialog, last_seq, last_at FROM dialogs WHERE (slot, dialog) IN (VALUES {keys})")
                }
                LastSeqsOf::Users { users, within } => {
                    let list = users.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
                    let since = now().micros().saturating_sub(i64::try_from(within.as_micros()).unwrap_or(i64::MAX));
                    format!(
                        "SELECT DISTINCT d.slot, d.dialog, d.last_seq, d.last_at FROM members u INDEXED BY members_by_recency
                           CROSS JOIN dialogs d ON d.slot = u.slot AND d.dialog = u.dialog
                          WHERE u.user_id IN ({list}) AND u.last_hour >= {} AND d.last_at >= {since} ORDER BY d.last_at DESC LIMIT {LAST_SEQS_CAP}",
                        Timestamp::from_micros(since).hour()
                    )
                }
            };
            let sql = format!(
                "SELECT k.dialog, k.last_seq, k.last_at, m.user_id, m.read_seq FROM ({selected}) k
                   JOIN slots s ON s.slot = k.slot AND s.state IN ('owner', 'sealed')
                   JOIN members m ON m.slot = k.slot AND m.dialog = k.dialog
                  WHERE k.last_seq > 0 ORDER BY k.dialog, m.user_id"
            );
            let rows = snapshot
                .prepare(&sql)
                .and_then(|mut select| select.query_map([], |row| row.try_into())?.collect())
                .map_err(|e| classify(&e))?;
            LastSeqs::of(rows, now(), slots)
        })
        .await
    }

    async fn mark_read(
        &self,
        identity: &ShardIdentity,
        marks: &[NewMark],
    ) -> Result<Vec<MarkOutcome>, StoreError> {
        let (identity, marks) = (identity.clone(), marks.to_vec());
        self.write_on(move |connection| {
            let tx = immediate(connection)?;
            check_identity(&tx, &identity)?;
            let marked = marks.iter().map(|mark| {
                let view = view(&tx, mark.slot)?;
                if view.as_ref().is_some_and(|view| view.state.takes_writes()) {
                    mark_read(&tx, mark)
                } else {
                    Ok(MarkOutcome::NotOwner(view.map(|view| view.state)))
                }
            });
            let marked = marked.collect::<Result<_, _>>()?;
            tx.commit().map_err(|e| classify(&e))?;
            Ok(marked)
        })
        .await
    }

    async fn counts(&self) -> Result<Counts, StoreError> {
        self.read_on(|snapshot| {
            snapshot
                .query_row(
                    "SELECT (SELECT COUNT(*) FROM slots WHERE state = 'owner'),
                            (SELECT COUNT(*) FROM dialogs JOIN slots USING (slot) WHERE state = 'owner' AND last_seq > 0),
                            (SELECT COUNT(*) FROM messages JOIN slots USING (slot) WHERE state = 'owner')",
                    [],
                    |row| Ok(Counts { slots: row.get(0)?, dialogs: row.get(1)?, messages: row.get(2)? }),
                )
                .map_err(|e| classify(&e))
        })
        .await
    }
}

/// Moves a read mark in a slot that is owned.
fn mark_read(tx: &Transaction<'_>, mark: &NewMark) -> Result<MarkOutcome, StoreError> {
    let (slot, dialog, user) = (mark.slot.get(), mark.dialog.to_string(), mark.user.get());
    let read: Option<u64> = tx
        .prepare_cached(
            "SELECT read_seq FROM members WHERE slot = ? AND dialog = ? AND user_id = ?",
        )
        .and_then(|mut select| {
            let row = select.query_row(params![slot, dialog, user], |row| row.get(0));
            row.optional()
        })
        .map_err(|e| classify(&e))?;
    let Some(read) = read else {
        return Ok(MarkOutcome::NoDialog);
    };
    let marked = mark.on(Seq::new(read), last_seq(tx, mark.slot, mark.dialog)?.0);
    if let MarkOutcome::At { seq, moved: true } = marked {
        tx.prepare_cached(
            "UPDATE members SET read_seq = ? WHERE slot = ? AND dialog = ? AND user_id = ?",
        )
        .and_then(|mut update| update.execute(params![seq.get(), slot, dialog, user]))
        .map_err(|e| classify(&e))?;
    }
    Ok(marked)
}
