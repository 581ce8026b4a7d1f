//! The contract of sends and reads.

use super::connection::{SqliteStore, classify, immediate};
use super::rows::{
    MESSAGE_ROW, check_identity, clamp, head, insert, known_keys, last_seq, message, owned,
    select_meta, view,
};
use crate::clock::now;
use crate::domain::dialog::{DialogId, Seq, Timestamp, UserId};
use crate::domain::ownership::{COMPLETE, FIRST_TERM, SlotState};
use crate::domain::room::Settings;
use crate::domain::slot::{Slot, SlotSet};
use crate::domain::topology::Phase;
use crate::store::batch_plan::BatchPlan;
use crate::store::control::role_of;
use crate::store::{
    Appended, BatchResult, Counts, Draft, InboxCursor, InboxRow, LAST_SEQS_CAP, LastSeqs,
    LastSeqsOf, MarkOutcome, Meta, Mismatch, NewMark, NewMessage, Page, Range, RoomMember,
    RoomView, ServedSlots, ShardIdentity, ShardInbox, Store, StoreError, UNREAD_CAP, UNREAD_LOOK,
    corrupt, migrate,
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
                if at > now {
                    return mismatch(Mismatch::LastSeq);
                }
                match draft.expected.get(dialog) {
                    Some(expected)
                        if expected.last_seq != there
                            || at.hour() != now.hour()
                            || expected.members_rev() != members_rev(&tx, *slot, *dialog)? =>
                    {
                        return mismatch(Mismatch::LastSeq);
                    }
                    Some(_) => {}
                    None => {
                        let beginning = draft.terms.get(slot).map_or(0, |term| term.generation);
                        let base = there.max(Seq::beginning(beginning));
                        let count = draft.count(*slot, planned.seq);
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
            let heads = batch
                .iter()
                .map(|entry| Ok((entry.dialog, head(&tx, entry.slot, entry.dialog)?)))
                .collect::<Result<_, StoreError>>()?;
            // A look-up is a step in the same process: there is nothing to gain by waiting for the
            // duplicate key.
            let keys = known_keys(&tx, &batch)?;
            let now = now();
            let plan = BatchPlan::new(&batch, &slots, &heads, &keys, now);
            insert(&tx, &batch, &plan, now).map_err(|e| classify(&e))?;
            tx.commit().map_err(|e| classify(&e))?;
            Ok(plan.result(&slots, now))
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
                    "SELECT {MESSAGE_ROW} FROM messages m
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
                .prepare_cached(&format!(
                    "SELECT t.dialog, t.last_at, t.read_seq, t.unread, t.settings, {MESSAGE_ROW}
                       FROM (SELECT d.slot, d.dialog, d.last_seq, d.last_at, d.settings, u.read_seq,
                                    (SELECT COUNT(*) FROM (SELECT 1 FROM (SELECT author, kind FROM messages x WHERE x.slot = d.slot AND x.dialog = d.dialog
                                        AND x.seq > u.read_seq ORDER BY x.seq LIMIT {UNREAD_LOOK}) l
                                      WHERE l.author <> u.user_id AND l.kind = 'text' LIMIT ?5)) AS unread
                               FROM members u INDEXED BY members_by_recency
                               CROSS JOIN slots s ON s.slot = u.slot AND s.state IN ('owner', 'sealed')
                               CROSS JOIN dialogs d ON d.slot = u.slot AND d.dialog = u.dialog
                              WHERE u.user_id = ?1 AND u.until_seq IS NULL AND d.last_seq > 0 AND (d.last_at, d.dialog) < (?2, ?3) AND u.last_hour <= ?6
                                AND u.last_hour >= COALESCE(
                                    (SELECT e.last_hour FROM members e INDEXED BY members_by_recency
                                       CROSS JOIN slots s ON s.slot = e.slot AND s.state IN ('owner', 'sealed')
                                      WHERE e.user_id = ?1 AND e.until_seq IS NULL AND e.last_hour < ?6 ORDER BY e.last_hour DESC LIMIT 1 OFFSET ?7), 0)
                              ORDER BY d.last_at DESC, d.dialog DESC LIMIT ?4) t
                       JOIN messages m ON m.slot = t.slot AND m.dialog = t.dialog AND m.seq = t.last_seq
                      ORDER BY t.last_at DESC, t.dialog DESC",
                ))
                .and_then(|mut select| {
                    select
                        .query_map(params![user.get(), at, dialog, limit, UNREAD_CAP, hour, limit.saturating_sub(1)], |row| {
                            Ok((row.get::<_, String>(0)?, row.get(1)?, row.get::<_, u64>(2)?, row.get(3)?, row.get::<_, Option<String>>(4)?, message(row, 5)?))
                        })?
                        .collect::<Result<Vec<_>, _>>()
                })
                .map_err(|e| classify(&e))?;
            let rows = rows
                .into_iter()
                .map(|(dialog, last_at, read_seq, unread, settings, last)| {
                    Ok(InboxRow {
                        dialog: dialog.parse().map_err(|_| corrupt("dialogs.dialog"))?,
                        last_at: Timestamp::from_micros(last_at),
                        last,
                        read_seq: Seq::new(read_seq),
                        unread,
                        title: Settings::parse(settings.as_deref()).title,
                    })
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
            let list = of.users().iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
            let selected = match &of {
                LastSeqsOf::Dialogs { dialogs, .. } => {
                    slots.keep(dialogs.iter().map(|dialog| Slot::of(*dialog)));
                    let mut keys = String::new();
                    for dialog in dialogs {
                        let comma = if keys.is_empty() { "" } else { "," };
                        let _ = write!(keys, "{comma}({},'{dialog}')", Slot::of(*dialog));
                    }
                    format!("SELECT slot, dialog, last_seq, last_at FROM dialogs WHERE (slot, dialog) IN (VALUES {keys})")
                }
                LastSeqsOf::Users { within, .. } => {
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
                "SELECT k.dialog, k.last_seq, k.last_at, m.user_id, m.read_seq, m.since_seq, m.until_seq FROM ({selected}) k
                   JOIN slots s ON s.slot = k.slot AND s.state IN ('owner', 'sealed')
                   JOIN members m ON m.slot = k.slot AND m.dialog = k.dialog AND (k.dialog NOT LIKE 'r%' OR m.user_id IN ({list}))
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

    async fn room(
        &self,
        identity: &ShardIdentity,
        room: DialogId,
        user: UserId,
    ) -> Result<RoomView, StoreError> {
        let identity = identity.clone();
        self.read_on(move |snapshot| {
            check_identity(snapshot, &identity)?;
            let slot = Slot::of(room);
            let place = params![slot.get(), room.to_string()];
            let settings: Option<Option<String>> = snapshot
                .prepare_cached("SELECT settings FROM dialogs WHERE slot = ? AND dialog = ?")
                .and_then(|mut select| select.query_row(place, |row| row.get(0)).optional())
                .map_err(|e| classify(&e))?;
            let members = snapshot
                .prepare_cached(
                    "SELECT COUNT(*) FROM members WHERE slot = ? AND dialog = ? AND until_seq IS NULL",
                )
                .and_then(|mut select| select.query_row(place, |row| row.get(0)))
                .map_err(|e| classify(&e))?;
            let me = snapshot
                .prepare_cached(&format!(
                    "SELECT {ROOM_MEMBER} FROM members WHERE slot = ? AND dialog = ? AND user_id = ?"
                ))
                .and_then(|mut select| {
                    let place = params![slot.get(), room.to_string(), user.get()];
                    select.query_row(place, |row| row.try_into()).optional()
                })
                .map_err(|e| classify(&e))?;
            Ok(RoomView {
                slot: view(snapshot, slot)?,
                last_seq: last_seq(snapshot, slot, room)?.0,
                settings: Settings::parse(settings.flatten().as_deref()),
                members,
                me: me.map(room_member).transpose()?,
            })
        })
        .await
    }

    async fn room_members(
        &self,
        identity: &ShardIdentity,
        room: DialogId,
        after: Option<UserId>,
        read_to: Option<Seq>,
        limit: u32,
    ) -> Result<Vec<RoomMember>, StoreError> {
        let identity = identity.clone();
        self.read_on(move |snapshot| {
            check_identity(snapshot, &identity)?;
            let found: Vec<RawRoomMember> = snapshot
                .prepare_cached(&format!(
                    "SELECT {ROOM_MEMBER} FROM members WHERE slot = ? AND dialog = ? AND user_id > ? AND read_seq >= ?
                        AND until_seq IS NULL ORDER BY user_id LIMIT ?"
                ))
                .and_then(|mut select| {
                    let place = params![
                        Slot::of(room).get(),
                        room.to_string(),
                        after.map_or(0, UserId::get),
                        clamp(read_to.unwrap_or_default().get()),
                        limit
                    ];
                    select.query_map(place, |row| row.try_into())?.collect()
                })
                .map_err(|e| classify(&e))?;
            found.into_iter().map(room_member).collect()
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

/// The columns of a member, as [`RawRoomMember`] has them.
const ROOM_MEMBER: &str = "user_id, role, since_seq, until_seq, read_seq";

type RawRoomMember = (u64, String, u64, Option<u64>, u64);

fn room_member(raw: RawRoomMember) -> Result<RoomMember, StoreError> {
    let (user, role, since, until, read) = raw;
    Ok(RoomMember {
        user: UserId::new(user).map_err(|_| corrupt("members.user_id"))?,
        role: role_of(&role)?,
        since: Seq::new(since),
        until: until.map(Seq::new),
        read: Seq::new(read),
    })
}

/// The seq of the entry that last changed the members of a room.
fn members_rev(tx: &Transaction<'_>, slot: Slot, dialog: DialogId) -> Result<Seq, StoreError> {
    if !dialog.is_room() {
        return Ok(Seq::ZERO);
    }
    tx.prepare_cached("SELECT members_rev FROM dialogs WHERE slot = ? AND dialog = ?")
        .and_then(|mut select| {
            let place = params![slot.get(), dialog.to_string()];
            select.query_row(place, |row| row.get(0)).optional()
        })
        .map(|rev| Seq::new(rev.unwrap_or(0)))
        .map_err(|e| classify(&e))
}

/// Moves a read mark in a slot that is owned.
fn mark_read(tx: &Transaction<'_>, mark: &NewMark) -> Result<MarkOutcome, StoreError> {
    let (slot, dialog, user) = (mark.slot.get(), mark.dialog.to_string(), mark.user.get());
    let read: Option<u64> = tx
        .prepare_cached(
            "SELECT read_seq FROM members WHERE slot = ? AND dialog = ? AND user_id = ? AND until_seq IS NULL",
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
