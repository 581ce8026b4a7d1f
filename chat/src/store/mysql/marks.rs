//! Read marks: many in one statement, alone or with a batch of messages.

use super::sql::{
    BEGIN, KeyList, check_identity, fence, result_sets, rows, select_identity, views_of,
};
use crate::domain::dialog::{DialogId, Seq, UserId};
use crate::store::{MarkOutcome, NewMark, ShardIdentity, StoreError, corrupt};
use mysql_async::{Conn, Row};
use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;

/// Moves read marks in one transaction, and none in slots of others or of another shard.
pub(super) async fn mark_read(
    conn: &mut Conn,
    identity: &ShardIdentity,
    marks: &[NewMark],
) -> Result<Vec<MarkOutcome>, StoreError> {
    let slots: BTreeSet<_> = marks.iter().map(|mark| mark.slot).collect();
    let mut sql = format!("{BEGIN}{}; {}; ", select_identity(), fence(&slots));
    let owned = format!(
        " AND EXISTS (SELECT 1 FROM meta i JOIN slots s ON s.slot = members.slot AND s.state = 'owner' \
          WHERE i.id = 1 AND i.cluster_id = '{}' AND i.shard_name = '{}')",
        identity.cluster_id, identity.shard_name
    );
    push(&mut sql, marks, &owned);
    sql.push_str("COMMIT");
    let mut sets = result_sets(conn, sql).await?.into_iter().skip(1);
    check_identity(identity, sets.next())?;
    let views = views_of(sets.next())?;
    let marked = marked(marks, sets.next())?;
    let settled = marks.iter().zip(marked).map(|(mark, marked)| {
        let view = views.get(&mark.slot);
        if view.is_some_and(|view| view.state.takes_writes()) {
            marked
        } else {
            MarkOutcome::NotOwner(view.map(|view| view.state))
        }
    });
    Ok(settled.collect())
}

/// Two statements, in a transaction that has locked the slots: the first locks the rows in key
/// order and returns them, for [`marked`]; the second moves them, where `owned` is so. Dialogs are
/// read and not locked: last seqs only grow.
pub(super) fn push(sql: &mut String, marks: &[NewMark], owned: &str) {
    const LAST_SEQ: &str = "(SELECT d.last_seq FROM dialogs d WHERE d.slot = members.slot AND d.dialog = members.dialog)";
    let (mut keys, mut cases) = (KeyList::default(), String::new());
    for NewMark {
        slot,
        dialog,
        user,
        seq,
    } in marks
    {
        keys.push(format_args!("{slot},'{dialog}',{user}"));
        let _ = write!(
            cases,
            " WHEN user_id = {user} AND dialog = '{dialog}' THEN {seq}"
        );
    }
    let _ = write!(
        sql,
        "SELECT dialog, user_id, read_seq, {LAST_SEQ} FROM members FORCE INDEX (PRIMARY) WHERE (slot, dialog, user_id) IN ({keys}) AND until_seq IS NULL \
          ORDER BY slot, dialog, user_id FOR UPDATE; \
         UPDATE members FORCE INDEX (PRIMARY) SET read_seq = GREATEST(read_seq, LEAST(CASE{cases} END, {LAST_SEQ})) \
          WHERE (slot, dialog, user_id) IN ({keys}) AND until_seq IS NULL{owned}; "
    );
}

/// What becomes of each mark, by the rows that the first statement of [`push`] found.
pub(super) fn marked(
    marks: &[NewMark],
    found: Option<Vec<Row>>,
) -> Result<Vec<MarkOutcome>, StoreError> {
    let mut there = HashMap::<(DialogId, UserId), (Seq, Seq)>::new();
    for (dialog, user, read, last) in rows::<(String, u64, u64, u64)>(found)? {
        let dialog = dialog.parse().map_err(|_| corrupt("members.dialog"))?;
        let user = UserId::new(user).map_err(|_| corrupt("members.user_id"))?;
        there.insert((dialog, user), (Seq::new(read), Seq::new(last)));
    }
    let marked = marks.iter().map(|mark| {
        let row = there.get(&(mark.dialog, mark.user));
        row.map_or(MarkOutcome::NoDialog, |(read, last)| mark.on(*read, *last))
    });
    Ok(marked.collect())
}
