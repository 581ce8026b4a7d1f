//! [`Control`] on SQLite: the same steps; `BEGIN IMMEDIATE` replaces all of their locks.

use super::connection::{SqliteStore, classify, immediate};
use super::rows::{check_identity, clamp, select_meta};
use crate::clock::now;
use crate::domain::dialog::{DialogId, Seq, Timestamp, UserId};
use crate::domain::ownership::{ReleaseStamp, SlotRow, SlotState, Step, StepRejected};
use crate::domain::slot::Slot;
use crate::domain::topology::TopologyRef;
use crate::store::control::{
    Existing, MEMBER_COLUMNS, MESSAGE_COLUMNS, RawMember, RawMessage, RawSlot, SLOT_COLUMNS,
    as_duplicate, copied, fits, hash_of, membership, missing, slot_row,
};
use crate::store::corrupt;
use crate::store::{
    Acceptance, Chunk, Control, CoordinatorLock, CopiedMessage, DialogRow, Meta, PurgeOutcome,
    ShardIdentity, SlotSize, StoreError,
};
use async_trait::async_trait;
use rusqlite::{OptionalExtension, Transaction, params};
use std::collections::BTreeMap;
use std::time::Duration;

#[async_trait]
impl Control for SqliteStore {
    async fn accept(&self, identity: &ShardIdentity, new: &Meta) -> Result<Acceptance, StoreError> {
        let (identity, new) = (identity.clone(), new.clone());
        self.write_on(move |connection| {
            let tx = immediate(connection)?;
            check_identity(&tx, &identity)?;
            let there = select_meta(&tx)?.ok_or_else(|| corrupt("meta"))?;
            let acceptance = there.offered(&new)?;
            if let Acceptance::Accept { fence } = acceptance {
                if fence {
                    tx.execute(
                        "UPDATE slots SET state = 'fenced', peer = NULL, next_term = NULL WHERE state IN ('owner', 'sealed', 'incoming')",
                        [],
                    )
                    .map_err(|e| classify(&e))?;
                    next_revision(&tx)?;
                }
                tx.execute(
                    "UPDATE meta SET topology_version = ?, topology_phase = ?, topology_hash = ?, topology = ? WHERE id = 1",
                    params![new.topology_version, new.topology_phase.as_str(), new.topology_hash, new.topology],
                )
                .map_err(|e| classify(&e))?;
                tx.commit().map_err(|e| classify(&e))?;
            }
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
        let (identity, topology_ref) = (identity.clone(), topology_ref.cloned());
        self.read_on(move |snapshot| {
            check_identity(snapshot, &identity)?;
            if let Some(topology_ref) = topology_ref {
                fits(&topology_ref_of(snapshot)?, &topology_ref, None)?;
            }
            slot_rows(snapshot, only)
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
        let (identity, topology_ref, step) = (identity.clone(), topology_ref.clone(), step.clone());
        self.write_on(move |connection| {
            let tx = immediate(connection)?;
            let after = match take(&tx, &identity, &topology_ref, slot, &step)? {
                Ok(after) => after,
                Err(refused) => return Ok(Err(refused)),
            };
            tx.commit().map_err(|e| classify(&e))?;
            Ok(Ok(after))
        })
        .await
    }

    async fn dialog_rows(
        &self,
        identity: &ShardIdentity,
        slot: Slot,
    ) -> Result<Vec<DialogRow>, StoreError> {
        let identity = identity.clone();
        self.read_on(move |snapshot| {
            check_identity(snapshot, &identity)?;
            let mut dialog_rows = BTreeMap::<String, DialogRow>::new();
            let dialogs: Vec<(String, u64, i64, u64, Option<String>)> = snapshot
                .prepare_cached("SELECT dialog, last_seq, last_at, members_rev, settings FROM dialogs WHERE slot = ?")
                .and_then(|mut select| select.query_map([slot.get()], |row| row.try_into())?.collect())
                .map_err(|e| classify(&e))?;
            for (name, last_seq, last_at, members_rev, settings) in dialogs {
                let dialog_row = DialogRow {
                    dialog: name.parse().map_err(|_| corrupt("dialogs.dialog"))?,
                    last_seq: Seq::new(last_seq),
                    last_at: Timestamp::from_micros(last_at),
                    members_rev: Seq::new(members_rev),
                    settings,
                    members: Vec::new(),
                };
                dialog_rows.insert(name, dialog_row);
            }
            let members: Vec<RawMember> = snapshot
                .prepare_cached(&format!("SELECT {MEMBER_COLUMNS} FROM members WHERE slot = ? ORDER BY dialog, user_id"))
                .and_then(|mut select| select.query_map([slot.get()], |row| row.try_into())?.collect())
                .map_err(|e| classify(&e))?;
            for raw in members {
                let (name, member) = membership(raw)?;
                if let Some(dialog_row) = dialog_rows.get_mut(&name) {
                    dialog_row.members.push(member);
                }
            }
            Ok(dialog_rows.into_values().collect())
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
        let identity = identity.clone();
        let mut above: Vec<(String, Seq)> = above
            .iter()
            .map(|(dialog, seq)| (dialog.to_string(), *seq))
            .collect();
        above.sort();
        self.read_on(move |snapshot| {
            check_identity(snapshot, &identity)?;
            let mut messages = Vec::new();
            let mut select = snapshot
                .prepare_cached(&format!(
                    "SELECT {MESSAGE_COLUMNS} FROM messages WHERE slot = ? AND dialog = ? AND seq > ? ORDER BY seq LIMIT ?"
                ))
                .map_err(|e| classify(&e))?;
            for (dialog, seq) in above {
                let room = i64::from(limit) - messages.len() as i64;
                let rows: Vec<RawMessage> = select
                    .query_map(params![slot.get(), dialog, clamp(seq.get()), room], |row| row.try_into())
                    .and_then(Iterator::collect)
                    .map_err(|e| classify(&e))?;
                for row in rows {
                    messages.push(copied(row)?);
                }
            }
            Ok(messages)
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
        let (identity, topology_ref, from, chunk) = (
            identity.clone(),
            topology_ref.clone(),
            from.to_owned(),
            chunk.clone(),
        );
        self.write_on(move |connection| {
            let tx = immediate(connection)?;
            check_identity(&tx, &identity)?;
            fits(&topology_ref_of(&tx)?, &topology_ref, None)?;
            let row = slot_rows(&tx, Some(slot))?
                .pop()
                .ok_or_else(|| corrupt("slots"))?;
            if !row.is_incoming(&from, term) {
                return Ok(Err(StepRejected(row)));
            }
            for message in &chunk.messages {
                insert_copied(&tx, slot, message)?;
            }
            raise_last_seqs(&tx, slot, &chunk.dialogs).map_err(|e| classify(&e))?;
            tx.commit().map_err(|e| classify(&e))?;
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
        let (identity, topology_ref, chunk) =
            (identity.clone(), topology_ref.clone(), chunk.clone());
        self.write_on(move |connection| {
            let tx = immediate(connection)?;
            if let Err(refused) = take(&tx, &identity, &topology_ref, slot, &Step::MergedIn)? {
                return Ok(Err(refused));
            }
            for message in missing(&chunk, &standing(&tx, slot, &chunk.messages)?)? {
                let stored = stored_at(&tx, slot, message)?;
                insert_copied(&tx, slot, &as_duplicate(message, stored))?;
            }
            // The source is purged after this check: every row is here, and no other row in its
            // place.
            let left = missing(&chunk, &standing(&tx, slot, &chunk.messages)?)?.len();
            if left > 0 {
                return Err(StoreError::Refused(format!(
                    "{left} of the messages did not come in"
                )));
            }
            raise_last_seqs(&tx, slot, &chunk.dialogs).map_err(|e| classify(&e))?;
            tx.commit().map_err(|e| classify(&e))?;
            Ok(Ok(()))
        })
        .await
    }

    async fn leftovers(
        &self,
        identity: &ShardIdentity,
        grace: Duration,
    ) -> Result<Vec<Slot>, StoreError> {
        let identity = identity.clone();
        let grace = i64::try_from(grace.as_micros()).unwrap_or(i64::MAX);
        let released_before = now().micros().saturating_sub(grace);
        self.read_on(move |snapshot| {
            check_identity(snapshot, &identity)?;
            let slots: Vec<u16> = snapshot
                .prepare_cached(
                    "SELECT slot FROM slots WHERE state = 'none' AND released_at <= ?
                        AND EXISTS (SELECT 1 FROM dialogs WHERE dialogs.slot = slots.slot) ORDER BY slot",
                )
                .and_then(|mut select| select.query_map([released_before], |row| row.get(0))?.collect())
                .map_err(|e| classify(&e))?;
            Ok(slots.into_iter().filter_map(Slot::new).collect())
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
        let identity = identity.clone();
        self.write_on(move |connection| {
            let tx = immediate(connection)?;
            check_identity(&tx, &identity)?;
            let (state, released_at): (String, i64) = tx
                .query_row("SELECT state, released_at FROM slots WHERE slot = ?", [slot.get()], |row| {
                    Ok((row.get(0)?, row.get(1)?))
                })
                .map_err(|e| classify(&e))?;
            if state != SlotState::None.as_str() {
                return Ok(PurgeOutcome::InUse);
            }
            let grace = i64::try_from(grace.as_micros()).unwrap_or(i64::MAX);
            if released_at.saturating_add(grace) > now().micros() {
                return Ok(PurgeOutcome::TooEarly);
            }
            let purge = || {
                let gone = tx.execute(
                    "DELETE FROM messages WHERE slot = ?1 AND (dialog, seq) IN
                       (SELECT dialog, seq FROM messages WHERE slot = ?1 ORDER BY dialog, seq LIMIT ?2)",
                    params![slot.get(), limit],
                )? as u64;
                if gone < u64::from(limit) {
                    for table in ["members", "dialogs"] {
                        tx.execute(&format!("DELETE FROM {table} WHERE slot = ?"), [slot.get()])?;
                    }
                }
                Ok(gone)
            };
            let gone = purge().map_err(|e: rusqlite::Error| classify(&e))?;
            tx.commit().map_err(|e| classify(&e))?;
            Ok(if gone < u64::from(limit) { PurgeOutcome::All } else { PurgeOutcome::Some(gone) })
        })
        .await
    }

    async fn sizes(
        &self,
        identity: &ShardIdentity,
    ) -> Result<BTreeMap<Slot, SlotSize>, StoreError> {
        let identity = identity.clone();
        self.read_on(move |snapshot| {
            check_identity(snapshot, &identity)?;
            let rows: Vec<(u16, u64, u64, u64)> = snapshot
                .prepare_cached(
                    "SELECT d.slot, COUNT(*), COALESCE(SUM(m.messages), 0), COALESCE(SUM(m.bytes), 0) FROM dialogs d
                       LEFT JOIN (SELECT slot, dialog, COUNT(*) AS messages, SUM(LENGTH(CAST(text AS BLOB))) AS bytes
                                    FROM messages GROUP BY slot, dialog) m ON m.slot = d.slot AND m.dialog = d.dialog
                      GROUP BY d.slot",
                )
                .and_then(|mut select| {
                    select.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))?.collect()
                })
                .map_err(|e| classify(&e))?;
            let size = |(slot, dialogs, messages, bytes)| Some((Slot::new(slot)?, SlotSize { dialogs, messages, bytes }));
            Ok(rows.into_iter().filter_map(size).collect())
        })
        .await
    }

    async fn revoke(
        &self,
        identity: &ShardIdentity,
        revocations: &[(UserId, u64)],
    ) -> Result<(), StoreError> {
        let (identity, revocations) = (identity.clone(), revocations.to_vec());
        self.write_on(move |connection| {
            let transaction = immediate(connection)?;
            check_identity(&transaction, &identity)?;
            for (user, time) in revocations {
                transaction
                    .execute(
                        "INSERT INTO revocations (user_id, issued_before) VALUES (?, ?) ON CONFLICT DO UPDATE
                           SET issued_before = MAX(issued_before, excluded.issued_before)",
                        (user.get(), time),
                    )
                    .map_err(|e| classify(&e))?;
            }
            transaction.commit().map_err(|e| classify(&e))
        })
        .await
    }

    async fn revocations(
        &self,
        identity: &ShardIdentity,
    ) -> Result<BTreeMap<UserId, u64>, StoreError> {
        let identity = identity.clone();
        self.read_on(move |snapshot| {
            check_identity(snapshot, &identity)?;
            let rows: Vec<(u64, u64)> = snapshot
                .prepare_cached("SELECT user_id, issued_before FROM revocations")
                .and_then(|mut select| {
                    select
                        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
                        .collect()
                })
                .map_err(|e| classify(&e))?;
            let user = |id| UserId::new(id).map_err(|_| corrupt("revocations.user_id"));
            rows.into_iter()
                .map(|(id, time)| Ok((user(id)?, time)))
                .collect()
        })
        .await
    }

    async fn try_lock_coordinator(&self) -> Result<Option<Box<dyn CoordinatorLock>>, StoreError> {
        // Two processes on the same files are rare, and safe all the same.
        Ok(Some(Box::new(Always)))
    }
}

struct Always;

#[async_trait]
impl CoordinatorLock for Always {
    async fn keep(&mut self) -> Result<(), StoreError> {
        Ok(())
    }
}

fn topology_ref_of(tx: &Transaction<'_>) -> Result<TopologyRef, StoreError> {
    Ok(select_meta(tx)?
        .ok_or_else(|| corrupt("meta"))?
        .topology_ref())
}

/// Takes a step within a transaction.
fn take(
    tx: &Transaction<'_>,
    identity: &ShardIdentity,
    topology_ref: &TopologyRef,
    slot: Slot,
    step: &Step,
) -> Result<Result<SlotRow, StepRejected>, StoreError> {
    check_identity(tx, identity)?;
    fits(&topology_ref_of(tx)?, topology_ref, Some(step))?;
    let row = slot_rows(tx, Some(slot))?
        .pop()
        .ok_or_else(|| corrupt("slots"))?;
    let holds_rows: bool = tx
        .query_row(
            "SELECT EXISTS (SELECT 1 FROM dialogs WHERE slot = ?)",
            [slot.get()],
            |row| row.get(0),
        )
        .map_err(|e| classify(&e))?;
    let after = match row.after(step, holds_rows) {
        Ok(after) => after,
        Err(refused) => return Ok(Err(refused)),
    };
    let released = match step.release_stamp() {
        ReleaseStamp::Keep => None,
        ReleaseStamp::Now => Some(now().micros()),
        ReleaseStamp::Never => Some(0),
    };
    tx.execute(
        "UPDATE slots SET state = ?, term = ?, generation = ?, peer = ?, next_term = ?, activated = ?, claimed_generation = ?,
            history = ?, released_at = COALESCE(?, released_at) WHERE slot = ?",
        params![
            after.state.as_str(),
            after.term,
            after.generation,
            after.peer,
            after.next_term,
            after.activated,
            after.claimed_generation,
            after.history.to_string(),
            released,
            slot.get()
        ],
    )
    .map_err(|e| classify(&e))?;
    next_revision(tx)?;
    Ok(Ok(after))
}

/// Follows every change of the table slots: what was read under an earlier revision is read again.
fn next_revision(tx: &Transaction<'_>) -> Result<(), StoreError> {
    tx.execute("UPDATE slots_revision SET revision = revision + 1", [])
        .map(drop)
        .map_err(|e| classify(&e))
}

fn slot_rows(tx: &Transaction<'_>, only: Option<Slot>) -> Result<Vec<SlotRow>, StoreError> {
    let rows: Vec<RawSlot> = tx
        .prepare_cached(&format!(
            "SELECT {SLOT_COLUMNS} FROM slots WHERE slot = COALESCE(?, slot) ORDER BY slot"
        ))
        .and_then(|mut select| {
            select
                .query_map([only.map(Slot::get)], |row| row.try_into())?
                .collect()
        })
        .map_err(|e| classify(&e))?;
    rows.into_iter().map(slot_row).collect()
}

/// The rows with the primary keys of these messages.
fn standing(
    tx: &Transaction<'_>,
    slot: Slot,
    messages: &[CopiedMessage],
) -> Result<Existing, StoreError> {
    let mut select = tx
        .prepare_cached(
            "SELECT author, text_hash FROM messages WHERE slot = ? AND dialog = ? AND seq = ?",
        )
        .map_err(|e| classify(&e))?;
    let mut standing = Existing::new();
    for message in messages {
        let place = params![slot.get(), message.dialog.to_string(), message.seq.get()];
        let found: Option<(u64, Vec<u8>)> = select
            .query_row(place, |row| row.try_into())
            .optional()
            .map_err(|e| classify(&e))?;
        if let Some((author, hash)) = found {
            let author = UserId::new(author).map_err(|_| corrupt("messages.author"))?;
            standing.insert((message.dialog, message.seq), (author, hash_of(hash)?));
        }
    }
    Ok(standing)
}

/// Where the key of a message is stored, if it is.
fn stored_at(
    tx: &Transaction<'_>,
    slot: Slot,
    message: &CopiedMessage,
) -> Result<Option<Seq>, StoreError> {
    let Some(key) = &message.key else {
        return Ok(None);
    };
    let found = tx
        .prepare_cached(
            "SELECT seq FROM messages WHERE slot = ? AND dialog = ? AND author = ? AND client_key = ?",
        )
        .and_then(|mut select| {
            let (name, key) = (message.dialog.to_string(), key.as_str().as_bytes());
            select
                .query_row(
                    params![slot.get(), name, message.author.get(), key],
                    |row| row.get(0),
                )
                .optional()
        })
        .map_err(|e| classify(&e))?;
    Ok(found.map(Seq::new))
}

/// What is there stays as it is.
fn insert_copied(
    tx: &Transaction<'_>,
    slot: Slot,
    message: &CopiedMessage,
) -> Result<(), StoreError> {
    tx.prepare_cached(
        &format!("INSERT INTO messages (slot, {MESSAGE_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"),
    )
    .and_then(|mut insert| {
        insert.execute(params![
            slot.get(),
            message.dialog.to_string(),
            message.seq.get(),
            message.author.get(),
            message.key.as_ref().map(|key| key.as_str().as_bytes()),
            message.hash.0,
            message.kind.as_str(),
            message.of.map(Seq::get),
            message.text,
            message.at.micros(),
            message.duplicate_of.map(Seq::get)
        ])
    })
    .map(drop)
    .map_err(|e| classify(&e))
}

/// What is there only rises. Of what a room says of itself and of its members, the later entry is
/// right.
fn raise_last_seqs(
    tx: &Transaction<'_>,
    slot: Slot,
    dialog_rows: &[DialogRow],
) -> rusqlite::Result<()> {
    let mut dialog = tx.prepare_cached(
        "INSERT INTO dialogs (slot, dialog, last_seq, last_at, members_rev, settings) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE
            SET last_seq = MAX(last_seq, excluded.last_seq), last_at = MAX(last_at, excluded.last_at),
                settings = IIF(excluded.members_rev > members_rev, excluded.settings, settings),
                members_rev = MAX(members_rev, excluded.members_rev)",
    )?;
    let mut member = tx.prepare_cached(
        "INSERT INTO members (slot, dialog, user_id, read_seq, joined_at, last_hour, role, rev, since_seq, joined_seq, until_seq)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE
            SET last_hour = MAX(last_hour, excluded.last_hour), read_seq = MAX(read_seq, excluded.read_seq), joined_at = MIN(joined_at, excluded.joined_at),
                role = IIF(excluded.rev > rev, excluded.role, role), since_seq = IIF(excluded.rev > rev, excluded.since_seq, since_seq),
                joined_seq = IIF(excluded.rev > rev, excluded.joined_seq, joined_seq),
                until_seq = IIF(excluded.rev > rev, excluded.until_seq, until_seq), rev = MAX(rev, excluded.rev)",
    )?;
    for dialog_row in dialog_rows {
        let name = dialog_row.dialog.to_string();
        dialog.execute(params![
            slot.get(),
            name,
            dialog_row.last_seq.get(),
            dialog_row.last_at.micros(),
            dialog_row.members_rev.get(),
            dialog_row.settings
        ])?;
        for of in &dialog_row.members {
            member.execute(params![
                slot.get(),
                name,
                of.user.get(),
                of.read_seq.get(),
                of.joined_at.micros(),
                dialog_row.last_at.hour(),
                of.member.role.as_str(),
                of.member.rev.get(),
                of.member.since.get(),
                of.member.joined.get(),
                of.until.map(Seq::get)
            ])?;
        }
    }
    Ok(())
}
