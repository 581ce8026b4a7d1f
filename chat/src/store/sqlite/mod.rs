//! A shard in a SQLite file: the embedded default, with the same tables, the same steps and the same outcomes as MySQL.
//!
//! SQLite has one writer at a time, so the locks of the protocol come with `BEGIN IMMEDIATE`; readers see snapshots (WAL)
//! and are not in the writer's way. Commits are flushed to the disk before they are acknowledged.

mod control;

use super::meta::phase;
use super::served_slots::ServedSlotsCache;
use super::{
    Appended, BatchResult, Counts, Draft, InboxCursor, InboxRow, LAST_SEQS_CAP, LastSeqs,
    LastSeqsOf, MarkOutcome, Meta, Mismatch, NewMark, NewMessage, Page, Range, Receipt,
    ServedSlots, ShardIdentity, ShardInbox, Store, StoreError, StoredKey, StoredMessage,
    UNREAD_CAP, batch_plan::BatchPlan, corrupt, migrate,
};
use crate::clock::now;
use crate::config;
use crate::domain::dialog::{DialogId, Key, Seq, TextHash, Timestamp, UserId};
use crate::domain::ownership::{COMPLETE, FIRST_TERM, SlotState, SlotView};
use crate::domain::slot::Slot;
use crate::domain::slot::SlotSet;
use crate::domain::topology::Phase;
use async_trait::async_trait;
use rusqlite::{
    Connection, ErrorCode, OptionalExtension, Transaction, TransactionBehavior, params,
};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;

/// A shard in a file. Calls run on the blocking threads of the runtime that was handed in.
pub struct SqliteStore {
    path: Arc<PathBuf>,
    writer: Arc<Mutex<Option<Connection>>>,
    readers: Arc<Mutex<Vec<Connection>>>,
    /// How many may read at once; what waits here holds no thread.
    permits: Arc<tokio::sync::Semaphore>,
    held: Arc<ServedSlotsCache>,
    runtime: Handle,
}

/// How long a writer waits for another process that writes to the same file.
const BUSY_LIMIT: Duration = Duration::from_secs(1);

/// How often a migration is tried that another process may be doing at the same moment.
const MIGRATION_TRIES: u32 = 10;

impl SqliteStore {
    /// A store in the file `path`, which is made when it is first used.
    #[must_use]
    pub fn new(path: &str, settings: &config::Store, runtime: Handle) -> Self {
        Self {
            path: Arc::new(PathBuf::from(path)),
            writer: Arc::default(),
            readers: Arc::default(),
            permits: Arc::new(tokio::sync::Semaphore::new(
                settings.read_connections.max(1),
            )),
            held: Arc::default(),
            runtime,
        }
    }

    async fn write_on<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (path, writer) = (self.path.clone(), self.writer.clone());
        self.blocking(move || {
            // A panic while it was held left no transaction behind: rusqlite rolls back when one is dropped.
            let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
            let connection = match &mut *writer {
                Some(connection) => connection,
                none => none.insert(open(&path)?),
            };
            work(connection)
        })
        .await
    }

    async fn read_on<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let _permit = self
            .permits
            .acquire()
            .await
            .map_err(|_| StoreError::Unreachable("closed".into()))?;
        let (path, readers) = (self.path.clone(), self.readers.clone());
        self.blocking(move || {
            let pooled = readers.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let mut connection = pooled.map_or_else(|| open(&path), Ok)?;
            let result = connection
                .transaction()
                .map_err(|e| classify(&e))
                .and_then(|snapshot| work(&snapshot));
            readers
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(connection);
            result
        })
        .await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let joined = self.runtime.spawn_blocking(work).await;
        joined.unwrap_or_else(|e| {
            Err(StoreError::Refused(format!(
                "the store's thread failed: {e}"
            )))
        })
    }
}

fn open(path: &Path) -> Result<Connection, StoreError> {
    let connection = Connection::open(path).map_err(|e| StoreError::Unreachable(e.to_string()))?;
    connection
        .busy_timeout(BUSY_LIMIT)
        .map_err(|e| classify(&e))?;
    connection
        .execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;",
        )
        .map_err(|e| StoreError::Unreachable(e.to_string()))?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

#[async_trait]
impl Store for SqliteStore {
    async fn migrate(&self) -> Result<(), StoreError> {
        self.write_on(|connection| {
            let mut migrated = Ok(());
            for _ in 0..MIGRATION_TRIES {
                migrated = migrate::sqlite::migrations::runner()
                    .run(connection)
                    .map(drop);
                if migrated.is_ok() {
                    break;
                }
                // Another process may have been faster by a step: what it did is there the next time.
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
            // A file of no tables is one that was never migrated. Only a statement looks whether the schema is still as this connection
            // knows it: rusqlite's `table_exists` does not.
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
            for ((slot, dialog), planned) in &draft.plan.heads {
                let (there, at) = head(&tx, *slot, *dialog)?;
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
            let heads = batch
                .iter()
                .map(|message| Ok((message.dialog, head(&tx, message.slot, message.dialog)?.0)))
                .collect::<Result<_, StoreError>>()?;
            // A look-up is a step in the same process: there is nothing to gain by waiting for the duplicate key.
            let keys = known_keys(&tx, &batch)?;
            let now = now();
            let plan = BatchPlan::new(&batch, &slots, &heads, &keys, now);
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
                last_seq: head(snapshot, slot, dialog)?.0,
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
            // Hours are read whole, the newest first, until they hold a page; that of the cursor may hold what is above it.
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
            let wanted = match &of {
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
                "SELECT k.dialog, k.last_seq, k.last_at, m.user_id, m.read_seq FROM ({wanted}) k
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
    let marked = mark.on(Seq::new(read), head(tx, mark.slot, mark.dialog)?.0);
    if let MarkOutcome::At { seq, moved: true } = marked {
        tx.prepare_cached(
            "UPDATE members SET read_seq = ? WHERE slot = ? AND dialog = ? AND user_id = ?",
        )
        .and_then(|mut update| update.execute(params![seq.get(), slot, dialog, user]))
        .map_err(|e| classify(&e))?;
    }
    Ok(marked)
}

fn immediate(connection: &mut Connection) -> Result<Transaction<'_>, StoreError> {
    connection
        .transaction_with_behavior(TransactionBehavior::Immediate)
        .map_err(|e| classify(&e))
}

fn select_meta(tx: &Transaction<'_>) -> Result<Option<Meta>, StoreError> {
    let row = tx
        .query_row(
            "SELECT cluster_id, shard_name, slot_algorithm, topology_version, topology_phase, topology_hash, topology FROM meta WHERE id = 1",
            [],
            |row| {
                Ok((
                    Meta {
                        cluster_id: row.get(0)?,
                        shard_name: row.get(1)?,
                        slot_algorithm: row.get(2)?,
                        topology_version: row.get(3)?,
                        topology_phase: Phase::Initializing,
                        topology_hash: row.get(5)?,
                        topology: row.get(6)?,
                    },
                    row.get::<_, String>(4)?,
                ))
            },
        )
        .optional()
        .map_err(|e| classify(&e))?;
    row.map(|(meta, phase_name)| {
        Ok(Meta {
            topology_phase: phase(&phase_name)?,
            ..meta
        })
    })
    .transpose()
}

fn check_identity(tx: &Transaction<'_>, expected: &ShardIdentity) -> Result<(), StoreError> {
    let found = tx
        .prepare_cached("SELECT cluster_id, shard_name FROM meta WHERE id = 1")
        .and_then(|mut select| {
            select
                .query_row([], |row| {
                    Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
                })
                .optional()
        })
        .map_err(|e| classify(&e))?;
    match found {
        Some((cluster_id, shard_name))
            if cluster_id == expected.cluster_id && shard_name == expected.shard_name =>
        {
            Ok(())
        }
        Some((cluster_id, shard_name)) => Err(StoreError::WrongIdentity(format!(
            "the file is {shard_name} of cluster {cluster_id}, not {} of {}",
            expected.shard_name, expected.cluster_id
        ))),
        None => Err(StoreError::WrongIdentity(
            "the file is empty: it was wiped, or the url leads to another".into(),
        )),
    }
}

fn owned(tx: &Transaction<'_>, held: &ServedSlotsCache) -> Result<ServedSlots, StoreError> {
    let revision = tx
        .prepare_cached("SELECT revision FROM slots_revision")
        .and_then(|mut select| select.query_row([], |row| row.get(0)))
        .map_err(|e| classify(&e))?;
    if let Some(holding) = held.of(revision) {
        return Ok(holding);
    }
    let rows: Vec<(String, String, u16)> = tx
        .prepare_cached("SELECT state, history, slot FROM slots WHERE state IN ('owner', 'sealed')")
        .and_then(|mut select| select.query_map([], |row| row.try_into())?.collect())
        .map_err(|e| classify(&e))?;
    let mut holding = ServedSlots::nothing();
    for (state, history, slot) in rows {
        holding.add(&state, &history, &[slot])?;
    }
    held.keep(revision, &holding);
    Ok(holding)
}

fn view(tx: &Transaction<'_>, slot: Slot) -> Result<Option<SlotView>, StoreError> {
    let row = tx
        .prepare_cached("SELECT state, term, generation, history, peer FROM slots WHERE slot = ?")
        .and_then(|mut select| {
            select
                .query_row([slot.get()], |row| {
                    Ok((
                        row.get::<_, String>(0)?,
                        row.get(1)?,
                        row.get(2)?,
                        row.get::<_, String>(3)?,
                        row.get(4)?,
                    ))
                })
                .optional()
        })
        .map_err(|e| classify(&e))?;
    row.map(|(state, term, generation, history, peer)| {
        let state = state.parse().map_err(|_| corrupt("slots.state"))?;
        Ok(SlotView {
            state,
            term,
            generation,
            complete: history == COMPLETE,
            peer,
        })
    })
    .transpose()
}

/// The last seq of a dialog and when it was stored; zero if there is no such dialog.
fn head(
    tx: &Transaction<'_>,
    slot: Slot,
    dialog: DialogId,
) -> Result<(Seq, Timestamp), StoreError> {
    tx.prepare_cached("SELECT last_seq, last_at FROM dialogs WHERE slot = ? AND dialog = ?")
        .and_then(|mut select| {
            let place = params![slot.get(), dialog.to_string()];
            select
                .query_row(place, |row| Ok((row.get(0)?, row.get(1)?)))
                .optional()
        })
        .map(|head| {
            let (seq, at) = head.unwrap_or_default();
            (Seq::new(seq), Timestamp::from_micros(at))
        })
        .map_err(|e| classify(&e))
}

fn known_keys(
    tx: &Transaction<'_>,
    batch: &[NewMessage],
) -> Result<HashMap<(DialogId, UserId, Key), StoredKey>, StoreError> {
    let mut keys = HashMap::new();
    let mut select = tx
        .prepare_cached(
            "SELECT seq, created_at, text_hash FROM messages WHERE slot = ? AND dialog = ? AND author = ? AND client_key = ?",
        )
        .map_err(|e| classify(&e))?;
    for message in batch {
        let known = select
            .query_row(
                params![
                    message.slot.get(),
                    message.dialog.to_string(),
                    message.author.get(),
                    message.key.as_str().as_bytes()
                ],
                |row| {
                    let place = Receipt {
                        seq: Seq::new(row.get(0)?),
                        at: Timestamp::from_micros(row.get(1)?),
                    };
                    Ok(StoredKey {
                        place,
                        hash: TextHash(row.get(2)?),
                    })
                },
            )
            .optional()
            .map_err(|e| classify(&e))?;
        if let Some(known) = known {
            keys.insert((message.dialog, message.author, message.key.clone()), known);
        }
    }
    Ok(keys)
}

fn insert(
    tx: &Transaction<'_>,
    batch: &[NewMessage],
    plan: &BatchPlan,
    now: Timestamp,
) -> rusqlite::Result<()> {
    let mut message = tx.prepare_cached(
        "INSERT INTO messages (slot, dialog, seq, author, client_key, text_hash, kind, text, created_at)
         VALUES (?, ?, ?, ?, ?, ?, 'text', ?, ?)",
    )?;
    for row in &plan.rows {
        let new = &batch[row.index];
        message.execute(params![
            new.slot.get(),
            new.dialog.to_string(),
            row.seq.get(),
            new.author.get(),
            new.key.as_str().as_bytes(),
            new.hash.0,
            new.text.as_str(),
            now.micros()
        ])?;
    }
    let mut dialog_row = tx.prepare_cached(
        "INSERT INTO dialogs (slot, dialog, last_seq, last_at) VALUES (?, ?, ?, ?)
         ON CONFLICT DO UPDATE SET last_seq = excluded.last_seq, last_at = excluded.last_at",
    )?;
    let mut member =
        tx.prepare_cached(
        "INSERT INTO members (slot, dialog, user_id, read_seq, joined_at, last_hour) VALUES (?, ?, ?, 0, ?, ?)
         ON CONFLICT DO UPDATE SET last_hour = excluded.last_hour WHERE last_hour <> excluded.last_hour",
    )?;
    for ((slot, dialog), seq) in &plan.heads {
        let name = dialog.to_string();
        dialog_row.execute(params![slot.get(), name, seq.get(), now.micros()])?;
        for user in dialog.members() {
            member.execute(params![
                slot.get(),
                name,
                user.get(),
                now.micros(),
                now.hour()
            ])?;
        }
    }
    Ok(())
}

/// The columns seq, author, client_key, text, created_at, from `first` on.
fn message(row: &rusqlite::Row<'_>, first: usize) -> rusqlite::Result<StoredMessage> {
    let author: u64 = row.get(first + 1)?;
    let key: Option<Vec<u8>> = row.get(first + 2)?;
    Ok(StoredMessage {
        seq: Seq::new(row.get(first)?),
        author: UserId::new(author)
            .map_err(|e| rusqlite::Error::ToSqlConversionFailure(Box::new(e)))?,
        key: key.map(|key| String::from_utf8_lossy(&key).into_owned()),
        text: row.get(first + 3)?,
        at: Timestamp::from_micros(row.get(first + 4)?),
    })
}

/// SQLite's integers are signed; no seq comes near the end of them, but a request may.
fn clamp(seq: u64) -> i64 {
    i64::try_from(seq).unwrap_or(i64::MAX)
}

fn classify(e: &rusqlite::Error) -> StoreError {
    match e.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            StoreError::Conflict(e.to_string())
        }
        Some(ErrorCode::CannotOpen | ErrorCode::NotADatabase | ErrorCode::SystemIoFailure) => {
            StoreError::Unreachable(e.to_string())
        }
        // Other messages name tables and columns at most: values are bound, never part of a statement.
        _ => StoreError::Refused(e.to_string()),
    }
}
