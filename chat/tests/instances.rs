//! Two instances over one NATS and several databases: what holds between them, and when parts die.

#![allow(missing_docs, clippy::wildcard_enum_match_arm)]

use chat_client::{Api, ClientError};
use chat_wire::{ErrorCode, ServerFrame};
use futures_util::future::join_all;
use std::path::PathBuf;
use std::pin::pin;
use std::process::Command;
use std::time::Instant;
use testkit::instance::{Instance, access};
use testkit::proxy::{Mode, Proxy};
use testkit::socket::Socket;
use testkit::{Databases, Kind, nats_url, until};

async fn two(databases: &Databases) -> (Instance, Instance) {
    let file = databases.shards_file();
    two_on(&file).await
}

async fn two_on(file: &std::path::Path) -> (Instance, Instance) {
    let nats = nats_url();
    let settings = [("NATS__URL", nats.as_str())];
    let (one, two) = tokio::join!(
        Instance::start(file, &settings),
        Instance::start(file, &settings)
    );
    for instance in [&one, &two] {
        until("the bus is connected", async || {
            (instance.ready().await.1["status"] == "ok").then_some(())
        })
        .await;
    }
    (one, two)
}

/// A dialog of user 7 on `shard`.
async fn peer_on(instance: &Instance, shard: &str) -> u64 {
    for peer in 1000.. {
        let (_, place) = instance
            .get(&format!("{}/admin/where/7/{peer}", instance.admin))
            .await;
        if place["target"] == shard {
            return peer;
        }
    }
    unreachable!()
}

fn code(result: Result<chat_wire::Sent, ClientError>) -> Result<u64, ErrorCode> {
    match result {
        Ok(sent) => Ok(sent.seq),
        Err(ClientError::Refused(body)) => {
            assert_eq!(body.retryable, body.code.retryable());
            Err(body.code)
        }
        Err(e) => panic!("{e}"),
    }
}

/// Sends until it is stored, with one key, as a client does.
async fn send_until_stored(api: &Api, to: u64, key: &str, text: &str) -> u64 {
    until("the send is stored", async || {
        code(api.send(to, key, text).await).ok()
    })
    .await
}

async fn talk_across(kind: Kind) {
    let databases = Databases::new(kind, 4).await;
    let (one, two) = two(&databases).await;
    let (mut seven, mut tab, mut forty_two) = (
        Socket::of(&one, 7).await,
        Socket::of(&two, 7).await,
        Socket::of(&two, 42).await,
    );
    // Interest takes a moment to reach the bus: a first message in each direction, repeated until
    // it is received.
    for round in 0u64..20 {
        seven
            .send_text(&format!("a{round}"), 42, &format!("to 42, {round}"))
            .await;
        assert_eq!(seven.sent().await.1, 2 * round + 1);
        if round > 0 {
            assert_eq!(forty_two.message().await.text, format!("to 42, {round}"));
            assert_eq!(
                tab.message().await.seq,
                2 * round + 1,
                "the author's other tab on another instance"
            );
        }
        forty_two
            .send_text(&format!("b{round}"), 7, &format!("to 7, {round}"))
            .await;
        loop {
            match forty_two.next().await {
                ServerFrame::Sent { seq, .. } => break assert_eq!(seq, 2 * round + 2),
                ServerFrame::Message(_) => {}
                other => panic!("{other:?}"),
            }
        }
        if round > 0 {
            assert_eq!(seven.message().await.seq, 2 * round + 2);
            assert_eq!(tab.message().await.seq, 2 * round + 2);
        } else {
            until("interest has reached the bus", async || {
                let count = async |instance: &Instance| {
                    let text = reqwest::get(format!("{}/metrics", instance.admin))
                        .await
                        .unwrap()
                        .text()
                        .await
                        .unwrap();
                    text.lines()
                        .find_map(|line| line.strip_prefix("chat_bus_received_total "))
                        .unwrap()
                        .parse::<u64>()
                        .unwrap()
                };
                (count(&one).await > 0 || count(&two).await > 0).then_some(())
            })
            .await;
            for socket in [&mut seven, &mut tab] {
                drain(socket).await;
            }
        }
    }
    let logs = [(&one, 7, 42), (&one, 42, 7), (&two, 7, 42), (&two, 42, 7)];
    let mut first = None;
    for (instance, user, with) in logs {
        let api = instance.api(user).await;
        let (up, down) = (
            api.log_upwards(with).await.unwrap(),
            api.log_downwards(with).await.unwrap(),
        );
        assert_eq!(up, down);
        assert_eq!(
            up.iter().map(|m| m.seq).collect::<Vec<_>>(),
            (1..=40).collect::<Vec<_>>()
        );
        assert_eq!(*first.get_or_insert(up.clone()), up);
    }
}

/// Takes what is there, up to the answer to a ping.
async fn drain(socket: &mut Socket) {
    socket
        .send(serde_json::json!({"type": "ping", "id": "drain"}))
        .await;
    while !matches!(socket.next().await, ServerFrame::Pong { .. }) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn two_people_on_two_instances_talk_and_read_the_same_history_on_mysql() {
    talk_across(Kind::Mysql).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_people_on_two_instances_talk_and_read_the_same_history_on_mariadb() {
    talk_across(Kind::Mariadb).await;
}

/// The test servers do not flush at commit, which a real one must.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_does_not_flush_at_commit_is_warned_of() {
    for kind in [Kind::Mysql, Kind::Mariadb] {
        let databases = Databases::new(kind, 1).await;
        let instance = Instance::start(&databases.shards_file(), &[]).await;
        let log = instance.log();
        let warning = log
            .lines()
            .find(|line| line.contains("innodb_flush_log_at_trx_commit is 0"));
        let warning = warning.unwrap_or_else(|| panic!("{kind:?}: {log}"));
        assert!(
            warning.contains("WARN") && warning.contains("shard1"),
            "{warning}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn instances_that_start_at_the_same_moment_found_one_service() {
    let databases = Databases::new(Kind::Mysql, 3).await;
    let file = databases.shards_file();
    let starts = (0..4).map(|_| Instance::start(&file, &[]));
    let instances = futures_util::future::join_all(starts).await;
    assert_eq!(
        databases
            .total("SELECT COUNT(*) FROM slots WHERE state = 'owner'")
            .await,
        4096
    );
    for instance in &instances {
        let (status, state) = instance.ready().await;
        // Without NATS they notice each other.
        let strangers = state["reasons"].to_string().contains("nats.url");
        assert!(
            status == 200 && (state["status"] == "ok" || strangers),
            "{state}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retried_send_is_stored_once_through_whichever_instance() {
    let databases = Databases::new(Kind::Mysql, 2).await;
    let (one, two) = two(&databases).await;
    let (first, second) = (one.api(7).await, two.api(7).await);
    let (a, b) = tokio::join!(first.send(42, "k", "hello"), second.send(42, "k", "hello"));
    let (a, b, c) = (
        a.unwrap(),
        b.unwrap(),
        first.send(42, "k", "hello").await.unwrap(),
    );
    assert_eq!((&a, &b), (&b, &c));
    assert_eq!(
        code(second.send(42, "k", "something else").await),
        Err(ErrorCode::KeyReused)
    );
    assert_eq!(databases.total("SELECT COUNT(*) FROM messages").await, 1);
}

/// The COMMIT is done, its answer is withheld, and the instance is killed: the client has no
/// answer. The retry through the other instance gets the one place there is.
#[tokio::test(flavor = "multi_thread")]
async fn an_instance_killed_between_commit_and_acknowledgement_has_stored_once() {
    let databases = Databases::new(Kind::Mysql, 1).await;
    let server = std::env::var("CHAT_TEST_MYSQL").unwrap();
    let proxy = Proxy::to(server.rsplit('@').next().unwrap().to_owned()).await;
    let mut killed = Instance::start(
        &databases.shards_file_with(&[databases.url_through(0, proxy.port)]),
        &[],
    )
    .await;
    let other = Instance::start(&databases.shards_file(), &[]).await;

    let api = killed.api(7).await;
    assert_eq!(code(api.send(42, "before", "x").await), Ok(1));
    proxy.set(Mode::SwallowReplyToCommit);
    let hanging = tokio::spawn(async move { api.send(42, "k", "hello").await });
    until("the commit is done", async || {
        (proxy.commits_withheld() > 0).then_some(())
    })
    .await;
    killed.kill();
    assert!(
        matches!(hanging.await.unwrap(), Err(ClientError::Connection(_))),
        "no answer was sent"
    );
    assert_eq!(
        databases.number(0, "SELECT COUNT(*) FROM messages").await,
        2
    );

    let api = other.api(7).await;
    for _ in 0..3 {
        assert_eq!(code(api.send(42, "k", "hello").await), Ok(2));
    }
    assert_eq!(
        code(api.send(42, "k", "another").await),
        Err(ErrorCode::KeyReused)
    );
    assert_eq!(
        databases.number(0, "SELECT COUNT(*) FROM messages").await,
        2
    );
}

/// The connection breaks in the answer to COMMIT: the instance does not know, asks again with the
/// same keys, and each gets the right answer.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_to_commit_that_is_lost_doubles_nothing() {
    for kind in [Kind::Mysql, Kind::Mariadb] {
        let databases = Databases::new(kind, 1).await;
        let server = databases.url(0);
        let target = server
            .rsplit('@')
            .next()
            .unwrap()
            .split('/')
            .next()
            .unwrap()
            .to_owned();
        let proxy = Proxy::to(target).await;
        let instance = Instance::start(
            &databases.shards_file_with(&[databases.url_through(0, proxy.port)]),
            &[],
        )
        .await;
        let api = instance.api(7).await;
        assert_eq!(code(api.send(42, "before", "x").await), Ok(1));
        proxy.set(Mode::CutReplyToCommit);
        let sending = tokio::spawn(async move { (code(api.send(42, "k", "hello").await), api) });
        until("an answer is lost", async || {
            (proxy.commits_withheld() > 0).then_some(())
        })
        .await;
        proxy.set(Mode::Pass);
        let (sent, api) = sending.await.unwrap();
        assert_eq!(sent, Ok(2), "the instance found out by itself");
        assert_eq!(code(api.send(42, "k", "hello").await), Ok(2));
        assert_eq!(
            databases.number(0, "SELECT COUNT(*) FROM messages").await,
            2
        );
    }
}

/// A database that hangs or dies: its dialogs are refused within a second, the others go on, and it
/// comes back by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_shard_hurts_only_its_own_dialogs_and_comes_back_by_itself() {
    for (mode, name) in [(Mode::Cut, "dies"), (Mode::Hang, "hangs")] {
        let databases = Databases::new(Kind::Mysql, 2).await;
        let server = std::env::var("CHAT_TEST_MYSQL").unwrap();
        let proxy = Proxy::to(server.rsplit('@').next().unwrap().to_owned()).await;
        let file =
            databases.shards_file_with(&[databases.url(0), databases.url_through(1, proxy.port)]);
        let instance = Instance::start(&file, &[]).await;
        let api = instance.api(7).await;
        let (alive, dead) = (
            peer_on(&instance, "shard1").await,
            peer_on(&instance, "shard2").await,
        );
        assert_eq!(code(api.send(dead, "1", "x").await), Ok(1));
        assert_eq!(code(api.send(alive, "1", "x").await), Ok(1));

        proxy.set(mode);
        for n in 0..3 {
            let begun = Instant::now();
            assert_eq!(
                code(api.send(dead, "2", "y").await),
                Err(ErrorCode::ShardDown),
                "{name}"
            );
            // Not a measure of speed: the promise is that the answer does not wait for the shard.
            assert!(
                begun.elapsed().as_millis() < 1000,
                "{name} {n}: {:?}",
                begun.elapsed()
            );
        }
        assert_eq!(
            code(api.send(alive, "2", "y").await),
            Ok(2),
            "the others go on"
        );
        let inbox = api.inbox(10, None).await.unwrap();
        assert_eq!(inbox.incomplete, ["shard2"]);
        assert_eq!(
            inbox
                .dialogs
                .iter()
                .map(|dialog| dialog.with)
                .collect::<Vec<_>>(),
            [Some(alive)]
        );
        assert!(
            matches!(api.history(dead, &[]).await, Err(ClientError::Refused(body)) if body.code == ErrorCode::ShardDown)
        );
        let (status, ready) = instance.ready().await;
        assert_eq!((status, ready["status"].as_str()), (200, Some("degraded")));

        proxy.set(Mode::Pass);
        assert_eq!(send_until_stored(&api, dead, "2", "y").await, 2, "{name}");
        assert_eq!(api.inbox(10, None).await.unwrap().incomplete.len(), 0);
        assert_eq!(api.log_upwards(dead).await.unwrap().len(), 2);
    }
}

/// A full machine opens connections slowly. While what is asked on others is answered, the shard is
/// not dead.
#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_answers_is_not_down_because_a_connection_takes_long_to_open() {
    let databases = Databases::new(Kind::Mysql, 1).await;
    let server = std::env::var("CHAT_TEST_MYSQL").unwrap();
    let proxy = Proxy::to(server.rsplit('@').next().unwrap().to_owned()).await;
    let file = databases.shards_file_with(&[databases.url_through(0, proxy.port)]);
    // Those who wait for a new connection do not see one that comes free meanwhile: each time one
    // or two come to their turn.
    let settings = [
        ("STORE__LANES", "8"),
        ("STORE__LANES_MIN", "8"),
        ("STORE__SEND_MS", "60000"),
        ("LIMITS__REQUEST_MS", "120000"),
        ("LIMITS__SENDS_BURST", "100000"),
    ];
    let instance = Instance::start(&file, &settings).await;
    let api = instance.api(7).await;
    assert_eq!(code(api.send(42, "0", "x").await), Ok(1));

    proxy.set(Mode::HangNew);
    // More pages at once than there are connections for reading, while sends are answered.
    let (mut sent, mut refused) = (1, Vec::new());
    while refused.is_empty() {
        let mut reading = pin!(join_all((0..8).map(|_| api.history(42, &[]))));
        let pages = loop {
            let key = sent.to_string();
            tokio::select! {
                pages = &mut reading => break pages,
                seq = api.send(42, &key, "x") => {
                    sent += 1;
                    assert_eq!(code(seq), Ok(sent));
                }
            }
        };
        refused.extend(pages.into_iter().filter_map(|page| match page {
            Ok(_) => None,
            Err(ClientError::Refused(body)) => Some(body.code),
            Err(e) => panic!("{e}"),
        }));
    }
    assert!(refused.iter().all(|code| *code == ErrorCode::Overloaded));
    // More transactions at once than there are connections for writing: those without one come to
    // their turn.
    for n in 1.. {
        let (api, key) = (instance.api(1000 + n).await, n.to_string());
        let sends = join_all((100..112).map(|peer| api.send(peer, &key, "x"))).await;
        let stored: Vec<_> = sends.into_iter().map(code).collect();
        assert_eq!(stored, [Ok(1); 12]);
        if instance.log().contains("transaction repeated") {
            break;
        }
    }
    assert!(!instance.log().contains("shard down"), "{}", instance.log());

    // Nothing is answered any more: now it is.
    proxy.set(Mode::Hang);
    assert_eq!(
        code(api.send(42, "last", "x").await),
        Err(ErrorCode::ShardDown)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_starts_with_a_dead_shard_and_says_so() {
    let databases = Databases::new(Kind::Mysql, 2).await;
    drop(Instance::start(&databases.shards_file(), &[]).await);
    let server = std::env::var("CHAT_TEST_MYSQL").unwrap();
    let proxy = Proxy::to(server.rsplit('@').next().unwrap().to_owned()).await;
    proxy.set(Mode::Cut);
    let file =
        databases.shards_file_with(&[databases.url(0), databases.url_through(1, proxy.port)]);
    let instance = Instance::start(&file, &[]).await;
    assert!(instance.log().contains("shard down"), "{}", instance.log());
    let (_, ready) = instance.ready().await;
    assert_eq!(ready["reasons"][0], "shard2 does not answer");
    let api = instance.api(7).await;
    let (alive, dead) = (
        peer_on(&instance, "shard1").await,
        peer_on(&instance, "shard2").await,
    );
    assert_eq!(code(api.send(alive, "1", "x").await), Ok(1));
    assert_eq!(
        code(api.send(dead, "1", "x").await),
        Err(ErrorCode::ShardDown)
    );
    proxy.set(Mode::Pass);
    assert_eq!(send_until_stored(&api, dead, "1", "x").await, 1);
}

/// A shard that was wiped while it was away must not come back as if nothing had happened.
#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_is_wiped_under_a_running_instance_is_refused() {
    let databases = Databases::new(Kind::Mysql, 2).await;
    let instance = Instance::start(&databases.shards_file(), &[]).await;
    let api = instance.api(7).await;
    let wiped = peer_on(&instance, "shard2").await;
    assert_eq!(code(api.send(wiped, "1", "x").await), Ok(1));
    databases.execute(1, "DELETE FROM meta").await;
    assert_eq!(
        code(api.send(wiped, "2", "x").await),
        Err(ErrorCode::ShardDown)
    );
    until("the log says why", async || {
        instance
            .log()
            .contains("the database is empty")
            .then_some(())
    })
    .await;
    assert_eq!(
        databases.number(1, "SELECT COUNT(*) FROM messages").await,
        1
    );
}

struct Nats {
    directory: PathBuf,
    port: u16,
}

impl Nats {
    fn servers(arguments: &[&str]) {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../dev/servers");
        let status = Command::new(script).args(arguments).status().unwrap();
        assert!(status.success());
    }

    fn start(&self) {
        Self::servers(&[
            "nats",
            self.directory.to_str().unwrap(),
            &self.port.to_string(),
        ]);
    }

    fn stop(&self) {
        Self::servers(&["kill", self.directory.to_str().unwrap()]);
    }
}

impl Drop for Nats {
    fn drop(&mut self) {
        self.stop();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bus_that_goes_and_comes_back_interrupts_only_delivery_between_instances() {
    let databases = Databases::new(Kind::Sqlite, 2).await;
    let port = testkit::free_port();
    let nats = Nats {
        directory: databases.directory().join("nats"),
        port,
    };
    nats.start();
    let url = format!("nats://127.0.0.1:{port}");
    let file = databases.shards_file();
    let (one, two) = (
        Instance::start(&file, &[("NATS__URL", &url)]).await,
        Instance::start(&file, &[("NATS__URL", &url)]).await,
    );
    let status = async |instance: &Instance, expected: &str| {
        until(expected, async || {
            (instance.ready().await.1["status"] == expected).then_some(())
        })
        .await;
    };
    status(&one, "ok").await;
    status(&two, "ok").await;
    let (mut seven, mut near, mut far) = (
        Socket::of(&one, 7).await,
        Socket::of(&one, 42).await,
        Socket::of(&two, 42).await,
    );
    let mut number = 0u64;
    // Sends until `far` receives one; `near`, on the same instance, receives each.
    let mut until_far_hears = async |far: &mut Socket| {
        until("the other instance receives it", async || {
            number += 1;
            seven.send_text(&format!("k{number}"), 42, "x").await;
            assert_eq!(seven.sent().await.1, number);
            assert_eq!(near.message().await.seq, number);
            far.send(serde_json::json!({"type": "ping"})).await;
            let mut received = None;
            while let ServerFrame::Message(message) = far.next().await {
                received = Some(message.seq);
            }
            received
        })
        .await
    };
    until_far_hears(&mut far).await;
    nats.stop();
    status(&one, "degraded").await;
    status(&two, "degraded").await;
    let mut eight = Socket::of(&one, 8).await;
    let mut nine = Socket::of(&one, 9).await;
    eight.send_text("k", 9, "stored and delivered here").await;
    assert_eq!(eight.sent().await.1, 1);
    assert_eq!(nine.message().await.seq, 1);
    nats.start();
    status(&one, "ok").await;
    status(&two, "ok").await;
    until_far_hears(&mut far).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_goes_on_through_a_restart_of_its_instance_and_loses_nothing() {
    let databases = Databases::new(Kind::Sqlite, 2).await;
    let file = databases.shards_file();
    let port = testkit::free_port().to_string();
    let listen = format!("127.0.0.1:{port}");
    let settings = [("LISTEN", listen.as_str())];
    let mut instance = Instance::start(&file, &settings).await;
    let (client, mut events) = chat_client::Client::start(access(&instance.url), 7);
    tokio::spawn(async move { while events.recv().await.is_some() {} });
    let mut seqs = Vec::new();
    for n in 0..60u64 {
        if n % 20 == 10 {
            instance.kill();
            let sending = client.send(42, format!("k{n}"), format!("{n}"));
            let (sent, started) = tokio::join!(sending, Instance::start(&file, &settings));
            instance = started;
            seqs.push(sent.unwrap().seq);
        } else {
            seqs.push(
                client
                    .send(42, format!("k{n}"), format!("{n}"))
                    .await
                    .unwrap()
                    .seq,
            );
        }
    }
    assert_eq!(seqs, (1..=60).collect::<Vec<_>>());
    let log = instance.api(42).await.log_upwards(7).await.unwrap();
    assert_eq!(
        log.iter().map(|m| m.text.clone()).collect::<Vec<_>>(),
        (0..60).map(|n| n.to_string()).collect::<Vec<_>>()
    );
}

/// An instance that shuts down says so, and one that is killed is missed: both are reasons to
/// compare sessions with the shards. An instance that is alive is never taken for gone.
#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_leaves_or_is_killed_is_noticed_by_the_others() {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    let (one, mut two) = two(&databases).await;
    let others = async || {
        let url = format!("{}/admin/resharding", one.admin);
        one.get(&url).await.1["others"].as_object().unwrap().len()
    };
    until("both know each other", async || {
        (others().await == 1).then_some(())
    })
    .await;
    assert!(!one.log().contains("another instance"), "{}", one.log());
    two.terminate();
    until("it has announced its shutdown", async || {
        (one.log().contains("another instance shut down") && others().await == 0).then_some(())
    })
    .await;
    let nats = nats_url();
    let settings = [("NATS__URL", nats.as_str())];
    two = Instance::start(&databases.shards_file(), &settings).await;
    until("it is back", async || (others().await == 1).then_some(())).await;
    assert!(!one.log().contains("another instance timed out"));
    two.kill();
    until("it is missed", async || {
        (one.log().contains("another instance timed out") && others().await == 0).then_some(())
    })
    .await;
}

/// The answer of the admin listener to a POST.
async fn post(url: String, body: serde_json::Value) -> serde_json::Value {
    let response = reqwest::Client::new()
        .post(url)
        .json(&body)
        .send()
        .await
        .unwrap();
    assert!(
        response.status().is_success(),
        "{}",
        response.text().await.unwrap()
    );
    response.json().await.unwrap()
}

/// Waits for the end of a session, and returns its close code.
async fn closed(mut socket: Socket) -> Option<u16> {
    socket.until_closed().await.1
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_is_disconnected_leaves_everywhere_and_may_come_back() {
    let databases = Databases::new(Kind::Mariadb, 2).await;
    let (one, two) = two(&databases).await;
    let sessions = [Socket::of(&one, 7).await, Socket::of(&two, 7).await];
    let mut other = Socket::of(&two, 42).await;
    post(
        format!("{}/admin/users/7/disconnect", one.admin),
        serde_json::json!({}),
    )
    .await;
    for session in sessions {
        assert_eq!(closed(session).await, Some(4010));
    }
    other.send_text("k", 7, "still here").await;
    other.sent().await;
    Socket::of(&two, 7).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_token_is_refused_everywhere_and_after_a_restart() {
    let databases = Databases::new(Kind::Mariadb, 2).await;
    let (one, mut two) = two(&databases).await;
    let now = || {
        std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs()
    };
    let token = one.access().token(7).await.unwrap();
    let with = |instance: &Instance| {
        let request = reqwest::Client::new().get(format!("{}/v1/dialogs", instance.url));
        let request = request.bearer_auth(&token);
        async move { request.send().await.unwrap().status().as_u16() }
    };
    let sessions = [Socket::of(&one, 7).await, Socket::of(&two, 7).await];
    let mut other = Socket::of(&one, 42).await;
    assert_eq!((with(&one).await, with(&two).await), (200, 200));
    // A time before the tokens changes nothing.
    let revoke = format!("{}/admin/users/7/revoke", one.admin);
    post(
        revoke.clone(),
        serde_json::json!({"issued_before": now() - 600}),
    )
    .await;
    assert_eq!(with(&one).await, 200);
    let answer = post(revoke.clone(), serde_json::json!({})).await;
    assert_eq!(answer["not_yet_on"], serde_json::json!([]));
    for session in sessions {
        assert_eq!(closed(session).await, Some(4001));
    }
    assert_eq!(with(&one).await, 401);
    until("the other instance knows it", async || {
        (with(&two).await == 401).then_some(())
    })
    .await;
    other.send_text("k", 43, "another user").await;
    other.sent().await;
    let (_, user) = one.get(&format!("{}/admin/users/7", one.admin)).await;
    assert_eq!(
        (&user["issued_before"], &user["sessions"]),
        (&answer["issued_before"], &0.into())
    );
    // A later token is taken.
    until("the second is over", async || {
        (now() >= answer["issued_before"].as_u64().unwrap()).then_some(())
    })
    .await;
    Socket::of(&one, 7).await;
    // Restarted, and without NATS.
    two.kill();
    // A shard that was away when it was revoked gets it with the next reading.
    let count = "SELECT COUNT(*) FROM revocations";
    assert_eq!(databases.number(1, count).await, 1);
    databases.execute(1, "DELETE FROM revocations").await;
    let alone = Instance::start(&databases.shards_file(), &[]).await;
    assert_eq!(with(&alone).await, 401);
    assert_eq!(databases.number(1, count).await, 1);
    // A time that is to come would refuse everybody.
    let future = reqwest::Client::new()
        .post(&revoke)
        .json(&serde_json::json!({"issued_before": now() + 600}));
    assert_eq!(future.send().await.unwrap().status(), 400);
    assert!(one.log().contains("\"act\":\"revoke\""), "{}", one.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_instance_without_nats_is_noticed() {
    let databases = Databases::new(Kind::Mariadb, 1).await;
    let file = databases.shards_file();
    let one = Instance::start(&file, &[]).await;
    let two = Instance::start(&file, &[]).await;
    until("one of them says so", async || {
        let states = [one.ready().await.1, two.ready().await.1];
        let says = |state: &serde_json::Value| state.to_string().contains("nats.url is not set");
        states.iter().any(says).then_some(())
    })
    .await;
    assert!((one.log() + &two.log()).contains("another instance uses these shards"));
}
