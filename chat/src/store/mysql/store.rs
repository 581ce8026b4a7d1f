//! The contract of sends and reads.

use super::super::control::role_of;
use super::super::{
    Appended, BatchResult, Counts, Draft, InboxCursor, InboxRow, LAST_SEQS_CAP, LastSeqs,
    LastSeqsOf, MarkOutcome, Meta, NewMark, NewMessage, Page, Range, RoomMember, RoomView,
    ServedSlots, ShardIdentity, ShardInbox, Store, StoreError, StoredMessage, UNREAD_CAP,
    UNREAD_LOOK, corrupt, migrate,
};
use super::connection::{MysqlStore, PATIENCE};
use super::error::{NO_SUCH_TABLE, classify, unreachable};
use super::sql::{
    BEGIN, KeyList, MESSAGE_ROW, MetaRow, NOW, SELECT_META, SNAPSHOT, check_snapshot, column,
    columns, comma, meta_of, result_sets, rows, select_snapshot, stored, view_of,
};
use super::{marks, write};
use crate::domain::dialog::{DialogId, Seq, Timestamp, UserId};
use crate::domain::ownership::{COMPLETE, FIRST_TERM, SlotState, SlotView};
use crate::domain::room::Settings;
use crate::domain::slot::{Slot, SlotSet};
use crate::domain::topology::Phase;
use async_trait::async_trait;
use mysql_async::prelude::Queryable;
use mysql_async::{Conn, OptsBuilder, Row};
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
            "SELECT s.state, s.term, s.generation, s.history, s.peer, d.last_seq, {MESSAGE_ROW}
               FROM meta i
               JOIN slots s ON s.slot = ?
               LEFT JOIN dialogs d ON d.slot = s.slot AND d.dialog = ?
               LEFT JOIN (SELECT seq, author, client_key, kind, of_seq, text, created_at FROM messages FORCE INDEX (PRIMARY)
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
        let rows: Vec<Row> = self
            .on_read(async |conn| conn.exec(&*sql, params).await.map_err(classify))
            .await?;
        let mut page = Page {
            slot: None,
            last_seq: Seq::ZERO,
            messages: Vec::with_capacity(rows.len()),
        };
        for row in rows {
            let (slot, last_seq, message) = page_row(row)?;
            page.slot = Some(slot);
            page.last_seq = last_seq;
            page.messages.extend(message);
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
                  WHERE u.user_id = {user} AND u.until_seq IS NULL {earlier} ORDER BY u.last_hour DESC LIMIT 1 OFFSET {}), 0);
             SELECT t.slot, t.dialog, t.last_at, t.read_seq, t.settings, {MESSAGE_ROW}
               FROM (SELECT d.slot, d.dialog, d.last_seq, d.last_at, d.settings, u.read_seq
                       FROM members u FORCE INDEX (by_recency)
                       STRAIGHT_JOIN slots s ON s.slot = u.slot AND s.state IN ('owner', 'sealed')
                       STRAIGHT_JOIN dialogs d FORCE INDEX (PRIMARY) ON d.slot = u.slot AND d.dialog = u.dialog
                      WHERE u.user_id = {user} AND u.until_seq IS NULL AND d.last_seq > 0 {until} {below} AND u.last_hour >= @hour
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
            let raw = of_hours.unwrap_or_default().into_iter().map(inbox_row);
            let raw = raw.collect::<Result<Vec<_>, _>>()?;
            let slots = self.holding(conn, revision).await?;
            let unread = unread_counts(conn, user, &raw).await?;
            let rows = raw.into_iter().zip(unread);
            let rows = rows
                .map(|(row, unread)| InboxRow { unread, ..row })
                .collect();
            Ok(ShardInbox { rows, slots })
        })
        .await
    }

    async fn last_seqs(
        &self,
        identity: &ShardIdentity,
        of: &LastSeqsOf,
    ) -> Result<LastSeqs, StoreError> {
        let mut list = String::new();
        for user in of.users() {
            let _ = write!(list, "{}{user}", comma(&list));
        }
        let selected = match of {
            LastSeqsOf::Dialogs { dialogs, .. } if dialogs.is_empty() => {
                return Err(StoreError::Refused("last seqs of no dialog".into()));
            }
            LastSeqsOf::Dialogs { dialogs, .. } => {
                let mut keys = KeyList::default();
                for dialog in dialogs {
                    keys.push(format_args!("{},'{dialog}'", Slot::of(*dialog)));
                }
                format!(
                    "SELECT slot, dialog, last_seq, last_at FROM dialogs FORCE INDEX (PRIMARY) WHERE (slot, dialog) IN ({keys})"
                )
            }
            LastSeqsOf::Users { within, .. } => {
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
             SELECT k.dialog, k.last_seq, k.last_at, m.user_id, m.read_seq, m.since_seq, m.until_seq FROM ({selected}) k
               STRAIGHT_JOIN slots s ON s.slot = k.slot AND s.state IN ('owner', 'sealed')
               STRAIGHT_JOIN members m FORCE INDEX (PRIMARY) ON m.slot = k.slot AND m.dialog = k.dialog
                 AND (k.dialog NOT LIKE 'r%' OR m.user_id IN ({list}))
              WHERE k.last_seq > 0 ORDER BY k.dialog, m.user_id",
            select_snapshot(),
        );
        self.on_read(async |conn| {
            let mut sets = result_sets(conn, sql).await?.into_iter().skip(2);
            let (now, revision) = check_snapshot(identity, sets.next())?;
            let mut slots = self.holding(conn, revision).await?;
            conn.query_drop("COMMIT").await.map_err(classify)?;
            if let LastSeqsOf::Dialogs { dialogs, .. } = of {
                slots.keep(dialogs.iter().map(|dialog| Slot::of(*dialog)));
            }
            LastSeqs::of(rows(sets.next())?, now, slots)
        })
        .await
    }

    async fn room(
        &self,
        identity: &ShardIdentity,
        room: DialogId,
        user: UserId,
    ) -> Result<RoomView, StoreError> {
        let slot = Slot::of(room);
        // One statement is one snapshot.
        let sql = format!(
            "SELECT s.state, s.term, s.generation, s.history, s.peer, COALESCE(d.last_seq, 0), d.settings, \
               (SELECT COUNT(*) FROM members c WHERE c.slot = {slot} AND c.dialog = '{room}' AND c.until_seq IS NULL), \
               m.role, m.since_seq, m.until_seq, m.read_seq \
               FROM meta i JOIN slots s ON s.slot = {slot} \
               LEFT JOIN dialogs d ON d.slot = s.slot AND d.dialog = '{room}' \
               LEFT JOIN members m ON m.slot = s.slot AND m.dialog = '{room}' AND m.user_id = {user} \
              WHERE i.id = 1 AND i.cluster_id = '{}' AND i.shard_name = '{}'",
            identity.cluster_id, identity.shard_name
        );
        type RoomRow = (
            String,
            u64,
            u32,
            String,
            Option<String>,
            u64,
            Option<String>,
            u64,
            Option<String>,
            Option<u64>,
            Option<u64>,
            Option<u64>,
        );
        let row: Option<RoomRow> = self
            .on_read(async |conn| conn.query_first(sql).await.map_err(classify))
            .await?;
        let Some((
            state,
            term,
            generation,
            history,
            peer,
            last_seq,
            settings,
            members,
            role,
            since,
            until,
            read,
        )) = row
        else {
            return Ok(RoomView::nothing());
        };
        let me = match (role, since, read) {
            (Some(role), Some(since), Some(read)) => Some(RoomMember {
                user,
                role: role_of(&role)?,
                since: Seq::new(since),
                until: until.map(Seq::new),
                read: Seq::new(read),
            }),
            _ => None,
        };
        Ok(RoomView {
            slot: Some(view_of(&state, term, generation, &history, peer)?),
            last_seq: Seq::new(last_seq),
            settings: Settings::parse(settings.as_deref()),
            members,
            me,
        })
    }

    async fn room_members(
        &self,
        identity: &ShardIdentity,
        room: DialogId,
        after: Option<UserId>,
        read_to: Option<Seq>,
        limit: u32,
    ) -> Result<Vec<RoomMember>, StoreError> {
        let sql = format!(
            "SELECT m.user_id, m.role, m.since_seq, m.read_seq FROM meta i JOIN members m FORCE INDEX (PRIMARY) \
              WHERE i.id = 1 AND i.cluster_id = '{}' AND i.shard_name = '{}' AND m.slot = {} AND m.dialog = '{room}' \
                AND m.user_id > {} AND m.read_seq >= {} AND m.until_seq IS NULL ORDER BY m.user_id LIMIT {limit}",
            identity.cluster_id,
            identity.shard_name,
            Slot::of(room),
            after.map_or(0, UserId::get),
            read_to.unwrap_or_default(),
        );
        self.on_read(async |conn| {
            let found: Vec<(u64, String, u64, u64)> = conn.query(sql).await.map_err(classify)?;
            let member = |(user, role, since, read): (u64, String, u64, u64)| {
                Ok(RoomMember {
                    user: UserId::new(user).map_err(|_| corrupt("members.user_id"))?,
                    role: role_of(&role)?,
                    since: Seq::new(since),
                    until: None,
                    read: Seq::new(read),
                })
            };
            found.into_iter().map(member).collect()
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

/// The columns of a page, and then [`MESSAGE_ROW`], which are NULL on a page without entries.
fn page_row(mut row: Row) -> Result<(SlotView, Seq, Option<StoredMessage>), StoreError> {
    let row = &mut row;
    let slot = view_of(
        &column::<String>(row, 0)?,
        column(row, 1)?,
        column(row, 2)?,
        &column::<String>(row, 3)?,
        column(row, 4)?,
    )?;
    let last_seq: Option<u64> = column(row, 5)?;
    let seq: Option<u64> = column(row, 6)?;
    let entry = match seq {
        Some(seq) => Some(stored((
            seq,
            column(row, 7)?,
            column(row, 8)?,
            column(row, 9)?,
            column(row, 10)?,
            column(row, 11)?,
            column(row, 12)?,
        ))?),
        None => None,
    };
    Ok((slot, Seq::new(last_seq.unwrap_or(0)), entry))
}

/// A row of the inbox; nothing is counted as unread yet.
fn inbox_row(row: Row) -> Result<InboxRow, StoreError> {
    type Of = (
        u16,
        String,
        i64,
        u64,
        Option<String>,
        u64,
        u64,
        Option<Vec<u8>>,
        String,
        Option<u64>,
        String,
        i64,
    );
    let (_, dialog, last_at, read_seq, settings, seq, author, key, kind, of, text, at): Of =
        columns(row)?;
    Ok(InboxRow {
        dialog: dialog.parse().map_err(|_| corrupt("dialogs.dialog"))?,
        last_at: Timestamp::from_micros(last_at),
        last: stored((seq, author, key, kind, of, text, at))?,
        read_seq: Seq::new(read_seq),
        unread: 0,
        title: Settings::parse(settings.as_deref()).title,
    })
}

/// What is unread of each dialog: the messages of others above the read mark, counted up to the
/// cap. Ends the snapshot.
async fn unread_counts(
    conn: &mut Conn,
    user: UserId,
    dialogs: &[InboxRow],
) -> Result<Vec<u32>, StoreError> {
    let (mut counts, mut to_count) = (Vec::new(), Vec::new());
    let mut sql = String::new();
    for (
        n,
        InboxRow {
            dialog,
            last,
            read_seq,
            ..
        },
    ) in dialogs.iter().enumerate()
    {
        // All is read; or the last entry is the only one that is not.
        let above = last.seq.get().saturating_sub(read_seq.get());
        let theirs = last.author != user && last.kind.is_text();
        counts.push(u32::from(above == 1 && theirs));
        if above > 1 {
            to_count.push(n);
            let union = if sql.is_empty() { "" } else { " UNION ALL " };
            let _ = write!(
                sql,
                "{union}SELECT COUNT(*) FROM (SELECT 1 FROM (SELECT author, kind FROM messages FORCE INDEX (PRIMARY) \
                   WHERE slot = {} AND dialog = '{dialog}' AND seq > {read_seq} ORDER BY seq LIMIT {UNREAD_LOOK}) l \
                 WHERE l.author <> {user} AND l.kind = 'text' LIMIT {UNREAD_CAP}) c",
                Slot::of(*dialog)
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
