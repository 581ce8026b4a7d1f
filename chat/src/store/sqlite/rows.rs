//! Rows of the tables, read and written within a transaction.

use super::connection::classify;
use crate::domain::dialog::{DialogId, Key, Seq, TextHash, Timestamp, UserId};
use crate::domain::ownership::{COMPLETE, SlotView};
use crate::domain::slot::Slot;
use crate::domain::topology::Phase;
use crate::store::batch_plan::BatchPlan;
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

pub(super) fn insert(
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
    for ((slot, dialog), seq) in &plan.last_seqs {
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
pub(super) fn message(row: &rusqlite::Row<'_>, first: usize) -> rusqlite::Result<StoredMessage> {
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
pub(super) fn clamp(seq: u64) -> i64 {
    i64::try_from(seq).unwrap_or(i64::MAX)
}
