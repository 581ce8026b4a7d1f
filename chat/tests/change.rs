//! Edits of the shard set under traffic, with processes that are killed, on real servers.

#![allow(missing_docs, clippy::unwrap_used, clippy::wildcard_enum_match_arm)]

use chat_client::checker::Acknowledged;
use futures_util::{StreamExt, stream};
use testkit::Kind;
use testkit::proxy::{Mode, Proxy};
use testkit::service::{Service, Talk, check};
use testkit::{seed, until};

/// Each of these keeps several processes busy: two at once are enough for a small machine.
static ROOM: tokio::sync::Semaphore = tokio::sync::Semaphore::const_new(2);

async fn add_drain_remove(kind: Kind) {
    let mut service = Service::new(kind, 4, 1).await;
    let nats = testkit::nats_url();
    let settings = [("NATS__URL", nats.as_str())];
    let (one, two) = (
        service.start(&settings).await,
        service.start(&settings).await,
    );
    let talk = Talk::begin(&[&one, &two], 20, 4, seed());
    talk.goes_on(300).await;

    service.add(4);
    service.settled(&one, 2).await;
    talk.goes_on(100).await;
    let moved = service
        .databases
        .number(4, "SELECT COUNT(*) FROM slots WHERE state = 'owner'")
        .await;
    assert!(
        (737..=902).contains(&moved),
        "a fifth of 4096, and two in a hundred: {moved}"
    );

    // Too early: the file is complained of, and nothing changes.
    let whole = service.entries.clone();
    service.remove("shard2");
    let problem = service.file_problem(&one).await;
    assert!(
        problem.contains("rejected shard2 is missing in the file but active"),
        "{problem}"
    );
    service.entries = whole;

    service.set("shard2", "state = \"draining\"");
    service.settled(&two, 3).await;
    talk.goes_on(100).await;
    for table in ["messages", "dialogs", "members"] {
        assert_eq!(
            service
                .databases
                .number(1, &format!("SELECT COUNT(*) FROM {table}"))
                .await,
            0,
            "{table}"
        );
    }
    service.remove("shard2");
    service.settled(&one, 4).await;
    talk.goes_on(100).await;
    let acknowledged = talk.end().await;
    check(&service, &[&one, &two], &acknowledged, &[0, 2, 3, 4]).await;
    for instance in [&one, &two] {
        assert!(!instance.log().contains("a page has a gap"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_is_added_another_drained_and_removed_while_people_talk_on_sqlite() {
    let _room = ROOM.acquire().await.unwrap();
    // One process: SQLite files are not shared between instances.
    let mut service = Service::new(Kind::Sqlite, 4, 1).await;
    let one = service.start(&[]).await;
    let talk = Talk::begin(&[&one], 10, 4, seed());
    talk.goes_on(100).await;
    service.add(4);
    service.settled(&one, 2).await;
    service.set("shard2", "state = \"draining\"");
    service.settled(&one, 3).await;
    service.remove("shard2");
    service.settled(&one, 4).await;
    talk.goes_on(50).await;
    let acknowledged = talk.end().await;
    check(&service, &[&one], &acknowledged, &[0, 2, 3, 4]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_is_added_another_drained_and_removed_while_people_talk_on_mysql() {
    let _room = ROOM.acquire().await.unwrap();
    add_drain_remove(Kind::Mysql).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_is_added_another_drained_and_removed_while_people_talk_on_mariadb() {
    let _room = ROOM.acquire().await.unwrap();
    add_drain_remove(Kind::Mariadb).await;
}

/// What happens to the instance that is at work, at a place.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// It is killed.
    Kill,
    /// It is stopped with its locks, and continues when another instance has finished its work.
    Stop,
}

/// Stages that are played at once: they mostly wait.
const AT_ONCE: usize = 3;

/// The dialogs that lie where the change is.
const PINNED: [(u64, u64); 4] = [(1, 2), (2, 4), (3, 5), (5, 6)];

/// A service on which little has to move: two heavy shards, and a light one that four dialogs are
/// pinned to. The instance with the fault is the coordinator; the traffic goes through the other,
/// which has a file of its own.
struct Stage {
    service: Service,
    faulty: testkit::instance::Instance,
    other: testkit::instance::Instance,
    others_file: std::path::PathBuf,
    talk: Talk,
    proxy: Proxy,
}

impl Stage {
    async fn set(place: &str, pass: u32, fault: Fault, burst: u32) -> Self {
        let mut service = Service::new(Kind::Mysql, 3, 1).await;
        let server = std::env::var("CHAT_TEST_MYSQL").unwrap();
        let proxy = Proxy::to(server.trim_start_matches("mysql://root@").to_owned()).await;
        service.entries[2].url = service.databases.url_through(2, proxy.port);
        for i in [0, 1] {
            service.entries[i].more = "weight = 20".into();
        }
        service.pin(&PINNED, "shard3");
        service.save();
        let nats = testkit::nats_url();
        let fault = match fault {
            Fault::Kill => format!("{place}=kill@{pass}"),
            Fault::Stop => format!("{place}=stop@{pass}"),
        };
        // The first one has the turn.
        let faulty = service
            .start(&[("NATS__URL", nats.as_str()), ("FAULT", &fault)])
            .await;
        until("it has the turn", async || {
            let (_, change) = faulty
                .get(&format!("{}/admin/resharding", faulty.admin))
                .await;
            (change["coordinator"] == change["instance"]).then_some(())
        })
        .await;
        let others_file = service.file.with_extension("other.toml");
        std::fs::copy(&service.file, &others_file).unwrap();
        let other = testkit::instance::Instance::start(
            &others_file,
            &[
                &testkit::service::QUICK[..],
                &[("NATS__URL", nats.as_str())],
            ]
            .concat(),
        )
        .await;
        let talk = Talk::begin(&[&other], 6, burst, seed());
        talk.goes_on(60).await;
        Self {
            service,
            faulty,
            other,
            others_file,
            talk,
            proxy,
        }
    }

    /// The edit reaches the other instance too.
    fn tell_the_other(&self) {
        std::fs::copy(&self.service.file, &self.others_file).unwrap();
    }

    /// Waits for the fault; then the other finishes, up to `version`. A stopped one continues after
    /// it.
    async fn strikes(&mut self, place: &str, fault: Fault, version: u64) {
        match fault {
            Fault::Kill => drop(self.faulty.ended().await),
            Fault::Stop => {
                until("it is stopped", async || {
                    self.faulty.is_stopped().then_some(())
                })
                .await;
            }
        }
        assert!(
            self.faulty
                .log()
                .contains(&format!("fault place=\"{place}\"")),
            "something else happened to it:\n{}",
            self.faulty.log()
        );
        self.tell_the_other();
        self.talk.goes_on(30).await;
        self.service.settled(&self.other, version).await;
        if fault == Fault::Stop {
            self.faulty.continues();
            self.service.settled(&self.faulty, version).await;
        }
        self.talk.goes_on(30).await;
    }

    async fn ends(self, fault: Fault, live: &[usize]) {
        let acknowledged = self.talk.end().await;
        let pinned = acknowledged
            .iter()
            .filter(|one| PINNED.contains(&(one.from.min(one.to), one.from.max(one.to))));
        assert!(
            pinned.count() > 20,
            "there was traffic in the changed slots"
        );
        match fault {
            Fault::Kill => check(&self.service, &[&self.other], &acknowledged, live).await,
            Fault::Stop => {
                let both = [&self.other, &self.faulty];
                check(&self.service, &both, &acknowledged, live).await;
            }
        }
        assert!(!self.other.log().contains("panicked") && !self.faulty.log().contains("panicked"));
    }
}

/// A shard is added, and four dialogs go there.
async fn while_a_shard_is_added(place: &str, pass: u32, fault: Fault) {
    println!("{place} {fault:?}");
    // One message at a time where some wait until the locks of the stopped instance are free:
    // longer than a send may take, and what is refused is repeated by each for itself.
    let burst = if fault == Fault::Kill { 4 } else { 1 };
    let mut stage = Stage::set(place, pass, fault, burst).await;
    stage.service.pin(&PINNED, "shard4");
    stage.service.add(3);
    // The instance that dies must be the one that installs the edit.
    if !place.starts_with("install") {
        stage.tell_the_other();
    }
    stage.strikes(place, fault, 2).await;
    stage.ends(fault, &[0, 1, 2, 3]).await;
}

/// A dead shard is declared down, and returns.
async fn while_a_shard_is_down_and_returns(place: &str, pass: u32, fault: Fault) {
    println!("{place} {fault:?}");
    // One message at a time: what is refused while the shard is dead is repeated by each for
    // itself.
    let mut stage = Stage::set(place, pass, fault, 1).await;
    stage.proxy.set(Mode::Cut);
    stage.service.pins.clear();
    stage.service.set("shard3", "state = \"down\"");
    if place == "merging" {
        stage.tell_the_other();
        stage.service.settled(&stage.other, 2).await;
        stage.talk.goes_on(30).await;
        stage.proxy.set(Mode::Pass);
    } else {
        stage.strikes(place, fault, 2).await;
        stage.proxy.set(Mode::Pass);
        stage.tell_the_other();
    }
    until("it answers again", async || {
        (stage.other.ready().await.1["status"] == "ok").then_some(())
    })
    .await;
    stage.service.set("shard3", "");
    if place == "merging" {
        stage.strikes(place, fault, 3).await;
    } else {
        stage.tell_the_other();
        stage.service.settled(&stage.other, 3).await;
    }
    stage.ends(fault, &[0, 1, 2]).await;
}

/// The places of adding a shard, and how often each is passed before it strikes.
const ADDING: [(&str, u32); 9] = [
    ("installing", 1),
    ("installed", 2),
    ("prepared", 3),
    ("copied", 3),
    ("sealed", 3),
    ("compared", 3),
    ("activated", 3),
    ("released", 3),
    ("purging", 2),
];

/// The places of losing one and having it back.
const LOSING: [(&str, u32); 3] = [("claimed", 3), ("failover_decided", 1), ("merging", 3)];

#[test]
fn every_place_is_gone_through() {
    let tested: Vec<&str> = ADDING
        .iter()
        .chain(&LOSING)
        .map(|(place, _)| *place)
        .collect();
    assert_eq!(tested, chat::resharding::FAILPOINTS);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_killed_at_any_step_of_a_move_is_replaced() {
    let _room = ROOM.acquire().await.unwrap();
    stream::iter(ADDING)
        .map(|(place, pass)| while_a_shard_is_added(place, pass, Fault::Kill))
        .buffer_unordered(AT_ONCE)
        .collect::<()>()
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_stalls_at_any_step_of_a_move_does_no_harm() {
    let _room = ROOM.acquire().await.unwrap();
    stream::iter(ADDING)
        .map(|(place, pass)| while_a_shard_is_added(place, pass, Fault::Stop))
        .buffer_unordered(AT_ONCE)
        .collect::<()>()
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_killed_during_failover_or_merge_is_replaced() {
    let _room = ROOM.acquire().await.unwrap();
    stream::iter(LOSING)
        .map(|(place, pass)| while_a_shard_is_down_and_returns(place, pass, Fault::Kill))
        .buffer_unordered(AT_ONCE)
        .collect::<()>()
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_stalls_during_failover_or_merge_does_no_harm() {
    let _room = ROOM.acquire().await.unwrap();
    stream::iter(LOSING)
        .map(|(place, pass)| while_a_shard_is_down_and_returns(place, pass, Fault::Stop))
        .buffer_unordered(AT_ONCE)
        .collect::<()>()
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_shard_that_is_declared_down_is_taken_over_and_merged_when_it_returns() {
    let _room = ROOM.acquire().await.unwrap();
    let mut service = Service::new(Kind::Mysql, 3, 0).await;
    let server = std::env::var("CHAT_TEST_MYSQL").unwrap();
    let proxy = Proxy::to(server.trim_start_matches("mysql://root@").to_owned()).await;
    service.entries[1].url = service.databases.url_through(1, proxy.port);
    service.save();
    let nats = testkit::nats_url();
    let settings = [("NATS__URL", nats.as_str())];
    let (one, two) = (
        service.start(&settings).await,
        service.start(&settings).await,
    );
    // One at a time: what is refused while the shard is dead is repeated by each for itself.
    let talk = Talk::begin(&[&one, &two], 12, 1, seed());
    talk.goes_on(200).await;
    // Texts of 16,000 bytes, 1.6 MB: they are merged in more than one transaction, for their bytes
    // and not for their number.
    let (api, long) = (one.api(1).await, "𝄞".repeat(4000));
    let (to, mut large) = (peer_on(&one, "shard2").await, Vec::new());
    for n in 0..100 {
        let (key, text) = (format!("large{n}"), format!("{}{n}", &long[..15_600]));
        let sent = api.send(to, &key, &text).await.unwrap();
        large.push(Acknowledged {
            from: 1,
            to,
            key,
            text,
            seq: sent.seq,
        });
    }

    proxy.set(Mode::Cut);
    until("its death is noticed", async || {
        (one.ready().await.1["status"] == "degraded").then_some(())
    })
    .await;
    service.set("shard2", "state = \"down\"");
    service.in_effect(&one, 2).await;
    until("every slot has an owner again", async || {
        let mut owned = 0;
        for i in [0, 2] {
            owned += service
                .databases
                .number(i, "SELECT COUNT(*) FROM slots WHERE state = 'owner'")
                .await;
        }
        (owned == 4096).then_some(())
    })
    .await;
    // All users can send, also in the dialogs of the lost shard. Their pages report a gap.
    talk.goes_on(300).await;
    let in_gap = {
        let log = talk.log.lock().unwrap().clone();
        log.into_iter()
            .find(|one| one.seq > 1 << 40)
            .expect("a message in a new generation")
    };
    let page = one
        .api(in_gap.from)
        .await
        .history(in_gap.to, &[])
        .await
        .unwrap();
    assert!(page.gap, "{page:?}");

    proxy.set(Mode::Pass);
    until("it answers again", async || {
        (one.ready().await.1["status"] == "ok").then_some(())
    })
    .await;
    service.set("shard2", "");
    service.settled(&one, 3).await;
    talk.goes_on(100).await;
    let mut acknowledged = talk.end().await;
    acknowledged.append(&mut large);
    check(&service, &[&one, &two], &acknowledged, &[0, 1, 2]).await;
    let page = one
        .api(in_gap.from)
        .await
        .history(in_gap.to, &[])
        .await
        .unwrap();
    assert!(!page.gap, "healed: {page:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_that_is_taken_back_at_once_ten_times_leaves_everything_as_it_was() {
    let _room = ROOM.acquire().await.unwrap();
    let mut service = Service::new(Kind::Mysql, 3, 1).await;
    let nats = testkit::nats_url();
    let settings = [("NATS__URL", nats.as_str())];
    let (one, two) = (
        service.start(&settings).await,
        service.start(&settings).await,
    );
    let talk = Talk::begin(&[&one, &two], 8, 4, seed());
    talk.goes_on(50).await;
    let before = service.entries.clone();
    for round in 0..10 {
        if round == 0 {
            service.add(3);
        } else {
            service.set("shard4", "");
        }
        tokio::time::sleep(std::time::Duration::from_millis(800)).await;
        service.set("shard4", "state = \"draining\"");
        tokio::time::sleep(std::time::Duration::from_millis(800)).await;
    }
    let version = async |instance: &testkit::instance::Instance| {
        instance
            .get(&format!("{}/admin/resharding", instance.admin))
            .await
            .1["version"]
            .as_u64()
            .unwrap()
    };
    until("both see the last edit", async || {
        for instance in [&one, &two] {
            let (_, topology) = instance
                .get(&format!("{}/admin/topology", instance.admin))
                .await;
            let state = &topology["topology"]["shards"]["shard4"]["state"];
            if topology["file"]["state"] != "in_effect" || state != "draining" {
                return None;
            }
        }
        (version(&one).await == version(&two).await).then_some(())
    })
    .await;
    let latest = version(&one).await;
    assert!(latest > 2, "some of the edits were seen: {latest}");
    service.settled(&one, latest).await;
    service.entries = before;
    service.save();
    service.settled(&two, latest + 1).await;
    let acknowledged = talk.end().await;
    check(&service, &[&one, &two], &acknowledged, &[0, 1, 2]).await;
}

/// A service of three shards whose second is behind a proxy.
async fn behind_a_proxy() -> (Service, Proxy) {
    let mut service = Service::new(Kind::Mysql, 3, 0).await;
    let server = std::env::var("CHAT_TEST_MYSQL").unwrap();
    let proxy = Proxy::to(server.trim_start_matches("mysql://root@").to_owned()).await;
    service.entries[1].url = service.databases.url_through(1, proxy.port);
    service.save();
    (service, proxy)
}

/// A user whose dialog with user 1 is on a shard.
async fn peer_on(instance: &testkit::instance::Instance, shard: &str) -> u64 {
    for peer in 1000.. {
        let url = format!("{}/admin/where/1/{peer}", instance.admin);
        if instance.get(&url).await.1["owner"] == shard {
            return peer;
        }
    }
    unreachable!("there are more users than that")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_is_slow_and_stalls_holds_nobody_else_up() {
    let _room = ROOM.acquire().await.unwrap();
    let (service, proxy) = behind_a_proxy().await;
    let nats = testkit::nats_url();
    let settings = [("NATS__URL", nats.as_str())];
    let (one, two) = (
        service.start(&settings).await,
        service.start(&settings).await,
    );
    // One at a time: what the slow shard refuses is repeated by each for itself.
    let talk = Talk::begin(&[&one, &two], 8, 1, seed());
    talk.goes_on(50).await;
    let others = [peer_on(&one, "shard1").await, peer_on(&one, "shard3").await];
    let slow = peer_on(&one, "shard2").await;
    proxy.set(Mode::Slow);
    let api = one.api(1).await;
    let (mut of_slow, mut quick_ones) = (0, 0);
    for n in 0..20 {
        // While one send to the slow shard is under way, others come and go; none of them is
        // refused.
        let key = format!("slow{n}");
        let late = api.send(slow, &key, "to the slow one");
        tokio::pin!(late);
        let mut during = 0;
        loop {
            let with = others[during % 2];
            let (key, instance) = (format!("quick{n}.{during}"), [&one, &two][during % 2]);
            let quick = instance.api(1).await;
            tokio::select! {
                biased;
                sent = quick.send(with, &key, "to another") => drop(sent.unwrap()),
                stored = &mut late => {
                    // What it stores takes it several of its answers.
                    assert!(stored.is_err() || during >= 3, "others waited for it: {during}");
                    of_slow += usize::from(stored.is_ok());
                    break;
                }
            }
            during += 1;
            if during == 20 {
                break;
            }
        }
        quick_ones += during;
    }
    assert!(
        quick_ones > 40,
        "{quick_ones} sends came and went meanwhile"
    );
    proxy.set(Mode::Pass);
    until("it is quick again", async || {
        (one.ready().await.1["status"] == "ok").then_some(())
    })
    .await;
    println!("{of_slow} of 20 sends were stored by the slow shard before others had been sent");
    talk.goes_on(50).await;
    let acknowledged = talk.end().await;
    check(&service, &[&one, &two], &acknowledged, &[0, 1, 2]).await;
}

/// The slots of a dead shard are unknown: the coordinator must not report that its work is done.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_shard_is_waited_for_by_name() {
    let _room = ROOM.acquire().await.unwrap();
    let (service, proxy) = behind_a_proxy().await;
    let one = service.start(&[]).await;
    service.settled(&one, 1).await;
    let work = async || {
        let url = format!("{}/admin/resharding", one.admin);
        one.get(&url).await.1["work"].clone()
    };
    proxy.set(Mode::Cut);
    until("it is waited for", async || {
        let work = work().await;
        let waits = work["stage"] == "waiting" && work["blocked_by"] == "shard2 does not answer";
        assert!(waits || work["stage"] == "idle", "{work}");
        waits.then_some(())
    })
    .await;
    proxy.set(Mode::Pass);
    service.settled(&one, 1).await;
}

/// The messages of a lost shard are forgotten: the gap stays known, wherever its slots move, and no
/// read waits for the shard.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_given_up_is_told_wherever_its_slot_moves() {
    let _room = ROOM.acquire().await.unwrap();
    let (mut service, proxy) = behind_a_proxy().await;
    let one = service.start(&[]).await;
    let lost = peer_on(&one, "shard2").await;
    let api = one.api(1).await;
    api.send(lost, "before", "it will be lost").await.unwrap();
    proxy.set(Mode::Cut);
    until("its death is noticed", async || {
        (one.ready().await.1["status"] == "degraded").then_some(())
    })
    .await;
    service.set("shard2", "state = \"down\"");
    service.settled(&one, 2).await;
    let inbox = api.inbox(50, None).await.unwrap();
    assert_eq!(inbox.incomplete, ["shard2"]);
    service.set("shard2", "state = \"down\"\nforget = true");
    service.settled(&one, 3).await;
    until("no read waits for the shard", async || {
        let inbox = api.inbox(50, None).await.unwrap();
        inbox.incomplete.is_empty().then_some(())
    })
    .await;
    let sent = api
        .send(lost, "after", "the dialog continues")
        .await
        .unwrap();
    assert_eq!(sent.seq, (1 << 40) + 1);
    service.remove("shard2");
    service.settled(&one, 4).await;
    let gap = async || api.history(lost, &[]).await.unwrap().gap;
    assert!(gap().await);
    // To the other shard, and the gap with it.
    let url = format!("{}/admin/where/1/{lost}", one.admin);
    let owner = one.get(&url).await.1["owner"].as_str().unwrap().to_owned();
    service.set(&owner, "state = \"draining\"");
    service.settled(&one, 5).await;
    assert_ne!(one.get(&url).await.1["owner"], owner.as_str());
    assert!(gap().await, "it has moved with its slot");
    let page = api.history(lost, &[]).await.unwrap();
    assert_eq!(page.messages.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_switched_off_after_its_shard_was_removed_is_not_missed() {
    let _room = ROOM.acquire().await.unwrap();
    let (mut service, proxy) = behind_a_proxy().await;
    let one = service.start(&[]).await;
    service.set("shard2", "state = \"draining\"");
    service.settled(&one, 2).await;
    service.remove("shard2");
    service.settled(&one, 3).await;
    proxy.set(Mode::Cut);
    // An edit is installed after a look at every shard.
    service.set("shard1", "weight = 2");
    service.settled(&one, 4).await;
    assert!(!one.log().contains("shard down"), "{}", one.log());
    assert_eq!(one.ready().await.1["status"], "ok");
}

#[tokio::test(flavor = "multi_thread")]
async fn different_edits_at_once_on_two_instances_end_in_one_document() {
    let _room = ROOM.acquire().await.unwrap();
    let service = Service::new(Kind::Mysql, 3, 0).await;
    let nats = testkit::nats_url();
    let settings = [
        &testkit::service::QUICK[..],
        &[("NATS__URL", nats.as_str())],
    ]
    .concat();
    let files = ["one", "two"].map(|name| service.file.with_extension(name));
    let whole = service.text();
    files
        .iter()
        .for_each(|file| std::fs::write(file, &whole).unwrap());
    let one = testkit::instance::Instance::start(&files[0], &settings).await;
    let two = testkit::instance::Instance::start(&files[1], &settings).await;
    let talk = Talk::begin(&[&one, &two], 8, 4, seed());
    talk.goes_on(50).await;
    let change = async |instance: &testkit::instance::Instance| {
        let url = format!("{}/admin/resharding", instance.admin);
        instance.get(&url).await.1
    };
    let pinned = |shard: &str| format!("{whole}[[pin]]\ndialog = \"1_2\"\nshard = \"{shard}\"\n");
    for round in 0..5 {
        let before = change(&one).await["version"].as_u64().unwrap();
        // At the same moment; every round another pair, so that each is an edit.
        let names = ["shard1", "shard2", "shard3"];
        std::fs::write(&files[0], pinned(names[round % 3])).unwrap();
        std::fs::write(&files[1], pinned(names[(round + 1) % 3])).unwrap();
        until("both edits were seen, and one is in effect", async || {
            let (of_one, of_two) = (change(&one).await, change(&two).await);
            let states =
                [&of_one, &of_two].map(|of| of["file"]["state"].as_str().unwrap().to_owned());
            let settled =
                states.contains(&"in_effect".to_owned()) && states.contains(&"outdated".to_owned());
            let same =
                of_one["version"] == of_two["version"] && of_one["version"].as_u64() > Some(before);
            (settled && same).then_some(())
        })
        .await;
    }
    for file in &files {
        std::fs::write(file, &whole).unwrap();
    }
    // The state of a file is as old as its last read: what counts is the topology. A proposal of
    // the last round may still be on its way, and is followed by another one.
    let unpinned = async |instance: &testkit::instance::Instance| {
        let url = format!("{}/admin/topology", instance.admin);
        let topology = instance.get(&url).await.1;
        let pins = topology["topology"]["pins"].as_array().unwrap().len();
        (pins == 0 && topology["file"]["state"] == "in_effect")
            .then(|| topology["version"].as_u64())
    };
    loop {
        let version = until("the first file is in effect again", async || {
            let (of_one, of_two) = (unpinned(&one).await?, unpinned(&two).await?);
            (of_one == of_two).then_some(of_one?)
        })
        .await;
        service.settled(&one, version).await;
        if change(&one).await["version"] == version {
            break;
        }
    }
    talk.goes_on(30).await;
    let acknowledged = talk.end().await;
    check(&service, &[&one, &two], &acknowledged, &[0, 1, 2]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_edit_is_answered_in_one_line_and_changes_nothing() {
    let _room = ROOM.acquire().await.unwrap();
    let mut service = Service::new(Kind::Mysql, 3, 3).await;
    let one = service.start(&[]).await;
    let foreign = Service::new(Kind::Mysql, 1, 0).await;
    drop(foreign.start(&[]).await);
    let good = service.entries.clone();
    let shard = |name: &str, url: &str, more: &str| {
        format!("[[shard]]\nname = \"{name}\"\nurl = \"{url}\"\n{more}\n")
    };
    let whole = service.text();
    let spare = service.databases.url(3);
    let all_draining = whole.replace("[[shard]]", "[[shard]]\nstate = \"draining\"");
    let without = |name: &str| {
        let mut copy = good.clone();
        copy.retain(|entry| entry.name != name);
        copy.iter()
            .map(|entry| shard(&entry.name, &entry.url, ""))
            .collect::<String>()
    };
    let two_down = good
        .iter()
        .map(|entry| {
            shard(
                &entry.name,
                &entry.url,
                if entry.name == "shard1" {
                    ""
                } else {
                    "state = \"down\""
                },
            )
        })
        .collect::<String>();
    for (text, answer) in [
        (
            whole[..whole.rfind("mysql://").unwrap()].to_owned(),
            "line 11: ",
        ),
        (whole.replace("name =", "nome ="), "unknown field `nome`"),
        (
            whole.clone() + &shard("shard1", &spare, ""),
            "a second shard named shard1",
        ),
        (
            whole.clone() + &shard("shard4", &service.databases.url(0), ""),
            "shard4 and shard1 have the same url",
        ),
        (
            whole.clone() + &shard("shard4", &format!("{}?", service.databases.url(0)), ""),
            "leads to the database of shard1",
        ),
        (
            whole.clone() + &shard("shard4", &foreign.databases.url(0), ""),
            "of service",
        ),
        (all_draining, "no active shard"),
        (
            without("shard3"),
            "shard3 is missing in the file but active",
        ),
        (
            whole.clone() + &shard("shard4", "mysql://root@127.0.0.1:1/chat", ""),
            "waiting shard4 does not answer",
        ),
        (
            whole.clone()
                + &shard(
                    "shard4",
                    "mysql://root:${NO_SUCH_VARIABLE}@127.0.0.1:1/chat",
                    "",
                ),
            "NO_SUCH_VARIABLE",
        ),
        (
            whole.clone() + &shard("shard4", &spare, "weight = 0"),
            "weight 0 of shard4 must be from 1",
        ),
        (
            whole.clone() + &shard("shard4", &spare, "weight = -1"),
            "weight -1 of shard4 must be from 1",
        ),
        (
            whole.clone() + "[[pin]]\ndialog = \"7_42\"\nshard = \"shard9\"\n",
            "there is no such shard",
        ),
        (two_down, "only 1 of 3 active shards would remain"),
        (
            whole.clone() + &shard("shard4", &spare, "state = \"down\""),
            "shard4 is new and cannot be down",
        ),
        (
            whole.clone() + &shard("shard4", &spare, "forget = true"),
            "belongs beside state",
        ),
    ] {
        std::fs::write(&service.file, &text).unwrap();
        let problem = until("the problem", async || {
            let problem = service.file_problem(&one).await;
            problem.contains(answer).then_some(problem)
        })
        .await;
        assert!(!problem.contains('\n'), "{problem}");
        // The good file is accepted again; its topology was in effect all the time.
        service.save();
        until("the good file is in effect", async || {
            let (_, change) = one.get(&format!("{}/admin/resharding", one.admin)).await;
            assert_eq!(change["version"], 1, "{text}");
            (change["file"]["state"] == "in_effect").then_some(())
        })
        .await;
    }
    let (_, slots) = one.get(&format!("{}/admin/slots", one.admin)).await;
    assert_eq!(slots["shards"].as_array().unwrap().len(), 3);
    assert!(!one.log().contains("panicked"));
    service.entries = good;
}
