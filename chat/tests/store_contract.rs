//! What every store must do, on SQLite, MySQL and MariaDB alike.

#![allow(missing_docs, clippy::wildcard_enum_match_arm)]

mod support;

use chat::config::Settings;
use chat::dialog::{DialogId, Key, Seq, Text, UserId};
use chat::ownership::SlotState;
use chat::ring::{SLOTS, Slot};
use chat::store::{
    Database, Identity, InboxCursor, Marked, Meta, MysqlStore, NewMessage, Phase, Range, SlotSet,
    SqliteStore, StoreError, Written,
};
use std::sync::Arc;
use support::{Databases, Kind};

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
        Text::new(text.into(), 5000).unwrap(),
    )
}

fn open(databases: &Databases, i: usize) -> Arc<dyn Database> {
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
        doc_version: 1,
        doc_phase: Phase::Founding,
        doc_hash: "h".into(),
        doc: "{}".into(),
    }
}

fn identity() -> Identity {
    Identity {
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
async fn founded(kind: Kind) -> (Databases, Arc<dyn Database>) {
    let databases = Databases::new(kind, 1).await;
    let store = open(&databases, 0);
    store.migrate().await.unwrap();
    store.found(&meta(), &all_slots()).await.unwrap();
    (databases, store)
}

async fn write(store: &Arc<dyn Database>, batch: &[NewMessage]) -> Vec<Written> {
    store.write(&identity(), batch, false).await.unwrap()
}

fn seqs(written: &[Written]) -> Vec<(u64, bool)> {
    let seq = |written: &Written| match written {
        Written::Stored(place) => (place.seq.get(), false),
        Written::Repeat(place) => (place.seq.get(), true),
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
    let (one, two) = tokio::join!(a.found(&meta_1, &everything), b.found(&meta_2, &nothing));
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!(one, two, "the same answer to both");
    let owned = store
        .slots(&Identity {
            cluster_id: one.cluster_id.clone(),
            ..identity()
        })
        .await
        .unwrap();
    assert_eq!(owned.owned.len(), if one == other { 0 } else { SLOTS });
    store.advance(1, "another", Phase::Normal).await.unwrap();
    assert_eq!(
        store.meta().await.unwrap().unwrap().doc_phase,
        Phase::Founding,
        "another document is not advanced"
    );
    store.advance(1, "h", Phase::Normal).await.unwrap();
    store.migrate().await.unwrap();
    assert_eq!(
        store.meta().await.unwrap().unwrap(),
        Meta {
            doc_phase: Phase::Normal,
            ..one
        }
    );
}

async fn a_batch_is_stored_in_order_and_read_back_both_ways(kind: Kind) {
    let (_databases, store) = founded(kind).await;
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
    let (_databases, store) = founded(kind).await;
    let first = message("7_42", 7, "k", "hello");
    let stored = write(&store, std::slice::from_ref(&first)).await;
    assert_eq!(seqs(&stored), [(1, false)]);
    // Alone, among others, suspected and not, with another text, by the other author, and twice in one batch.
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
    assert_eq!(written[3], Written::KeyReused);
    assert_eq!(seqs(&written[4..]), [(2, true)]);
    assert_eq!(
        written[1],
        match stored[0] {
            Written::Stored(place) => Written::Repeat(place),
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

async fn instances_that_write_at_once_share_one_dense_order(kind: Kind) {
    const SEED: u64 = 20;
    let (databases, store) = founded(kind).await;
    let writers: Vec<_> = (0..4u64)
        .map(|w| {
            let store = open(&databases, 0);
            tokio::spawn(async move {
                let mut all = Vec::new();
                for round in 0..SEED {
                    // Every third key is common to all writers: somebody is first.
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
                                        .zip(seqs(&written)),
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
    let mut told = std::collections::BTreeMap::new();
    for writer in writers {
        for ((dialog, key), (seq, _)) in writer.await.unwrap() {
            assert_eq!(
                *told.entry((dialog, key)).or_insert(seq),
                seq,
                "everybody is told the same"
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
        let expected = told.keys().filter(|(d, _)| *d == dialog(name)).count();
        assert_eq!(seqs.len(), expected);
        for m in page.messages {
            assert_eq!(
                told[&(dialog(name), Key::new(m.key.unwrap()).unwrap())],
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
    store.found(&meta(), &owned).await.unwrap();
    let written = write(&store, &[theirs.clone(), ours.clone()]).await;
    assert_eq!(written[0], Written::NotOwner(Some(SlotState::None)));
    assert_eq!(seqs(&written[1..]), [(1, false)]);
    assert_eq!(databases.number(0, "SELECT COUNT(*) FROM dialogs").await, 1);
    assert_eq!(databases.number(0, "SELECT COUNT(*) FROM members").await, 2);
    let page = store
        .page(&identity(), theirs.dialog, Range::Newest, 5)
        .await
        .unwrap();
    assert_eq!(page.slot.unwrap().state, SlotState::None);
    let marked = store
        .mark_read(&identity(), theirs.dialog, user(7), Seq::new(1))
        .await
        .unwrap();
    assert_eq!(marked, Marked::NotOwner(Some(SlotState::None)));
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
    let (_databases, store) = founded(kind).await;
    for wrong in [
        Identity {
            cluster_id: "c2".into(),
            ..identity()
        },
        Identity {
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
                .mark_read(&wrong, dialog("7_42"), user(7), Seq::new(1))
                .await
                .unwrap_err()
        ));
        let page = store.page(&wrong, dialog("7_42"), Range::Newest, 5).await;
        assert!(
            page.as_ref().err().is_some_and(is_wrong) || page.is_ok_and(|page| page.slot.is_none())
        );
    }
}

async fn an_inbox_lists_dialogs_newest_first_with_their_unread(kind: Kind) {
    let (_databases, store) = founded(kind).await;
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
    let (_databases, store) = founded(kind).await;
    let mark = async |who: u64, seq: u64| {
        store
            .mark_read(&identity(), dialog("7_42"), user(who), Seq::new(seq))
            .await
            .unwrap()
    };
    assert_eq!(mark(7, 1).await, Marked::NoDialog);
    write(
        &store,
        &(0..5)
            .map(|n| message("7_42", 42, &format!("{n}"), "x"))
            .collect::<Vec<_>>(),
    )
    .await;
    for (asked, expected) in [
        (3, 3),
        (3, 3),
        (2, 3),
        (0, 3),
        (99, 5),
        (u64::MAX, 5),
        (1, 5),
    ] {
        assert_eq!(
            mark(7, asked).await,
            Marked::At(Seq::new(expected)),
            "{asked}"
        );
    }
    assert_eq!(
        mark(42, 1).await,
        Marked::At(Seq::new(1)),
        "everybody has their own"
    );
    assert_eq!(mark(8, 1).await, Marked::NoDialog, "8 is not in it");
}

async fn a_text_comes_back_byte_for_byte(kind: Kind) {
    let (_databases, store) = founded(kind).await;
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

/// Every case on every store; the name says both.
macro_rules! on_every_store {
    ($($case:ident)*) => {
        mod sqlite { $( #[tokio::test(flavor = "multi_thread")] async fn $case() { super::$case(super::Kind::Sqlite).await } )* }
        mod mysql { $( #[tokio::test(flavor = "multi_thread")] async fn $case() { super::$case(super::Kind::Mysql).await } )* }
        mod mariadb { $( #[tokio::test(flavor = "multi_thread")] async fn $case() { super::$case(super::Kind::Mariadb).await } )* }
    };
}

on_every_store! {
    founding_happens_once_and_migrating_again_changes_nothing
    a_batch_is_stored_in_order_and_read_back_both_ways
    a_key_is_stored_once
    instances_that_write_at_once_share_one_dense_order
    what_is_not_owned_is_refused_and_nothing_of_it_is_written
    a_database_that_is_somebody_else_is_noticed_by_every_call
    an_inbox_lists_dialogs_newest_first_with_their_unread
    a_read_mark_moves_forward_only_and_not_beyond_the_last_message
    a_text_comes_back_byte_for_byte
}
