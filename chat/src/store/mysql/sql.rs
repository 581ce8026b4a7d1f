//! Parts of statements, and the rows of results.

use super::super::meta::phase;
use super::super::{Meta, ServedSlots, ShardIdentity, StoreError, StoredMessage, corrupt};
use super::error::classify;
use crate::domain::dialog::{DialogId, Key, Seq, Timestamp, UserId};
use crate::domain::ownership::{History, SlotView};
use crate::domain::slot::Slot;
use mysql_async::prelude::{FromRow, FromValue, Queryable};
use mysql_async::{Conn, Row};
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::fmt::Write as _;

/// A connection is put back only after its transaction has ended: there is none to roll back here.
pub(super) const BEGIN: &str = "START TRANSACTION; ";

/// One consistent view for all statements that follow, whatever the session's isolation.
pub(super) const SNAPSHOT: &str = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; \
     START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY; ";

/// Microseconds since 1970; exact, because the session's time zone is UTC.
pub(super) const NOW: &str = "CAST(UNIX_TIMESTAMP(NOW(6)) * 1000000 AS SIGNED)";

pub(super) const SELECT_META: &str = "SELECT cluster_id, shard_name, slot_algorithm, topology_version, topology_phase, topology_hash, topology FROM meta WHERE id = 1";

pub(super) type MetaRow = (String, String, String, u64, String, String, String);

pub(super) fn meta_of(
    (cluster_id, shard_name, slot_algorithm, topology_version, phase_name, topology_hash, topology): MetaRow,
) -> Result<Meta, StoreError> {
    Ok(Meta {
        cluster_id,
        shard_name,
        slot_algorithm,
        topology_version,
        topology_phase: phase(&phase_name)?,
        topology_hash,
        topology,
    })
}

pub(super) fn select_identity() -> String {
    format!("SELECT cluster_id, shard_name, {NOW} FROM meta WHERE id = 1")
}

/// Who the database is, its time, and the revision of the slots.
pub(super) fn select_snapshot() -> String {
    format!(
        "SELECT cluster_id, shard_name, {NOW}, (SELECT revision FROM slots_revision WHERE id = 1) FROM meta WHERE id = 1"
    )
}

/// As [`check_identity`]; returns the revision of the slots too.
pub(super) fn check_snapshot(
    expected: &ShardIdentity,
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
pub(super) fn check_identity(
    expected: &ShardIdentity,
    set: Option<Vec<Row>>,
) -> Result<Timestamp, StoreError> {
    is_expected(expected, rows(set)?.pop())
}

pub(super) fn is_expected(
    expected: &ShardIdentity,
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
pub(super) const SELECT_OWNED: &str = "SELECT state, history, slot DIV 32, CAST(SUM(1 << (slot % 32)) AS UNSIGNED) FROM slots \
     WHERE state IN ('owner', 'sealed') GROUP BY state, history, slot DIV 32";

pub(super) fn holding(words: Vec<(String, String, u16, u64)>) -> Result<ServedSlots, StoreError> {
    let mut holding = ServedSlots::nothing();
    for (state, history, word, bits) in words {
        let slots: Vec<u16> = (0..32)
            .filter(|bit| bits & (1 << bit) != 0)
            .map(|bit| word * 32 + bit)
            .collect();
        holding.add(&state, &history, &slots)?;
    }
    Ok(holding)
}

pub(super) fn views_of(set: Option<Vec<Row>>) -> Result<HashMap<Slot, SlotView>, StoreError> {
    rows::<(u16, String, u64, u32, String, Option<String>)>(set)?
        .into_iter()
        .map(|(slot, state, term, generation, history, peer)| {
            let slot = Slot::new(slot).ok_or_else(|| corrupt("slots.slot"))?;
            Ok((slot, view_of(&state, term, generation, &history, peer)?))
        })
        .collect()
}

pub(super) fn view_of(
    state: &str,
    term: u64,
    generation: u32,
    history: &str,
    peer: Option<String>,
) -> Result<SlotView, StoreError> {
    let state = state.parse().map_err(|_| corrupt("slots.state"))?;
    let history: History = history.parse().map_err(|_| corrupt("slots.history"))?;
    Ok(SlotView {
        state,
        term,
        generation,
        complete: history.is_complete(),
        unmerged: !history.missing.is_empty(),
        peer,
    })
}

/// The columns that a reader is shown, of the row called `m`.
pub(super) const MESSAGE_ROW: &str =
    "m.seq, m.author, m.client_key, m.kind, m.of_seq, m.text, m.created_at";

/// Their values.
pub(super) type MessageRow = (u64, u64, Option<Vec<u8>>, String, Option<u64>, String, i64);

/// A number or NULL.
pub(super) fn number(value: Option<Seq>) -> String {
    value.map_or("NULL".to_owned(), |value| value.to_string())
}

pub(super) fn stored(
    (seq, author, key, kind, of, text, at): MessageRow,
) -> Result<StoredMessage, StoreError> {
    Ok(StoredMessage {
        seq: Seq::new(seq),
        author: UserId::new(author).map_err(|_| corrupt("messages.author"))?,
        key: key
            .map(String::from_utf8)
            .transpose()
            .map_err(|_| corrupt("messages.client_key"))?,
        kind: kind.into(),
        of: of.map(Seq::new),
        text,
        at: Timestamp::from_micros(at),
    })
}

/// Runs a text of several statements; one set of rows for each, also for those that have none.
pub(super) async fn result_sets(conn: &mut Conn, sql: String) -> Result<Vec<Vec<Row>>, StoreError> {
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

pub(super) fn rows<T: FromRow>(set: Option<Vec<Row>>) -> Result<Vec<T>, StoreError> {
    set.unwrap_or_default().into_iter().map(columns).collect()
}

/// One column of a row.
pub(super) fn column<T: FromValue>(row: &mut Row, index: usize) -> Result<T, StoreError> {
    let value = row.take_opt(index).and_then(Result::ok);
    value.ok_or_else(|| StoreError::Refused("a row has other columns than expected".into()))
}

/// The columns of one row.
pub(super) fn columns<T: FromRow>(row: Row) -> Result<T, StoreError> {
    mysql_async::from_row_opt(row)
        .map_err(|_| StoreError::Refused("a row has other columns than expected".into()))
}

pub(super) fn comma(list: &str) -> &'static str {
    if list.is_empty() { "" } else { "," }
}

/// Keys of several columns, for `(…) IN (…)`.
///
/// A single key is listed twice. MariaDB makes an equality of a list of one, and an UPDATE by the
/// equality of several columns reads, and locks, the whole table.
#[derive(Default)]
pub(super) struct KeyList {
    list: String,
    keys: usize,
}

impl KeyList {
    /// Adds a key: its values, with commas between them.
    pub fn push(&mut self, values: fmt::Arguments<'_>) {
        let _ = write!(self.list, "{}({values})", comma(&self.list));
        self.keys += 1;
    }

    /// Adds a key of the index of messages by idempotency key.
    pub fn push_key(&mut self, slot: Slot, dialog: DialogId, author: UserId, key: &Key) {
        let mut hex = String::new();
        push_hex(&mut hex, key.as_str().as_bytes());
        self.push(format_args!("{slot},'{dialog}',{author},x'{hex}'"));
    }

    pub fn is_empty(&self) -> bool {
        self.keys == 0
    }
}

impl fmt::Display for KeyList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.list)?;
        if self.keys == 1 {
            write!(f, ",{}", self.list)?;
        }
        Ok(())
    }
}

pub(super) fn push_hex(sql: &mut String, bytes: &[u8]) {
    const DIGITS: [char; 16] = [
        '0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f',
    ];
    for byte in bytes {
        sql.push(DIGITS[usize::from(byte >> 4)]);
        sql.push(DIGITS[usize::from(byte & 15)]);
    }
}

/// The shared lock that makes a write safe: while it is held, the slots do not change hands.
pub(super) fn fence(slots: &BTreeSet<Slot>) -> String {
    let mut list = String::new();
    for slot in slots {
        let _ = write!(list, "{}{slot}", comma(&list));
    }
    format!(
        "SELECT slot, state, term, generation, history, peer FROM slots WHERE slot IN ({list}) ORDER BY slot LOCK IN SHARE MODE"
    )
}
