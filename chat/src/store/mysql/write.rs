//! Batches of messages: [`append`] in one round trip, on what is remembered of the dialogs;
//! [`write`] in two, on what the locks show.

use super::error::{DUPLICATE_KEY, classify};
use super::marks;
use super::sql::{
    BEGIN, KeyList, NOW, check_identity, comma, fence, number, push_hex, result_sets, rows,
    select_identity, views_of,
};
use crate::domain::dialog::{DialogId, Key, Seq, Timestamp, UserId};
use crate::domain::ownership::{SlotView, Term};
use crate::domain::room::{Member, Room, Settings};
use crate::domain::slot::Slot;
use crate::store::batch_plan::{BatchPlan, Draft, Head, KnownRoom, StoredKey};
use crate::store::control::{hash_of, key_of, role_of};
use crate::store::{
    Appended, BatchResult, Mismatch, NewMessage, Receipt, Row as PlannedRow, ShardIdentity,
    StoreError, corrupt,
};
use mysql_async::prelude::Queryable;
use mysql_async::{Conn, Row};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;

/// Stores a batch as drafted, or nothing.
///
/// One text. A text stops at its first error, and each thing that the draft was worked out from is
/// a statement or an expression that fails if it is not so: the error is the answer, and COMMIT is
/// not reached.
pub(super) async fn append(
    conn: &mut Conn,
    identity: &ShardIdentity,
    batch: &[NewMessage],
    draft: Draft,
) -> Result<Appended, StoreError> {
    let marks = draft.marks.clone();
    if let Some(call) = call_of(identity, batch, &draft) {
        return append_one(conn, call, batch, draft).await;
    }
    let text = append_text(identity, batch, &draft);
    match sets_until_error(conn, text).await {
        (sets, None) => {
            let mut sets = sets.into_iter().skip(FENCE);
            let now = rows::<i64>(sets.next())?.pop();
            let now = Timestamp::from_micros(now.ok_or_else(|| corrupt("the fence"))?);
            // Only the statements that ask for last seqs and for read marks have rows; and dialogs
            // that are there have last seqs.
            let mut with_rows = sets.filter(|set| !set.is_empty());
            let last = match unremembered(&draft).next() {
                Some(_) => last_seqs_of(with_rows.next())?,
                None => HashMap::new(),
            };
            Ok(Appended::Stored {
                written: draft.settle(batch, now, &last),
                marked: marks::marked(&marks, with_rows.next())?,
                now,
            })
        }
        (sets, Some(e)) => {
            let mismatch = match &e {
                mysql_async::Error::Server(e) if e.code == OUT_OF_RANGE => {
                    if sets.len() <= FENCE {
                        Mismatch::Term
                    } else {
                        Mismatch::LastSeq
                    }
                }
                mysql_async::Error::Server(e) if e.code == DUPLICATE_KEY => Mismatch::Key,
                mysql_async::Error::Server(_)
                | mysql_async::Error::Driver(_)
                | mysql_async::Error::Io(_)
                | mysql_async::Error::Other(_)
                | mysql_async::Error::Url(_) => return Err(classify(e)),
            };
            conn.query_drop("ROLLBACK").await.map_err(classify)?;
            Ok(Appended::Mismatch(mismatch))
        }
    }
}

/// The common batch: one message, of a dialog that is remembered. A procedure stores it.
fn call_of(identity: &ShardIdentity, batch: &[NewMessage], draft: &Draft) -> Option<String> {
    let ([message], [row], []) = (batch, &draft.plan.rows[..], &draft.marks[..]) else {
        return None;
    };
    let expected = draft.expected.get(&message.dialog)?;
    let (last_seq, members_rev) = (expected.last_seq, expected.members_rev());
    let term = draft.terms.get(&message.slot)?.number;
    let NewMessage {
        slot,
        dialog,
        author,
        ..
    } = message;
    let text = row.text(batch);
    let mut call = String::with_capacity(400 + 2 * text.len());
    let _ = write!(
        call,
        "CALL append_entry('{}','{}',{slot},{term},'{dialog}',{last_seq},{members_rev},{},{author},x'",
        identity.cluster_id, identity.shard_name, row.place.seq
    );
    push_hex(&mut call, message.key.as_str().as_bytes());
    call.push_str("',x'");
    push_hex(&mut call, &message.hash.0);
    call.push_str("',_utf8mb4 x'");
    push_hex(&mut call, text.as_bytes());
    call.push_str("')");
    Some(call)
}

async fn append_one(
    conn: &mut Conn,
    call: String,
    batch: &[NewMessage],
    draft: Draft,
) -> Result<Appended, StoreError> {
    // The procedure has rolled back before it fails.
    let mismatch = match sets_until_error(conn, call).await {
        (sets, None) => {
            let now = rows::<i64>(sets.into_iter().next())?.pop();
            let now = Timestamp::from_micros(now.ok_or_else(|| corrupt("the procedure"))?);
            let written = draft.settle(batch, now, &HashMap::new());
            return Ok(Appended::Stored {
                written,
                marked: Vec::new(),
                now,
            });
        }
        (_, Some(mysql_async::Error::Server(e))) if e.code == OTHER_TERM => Mismatch::Term,
        (_, Some(mysql_async::Error::Server(e))) if e.code == OTHER_HEAD => Mismatch::LastSeq,
        (_, Some(mysql_async::Error::Server(e))) if e.code == DUPLICATE_KEY => Mismatch::Key,
        (_, Some(e)) => return Err(classify(e)),
    };
    Ok(Appended::Mismatch(mismatch))
}

/// Errors of the procedure.
const OTHER_TERM: u16 = 9001;
const OTHER_HEAD: u16 = 9002;

/// The place of the fence among the statements of an append.
const FENCE: usize = 1;

/// Arithmetic that leaves the range of its type: the one error that an expression may raise on both
/// servers at little cost.
const OUT_OF_RANGE: u16 = 1690;

/// The largest BIGINT UNSIGNED.
const MAX: u64 = u64::MAX;

const HOUR: i64 = Timestamp::HOUR;

fn append_text(identity: &ShardIdentity, batch: &[NewMessage], draft: &Draft) -> String {
    let texts: usize = draft
        .plan
        .rows
        .iter()
        .map(|row| row.text(batch).len())
        .sum();
    let mut sql = String::with_capacity(1024 + 2 * texts + 200 * batch.len());
    let _ = write!(sql, "{BEGIN}{}; ", fence_of_terms(identity, &draft.terms));
    push_last_seqs(&mut sql, draft);
    sql.push_str(INSERT_MESSAGES);
    // Of a dialog that nothing is remembered of, seqs are counted back from the last seq that this
    // transaction has just raised.
    for (i, row) in draft.plan.rows.iter().enumerate() {
        let message = &batch[row.index];
        sql.push_str(if i == 0 { "" } else { "," });
        let place = (message.slot, message.dialog);
        match draft
            .plan
            .last_seqs
            .get(&place)
            .filter(|_| !draft.expected.contains_key(&message.dialog))
        {
            None => push_row(&mut sql, batch, row, row.place.seq, "LAST_INSERT_ID()"),
            Some(last) => {
                let before_last = last.seq.get() - row.place.seq.get();
                let seq = format!(
                    "(SELECT last_seq - {before_last} FROM dialogs WHERE slot = {} AND dialog = '{}')",
                    message.slot, message.dialog
                );
                push_row(&mut sql, batch, row, seq, "LAST_INSERT_ID()");
            }
        }
    }
    let mut unknown = KeyList::default();
    for (slot, dialog) in unremembered(draft) {
        unknown.push(format_args!("{slot},'{dialog}'"));
    }
    if !unknown.is_empty() {
        let _ = write!(
            sql,
            "; SELECT dialog, last_seq FROM dialogs FORCE INDEX (PRIMARY) WHERE (slot, dialog) IN ({unknown})"
        );
    }
    sql.push_str("; ");
    if !draft.marks.is_empty() {
        marks::push(&mut sql, &draft.marks, "");
    }
    sql.push_str("COMMIT");
    sql
}

/// Locks the slots' rows shared, and fails unless the database is who it must be and owns all of
/// them under these terms. Its answer is the server's time, which later statements have as
/// LAST_INSERT_ID().
fn fence_of_terms(identity: &ShardIdentity, terms: &BTreeMap<Slot, Term>) -> String {
    let mut by_term = BTreeMap::<u64, String>::new();
    for (slot, term) in terms {
        let list = by_term.entry(term.number).or_default();
        let _ = write!(list, "{}{slot}", comma(list));
    }
    let mut slots = String::new();
    let mut owned = String::new();
    for (term, list) in &by_term {
        let _ = write!(slots, "{}{list}", comma(&slots));
        let or = if owned.is_empty() { "" } else { " OR " };
        let _ = write!(owned, "{or}(s.term = {term} AND s.slot IN ({list}))");
    }
    if by_term.len() == 1 {
        owned = by_term
            .keys()
            .map(|term| format!("s.term = {term}"))
            .collect();
    }
    format!(
        "SELECT LAST_INSERT_ID(IF(COUNT(*) = {}, {NOW}, {MAX} + COUNT(*) + 1)) FROM meta i JOIN slots s \
          WHERE i.id = 1 AND i.cluster_id = '{}' AND i.shard_name = '{}' AND s.slot IN ({slots}) AND s.state = 'owner' AND ({owned}) \
           LOCK IN SHARE MODE",
        terms.len(),
        identity.cluster_id,
        identity.shard_name,
    )
}

fn unremembered(draft: &Draft) -> impl Iterator<Item = (Slot, DialogId)> {
    let dialogs = draft.plan.last_seqs.keys().copied();
    dialogs.filter(|(_, dialog)| !draft.expected.contains_key(dialog))
}

/// Locks and raises the dialogs, in key order; fails unless those that are expected to have a last
/// seq have it, and have had a message in this hour, rooms have the expected members, and none has
/// had a message at a later time. Makes those that are missing.
fn push_last_seqs(sql: &mut String, draft: &Draft) {
    let mut dialogs = String::new();
    let mut members = String::new();
    let mut unknown = String::new();
    let mut rooms = KeyList::default();
    let mut steps = BTreeMap::<u64, String>::new();
    for ((slot, dialog), place) in &draft.plan.last_seqs {
        let last = place.seq;
        let _ = write!(
            dialogs,
            "{}({slot},'{dialog}',{last},LAST_INSERT_ID())",
            comma(&dialogs)
        );
        if let Some(expected) = draft.expected.get(dialog) {
            let list = steps
                .entry(last.get() - expected.last_seq.get())
                .or_default();
            let _ = write!(list, "{}'{dialog}'", comma(list));
            if let Some(room) = &expected.room {
                rooms.push(format_args!("'{dialog}',{}", room.rev));
            }
        } else {
            let _ = write!(unknown, "{}'{dialog}'", comma(&unknown));
            for user in dialog.users() {
                let _ = write!(
                    members,
                    "{}({slot},'{dialog}',{user},0,LAST_INSERT_ID(),LAST_INSERT_ID() DIV {HOUR})",
                    comma(&members)
                );
            }
        }
    }
    // By how much each is raised: VALUES(last_seq) is the value that it must reach.
    let step = match steps.len() {
        0 | 1 => steps.keys().next().copied().unwrap_or(1).to_string(),
        _ => {
            let mut cases = String::from("CASE");
            for (step, list) in &steps {
                let _ = write!(cases, " WHEN dialogs.dialog IN ({list}) THEN {step}");
            }
            cases + " END"
        }
    };
    let same_members = if rooms.is_empty() {
        String::new()
    } else {
        format!(
            " AND (dialogs.members_rev = 0 OR (dialogs.dialog, dialogs.members_rev) IN ({rooms}))"
        )
    };
    let checked = format!(
        "IF(dialogs.last_seq = VALUES(last_seq) - {step} AND dialogs.last_at <= LAST_INSERT_ID() \
         AND dialogs.last_at DIV {HOUR} = LAST_INSERT_ID() DIV {HOUR}{same_members}, VALUES(last_seq), {MAX} + dialogs.last_seq + 1)"
    );
    // The two parts of the planned seq are the beginning of its generation and the number of its
    // messages.
    let given = format!(
        "IF(dialogs.last_at <= LAST_INSERT_ID(), \
         GREATEST(dialogs.last_seq, (VALUES(last_seq) >> 40) << 40) + (VALUES(last_seq) & 1099511627775), \
         {MAX} + dialogs.last_seq + 1)"
    );
    let next = match (steps.is_empty(), unknown.is_empty()) {
        (_, true) => checked,
        (true, false) => given,
        (false, false) => format!("IF(dialogs.dialog IN ({unknown}), {given}, {checked})"),
    };
    let _ = write!(
        sql,
        "INSERT INTO dialogs (slot, dialog, last_seq, last_at) VALUES {dialogs} \
         ON DUPLICATE KEY UPDATE last_seq = {next}, last_at = LAST_INSERT_ID(); "
    );
    if !members.is_empty() {
        let _ = write!(
            sql,
            "INSERT INTO members (slot, dialog, user_id, read_seq, joined_at, last_hour) VALUES {members} \
             ON DUPLICATE KEY UPDATE last_hour = VALUES(last_hour); "
        );
    }
}

const INSERT_MESSAGES: &str = "INSERT INTO messages (slot, dialog, seq, author, client_key, text_hash, kind, text, created_at) VALUES ";

/// The values of an entry; `seq` and `at` as SQL.
fn push_row(
    sql: &mut String,
    batch: &[NewMessage],
    row: &PlannedRow,
    seq: impl std::fmt::Display,
    at: impl std::fmt::Display,
) {
    let entry = &batch[row.index];
    let _ = write!(
        sql,
        "({},'{}',{seq},{},x'",
        entry.slot, entry.dialog, entry.author
    );
    push_hex(sql, entry.key.as_str().as_bytes());
    sql.push_str("',x'");
    push_hex(sql, &entry.hash.0);
    let _ = write!(sql, "','{}',_utf8mb4 x'", entry.body.kind().as_str());
    push_hex(sql, row.text(batch).as_bytes());
    let _ = write!(sql, "',{at})");
}

/// Stores a batch by what the locks show.
pub(super) async fn write(
    conn: &mut Conn,
    identity: &ShardIdentity,
    batch: &[NewMessage],
    mut suspect: bool,
) -> Result<BatchResult, StoreError> {
    let locked = lock(conn, identity, batch).await?;
    let mut keys = if suspect {
        known_keys(conn, batch).await?
    } else {
        HashMap::new()
    };
    loop {
        let plan = BatchPlan::new(batch, &locked.slots, &locked.heads, &keys, locked.now);
        if plan.doubts() && !suspect {
            suspect = true;
            keys = known_keys(conn, batch).await?;
            continue;
        }
        let receipt = |plan: BatchPlan| plan.result(&locked.slots, locked.now);
        if plan.rows.is_empty() {
            conn.query_drop("ROLLBACK").await.map_err(classify)?;
            return Ok(receipt(plan));
        }
        match conn.query_drop(insert(batch, &plan, &locked)).await {
            Ok(()) => return Ok(receipt(plan)),
            // The insert is undone, the transaction and its locks are not: now is the time to look
            // the keys up.
            Err(mysql_async::Error::Server(e)) if e.code == DUPLICATE_KEY && !suspect => {
                suspect = true;
                keys = known_keys(conn, batch).await?;
            }
            Err(e) => return Err(classify(e)),
        }
    }
}

/// Runs a text of several statements; the rows of each until one fails, and the error.
async fn sets_until_error(
    conn: &mut Conn,
    sql: String,
) -> (Vec<Vec<Row>>, Option<mysql_async::Error>) {
    let mut sets = Vec::new();
    let mut result = match conn.query_iter(sql).await {
        Ok(result) => result,
        Err(e) => return (sets, Some(e)),
    };
    loop {
        match result.collect::<Row>().await {
            Ok(rows) => sets.push(rows),
            Err(e) => return (sets, Some(e)),
        }
        if result.is_empty() {
            // The driver keeps the error of a later statement to itself until it is asked.
            let e = result.drop_result().await.err();
            return (sets, e);
        }
    }
}

/// What the first round trips of a batch find out.
struct Locked {
    now: Timestamp,
    slots: HashMap<Slot, SlotView>,
    heads: HashMap<DialogId, Head>,
}

/// Begins the transaction and takes its locks in the order slots, dialogs, each in key order.
async fn lock(
    conn: &mut Conn,
    identity: &ShardIdentity,
    batch: &[NewMessage],
) -> Result<Locked, StoreError> {
    let dialogs: BTreeSet<(Slot, DialogId)> = batch
        .iter()
        .map(|message| (message.slot, message.dialog))
        .collect();
    let slots: BTreeSet<Slot> = dialogs.iter().map(|(slot, _)| *slot).collect();
    let and_heads = lock_heads(&dialogs);
    let sql = format!(
        "{BEGIN}{}; {}; {and_heads}",
        select_identity(),
        fence(&slots)
    );
    let mut sets = result_sets(conn, sql).await?.into_iter().skip(1);
    let now = check_identity(identity, sets.next())?;
    let slots = views_of(sets.next())?;
    let mut heads = heads_of(sets.next(), sets.next())?;

    // A room is made by the request for it alone.
    let makes = |dialog: DialogId| {
        let mut here = batch.iter().filter(|entry| entry.dialog == dialog);
        !dialog.is_room() || here.any(|entry| entry.body.makes_room())
    };
    let missing: Vec<_> = dialogs
        .iter()
        .filter(|(slot, dialog)| {
            slots
                .get(slot)
                .is_some_and(|view| view.state.takes_writes())
                && !heads.contains_key(dialog)
                && makes(*dialog)
        })
        .collect();
    if !missing.is_empty() {
        // Another instance may create them at the same moment: what counts is what is there once we
        // hold the lock.
        let mut rows = String::new();
        let mut members = String::new();
        for (slot, dialog) in missing {
            let _ = write!(rows, "{}({slot},'{dialog}',0,0)", comma(&rows));
            for user in dialog.users() {
                let _ = write!(
                    members,
                    "{}({slot},'{dialog}',{user},0,{},{})",
                    comma(&members),
                    now.micros(),
                    now.hour()
                );
            }
        }
        let mut sql = format!(
            "INSERT INTO dialogs (slot, dialog, last_seq, last_at) VALUES {rows} ON DUPLICATE KEY UPDATE dialog = dialogs.dialog; "
        );
        if !members.is_empty() {
            let _ = write!(
                sql,
                "INSERT INTO members (slot, dialog, user_id, read_seq, joined_at, last_hour) VALUES {members} \
                 ON DUPLICATE KEY UPDATE dialog = members.dialog; "
            );
        }
        sql.push_str(&and_heads);
        let before = 1 + usize::from(!members.is_empty());
        let mut sets = result_sets(conn, sql).await?.into_iter().skip(before);
        heads = heads_of(sets.next(), sets.next())?;
    }
    Ok(Locked { now, slots, heads })
}

pub(super) fn lock_dialogs(dialogs: &BTreeSet<(Slot, DialogId)>) -> String {
    format!(
        "SELECT dialog, last_seq, last_at, members_rev, settings FROM dialogs FORCE INDEX (PRIMARY) \
          WHERE (slot, dialog) IN ({}) ORDER BY slot, dialog FOR UPDATE",
        keys_of(dialogs.iter())
    )
}

fn keys_of<'a>(dialogs: impl Iterator<Item = &'a (Slot, DialogId)>) -> KeyList {
    let mut list = KeyList::default();
    for (slot, dialog) in dialogs {
        list.push(format_args!("{slot},'{dialog}'"));
    }
    list
}

/// Locks the dialogs, and reads the members of those that are rooms: two statements. Members
/// change only behind the lock of their room.
fn lock_heads(dialogs: &BTreeSet<(Slot, DialogId)>) -> String {
    let rooms = keys_of(dialogs.iter().filter(|(_, dialog)| dialog.is_room()));
    let members = if rooms.is_empty() {
        "DO 0".to_owned()
    } else {
        format!(
            "SELECT dialog, user_id, role, rev, since_seq, joined_seq FROM members FORCE INDEX (PRIMARY) \
              WHERE (slot, dialog) IN ({rooms}) AND until_seq IS NULL"
        )
    };
    format!("{}; {members}", lock_dialogs(dialogs))
}

/// The two results of [`lock_heads`].
fn heads_of(
    dialogs: Option<Vec<Row>>,
    members: Option<Vec<Row>>,
) -> Result<HashMap<DialogId, Head>, StoreError> {
    type DialogRow = (String, u64, i64, u64, Option<String>);
    let mut heads = HashMap::new();
    for (dialog, last_seq, last_at, rev, settings) in rows::<DialogRow>(dialogs)? {
        let dialog: DialogId = dialog.parse().map_err(|_| corrupt("dialogs.dialog"))?;
        let room = (dialog.is_room() && last_seq > 0).then(|| Room {
            rev: Seq::new(rev),
            settings: Settings::parse(settings.as_deref()),
            members: BTreeMap::new(),
        });
        let head = Head {
            last_seq: Seq::new(last_seq),
            last_at: Timestamp::from_micros(last_at),
            room: room.map(KnownRoom::Read),
        };
        heads.insert(dialog, head);
    }
    type MemberRow = (String, u64, String, u64, u64, u64);
    for (dialog, user, role, rev, since, joined) in rows::<MemberRow>(members)? {
        let dialog: DialogId = dialog.parse().map_err(|_| corrupt("members.dialog"))?;
        let user = UserId::new(user).map_err(|_| corrupt("members.user_id"))?;
        let member = Member {
            role: role_of(&role)?,
            rev: Seq::new(rev),
            since: Seq::new(since),
            joined: Seq::new(joined),
        };
        let head = heads.get_mut(&dialog).and_then(|head| head.room.as_mut());
        if let Some(KnownRoom::Read(room)) = head {
            room.members.insert(user, member);
        }
    }
    Ok(heads)
}

fn last_seqs_of(set: Option<Vec<Row>>) -> Result<HashMap<DialogId, Seq>, StoreError> {
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

/// The last round trip of a batch.
fn insert(batch: &[NewMessage], plan: &BatchPlan, locked: &Locked) -> String {
    let mut sql = String::with_capacity(
        512 + plan
            .rows
            .iter()
            .map(|row| 200 + 2 * row.text(batch).len())
            .sum::<usize>(),
    );
    sql.push_str(INSERT_MESSAGES);
    for (i, row) in plan.rows.iter().enumerate() {
        let comma = if i == 0 { "" } else { "," };
        sql.push_str(comma);
        push_row(&mut sql, batch, row, row.place.seq, row.place.at.micros());
    }
    // The rows are there and locked, so a step of so much is as good as a value, and one statement
    // serves all that take it.
    let mut steps = BTreeMap::<(u64, Timestamp), KeyList>::new();
    let mut dialogs = KeyList::default();
    for ((slot, dialog), place) in &plan.last_seqs {
        let before = locked.heads.get(dialog).map(|head| head.last_seq);
        let step = place.seq.get() - before.unwrap_or_default().get();
        steps
            .entry((step, place.at))
            .or_default()
            .push(format_args!("{slot},'{dialog}'"));
        dialogs.push(format_args!("{slot},'{dialog}'"));
    }
    for ((step, at), of_step) in steps {
        let at = at.micros();
        let _ = write!(
            sql,
            "; UPDATE dialogs FORCE INDEX (PRIMARY) SET last_seq = last_seq + {step}, last_at = {at} WHERE (slot, dialog) IN ({of_step})"
        );
    }
    push_rooms(&mut sql, plan, locked.now);
    let _ = write!(
        sql,
        "; UPDATE members FORCE INDEX (PRIMARY) SET last_hour = {} WHERE (slot, dialog) IN ({dialogs}) AND until_seq IS NULL; COMMIT",
        locked.now.hour()
    );
    sql
}

/// Writes what has changed of rooms and their members, each statement behind a semicolon.
fn push_rooms(sql: &mut String, plan: &BatchPlan, now: Timestamp) {
    let mut members = String::new();
    for ((dialog, user), row) in &plan.members {
        let (slot, member) = (Slot::of(*dialog), row.member);
        let _ = write!(
            members,
            "{}({slot},'{dialog}',{user},{},{},{},'{}',{},{},{},{})",
            comma(&members),
            member.joined,
            now.micros(),
            now.hour(),
            member.role.as_str(),
            member.rev,
            member.since,
            member.joined,
            number(row.until)
        );
    }
    if !members.is_empty() {
        let _ = write!(
            sql,
            "; INSERT INTO members (slot, dialog, user_id, read_seq, joined_at, last_hour, role, rev, since_seq, joined_seq, until_seq) \
           VALUES {members} ON DUPLICATE KEY UPDATE read_seq = GREATEST(read_seq, VALUES(read_seq)), role = VALUES(role), \
           rev = VALUES(rev), since_seq = VALUES(since_seq), joined_seq = VALUES(joined_seq), until_seq = VALUES(until_seq)"
        );
    }
    for (dialog, room) in plan.changed_rooms() {
        let _ = write!(
            sql,
            "; UPDATE dialogs SET members_rev = {}, settings = _utf8mb4 x'",
            room.rev
        );
        push_hex(sql, room.settings.to_text().as_bytes());
        let _ = write!(
            sql,
            "' WHERE slot = {} AND dialog = '{dialog}'",
            Slot::of(dialog)
        );
    }
}

/// Looks up every key of the batch. Only after the dialogs are locked: before, the answer may be
/// old.
async fn known_keys(
    conn: &mut Conn,
    batch: &[NewMessage],
) -> Result<HashMap<(DialogId, UserId, Key), StoredKey>, StoreError> {
    let mut keys = KeyList::default();
    for message in batch {
        keys.push_key(message.slot, message.dialog, message.author, &message.key);
    }
    let sql = format!(
        "SELECT dialog, author, client_key, seq, created_at, text_hash FROM messages FORCE INDEX (once) WHERE (slot, dialog, author, client_key) IN ({keys})"
    );
    type KeyRow = (String, u64, Vec<u8>, u64, i64, Vec<u8>);
    let rows: Vec<KeyRow> = conn.query(sql).await.map_err(classify)?;
    rows.into_iter()
        .map(|(dialog, author, key, seq, at, hash)| {
            let dialog = dialog.parse().map_err(|_| corrupt("messages.dialog"))?;
            let author = UserId::new(author).map_err(|_| corrupt("messages.author"))?;
            Ok((
                (dialog, author, key_of(key)?),
                StoredKey {
                    place: Receipt {
                        seq: Seq::new(seq),
                        at: Timestamp::from_micros(at),
                    },
                    hash: hash_of(hash)?,
                },
            ))
        })
        .collect()
}
