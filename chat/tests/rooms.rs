//! Rooms: made, used and changed by their members, over REST and sockets, on one instance and on
//! two; and what those who have left receive: nothing more.

#![allow(missing_docs, clippy::wildcard_enum_match_arm)]

use chat_client::{Api, ClientError};
use chat_wire::{
    ChangeRoomRequest, CreateRoomRequest, ErrorCode, Kind, Message, Role, RoomHistory, ServerFrame,
};
use serde_json::json;
use std::collections::BTreeMap;
use testkit::instance::Instance;
use testkit::socket::Socket;
use testkit::{Databases, Kind as Store, nats_url, until};

/// Sends of a test come as fast as they can.
const FAST: [(&str, &str); 2] = [
    ("LIMITS__SENDS_BURST", "100000"),
    ("LIMITS__REQUESTS_BURST", "100000"),
];

async fn one(kind: Store) -> (Databases, Instance) {
    let databases = Databases::new(kind, 4).await;
    let instance = Instance::start(&databases.shards_file(), &FAST).await;
    (databases, instance)
}

async fn two(kind: Store) -> (Databases, Instance, Instance) {
    let databases = Databases::new(kind, 4).await;
    let (file, nats) = (databases.shards_file(), nats_url());
    let mut settings = FAST.to_vec();
    settings.push(("NATS__URL", nats.as_str()));
    let (one, two) = tokio::join!(
        Instance::start(&file, &settings),
        Instance::start(&file, &settings)
    );
    for instance in [&one, &two] {
        until("the bus is connected", async || {
            (instance.ready().await.1["status"] == "ok").then_some(())
        })
        .await;
    }
    (databases, one, two)
}

fn create(key: &str, members: &[u64]) -> CreateRoomRequest {
    CreateRoomRequest {
        key: key.into(),
        title: Some("lunch".into()),
        members: members.to_vec(),
        history: RoomHistory::All,
    }
}

fn change(key: &str, add: &[u64], remove: &[u64]) -> ChangeRoomRequest {
    ChangeRoomRequest {
        key: key.into(),
        add: add.to_vec(),
        remove: remove.to_vec(),
        ..ChangeRoomRequest::default()
    }
}

fn code<T: std::fmt::Debug>(result: Result<T, ClientError>) -> ErrorCode {
    match result {
        Err(ClientError::Refused(body)) => body.code,
        other => panic!("not refused: {other:?}"),
    }
}

/// The seqs of a page or a log.
fn seqs(log: &[Message]) -> Vec<u64> {
    log.iter().map(|entry| entry.seq).collect()
}

/// The next entry of a dialog, a message or not.
async fn entry(socket: &mut Socket) -> Message {
    loop {
        match socket.next().await {
            ServerFrame::Message(entry) | ServerFrame::Entry(entry) => return entry,
            ServerFrame::Presence(_) | ServerFrame::Done { .. } => {}
            other => panic!("no entry, but {other:?}"),
        }
    }
}

async fn apis(instance: &Instance) -> [Api; 4] {
    [
        instance.api(7).await,
        instance.api(8).await,
        instance.api(9).await,
        instance.api(10).await,
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_room_over_rest_does_what_roles_allow_and_says_why_not() {
    let (_databases, instance) = one(Store::Sqlite).await;
    let [owner, admin, member, stranger] = apis(&instance).await;
    let made = owner.create_room(&create("k", &[8, 9])).await.unwrap();
    let again = owner.create_room(&create("k", &[9, 8])).await.unwrap();
    assert_eq!(made, again, "the same request names the same room");
    assert_eq!(
        code(owner.create_room(&create("k", &[8])).await),
        ErrorCode::KeyReused
    );
    let room = made.dialog.as_str();
    assert!(room.starts_with('r') && room.len() == 27, "{room}");

    // Roles.
    let mut raise = change("raise", &[], &[]);
    raise.roles = BTreeMap::from([("8".to_owned(), Role::Admin)]);
    assert_eq!(
        code(admin.change_room(room, &raise).await),
        ErrorCode::Forbidden
    );
    assert!(owner.change_room(room, &raise).await.unwrap().is_some());
    assert!(
        owner.change_room(room, &raise).await.unwrap().is_some(),
        "a repeat"
    );
    raise.key = "raise again".into();
    assert!(
        owner.change_room(room, &raise).await.unwrap().is_none(),
        "no change"
    );
    let add = |key| change(key, &[10], &[]);
    assert_eq!(
        code(member.change_room(room, &add("a")).await),
        ErrorCode::Forbidden
    );
    assert_eq!(
        code(stranger.change_room(room, &add("a")).await),
        ErrorCode::NotMember
    );
    let mut title = change("t", &[], &[]);
    title.title = Some("x".repeat(129));
    assert_eq!(
        code(admin.change_room(room, &title).await),
        ErrorCode::BadRequest
    );
    title.title = Some("dinner".into());
    admin.change_room(room, &title).await.unwrap().unwrap();

    // Sends, history, marks.
    assert_eq!(
        code(stranger.send(room, "s", "x").await),
        ErrorCode::NotMember
    );
    assert_eq!(
        code(stranger.history(room, &[]).await),
        ErrorCode::NotMember
    );
    assert_eq!(code(stranger.room(room).await), ErrorCode::NotMember);
    assert_eq!(
        code(stranger.mark_read(room, 1).await),
        ErrorCode::NotMember
    );
    let nowhere = "raaaaaaaaaaaaaaaaaaaaaaaaaa";
    assert_eq!(
        code(owner.send(nowhere, "s", "x").await),
        ErrorCode::NotFound
    );
    assert_eq!(code(owner.history(nowhere, &[]).await), ErrorCode::NotFound);
    for no_room in ["r1", "7_42", "f7"] {
        assert_eq!(
            code(owner.room(no_room).await),
            ErrorCode::BadRequest,
            "{no_room}"
        );
    }
    let many: Vec<u64> = (100..201).collect();
    assert_eq!(
        code(owner.create_room(&create("many", &many)).await),
        ErrorCode::RoomFull
    );
    let sent = member.send(room, "m", "hello").await.unwrap();
    assert_eq!(sent.seq, 4);
    assert_eq!(
        code(member.send(room, "m", "other").await),
        ErrorCode::KeyReused
    );
    let page = owner.history(room, &[]).await.unwrap();
    assert_eq!(seqs(&page.messages), [1, 2, 3, 4]);
    let [made, raised, titled, text] = &page.messages[..] else {
        panic!("{page:?}")
    };
    assert_eq!(
        (&made.kind, made.joined.as_slice()),
        (&Kind::Member, &[7, 8, 9][..])
    );
    assert_eq!(raised.roles["8"], Role::Admin);
    assert_eq!(titled.title.as_deref(), Some("dinner"));
    assert_eq!(
        (text.text.as_str(), text.to, text.kind.is_text()),
        ("hello", None, true)
    );

    // Inbox, unread, readers.
    let inbox = owner.inbox(10, None).await.unwrap();
    let listed = &inbox.dialogs[0];
    assert_eq!(
        (listed.dialog.as_str(), listed.with, listed.unread),
        (room, None, 1)
    );
    assert_eq!(listed.title.as_deref(), Some("dinner"));
    assert_eq!(owner.mark_read(room, 99).await.unwrap().seq, 4);
    assert_eq!(owner.inbox(10, None).await.unwrap().dialogs[0].unread, 0);
    let readers = admin.room_readers(room, 4).await.unwrap();
    assert_eq!(
        readers.iter().map(|reader| reader.user).collect::<Vec<_>>(),
        [7]
    );
    let members = member.room_members(room).await.unwrap();
    let roles: Vec<_> = members.iter().map(|one| (one.user, one.role)).collect();
    assert_eq!(
        roles,
        [(7, Role::Owner), (8, Role::Admin), (9, Role::Member)]
    );
    let seen = member.room(room).await.unwrap();
    assert_eq!((seen.members, seen.role, seen.read), (3, Role::Member, 1));

    // Who leaves reads up to there, and a stored key is still answered.
    member
        .change_room(room, &change("bye", &[], &[9]))
        .await
        .unwrap()
        .unwrap();
    owner.send(room, "after", "x").await.unwrap();
    assert_eq!(member.send(room, "m", "hello").await.unwrap().seq, 4);
    assert_eq!(
        code(member.send(room, "late", "x").await),
        ErrorCode::NotMember
    );
    for log in [
        member.log_upwards(room).await,
        member.log_downwards(room).await,
    ] {
        assert_eq!(seqs(&log.unwrap()), [1, 2, 3, 4, 5]);
    }
    assert!(
        member
            .history(room, &[("after", 5)])
            .await
            .unwrap()
            .messages
            .is_empty()
    );
    assert!(member.inbox(10, None).await.unwrap().dialogs.is_empty());
    assert_eq!(code(member.room(room).await), ErrorCode::NotMember);
    assert_eq!(
        seqs(&owner.log_upwards(room).await.unwrap()),
        [1, 2, 3, 4, 5, 6]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn those_who_join_a_room_read_what_it_allows() {
    let (_databases, instance) = one(Store::Sqlite).await;
    let [owner, _, newcomer, _] = apis(&instance).await;
    for (history, expected) in [
        (RoomHistory::All, &[1, 2, 3, 4, 5][..]),
        (RoomHistory::Since, &[4, 5]),
    ] {
        let request = CreateRoomRequest {
            history,
            ..create(&format!("{history:?}"), &[8])
        };
        let room = owner.create_room(&request).await.unwrap().dialog;
        for n in 2..4 {
            owner
                .send(room.as_str(), &format!("{n}"), "x")
                .await
                .unwrap();
        }
        owner
            .change_room(&room, &change("in", &[9], &[]))
            .await
            .unwrap();
        owner.send(room.as_str(), "5", "x").await.unwrap();
        for log in [
            newcomer.log_upwards(room.as_str()).await,
            newcomer.log_downwards(room.as_str()).await,
        ] {
            assert_eq!(seqs(&log.unwrap()), expected, "{history:?}");
        }
        // In pages of one: a bound may lie outside of what the newcomer reads.
        for (bound, seq, found) in [("after", 0, expected[0]), ("before", 5, 4), ("after", 4, 5)] {
            let page = newcomer
                .history(room.as_str(), &[(bound, seq), ("limit", 1)])
                .await;
            assert_eq!(
                seqs(&page.unwrap().messages),
                [found],
                "{history:?} {bound} {seq}"
            );
        }
        let below = newcomer
            .history(room.as_str(), &[("before", expected[0])])
            .await
            .unwrap();
        assert!(below.messages.is_empty() && !below.more);
        let inbox = newcomer.inbox(10, None).await.unwrap();
        let listed = inbox
            .dialogs
            .iter()
            .find(|entry| entry.dialog == room)
            .unwrap();
        assert_eq!(listed.unread, 1, "what was said before counts as read");
    }
}

async fn a_room_is_talked_in(kind: Store) {
    let (_databases, one, two) = two(kind).await;
    let (mut seven, mut eight, mut nine, mut tab) = (
        Socket::of(&one, 7).await,
        Socket::of(&two, 8).await,
        Socket::of(&two, 9).await,
        Socket::of(&one, 9).await,
    );
    // Interest takes a moment to reach the bus: the members of a first room see all of it.
    seven
        .send(json!({"type": "create", "id": "1", "key": "k", "title": "t", "members": [8, 9]}))
        .await;
    let mut room = None;
    let mut first = None;
    while room.is_none() || first.is_none() {
        match seven.next().await {
            ServerFrame::Created {
                id,
                key,
                dialog,
                seq,
                ..
            } => {
                assert_eq!((id.as_deref(), key.as_str(), seq), (Some("1"), "k", 1));
                room = Some(dialog);
            }
            ServerFrame::Entry(entry) => first = Some(entry),
            other => panic!("{other:?}"),
        }
    }
    let room = room.unwrap();
    let first = first.unwrap();
    assert_eq!(
        (first.joined, first.title.as_deref()),
        (vec![7, 8, 9], Some("t"))
    );
    for socket in [&mut eight, &mut nine, &mut tab] {
        let made = entry(socket).await;
        assert_eq!((made.seq, &made.kind), (1, &Kind::Member));
    }
    for (n, author) in [(2, 8), (3, 7), (4, 8)] {
        let socket = if author == 7 { &mut seven } else { &mut eight };
        socket
            .send(json!({"type": "send", "key": format!("{n}"), "in": room, "text": "hi"}))
            .await;
        assert_eq!(socket.sent().await.1, n);
        let (other, author_tabs) = if author == 7 {
            (&mut eight, 7)
        } else {
            (&mut seven, 8)
        };
        let received = entry(other).await;
        assert_eq!(
            (received.seq, received.from, received.to),
            (n, author_tabs, None)
        );
        for socket in [&mut nine, &mut tab] {
            assert_eq!(entry(socket).await.seq, n);
        }
    }
    // Typing reaches the others; a mark one's own sessions.
    nine.send(json!({"type": "typing", "in": room})).await;
    for socket in [&mut seven, &mut eight] {
        match socket.next().await {
            ServerFrame::Typing { dialog, user } => assert_eq!((&dialog, user), (&room, 9)),
            other => panic!("{other:?}"),
        }
    }
    nine.send(json!({"type": "read", "in": room, "seq": 4}))
        .await;
    for socket in [&mut nine, &mut tab] {
        match socket.next().await {
            ServerFrame::Read(mark) => assert_eq!((mark.user, mark.seq), (9, 4)),
            other => panic!("{other:?}"),
        }
    }

    // Removed: the last that the sessions of 9 receive is that they are.
    seven
        .send(json!({"type": "members", "id": "2", "key": "out", "in": room, "remove": [9]}))
        .await;
    for socket in [&mut eight, &mut nine, &mut tab] {
        let out = entry(socket).await;
        assert_eq!((out.seq, out.left), (5, vec![9]));
    }
    assert_eq!(entry(&mut seven).await.left, [9]);
    eight
        .send(json!({"type": "send", "key": "6", "in": room, "text": "without 9"}))
        .await;
    assert_eq!(eight.sent().await.1, 6);
    assert_eq!(entry(&mut seven).await.seq, 6);
    for socket in [&mut nine, &mut tab] {
        socket
            .send(json!({"type": "send", "key": "7", "in": room, "text": "let me in"}))
            .await;
        let refused = socket.error().await;
        assert_eq!(
            (refused.code, refused.key.as_deref()),
            (ErrorCode::NotMember, Some("7"))
        );
        assert_eq!(refused.dialog.as_deref(), Some(room.as_str()));
    }
    nine.send(json!({"type": "typing", "in": room})).await;
    nine.send(json!({"type": "read", "id": "3", "in": room, "seq": 6}))
        .await;
    assert_eq!(nine.error().await.code, ErrorCode::NotMember);
    // A device that was away resumes to the end of what it may read, and a stranger is told to
    // read.
    let mut back = Socket::of(&one, 9).await;
    back.send(json!({"type": "resume", "id": "r", "positions": {&room: 3}}))
        .await;
    for seq in [4, 5] {
        assert_eq!(entry(&mut back).await.seq, seq);
    }
    let ServerFrame::Resumed {
        positions, reads, ..
    } = back.next().await
    else {
        panic!("not resumed")
    };
    assert_eq!(positions[&room], 5);
    assert_eq!(
        reads
            .iter()
            .map(|mark| (mark.user, mark.seq))
            .collect::<Vec<_>>(),
        [(9, 4)]
    );
    let mut stranger = Socket::of(&two, 10).await;
    stranger
        .send(json!({"type": "resume", "id": "r", "positions": {&room: 3}}))
        .await;
    let ServerFrame::Resumed { resync, .. } = stranger.next().await else {
        panic!("not resumed")
    };
    assert_eq!(resync, std::slice::from_ref(&room));

    // Everybody reads the same, through both instances.
    for instance in [&one, &two] {
        for (user, last) in [(7, 6), (8, 6), (9, 5)] {
            let log = instance
                .api(user)
                .await
                .log_upwards(room.as_str())
                .await
                .unwrap();
            assert_eq!(seqs(&log), (1..=last).collect::<Vec<_>>(), "{user}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_room_is_talked_in_on_two_instances_and_one_is_removed_on_mysql() {
    a_room_is_talked_in(Store::Mysql).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_room_is_talked_in_on_two_instances_and_one_is_removed_on_mariadb() {
    a_room_is_talked_in(Store::Mariadb).await;
}
