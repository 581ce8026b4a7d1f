//! Delivery to sessions: every message, once, in order, with any loss on the bus; and presence.

#![allow(missing_docs, clippy::wildcard_enum_match_arm)]

use chat_client::{Client, Event};
use chat_wire::{ErrorCode, Message, Presence, ReadMark, ServerFrame};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use testkit::instance::{Instance, access};
use testkit::lossy::{Loses, Lossy};
use testkit::socket::Socket;
use testkit::{Databases, Kind, nats_url, until};

async fn instance_on(shards: &Path, nats: &str) -> Instance {
    let settings = [("NATS__URL", nats), ("LIMITS__SENDS_BURST", "1000")];
    let instance = Instance::start(shards, &settings).await;
    until("the bus is connected", async || {
        (instance.ready().await.1["status"] == "ok").then_some(())
    })
    .await;
    instance
}

async fn two(databases: &Databases) -> (Instance, Instance) {
    let (file, nats) = (databases.shards_file(), nats_url());
    tokio::join!(instance_on(&file, &nats), instance_on(&file, &nats))
}

/// The events of a client, as they arrive.
#[derive(Clone, Default)]
struct Device {
    logs: Arc<Mutex<BTreeMap<String, Vec<Message>>>>,
    connected: Arc<AtomicBool>,
    resynced: Arc<Mutex<Vec<String>>>,
}

impl Device {
    fn of(instance: &Instance, user: u64) -> (Client, Device) {
        Self::with(access(&instance.url), user)
    }

    fn with(access: chat_client::Access, user: u64) -> (Client, Device) {
        let (client, mut events) = Client::start(access, user);
        let device = Device::default();
        let keeps = device.clone();
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                match event {
                    Event::Message(message) => {
                        let mut logs = keeps.logs.lock().unwrap();
                        logs.entry(message.dialog.clone())
                            .or_default()
                            .push(message);
                    }
                    Event::Connected => keeps.connected.store(true, Ordering::SeqCst),
                    Event::Resync(dialog) => keeps.resynced.lock().unwrap().push(dialog),
                    _ => {}
                }
            }
        });
        (client, device)
    }

    fn seqs(&self, dialog: &str) -> Vec<u64> {
        let logs = self.logs.lock().unwrap();
        let log = logs.get(dialog).map(Vec::as_slice).unwrap_or_default();
        log.iter().map(|message| message.seq).collect()
    }

    async fn connected(&self) {
        until("the device is connected", async || {
            self.connected.load(Ordering::SeqCst).then_some(())
        })
        .await;
    }

    async fn has(&self, dialog: &str, expected: &[u64]) {
        let begun = Instant::now();
        while self.seqs(dialog) != expected {
            assert!(
                begun.elapsed() < testkit::PATIENCE,
                "{dialog}: {:?} instead of {expected:?}",
                self.seqs(dialog)
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

fn upto(n: u64) -> Vec<u64> {
    (1..=n).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_device_of_both_hears_every_message_once_and_in_order_its_own_included() {
    let databases = Databases::new(Kind::Mariadb, 2).await;
    let (one, two) = two(&databases).await;
    let devices = [
        Device::of(&one, 7),
        Device::of(&two, 7),
        Device::of(&two, 7),
        Device::of(&one, 42),
        Device::of(&two, 42),
    ];
    for (client, device) in &devices {
        device.connected().await;
        // A dialog that is not there yet can be followed, too.
        client.follow("7_42".into(), 0).await.unwrap();
    }
    let mut sends = Vec::new();
    for n in 0..200u64 {
        let (client, _) = &devices[n as usize % devices.len()];
        let to = if n as usize % devices.len() < 3 {
            42
        } else {
            7
        };
        let client = client.clone();
        sends.push(tokio::spawn(async move {
            client
                .send(to, format!("k{n}"), format!("text {n}"))
                .await
                .unwrap()
                .seq
        }));
    }
    let mut seqs = Vec::new();
    for send in sends {
        seqs.push(send.await.unwrap());
    }
    seqs.sort_unstable();
    assert_eq!(seqs, upto(200));
    for (_, device) in &devices {
        device.has("7_42", &upto(200)).await;
    }
    let log = one.api(7).await.log_upwards(42).await.unwrap();
    for (_, device) in &devices {
        assert_eq!(device.logs.lock().unwrap()["7_42"], log);
    }
}

/// Loses the events that match while it is switched on.
fn loses(what: &'static str) -> (Loses, Arc<AtomicBool>) {
    let on = Arc::new(AtomicBool::new(true));
    let is_on = on.clone();
    let loses = move |_: &str, payload: &[u8]| {
        is_on.load(Ordering::SeqCst) && payload.starts_with(what.as_bytes())
    };
    (Arc::new(loses), on)
}

/// 7 is on an instance that receives every event, 42 on one whose bus loses those that `what`
/// selects.
async fn with_losses(loses: Loses) -> (Databases, Instance, Instance, Lossy) {
    let databases = Databases::new(Kind::Sqlite, 2).await;
    let file = databases.shards_file();
    let lossy = Lossy::to(&nats_url(), loses, None).await.unwrap();
    let (nats, deaf) = (nats_url(), lossy.url.clone());
    let (one, two) = tokio::join!(instance_on(&file, &nats), instance_on(&file, &deaf));
    (databases, one, two, lossy)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_lost_is_betrayed_by_the_next_one() {
    let (loses, on) = loses("message 7_42 ");
    let (_databases, one, two, _lossy) = with_losses(loses).await;
    let (mut seven, mut forty_two) = (Socket::of(&one, 7).await, Socket::of(&two, 42).await);
    seven.send_text("1", 42, "first").await;
    seven.send_text("2", 42, "second").await;
    assert_eq!((seven.sent().await.1, seven.sent().await.1), (1, 2));
    on.store(false, Ordering::SeqCst);
    // 42 had nothing of this dialog in sight: what came before is owed all the same.
    seven.send_text("3", 42, "third").await;
    for n in 1..=3 {
        assert_eq!(forty_two.message().await.seq, n);
    }
    on.store(true, Ordering::SeqCst);
    seven.send_text("4", 42, "fourth").await;
    assert_eq!((seven.sent().await.1, seven.sent().await.1), (3, 4));
    on.store(false, Ordering::SeqCst);
    // Now 42 writes. The seq of that message reveals the loss: the answer waits for its place.
    forty_two.send_text("5", 7, "fifth").await;
    assert_eq!(forty_two.message().await.seq, 4);
    assert_eq!(forty_two.sent().await.1, 5);
    assert_eq!(seven.message().await.seq, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_message_of_a_burst_is_hinted_at() {
    let (loses, _on) = loses("message ");
    let (_databases, one, two, lossy) = with_losses(loses).await;
    let (mut seven, mut forty_two) = (Socket::of(&one, 7).await, Socket::of(&two, 42).await);
    until("42 is online", async || {
        is_online(&one, 42).await.then_some(())
    })
    .await;
    for n in 1..=3u64 {
        seven.send_text(&n.to_string(), 42, "unheard").await;
        seven.sent().await;
    }
    let begun = Instant::now();
    for n in 1..=3 {
        assert_eq!(forty_two.message().await.seq, n);
    }
    assert!(lossy.counts().0 >= 3, "nothing was lost");
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn read_marks_reach_all_devices_of_both_once_and_forward_only() {
    let (loses, on) = loses("read 7_42 42 2");
    let (_databases, one, two, _lossy) = with_losses(loses).await;
    let mut seven = Socket::of(&one, 7).await;
    let (mut phone, mut tablet) = (Socket::of(&two, 42).await, Socket::of(&one, 42).await);
    let mut tab = Socket::of(&two, 7).await;
    for n in 1..=3u64 {
        seven.send_text(&n.to_string(), 42, "x").await;
        assert_eq!(seven.sent().await.1, n);
        for socket in [&mut phone, &mut tablet, &mut tab] {
            assert_eq!(socket.message().await.seq, n);
        }
    }
    let mark = |seq| {
        ServerFrame::Read(ReadMark {
            dialog: "7_42".into(),
            user: 42,
            seq,
        })
    };
    // Lost on its way to the other instance, and hinted at.
    tablet
        .send(json!({"type": "read", "with": 7, "seq": 2}))
        .await;
    for socket in [&mut tablet, &mut seven] {
        assert_eq!(socket.next().await, mark(2));
    }
    on.store(false, Ordering::SeqCst);
    for socket in [&mut phone, &mut tab] {
        assert_eq!(socket.next().await, mark(2));
    }
    // Backwards is nowhere, and beyond the end is the end. What has not moved is not repeated: the
    // request is answered, if it has an id.
    for seq in [2, 1] {
        phone
            .send(json!({"type": "read", "id": "r", "with": 7, "seq": seq}))
            .await;
        assert_eq!(phone.next().await, ServerFrame::Done { id: "r".into() });
    }
    phone
        .send(json!({"type": "read", "with": 7, "seq": 99}))
        .await;
    for socket in [&mut phone, &mut tablet, &mut seven, &mut tab] {
        assert_eq!(socket.next().await, mark(3));
    }
    let inbox = one.api(42).await.inbox(10, None).await.unwrap();
    assert_eq!((inbox.dialogs[0].read, inbox.dialogs[0].unread), (3, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_comes_back_is_sent_what_it_missed_before_it_is_told_so() {
    let databases = Databases::new(Kind::Mariadb, 2).await;
    let (one, two) = two(&databases).await;
    let api = one.api(7).await;
    for n in 1..=30u64 {
        api.send(42, &format!("a{n}"), &format!("{n}"))
            .await
            .unwrap();
        api.send(43, &format!("b{n}"), &format!("{n}"))
            .await
            .unwrap();
    }
    two.api(42).await.mark_read(7, 12).await.unwrap();
    let mut phone = Socket::of(&two, 42).await;
    phone
        .send(json!({"type": "resume", "id": "r", "positions": {"7_42": 10, "42_99": 0}}))
        .await;
    for n in 11..=30 {
        assert_eq!(phone.message().await.seq, n);
    }
    let ServerFrame::Resumed {
        id,
        positions,
        resync,
        reads,
        incomplete,
        now,
    } = phone.next().await
    else {
        panic!("not resumed");
    };
    assert_eq!(id.as_deref(), Some("r"));
    assert_eq!(
        positions,
        BTreeMap::from([("7_42".into(), 30), ("42_99".into(), 0)])
    );
    assert_eq!(
        reads,
        [ReadMark {
            dialog: "7_42".into(),
            user: 42,
            seq: 12
        }]
    );
    assert!(resync.is_empty() && incomplete.is_empty());
    // From here on the dialog is followed; and a position may be set again.
    api.send(42, "a31", "31").await.unwrap();
    assert_eq!(phone.message().await.seq, 31);
    phone
        .send(json!({"type": "resume", "positions": {"7_42": 29}}))
        .await;
    assert_eq!(
        (phone.message().await.seq, phone.message().await.seq),
        (30, 31)
    );
    assert!(matches!(phone.next().await, ServerFrame::Resumed { .. }));
    // Beyond the log; and a dialog that began while the client was away.
    let api = two.api(99).await;
    api.send(42, "c1", "hello").await.unwrap();
    assert_eq!(phone.message().await.dialog, "42_99");
    let mut other = Socket::of(&one, 42).await;
    let resume = json!({"type": "resume", "positions": {"7_42": 1000}, "since": now});
    other.send(resume).await;
    let hello = other.message().await;
    assert_eq!((hello.dialog.as_str(), hello.seq), ("42_99", 1));
    let ServerFrame::Resumed {
        positions, resync, ..
    } = other.next().await
    else {
        panic!("not resumed");
    };
    assert_eq!(positions, BTreeMap::from([("42_99".into(), 1)]));
    assert_eq!(resync, ["7_42"]);
    // What cannot be meant is refused, and says so.
    for (resume, what) in [
        (
            json!({"type": "resume", "id": "x", "positions": {"7_43": 1}}),
            "no dialog of yours",
        ),
        (
            json!({"type": "resume", "id": "x", "positions": {"42_7": 1}}),
            "no dialog of yours",
        ),
        (
            json!({"type": "resume", "id": "x", "positions": {}, "since": "yesterday"}),
            "since",
        ),
    ] {
        other.send(resume).await;
        let error = other.error().await;
        assert_eq!(
            (error.code, error.id.as_deref()),
            (ErrorCode::BadRequest, Some("x"))
        );
        assert!(error.message.contains(what), "{}", error.message);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_missed_too_much_is_told_to_look_and_the_client_does() {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    let settings = [
        ("LIMITS__RESUME_MESSAGES", "50"),
        ("LIMITS__SENDS_BURST", "1000"),
    ];
    let instance = Instance::start(&databases.shards_file(), &settings).await;
    let api = instance.api(7).await;
    for n in 1..=300u64 {
        api.send(42, &n.to_string(), "x").await.unwrap();
    }
    let mut raw = Socket::of(&instance, 42).await;
    raw.send(json!({"type": "resume", "positions": {"7_42": 249}}))
        .await;
    let ServerFrame::Resumed {
        positions, resync, ..
    } = raw.next().await
    else {
        panic!("not resumed");
    };
    assert!(positions.is_empty());
    assert_eq!(resync, ["7_42"]);
    raw.send(json!({"type": "resume", "positions": {"7_42": 250}}))
        .await;
    for n in 251..=300 {
        assert_eq!(raw.message().await.seq, n);
    }
    let (client, device) = Device::of(&instance, 42);
    device.connected().await;
    client.follow("7_42".into(), 0).await.unwrap();
    device.has("7_42", &upto(300)).await;
    api.send(42, "301", "x").await.unwrap();
    device.has("7_42", &upto(301)).await;
    // A log that is shorter than the client's position is reported, and followed from its end.
    client.follow("7_42".into(), 5000).await.unwrap();
    until("the client gets a resync", async || {
        (*device.resynced.lock().unwrap() == ["7_42"]).then_some(())
    })
    .await;
    api.send(42, "302", "x").await.unwrap();
    device.has("7_42", &upto(302)).await;
}

fn presence(user: u64, online: bool) -> ServerFrame {
    ServerFrame::Presence(Presence { user, online })
}

async fn is_online(instance: &Instance, user: u64) -> bool {
    let url = format!("{}/v1/users/{user}/presence", instance.url);
    let token = instance.access().token(1).await.unwrap();
    let answer = reqwest::Client::new()
        .get(url)
        .bearer_auth(token)
        .send()
        .await
        .unwrap();
    answer.json::<Presence>().await.unwrap().online
}

#[tokio::test(flavor = "multi_thread")]
async fn presence_is_seen_from_every_instance_and_does_not_flap() {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    let (one, mut two) = two(&databases).await;
    let (mut here, mut there) = (Socket::of(&one, 7).await, Socket::of(&two, 8).await);
    for socket in [&mut here, &mut there] {
        socket.send(json!({"type": "watch", "users": [42]})).await;
        assert_eq!(socket.next().await, presence(42, false));
    }
    let (first, second) = (Socket::of(&one, 42).await, Socket::of(&two, 42).await);
    for socket in [&mut here, &mut there] {
        assert_eq!(socket.next().await, presence(42, true));
    }
    assert!(is_online(&one, 42).await && is_online(&two, 42).await && !is_online(&two, 43).await);
    // One tab is closed, and the other; and one comes back within the grace period: no event. The
    // next event is the end.
    drop(first);
    drop(second);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let back = Socket::of(&two, 42).await;
    until("the interest is there again", async || {
        is_online(&one, 42).await.then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    drop(back);
    let gone = Instant::now();
    for socket in [&mut here, &mut there] {
        assert_eq!(socket.next().await, presence(42, false));
    }
    assert!(gone.elapsed() >= Duration::from_secs(4), "within the grace");
    // A user whose instance is killed goes, too: the watcher on the other instance gets an event.
    let _third = Socket::of(&two, 42).await;
    assert_eq!(here.next().await, presence(42, true));
    two.kill();
    let killed = Instant::now();
    assert_eq!(here.next().await, presence(42, false));
    println!("away {:?} after its instance was killed", killed.elapsed());
    assert!(killed.elapsed() < Duration::from_secs(10));
    // A user who is no longer watched causes no event.
    here.send(json!({"type": "unwatch", "users": [42]})).await;
    let mut back = Socket::of(&one, 42).await;
    back.send_text("1", 7, "here I am").await;
    assert_eq!(here.message().await.text, "here I am");
    let many: Vec<u64> = (1000..1501).collect();
    here.send(json!({"type": "watch", "users": many})).await;
    assert_eq!(here.error().await.code, ErrorCode::BadRequest);
}

#[tokio::test(flavor = "multi_thread")]
async fn typing_is_passed_on_to_the_other_and_not_more_than_once_a_second() {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    let (one, two) = two(&databases).await;
    let (mut seven, mut forty_two) = (Socket::of(&one, 7).await, Socket::of(&two, 42).await);
    until("they receive each other's messages", async || {
        let (a, b) = (is_online(&one, 42).await, is_online(&two, 7).await);
        (a && b).then_some(())
    })
    .await;
    for _ in 0..10 {
        seven.send(json!({"type": "typing", "with": 42})).await;
    }
    seven.send_text("1", 42, "done").await;
    let typing = ServerFrame::Typing {
        dialog: "7_42".into(),
        user: 7,
    };
    assert_eq!(forty_two.next().await, typing);
    assert_eq!(forty_two.message().await.text, "done");
    assert_eq!(seven.sent().await.1, 1);
    seven.send(json!({"type": "typing", "with": 0})).await;
    assert_eq!(seven.error().await.code, ErrorCode::BadUser);
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_of_an_instance_that_is_killed_go_on_at_the_other_and_have_the_log() {
    let databases = Databases::new(Kind::Mariadb, 2).await;
    let (mut one, two) = two(&databases).await;
    let urls = [one.url.clone(), two.url.clone()];
    let anywhere = |first: usize| access(&urls[first]).with_others(urls.iter().map(String::as_str));
    let devices = [
        Device::with(anywhere(0), 7),
        Device::with(anywhere(1), 7),
        Device::with(anywhere(0), 42),
    ];
    for (client, device) in &devices {
        device.connected().await;
        client.follow("7_42".into(), 0).await.unwrap();
    }
    let mut sends = Vec::new();
    for n in 0..300u64 {
        if n == 100 {
            one.kill();
        }
        let (client, to) = match n % 3 {
            0 => (devices[0].0.clone(), 42),
            1 => (devices[1].0.clone(), 42),
            _ => (devices[2].0.clone(), 7),
        };
        sends.push(tokio::spawn(async move {
            client
                .send(to, format!("k{n}"), format!("{n}"))
                .await
                .unwrap()
        }));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for send in sends {
        send.await.unwrap();
    }
    let log = two.api(7).await.log_upwards(42).await.unwrap();
    assert_eq!(log.len(), 300);
    for (_, device) in &devices {
        device.has("7_42", &upto(300)).await;
        assert_eq!(device.logs.lock().unwrap()["7_42"], log);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_after_a_shard_was_declared_down_comes_without_being_asked_for() {
    let databases = Databases::new(Kind::Sqlite, 3).await;
    let file = databases.shards_file();
    let instance = Instance::start(&file, &[]).await;
    let (mut seven, mut forty_two) = (
        Socket::of(&instance, 7).await,
        Socket::of(&instance, 42).await,
    );
    seven.send_text("1", 42, "before").await;
    assert_eq!(seven.sent().await.1, 1);
    assert_eq!(forty_two.message().await.seq, 1);
    let (_, place) = instance
        .get(&format!("{}/admin/where/7/42", instance.admin))
        .await;
    let line = format!("name = {}", place["owner"]);
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains(&line), "{line}");
    std::fs::write(
        &file,
        text.replace(&line, &format!("{line}\nstate = \"down\"")),
    )
    .unwrap();
    until("the slot has another owner", async || {
        let (_, now) = instance
            .get(&format!("{}/admin/where/7/42", instance.admin))
            .await;
        (now["owner"] != place["owner"] && now["owner"].is_string()).then_some(())
    })
    .await;
    for (n, key) in ["2", "3"].iter().enumerate() {
        let seq = (1 << 40) + 1 + n as u64;
        seven.send_text(key, 42, "since").await;
        assert_eq!(seven.sent().await.1, seq);
        assert_eq!(forty_two.message().await.seq, seq);
    }
}

/// A client that was away connects again. Before it resumes, a message arrives in a dialog that it
/// does not know yet, or its send is repeated there: the dialog begins with the first message that
/// was missed all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_dialog_that_began_while_a_client_was_away_begins_with_its_first_message() {
    let nats = nats_url();
    let connected = [("NATS__URL", nats.as_str())];
    for settings in [&[][..], &connected] {
        let databases = Databases::new(Kind::Sqlite, 1).await;
        let instance = Instance::start(&databases.shards_file(), settings).await;
        let (first, now) = Socket::with_query(&instance, 7, "").await;
        drop(first);
        let (seven, forty_two) = (instance.api(7).await, instance.api(42).await);
        forty_two.send(7, "a", "1").await.unwrap();
        seven.send(42, "b", "2").await.unwrap();
        let since = format!("?since={now}");

        let (mut socket, _) = Socket::with_query(&instance, 7, &since).await;
        forty_two.send(7, "c", "3").await.unwrap();
        for seq in 1..=3 {
            assert_eq!(socket.message().await.seq, seq);
        }

        let (mut socket, _) = Socket::with_query(&instance, 7, &since).await;
        socket.send_text("b", 42, "2").await;
        let answer = socket.next().await;
        assert!(
            matches!(
                answer,
                ServerFrame::Sent {
                    seq: 2,
                    early: true,
                    ..
                }
            ),
            "{answer:?}"
        );
        for seq in 1..=2 {
            assert_eq!(socket.message().await.seq, seq);
        }
        socket
            .send(json!({"type": "resume", "positions": {}, "since": now}))
            .await;
        assert_eq!(socket.message().await.seq, 3);
        assert!(matches!(socket.next().await, ServerFrame::Resumed { .. }));
        socket.send_text("d", 42, "4").await;
        let answer = socket.next().await;
        assert!(
            matches!(
                answer,
                ServerFrame::Sent {
                    seq: 4,
                    early: false,
                    ..
                }
            ),
            "{answer:?}"
        );

        let url = format!("{}/v1/ws?since=yesterday", instance.url);
        let (status, body) = instance.get(&url).await;
        assert_eq!((status, body["code"].as_str()), (400, Some("bad_request")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_much_at_once_says_so_once() {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    let settings = [("LIMITS__SENDS_BURST", "1000")];
    let instance = Instance::start(&databases.shards_file(), &settings).await;
    let (mut seven, (client, device)) = (Socket::of(&instance, 7).await, Device::of(&instance, 42));
    device.connected().await;
    let api = instance.api(7).await;
    for n in 1..=300u64 {
        api.send(42, &n.to_string(), "x").await.unwrap();
        client.mark_read(7, n).await.unwrap();
    }
    let mut marks = 0;
    loop {
        match seven.next().await {
            ServerFrame::Message(_) => {}
            ServerFrame::Read(mark) => {
                marks += 1;
                if mark.seq == 300 {
                    break;
                }
            }
            other => panic!("{other:?}"),
        }
    }
    // More than fifty frames in a second would have closed the session; each of these was one.
    assert!(marks < 100, "{marks}");
    device.has("7_42", &upto(300)).await;
}
