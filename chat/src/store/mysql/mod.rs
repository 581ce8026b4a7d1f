//! A shard in MySQL (8.4, 9) or MariaDB (10.11, 11), in the SQL that both understand.
//!
//! Transactions are texts of several statements, so that they take few round trips; prepared statements cannot be combined.
//! What users wrote enters them as hexadecimal literals only, so that there is nothing to escape.

mod control;
mod marks;
mod write;

use super::{
    Appended, Counts, Draft, HEADS_CAP, Heads, HeadsOf, HeldSlots, Holding, Identity, InboxCursor,
    InboxPart, InboxRow, Marked, Meta, NewMark, NewMessage, Page, Phase, Range, Receipt, SlotSet,
    Store, StoreError, StoredMessage, UNREAD_CAP, corrupt, migrate,
};
use crate::config;
use crate::dialog::{DialogId, Seq, Timestamp, UserId};
use crate::ownership::{COMPLETE, FIRST_TERM, SlotState, SlotView};
use crate::ring::Slot;
use async_trait::async_trait;
use mysql_async::prelude::{FromRow, Queryable};
use mysql_async::{Conn, Opts, OptsBuilder, Pool, PoolConstraints, PoolOpts, Row};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;

/// A shard in MySQL or MariaDB. Connections live on the runtime that was handed in.
pub struct MysqlStore {
    opts: Opts,
    /// Apart, so that reads never take a connection from a write.
    writes: Connections,
    reads: Connections,
    runtime: Handle,
    connect_limit: Duration,
    held: HeldSlots,
}

/// Every session: ranges of keys estimated by statistics rather than by a dive into the index for each key; the isolation
/// that the write path is built for; text exactly as it was sent; and an end to the locks of an instance that vanished
/// without a word: MariaDB has a limit for idle transactions, MySQL one for idle sessions.
const SETUP: [&str; 2] = [
    "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
    "SET SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION', time_zone = '+00:00', innodb_lock_wait_timeout = 1, \
     wait_timeout = 10, eq_range_index_dive_limit = 1 /*M! , idle_transaction_timeout = 5 */",
];

/// Connections of one kind, and how many of them may be in use.
struct Connections {
    pool: Pool,
    free: Semaphore,
}

/// Beside those of sends and of reads that wait for their turn: for the steps of changes, and looks at the slots.
const CONTROL_CONNECTIONS: usize = 8;

/// How long a connection that is in use is waited for.
const PATIENCE: Duration = Duration::from_secs(2);

/// Below `wait_timeout`, so that a connection is closed by us and not under us.
const IDLE_LIMIT: Duration = Duration::from_secs(5);

/// A connection is put back only after its transaction has ended: there is none to roll back here.
const BEGIN: &str = "START TRANSACTION; ";

/// One consistent view for all statements that follow, whatever the session's isolation.
const SNAPSHOT: &str = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; \
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
        let connections = |most: usize| {
            let constraints = PoolConstraints::new(0, most).unwrap_or_default();
            let pool = PoolOpts::default()
                .with_constraints(constraints)
                // A connection whose transaction failed is not put back.
                .with_reset_connection(false)
                .with_inactive_connection_ttl(IDLE_LIMIT)
                .with_ttl_check_interval(Duration::from_secs(2));
            let _inside = runtime.enter();
            Connections {
                pool: Pool::new(opts.clone().pool_opts(pool)),
                free: Semaphore::new(most),
            }
        };
        let writes = connections(settings.lanes.max(1) + CONTROL_CONNECTIONS);
        let reads = connections(settings.read_connections.max(1) + CONTROL_CONNECTIONS);
        let connect_limit = Duration::from_millis(settings.connect_ms);
        Ok(Self {
            opts: opts.into(),
            writes,
            reads,
            runtime,
            connect_limit,
            held: HeldSlots::default(),
        })
    }

    /// A connection, and its place among those that may be in use. That all are in use says nothing about the database: only a
    /// connection that cannot be made does.
    async fn connection<'a>(
        &self,
        of: &'a Connections,
        patience: Duration,
    ) -> Result<(SemaphorePermit<'a>, Conn), StoreError> {
        let Ok(Ok(place)) = timeout(patience, of.free.acquire()).await else {
            let waited = patience.as_millis();
            return Err(StoreError::Busy(format!(
                "no connection came free within {waited} ms"
            )));
        };
        match timeout(self.connect_limit, of.pool.get_conn()).await {
            Ok(Ok(conn)) => Ok((place, conn)),
            Ok(Err(e)) => Err(unreachable(e)),
            Err(_) => Err(StoreError::Slow(format!(
                "no connection within {} ms",
                self.connect_limit.as_millis()
            ))),
        }
    }

    /// Runs `work` on a connection, and puts the connection back only if it is fit to be used again.
    async fn on<T>(
        &self,
        of: &Connections,
        work: impl AsyncFnOnce(&mut Conn) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let (_place, conn) = self.connection(of, PATIENCE).await?;
        let mut lent = Lent {
            conn: Some(conn),
            runtime: &self.runtime,
            limit: self.connect_limit,
        };
        let Some(conn) = &mut lent.conn else {
            return Err(StoreError::Lost("the connection is gone".into()));
        };
        let result = work(conn).await;
        if result.is_ok() {
            drop(lent.conn.take());
        }
        result
    }

    /// The slots that are answered for, in the snapshot that `conn` is in; read only if they have changed since they last were.
    async fn holding(&self, conn: &mut Conn, revision: u64) -> Result<Holding, StoreError> {
        if let Some(holding) = self.held.of(revision) {
            return Ok(holding);
        }
        let words = conn.query(SELECT_OWNED).await.map_err(classify)?;
        let holding = holding(words)?;
        self.held.keep(revision, &holding);
        Ok(holding)
    }

    async fn on_write<T>(
        &self,
        work: impl AsyncFnOnce(&mut Conn) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.on(&self.writes, work).await
    }

    async fn on_read<T>(
        &self,
        work: impl AsyncFnOnce(&mut Conn) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.on(&self.reads, work).await
    }
}

/// A connection that is in use. Unless it is taken out, when its transaction has ended, it is closed: whatever the transaction
/// holds is let go when the server sees that.
struct Lent<'a> {
    conn: Option<Conn>,
    runtime: &'a Handle,
    limit: Duration,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        if let Some(conn) = self.conn.take() {
            self.runtime.spawn(timeout(self.limit, conn.disconnect()));
        }
    }
}

#[async_trait]
impl Store for MysqlStore {
    async fn migrate(&self) -> Result<(), StoreError> {
        let (_place, mut guard) = self.connection(&self.writes, PATIENCE).await?;
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
            .run_async(&mut self.reads.pool.clone())
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
                Err(StoreError::Slow(format!(
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
        let sql = format!("{SNAPSHOT}{}", select_snapshot());
        self.on_read(async |conn| {
            let mut sets = result_sets(conn, sql).await?.into_iter().skip(2);
            let (_, revision) = check_snapshot(identity, sets.next())?;
            let holding = self.holding(conn, revision).await?;
            conn.query_drop("COMMIT").await.map_err(classify)?;
            Ok(holding)
        })
        .await
    }

    async fn append(
        &self,
        identity: &Identity,
        batch: &[NewMessage],
        draft: Draft,
    ) -> Result<Appended, StoreError> {
        self.on_write(async |conn| write::append(conn, identity, batch, draft).await)
            .await
    }

    async fn write(
        &self,
        identity: &Identity,
        batch: &[NewMessage],
        suspect: bool,
    ) -> Result<Receipt, StoreError> {
        self.on_write(async |conn| write::write(conn, identity, batch, suspect).await)
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
            "SELECT s.state, s.term, s.generation, s.history, s.peer, d.last_seq, m.seq, m.author, m.client_key, m.text, m.created_at
               FROM meta i
               JOIN slots s ON s.slot = ?
               LEFT JOIN dialogs d ON d.slot = s.slot AND d.dialog = ?
               LEFT JOIN (SELECT seq, author, client_key, text, created_at FROM messages FORCE INDEX (PRIMARY)
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
            u64,
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
        for (state, term, generation, history, peer, last_seq, seq, author, key, text, at) in rows {
            page.slot = Some(view_of(&state, term, generation, &history, peer)?);
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
        let (until, below) = below.map_or((String::new(), String::new()), |cursor| {
            let (at, dialog) = (cursor.last_at.micros(), cursor.dialog);
            (
                format!("AND u.last_hour <= {}", cursor.last_at.hour()),
                format!("AND (d.last_at, d.dialog) < ({at}, '{dialog}')"),
            )
        });
        // Hours are read whole, the newest first, until they hold a page; that of the cursor may hold what is above it. The last of
        // them is found by a statement of its own: MariaDB makes no range of a subquery, and would read all that the user has.
        let earlier = until.replace("<=", "<");
        let sql = format!(
            "{SNAPSHOT}{};
             SET @hour = COALESCE(
                (SELECT u.last_hour FROM members u FORCE INDEX (by_recency)
                   STRAIGHT_JOIN slots s ON s.slot = u.slot AND s.state IN ('owner', 'sealed')
                  WHERE u.user_id = {user} {earlier} ORDER BY u.last_hour DESC LIMIT 1 OFFSET {}), 0);
             SELECT t.slot, t.dialog, t.last_at, t.read_seq, m.seq, m.author, m.client_key, m.text, m.created_at
               FROM (SELECT d.slot, d.dialog, d.last_seq, d.last_at, u.read_seq
                       FROM members u FORCE INDEX (by_recency)
                       STRAIGHT_JOIN slots s ON s.slot = u.slot AND s.state IN ('owner', 'sealed')
                       STRAIGHT_JOIN dialogs d FORCE INDEX (PRIMARY) ON d.slot = u.slot AND d.dialog = u.dialog
                      WHERE u.user_id = {user} AND d.last_seq > 0 {until} {below} AND u.last_hour >= @hour
                      ORDER BY d.last_at DESC, d.dialog DESC LIMIT {limit}) t
               STRAIGHT_JOIN messages m FORCE INDEX (PRIMARY) ON m.slot = t.slot AND m.dialog = t.dialog AND m.seq = t.last_seq
              ORDER BY t.last_at DESC, t.dialog DESC",
            select_snapshot(),
            limit.saturating_sub(1),
        );
        self.on_read(async |conn| {
            let mut sets = result_sets(conn, sql).await?.into_iter().skip(2);
            let (_, revision) = check_snapshot(identity, sets.next())?;
            let of_hours = sets.nth(1);
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
            let raw: Vec<InboxRaw> = rows(of_hours)?;
            let slots = self.holding(conn, revision).await?;
            let unread = unread_counts(
                conn,
                user,
                raw.iter().map(|row| Unread {
                    slot: row.0,
                    dialog: &row.1,
                    read_seq: row.3,
                    last_seq: row.4,
                    last_author: row.5,
                }),
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
        let wanted = match of {
            HeadsOf::Dialogs(dialogs) if dialogs.is_empty() => {
                return Err(StoreError::Refused("heads of no dialog".into()));
            }
            HeadsOf::Dialogs(dialogs) => {
                let mut keys = String::new();
                for dialog in dialogs {
                    let _ = write!(keys, "{}({},'{dialog}')", comma(&keys), Slot::of(*dialog));
                }
                format!(
                    "SELECT slot, dialog, last_seq, last_at FROM dialogs FORCE INDEX (PRIMARY) WHERE (slot, dialog) IN ({keys})"
                )
            }
            HeadsOf::Users { users, within } => {
                let mut list = String::new();
                for user in users {
                    let comma = comma(&list);
                    let _ = write!(list, "{comma}{user}");
                }
                let within = i64::try_from(within.as_micros()).unwrap_or(i64::MAX / 2);
                format!(
                    "SELECT DISTINCT d.slot, d.dialog, d.last_seq, d.last_at FROM members u FORCE INDEX (by_recency) \
                       STRAIGHT_JOIN dialogs d FORCE INDEX (PRIMARY) ON d.slot = u.slot AND d.dialog = u.dialog \
                      WHERE u.user_id IN ({list}) AND u.last_hour >= GREATEST({NOW} - {within}, 0) DIV {} AND d.last_at >= {NOW} - {within} \
                      ORDER BY d.last_at DESC LIMIT {HEADS_CAP}",
                    Timestamp::HOUR
                )
            }
        };
        // In this order, whatever the optimizer believes: what is wanted is little, and the others are found by their keys.
        let sql = format!(
            "{SNAPSHOT}{};
             SELECT k.dialog, k.last_seq, k.last_at, m.user_id, m.read_seq FROM ({wanted}) k
               STRAIGHT_JOIN slots s ON s.slot = k.slot AND s.state IN ('owner', 'sealed')
               STRAIGHT_JOIN members m FORCE INDEX (PRIMARY) ON m.slot = k.slot AND m.dialog = k.dialog
              WHERE k.last_seq > 0 ORDER BY k.dialog, m.user_id",
            select_snapshot(),
        );
        self.on_read(async |conn| {
            let mut sets = result_sets(conn, sql).await?.into_iter().skip(2);
            let (now, revision) = check_snapshot(identity, sets.next())?;
            let mut slots = self.holding(conn, revision).await?;
            conn.query_drop("COMMIT").await.map_err(classify)?;
            if let HeadsOf::Dialogs(dialogs) = of {
                slots.keep(dialogs.iter().map(|dialog| Slot::of(*dialog)));
            }
            Heads::of(rows(sets.next())?, now, slots)
        })
        .await
    }

    async fn mark_read(
        &self,
        identity: &Identity,
        marks: &[NewMark],
    ) -> Result<Vec<Marked>, StoreError> {
        self.on_write(async |conn| marks::mark_read(conn, identity, marks).await)
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

/// What is unread of each dialog: the messages of others above the read mark, counted up to the cap. Ends the snapshot.
async fn unread_counts(
    conn: &mut Conn,
    user: UserId,
    dialogs: impl Iterator<Item = Unread<'_>>,
) -> Result<Vec<u32>, StoreError> {
    let (mut counts, mut to_count) = (Vec::new(), Vec::new());
    let mut sql = String::new();
    for (n, of) in dialogs.enumerate() {
        // All is read; or the last message is the only one that is not.
        let above = of.last_seq.saturating_sub(of.read_seq);
        counts.push(u32::from(above == 1 && of.last_author != user.get()));
        if above > 1 {
            to_count.push(n);
            let Unread {
                slot,
                dialog,
                read_seq,
                ..
            } = of;
            let union = if sql.is_empty() { "" } else { " UNION ALL " };
            let _ = write!(
                sql,
                "{union}SELECT COUNT(*) FROM (SELECT 1 FROM messages FORCE INDEX (PRIMARY) WHERE slot = {slot} AND dialog = '{dialog}' \
                 AND seq > {read_seq} AND author <> {user} LIMIT {UNREAD_CAP}) c"
            );
        }
    }
    if sql.is_empty() {
        conn.query_drop("COMMIT").await.map_err(classify)?;
        return Ok(counts);
    }
    sql.push_str("; COMMIT");
    let counted: Vec<u32> = rows(result_sets(conn, sql).await?.into_iter().next())?;
    for (n, count) in to_count.into_iter().zip(counted) {
        counts[n] = count;
    }
    Ok(counts)
}

/// A dialog whose unread messages are to be counted.
struct Unread<'a> {
    slot: u16,
    dialog: &'a str,
    read_seq: u64,
    last_seq: u64,
    last_author: u64,
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

/// Who the database is, its time, and the revision of the slots.
fn select_snapshot() -> String {
    format!(
        "SELECT cluster_id, shard_name, {NOW}, (SELECT revision FROM slots_revision WHERE id = 1) FROM meta WHERE id = 1"
    )
}

/// As [`check_identity`]; returns the revision of the slots too.
fn check_snapshot(
    expected: &Identity,
    set: Option<Vec<Row>>,
) -> Result<(Timestamp, u64), StoreError> {
    let set = set.unwrap_or_default();
    let revision = set.first().and_then(|row| row.get(3)).unwrap_or(0);
    let identities = set.into_iter().filter_map(|row| {
        let identity: (String, String, i64) = (row.get(0)?, row.get(1)?, row.get(2)?);
        Some(identity)
    });
    Ok((is_expected(expected, identities.last())?, revision))
}

/// Compares who the database says it is with who it must be; returns its time.
fn check_identity(expected: &Identity, set: Option<Vec<Row>>) -> Result<Timestamp, StoreError> {
    is_expected(expected, rows(set)?.pop())
}

fn is_expected(
    expected: &Identity,
    found: Option<(String, String, i64)>,
) -> Result<Timestamp, StoreError> {
    match found {
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
const SELECT_OWNED: &str = "SELECT state, history, slot DIV 32, CAST(SUM(1 << (slot % 32)) AS UNSIGNED) FROM slots \
     WHERE state IN ('owner', 'sealed') GROUP BY state, history, slot DIV 32";

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
    rows::<(u16, String, u64, u32, String, Option<String>)>(set)?
        .into_iter()
        .map(|(slot, state, term, generation, history, peer)| {
            let slot = Slot::new(slot).ok_or_else(|| corrupt("slots.slot"))?;
            Ok((slot, view_of(&state, term, generation, &history, peer)?))
        })
        .collect()
}

fn view_of(
    state: &str,
    term: u64,
    generation: u32,
    history: &str,
    peer: Option<String>,
) -> Result<SlotView, StoreError> {
    let state = state.parse().map_err(|_| corrupt("slots.state"))?;
    Ok(SlotView {
        state,
        term,
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
