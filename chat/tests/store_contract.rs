//! What every store must do, on SQLite, MySQL and MariaDB alike, and on the store in memory that
//! simulations use.

#![allow(missing_docs, clippy::wildcard_enum_match_arm)]

use chat::config::Settings;
use chat::domain::dialog::{DialogId, Key, Seq, Text, Timestamp, UserId};
use chat::domain::ownership::{History, SlotState, Step, Term};
use chat::domain::room::{RoomChange, RoomRequest, Settings as RoomSettings};
use chat::domain::shards_file::ShardsFile;
use chat::domain::slot::SlotSet;
use chat::domain::slot::{SLOTS, Slot};
use chat::domain::topology::Topology;
use chat::domain::topology::{Phase, TopologyRef};
use chat::metrics::ShardMetrics;
use chat::resharding::mover::Move;
use chat::resharding::pace::Pace;
use chat::resharding::step::{MoveError, row_at};
use chat::store::{
    self, Acceptance, Appended, Audience, Body, Chunk, Database, DialogRow, Draft, Expected,
    InboxCursor, LastSeqs, LastSeqsOf, MarkOutcome, Meta, Mismatch, MysqlStore, NewMark,
    NewMessage, PurgeOutcome, Range, RoomMembers, Shard, ShardIdentity, SlotSize, SqliteStore,
    StoreError, Timing, WriteOutcome,
};
use chat_wire::{Role, RoomHistory};
use mysql_async::prelude::Queryable;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use testkit::memory::{Calm, MemoryStore};
use testkit::proxy::Proxy;
use testkit::{Databases, Kind};

fn user(id: u64) -> UserId {
    UserId::new(id).unwrap()
}

fn dialog(text: &str) -> DialogId {
    text.parse().unwrap()
}

fn message(dialog_id: &str, author: u64, key: &str, text: &str) -> NewMessage {
    NewMessage::new(
        dialog(dialog_id),
        user(author),
        Key::new(key.into()).unwrap(),
        Body::Text(Text::new(text.into(), 5000).unwrap()),
    )
}

fn open(databases: &Databases, i: usize) -> Arc<dyn Database> {
    if databases.kind == Kind::Memory {
        let server = databases.memory[i].clone();
        return Arc::new(MemoryStore::new(server, Arc::new(Calm)));
    }
    let settings = Settings::from_toml("").unwrap().store;
    let (url, runtime) = (databases.url(i), tokio::runtime::Handle::current());
    match url.strip_prefix("sqlite:") {
        Some(path) => Arc::new(SqliteStore::new(path, &settings, runtime)),
        None => Arc::new(MysqlStore::new(&url, &settings, runtime).unwrap()),
    }
}

fn meta() -> Meta {
    Meta {
        cluster_id: "c1".into(),
        shard_name: "shard1".into(),
        slot_algorithm: "a".into(),
        topology_version: 1,
        topology_phase: Phase::Initializing,
        topology_hash: "h".into(),
        topology: "{}".into(),
    }
}

fn identity() -> ShardIdentity {
    ShardIdentity {
        cluster_id: "c1".into(),
        shard_name: "shard1".into(),
    }
}

fn all_slots() -> SlotSet {
    let mut slots = SlotSet::empty();
    Slot::all().for_each(|slot| assert!(slots.insert(slot)));
    slots
}

/// A store that owns everything, on a database of its own.
async fn initialized(kind: Kind) -> (Databases, Arc<dyn Database>) {
    let databases = Databases::new(kind, 1).await;
    let store = open(&databases, 0);
    store.migrate().await.unwrap();
    store.initialize(&meta(), &all_slots()).await.unwrap();
    (databases, store)
}

async fn write(store: &Arc<dyn Database>, batch: &[NewMessage]) -> Vec<WriteOutcome> {
    store
        .write(&identity(), batch, false)
        .await
        .unwrap()
        .written
}

fn seqs(written: &[WriteOutcome]) -> Vec<(u64, bool)> {
    let seq = |written: &WriteOutcome| match written {
        WriteOutcome::Stored(place, _) => (place.seq.get(), false),
        WriteOutcome::Repeat(place, _) => (place.seq.get(), true),
        other => panic!("{other:?}"),
    };
    written.iter().map(seq).collect()
}

async fn founding_happens_once_and_migrating_again_changes_nothing(kind: Kind) {
    let databases = Databases::new(kind, 1).await;
    let store = open(&databases, 0);
    let (a, b) = (open(&databases, 0), open(&databases, 0));
    assert_eq!(store.meta().await.unwrap(), None, "not even tables");
    let (first, second) = tokio::join!(a.migrate(), b.migrate());
    first.unwrap();
    second.unwrap();
    assert_eq!(store.meta().await.unwrap(), None);
    let other = Meta {
        cluster_id: "c2".into(),
        ..meta()
    };
    let (meta_1, meta_2, everything, nothing) =
        (meta(), other.clone(), all_slots(), SlotSet::empty());
    let (one, two) = tokio::join!(
        a.initialize(&meta_1, &everything),
        b.initialize(&meta_2, &nothing)
    );
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!(one, two, "the same answer to both");
    let seen = store.meta().await.unwrap();
    assert_eq!(
        seen.as_ref(),
        Some(&one),
        "by one who looked before there were tables"
    );
    let owned = store
        .slots(&ShardIdentity {
            cluster_id: one.cluster_id.clone(),
            ..identity()
        })
        .await
        .unwrap();
    assert_eq!(owned.owned.len(), if one == other { 0 } else { SLOTS });
    store.advance(1, "another", Phase::Normal).await.unwrap();
    assert_eq!(
        store.meta().await.unwrap().unwrap().topology_phase,
        Phase::Initializing,
        "another topology is not advanced"
    );
    store.advance(1, "h", Phase::Normal).await.unwrap();
    store.migrate().await.unwrap();
    assert_eq!(
        store.meta().await.unwrap().unwrap(),
        Meta {
            topology_phase: Phase::Normal,
            ..one
        }
    );
}

async fn a_batch_is_stored_in_order_and_read_back_both_ways(kind: Kind) {
    let (_databases, store) = initialized(kind).await;
    let batch: Vec<_> = (1..=7)
        .map(|n| {
            message(
                "7_42",
                if n % 2 == 0 { 42 } else { 7 },
                &format!("k{n}"),
                &format!("text {n}"),
            )
        })
        .collect();
    assert_eq!(
        seqs(&write(&store, &batch[..3]).await),
        [(1, false), (2, false), (3, false)]
    );
    assert_eq!(
        seqs(&write(&store, &batch[3..]).await),
        [(4, false), (5, false), (6, false), (7, false)]
    );
    for (range, limit, expected) in [
        (Range::Newest, 3, vec![5, 6, 7]),
        (Range::Newest, 100, (1..=7).collect()),
        (Range::Before(Seq::new(5)), 2, vec![3, 4]),
        (Range::Before(Seq::new(1)), 2, vec![]),
        (Range::After(Seq::new(2)), 2, vec![3, 4]),
        (Range::After(Seq::new(7)), 2, vec![]),
        (Range::After(Seq::new(u64::MAX)), 2, vec![]),
        (Range::Before(Seq::new(u64::MAX)), 2, vec![6, 7]),
    ] {
        let page = store
            .page(&identity(), dialog("7_42"), range, limit)
            .await
            .unwrap();
        assert_eq!(
            page.messages
                .iter()
                .map(|m| m.seq.get())
                .collect::<Vec<u64>>(),
            expected,
            "{range:?}"
        );
        assert_eq!(
            (page.last_seq.get(), page.slot.unwrap().state),
            (7, SlotState::Owner)
        );
        for message in page.messages {
            assert_eq!(message.text, format!("text {}", message.seq));
            assert_eq!(
                message.author.get(),
                if message.seq.get() % 2 == 0 { 42 } else { 7 }
            );
            assert_eq!(message.key.unwrap(), format!("k{}", message.seq));
        }
    }
    let none = store
        .page(&identity(), dialog("8_9"), Range::Newest, 5)
        .await
        .unwrap();
    assert!(none.messages.is_empty() && none.last_seq == Seq::ZERO && none.slot.is_some());
}

async fn a_key_is_stored_once(kind: Kind) {
    let (_databases, store) = initialized(kind).await;
    let first = message("7_42", 7, "k", "hello");
    let stored = write(&store, std::slice::from_ref(&first)).await;
    assert_eq!(seqs(&stored), [(1, false)]);
    // Alone, among others, suspected and not, with another text, by the other author, and twice in
    // one batch.
    assert_eq!(
        seqs(&write(&store, std::slice::from_ref(&first)).await),
        [(1, true)]
    );
    assert_eq!(
        seqs(
            &store
                .write(&identity(), std::slice::from_ref(&first), true)
                .await
                .unwrap()
                .written
        ),
        [(1, true)]
    );
    let mixed = [
        message("7_42", 7, "new", "a"),
        first.clone(),
        message("7_42", 42, "k", "b"),
        message("7_42", 7, "k", "other"),
        message("7_42", 7, "new", "a"),
    ];
    let written = write(&store, &mixed).await;
    assert_eq!(seqs(&written[..3]), [(2, false), (1, true), (3, false)]);
    assert_eq!(written[3], WriteOutcome::KeyReused);
    assert_eq!(seqs(&written[4..]), [(2, true)]);
    assert_eq!(
        written[1],
        match stored[0].clone() {
            WriteOutcome::Stored(place, audience) => WriteOutcome::Repeat(place, audience),
            _ => unreachable!(),
        }
    );
    // Keys that a collation would take for the same are different keys.
    let close = [
        message("7_42", 7, "K", "c"),
        message("7_42", 7, "k ", "d"),
        message("7_42", 7, "ḱ", "e"),
    ];
    assert_eq!(
        seqs(&write(&store, &close).await),
        [(4, false), (5, false), (6, false)]
    );
}

/// A draft of a batch by a term and last seqs.
fn draft(batch: &[NewMessage], term: Term, expected: &[(&str, u64)]) -> Draft {
    let terms = batch.iter().map(|message| (message.slot, term)).collect();
    let expected = expected.iter().map(|(name, seq)| {
        let last_seq = Seq::new(*seq);
        let room = None;
        (dialog(name), Expected { last_seq, room })
    });
    Draft::new(batch, terms, expected.collect())
}

/// All rows of these dialogs in the database, and their last seqs.
async fn standing(store: &Arc<dyn Database>, names: &[&str]) -> Vec<(u64, Vec<u64>)> {
    let mut standing = Vec::new();
    for name in names {
        let ours = identity();
        let page = store.page(&ours, dialog(name), Range::Newest, 100);
        let page = page.await.unwrap();
        let seqs = page.messages.iter().map(|message| message.seq.get());
        standing.push((page.last_seq.get(), seqs.collect()));
    }
    standing
}

/// Where a mark is, and whether it has moved.
fn at_seq(seq: u64, moved: bool) -> MarkOutcome {
    let seq = Seq::new(seq);
    MarkOutcome::At { seq, moved }
}

async fn mark(store: &Arc<dyn Database>, name: &str, who: u64, seq: u64) -> MarkOutcome {
    let mark = NewMark::new(dialog(name), user(who), Seq::new(seq));
    let marked = store.mark_read(&identity(), &[mark]).await.unwrap();
    assert_eq!(marked.len(), 1);
    marked[0]
}

/// How far a user has read in the only dialog of a slot, by its row.
async fn read_by(store: &Arc<dyn Database>, who: &ShardIdentity, slot: Slot, user: u64) -> u64 {
    let rows = store.dialog_rows(who, slot).await.unwrap();
    let mut members = rows[0].members.iter();
    let member = members.find(|member| member.user.get() == user).unwrap();
    member.read_seq.get()
}

async fn a_draft_is_stored_as_it_is_or_not_at_all(kind: Kind) {
    let (_databases, store) = initialized(kind).await;
    let append = async |batch: &[NewMessage], draft| {
        let appended = store.append(&identity(), batch, draft).await.unwrap();
        match appended {
            Appended::Stored { written, .. } => Ok(seqs(&written)),
            Appended::Mismatch(mismatch) => Err(mismatch),
        }
    };
    let first = [
        message("7_42", 7, "a", "one"),
        message("7_9", 9, "a", "two"),
    ];
    let receipt = store.write(&identity(), &first, false).await.unwrap();
    assert_eq!(receipt.terms.len(), 2);
    let term = receipt.terms[0].1;

    // Remembered, not remembered, and new, several of each, in one.
    let batch = [
        message("7_42", 42, "b", "x"),
        message("7_9", 7, "b", "x"),
        message("5_7", 7, "b", "x"),
        message("7_42", 7, "c", "'; DROP TABLE messages; --"),
        message("5_7", 5, "c", "x"),
        message("7_9", 9, "c", "x"),
        message("7_9", 9, "d", "x"),
        message("7_42", 42, "b", "x"),
    ];
    let stored = append(&batch, draft(&batch, term, &[("7_42", 1)])).await;
    let expected = [2, 2, 1, 3, 2, 3, 4].map(|seq| (seq, false));
    assert_eq!(stored, Ok([&expected[..], &[(2, true)]].concat()));
    let whole = standing(&store, &["7_42", "7_9", "5_7"]).await;
    assert_eq!(
        whole,
        [(3, vec![1, 2, 3]), (4, vec![1, 2, 3, 4]), (2, vec![1, 2])]
    );
    let inbox = store.inbox(&identity(), user(5), None, 10).await.unwrap();
    assert_eq!(inbox.rows.len(), 1, "its members are known");
    assert_eq!(inbox.rows[0].unread, 1);

    // All remembered, with different steps.
    let more = [
        message("7_42", 7, "e", "x"),
        message("5_7", 7, "e", "x"),
        message("5_7", 7, "f", "x"),
    ];
    let known = [("7_42", 3), ("5_7", 2)];
    let stored = append(&more, draft(&more, term, &known)).await;
    assert_eq!(stored, Ok([4, 3, 4].map(|seq| (seq, false)).to_vec()));

    // Whatever is not as it was taken to be: nothing of the batch is there.
    let before = standing(&store, &["7_42", "7_9", "5_7"]).await;
    let next = [message("7_42", 7, "g", "x"), message("5_7", 7, "g", "x")];
    let other = Term {
        number: term.number + 1,
        ..term
    };
    let repeat = [message("7_42", 7, "g", "x"), message("5_7", 7, "e", "x")];
    let (one, repeat_of_one) = (next[..1].to_vec(), [message("7_42", 7, "e", "x")]);
    let known = [("7_42", 4), ("5_7", 4)];
    for (batch, draft, mismatch) in [
        (&next[..], draft(&next, other, &known), Mismatch::Term),
        (
            &next,
            draft(&next, term, &[("7_42", 4), ("5_7", 3)]),
            Mismatch::LastSeq,
        ),
        (
            &next,
            draft(&next, term, &[("7_42", 4), ("5_7", 5)]),
            Mismatch::LastSeq,
        ),
        (&next, draft(&next, term, &[("7_42", 2)]), Mismatch::LastSeq),
        (&repeat, draft(&repeat, term, &known), Mismatch::Key),
        (&repeat, draft(&repeat, term, &[]), Mismatch::Key),
        (&one, draft(&one, other, &known[..1]), Mismatch::Term),
        (&one, draft(&one, term, &[("7_42", 3)]), Mismatch::LastSeq),
        (&one, draft(&one, term, &[("7_42", 5)]), Mismatch::LastSeq),
        (
            &repeat_of_one,
            draft(&repeat_of_one, term, &known[..1]),
            Mismatch::Key,
        ),
    ] {
        assert_eq!(append(batch, draft).await, Err(mismatch));
        assert_eq!(standing(&store, &["7_42", "7_9", "5_7"]).await, before);
    }
    let wrong = ShardIdentity {
        cluster_id: "c2".into(),
        ..identity()
    };
    let appended = store
        .append(&wrong, &next, draft(&next, term, &known))
        .await;
    assert_eq!(appended, Ok(Appended::Mismatch(Mismatch::Term)));
    let appended = store
        .append(&wrong, &one, draft(&one, term, &known[..1]))
        .await;
    assert_eq!(appended, Ok(Appended::Mismatch(Mismatch::Term)));
    let stored = append(&next, draft(&next, term, &known)).await;
    assert_eq!(stored, Ok([5, 5].map(|seq| (seq, false)).to_vec()));
    let last = [message("7_42", 7, "h", "'; ROLLBACK; --")];
    let stored = append(&last, draft(&last, term, &[("7_42", 5)])).await;
    assert_eq!(stored, Ok(vec![(6, false)]));
}

/// The longest texts that settings allow, as many as a transaction takes, in both ways to store
/// them.
async fn a_transaction_of_the_largest_size_is_stored(kind: Kind) {
    let (_databases, store) = initialized(kind).await;
    let text = "\u{1f980}".repeat(16_383);
    let count = store::TRANSACTION_BYTES / store::size(&text);
    let long = |from: usize, key: &str| -> Vec<NewMessage> {
        let dialog = dialog("7_42");
        let keys = (from..from + count).map(|i| Key::new(format!("{key}{i}")).unwrap());
        let text = Text::new(text.clone(), 16_383).unwrap();
        keys.map(|key| NewMessage::new(dialog, user(7), key, Body::Text(text.clone())))
            .collect()
    };
    let first = long(0, "a");
    let receipt = store.write(&identity(), &first, false).await.unwrap();
    assert_eq!(receipt.written.len(), count);
    let (second, term) = (long(count, "a"), receipt.terms[0].1);
    let draft = draft(&second, term, &[("7_42", count as u64)]);
    let appended = store.append(&identity(), &second, draft).await.unwrap();
    let Appended::Stored { written, .. } = appended else {
        panic!("{appended:?}");
    };
    let seqs = seqs(&written).into_iter();
    assert!(seqs.eq((1..=count as u64).map(|i| (count as u64 + i, false))));
    let page = store
        .page(&identity(), dialog("7_42"), Range::Newest, 1)
        .await;
    assert_eq!(page.unwrap().messages[0].text, text);
}

async fn instances_that_write_at_once_share_one_dense_order(kind: Kind) {
    const SEED: u64 = 20;
    let (databases, store) = initialized(kind).await;
    let writers: Vec<_> = (0..4u64)
        .map(|w| {
            let store = open(&databases, 0);
            tokio::spawn(async move {
                let mut all = Vec::new();
                for round in 0..SEED {
                    // Every third key is common to all writers.
                    let key = |n: u64| {
                        if n.is_multiple_of(3) {
                            format!("common.{round}.{n}")
                        } else {
                            format!("{w}.{round}.{n}")
                        }
                    };
                    let batch: Vec<_> = (0..6)
                        .map(|n| {
                            message(
                                ["7_42", "7_9", "1_2"][n as usize % 3],
                                [7, 7, 1][n as usize % 3],
                                &key(n),
                                &format!("{round}.{n}"),
                            )
                        })
                        .collect();
                    loop {
                        match store.write(&identity(), &batch, false).await {
                            Ok(written) => {
                                all.extend(
                                    batch
                                        .iter()
                                        .map(|m| (m.dialog, m.key.clone()))
                                        .zip(seqs(&written.written)),
                                );
                                break;
                            }
                            Err(StoreError::Conflict(_)) => {}
                            Err(e) => panic!("{e}"),
                        }
                    }
                }
                all
            })
        })
        .collect();
    let mut answers = std::collections::BTreeMap::new();
    for writer in writers {
        for ((dialog, key), (seq, _)) in writer.await.unwrap() {
            assert_eq!(
                *answers.entry((dialog, key)).or_insert(seq),
                seq,
                "all writers get the same seq"
            );
        }
    }
    for name in ["7_42", "7_9", "1_2"] {
        let page = store
            .page(&identity(), dialog(name), Range::After(Seq::ZERO), 1000)
            .await
            .unwrap();
        let seqs: Vec<u64> = page.messages.iter().map(|m| m.seq.get()).collect();
        assert_eq!(seqs, (1..=seqs.len() as u64).collect::<Vec<_>>());
        let expected = answers.keys().filter(|(d, _)| *d == dialog(name)).count();
        assert_eq!(seqs.len(), expected);
        for m in page.messages {
            assert_eq!(
                answers[&(dialog(name), Key::new(m.key.unwrap()).unwrap())],
                m.seq.get()
            );
        }
    }
}

async fn what_is_not_owned_is_refused_and_nothing_of_it_is_written(kind: Kind) {
    let databases = Databases::new(kind, 1).await;
    let store = open(&databases, 0);
    store.migrate().await.unwrap();
    let (ours, theirs) = (message("7_42", 7, "a", "x"), message("7_9", 7, "a", "x"));
    assert_ne!(ours.slot, theirs.slot);
    let mut owned = SlotSet::empty();
    owned.insert(ours.slot);
    store.initialize(&meta(), &owned).await.unwrap();
    let written = write(&store, &[theirs.clone(), ours.clone()]).await;
    assert_eq!(written[0], WriteOutcome::NotOwner(Some(SlotState::None)));
    assert_eq!(seqs(&written[1..]), [(1, false)]);
    let sizes = store.sizes(&identity()).await.unwrap();
    assert_eq!(sizes.keys().collect::<Vec<_>>(), [&ours.slot]);
    let rows = store.dialog_rows(&identity(), ours.slot).await.unwrap();
    assert_eq!((rows.len(), rows[0].members.len()), (1, 2));
    assert_eq!(
        store.dialog_rows(&identity(), theirs.slot).await.unwrap(),
        []
    );
    let page = store
        .page(&identity(), theirs.dialog, Range::Newest, 5)
        .await
        .unwrap();
    assert_eq!(page.slot.unwrap().state, SlotState::None);
    let marked = store
        .mark_read(
            &identity(),
            &[
                NewMark::new(theirs.dialog, user(7), Seq::new(1)),
                NewMark::new(ours.dialog, user(7), Seq::new(1)),
            ],
        )
        .await
        .unwrap();
    assert_eq!(marked[0], MarkOutcome::NotOwner(Some(SlotState::None)));
    assert_eq!(
        marked[1],
        at_seq(1, true),
        "the others of its transaction move"
    );
    assert_eq!(store.slots(&identity()).await.unwrap().owned, owned);
    assert_eq!(
        store
            .inbox(&identity(), user(7), None, 5)
            .await
            .unwrap()
            .slots
            .owned,
        owned
    );
}

async fn a_database_that_is_somebody_else_is_noticed_by_every_call(kind: Kind) {
    let (_databases, store) = initialized(kind).await;
    let there = message("7_42", 42, "there", "x");
    write(&store, std::slice::from_ref(&there)).await;
    for wrong in [
        ShardIdentity {
            cluster_id: "c2".into(),
            ..identity()
        },
        ShardIdentity {
            shard_name: "shard2".into(),
            ..identity()
        },
    ] {
        let is_wrong = |e: &StoreError| matches!(e, StoreError::WrongIdentity(_));
        assert!(is_wrong(
            &store
                .write(&wrong, &[message("7_42", 7, "a", "x")], false)
                .await
                .unwrap_err()
        ));
        assert!(is_wrong(&store.slots(&wrong).await.unwrap_err()));
        assert!(is_wrong(
            &store.inbox(&wrong, user(7), None, 5).await.unwrap_err()
        ));
        assert!(is_wrong(
            &store
                .mark_read(
                    &wrong,
                    &[NewMark::new(dialog("7_42"), user(7), Seq::new(1))]
                )
                .await
                .unwrap_err()
        ));
        let page = store.page(&wrong, dialog("7_42"), Range::Newest, 5).await;
        assert!(
            page.as_ref().err().is_some_and(is_wrong) || page.is_ok_and(|page| page.slot.is_none())
        );
    }
    let read = read_by(&store, &identity(), there.slot, 7).await;
    assert_eq!(read, 0, "nothing was written");
}

async fn an_inbox_lists_dialogs_newest_first_with_their_unread(kind: Kind) {
    let (_databases, store) = initialized(kind).await;
    for (n, peer) in [9u64, 42, 100, 9].iter().enumerate() {
        let name = DialogId::between(user(7), user(*peer)).to_string();
        write(
            &store,
            &[
                message(&name, *peer, &format!("a{n}"), &format!("from {peer}")),
                message(&name, 7, &format!("b{n}"), "mine"),
            ],
        )
        .await;
    }
    write(&store, &[message("8_9", 8, "x", "not for 7")]).await;
    let inbox = store.inbox(&identity(), user(7), None, 10).await.unwrap();
    let shown: Vec<_> = inbox
        .rows
        .iter()
        .map(|row| {
            (
                row.dialog.to_string(),
                row.last.seq.get(),
                row.unread,
                row.read_seq.get(),
            )
        })
        .collect();
    assert_eq!(
        shown,
        [
            ("7_9".into(), 4, 2, 0),
            ("7_100".into(), 2, 1, 0),
            ("7_42".into(), 2, 1, 0)
        ]
    );
    assert_eq!(inbox.rows[0].last.text, "mine");

    let first = store
        .inbox(&identity(), user(7), None, 1)
        .await
        .unwrap()
        .rows;
    let below = InboxCursor {
        last_at: first[0].last_at,
        dialog: first[0].dialog,
    };
    let rest = store
        .inbox(&identity(), user(7), Some(below), 10)
        .await
        .unwrap()
        .rows;
    assert_eq!(
        rest.iter()
            .map(|row| row.dialog.to_string())
            .collect::<Vec<_>>(),
        ["7_100", "7_42"]
    );

    let many: Vec<_> = (0..120)
        .map(|n| message("7_42", 42, &format!("m{n}"), "x"))
        .collect();
    write(&store, &many).await;
    assert_eq!(
        store
            .inbox(&identity(), user(7), None, 1)
            .await
            .unwrap()
            .rows[0]
            .unread,
        100
    );
    assert_eq!(
        store
            .inbox(&identity(), user(42), None, 1)
            .await
            .unwrap()
            .rows[0]
            .unread,
        1,
        "own messages do not count"
    );
}

async fn a_read_mark_moves_forward_only_and_not_beyond_the_last_message(kind: Kind) {
    let (_databases, store) = initialized(kind).await;
    let mark = async |who: u64, seq: u64| mark(&store, "7_42", who, seq).await;
    assert_eq!(mark(7, 1).await, MarkOutcome::NoDialog);
    write(
        &store,
        &(0..5)
            .map(|n| message("7_42", 42, &format!("{n}"), "x"))
            .collect::<Vec<_>>(),
    )
    .await;
    for (asked, expected) in [
        (3, at_seq(3, true)),
        (3, at_seq(3, false)),
        (2, at_seq(3, false)),
        (0, at_seq(3, false)),
        (99, at_seq(5, true)),
        (u64::MAX, at_seq(5, false)),
        (1, at_seq(5, false)),
    ] {
        assert_eq!(mark(7, asked).await, expected, "{asked}");
    }
    assert_eq!(
        mark(42, 1).await,
        at_seq(1, true),
        "everybody has their own"
    );
    assert_eq!(mark(8, 1).await, MarkOutcome::NoDialog, "8 is not in it");
}

async fn read_marks_move_many_at_once_alone_and_with_messages(kind: Kind) {
    let (_databases, store) = initialized(kind).await;
    let batch: Vec<_> = ["7_42", "7_9", "5_7"]
        .iter()
        .flat_map(|name| (0..3).map(move |n| message(name, 7, &format!("{n}"), "x")))
        .collect();
    let receipt = store.write(&identity(), &batch, false).await.unwrap();
    let term = receipt.terms[0].1;
    let new = |name: &str, who: u64, seq: u64| NewMark::new(dialog(name), user(who), Seq::new(seq));
    let marks = [
        new("7_9", 9, 2),
        new("7_42", 42, 9),
        new("7_42", 7, 1),
        new("7_42", 9, 1),
        new("5_8", 5, 1),
    ];
    let expected = [
        at_seq(2, true),
        at_seq(3, true),
        at_seq(1, true),
        MarkOutcome::NoDialog,
        MarkOutcome::NoDialog,
    ];
    let marked = store.mark_read(&identity(), &marks).await.unwrap();
    assert_eq!(marked, expected);
    let unread = async |who: u64| {
        let inbox = store.inbox(&identity(), user(who), None, 10).await.unwrap();
        assert!(!inbox.rows.is_empty());
        inbox.rows.iter().map(|row| row.unread).sum::<u32>()
    };
    assert_eq!((unread(9).await, unread(42).await), (1, 0));

    // With messages: of a dialog that gets one in the same batch up to that one, of others as they
    // are; or not at all.
    let append = async |batch: &[NewMessage], draft: Draft, marks: &[NewMark]| {
        let mut draft = draft;
        draft
            .terms
            .extend(marks.iter().map(|mark| (mark.slot, term)));
        draft.marks = marks.to_vec();
        store.append(&identity(), batch, draft).await.unwrap()
    };
    let marks = [new("7_42", 42, 9), new("7_9", 9, 1), new("5_7", 5, 2)];
    for known in [&[("7_42", 3)][..], &[]] {
        let next = [message("7_42", 7, &format!("more {}", known.len()), "x")];
        let last = 5 - known.len() as u64;
        let stored = append(&next, draft(&next, term, known), &marks).await;
        let Appended::Stored {
            written, marked, ..
        } = stored
        else {
            panic!("{stored:?}");
        };
        assert_eq!(seqs(&written), [(last, false)]);
        assert_eq!(
            marked,
            [at_seq(last, true), at_seq(2, false), at_seq(2, last == 4)]
        );
    }
    assert_eq!((unread(9).await, unread(5).await), (1, 1));
    let next = [message("7_42", 7, "late", "x")];
    let stored = append(
        &next,
        draft(&next, term, &[("7_42", 4)]),
        &[new("5_7", 5, 3)],
    )
    .await;
    assert_eq!(stored, Appended::Mismatch(Mismatch::LastSeq));
    assert_eq!(unread(5).await, 1, "nothing of it is there");
}

async fn a_text_comes_back_byte_for_byte(kind: Kind) {
    let (_databases, store) = initialized(kind).await;
    let long = "\u{1F468}\u{200D}\u{1F469}".repeat(1333);
    let texts = [
        " leading and trailing ",
        "'; DROP TABLE messages; --",
        "\\",
        "\\'",
        "\"",
        "\u{0}",
        "a\u{0}b",
        "\r\n\t",
        "\u{feff}bom",
        "é",
        "e\u{301}",
        "𝕏 🏳️‍🌈 \u{202e}rtl",
        "\u{fffd}\u{ffff}",
        "%s %n ${HOME} `id`",
        "x'41'",
        "/* */",
        long.as_str(),
    ];
    let batch: Vec<_> = texts
        .iter()
        .enumerate()
        .map(|(n, text)| message("7_42", 7, &format!("ключ'\\{n}"), text))
        .collect();
    write(&store, &batch).await;
    let page = store
        .page(&identity(), dialog("7_42"), Range::After(Seq::ZERO), 100)
        .await
        .unwrap();
    for ((n, text), message) in texts.iter().enumerate().zip(&page.messages) {
        assert_eq!(message.text.as_bytes(), text.as_bytes());
        assert_eq!(message.key.as_deref(), Some(format!("ключ'\\{n}").as_str()));
    }
    assert_eq!(
        seqs(&write(&store, &batch).await)
            .iter()
            .filter(|(_, repeat)| *repeat)
            .count(),
        texts.len()
    );
    assert_eq!(store.counts().await.unwrap().messages, texts.len() as u64);
}

/// Two shards that go by one topology; the first owns everything.
struct Pair {
    _databases: Databases,
    a: Arc<dyn Database>,
    b: Arc<dyn Database>,
    topology_ref: TopologyRef,
}

fn of(name: &str) -> ShardIdentity {
    ShardIdentity {
        shard_name: name.into(),
        ..identity()
    }
}

fn topology(more: &str) -> Topology {
    let text = format!(
        "[[shard]]\nname = \"shard1\"\nurl = \"sqlite:a\"\n[[shard]]\nname = \"shard2\"\nurl = \"sqlite:b\"\n{more}"
    );
    ShardsFile::parse(&text, &|_| None).unwrap().topology()
}

fn meta_with(topology: &Topology, version: u64, phase: Phase) -> Meta {
    let mut topology = topology.clone();
    if version > 1 {
        topology.add_ancestor(1, &self::topology("").hash());
    }
    Meta {
        topology_version: version,
        topology_phase: phase,
        topology_hash: topology.hash(),
        topology: topology.to_json(),
        ..meta()
    }
}

async fn pair(kind: Kind) -> Pair {
    let databases = Databases::new(kind, 2).await;
    let (a, b) = (open(&databases, 0), open(&databases, 1));
    let first = meta_with(&topology(""), 1, Phase::Normal);
    for (store, name, owned) in [
        (&a, "shard1", all_slots()),
        (&b, "shard2", SlotSet::empty()),
    ] {
        let meta = Meta {
            shard_name: name.into(),
            ..first.clone()
        };
        store.migrate().await.unwrap();
        store.initialize(&meta, &owned).await.unwrap();
    }
    Pair {
        _databases: databases,
        a,
        b,
        topology_ref: first.topology_ref(),
    }
}

async fn a_document_is_taken_forward_only_and_fences_who_was_declared_down(kind: Kind) {
    let Pair {
        _databases,
        a,
        topology_ref,
        ..
    } = pair(kind).await;
    let (ours, slot) = (identity(), Slot::of(dialog("7_42")));
    let weighed = topology("weight = 3\n");
    let (second, judging) = (
        meta_with(&weighed, 2, Phase::Normal),
        meta_with(&weighed, 2, Phase::Failover),
    );
    let accept = async |new: &Meta| a.accept(&ours, new).await.unwrap();
    assert_eq!(accept(&judging).await, Acceptance::Accept { fence: false });
    assert_eq!(accept(&judging).await, Acceptance::There);
    let claim = Step::Claim {
        term: 9,
        generation: 1,
        missing: BTreeSet::new(),
    };
    let seal = Step::Seal {
        owned_since: 1,
        to: "shard2".into(),
        term: 2,
    };
    let refused = a.step(&ours, &judging.topology_ref(), slot, &seal).await;
    assert!(
        matches!(refused, Err(StoreError::OtherTopology(_))),
        "no slot moves during a failover: {refused:?}"
    );
    let owned = a
        .step(&ours, &judging.topology_ref(), slot, &claim)
        .await
        .unwrap();
    assert!(owned.is_err(), "it is owned already");
    assert_eq!(accept(&second).await, Acceptance::Accept { fence: false });
    assert!(
        matches!(accept(&judging).await, Acceptance::Newer(_)),
        "phases go forward"
    );
    assert!(matches!(
        accept(&meta_with(&topology(""), 2, Phase::Normal)).await,
        Acceptance::Conflict(_)
    ));
    assert!(matches!(
        accept(&meta_with(&topology(""), 1, Phase::Normal)).await,
        Acceptance::Newer(_)
    ));
    assert_eq!(a.meta().await.unwrap().unwrap(), second);

    // What was decided by an earlier topology is refused, and read by it, it is no evidence.
    let late = a.step(&ours, &topology_ref, slot, &seal).await;
    assert_eq!(late, Err(StoreError::OtherTopology(second.topology_ref())));
    let late = a.rows(&ours, Some(&topology_ref), Some(slot)).await;
    assert_eq!(late, Err(StoreError::OtherTopology(second.topology_ref())));
    let rows = a
        .rows(&ours, Some(&second.topology_ref()), None)
        .await
        .unwrap();
    assert_eq!(rows.len(), SLOTS);
    assert!(rows.iter().all(|row| row.state == SlotState::Owner));

    let stray = meta_with(&topology(""), 3, Phase::Normal);
    assert!(
        matches!(accept(&stray).await, Acceptance::Conflict(_)),
        "it was made without knowing of the one that is there"
    );
    let mut next = topology("");
    next.add_ancestor(2, &second.topology_hash);
    let next = meta_with(&next, 3, Phase::Normal);
    assert_eq!(accept(&next).await, Acceptance::Accept { fence: false });

    let mut lost = topology("");
    lost.shards.get_mut("shard1").unwrap().down_generation = 1;
    let fourth = meta_with(&lost, 4, Phase::Normal);
    assert_eq!(accept(&fourth).await, Acceptance::Accept { fence: true });
    assert_eq!(accept(&fourth).await, Acceptance::There);
    let rows = a.rows(&ours, None, None).await.unwrap();
    assert!(rows.iter().all(|row| row.state == SlotState::Fenced));
    let written = write(&a, &[message("7_42", 7, "a", "x")]).await;
    assert_eq!(written, [WriteOutcome::NotOwner(Some(SlotState::Fenced))]);
}

async fn a_slot_moves_step_by_step_and_takes_no_other_step(kind: Kind) {
    let Pair {
        _databases,
        a,
        b,
        topology_ref,
    } = pair(kind).await;
    let (one, two, slot) = (identity(), of("shard2"), Slot::of(dialog("7_42")));
    let batch: Vec<_> = (1..=5)
        .map(|n| message("7_42", 7, &format!("k{n}"), "x"))
        .collect();
    write(&a, &batch).await;
    a.mark_read(&one, &[NewMark::new(dialog("7_42"), user(42), Seq::new(3))])
        .await
        .unwrap();
    let at = async |store: &Arc<dyn Database>, who: &ShardIdentity, step: &Step| {
        store.step(who, &topology_ref, slot, step).await.unwrap()
    };
    let (from, to) = ("shard1".to_owned(), "shard2".to_owned());
    let prepare = |term| Step::Prepare {
        from: from.clone(),
        term,
    };
    assert!(
        at(&b, &two, &prepare(0)).await.is_err(),
        "no term is below another"
    );
    assert!(
        at(&a, &one, &prepare(2)).await.is_err(),
        "it is owned there"
    );
    let incoming = at(&b, &two, &prepare(2)).await.unwrap();
    assert!(incoming.is_incoming("shard1", 2));
    assert!(
        at(&b, &two, &prepare(3)).await.is_err(),
        "an attempt is not shared"
    );

    let rows = a.dialog_rows(&one, slot).await.unwrap();
    let from_the_start = [(dialog("7_42"), Seq::ZERO)];
    let messages = a
        .messages_of(&one, slot, &from_the_start, 100)
        .await
        .unwrap();
    assert_eq!((rows.len(), messages.len()), (1, 5));
    let part = |upto: usize| Chunk {
        messages: messages[..upto].to_vec(),
        dialogs: vec![DialogRow {
            last_seq: Seq::new(upto as u64),
            ..rows[0].clone()
        }],
    };
    for (from, term) in [("shard1", 3), ("shard1", 1), ("shard3", 2)] {
        let refused = b
            .copy_in(&two, &topology_ref, slot, from, term, &part(5))
            .await
            .unwrap();
        assert!(refused.is_err(), "{from} {term}");
    }
    assert_eq!(b.dialog_rows(&two, slot).await.unwrap(), []);
    // In any order and any number of times: nothing goes backwards.
    for upto in [2, 5, 3, 5] {
        b.copy_in(&two, &topology_ref, slot, "shard1", 2, &part(upto))
            .await
            .unwrap()
            .unwrap();
    }
    assert_eq!(b.dialog_rows(&two, slot).await.unwrap(), rows);
    assert_eq!(
        b.messages_of(&two, slot, &from_the_start, 100)
            .await
            .unwrap(),
        messages
    );
    assert_eq!(
        b.messages_of(&two, slot, &[(dialog("7_42"), Seq::new(2))], 2)
            .await
            .unwrap(),
        messages[2..4]
    );

    let seal = |owned_since| Step::Seal {
        owned_since,
        to: to.clone(),
        term: 2,
    };
    assert!(
        at(&a, &one, &seal(0)).await.is_err(),
        "not as it was when the copy began"
    );
    let sealed = at(&a, &one, &seal(1)).await.unwrap();
    assert!(sealed.is_sealed("shard2", 2));
    assert_eq!(
        write(&a, &[message("7_42", 7, "k6", "x")]).await,
        [WriteOutcome::NotOwner(Some(SlotState::Sealed))]
    );
    let view = a
        .page(&one, dialog("7_42"), Range::Newest, 5)
        .await
        .unwrap()
        .slot
        .unwrap();
    assert_eq!(
        (view.state, view.peer.as_deref()),
        (SlotState::Sealed, Some("shard2"))
    );
    let holding = a.slots(&one).await.unwrap();
    assert!(holding.sealed.contains(slot) && !holding.owned.contains(slot));

    let activate = Step::Activate {
        from: from.clone(),
        term: 2,
        generation: 0,
        history: sealed.history,
    };
    let owner = at(&b, &two, &activate).await.unwrap();
    assert_eq!(
        (owner.state, owner.term, owner.activated),
        (SlotState::Owner, 2, 2)
    );
    assert!(at(&b, &two, &activate).await.is_err(), "once");
    let release = Step::Release {
        to: to.clone(),
        term: 2,
    };
    let released = at(&a, &one, &release).await.unwrap();
    assert_eq!((released.state, released.term), (SlotState::None, 2));
    let unseal = Step::Unseal {
        to: to.clone(),
        term: 2,
        new_term: 3,
    };
    assert!(at(&a, &one, &unseal).await.is_err());

    // The new owner continues at the old one's last seq, and has its keys.
    let there = [
        message("7_42", 7, "k5", "x"),
        message("7_42", 42, "k6", "x"),
    ];
    let written = b.write(&two, &there, true).await.unwrap();
    assert_eq!(seqs(&written.written), [(5, true), (6, false)]);
    let marked = b
        .mark_read(&two, &[NewMark::new(dialog("7_42"), user(42), Seq::new(1))])
        .await
        .unwrap();
    assert_eq!(marked, [at_seq(3, false)]);

    // The rows that are left at the source are no longer its own to write to.
    let marked = a
        .mark_read(&one, &[NewMark::new(dialog("7_42"), user(42), Seq::new(5))])
        .await
        .unwrap();
    assert_eq!(marked, [MarkOutcome::NotOwner(Some(SlotState::None))]);
    assert_eq!(read_by(&a, &one, slot, 42).await, 3);

    // What is left is seen, kept for a while, and then goes; and nothing comes back before it has
    // gone.
    assert_eq!(a.leftovers(&one, Duration::ZERO).await.unwrap(), [slot]);
    let minute = Duration::from_secs(60);
    assert_eq!(a.leftovers(&one, minute).await.unwrap(), [], "too early");
    assert_eq!(b.leftovers(&two, Duration::ZERO).await.unwrap(), []);
    let back = Step::Prepare { from: to, term: 3 };
    assert!(at(&a, &one, &back).await.is_err());
    let (hour, now) = (Duration::from_secs(3600), Duration::ZERO);
    assert_eq!(
        a.purge(&one, slot, hour, 100).await.unwrap(),
        PurgeOutcome::TooEarly
    );
    assert_eq!(
        a.purge(&one, slot, now, 3).await.unwrap(),
        PurgeOutcome::Some(3)
    );
    assert_eq!(
        a.leftovers(&one, Duration::ZERO).await.unwrap(),
        [slot],
        "half of it"
    );
    assert_eq!(
        a.purge(&one, slot, now, 3).await.unwrap(),
        PurgeOutcome::All
    );
    assert_eq!(
        b.purge(&two, slot, now, 3).await.unwrap(),
        PurgeOutcome::InUse
    );
    assert_eq!(a.leftovers(&one, Duration::ZERO).await.unwrap(), []);
    assert!(a.sizes(&one).await.unwrap().is_empty());
    let size = SlotSize {
        dialogs: 1,
        messages: 6,
        bytes: 6,
    };
    assert_eq!(b.sizes(&two).await.unwrap()[&slot], size);
    assert!(at(&a, &one, &back).await.is_ok());
    let cancel = Step::Cancel {
        from: "shard2".into(),
        term: 3,
    };
    assert_eq!(at(&a, &one, &cancel).await.unwrap().state, SlotState::None);
}

async fn what_a_lost_shard_held_comes_in_once_and_in_its_place(kind: Kind) {
    let Pair {
        _databases,
        a,
        b,
        topology_ref,
    } = pair(kind).await;
    let (one, two, slot) = (identity(), of("shard2"), Slot::of(dialog("7_42")));
    // The lost shard has 1 to 4. The owner has 1 and 2 of an earlier stay, 4 under another seq, and
    // one of its own.
    let lost: Vec<_> = (1..=4)
        .map(|n| message("7_42", 7, &format!("k{n}"), &format!("text {n}")))
        .collect();
    write(&a, &lost).await;
    a.mark_read(&one, &[NewMark::new(dialog("7_42"), user(42), Seq::new(4))])
        .await
        .unwrap();
    let from_the_start = [(dialog("7_42"), Seq::ZERO)];
    let messages = a
        .messages_of(&one, slot, &from_the_start, 100)
        .await
        .unwrap();
    let rows = a.dialog_rows(&one, slot).await.unwrap();
    let prepare = Step::Prepare {
        from: "shard1".into(),
        term: 2,
    };
    b.step(&two, &topology_ref, slot, &prepare)
        .await
        .unwrap()
        .unwrap();
    let part = Chunk {
        messages: messages[..2].to_vec(),
        dialogs: vec![DialogRow {
            last_seq: Seq::new(2),
            ..rows[0].clone()
        }],
    };
    b.copy_in(&two, &topology_ref, slot, "shard1", 2, &part)
        .await
        .unwrap()
        .unwrap();
    let judging = meta_with(&topology("weight = 2\n"), 2, Phase::Failover);
    b.accept(&two, &judging).await.unwrap();
    let claim = Step::Claim {
        term: 3,
        generation: 1,
        missing: BTreeSet::from(["shard1".to_owned()]),
    };
    b.step(&two, &judging.topology_ref(), slot, &claim)
        .await
        .unwrap()
        .unwrap();
    let normal = meta_with(&topology("weight = 2\n"), 2, Phase::Normal);
    b.accept(&two, &normal).await.unwrap();
    let topology_ref = normal.topology_ref();
    let holding = b.slots(&two).await.unwrap();
    assert_eq!(holding.missing_from, BTreeSet::from(["shard1".to_owned()]));
    let inbox = b.inbox(&two, user(7), None, 5).await.unwrap();
    assert_eq!(inbox.slots, holding);
    let view = b
        .page(&two, dialog("7_42"), Range::Newest, 5)
        .await
        .unwrap()
        .slot
        .unwrap();
    assert!(!view.complete);
    let since = [lost[3].clone(), message("7_42", 42, "own", "of its own")];
    let first = 1 << 40;
    let term = |number, generation| Term { number, generation };
    let stale = draft(&since, term(2, 0), &[("7_42", 2)]);
    let appended = b.append(&two, &since, stale).await;
    assert_eq!(appended, Ok(Appended::Mismatch(Mismatch::Term)));
    let appended = b.append(&two, &since, draft(&since, term(3, 1), &[])).await;
    let Ok(Appended::Stored { written, .. }) = appended else {
        panic!("{appended:?}");
    };
    assert_eq!(seqs(&written), [(first + 1, false), (first + 2, false)]);

    let whole = Chunk {
        messages: messages.clone(),
        dialogs: rows.clone(),
    };
    let mut wrong = whole.clone();
    wrong.messages[1].author = user(42);
    let refused = b.merge_in(&two, &topology_ref, slot, &wrong).await;
    assert!(
        matches!(refused, Err(StoreError::Refused(_))),
        "{refused:?}"
    );
    let log = async || {
        b.messages_of(&two, slot, &from_the_start, 100)
            .await
            .unwrap()
    };
    assert_eq!(log().await.len(), 4, "nothing of it is there");
    for _ in 0..2 {
        b.merge_in(&two, &topology_ref, slot, &whole)
            .await
            .unwrap()
            .unwrap();
        let log = log().await;
        let places: Vec<_> = log.iter().map(|message| message.seq.get()).collect();
        assert_eq!(places, [1, 2, 3, 4, first + 1, first + 2]);
        assert_eq!(log[..3], messages[..3]);
        assert_eq!(
            (log[3].duplicate_of, &log[3].key),
            (Some(Seq::new(first + 1)), &None)
        );
        assert_eq!(log[3].text, "text 4");
    }
    let head = &b.dialog_rows(&two, slot).await.unwrap()[0];
    assert_eq!(head.last_seq.get(), first + 2);
    assert_eq!(head.members[1].read_seq, Seq::new(4));
    let row = &b.rows(&two, None, Some(slot)).await.unwrap()[0];
    assert!(
        row.term > 3,
        "a copy that was made before is not whole: {row:?}"
    );
    let heal = Step::Heal {
        shard: "shard1".into(),
    };
    b.step(&two, &topology_ref, slot, &heal)
        .await
        .unwrap()
        .unwrap();
    assert!(b.slots(&two).await.unwrap().missing_from.is_empty());
    let other = a.merge_in(&one, &topology_ref, slot, &whole).await;
    assert!(
        matches!(other, Err(StoreError::OtherTopology(_))),
        "{other:?}"
    );
}

async fn one_at_a_time_has_the_turn(kind: Kind) {
    let (databases, store) = initialized(kind).await;
    let other = open(&databases, 0);
    let mut turn = store
        .try_lock_coordinator()
        .await
        .unwrap()
        .expect("the lock is free");
    turn.keep().await.unwrap();
    // SQLite files belong to one process, which needs no turn.
    let taken = other.try_lock_coordinator().await.unwrap();
    assert_eq!(taken.is_some(), kind == Kind::Sqlite);
    if kind == Kind::Memory {
        return; // Its servers take a turn away after a time only, which is what simulations are about.
    }
    if let Some(address) = databases.url(0).strip_prefix("mysql://root@") {
        // Every instance asks every second: that opens no more connections than the pool of reads
        // has.
        let address = address.split('/').next().unwrap().to_owned();
        let proxy = Proxy::to(address).await;
        let url = databases.url_through(0, proxy.port);
        let settings = Settings::from_toml("").unwrap().store;
        let runtime = tokio::runtime::Handle::current();
        let waiting: Arc<dyn Database> =
            Arc::new(MysqlStore::new(&url, &settings, runtime).unwrap());
        for _ in 0..50 {
            assert!(waiting.try_lock_coordinator().await.unwrap().is_none());
        }
        let opened = proxy.connections();
        assert!((1..=12).contains(&opened), "{opened} connections");
    }
    drop((turn, taken));
    testkit::until("the turn is free", async || {
        other.try_lock_coordinator().await.unwrap()
    })
    .await;
}

/// Another transaction holds the lock of a slot for longer than a transaction waits: the error is
/// the same wherever in a text of several statements it happens, and repeating the transaction
/// later helps.
async fn a_lock_that_is_held_is_a_conflict_and_nothing_else(kind: Kind) {
    let Pair {
        _databases: databases,
        a,
        topology_ref,
        ..
    } = pair(kind).await;
    let first = message("7_42", 7, "a", "x");
    write(&a, std::slice::from_ref(&first)).await;
    let next = message("7_42", 7, "b", "x");
    let step = Step::Seal {
        owned_since: 1,
        to: "shard2".into(),
        term: 2,
    };
    let mut conn = mysql_async::Conn::from_url(databases.url(0)).await.unwrap();
    for (row, on_steps) in [
        (format!("slots WHERE slot = {}", first.slot), true),
        ("meta WHERE id = 1".to_owned(), true),
        ("dialogs WHERE dialog = '7_42'".to_owned(), false),
    ] {
        let held = format!("START TRANSACTION; SELECT * FROM {row} FOR UPDATE");
        conn.query_drop(held).await.unwrap();
        let conflict =
            |e: StoreError| assert!(matches!(e, StoreError::Conflict(_)), "{row}: {e:?}");
        if row.starts_with("meta") {
            // The data plane asks no topology.
        } else {
            conflict(
                a.write(&identity(), std::slice::from_ref(&next), false)
                    .await
                    .unwrap_err(),
            );
        }
        if on_steps {
            conflict(
                a.step(&identity(), &topology_ref, first.slot, &step)
                    .await
                    .unwrap_err(),
            );
            let other = meta_with(&topology("weight = 3\n"), 2, Phase::Normal);
            if row.starts_with("meta") {
                conflict(a.accept(&identity(), &other).await.unwrap_err());
                conflict(
                    a.rows(&identity(), Some(&topology_ref), None)
                        .await
                        .unwrap_err(),
                );
            }
        }
        conn.query_drop("ROLLBACK").await.unwrap();
    }
    conn.disconnect().await.unwrap();
    assert_eq!(seqs(&write(&a, &[next]).await), [(2, false)]);
    a.step(&identity(), &topology_ref, first.slot, &step)
        .await
        .unwrap()
        .unwrap();
}

mod held_locks {
    use super::Kind;

    #[tokio::test(flavor = "multi_thread")]
    async fn mysql() {
        super::a_lock_that_is_held_is_a_conflict_and_nothing_else(Kind::Mysql).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn mariadb() {
        super::a_lock_that_is_held_is_a_conflict_and_nothing_else(Kind::Mariadb).await;
    }
}

/// A page costs what is on it, wherever it is in however long a dialog, whatever the optimizer
/// believes; and so do the first page of an inbox, a part of a move, repeats, messages, read marks
/// and rows.
async fn a_page_reads_no_more_rows_than_are_on_it(kind: Kind) {
    const LENGTH: u64 = 4000;
    const PAGE: u32 = 50;
    let (databases, store) = initialized(kind).await;
    for part in (1..=LENGTH).collect::<Vec<_>>().chunks(500) {
        let batch: Vec<_> = part
            .iter()
            .map(|n| message("7_42", 42, &format!("{n}"), "x"))
            .collect();
        write(&store, &batch).await;
    }
    let mut conn = mysql_async::Conn::from_url(databases.url(0)).await.unwrap();
    if kind == Kind::Mariadb {
        conn.query_drop("SET GLOBAL userstat = 1").await.unwrap();
    }
    lie(&mut conn).await;
    for range in [
        Range::Newest,
        Range::Before(Seq::new(LENGTH)),
        Range::Before(Seq::new(LENGTH / 2)),
        Range::Before(Seq::new(60)),
        Range::After(Seq::ZERO),
        Range::After(Seq::new(LENGTH / 2)),
        Range::After(Seq::new(LENGTH - 60)),
    ] {
        let before = rows_read(&mut conn, kind, "messages").await;
        let page = store.page(&identity(), dialog("7_42"), range, PAGE).await;
        let read = rows_read(&mut conn, kind, "messages").await - before;
        assert_eq!(page.unwrap().messages.len(), PAGE as usize);
        assert!(
            (u64::from(PAGE)..=u64::from(PAGE) + 2).contains(&read),
            "{range:?}: {read} rows"
        );
    }
    // What a move reads, of one dialog and of the end of one and the beginning of another.
    let slot = Slot::of(dialog("7_42"));
    let mut others = (100..).map(|with| dialog(&format!("9_{with}")));
    let pair = others.find(|other| Slot::of(*other) == slot).unwrap();
    write(&store, &[message(&pair.to_string(), 9, "a", "x")]).await;
    for (above, rows) in [
        (vec![(dialog("7_42"), Seq::new(LENGTH / 2))], PAGE),
        (
            vec![(dialog("7_42"), Seq::new(LENGTH - 20)), (pair, Seq::ZERO)],
            21,
        ),
    ] {
        let before = rows_read(&mut conn, kind, "messages").await;
        let part = store.messages_of(&identity(), slot, &above, PAGE).await;
        let read = rows_read(&mut conn, kind, "messages").await - before;
        assert_eq!(part.unwrap().len(), rows as usize);
        assert!(
            (u64::from(rows)..=u64::from(rows) + 3).contains(&read),
            "above {above:?}: {read} rows"
        );
    }

    // Messages that were sent before are found by their keys.
    for (keys, most) in [(&[9, 2000, 3990][..], 9), (&[2000], 3)] {
        let repeats: Vec<_> = keys
            .iter()
            .map(|key| message("7_42", 42, &key.to_string(), "x"))
            .collect();
        let before = rows_read(&mut conn, kind, "messages").await;
        let written = store.write(&identity(), &repeats, true).await.unwrap();
        let read = rows_read(&mut conn, kind, "messages").await - before;
        let found: Vec<_> = keys.iter().map(|key| (*key, true)).collect();
        assert_eq!(seqs(&written.written), found);
        let range = keys.len() as u64..=most;
        assert!(range.contains(&read), "{} keys: {read} rows", keys.len());
    }

    // Of 600 dialogs, twelve an hour: a page of ten takes the hours that hold it.
    let others: Vec<_> = (1000..1600)
        .map(|with| message(&format!("7_{with}"), 7, "a", "x"))
        .collect();
    write(&store, &others).await;
    let hour = Timestamp::HOUR;
    conn.query_drop(format!(
        "UPDATE dialogs SET last_at = last_at - (CAST(SUBSTRING(dialog, 3) AS SIGNED) - 1000) DIV 12 * {hour} WHERE dialog LIKE '7\\_1___'"
    ))
    .await
    .unwrap();
    conn.query_drop(format!(
        "UPDATE members m JOIN dialogs d USING (slot, dialog) SET m.last_hour = d.last_at DIV {hour}"
    ))
    .await
    .unwrap();
    lie(&mut conn).await;
    // One key is another case than several: MariaDB makes an equality of a list of one.
    for names in [&["7_1000", "7_1300", "7_1599"][..], &["7_1000"]] {
        let key = format!("of {}", names.len());
        let named = names.iter();
        let sent: Vec<_> = named
            .clone()
            .map(|name| message(name, 7, &key, "x"))
            .collect();
        let marks: Vec<_> = named
            .clone()
            .map(|name| NewMark::new(dialog(name), user(7), Seq::new(1)))
            .collect();
        for (what, most_of_a_key) in [("write", 13), ("mark", 13), ("rows", 3)] {
            let mut reads = Vec::new();
            for table in ["members", "dialogs"] {
                reads.push((table, rows_read(&mut conn, kind, table).await));
            }
            match what {
                "write" => drop(store.write(&identity(), &sent, true).await.unwrap()),
                "mark" => drop(store.mark_read(&identity(), &marks).await.unwrap()),
                _ => {
                    let of = LastSeqsOf::Dialogs {
                        dialogs: named.clone().map(|name| dialog(name)).collect(),
                        users: vec![user(7)],
                    };
                    drop(store.last_seqs(&identity(), &of).await.unwrap());
                }
            }
            for (table, before) in reads {
                let read = rows_read(&mut conn, kind, table).await - before;
                let most = most_of_a_key * names.len() as u64;
                assert!(
                    read <= most,
                    "{what} of {}: {read} rows of {table}",
                    names.len()
                );
            }
        }
    }
    let mut before = Vec::new();
    for table in ["members", "dialogs", "messages"] {
        before.push(rows_read(&mut conn, kind, table).await);
    }
    let part = store.inbox(&identity(), user(7), None, 10).await.unwrap();
    assert_eq!(part.rows.len(), 10);
    for (table, before) in ["members", "dialogs", "messages"].into_iter().zip(before) {
        let read = rows_read(&mut conn, kind, table).await - before;
        assert!((10..=100).contains(&read), "{table}: {read} rows");
    }
    conn.disconnect().await.unwrap();
}

/// Makes the optimizer believe that there is next to nothing, as in tables that were small a moment
/// ago.
async fn lie(conn: &mut mysql_async::Conn) {
    conn.query_drop(
        "UPDATE mysql.innodb_table_stats SET n_rows = 1, clustered_index_size = 1 WHERE database_name = DATABASE();
         UPDATE mysql.innodb_index_stats SET stat_value = 1 WHERE database_name = DATABASE();
         FLUSH TABLES members, dialogs, messages",
    )
    .await
    .unwrap();
}

/// Rows of a table that the server has read so far, in this database.
async fn rows_read(conn: &mut mysql_async::Conn, kind: Kind, table: &str) -> u64 {
    let count = if kind == Kind::Mariadb {
        // It counts a connection's reads when a statement of it ends.
        format!(
            "SELECT CAST(SUM(rows_read) AS UNSIGNED) FROM information_schema.table_statistics WHERE table_schema = DATABASE() AND table_name = '{table}'"
        )
    } else {
        format!(
            "SELECT CAST(SUM(count_read) AS UNSIGNED) FROM performance_schema.table_io_waits_summary_by_table WHERE object_schema = DATABASE() AND object_name = '{table}'"
        )
    };
    let count: Option<Option<u64>> = conn.query_first(count).await.unwrap();
    count.flatten().unwrap_or_default()
}

mod a_page_reads_no_more_rows_than_are_on_it {
    use super::Kind;

    #[tokio::test(flavor = "multi_thread")]
    async fn mysql() {
        super::a_page_reads_no_more_rows_than_are_on_it(Kind::Mysql).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn mariadb() {
        super::a_page_reads_no_more_rows_than_are_on_it(Kind::Mariadb).await;
    }
}

async fn a_copy_that_differs_from_its_source_is_not_activated(kind: Kind) {
    const LENGTH: u64 = 2500;
    let Pair {
        _databases: databases,
        a,
        b,
        topology_ref,
    } = pair(kind).await;
    for part in (1..=LENGTH).collect::<Vec<_>>().chunks(500) {
        let batch: Vec<_> = part
            .iter()
            .map(|n| message("7_42", 42, &format!("{n}"), "x"))
            .collect();
        write(&a, &batch).await;
    }
    let shard = |number, name: &str, store: &Arc<dyn Database>| {
        let timing = Timing::from(&Settings::from_toml("").unwrap().store);
        let runtime = tokio::runtime::Handle::current();
        let metrics = ShardMetrics::default();
        Shard::new(number, of(name), store.clone(), timing, runtime, metrics)
    };
    let slot = Slot::of(dialog("7_42"));
    let a_move = Move {
        topology_ref: topology_ref.clone(),
        slot,
        from: shard(1, "shard1", &a),
        to: shard(2, "shard2", &b),
        pace: Pace {
            freeze: Duration::from_secs(60),
            purge_after: Duration::ZERO,
            throttle: false,
        },
    };
    // In the middle one of three parts: it is read back while the last is written.
    let garbles = if kind == Kind::Sqlite {
        "AFTER INSERT ON messages WHEN NEW.seq = 1500 BEGIN UPDATE messages SET text = 'y' WHERE dialog = NEW.dialog AND seq = NEW.seq; END"
    } else {
        "BEFORE INSERT ON messages FOR EACH ROW SET NEW.text = IF(NEW.seq = 1500, 'y', NEW.text)"
    };
    databases
        .execute(1, &format!("CREATE TRIGGER garbles {garbles}"))
        .await;
    let moved = a_move.run().await;
    assert!(matches!(moved, Err(MoveError::Differs(of)) if of == slot));
    let state = async |shard| row_at(shard, &topology_ref, slot).await.unwrap().state;
    assert_eq!(state(&a_move.from).await, SlotState::Owner);
    assert_eq!(state(&a_move.to).await, SlotState::None);

    // What it left is cleared, and all goes over.
    databases.execute(1, "DROP TRIGGER garbles").await;
    assert_eq!(a_move.run().await.unwrap().messages, LENGTH);
    assert_eq!(state(&a_move.from).await, SlotState::None);
    assert_eq!(state(&a_move.to).await, SlotState::Owner);
    let start = [(dialog("7_42"), Seq::ZERO)];
    let there = b.messages_of(&of("shard2"), slot, &start, 3000).await;
    let there: Vec<_> = there
        .unwrap()
        .iter()
        .map(|message| (message.seq.get(), message.text.to_string()))
        .collect();
    let sent: Vec<_> = (1..=LENGTH).map(|seq| (seq, "x".to_owned())).collect();
    assert!(there == sent);
}

/// Of servers that SQL can garble something in.
mod a_copy_that_differs_from_its_source_is_not_activated {
    use super::Kind;

    #[tokio::test(flavor = "multi_thread")]
    async fn sqlite() {
        super::a_copy_that_differs_from_its_source_is_not_activated(Kind::Sqlite).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn mysql() {
        super::a_copy_that_differs_from_its_source_is_not_activated(Kind::Mysql).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn mariadb() {
        super::a_copy_that_differs_from_its_source_is_not_activated(Kind::Mariadb).await;
    }
}

async fn last_seqs_are_those_of_the_dialogs_with_their_read_marks(kind: Kind) {
    let (databases, store) = initialized(kind).await;
    for (name, author, count) in [("7_42", 7, 3), ("7_9", 9, 1), ("8_9", 8, 2)] {
        for n in 0..count {
            write(&store, &[message(name, author, &format!("k{n}"), "x")]).await;
        }
    }
    let seven = user(7);
    mark(&store, "7_42", 42, 2).await;
    type Shown = (String, u64, Vec<(u64, u64)>);
    let shown = |rows: &LastSeqs| -> Vec<Shown> {
        let mut shown: Vec<_> = rows
            .dialogs
            .iter()
            .map(|head| {
                let mut reads: Vec<_> = head
                    .members
                    .iter()
                    .map(|member| (member.user.get(), member.read.get()))
                    .collect();
                reads.sort_unstable();
                (head.dialog.to_string(), head.last_seq.get(), reads)
            })
            .collect();
        shown.sort_unstable();
        shown
    };
    let asked = LastSeqsOf::Dialogs {
        dialogs: vec![dialog("7_42"), dialog("7_9"), dialog("1_2")],
        users: vec![user(7)],
    };
    let rows = store.last_seqs(&identity(), &asked).await.unwrap();
    let both = [
        ("7_42".to_owned(), 3, vec![(7, 0), (42, 2)]),
        ("7_9".to_owned(), 1, vec![(7, 0), (9, 0)]),
    ];
    assert_eq!(shown(&rows), both);
    assert_eq!(
        rows.slots.owned.len(),
        3,
        "of the slots that were asked for"
    );
    let recent = |users: &[UserId], within| LastSeqsOf::Users {
        users: users.to_vec(),
        within,
    };
    let hour = Duration::from_secs(3600);
    let rows = store
        .last_seqs(&identity(), &recent(&[seven], hour))
        .await
        .unwrap();
    assert_eq!(shown(&rows), both);
    assert_eq!(rows.slots.owned.len(), SLOTS);
    let rows = store
        .last_seqs(&identity(), &recent(&[seven, user(9)], hour))
        .await
        .unwrap();
    assert_eq!(rows.dialogs.len(), 3, "each once");
    // The longest silent is not lately any more.
    if kind != Kind::Memory {
        let sql = "UPDATE dialogs SET last_at = last_at - 7200000000 WHERE dialog = '7_42'";
        match kind {
            Kind::Sqlite => {
                let path = databases.url(0).replace("sqlite:", "");
                rusqlite::Connection::open(path)
                    .unwrap()
                    .execute(sql, [])
                    .unwrap();
            }
            _ => databases.execute(0, sql).await,
        }
        let rows = store
            .last_seqs(&identity(), &recent(&[seven], hour))
            .await
            .unwrap();
        assert_eq!(shown(&rows), both[1..]);
    }
    let other_service = ShardIdentity {
        cluster_id: "c2".into(),
        ..identity()
    };
    assert!(matches!(
        store.last_seqs(&other_service, &asked).await,
        Err(StoreError::WrongIdentity(_))
    ));
}

/// The tables of the version before get what is new; those of a later version do not stop this one.
async fn tables_of_the_versions_before_and_after_are_used(kind: Kind) {
    let (databases, store) = initialized(kind).await;
    write(&store, &[message("7_42", 7, "a", "x")]).await;
    if kind == Kind::Memory {
        return;
    }
    let added = [
        ("messages", &["of_seq"][..]),
        ("dialogs", &["members_rev", "settings"]),
        (
            "members",
            &["role", "rev", "since_seq", "joined_seq", "until_seq"],
        ),
    ];
    for (table, columns) in added {
        for column in columns {
            let drop = format!("ALTER TABLE {table} DROP COLUMN {column}");
            databases.execute(0, &drop).await;
        }
    }
    if kind != Kind::Sqlite {
        databases.execute(0, "DROP PROCEDURE append_entry").await;
    }
    for sql in [
        "DROP TABLE revocations",
        "DELETE FROM refinery_schema_history WHERE version > 1",
    ] {
        databases.execute(0, sql).await;
    }
    store.migrate().await.unwrap();
    assert!(store.revocations(&identity()).await.unwrap().is_empty());
    let later = "INSERT INTO refinery_schema_history (version, name, applied_on, checksum) VALUES (99, 'later', '2026-11-27T00:00:00Z', '1')";
    databases.execute(0, later).await;
    store.migrate().await.unwrap();
    let page = store
        .page(&identity(), dialog("7_42"), Range::Newest, 5)
        .await;
    assert_eq!(page.unwrap().messages.len(), 1);
    let term = Term {
        number: 1,
        generation: 0,
    };
    let batch = [message("7_42", 7, "b", "y")];
    let draft = draft(&batch, term, &[("7_42", 1)]);
    let appended = store.append(&identity(), &batch, draft).await.unwrap();
    assert!(matches!(appended, Appended::Stored { .. }), "{appended:?}");
}

/// Revocations of one shard: each only rises, and those of another database are not touched.
async fn what_is_revoked_stays_revoked(kind: Kind) {
    let (_databases, store) = initialized(kind).await;
    assert!(store.revocations(&identity()).await.unwrap().is_empty());
    let late = (1 << 53) - 1;
    for (revoked, expected) in [
        (vec![(7, 100), (late, 5)], [(7, 100), (late, 5)]),
        (vec![(7, 99)], [(7, 100), (late, 5)]),
        (vec![(7, 101), (late, 4)], [(7, 101), (late, 5)]),
    ] {
        let revoked: Vec<_> = revoked
            .into_iter()
            .map(|(id, time)| (user(id), time))
            .collect();
        store.revoke(&identity(), &revoked).await.unwrap();
        let all = store.revocations(&identity()).await.unwrap();
        assert_eq!(all, expected.map(|(id, time)| (user(id), time)).into());
    }
    let wrong = ShardIdentity {
        shard_name: "shard2".into(),
        ..identity()
    };
    for refused in [
        store
            .revoke(&wrong, &[(user(7), 900), (user(8), 900)])
            .await,
        store.revocations(&wrong).await.map(drop),
    ] {
        assert!(matches!(refused, Err(StoreError::WrongIdentity(_))));
    }
    assert_eq!(store.revocations(&identity()).await.unwrap().len(), 2);
}

/// What is asked of the room that 7 makes with the key `room`.
fn room_entry(author: u64, key: &str, request: RoomRequest) -> NewMessage {
    let body = Body::Room { request, limit: 4 };
    NewMessage::new(room(), user(author), Key::new(key.into()).unwrap(), body)
}

fn room() -> DialogId {
    DialogId::room(user(7), &Key::new("room".into()).unwrap())
}

fn create(members: &[u64]) -> NewMessage {
    let request = RoomRequest::Create {
        members: members.iter().copied().collect(),
        settings: RoomSettings {
            title: Some("t\u{1F600}'".into()),
            history: RoomHistory::Since,
        },
    };
    room_entry(7, "room", request)
}

fn change(author: u64, key: &str, add: &[u64], remove: &[u64]) -> NewMessage {
    let request = RoomRequest::Change {
        add: add.iter().copied().collect(),
        remove: remove.iter().copied().collect(),
        roles: BTreeMap::new(),
        title: None,
    };
    room_entry(author, key, request)
}

fn in_room(author: u64, key: &str) -> NewMessage {
    message(&room().to_string(), author, key, "x")
}

/// What became of entries of a room, and who is sent each.
fn fates(written: &[WriteOutcome]) -> Vec<String> {
    let users = |audience: &Audience| -> Vec<u64> {
        let users = audience.users(room()).map(UserId::get);
        let users: BTreeSet<u64> = users.collect();
        users.into_iter().collect()
    };
    let fate = |written: &WriteOutcome| match written {
        WriteOutcome::Stored(place, audience) => format!("{} {:?}", place.seq, users(audience)),
        WriteOutcome::Repeat(place, audience) => {
            format!("again {} {:?}", place.seq, users(audience))
        }
        other => format!("{other:?}"),
    };
    written.iter().map(fate).collect()
}

async fn a_room_is_what_its_log_says(kind: Kind) {
    let (_databases, store) = initialized(kind).await;
    let ours = identity();
    let written = write(
        &store,
        &[in_room(7, "early"), change(7, "early2", &[9], &[])],
    )
    .await;
    assert_eq!(fates(&written), ["Refused(NoRoom)", "Refused(NoRoom)"]);
    // Made, used and changed within one batch.
    let batch = [
        create(&[8, 9]),
        in_room(8, "a"),
        message("7_42", 7, "beside", "y"),
        change(7, "b", &[], &[9]),
        in_room(9, "late"),
        in_room(7, "c"),
        create(&[8, 9]),
        create(&[8]),
    ];
    let expected = [
        "1 [7, 8, 9]",
        "2 [7, 8, 9]",
        "1 []",
        "3 [7, 8, 9]",
        "Refused(NotMember)",
        "4 [7, 8]",
        "again 1 [7, 8]",
        "KeyReused",
    ];
    let mut fates_of = fates(&write(&store, &batch).await);
    fates_of[2] = fates_of[2].replace("[7, 42]", "[]");
    assert_eq!(fates_of, expected);
    // A key that is stored is answered, also to one who has left; and once more in another order.
    let again = [
        in_room(8, "a"),
        in_room(9, "late"),
        change(7, "b", &[], &[9]),
    ];
    let expected = ["again 2 [7, 8]", "Refused(NotMember)", "again 3 [7, 8]"];
    assert_eq!(fates(&write(&store, &again).await), expected);
    let nothing = [change(7, "d", &[8], &[9]), change(8, "e", &[10], &[])];
    let expected = ["Unchanged", "Refused(Role(\"an admin\"))"];
    assert_eq!(fates(&write(&store, &nothing).await), expected);

    let page = store.page(&ours, room(), Range::Newest, 10).await.unwrap();
    let entries = page.messages.iter();
    let kinds: Vec<_> = entries.map(|entry| entry.kind.as_str()).collect();
    assert_eq!(kinds, ["member", "text", "member", "text"]);
    let made = RoomChange::parse(&page.messages[0].text);
    assert_eq!(
        (made.joined, made.history),
        (vec![7, 8, 9], Some(RoomHistory::Since))
    );
    assert_eq!(RoomChange::parse(&page.messages[2].text).left, [9]);
    assert!(page.messages.is_sorted_by_key(|entry| entry.at));

    let seen = async |who| store.room(&ours, room(), user(who)).await.unwrap();
    let view = seen(7).await;
    assert_eq!((view.members, view.last_seq), (2, Seq::new(4)));
    assert_eq!(view.settings.title.as_deref(), Some("t\u{1F600}'"));
    assert_eq!(view.me.unwrap().role, Role::Owner);
    let left = seen(9).await.me.unwrap();
    assert_eq!((left.since, left.until), (Seq::new(1), Some(Seq::new(3))));
    assert_eq!(seen(10).await.me, None);
    assert!(seen(7).await.slot.unwrap().complete);

    // Marks and inboxes are those of members.
    let name = room().to_string();
    assert_eq!(mark(&store, &name, 9, 4).await, MarkOutcome::NoDialog);
    let inbox = async |who| store.inbox(&ours, user(who), None, 10).await.unwrap().rows;
    assert_eq!(inbox(9).await.len(), 0);
    let of_8 = inbox(8).await;
    assert_eq!((of_8.len(), of_8[0].unread), (1, 1), "the message of 7");
    assert_eq!(of_8[0].title.as_deref(), Some("t\u{1F600}'"));
    assert_eq!(mark(&store, &name, 8, 9).await, at_seq(4, true));
    assert_eq!(inbox(8).await[0].unread, 0);
    let members = async |after: Option<u64>, read: Option<u64>| {
        let (after, read) = (after.map(user), read.map(Seq::new));
        let members = store.room_members(&ours, room(), after, read, 10).await;
        let members = members.unwrap().into_iter();
        members.map(|member| member.user.get()).collect::<Vec<_>>()
    };
    assert_eq!(members(None, None).await, [7, 8]);
    assert_eq!(members(Some(7), None).await, [8]);
    assert_eq!(members(None, Some(4)).await, [8]);
    let asked = LastSeqsOf::Dialogs {
        dialogs: vec![room()],
        users: vec![user(9), user(10)],
    };
    let last = store.last_seqs(&ours, &asked).await.unwrap().dialogs;
    assert_eq!(last[0].members.len(), 1);
    assert_eq!(
        (last[0].last_seq, last[0].last_for(user(9))),
        (Seq::new(4), Seq::new(3))
    );

    // Who comes back begins anew, as the room is set.
    let added = change(7, "f", &[9, 10], &[]);
    assert_eq!(fates(&write(&store, &[added]).await), ["5 [7, 8, 9, 10]"]);
    let full = change(7, "g", &[11], &[]);
    assert_eq!(fates(&write(&store, &[full]).await), ["Refused(Full(4))"]);
    let back = seen(9).await.me.unwrap();
    assert_eq!(
        (back.since, back.until, back.read),
        (Seq::new(5), None, Seq::new(5))
    );
    // The owner leaves: one of those who joined first follows.
    let leaves = change(7, "h", &[], &[7]);
    assert_eq!(fates(&write(&store, &[leaves]).await), ["6 [7, 8, 9, 10]"]);
    assert_eq!(seen(8).await.me.unwrap().role, Role::Owner);
}

/// A draft for a room is stored only with the members that it was worked out with, whatever else
/// is as expected.
async fn a_draft_for_a_room_expects_its_members(kind: Kind) {
    let (_databases, store) = initialized(kind).await;
    let receipt = store.write(&identity(), &[create(&[8, 9])], false).await;
    let (of, members) = receipt.unwrap().rooms.pop().unwrap();
    assert_eq!(
        (of, members.rev, members.users.len()),
        (room(), Seq::new(1), 3)
    );
    let term = Term {
        number: 1,
        generation: 0,
    };
    let draft_of = |batch: &[NewMessage], last_seq: u64, rev: u64| {
        let mut draft = draft(batch, term, &[("7_42", 0)]);
        let members = RoomMembers {
            rev: Seq::new(rev),
            ..members.clone()
        };
        let expected = Expected {
            last_seq: Seq::new(last_seq),
            room: Some(members),
        };
        let mut all = std::mem::take(&mut draft.expected);
        all.remove(&dialog("7_42"));
        all.insert(room(), expected);
        let terms = batch.iter().map(|entry| (entry.slot, term)).collect();
        Draft::new(batch, terms, all)
    };
    let append = async |batch: &[NewMessage], last_seq, rev| {
        let draft = draft_of(batch, last_seq, rev);
        match store.append(&identity(), batch, draft).await.unwrap() {
            Appended::Stored { written, .. } => Ok(fates(&written)),
            Appended::Mismatch(mismatch) => Err(mismatch),
        }
    };
    // Alone it is a call of a procedure; with others it is a text.
    let alone = |key| [in_room(8, key)];
    let two = |key| [in_room(8, key), in_room(9, key)];
    assert_eq!(
        append(&alone("a"), 1, 1).await,
        Ok(vec!["2 [7, 8, 9]".into()])
    );
    let of_two = vec!["3 [7, 8, 9]".to_owned(), "4 [7, 8, 9]".to_owned()];
    assert_eq!(append(&two("b"), 2, 1).await, Ok(of_two));
    write(&store, &[change(7, "out", &[], &[9])]).await;
    for rev in [1, 4, 6] {
        assert_eq!(
            append(&alone("c"), 5, rev).await,
            Err(Mismatch::LastSeq),
            "{rev}"
        );
        assert_eq!(
            append(&two("c"), 5, rev).await,
            Err(Mismatch::LastSeq),
            "{rev}"
        );
        let with_another = [in_room(8, "c"), message("7_42", 7, "c", "y")];
        let mixed = append(&with_another, 5, rev).await;
        assert_eq!(mixed, Err(Mismatch::LastSeq), "{rev}");
    }
    assert_eq!(append(&alone("d"), 5, 5).await.map(|it| it.len()), Ok(1));
    let page = store.page(&identity(), room(), Range::Newest, 10).await;
    assert_eq!(page.unwrap().last_seq, Seq::new(6));
}

/// The time of an entry is not before that of the one before it, whatever the clock says.
async fn the_time_does_not_step_back_within_a_dialog(kind: Kind) {
    let (databases, store) = initialized(kind).await;
    let ours = identity();
    let written = write(&store, &[message("7_42", 7, "a", "x")]).await;
    let WriteOutcome::Stored(first, _) = written[0] else {
        panic!("{written:?}")
    };
    let ahead = first.at.micros() + 30_000_000;
    if kind == Kind::Memory {
        databases.memory[0].set_last_at(dialog("7_42"), Timestamp::from_micros(ahead));
    } else {
        let set = format!("UPDATE dialogs SET last_at = {ahead}");
        databases.execute(0, &set).await;
    }
    let term = Term {
        number: 1,
        generation: 0,
    };
    for (key, expected) in [("b", &[("7_42", 1)][..]), ("b", &[])] {
        let batch = [message("7_42", 7, key, "x")];
        let appended = store.append(&ours, &batch, draft(&batch, term, expected));
        let appended = appended.await.unwrap();
        assert_eq!(
            appended,
            Appended::Mismatch(Mismatch::LastSeq),
            "{expected:?}"
        );
    }
    for key in ["b", "c"] {
        let written = write(&store, &[message("7_42", 7, key, "x")]).await;
        let WriteOutcome::Stored(place, _) = written[0] else {
            panic!("{written:?}")
        };
        assert_eq!(place.at.micros(), ahead);
    }
    let page = store.page(&ours, dialog("7_42"), Range::Newest, 10).await;
    let times = page
        .unwrap()
        .messages
        .into_iter()
        .map(|entry| entry.at.micros());
    assert_eq!(times.collect::<Vec<_>>(), [first.at.micros(), ahead, ahead]);
}

/// A room comes to another shard as it is, in any order and any number of times; and a room of a
/// slot that misses a part of its log takes nothing.
async fn a_room_moves_with_its_members(kind: Kind) {
    let databases = Databases::new(kind, 2).await;
    let (a, b) = (open(&databases, 0), open(&databases, 1));
    let meta_of = |name: &str| Meta {
        shard_name: name.into(),
        topology_phase: Phase::Normal,
        ..meta()
    };
    let two = ShardIdentity {
        shard_name: "shard2".into(),
        ..identity()
    };
    for (store, name, owned) in [
        (&a, "shard1", all_slots()),
        (&b, "shard2", SlotSet::empty()),
    ] {
        store.migrate().await.unwrap();
        store.initialize(&meta_of(name), &owned).await.unwrap();
    }
    let topology_ref = meta_of("shard1").topology_ref();
    let slot = Slot::of(room());
    let rows = async || a.dialog_rows(&identity(), slot).await.unwrap();
    write(&a, &[create(&[8, 9]), in_room(9, "a")]).await;
    let early = rows().await;
    write(&a, &[change(7, "b", &[10], &[9]), in_room(10, "c")]).await;
    mark(&a, &room().to_string(), 8, 3).await;
    let late = rows().await;
    let from_the_start = [(room(), Seq::ZERO)];
    let messages = a.messages_of(&identity(), slot, &from_the_start, 10).await;
    let messages = messages.unwrap();
    let prepare = Step::Prepare {
        from: "shard1".into(),
        term: 2,
    };
    let prepared = b.step(&two, &topology_ref, slot, &prepare).await.unwrap();
    prepared.unwrap();
    for dialogs in [&early, &late, &early] {
        let chunk = Chunk {
            messages: messages.clone(),
            dialogs: dialogs.clone(),
        };
        let copied = b.copy_in(&two, &topology_ref, slot, "shard1", 2, &chunk);
        copied.await.unwrap().unwrap();
    }
    assert_eq!(b.dialog_rows(&two, slot).await.unwrap(), late);
    let there = b.messages_of(&two, slot, &from_the_start, 10).await;
    assert_eq!(there.unwrap(), messages);
    let activate = |history| Step::Activate {
        from: "shard1".into(),
        term: 2,
        generation: 0,
        history,
    };
    let incomplete = History {
        missing: BTreeSet::from(["shard3".to_owned()]),
        ..History::default()
    };
    let active = b
        .step(&two, &topology_ref, slot, &activate(incomplete))
        .await;
    active.unwrap().unwrap();
    let batch = [in_room(8, "d"), change(7, "e", &[], &[8]), in_room(9, "a")];
    let written = b.write(&two, &batch, false).await.unwrap();
    let expected = [
        "Refused(Unavailable)",
        "Refused(Unavailable)",
        "again 2 [7, 8]",
    ];
    assert_eq!(fates(&written.written), expected);
    let view = b.room(&two, room(), user(8)).await.unwrap().slot.unwrap();
    assert!(view.unmerged);
}

/// Every case on every store; the name says both.
macro_rules! on_every_store {
    ($($case:ident)*) => {
        mod sqlite { $( #[tokio::test(flavor = "multi_thread")] async fn $case() { super::$case(super::Kind::Sqlite).await } )* }
        mod mysql { $( #[tokio::test(flavor = "multi_thread")] async fn $case() { super::$case(super::Kind::Mysql).await } )* }
        mod memory { $( #[tokio::test(flavor = "multi_thread")] async fn $case() { super::$case(super::Kind::Memory).await } )* }
        mod mariadb { $( #[tokio::test(flavor = "multi_thread")] async fn $case() { super::$case(super::Kind::Mariadb).await } )* }
    };
}

on_every_store! {
    founding_happens_once_and_migrating_again_changes_nothing
    a_batch_is_stored_in_order_and_read_back_both_ways
    a_key_is_stored_once
    a_draft_is_stored_as_it_is_or_not_at_all
    a_transaction_of_the_largest_size_is_stored
    instances_that_write_at_once_share_one_dense_order
    what_is_not_owned_is_refused_and_nothing_of_it_is_written
    a_database_that_is_somebody_else_is_noticed_by_every_call
    an_inbox_lists_dialogs_newest_first_with_their_unread
    a_read_mark_moves_forward_only_and_not_beyond_the_last_message
    read_marks_move_many_at_once_alone_and_with_messages
    a_text_comes_back_byte_for_byte
    a_document_is_taken_forward_only_and_fences_who_was_declared_down
    what_is_revoked_stays_revoked
    tables_of_the_versions_before_and_after_are_used
    last_seqs_are_those_of_the_dialogs_with_their_read_marks
    a_slot_moves_step_by_step_and_takes_no_other_step
    what_a_lost_shard_held_comes_in_once_and_in_its_place
    one_at_a_time_has_the_turn
    a_room_is_what_its_log_says
    a_draft_for_a_room_expects_its_members
    the_time_does_not_step_back_within_a_dialog
    a_room_moves_with_its_members
}
