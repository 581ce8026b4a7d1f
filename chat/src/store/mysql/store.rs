//! The contract of sends and reads.

use super::super::{
    Appended, BatchResult, Counts, Draft, InboxCursor, InboxRow, LAST_SEQS_CAP, LastSeqs,
    LastSeqsOf, MarkOutcome, Meta, NewMark, NewMessage, Page, Range, ServedSlots, ShardIdentity,
    ShardInbox, Store, StoreError, UNREAD_CAP, corrupt, migrate,
};
use super::connection::{MysqlStore, PATIENCE};
use super::error::{NO_SUCH_TABLE, classify, unreachable};
use super::sql::{
    BEGIN, KeyList, MetaRow, NOW, SELECT_META, SNAPSHOT, check_snapshot, comma, meta_of,
    result_sets, rows, select_snapshot, stored, view_of,
};
use super::{marks, write};
use crate::domain::dialog::{DialogId, Seq, Timestamp, UserId};
use crate::domain::ownership::{COMPLETE, FIRST_TERM, SlotState};
use crate::domain::slot::{Slot, SlotSet};
use crate::domain::topology::Phase;
use async_trait::async_trait;
use mysql_async::prelude::Queryable;
use mysql_async::{Conn, OptsBuilder};
use std::fmt::Write as _;
use tokio::time::timeout;

#[async_trait]
impl Store for MysqlStore {
    async fn migrate(&self) -> Result<(), StoreError> {
        let (_place, mut guard) = self.connection(&self.writes, PATIENCE).await?;
        // Instances that start together take turns. The lock belongs to this connection and goes
        // with it.
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
            // A later version has added to the tables: this one does without (a way back).
            .set_abort_missing(false)
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

    async fn initialize(&self, meta: &Meta, owned: &SlotSet) -> Result<Meta, StoreError> {
        self.on_write(async |conn| {
            conn.query_drop(BEGIN).await.map_err(classify)?;
            conn.exec_drop(
                "INSERT IGNORE INTO meta (id, cluster_id, shard_name, slot_algorithm, topology_version, topology_phase, topology_hash, topology)
                 VALUES (1, ?, ?, ?, ?, ?, ?, ?)",
                (
                    &meta.cluster_id,
                    &meta.shard_name,
                    &meta.slot_algorithm,
                    meta.topology_version,
                    meta.topology_phase.as_str(),
                    &meta.topology_hash,
                    &meta.topology,
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
            Phase::Initializing | Phase::Failover => return Ok(()),
            Phase::Normal => Phase::Initializing.as_str(),
        };
        self.on_write(async |conn| {
            conn.exec_drop(
                "UPDATE meta SET topology_phase = ? WHERE id = 1 AND topology_version = ? AND topology_hash = ? AND topology_phase = ?",
                (phase.as_str(), version, hash, allowed),
            )
            .await
            .map_err(classify)
        })
        .await
    }

    async fn slots(&self, identity: &ShardIdentity) -> Result<ServedSlots, StoreError> {
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
        identity: &ShardIdentity,
        batch: &[NewMessage],
        draft: Draft,
    ) -> Result<Appended, StoreError> {
        self.on_write(async |conn| write::append(conn, identity, batch, draft).await)
            .await
    }

    async fn write(
        &self,
        identity: &ShardIdentity,
        batch: &[NewMessage],
        suspect: bool,
    ) -> Result<BatchResult, StoreError> {
        self.on_write(async |conn| write::write(conn, identity, batch, suspect).await)
            .await
    }

    async fn page(
        &self,
        identity: &ShardIdentity,
        dialog: DialogId,
        range: Range,
        limit: u32,
    ) -> Result<Page, StoreError> {
        let (condition, bound, order) = match range {
            Range::Newest => ("seq >= ?", 0, "DESC"),
            Range::Before(seq) => ("seq < ?", seq.get(), "DESC"),
            Range::After(seq) => ("seq > ?", seq.get(), "ASC"),
        };
        // One statement is one snapshot: the messages, the last seq and the slot's row belong
        // together.
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
        identity: &ShardIdentity,
        user: UserId,
        below: Option<InboxCursor>,
        limit: u32,
    ) -> Result<ShardInbox, StoreError> {
        let (until, below) = below.map_or((String::new(), String::new()), |cursor| {
            let (at, dialog) = (cursor.last_at.micros(), cursor.dialog);
            (
                format!("AND u.last_hour <= {}", cursor.last_at.hour()),
                format!("AND (d.last_at, d.dialog) < ({at}, '{dialog}')"),
            )
        });
        // Hours are read whole, the newest first, until they hold a page; that of the cursor may
        // hold what is above it. The last of them is found by a statement of its own: MariaDB makes
        // no range of a subquery, and would read all that the user has.
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
            Ok(ShardInbox { rows, slots })
        })
        .await
    }

    async fn last_seqs(
        &self,
        identity: &ShardIdentity,
        of: &LastSeqsOf,
    ) -> Result<LastSeqs, StoreError> {
        let selected = match of {
            LastSeqsOf::Dialogs(dialogs) if dialogs.is_empty() => {
                return Err(StoreError::Refused("last seqs of no dialog".into()));
            }
            LastSeqsOf::Dialogs(dialogs) => {
                let mut keys = KeyList::default();
                for dialog in dialogs {
                    keys.push(format_args!("{},'{dialog}'", Slot::of(*dialog)));
                }
                format!(
                    "SELECT slot, dialog, last_seq, last_at FROM dialogs FORCE INDEX (PRIMARY) WHERE (slot, dialog) IN ({keys})"
                )
            }
            LastSeqsOf::Users { users, within } => {
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
                      ORDER BY d.last_at DESC LIMIT {LAST_SEQS_CAP}",
                    Timestamp::HOUR
                )
            }
        };
        // In this order, whatever the optimizer believes: few rows are selected, and the others are
        // found by their keys.
        let sql = format!(
            "{SNAPSHOT}{};
             SELECT k.dialog, k.last_seq, k.last_at, m.user_id, m.read_seq FROM ({selected}) k
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
            if let LastSeqsOf::Dialogs(dialogs) = of {
                slots.keep(dialogs.iter().map(|dialog| Slot::of(*dialog)));
            }
            LastSeqs::of(rows(sets.next())?, now, slots)
        })
        .await
    }

    async fn mark_read(
        &self,
        identity: &ShardIdentity,
        marks: &[NewMark],
    ) -> Result<Vec<MarkOutcome>, StoreError> {
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

/// What is unread of each dialog: the messages of others above the read mark, counted up to the
/// cap. Ends the snapshot.
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
