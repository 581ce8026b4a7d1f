//! [`Control`] on MySQL and MariaDB. Locks are taken in the order meta, slots, dialogs, messages.

use super::connection::MysqlStore;
use super::error::{classify, unreachable};
use super::sql::{
    BEGIN, KeyList, MetaRow, NOW, SELECT_META, SNAPSHOT, check_identity, comma, meta_of, number,
    push_hex, result_sets, rows, select_identity,
};
use super::write::lock_dialogs;
use crate::domain::dialog::{DialogId, Key, Seq, Timestamp, UserId};
use crate::domain::ownership::{ReleaseStamp, SlotRow, SlotState, Step, StepRejected};
use crate::domain::slot::Slot;
use crate::domain::topology::TopologyRef;
use crate::store::control::{
    Existing, MEMBER_COLUMNS, MESSAGE_COLUMNS, RawMember, RawMessage, RawSlot, SLOT_COLUMNS,
    as_duplicate, copied, fits, hash_of, key_of, membership, missing, slot_row,
};
use crate::store::corrupt;
use crate::store::meta::phase;
use crate::store::{
    Acceptance, Chunk, Control, CoordinatorLock, CopiedMessage, DialogRow, Membership, Meta,
    PurgeOutcome, ShardIdentity, SlotSize, StoreError,
};
use async_trait::async_trait;
use mysql_async::prelude::Queryable;
use mysql_async::{Conn, OptsBuilder, Row};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::time::Duration;
use tokio::time::timeout;

/// How long the server keeps the turn of an instance that vanished without a word, in seconds.
const TURN_SECONDS: u32 = 3;

#[async_trait]
impl Control for MysqlStore {
    async fn accept(&self, identity: &ShardIdentity, new: &Meta) -> Result<Acceptance, StoreError> {
        self.on_write(async |conn| {
            let sql = format!("{BEGIN}{}; {SELECT_META} FOR UPDATE", select_identity());
            let mut sets = result_sets(conn, sql).await?.into_iter().skip(1);
            check_identity(identity, sets.next())?;
            let there = rows::<MetaRow>(sets.next())?.pop().map(meta_of).transpose()?;
            let there = there.ok_or_else(|| corrupt("meta"))?;
            let acceptance = there.offered(new)?;
            let Acceptance::Accept { fence } = acceptance else {
                conn.query_drop("ROLLBACK").await.map_err(classify)?;
                return Ok(acceptance);
            };
            if fence {
                conn.query_drop(format!(
                    "UPDATE slots SET state = 'fenced', peer = NULL, next_term = NULL WHERE state IN ('owner', 'sealed', 'incoming'); \
                     {NEXT_REVISION}"
                ))
                .await
                .map_err(classify)?;
            }
            conn.exec_drop(
                "UPDATE meta SET topology_version = ?, topology_phase = ?, topology_hash = ?, topology = ? WHERE id = 1",
                (new.topology_version, new.topology_phase.as_str(), &new.topology_hash, &new.topology),
            )
            .await
            .map_err(classify)?;
            conn.query_drop("COMMIT").await.map_err(classify)?;
            Ok(acceptance)
        })
        .await
    }

    async fn rows(
        &self,
        identity: &ShardIdentity,
        topology_ref: Option<&TopologyRef>,
        only: Option<Slot>,
    ) -> Result<Vec<SlotRow>, StoreError> {
        let (lock, only) = (
            if topology_ref.is_some() {
                " LOCK IN SHARE MODE"
            } else {
                ""
            },
            only.map_or(String::new(), |slot| format!(" WHERE slot = {slot}")),
        );
        let sql = format!(
            "{BEGIN}{}; {SELECT_TOPOLOGY_REF}{lock}; SELECT {SLOT_COLUMNS} FROM slots{only} ORDER BY slot; COMMIT",
            select_identity()
        );
        self.on_read(async |conn| {
            let mut sets = result_sets(conn, sql).await?.into_iter().skip(1);
            check_identity(identity, sets.next())?;
            let there = topology_ref_of(sets.next())?;
            if let Some(topology_ref) = topology_ref {
                fits(&there, topology_ref, None)?;
            }
            slot_rows(sets.next())
        })
        .await
    }

    async fn step(
        &self,
        identity: &ShardIdentity,
        topology_ref: &TopologyRef,
        slot: Slot,
        step: &Step,
    ) -> Result<Result<SlotRow, StepRejected>, StoreError> {
        self.on_write(async |conn| {
            let taken = match take(conn, identity, topology_ref, slot, step).await? {
                Ok(taken) => taken,
                Err(refused) => return Ok(Err(refused)),
            };
            conn.query_drop(format!("{}COMMIT", taken.update))
                .await
                .map_err(classify)?;
            Ok(Ok(taken.after))
        })
        .await
    }

    async fn dialog_rows(
        &self,
        identity: &ShardIdentity,
        slot: Slot,
    ) -> Result<Vec<DialogRow>, StoreError> {
        let sql = format!(
            "{SNAPSHOT}{}; SELECT dialog, last_seq, last_at, members_rev, settings FROM dialogs WHERE slot = {slot} ORDER BY dialog;
             SELECT {MEMBER_COLUMNS} FROM members WHERE slot = {slot} ORDER BY dialog, user_id; COMMIT",
            select_identity()
        );
        self.on_read(async |conn| {
            let mut sets = result_sets(conn, sql).await?.into_iter().skip(2);
            check_identity(identity, sets.next())?;
            type RawDialog = (String, u64, i64, u64, Option<String>);
            let dialogs: Vec<RawDialog> = rows(sets.next())?;
            let mut of = HashMap::<String, Vec<Membership>>::new();
            for raw in rows::<RawMember>(sets.next())? {
                let (dialog, member) = membership(raw)?;
                of.entry(dialog).or_default().push(member);
            }
            let dialog_row = |(dialog, last_seq, last_at, members_rev, settings): RawDialog| {
                Ok(DialogRow {
                    members: of.remove(&dialog).unwrap_or_default(),
                    dialog: dialog.parse().map_err(|_| corrupt("dialogs.dialog"))?,
                    last_seq: Seq::new(last_seq),
                    last_at: Timestamp::from_micros(last_at),
                    members_rev: Seq::new(members_rev),
                    settings,
                })
            };
            dialogs.into_iter().map(dialog_row).collect()
        })
        .await
    }

    async fn messages_of(
        &self,
        identity: &ShardIdentity,
        slot: Slot,
        above: &[(DialogId, Seq)],
        limit: u32,
    ) -> Result<Vec<CopiedMessage>, StoreError> {
        if above.is_empty() {
            return Ok(Vec::new());
        }
        let mut ranges = String::new();
        for (dialog, seq) in above {
            let or = if ranges.is_empty() { "" } else { " OR " };
            let _ = write!(
                ranges,
                "{or}(slot = {slot} AND dialog = '{dialog}' AND seq > {seq})"
            );
        }
        let sql = format!(
            "{SNAPSHOT}{}; SELECT {MESSAGE_COLUMNS} FROM messages FORCE INDEX (PRIMARY) WHERE {ranges} ORDER BY dialog, seq LIMIT {limit}; COMMIT",
            select_identity()
        );
        self.on_read(async |conn| {
            let mut sets = result_sets(conn, sql).await?.into_iter().skip(2);
            check_identity(identity, sets.next())?;
            rows::<RawMessage>(sets.next())?
                .into_iter()
                .map(copied)
                .collect()
        })
        .await
    }

    async fn copy_in(
        &self,
        identity: &ShardIdentity,
        topology_ref: &TopologyRef,
        slot: Slot,
        from: &str,
        term: u64,
        chunk: &Chunk,
    ) -> Result<Result<(), StepRejected>, StoreError> {
        self.on_write(async |conn| {
            let sql = format!(
                "{BEGIN}{}; {SELECT_TOPOLOGY_REF} LOCK IN SHARE MODE; SELECT {SLOT_COLUMNS} FROM slots WHERE slot = {slot} LOCK IN SHARE MODE",
                select_identity()
            );
            let mut sets = result_sets(conn, sql).await?.into_iter().skip(1);
            check_identity(identity, sets.next())?;
            fits(&topology_ref_of(sets.next())?, topology_ref, None)?;
            let row = slot_rows(sets.next())?.pop().ok_or_else(|| corrupt("slots"))?;
            if !row.is_incoming(from, term) {
                conn.query_drop("ROLLBACK").await.map_err(classify)?;
                return Ok(Err(StepRejected(row)));
            }
            let sql = format!("{}{}COMMIT", insert_copied(slot, &chunk.messages), raise_last_seqs(slot, &chunk.dialogs));
            conn.query_drop(sql).await.map_err(classify)?;
            Ok(Ok(()))
        })
        .await
    }

    async fn merge_in(
        &self,
        identity: &ShardIdentity,
        topology_ref: &TopologyRef,
        slot: Slot,
        chunk: &Chunk,
    ) -> Result<Result<(), StepRejected>, StoreError> {
        self.on_write(async |conn| {
            let taken = match take(conn, identity, topology_ref, slot, &Step::MergedIn).await? {
                Ok(taken) => taken,
                Err(refused) => return Ok(Err(refused)),
            };
            let dialogs: BTreeSet<(Slot, DialogId)> = chunk
                .dialogs
                .iter()
                .map(|dialog_row| (slot, dialog_row.dialog))
                .collect();
            let created: Vec<DialogRow> = chunk
                .dialogs
                .iter()
                .map(|dialog_row| DialogRow {
                    last_seq: Seq::ZERO,
                    ..dialog_row.clone()
                })
                .collect();
            let sql = format!(
                "{}{}{}",
                taken.update,
                raise_last_seqs(slot, &created),
                lock_dialogs(&dialogs)
            );
            conn.query_drop(sql).await.map_err(classify)?;
            // Only now, behind the dialogs' locks, is it certain what is there.
            let new = missing(chunk, &standing(conn, slot, &chunk.messages).await?)?;
            let keys = stored_keys(conn, slot, &new).await?;
            let new: Vec<CopiedMessage> = new
                .into_iter()
                .map(|message| {
                    let key = message.key.clone();
                    let stored =
                        key.and_then(|key| keys.get(&(message.dialog, message.author, key)));
                    as_duplicate(message, stored.copied())
                })
                .collect();
            let sql = format!(
                "{}{}",
                insert_copied(slot, &new),
                raise_last_seqs(slot, &chunk.dialogs)
            );
            conn.query_drop(sql).await.map_err(classify)?;
            // The source is purged after this check: every row is here, and no other row in its
            // place.
            let left = missing(chunk, &standing(conn, slot, &chunk.messages).await?)?.len();
            if left > 0 {
                return Err(StoreError::Refused(format!(
                    "{left} of the messages did not come in"
                )));
            }
            conn.query_drop("COMMIT").await.map_err(classify)?;
            Ok(Ok(()))
        })
        .await
    }

    async fn leftovers(
        &self,
        identity: &ShardIdentity,
        grace: Duration,
    ) -> Result<Vec<Slot>, StoreError> {
        let sql = format!(
            "{SNAPSHOT}{}; SELECT slot FROM slots WHERE state = 'none' AND released_at <= {NOW} - {}
                AND EXISTS (SELECT 1 FROM dialogs WHERE dialogs.slot = slots.slot) ORDER BY slot; COMMIT",
            select_identity(),
            grace.as_micros()
        );
        self.on_read(async |conn| {
            let mut sets = result_sets(conn, sql).await?.into_iter().skip(2);
            check_identity(identity, sets.next())?;
            Ok(rows::<u16>(sets.next())?
                .into_iter()
                .filter_map(Slot::new)
                .collect())
        })
        .await
    }

    async fn purge(
        &self,
        identity: &ShardIdentity,
        slot: Slot,
        grace: Duration,
        limit: u32,
    ) -> Result<PurgeOutcome, StoreError> {
        self.on_write(async |conn| {
            let sql = format!(
                "{BEGIN}{}; SELECT state, released_at FROM slots WHERE slot = {slot} FOR UPDATE",
                select_identity()
            );
            let mut sets = result_sets(conn, sql).await?.into_iter().skip(1);
            let now = check_identity(identity, sets.next())?;
            let (state, released_at): (String, i64) =
                rows(sets.next())?.pop().ok_or_else(|| corrupt("slots"))?;
            let grace = i64::try_from(grace.as_micros()).unwrap_or(i64::MAX);
            let refused = if state != SlotState::None.as_str() {
                Some(PurgeOutcome::InUse)
            } else {
                (released_at.saturating_add(grace) > now.micros()).then_some(PurgeOutcome::TooEarly)
            };
            if let Some(refused) = refused {
                conn.query_drop("ROLLBACK").await.map_err(classify)?;
                return Ok(refused);
            }
            conn.query_drop(format!(
                "DELETE FROM messages WHERE slot = {slot} ORDER BY slot, dialog, seq LIMIT {limit}"
            ))
            .await
            .map_err(classify)?;
            let gone = conn.affected_rows();
            if gone == u64::from(limit) {
                conn.query_drop("COMMIT").await.map_err(classify)?;
                return Ok(PurgeOutcome::Some(gone));
            }
            // The dialogs go last: while one is there, so may be its messages.
            conn.query_drop(format!(
                "DELETE FROM members WHERE slot = {slot}; DELETE FROM dialogs WHERE slot = {slot}; COMMIT"
            ))
            .await
            .map_err(classify)?;
            Ok(PurgeOutcome::All)
        })
        .await
    }

    async fn sizes(
        &self,
        identity: &ShardIdentity,
    ) -> Result<BTreeMap<Slot, SlotSize>, StoreError> {
        let sql = format!(
            "{SNAPSHOT}{}; SELECT slot, COUNT(*) FROM dialogs GROUP BY slot;
             SELECT slot, COUNT(*), CAST(SUM(LENGTH(text)) AS UNSIGNED) FROM messages GROUP BY slot; COMMIT",
            select_identity()
        );
        self.on_read(async |conn| {
            let mut sets = result_sets(conn, sql).await?.into_iter().skip(2);
            check_identity(identity, sets.next())?;
            let mut sizes = BTreeMap::<Slot, SlotSize>::new();
            for (slot, dialogs) in rows::<(u16, u64)>(sets.next())? {
                sizes
                    .entry(Slot::new(slot).ok_or_else(|| corrupt("dialogs.slot"))?)
                    .or_default()
                    .dialogs = dialogs;
            }
            for (slot, messages, bytes) in rows::<(u16, u64, u64)>(sets.next())? {
                let size = sizes
                    .entry(Slot::new(slot).ok_or_else(|| corrupt("messages.slot"))?)
                    .or_default();
                (size.messages, size.bytes) = (messages, bytes);
            }
            Ok(sizes)
        })
        .await
    }

    async fn revoke(
        &self,
        identity: &ShardIdentity,
        revocations: &[(UserId, u64)],
    ) -> Result<(), StoreError> {
        let rows: Vec<String> = revocations
            .iter()
            .map(|(user, time)| format!("SELECT {user} AS user_id, {time} AS issued_before"))
            .collect();
        // Only the shard that is meant stores it.
        let sql = format!(
            "{BEGIN}{}; INSERT INTO revocations (user_id, issued_before)
               SELECT new.user_id, new.issued_before FROM ({}) new JOIN meta i ON i.id = 1 AND i.cluster_id = '{}' AND i.shard_name = '{}'
               ON DUPLICATE KEY UPDATE issued_before = GREATEST(revocations.issued_before, VALUES(issued_before)); COMMIT",
            select_identity(),
            rows.join(" UNION ALL "),
            identity.cluster_id,
            identity.shard_name
        );
        self.on_write(async |conn| {
            let mut sets = result_sets(conn, sql).await?.into_iter().skip(1);
            check_identity(identity, sets.next()).map(drop)
        })
        .await
    }

    async fn revocations(
        &self,
        identity: &ShardIdentity,
    ) -> Result<BTreeMap<UserId, u64>, StoreError> {
        let sql = format!(
            "{SNAPSHOT}{}; SELECT user_id, issued_before FROM revocations; COMMIT",
            select_identity()
        );
        self.on_read(async |conn| {
            let mut sets = result_sets(conn, sql).await?.into_iter().skip(2);
            check_identity(identity, sets.next())?;
            let user = |id| UserId::new(id).map_err(|_| corrupt("revocations.user_id"));
            rows::<(u64, u64)>(sets.next())?
                .into_iter()
                .map(|(id, time)| Ok((user(id)?, time)))
                .collect()
        })
        .await
    }

    async fn try_lock_coordinator(&self) -> Result<Option<Box<dyn CoordinatorLock>>, StoreError> {
        // Each instance asks every second: those that find the lock taken open no connection for
        // it.
        let free = self
            .on_read(async |conn| {
                let free: Option<Option<u8>> = conn
                    .query_first(format!("SELECT IS_FREE_LOCK({COORDINATOR_LOCK})"))
                    .await
                    .map_err(classify)?;
                Ok(free.flatten() != Some(0))
            })
            .await?;
        if !free {
            return Ok(None);
        }
        let setup = format!("SET SESSION wait_timeout = {TURN_SECONDS}");
        let opts = OptsBuilder::from_opts(self.opts.clone()).setup(vec![setup]);
        let taking = async {
            let mut conn = Conn::new(opts).await.map_err(unreachable)?;
            let taken: Option<u8> = conn
                .query_first(format!("SELECT GET_LOCK({COORDINATOR_LOCK}, 0)"))
                .await
                .map_err(classify)?;
            Ok((taken == Some(1)).then(|| {
                Box::new(MysqlLock {
                    conn,
                    limit: self.connect_limit,
                }) as Box<dyn CoordinatorLock>
            }))
        };
        timeout(self.connect_limit, taking)
            .await
            .unwrap_or_else(|_| Err(StoreError::Slow("no answer in time".into())))
    }
}

/// The name of the coordinator lock: names of locks are those of the whole server.
const COORDINATOR_LOCK: &str = "CONCAT('chat.change.', DATABASE())";

/// A connection that holds a lock by name; the server frees the lock when the connection ends,
/// however it ends.
struct MysqlLock {
    conn: Conn,
    limit: Duration,
}

#[async_trait]
impl CoordinatorLock for MysqlLock {
    async fn keep(&mut self) -> Result<(), StoreError> {
        timeout(self.limit, self.conn.query_drop("DO 0"))
            .await
            .map_err(|_| StoreError::Lost("no answer in time".into()))?
            .map_err(classify)
    }
}

const SELECT_TOPOLOGY_REF: &str =
    "SELECT topology_version, topology_phase, topology_hash FROM meta WHERE id = 1";

fn topology_ref_of(set: Option<Vec<Row>>) -> Result<TopologyRef, StoreError> {
    let (version, phase_name, hash): (u64, String, String) =
        rows(set)?.pop().ok_or_else(|| corrupt("meta"))?;
    Ok(TopologyRef {
        version,
        phase: phase(&phase_name)?,
        hash,
    })
}

/// Follows every change of the table slots: what was read under an earlier revision is read again.
const NEXT_REVISION: &str = "UPDATE slots_revision SET revision = revision + 1 WHERE id = 1";

/// A step that a row permits, to be carried out.
struct Taken {
    after: SlotRow,
    /// The statement that does it, ended by a semicolon.
    update: String,
}

/// Begins a transaction that holds the topology's lock and the row's, and sees whether the row
/// permits the step; ends it if not.
async fn take(
    conn: &mut Conn,
    identity: &ShardIdentity,
    topology_ref: &TopologyRef,
    slot: Slot,
    step: &Step,
) -> Result<Result<Taken, StepRejected>, StoreError> {
    let sql = format!(
        "{BEGIN}{}; {SELECT_TOPOLOGY_REF} LOCK IN SHARE MODE; SELECT {SLOT_COLUMNS} FROM slots WHERE slot = {slot} FOR UPDATE;
         SELECT EXISTS (SELECT 1 FROM dialogs WHERE slot = {slot})",
        select_identity()
    );
    let mut sets = result_sets(conn, sql).await?.into_iter().skip(1);
    let now = check_identity(identity, sets.next())?;
    fits(&topology_ref_of(sets.next())?, topology_ref, Some(step))?;
    let row = slot_rows(sets.next())?
        .pop()
        .ok_or_else(|| corrupt("slots"))?;
    let holds_rows = rows::<u8>(sets.next())?.pop() == Some(1);
    match row.after(step, holds_rows) {
        Ok(after) => Ok(Ok(Taken {
            update: update_row(slot, step, &after, now),
            after,
        })),
        Err(refused) => {
            conn.query_drop("ROLLBACK").await.map_err(classify)?;
            Ok(Err(refused))
        }
    }
}

fn update_row(slot: Slot, step: &Step, row: &SlotRow, now: Timestamp) -> String {
    // Names are letters, digits, '-' and '_': nothing of them could end a literal.
    let text = |value: &Option<String>| {
        value
            .as_ref()
            .map_or("NULL".to_owned(), |value| format!("'{value}'"))
    };
    let number = |value: Option<u64>| value.map_or("NULL".to_owned(), |value| value.to_string());
    let released = match step.release_stamp() {
        ReleaseStamp::Keep => String::new(),
        ReleaseStamp::Now => format!(", released_at = {}", now.micros()),
        ReleaseStamp::Never => ", released_at = 0".to_owned(),
    };
    format!(
        "UPDATE slots SET state = '{}', term = {}, generation = {}, peer = {}, next_term = {}, activated = {},
            claimed_generation = {}, history = '{}'{released} WHERE slot = {slot}; {NEXT_REVISION}; ",
        row.state,
        row.term,
        row.generation,
        text(&row.peer),
        number(row.next_term),
        row.activated,
        row.claimed_generation,
        row.history,
    )
}

fn slot_rows(set: Option<Vec<Row>>) -> Result<Vec<SlotRow>, StoreError> {
    rows::<RawSlot>(set)?.into_iter().map(slot_row).collect()
}

/// Statements that add messages, each ended by a semicolon; what is there stays as it is.
fn insert_copied(slot: Slot, messages: &[CopiedMessage]) -> String {
    if messages.is_empty() {
        return String::new();
    }
    let mut sql = format!("INSERT INTO messages (slot, {MESSAGE_COLUMNS}) VALUES ");
    for (i, message) in messages.iter().enumerate() {
        let comma = if i == 0 { "" } else { "," };
        let _ = write!(
            sql,
            "{comma}({slot},'{}',{},{},",
            message.dialog, message.seq, message.author
        );
        match &message.key {
            Some(key) => {
                sql.push_str("x'");
                push_hex(&mut sql, key.as_str().as_bytes());
                sql.push('\'');
            }
            None => sql.push_str("NULL"),
        }
        sql.push_str(",x'");
        push_hex(&mut sql, &message.hash.0);
        sql.push_str("',_ascii x'");
        push_hex(&mut sql, message.kind.as_str().as_bytes());
        let _ = write!(sql, "',{},_utf8mb4 x'", number(message.of));
        push_hex(&mut sql, message.text.as_bytes());
        let duplicate = number(message.duplicate_of);
        let _ = write!(sql, "',{},{duplicate})", message.at.micros());
    }
    sql.push_str(" ON DUPLICATE KEY UPDATE seq = messages.seq; ");
    sql
}

/// Statements that add dialogs and members, each ended by a semicolon; what is there only rises. Of
/// what a room says of itself and of its members, the later entry is right.
fn raise_last_seqs(slot: Slot, dialog_rows: &[DialogRow]) -> String {
    if dialog_rows.is_empty() {
        return String::new();
    }
    let (mut dialogs, mut members) = (String::new(), String::new());
    for dialog_row in dialog_rows {
        let dialog = dialog_row.dialog;
        let _ = write!(
            dialogs,
            "{}({slot},'{dialog}',{},{},{},",
            comma(&dialogs),
            dialog_row.last_seq,
            dialog_row.last_at.micros(),
            dialog_row.members_rev
        );
        match &dialog_row.settings {
            Some(settings) => {
                dialogs.push_str("_utf8mb4 x'");
                push_hex(&mut dialogs, settings.as_bytes());
                dialogs.push_str("')");
            }
            None => dialogs.push_str("NULL)"),
        }
        for row in &dialog_row.members {
            let _ = write!(
                members,
                "{}({slot},'{dialog}',{},{},{},{},'{}',{},{},{},{})",
                comma(&members),
                row.user,
                row.read_seq,
                row.joined_at.micros(),
                dialog_row.last_at.hour(),
                row.member.role.as_str(),
                row.member.rev,
                row.member.since,
                row.member.joined,
                number(row.until)
            );
        }
    }
    // Assigned in this order: the two revisions last, because the others are compared by them.
    let later = |column: &str, rev: &str| {
        format!("{column} = IF(VALUES({rev}) > {rev}, VALUES({column}), {column})")
    };
    let mut sql = format!(
        "INSERT INTO dialogs (slot, dialog, last_seq, last_at, members_rev, settings) VALUES {dialogs}
           ON DUPLICATE KEY UPDATE last_seq = GREATEST(last_seq, VALUES(last_seq)), last_at = GREATEST(last_at, VALUES(last_at)),
             {}, members_rev = GREATEST(members_rev, VALUES(members_rev)); ",
        later("settings", "members_rev")
    );
    if !members.is_empty() {
        let of_room = ["role", "since_seq", "joined_seq", "until_seq"];
        let of_room = of_room.map(|column| later(column, "rev")).join(", ");
        let _ = write!(
            sql,
            "INSERT INTO members (slot, dialog, user_id, read_seq, joined_at, last_hour, role, rev, since_seq, joined_seq, until_seq) VALUES {members}
               ON DUPLICATE KEY UPDATE last_hour = GREATEST(last_hour, VALUES(last_hour)), read_seq = GREATEST(read_seq, VALUES(read_seq)),
                 joined_at = LEAST(joined_at, VALUES(joined_at)), {of_room}, rev = GREATEST(rev, VALUES(rev)); "
        );
    }
    sql
}

/// The rows with the primary keys of these messages.
async fn standing(
    conn: &mut Conn,
    slot: Slot,
    messages: &[CopiedMessage],
) -> Result<Existing, StoreError> {
    let mut places = KeyList::default();
    for CopiedMessage { dialog, seq, .. } in messages {
        places.push(format_args!("{slot},'{dialog}',{seq}"));
    }
    if places.is_empty() {
        return Ok(Existing::new());
    }
    let sql = format!(
        "SELECT dialog, seq, author, text_hash FROM messages FORCE INDEX (PRIMARY) WHERE (slot, dialog, seq) IN ({places})"
    );
    let found: Vec<(String, u64, u64, Vec<u8>)> = conn.query(sql).await.map_err(classify)?;
    found
        .into_iter()
        .map(|(dialog, seq, author, hash)| {
            let dialog = dialog.parse().map_err(|_| corrupt("messages.dialog"))?;
            let author = UserId::new(author).map_err(|_| corrupt("messages.author"))?;
            Ok(((dialog, Seq::new(seq)), (author, hash_of(hash)?)))
        })
        .collect()
}

/// Where the keys of these messages are stored, as far as they are.
async fn stored_keys(
    conn: &mut Conn,
    slot: Slot,
    messages: &[&CopiedMessage],
) -> Result<HashMap<(DialogId, UserId, Key), Seq>, StoreError> {
    let mut keys = KeyList::default();
    for message in messages {
        if let Some(key) = &message.key {
            keys.push_key(slot, message.dialog, message.author, key);
        }
    }
    if keys.is_empty() {
        return Ok(HashMap::new());
    }
    let sql = format!(
        "SELECT dialog, author, client_key, seq FROM messages FORCE INDEX (once) WHERE (slot, dialog, author, client_key) IN ({keys})"
    );
    let found: Vec<(String, u64, Vec<u8>, u64)> = conn.query(sql).await.map_err(classify)?;
    found
        .into_iter()
        .map(|(dialog, author, key, seq)| {
            let dialog = dialog.parse().map_err(|_| corrupt("messages.dialog"))?;
            let author = UserId::new(author).map_err(|_| corrupt("messages.author"))?;
            Ok(((dialog, author, key_of(key)?), Seq::new(seq)))
        })
        .collect()
}
