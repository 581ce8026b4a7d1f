//! Rows of the tables, read and written within a transaction.

use super::connection::classify;
use crate::domain::dialog::{DialogId, Key, Seq, TextHash, Timestamp, UserId};
use crate::domain::ownership::{History, SlotView};
use crate::domain::room::{Member, Room, Settings};
use crate::domain::slot::Slot;
use crate::domain::topology::Phase;
use crate::store::batch_plan::{BatchPlan, Head, KnownRoom};
use crate::store::control::role_of;
use crate::store::meta::phase;
use crate::store::served_slots::ServedSlotsCache;
use crate::store::{
    Meta, NewMessage, Receipt, ServedSlots, ShardIdentity, StoreError, StoredKey, StoredMessage,
    corrupt,
};
use rusqlite::{OptionalExtension, Transaction, params};
use std::collections::HashMap;

pub(super) fn select_meta(tx: &Transaction<'_>) -> Result<Option<Meta>, StoreError> {
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

pub(super) fn check_identity(
    tx: &Transaction<'_>,
    expected: &ShardIdentity,
) -> Result<(), StoreError> {
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

pub(super) fn owned(
    tx: &Transaction<'_>,
    held: &ServedSlotsCache,
) -> Result<ServedSlots, StoreError> {
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

pub(super) fn view(tx: &Transaction<'_>, slot: Slot) -> Result<Option<SlotView>, StoreError> {
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
        let history: History = history.parse().map_err(|_| corrupt("slots.history"))?;
        Ok(SlotView {
            state,
            term,
            generation,
            complete: history.is_complete(),
            unmerged: !history.missing.is_empty(),
            peer,
        })
    })
    .transpose()
}

/// The last seq of a dialog and when it was stored; zero if there is no such dialog.
pub(super) fn last_seq(
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
        .map(|row| {
            let (seq, at) = row.unwrap_or_default();
            (Seq::new(seq), Timestamp::from_micros(at))
        })
        .map_err(|e| classify(&e))
}

pub(super) fn known_keys(
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

/// What is known of a dialog under the lock of the whole file.
pub(super) fn head(tx: &Transaction<'_>, slot: Slot, dialog: DialogId) -> Result<Head, StoreError> {
    let (last_seq, last_at) = last_seq(tx, slot, dialog)?;
    let room = if dialog.is_room() && last_seq > Seq::ZERO {
        Some(KnownRoom::Read(room(tx, slot, dialog)?))
    } else {
        None
    };
    Ok(Head {
        last_seq,
        last_at,
        room,
    })
}

fn room(tx: &Transaction<'_>, slot: Slot, dialog: DialogId) -> Result<Room, StoreError> {
    let place = params![slot.get(), dialog.to_string()];
    let (rev, settings): (u64, Option<String>) = tx
        .prepare_cached("SELECT members_rev, settings FROM dialogs WHERE slot = ? AND dialog = ?")
        .and_then(|mut select| select.query_row(place, |row| row.try_into()))
        .map_err(|e| classify(&e))?;
    let rows: Vec<(u64, String, u64, u64, u64)> = tx
        .prepare_cached(
            "SELECT user_id, role, rev, since_seq, joined_seq FROM members WHERE slot = ? AND dialog = ? AND until_seq IS NULL",
        )
        .and_then(|mut select| select.query_map(place, |row| row.try_into())?.collect())
        .map_err(|e| classify(&e))?;
    let member = |(user, role, rev, since, joined): (u64, String, u64, u64, u64)| {
        let member = Member {
            role: role_of(&role)?,
            rev: Seq::new(rev),
            since: Seq::new(since),
            joined: Seq::new(joined),
        };
        let user = UserId::new(user).map_err(|_| corrupt("members.user_id"))?;
        Ok((user, member))
    };
    Ok(Room {
        rev: Seq::new(rev),
        settings: Settings::parse(settings.as_deref()),
        members: rows
            .into_iter()
            .map(member)
            .collect::<Result<_, StoreError>>()?,
    })
}

pub(super) fn insert(
    tx: &Transaction<'_>,
    batch: &[NewMessage],
    plan: &BatchPlan,
    now: Timestamp,
) -> rusqlite::Result<()> {
    let mut message = tx.prepare_cached(
        "INSERT INTO messages (slot, dialog, seq, author, client_key, text_hash, kind, text, created_at)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )?;
    for row in &plan.rows {
        let new = &batch[row.index];
        message.execute(params![
            new.slot.get(),
            new.dialog.to_string(),
            row.place.seq.get(),
            new.author.get(),
            new.key.as_str().as_bytes(),
            new.hash.0,
            new.body.kind().as_str(),
            row.text(batch),
            row.place.at.micros()
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
    for ((slot, dialog), place) in &plan.last_seqs {
        let name = dialog.to_string();
        let at = place.at;
        dialog_row.execute(params![slot.get(), name, place.seq.get(), at.micros()])?;
        for user in dialog.users() {
            member.execute(params![
                slot.get(),
                name,
                user.get(),
                at.micros(),
                at.hour()
            ])?;
        }
    }
    insert_rooms(tx, plan, now)
}

/// Writes what has changed of rooms and their members, and when they had their last entry.
fn insert_rooms(tx: &Transaction<'_>, plan: &BatchPlan, now: Timestamp) -> rusqlite::Result<()> {
    for ((dialog, user), row) in &plan.members {
        let member = row.member;
        tx.prepare_cached(
            "INSERT INTO members (slot, dialog, user_id, read_seq, joined_at, last_hour, role, rev, since_seq, joined_seq, until_seq)
             VALUES (?, ?, ?, ?, ?, 0, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET read_seq = MAX(read_seq, excluded.read_seq),
               role = excluded.role, rev = excluded.rev, since_seq = excluded.since_seq, joined_seq = excluded.joined_seq,
               until_seq = excluded.until_seq",
        )?
        .execute(params![
            Slot::of(*dialog).get(),
            dialog.to_string(),
            user.get(),
            member.joined.get(),
            now.micros(),
            member.role.as_str(),
            member.rev.get(),
            member.since.get(),
            member.joined.get(),
            row.until.map(Seq::get)
        ])?;
    }
    for (dialog, room) in plan.changed_rooms() {
        tx.prepare_cached(
            "UPDATE dialogs SET members_rev = ?, settings = ? WHERE slot = ? AND dialog = ?",
        )?
        .execute(params![
            room.rev.get(),
            room.settings.to_text(),
            Slot::of(dialog).get(),
            dialog.to_string()
        ])?;
    }
    for ((slot, dialog), place) in plan
        .last_seqs
        .iter()
        .filter(|((_, dialog), _)| dialog.is_room())
    {
        let hour = place.at.hour();
        tx.prepare_cached(
            "UPDATE members SET last_hour = ?1 WHERE slot = ?2 AND dialog = ?3 AND until_seq IS NULL AND last_hour <> ?1",
        )?
        .execute(params![hour, slot.get(), dialog.to_string()])?;
    }
    Ok(())
}

/// The columns that a reader is shown, of the row called `m`.
pub(super) const MESSAGE_ROW: &str =
    "m.seq, m.author, m.client_key, m.kind, m.of_seq, m.text, m.created_at";

/// The columns of [`MESSAGE_ROW`], from `first` on.
pub(super) fn message(row: &rusqlite::Row<'_>, first: usize) -> rusqlite::Result<StoredMessage> {
    let author: u64 = row.get(first + 1)?;
    let key: Option<Vec<u8>> = row.get(first + 2)?;
    Ok(StoredMessage {
        seq: Seq::new(row.get(first)?),
        author: UserId::new(author)
            .map_err(|e| rusqlite::Error::ToSqlConversionFailure(Box::new(e)))?,
        key: key.map(|key| String::from_utf8_lossy(&key).into_owned()),
        kind: row.get::<_, String>(first + 3)?.into(),
        of: row.get::<_, Option<u64>>(first + 4)?.map(Seq::new),
        text: row.get(first + 5)?,
        at: Timestamp::from_micros(row.get(first + 6)?),
    })
}

/// SQLite's integers are signed; no seq comes near the end of them, but a request may.
pub(super) fn clamp(seq: u64) -> i64 {
    i64::try_from(seq).unwrap_or(i64::MAX)
}
