//! A shard in MySQL (8.4, 9) or MariaDB (10.11, 11), in the SQL that both understand.
//!
//! A batch takes two round trips: one text that begins the transaction, checks who the database is, and takes the locks;
//! one that inserts, updates and commits. Texts are sent whole rather than prepared, because prepared statements cannot be
//! combined. What users wrote enters them as hexadecimal literals only, so that there is nothing to escape.

mod control;

use super::{
    Counts, HEADS_CAP, Heads, HeadsOf, Holding, Identity, InboxCursor, InboxPart, InboxRow, Known,
    Marked, Meta, NewMessage, Page, Phase, Place, Range, SlotSet, Store, StoreError, StoredMessage,
    UNREAD_CAP, Written,
    control::{hash_of, key_of},
    corrupt, migrate,
    plan::BatchPlan,
};
use crate::config;
use crate::dialog::{DialogId, Key, Seq, Timestamp, UserId};
use crate::ownership::{COMPLETE, FIRST_TERM, SlotState, SlotView};
use crate::ring::Slot;
use async_trait::async_trait;
use mysql_async::prelude::{FromRow, Queryable};
use mysql_async::{Conn, Opts, OptsBuilder, Pool, PoolConstraints, PoolOpts, Row};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::time::timeout;

/// A shard in MySQL or MariaDB. Connections live on the runtime that was handed in.
pub struct MysqlStore {
    opts: Opts,
    /// One connection a lane, so that reads never take one from a write.
    writes: Pool,
    reads: Pool,
    runtime: Handle,
    connect_limit: Duration,
}

/// Every session: ranges of keys estimated by statistics rather than by a dive into the index for each key; the isolation
/// that the write path is built for; text exactly as it was sent; and an end to the locks of an instance that vanished
/// without a word: MariaDB has a limit for idle transactions, MySQL one for idle sessions.
const SETUP: [&str; 2] = [
    "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
    "SET SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION', time_zone = '+00:00', innodb_lock_wait_timeout = 1, \
     wait_timeout = 10, eq_range_index_dive_limit = 1 /*M! , idle_transaction_timeout = 5 */",
];

/// Below `wait_timeout`, so that a connection is closed by us and not under us.
const IDLE_LIMIT: Duration = Duration::from_secs(5);

/// A transaction that an earlier user of the connection left open ends here; `START TRANSACTION` alone would commit it.
const BEGIN: &str = "ROLLBACK; START TRANSACTION; ";

/// One consistent view for all statements that follow, whatever the session's isolation.
const SNAPSHOT: &str = "ROLLBACK; SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; \
     START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY; ";

/// Microseconds since 1970; exact, because the session's time zone is UTC.
const NOW: &str = "CAST(UNIX_TIMESTAMP(NOW(6)) * 1000000 AS SIGNED)";

impl MysqlStore {
    /// A store for `mysql://user:password@host:port/database`. Opens no connection yet.
    ///
    /// # Errors
    /// [`StoreError::Refused`] if the URL is not of that form.
    pub fn new(url: &str, settings: &config::Store, runtime: Handle) -> Result<Self, StoreError> {
        let opts = Opts::from_url(url).map_err(|_| {
            StoreError::Refused("the url is not mysql://user:password@host:port/database".into())
        })?;
        if opts.db_name().is_none_or(str::is_empty) {
            return Err(StoreError::Refused(
                "the url names no database; end it in /NAME".into(),
            ));
        }
        let opts = OptsBuilder::from_opts(opts)
            .prefer_socket(false)
            .tcp_nodelay(true)
            .tcp_keepalive(Some(Duration::from_secs(5)))
            .setup(SETUP.to_vec());
        let pool = |most: usize| {
            let constraints = PoolConstraints::new(0, most.max(1)).unwrap_or_default();
            let pool = PoolOpts::default()
                .with_constraints(constraints)
                // Every text of ours begins with ROLLBACK, and a connection that failed is not put back.
                .with_reset_connection(false)
                .with_inactive_connection_ttl(IDLE_LIMIT)
                .with_ttl_check_interval(Duration::from_secs(2));
            let _inside = runtime.enter();
            Pool::new(opts.clone().pool_opts(pool))
        };
        let (writes, reads) = (pool(settings.lanes), pool(settings.read_connections));
        let connect_limit = Duration::from_millis(settings.connect_ms);
        Ok(Self {
            opts: opts.into(),
            writes,
            reads,
            runtime,
            connect_limit,
        })
    }

    /// A connection of a pool. The limit covers connecting as well as waiting for one to come free, and a read may well
    /// wait for a while: it is given longer.
    async fn connection(&self, pool: &Pool, limit: Duration) -> Result<Conn, StoreError> {
        match timeout(limit, pool.get_conn()).await {
            Ok(Ok(conn)) => Ok(conn),
            Ok(Err(e)) => Err(unreachable(e)),
            Err(_) => Err(StoreError::Unreachable(format!(
                "no connection within {} ms",
                limit.as_millis()
            ))),
        }
    }

    /// Runs `work` on a connection of `pool`, and puts the connection back only if it is fit to be used again.
    async fn on<T>(
        &self,
        pool: &Pool,
        limit: Duration,
        work: impl AsyncFnOnce(&mut Conn) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut conn = self.connection(pool, limit).await?;
        let result = work(&mut conn).await;
        if result.is_err() {
            // Whatever its transaction holds is let go when the server sees the connection close.
            self.runtime
                .spawn(timeout(self.connect_limit, conn.disconnect()));
        }
        result
    }

    async fn on_write<T>(
        &self,
        work: impl AsyncFnOnce(&mut Conn) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.on(&self.writes, self.connect_limit, work).await
    }

    async fn on_read<T>(
        &self,
        work: impl AsyncFnOnce(&mut Conn) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.on(&self.reads, self.connect_limit * 4, work).await
    }
}

#[async_trait]
impl Store for MysqlStore {
    async fn migrate(&self) -> Result<(), StoreError> {
        let mut guard = self
            .connection(&self.writes, self.connect_limit * 4)
            .await?;
        // Instances that start together take turns. The lock belongs to this connection and goes with it.
        let locked: Option<u8> = guard
            .query_first("SELECT GET_LOCK(CONCAT('chat.migrate.', DATABASE()), 60)")
            .await
            .map_err(classify)?;
        if locked != Some(1) {
            return Err(StoreError::Refused(
                "another instance has been migrating for 60 s".into(),
            ));
        }
        let result = migrate::mysql::migrations::runner()
            .run_async(&mut self.reads.clone())
            .await;
        drop(
            guard
                .query_drop("SELECT RELEASE_LOCK(CONCAT('chat.migrate.', DATABASE()))")
                .await,
        );
        result
            .map(drop)
            .map_err(|e| StoreError::Refused(format!("migration: {e}")))
    }

    async fn ping(&self) -> Result<(), StoreError> {
        let opts = OptsBuilder::from_opts(self.opts.clone()).setup(Vec::<String>::new());
        let round_trip = async {
            let mut conn = Conn::new(opts).await.map_err(unreachable)?;
            conn.query_drop("DO 0").await.map_err(classify)?;
            conn.disconnect().await.map_err(classify)
        };
        timeout(self.connect_limit, round_trip)
            .await
            .unwrap_or_else(|_| {
                Err(StoreError::Unreachable(format!(
                    "no answer within {} ms",
                    self.connect_limit.as_millis()
                )))
            })
    }

    async fn warnings(&self) -> Result<Vec<String>, StoreError> {
        self.on_read(async |conn| {
            let row: Option<(u8, Option<u64>, u8)> = conn
                .query_first("SELECT @@innodb_flush_log_at_trx_commit, @@sync_binlog, @@log_bin")
                .await
                .map_err(classify)?;
            let mut lines = Vec::new();
            if let Some((flush, sync, binlog)) = row {
                if flush != 1 {
                    lines.push(format!(
                        "innodb_flush_log_at_trx_commit is {flush}: a crash of the machine may lose acknowledged messages; set it to 1"
                    ));
                }
                if binlog == 1 && sync != Some(1) {
                    lines.push("sync_binlog is not 1: a crash of the machine may part this server from its replicas; set it to 1".into());
                }
            }
            Ok(lines)
        })
        .await
    }

    async fn meta(&self) -> Result<Option<Meta>, StoreError> {
        self.on_read(
            async |conn| match conn.query_first::<MetaRow, _>(SELECT_META).await {
                Ok(row) => row.map(meta_of).transpose(),
                Err(mysql_async::Error::Server(e)) if e.code == NO_SUCH_TABLE => Ok(None),
                Err(e) => Err(classify(e)),
            },
        )
        .await
    }

    async fn found(&self, meta: &Meta, owned: &SlotSet) -> Result<Meta, StoreError> {
        self.on_write(async |conn| {
            conn.query_drop(BEGIN).await.map_err(classify)?;
            conn.exec_drop(
                "INSERT IGNORE INTO meta (id, cluster_id, shard_name, slot_algorithm, doc_version, doc_phase, doc_hash, doc)
                 VALUES (1, ?, ?, ?, ?, ?, ?, ?)",
                (
                    &meta.cluster_id,
                    &meta.shard_name,
                    &meta.slot_algorithm,
                    meta.doc_version,
                    meta.doc_phase.as_str(),
                    &meta.doc_hash,
                    &meta.doc,
                ),
            )
            .await
            .map_err(classify)?;
            if conn.affected_rows() == 1 {
                let mut sql = String::from(
                    "INSERT INTO slots (slot, state, term, generation, activated, claimed_generation, history) VALUES ",
                );
                for slot in Slot::all() {
                    let (state, term) = if owned.contains(slot) { (SlotState::Owner, FIRST_TERM) } else { (SlotState::None, 0) };
                    let comma = if slot.get() == 0 { "" } else { "," };
                    let _ = write!(sql, "{comma}({slot},'{state}',{term},0,0,0,'{COMPLETE}')");
                }
                conn.query_drop(sql).await.map_err(classify)?;
            }
            let row = conn.query_first::<MetaRow, _>(SELECT_META).await.map_err(classify)?;
            conn.query_drop("COMMIT").await.map_err(classify)?;
            row.map(meta_of).transpose()?.ok_or_else(|| StoreError::Refused("the row of meta vanished".into()))
        })
        .await
    }

    async fn advance(&self, version: u64, hash: &str, phase: Phase) -> Result<(), StoreError> {
        let allowed = match phase {
            Phase::Founding | Phase::Adjudicate => return Ok(()),
            Phase::Normal => Phase::Founding.as_str(),
        };
        self.on_write(async |conn| {
            conn.exec_drop(
                "UPDATE meta SET doc_phase = ? WHERE id = 1 AND doc_version = ? AND doc_hash = ? AND doc_phase = ?",
                (phase.as_str(), version, hash, allowed),
            )
            .await
            .map_err(classify)
        })
        .await
    }

    async fn slots(&self, identity: &Identity) -> Result<Holding, StoreError> {
        let sql = format!(
            "{SNAPSHOT}{}; {}; COMMIT",
            select_identity(),
            select_owned("")
        );
        self.on_read(async |conn| {
            let mut sets = result_sets(conn, sql).await?.into_iter().skip(3);
            check_identity(identity, sets.next())?;
            holding(rows(sets.next())?)
        })
        .await
    }

    async fn write(
        &self,
        identity: &Identity,
        batch: &[NewMessage],
        suspect: bool,
    ) -> Result<Vec<Written>, StoreError> {
        self.on_write(async |conn| {
            let locked = lock(conn, identity, batch).await?;
            let mut keys = if suspect {
                known_keys(conn, batch).await?
            } else {
                HashMap::new()
            };
            loop {
                let plan = BatchPlan::new(batch, &locked.slots, &locked.heads, &keys, locked.now);
                if plan.rows.is_empty() {
                    conn.query_drop("ROLLBACK").await.map_err(classify)?;
                    return Ok(plan.outcomes);
                }
                match conn
                    .query_drop(insert(batch, &plan, &locked.heads, locked.now))
                    .await
                {
                    Ok(()) => return Ok(plan.outcomes),
                    // The insert is undone, the transaction and its locks are not: now is the time to look the keys up.
                    Err(mysql_async::Error::Server(e))
                        if e.code == DUPLICATE_KEY && keys.is_empty() =>
                    {
                        keys = known_keys(conn, batch).await?;
                    }
                    Err(e) => return Err(classify(e)),
                }
            }
        })
        .await
    }

    async fn page(
        &self,
        identity: &Identity,
        dialog: DialogId,
        range: Range,
        limit: u32,
    ) -> Result<Page, StoreError> {
        let (condition, bound, order) = match range {
            Range::Newest => ("seq >= ?", 0, "DESC"),
            Range::Before(seq) => ("seq < ?", seq.get(), "DESC"),
            Range::After(seq) => ("seq > ?", seq.get(), "ASC"),
        };
        // One statement is one snapshot: the messages, the head and the slot's row belong together.
        let sql = format!(
            "SELECT s.state, s.generation, s.history, s.peer, d.last_seq, m.seq, m.author, m.client_key, m.text, m.created_at
               FROM meta i
               JOIN slots s ON s.slot = ?
               LEFT JOIN dialogs d ON d.slot = s.slot AND d.dialog = ?
               LEFT JOIN (SELECT seq, author, client_key, text, created_at FROM messages
                           WHERE slot = ? AND dialog = ? AND {condition} ORDER BY seq {order} LIMIT ?) m ON TRUE
              WHERE i.id = 1 AND i.cluster_id = ? AND i.shard_name = ?"
        );
        let (slot, name) = (Slot::of(dialog).get(), dialog.to_string());
        let params = (
            slot,
            &name,
            slot,
            &name,
            bound,
            limit,
            &identity.cluster_id,
            &identity.shard_name,
        );
        type PageRow = (
            String,
            u32,
            String,
            Option<String>,
            Option<u64>,
            Option<u64>,
            Option<u64>,
            Option<Vec<u8>>,
            Option<String>,
            Option<i64>,
        );
        let rows: Vec<PageRow> = self
            .on_read(async |conn| conn.exec(&*sql, params).await.map_err(classify))
            .await?;
        let mut page = Page {
            slot: None,
            last_seq: Seq::ZERO,
            messages: Vec::with_capacity(rows.len()),
        };
        for (state, generation, history, peer, last_seq, seq, author, key, text, at) in rows {
            page.slot = Some(view_of(&state, generation, &history, peer)?);
            page.last_seq = Seq::new(last_seq.unwrap_or(0));
            if let (Some(seq), Some(author), Some(text), Some(at)) = (seq, author, text, at) {
                page.messages.push(stored(seq, author, key, text, at)?);
            }
        }
        page.messages.sort_by_key(|message| message.seq);
        Ok(page)
    }

    async fn inbox(
        &self,
        identity: &Identity,
        user: UserId,
        below: Option<InboxCursor>,
        limit: u32,
    ) -> Result<InboxPart, StoreError> {
        let below = below.map_or(String::new(), |cursor| {
            format!(
                "AND (d.last_at, d.dialog) < ({}, '{}')",
                cursor.last_at.micros(),
                cursor.dialog
            )
        });
        let sql = format!(
            "{SNAPSHOT}{}; {};
             SELECT t.slot, t.dialog, t.last_at, t.read_seq, m.seq, m.author, m.client_key, m.text, m.created_at
               FROM (SELECT d.slot, d.dialog, d.last_seq, d.last_at, u.read_seq
                       FROM members u
                       JOIN slots s ON s.slot = u.slot AND s.state IN ('owner', 'sealed')
                       JOIN dialogs d ON d.slot = u.slot AND d.dialog = u.dialog
                      WHERE u.user_id = {user} AND d.last_seq > 0 {below}
                      ORDER BY d.last_at DESC, d.dialog DESC LIMIT {limit}) t
               JOIN messages m ON m.slot = t.slot AND m.dialog = t.dialog AND m.seq = t.last_seq
              ORDER BY t.last_at DESC, t.dialog DESC",
            select_identity(),
            select_owned("")
        );
        self.on_read(async |conn| {
            let mut sets = result_sets(conn, sql).await?.into_iter().skip(3);
            check_identity(identity, sets.next())?;
            let slots = holding(rows(sets.next())?)?;
            type InboxRaw = (
                u16,
                String,
                i64,
                u64,
                u64,
                u64,
                Option<Vec<u8>>,
                String,
                i64,
            );
            let raw: Vec<InboxRaw> = rows(sets.next())?;
            let unread = unread_counts(
                conn,
                user,
                raw.iter().map(|row| (row.0, row.1.as_str(), row.3)),
            )
            .await?;
            let mut rows = Vec::with_capacity(raw.len());
            for ((_, dialog, last_at, read_seq, seq, author, key, text, at), unread) in
                raw.into_iter().zip(unread)
            {
                rows.push(InboxRow {
                    dialog: dialog.parse().map_err(|_| corrupt("dialogs.dialog"))?,
                    last_at: Timestamp::from_micros(last_at),
                    last: stored(seq, author, key, text, at)?,
                    read_seq: Seq::new(read_seq),
                    unread,
                });
            }
            Ok(InboxPart { rows, slots })
        })
        .await
    }

    async fn dialog_heads(&self, identity: &Identity, of: &HeadsOf) -> Result<Heads, StoreError> {
        let (of_slots, wanted) = match of {
            HeadsOf::Dialogs(dialogs) if dialogs.is_empty() => {
                return Err(StoreError::Refused("heads of no dialog".into()));
            }
            HeadsOf::Dialogs(dialogs) => {
                let (mut slots, mut keys) = (String::new(), String::new());
                for dialog in dialogs {
                    let (slot, comma) = (Slot::of(*dialog), comma(&keys));
                    let _ = write!(slots, "{comma}{slot}");
                    let _ = write!(keys, "{comma}({slot},'{dialog}')");
                }
                (
                    format!("AND slot IN ({slots})"),
                    format!(
                        "SELECT slot, dialog, last_seq, last_at FROM dialogs WHERE (slot, dialog) IN ({keys})"
                    ),
                )
            }
            HeadsOf::Users { users, within } => {
                let mut list = String::new();
                for user in users {
                    let comma = comma(&list);
                    let _ = write!(list, "{comma}{user}");
                }
                let within = i64::try_from(within.as_micros()).unwrap_or(i64::MAX / 2);
                let wanted = format!(
                    "SELECT DISTINCT d.slot, d.dialog, d.last_seq, d.last_at FROM members u \
                       JOIN dialogs d ON d.slot = u.slot AND d.dialog = u.dialog \
                      WHERE u.user_id IN ({list}) AND d.last_at >= {NOW} - {within} \
                      ORDER BY d.last_at DESC LIMIT {HEADS_CAP}"
                );
                (String::new(), wanted)
            }
        };
        let sql = format!(
            "{SNAPSHOT}{}; {};
             SELECT k.dialog, k.last_seq, k.last_at, m.user_id, m.read_seq FROM ({wanted}) k
               JOIN slots s ON s.slot = k.slot AND s.state IN ('owner', 'sealed')
               JOIN members m ON m.slot = k.slot AND m.dialog = k.dialog
              WHERE k.last_seq > 0 ORDER BY k.dialog, m.user_id; COMMIT",
            select_identity(),
            select_owned(&of_slots),
        );
        self.on_read(async |conn| {
            let mut sets = result_sets(conn, sql).await?.into_iter().skip(3);
            let now = check_identity(identity, sets.next())?;
            let slots = holding(rows(sets.next())?)?;
            Heads::of(rows(sets.next())?, now, slots)
        })
        .await
    }

    async fn mark_read(
        &self,
        identity: &Identity,
        dialog: DialogId,
        user: UserId,
        seq: Seq,
    ) -> Result<Marked, StoreError> {
        let slot = Slot::of(dialog);
        let row = format!("m.slot = {slot} AND m.dialog = '{dialog}' AND m.user_id = {user}");
        let sql = format!(
            "{BEGIN}{}; {};
             UPDATE members m
               JOIN dialogs d ON d.slot = m.slot AND d.dialog = m.dialog
               JOIN slots s ON s.slot = m.slot AND s.state = 'owner'
                SET m.read_seq = GREATEST(m.read_seq, LEAST({seq}, d.last_seq)) WHERE {row};
             SELECT m.read_seq FROM members m WHERE {row}; COMMIT",
            select_identity(),
            fence(&BTreeSet::from([slot])),
        );
        self.on_write(async |conn| {
            let mut sets = result_sets(conn, sql).await?.into_iter().skip(2);
            check_identity(identity, sets.next())?;
            let view = views_of(sets.next())?.remove(&slot);
            if !view.as_ref().is_some_and(|view| view.state.takes_writes()) {
                return Ok(Marked::NotOwner(view.map(|view| view.state)));
            }
            let read: Vec<u64> = rows(sets.nth(1))?;
            Ok(read
                .first()
                .map_or(Marked::NoDialog, |seq| Marked::At(Seq::new(*seq))))
        })
        .await
    }

    async fn counts(&self) -> Result<Counts, StoreError> {
        self.on_read(async |conn| {
            let row: Option<(u64, u64, u64)> = conn
                .query_first(
                    "SELECT (SELECT COUNT(*) FROM slots WHERE state = 'owner'),
                            (SELECT COUNT(*) FROM dialogs JOIN slots USING (slot) WHERE state = 'owner' AND last_seq > 0),
                            (SELECT COUNT(*) FROM messages JOIN slots USING (slot) WHERE state = 'owner')",
                )
                .await
                .map_err(classify)?;
            let (slots, dialogs, messages) = row.unwrap_or_default();
            Ok(Counts { slots, dialogs, messages })
        })
        .await
    }
}

/// What the first round trip of a batch finds out.
struct Locked {
    now: Timestamp,
    slots: HashMap<Slot, SlotView>,
    heads: HashMap<DialogId, Seq>,
}

/// Begins the transaction and takes its locks in the order slots, dialogs, each in key order.
async fn lock(
    conn: &mut Conn,
    identity: &Identity,
    batch: &[NewMessage],
) -> Result<Locked, StoreError> {
    let dialogs: BTreeSet<(Slot, DialogId)> = batch
        .iter()
        .map(|message| (message.slot, message.dialog))
        .collect();
    let slots: BTreeSet<Slot> = dialogs.iter().map(|(slot, _)| *slot).collect();
    let heads = lock_heads(&dialogs);
    let sql = format!("{BEGIN}{}; {}; {heads}", select_identity(), fence(&slots));
    let mut sets = result_sets(conn, sql).await?.into_iter().skip(2);
    let now = check_identity(identity, sets.next())?;
    let slots = views_of(sets.next())?;
    let mut heads_found = heads_of(sets.next())?;

    let missing: Vec<_> = dialogs
        .iter()
        .filter(|(slot, dialog)| {
            slots
                .get(slot)
                .is_some_and(|view| view.state.takes_writes())
                && !heads_found.contains_key(dialog)
        })
        .collect();
    if !missing.is_empty() {
        // Somebody may create them at the same moment: what counts is what is there once we hold the lock.
        let mut rows = String::new();
        let mut members = String::new();
        for (slot, dialog) in missing {
            let _ = write!(
                rows,
                "{}({slot},'{dialog}',0,{})",
                comma(&rows),
                now.micros()
            );
            for user in dialog.members() {
                let _ = write!(
                    members,
                    "{}({slot},'{dialog}',{user},0,{})",
                    comma(&members),
                    now.micros()
                );
            }
        }
        let sql = format!(
            "INSERT INTO dialogs (slot, dialog, last_seq, last_at) VALUES {rows} ON DUPLICATE KEY UPDATE dialog = dialogs.dialog;
             INSERT INTO members (slot, dialog, user_id, read_seq, joined_at) VALUES {members}
               ON DUPLICATE KEY UPDATE dialog = members.dialog;
             {heads}"
        );
        heads_found = heads_of(result_sets(conn, sql).await?.into_iter().nth(2))?;
    }
    Ok(Locked {
        now,
        slots,
        heads: heads_found,
    })
}

/// The shared lock that makes a write safe: while it is held, the slots do not change hands.
fn fence(slots: &BTreeSet<Slot>) -> String {
    let mut list = String::new();
    for slot in slots {
        let _ = write!(list, "{}{slot}", comma(&list));
    }
    format!(
        "SELECT slot, state, generation, history, peer FROM slots WHERE slot IN ({list}) ORDER BY slot LOCK IN SHARE MODE"
    )
}

fn lock_heads(dialogs: &BTreeSet<(Slot, DialogId)>) -> String {
    let mut list = String::new();
    for (slot, dialog) in dialogs {
        let _ = write!(list, "{}({slot},'{dialog}')", comma(&list));
    }
    format!(
        "SELECT dialog, last_seq FROM dialogs WHERE (slot, dialog) IN ({list}) ORDER BY slot, dialog FOR UPDATE"
    )
}

fn heads_of(set: Option<Vec<Row>>) -> Result<HashMap<DialogId, Seq>, StoreError> {
    rows::<(String, u64)>(set)?
        .into_iter()
        .map(|(dialog, seq)| {
            Ok((
                dialog.parse().map_err(|_| corrupt("dialogs.dialog"))?,
                Seq::new(seq),
            ))
        })
        .collect()
}

/// The second round trip of a batch.
fn insert(
    batch: &[NewMessage],
    plan: &BatchPlan,
    heads: &HashMap<DialogId, Seq>,
    now: Timestamp,
) -> String {
    let mut sql = String::with_capacity(
        512 + plan
            .rows
            .iter()
            .map(|row| 200 + 2 * batch[row.index].text.as_str().len())
            .sum::<usize>(),
    );
    sql.push_str("INSERT INTO messages (slot, dialog, seq, author, client_key, text_hash, kind, text, created_at) VALUES ");
    for (i, row) in plan.rows.iter().enumerate() {
        let message = &batch[row.index];
        let comma = if i == 0 { "" } else { "," };
        let _ = write!(
            sql,
            "{comma}({},'{}',{},{},x'",
            message.slot, message.dialog, row.seq, message.author
        );
        push_hex(&mut sql, message.key.as_str().as_bytes());
        sql.push_str("',x'");
        push_hex(&mut sql, &message.hash.0);
        sql.push_str("','text',_utf8mb4 x'");
        push_hex(&mut sql, message.text.as_str().as_bytes());
        let _ = write!(sql, "',{})", now.micros());
    }
    // The rows are there and locked, so a step of so much is as good as a value, and one statement serves all that take it.
    let mut steps = BTreeMap::<u64, String>::new();
    for ((slot, dialog), seq) in &plan.heads {
        let list = steps
            .entry(seq.get() - heads.get(dialog).copied().unwrap_or_default().get())
            .or_default();
        let _ = write!(list, "{}({slot},'{dialog}')", comma(list));
    }
    for (step, dialogs) in steps {
        let now = now.micros();
        let _ = write!(
            sql,
            "; UPDATE dialogs SET last_seq = last_seq + {step}, last_at = {now} WHERE (slot, dialog) IN ({dialogs})"
        );
    }
    sql.push_str("; COMMIT");
    sql
}

/// Looks up every key of the batch. Only after the dialogs are locked: before, the answer may be old.
async fn known_keys(
    conn: &mut Conn,
    batch: &[NewMessage],
) -> Result<HashMap<(DialogId, UserId, Key), Known>, StoreError> {
    let mut sql = String::from(
        "SELECT dialog, author, client_key, seq, created_at, text_hash FROM messages WHERE (slot, dialog, author, client_key) IN (",
    );
    for (i, message) in batch.iter().enumerate() {
        let comma = if i == 0 { "" } else { "," };
        let _ = write!(
            sql,
            "{comma}({},'{}',{},x'",
            message.slot, message.dialog, message.author
        );
        push_hex(&mut sql, message.key.as_str().as_bytes());
        sql.push_str("')");
    }
    sql.push(')');
    type KeyRow = (String, u64, Vec<u8>, u64, i64, Vec<u8>);
    let rows: Vec<KeyRow> = conn.query(sql).await.map_err(classify)?;
    rows.into_iter()
        .map(|(dialog, author, key, seq, at, hash)| {
            let dialog = dialog.parse().map_err(|_| corrupt("messages.dialog"))?;
            let author = UserId::new(author).map_err(|_| corrupt("messages.author"))?;
            Ok((
                (dialog, author, key_of(key)?),
                Known {
                    place: Place {
                        seq: Seq::new(seq),
                        at: Timestamp::from_micros(at),
                    },
                    hash: hash_of(hash)?,
                },
            ))
        })
        .collect()
}

/// For each dialog, the messages of others above the read mark, counted up to the cap; ends the snapshot.
async fn unread_counts(
    conn: &mut Conn,
    user: UserId,
    dialogs: impl Iterator<Item = (u16, &str, u64)>,
) -> Result<Vec<u32>, StoreError> {
    let mut sql = String::new();
    for (slot, dialog, read_seq) in dialogs {
        let union = if sql.is_empty() { "" } else { " UNION ALL " };
        let _ = write!(
            sql,
            "{union}SELECT COUNT(*) FROM (SELECT 1 FROM messages WHERE slot = {slot} AND dialog = '{dialog}' \
             AND seq > {read_seq} AND author <> {user} LIMIT {UNREAD_CAP}) c"
        );
    }
    if sql.is_empty() {
        conn.query_drop("COMMIT").await.map_err(classify)?;
        return Ok(Vec::new());
    }
    sql.push_str("; COMMIT");
    rows(result_sets(conn, sql).await?.into_iter().next())
}

const SELECT_META: &str = "SELECT cluster_id, shard_name, slot_algorithm, doc_version, doc_phase, doc_hash, doc FROM meta WHERE id = 1";

type MetaRow = (String, String, String, u64, String, String, String);

fn meta_of(
    (cluster_id, shard_name, slot_algorithm, doc_version, phase, doc_hash, doc): MetaRow,
) -> Result<Meta, StoreError> {
    Ok(Meta {
        cluster_id,
        shard_name,
        slot_algorithm,
        doc_version,
        doc_phase: Phase::parse(&phase)?,
        doc_hash,
        doc,
    })
}

fn select_identity() -> String {
    format!("SELECT cluster_id, shard_name, {NOW} FROM meta WHERE id = 1")
}

/// Compares who the database says it is with who it must be; returns its time.
fn check_identity(expected: &Identity, set: Option<Vec<Row>>) -> Result<Timestamp, StoreError> {
    match rows::<(String, String, i64)>(set)?.pop() {
        Some((cluster_id, shard_name, now))
            if cluster_id == expected.cluster_id && shard_name == expected.shard_name =>
        {
            Ok(Timestamp::from_micros(now))
        }
        Some((cluster_id, shard_name, _)) => Err(StoreError::WrongIdentity(format!(
            "the url leads to {shard_name} of cluster {cluster_id}, not to {} of {}",
            expected.shard_name, expected.cluster_id
        ))),
        None => Err(StoreError::WrongIdentity(
            "the database is empty: it was wiped, or the url leads to another".into(),
        )),
    }
}

/// The owned and the sealed slots as words of 32 bits, rather than a row each.
/// The slots that are answered for, of those that `and` leaves.
fn select_owned(and: &str) -> String {
    format!(
        "SELECT state, history, slot DIV 32, CAST(SUM(1 << (slot % 32)) AS UNSIGNED) FROM slots \
         WHERE state IN ('owner', 'sealed') {and} GROUP BY state, history, slot DIV 32"
    )
}

fn holding(words: Vec<(String, String, u16, u64)>) -> Result<Holding, StoreError> {
    let mut holding = Holding::nothing();
    for (state, history, word, bits) in words {
        let slots: Vec<u16> = (0..32)
            .filter(|bit| bits & (1 << bit) != 0)
            .map(|bit| word * 32 + bit)
            .collect();
        holding.add(&state, &history, &slots)?;
    }
    Ok(holding)
}

fn views_of(set: Option<Vec<Row>>) -> Result<HashMap<Slot, SlotView>, StoreError> {
    rows::<(u16, String, u32, String, Option<String>)>(set)?
        .into_iter()
        .map(|(slot, state, generation, history, peer)| {
            let slot = Slot::new(slot).ok_or_else(|| corrupt("slots.slot"))?;
            Ok((slot, view_of(&state, generation, &history, peer)?))
        })
        .collect()
}

fn view_of(
    state: &str,
    generation: u32,
    history: &str,
    peer: Option<String>,
) -> Result<SlotView, StoreError> {
    let state = state.parse().map_err(|_| corrupt("slots.state"))?;
    Ok(SlotView {
        state,
        generation,
        complete: history == COMPLETE,
        peer,
    })
}

fn stored(
    seq: u64,
    author: u64,
    key: Option<Vec<u8>>,
    text: String,
    at: i64,
) -> Result<StoredMessage, StoreError> {
    Ok(StoredMessage {
        seq: Seq::new(seq),
        author: UserId::new(author).map_err(|_| corrupt("messages.author"))?,
        key: key
            .map(String::from_utf8)
            .transpose()
            .map_err(|_| corrupt("messages.client_key"))?,
        text,
        at: Timestamp::from_micros(at),
    })
}

/// Runs a text of several statements; one set of rows for each, also for those that have none.
async fn result_sets(conn: &mut Conn, sql: String) -> Result<Vec<Vec<Row>>, StoreError> {
    let mut result = conn.query_iter(sql).await.map_err(classify)?;
    let mut sets = Vec::new();
    loop {
        sets.push(result.collect::<Row>().await.map_err(classify)?);
        if result.is_empty() {
            // The driver keeps the error of a later statement to itself until it is asked.
            result.drop_result().await.map_err(classify)?;
            return Ok(sets);
        }
    }
}

fn rows<T: FromRow>(set: Option<Vec<Row>>) -> Result<Vec<T>, StoreError> {
    set.unwrap_or_default()
        .into_iter()
        .map(|row| {
            mysql_async::from_row_opt(row)
                .map_err(|_| StoreError::Refused("a row has other columns than expected".into()))
        })
        .collect()
}

fn comma(list: &str) -> &'static str {
    if list.is_empty() { "" } else { "," }
}

fn push_hex(sql: &mut String, bytes: &[u8]) {
    const DIGITS: [char; 16] = [
        '0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f',
    ];
    for byte in bytes {
        sql.push(DIGITS[usize::from(byte >> 4)]);
        sql.push(DIGITS[usize::from(byte & 15)]);
    }
}

const DUPLICATE_KEY: u16 = 1062;

const NO_SUCH_TABLE: u16 = 1146;

/// Server errors after which the whole transaction may simply be repeated: lock wait timeout, deadlock, and (MariaDB from
/// 11.6) a row that changed since the snapshot.
const CONFLICTS: [u16; 3] = [1205, 1213, 1020];

/// The server is going away or will not have us: 1040 too many connections, 1053 shutdown in progress, 1077 and 1079
/// likewise, 1317 interrupted, 3169 and 4031 session killed or idle for too long.
const GOING_AWAY: [u16; 7] = [1040, 1053, 1077, 1079, 1317, 3169, 4031];

fn classify(e: mysql_async::Error) -> StoreError {
    match e {
        mysql_async::Error::Server(e) if CONFLICTS.contains(&e.code) => {
            StoreError::Conflict(format!("error {}", e.code))
        }
        mysql_async::Error::Server(e) if GOING_AWAY.contains(&e.code) => {
            StoreError::Lost(format!("error {}: {}", e.code, e.message))
        }
        // The message may quote the statement, and with it what somebody wrote: the code and the state are enough.
        mysql_async::Error::Server(e) => {
            StoreError::Refused(format!("error {} ({})", e.code, e.state))
        }
        mysql_async::Error::Io(e) => StoreError::Lost(e.to_string()),
        mysql_async::Error::Driver(e) => StoreError::Lost(driver(&e)),
        mysql_async::Error::Other(_) | mysql_async::Error::Url(_) => {
            StoreError::Lost("driver".into())
        }
    }
}

/// As [`classify`], while connecting: nothing can have been written yet.
fn unreachable(e: mysql_async::Error) -> StoreError {
    match e {
        // Access denied, unknown database and the like name the user and the database, not the password.
        mysql_async::Error::Server(e) => {
            StoreError::Unreachable(format!("error {}: {}", e.code, e.message))
        }
        mysql_async::Error::Io(e) => StoreError::Unreachable(e.to_string()),
        mysql_async::Error::Driver(e) => StoreError::Unreachable(driver(&e)),
        mysql_async::Error::Other(_) | mysql_async::Error::Url(_) => {
            StoreError::Unreachable("driver".into())
        }
    }
}

#[allow(clippy::wildcard_enum_match_arm)] // whatever else there is or will be is not to be shown
fn driver(e: &mysql_async::DriverError) -> String {
    // Some variants carry rows or packets, and with them what somebody wrote.
    match e {
        mysql_async::DriverError::ConnectionClosed => "the server closed the connection".into(),
        mysql_async::DriverError::PoolDisconnected => "the pool is closed".into(),
        mysql_async::DriverError::PacketTooLarge => {
            "packet too large; raise max_allowed_packet".into()
        }
        _ => "the server answered in an unexpected way".into(),
    }
}
