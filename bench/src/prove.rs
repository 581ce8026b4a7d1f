//! The proof: people talk at a steady rate while shards are added, drained and removed, or declared down and brought back, and
//! while processes are killed in the middle of it. Afterwards everything is compared with what was acknowledged: through every
//! instance, for both users, and straight in the shards' tables; and every key is sent once more.

use crate::rng::Chance;
use crate::service::{Service, locked};
use anyhow::{Context, bail, ensure};
use chat_client::{Access, Api, Client, ClientError, Event};
use clap::{Args, ValueEnum};
use futures_util::{StreamExt, TryStreamExt, stream};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What happens to the shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// A fifth is added, the second drained and removed; the coordinator is killed three times, and a shard once.
    Change,
    /// One dies, is declared down, and returns; another is declared down although it is alive, and returns.
    Lose,
    /// Their servers are stopped for 20 seconds, made read-only, and left with eight connections, one after the other.
    Hurt,
}

#[derive(Args)]
pub struct Options {
    /// The server.
    #[arg(long, default_value = "target/release/chat")]
    chat: PathBuf,
    /// What happens to the shards.
    #[arg(long, value_enum, default_value_t = Scenario::Change)]
    scenario: Scenario,
    /// Where servers, logs and the shards file are put.
    #[arg(long)]
    dir: PathBuf,
    /// How long people talk, in seconds.
    #[arg(long, default_value_t = 180)]
    seconds: u64,
    /// Messages a second, planned.
    #[arg(long, default_value_t = 500.0)]
    rate: f64,
    /// Dialogs that they are in.
    #[arg(long, default_value_t = 2000)]
    dialogs: u64,
    /// People.
    #[arg(long, default_value_t = 400)]
    users: u64,
    /// Of a hundred messages, so many are sent again at once through the other instance.
    #[arg(long, default_value_t = 2)]
    repeats: u64,
    /// The first port; some dozens above it are used.
    #[arg(long, default_value_t = 8500)]
    port: u16,
    /// Where chance begins.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// A message that was acknowledged.
#[derive(Clone)]
struct Sent {
    from: u64,
    to: u64,
    key: String,
    seq: u64,
    planned: Instant,
    took: Duration,
}

#[derive(Default)]
struct Log {
    sent: Mutex<Vec<Sent>>,
    under_way: AtomicU64,
    repeated: AtomicU64,
    /// Repeats that were stored again, because the shard that alone had the first was declared down.
    apart: AtomicU64,
    wrong: Mutex<Vec<String>>,
    connected: AtomicU64,
    /// When sessions were closed.
    closed: Mutex<Vec<Instant>>,
}

pub async fn run(options: Options) -> anyhow::Result<()> {
    std::fs::create_dir_all(&options.dir)?;
    let options = Arc::new(options);
    let mut service = Service::new(options.chat.clone(), options.dir.clone(), options.port);
    prove(&mut service, &options).await
}

async fn prove(service: &mut Service, options: &Arc<Options>) -> anyhow::Result<()> {
    service.start_servers()?;
    service.save(&[(1, ""), (2, ""), (3, ""), (4, "")])?;
    let faults = match options.scenario {
        // The coordinator dies while copying, the next one with a slot sealed, and one more while purging.
        Scenario::Change => ["copied=kill@80", "sealed=kill@80"],
        Scenario::Lose | Scenario::Hurt => ["", ""],
    };
    service.start_instance(0, faults[0]).await?;
    service.start_instance(1, faults[1]).await?;

    let log = Arc::new(Log::default());
    let clients: Vec<Client> = (0..options.users)
        .map(|user| {
            let (client, mut events) = Client::start(service.access((user % 2) as u16), 1 + user);
            let log = log.clone();
            tokio::spawn(async move {
                while let Some(event) = events.recv().await {
                    match event {
                        Event::Connected => drop(log.connected.fetch_add(1, Ordering::Relaxed)),
                        Event::Disconnected { .. } => locked(&log.closed).push(Instant::now()),
                        Event::Message(_)
                        | Event::Read(_)
                        | Event::Typing { .. }
                        | Event::Presence(_)
                        | Event::Resync(_)
                        | Event::Closed(_) => {}
                    }
                }
            });
            client
        })
        .collect();
    while log.connected.load(Ordering::Relaxed) < options.users {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let begun = Instant::now();
    let talk = tokio::spawn(talk(
        options.clone(),
        clients,
        [service.access(0), service.access(1)],
        log.clone(),
        begun,
    ));
    let mut faults = vec!["", "purging=kill@20"];
    let told = match options.scenario {
        Scenario::Change => change(service, &log, begun, options.seconds, &mut faults).await?,
        Scenario::Lose => lose(service, &log, begun, options.seconds).await?,
        Scenario::Hurt => hurt(service, &log, begun, options.seconds).await?,
    };
    while !talk.is_finished() {
        service.revive(&mut faults).await?;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    talk.await??;
    repeat_all(service, &log, "at the end").await?;
    report(service, options, &log, told).await
}

/// What a scenario tells the report.
struct Told {
    /// When the shards were changing, each time.
    during: Vec<(Instant, Instant)>,
    /// The shards that hold everything in the end, and one that must be empty.
    live: Vec<u16>,
    empty: Option<u16>,
    lines: Vec<String>,
}

async fn change(
    service: &mut Service,
    log: &Log,
    begun: Instant,
    seconds: u64,
    faults: &mut Vec<&'static str>,
) -> anyhow::Result<Told> {
    let at = |seconds: u64| tokio::time::sleep_until((begun + Duration::from_secs(seconds)).into());
    at(seconds / 9).await;
    let mut during = Vec::new();
    println!("shard5 is added");
    let before = service.slots().await?;
    let edited = Instant::now();
    service.save(&[(1, ""), (2, ""), (3, ""), (4, ""), (5, "")])?;
    service.carried_out(2, faults).await?;
    during.push((edited, Instant::now()));
    let after = service.slots().await?;
    let moved = after["shard5"].0;
    let between_old: i64 = ["shard1", "shard2", "shard3", "shard4"]
        .iter()
        .map(|name| (after[*name].0 as i64 - before[*name].0 as i64).max(0))
        .sum();
    repeat_all(service, log, "after the fifth shard was added").await?;

    at(seconds * 4 / 9).await;
    println!("shard2 is drained, and shard3 killed");
    let edited = Instant::now();
    service.save(&[
        (1, ""),
        (2, "state = \"draining\""),
        (3, ""),
        (4, ""),
        (5, ""),
    ])?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let killed = Instant::now();
    Service::servers(&["kill", &service.dir("shard3")])?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    service.start_shard(3)?;
    service.outage("shard3", killed);
    service.carried_out(3, faults).await?;
    during.push((edited, Instant::now()));
    repeat_all(service, log, "after shard2 was drained").await?;
    println!("shard2 is removed");
    let edited = Instant::now();
    service.save(&[(1, ""), (3, ""), (4, ""), (5, "")])?;
    service.carried_out(4, faults).await?;
    during.push((edited, Instant::now()));
    Ok(Told {
        during,
        live: vec![1, 3, 4, 5],
        empty: Some(2),
        lines: vec![format!(
            "fifth shard    took {moved} slots ({:.1} %), {between_old} moved between the old four",
            100.0 * moved as f64 / 4096.0
        )],
    })
}

/// Of the dialogs so far, how many pages of the newest messages and how many inboxes say that something may be missing.
async fn gaps(service: &Service, log: &Log) -> anyhow::Result<(usize, usize)> {
    let dialogs: BTreeSet<(u64, u64)> = locked(&log.sent)
        .iter()
        .map(|one| (one.from.min(one.to), one.from.max(one.to)))
        .collect();
    let (mut pages, mut inboxes) = (0, 0);
    for (n, (low, high)) in dialogs.into_iter().take(400).enumerate() {
        let api = Api::new(service.access((n % 2) as u16), low).await?;
        pages += usize::from(api.history(high, &[("limit", 1000)]).await?.gap);
        if n % 10 == 0 {
            inboxes += usize::from(!api.inbox(50, None).await?.incomplete.is_empty());
        }
    }
    Ok((pages, inboxes))
}

async fn hurt(
    service: &mut Service,
    log: &Log,
    begun: Instant,
    seconds: u64,
) -> anyhow::Result<Told> {
    tokio::time::sleep_until((begun + Duration::from_secs(seconds / 9)).into()).await;
    let mut lines = Vec::new();
    for (n, what, hurt, mend, lasts) in [
        (1u16, "stopped", None, None, 20),
        (
            2,
            "read-only",
            Some("SET GLOBAL super_read_only = 1"),
            Some("SET GLOBAL super_read_only = 0; SET GLOBAL read_only = 0"),
            5,
        ),
        (
            3,
            "left with eight connections",
            Some("SET GLOBAL max_connections = 8"),
            Some("SET GLOBAL max_connections = 1000"),
            10,
        ),
    ] {
        println!("shard{n} is {what} for {lasts} s");
        let since = Instant::now();
        match hurt {
            None => service.signal_shard(n, "STOP")?,
            Some(sql) => service.execute(n, sql).await?,
        }
        if n == 3 {
            // Those that there are stay open otherwise, and nobody notices.
            service.close_connections(n).await?;
        }
        tokio::time::sleep(Duration::from_secs(lasts)).await;
        let mended = Instant::now();
        match mend {
            None => service.signal_shard(n, "CONT")?,
            Some(sql) => service.execute(n, sql).await?,
        }
        // Everyone who waited for it is answered.
        let waited = loop {
            let late = log.under_way.load(Ordering::Relaxed);
            if late < 20 {
                break mended.elapsed();
            }
            ensure!(
                mended.elapsed() < Duration::from_secs(30),
                "{late} sends still wait for shard{n}"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let during = |one: &&Sent| one.planned > since && one.planned < mended;
        let (mut took, mut others) = (Duration::ZERO, Vec::new());
        let sent = locked(&log.sent).clone();
        for one in sent.iter().filter(during) {
            let dialog = (one.from.min(one.to), one.from.max(one.to));
            if service.owner_of(dialog).await? == format!("shard{n}") {
                took = took.max(one.took);
            } else {
                others.push(one.took);
            }
        }
        others.sort();
        let p99 = others
            .get(others.len() * 99 / 100)
            .copied()
            .unwrap_or_default();
        lines.push(format!(
            "shard{n}         {what} for {lasts} s: its dialogs waited up to {} ms, {} ms behind its end; the others' p99 was {} ms",
            took.as_millis(),
            waited.as_millis(),
            p99.as_millis()
        ));
        service.outage(&format!("shard{n}"), since);
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
    Ok(Told {
        during: Vec::new(),
        live: vec![1, 2, 3, 4],
        empty: None,
        lines,
    })
}

async fn lose(
    service: &mut Service,
    log: &Log,
    begun: Instant,
    seconds: u64,
) -> anyhow::Result<Told> {
    let at = |seconds: u64| tokio::time::sleep_until((begun + Duration::from_secs(seconds)).into());
    let (mut lines, mut none) = (Vec::new(), Vec::new());
    let mut version = 1;
    at(seconds / 9).await;
    for (n, dies) in [(3u16, true), (4, false)] {
        let name = format!("shard{n}");
        if dies {
            println!("{name} is killed");
            Service::servers(&["kill", &service.dir(&name)])?;
            tokio::time::sleep(Duration::from_secs(4)).await;
        }
        println!(
            "{name} is declared down, {}",
            if dies { "and is" } else { "but is alive" }
        );
        let mut shards = vec![(1, ""), (2, ""), (3, ""), (4, "")];
        shards[usize::from(n) - 1].1 = "state = \"down\"";
        service.save(&shards)?;
        let edited = Instant::now();
        version += 1;
        // Told apart from others by its generation: the first message that a slot of the lost shard has taken.
        let generation = u64::from(n) - 2;
        let first = loop {
            let first = locked(&log.sent)
                .iter()
                .find(|one| one.seq >> 40 == generation)
                .map(|one| one.planned + one.took);
            match first {
                Some(first) => break first,
                None => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        service.carried_out(version, &mut none).await?;
        let claimed = edited.elapsed();
        tokio::time::sleep_until((edited + Duration::from_secs(8)).into()).await;
        // What was sent from three seconds after the edit on had nothing to wait for any more.
        let since = edited + Duration::from_secs(3);
        let slowest = locked(&log.sent)
            .iter()
            .filter(|one| one.planned >= since)
            .map(|one| one.took)
            .max()
            .unwrap_or_default();
        let of_lost = locked(&log.sent)
            .iter()
            .filter(|one| one.planned >= since && one.seq >> 40 == generation)
            .count();
        let (pages, inboxes) = gaps(service, log).await?;
        lines.push(format!(
            "{name} down    first message to one of its dialogs {} ms after the edit, all its slots within {} ms; of what was sent from 3 s on ({of_lost} to its dialogs) the slowest answer took {} ms; {pages} of 400 pages and {inboxes} of 40 inboxes told of the gap",
            first.saturating_duration_since(edited).as_millis(),
            claimed.as_millis(),
            slowest.as_millis(),
        ));
        ensure!(pages > 0 && inboxes == 40, "the gap is not told");
        println!("{name} returns");
        if dies {
            service.start_shard(n)?;
        }
        let returned = Instant::now();
        service.save(&[(1, ""), (2, ""), (3, ""), (4, "")])?;
        version += 1;
        service.carried_out(version, &mut none).await?;
        let (pages, inboxes) = gaps(service, log).await?;
        ensure!(
            pages == 0 && inboxes == 0,
            "{pages} pages and {inboxes} inboxes still tell of a gap"
        );
        lines.push(format!(
            "{name} back    merged, and its slots moved back, within {} ms; no page and no inbox tells of a gap",
            returned.elapsed().as_millis(),
        ));
        service.outage(&name, edited - Duration::from_secs(5));
    }
    Ok(Told {
        during: Vec::new(),
        live: vec![1, 2, 3, 4],
        empty: None,
        lines,
    })
}

/// Sends at a steady rate, whatever comes of it.
async fn talk(
    options: Arc<Options>,
    clients: Vec<Client>,
    servers: [Access; 2],
    log: Arc<Log>,
    begun: Instant,
) -> anyhow::Result<()> {
    let mut chance = Chance(options.seed);
    let pairs: Vec<(u64, u64)> = (0..options.dialogs)
        .map(|_| {
            let a = chance.below(options.users);
            (a, (a + 1 + chance.below(options.users - 1)) % options.users)
        })
        .collect();
    let total = (options.rate * options.seconds as f64) as u64;
    for number in 0..total {
        let planned = begun + Duration::from_secs_f64(number as f64 / options.rate);
        tokio::time::sleep_until(planned.into()).await;
        let (a, b) = pairs[chance.below(options.dialogs) as usize];
        let (from, to) = if chance.below(2) == 0 { (a, b) } else { (b, a) };
        let repeat = chance.below(100) < options.repeats;
        let (client, log) = (clients[from as usize].clone(), log.clone());
        let other = servers[(from as usize + 1) % 2].clone();
        log.under_way.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            let (key, text) = (format!("k{number}"), format!("text {number}"));
            match client.send(1 + to, key.clone(), text.clone()).await {
                Ok(sent) => {
                    let took = planned.elapsed();
                    if repeat {
                        let again = send_again(&other, 1 + from, 1 + to, &key).await;
                        log.again(&key, sent.seq, again);
                        log.repeated.fetch_add(1, Ordering::Relaxed);
                    }
                    locked(&log.sent).push(Sent {
                        from: 1 + from,
                        to: 1 + to,
                        key,
                        seq: sent.seq,
                        planned,
                        took,
                    });
                }
                Err(e) => locked(&log.wrong).push(format!("{key} was refused: {e}")),
            }
            log.under_way.fetch_sub(1, Ordering::Relaxed);
        });
    }
    let patience = Instant::now() + Duration::from_secs(60);
    while log.under_way.load(Ordering::Relaxed) > 0 {
        ensure!(
            Instant::now() < patience,
            "{} sends are not answered after a minute",
            log.under_way.load(Ordering::Relaxed)
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

impl Log {
    /// What came of sending a key again: the same seq. But where the shard that alone had the first was declared down, it is
    /// stored once more, in a later generation; and it is told as a double when that shard returns.
    fn again(&self, key: &str, before: u64, again: anyhow::Result<u64>) {
        match again {
            Ok(now) if now == before => {}
            Ok(now) if now >> 40 > before >> 40 => drop(self.apart.fetch_add(1, Ordering::Relaxed)),
            Ok(now) => locked(&self.wrong).push(format!("{key}: seq {now} now, {before} before")),
            Err(e) => locked(&self.wrong).push(format!("{key}: {e}")),
        }
    }
}

/// The same key again, however often it has to be tried; the seq that is answered.
async fn send_again(server: &Access, from: u64, to: u64, key: &str) -> anyhow::Result<u64> {
    let text = format!("text {}", key.trim_start_matches('k'));
    let patience = Instant::now() + Duration::from_secs(30);
    loop {
        let again = match Api::new(server.clone(), from).await {
            Ok(api) => api.send(to, key, &text).await,
            Err(e) => Err(e),
        };
        match again {
            Ok(again) => return Ok(again.seq),
            Err(ClientError::Refused(body)) if !body.retryable => bail!("{}", body.message),
            Err(e) => ensure!(Instant::now() < patience, "{e}"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Every key so far, through the instance that it was not sent to.
async fn repeat_all(service: &Service, log: &Log, when: &str) -> anyhow::Result<()> {
    let sent = locked(&log.sent).clone();
    let servers = [service.access(0), service.access(1)];
    let count = sent.len();
    stream::iter(sent)
        .map(|one| {
            let other = servers[(one.from as usize) % 2].clone();
            async move {
                let again = send_again(&other, one.from, one.to, &one.key).await;
                log.again(&one.key, one.seq, again);
            }
        })
        .buffer_unordered(32)
        .collect::<()>()
        .await;
    let apart = log.apart.load(Ordering::Relaxed);
    let apart = if apart == 0 {
        "the same seqs".to_owned()
    } else {
        format!("the same seqs, but for {apart} so far that a lost shard alone had")
    };
    println!("          {count} keys repeated through the other instance {when}: {apart}");
    ensure!(locked(&log.wrong).is_empty(), "{:?}", locked(&log.wrong));
    Ok(())
}

/// A dialog as it is read, and what was acknowledged in it.
fn compare(log: &[chat_wire::Message], acknowledged: &[&Sent]) -> anyhow::Result<()> {
    let mut before = 0;
    for message in log {
        let first_of_a_generation = message.seq & ((1 << 40) - 1) == 1;
        ensure!(
            message.seq == before + 1 || (first_of_a_generation && message.seq > before),
            "a hole between {before} and {}",
            message.seq
        );
        before = message.seq;
    }
    let mut keys = HashMap::<(u64, &str), Vec<u64>>::new();
    for message in log {
        if let Some(key) = &message.key {
            keys.entry((message.from, key))
                .or_default()
                .push(message.seq);
        }
    }
    for one in acknowledged {
        let stored = keys.get(&(one.from, one.key.as_str())).map(Vec::as_slice);
        let there = log.iter().find(|message| message.seq == one.seq);
        let text = format!("text {}", one.key.trim_start_matches('k'));
        ensure!(
            there.is_some_and(|there| there.from == one.from && there.text == text),
            "{} is not where it was said to be",
            one.key
        );
        // One that came back as a double has its key where it was sent again.
        let once = match stored {
            Some([seq]) => *seq == one.seq || there.is_some_and(|there| there.key.is_none()),
            Some(_) | None => false,
        };
        ensure!(once, "{} is stored at {stored:?}", one.key);
    }
    ensure!(
        keys.len() == acknowledged.len(),
        "{} messages, and {} were acknowledged",
        keys.len(),
        acknowledged.len()
    );
    // Whatever was acknowledged before another was sent stands before it.
    let mut in_order: Vec<&&Sent> = acknowledged.iter().collect();
    in_order.sort_by_key(|one| one.seq);
    let mut latest: Option<&Sent> = None;
    for one in in_order {
        if let Some(latest) = latest {
            ensure!(
                one.planned + one.took >= latest.planned,
                "{} was acknowledged before {} was sent, and stands behind it",
                one.key,
                latest.key
            );
        }
        if latest.is_none_or(|latest| one.planned > latest.planned) {
            latest = Some(one);
        }
    }
    Ok(())
}

async fn report(service: &Service, options: &Options, log: &Log, told: Told) -> anyhow::Result<()> {
    let sent = locked(&log.sent).clone();
    let wrong = locked(&log.wrong).clone();
    let quiet = |at: Instant, until: Instant| {
        !service
            .outages
            .iter()
            .any(|(_, from, to)| at < *to && until > *from)
    };
    let percentile = |mut of: Vec<f64>, share: f64| {
        of.sort_by(f64::total_cmp);
        of.get(((of.len() as f64 * share) as usize).min(of.len().saturating_sub(1)))
            .copied()
            .unwrap_or(0.0)
    };
    let millis = |keep: &dyn Fn(&Sent) -> bool| -> Vec<f64> {
        sent.iter()
            .filter(|one| keep(one))
            .map(|one| one.took.as_secs_f64() * 1000.0)
            .collect()
    };
    let first = told.during.first().map(|(from, _)| *from);
    let before = millis(&|one| first.is_none_or(|first| one.planned + one.took < first));
    let during = millis(&|one| {
        let mut during = told.during.iter();
        during.any(|(from, to)| one.planned > *from && one.planned < *to)
            && quiet(one.planned, one.planned + one.took)
    });
    let slowest = percentile(during.clone(), 1.0);
    let closed = locked(&log.closed)
        .iter()
        .filter(|at| quiet(**at, **at))
        .count();

    let mut dialogs = BTreeMap::<(u64, u64), Vec<&Sent>>::new();
    for one in &sent {
        dialogs
            .entry((one.from.min(one.to), one.from.max(one.to)))
            .or_default()
            .push(one);
    }
    let read = stream::iter(&dialogs)
        .map(|((low, high), expected)| async move {
            let mut first: Option<Vec<chat_wire::Message>> = None;
            let mut read = 0;
            for i in 0..2 {
                for (user, with) in [(*low, *high), (*high, *low)] {
                    let api = Api::new(service.access(i), user).await?;
                    let log = api.log_upwards(with).await?;
                    read += log.len();
                    ensure!(
                        *first.get_or_insert_with(|| log.clone()) == log,
                        "{low}_{high} reads differently through instance {i} as {user}"
                    );
                }
            }
            let log = first.unwrap_or_default();
            compare(&log, expected).with_context(|| format!("{low}_{high}"))?;
            anyhow::Ok(read)
        })
        .buffer_unordered(16)
        .try_fold(0, |sum, read| async move { Ok(sum + read) })
        .await?;

    let (mut owned, mut stored, mut doubles, mut orphans) = (0, 0, 0, 0);
    for n in told.live.iter().copied() {
        owned += service
            .number(n, "SELECT COUNT(*) FROM slots WHERE state = 'owner'")
            .await?;
        let keyed = "SELECT COUNT(*) FROM messages WHERE client_key IS NOT NULL";
        stored += service.number(n, keyed).await?;
        let double = "SELECT COUNT(*) FROM messages WHERE duplicate_of IS NOT NULL";
        doubles += service.number(n, double).await?;
        for table in ["messages", "dialogs", "members"] {
            orphans += service.number(n, &format!("SELECT COUNT(*) FROM {table} JOIN slots USING (slot) WHERE state <> 'owner'")).await?;
        }
    }
    let mut left = 0;
    for (n, table) in told
        .empty
        .into_iter()
        .flat_map(|n| ["messages", "dialogs", "members"].map(|table| (n, table)))
    {
        left += service
            .number(n, &format!("SELECT COUNT(*) FROM {table}"))
            .await?;
    }
    let p99 = (percentile(before, 0.99), percentile(during.clone(), 0.99));
    let deaths = |what: &str| {
        service
            .outages
            .iter()
            .filter(|(who, ..)| who.starts_with(what))
            .count()
    };
    println!(
        "\n  planned        {} messages at {}/s over {} dialogs of {} people, seed {}",
        (options.rate * options.seconds as f64) as u64,
        options.rate,
        options.dialogs,
        options.users,
        options.seed
    );
    println!(
        "  acknowledged   {}, {} of them repeated at once through the other instance",
        sent.len(),
        log.repeated.load(Ordering::Relaxed)
    );
    println!(
        "  killed         instances {} times; shards killed or given up {} times",
        deaths("instance"),
        deaths("shard")
    );
    println!("  read back      {read} messages, as both users, through both instances");
    println!(
        "  in the tables  {stored} messages and {doubles} told as doubles, {owned} slots owned, {orphans} rows where they do not belong, {left} rows in a shard that was drained"
    );
    for line in &told.lines {
        println!("  {line}");
    }
    println!("  sessions       {closed} closed while nothing was dead");
    if !during.is_empty() {
        println!("  slowest answer {slowest:.0} ms during the changes, while nothing was dead");
        println!(
            "  p99            {:.1} ms before the changes, {:.1} ms during them, ratio {:.2}",
            p99.0,
            p99.1,
            p99.1 / p99.0
        );
    }
    for what in wrong.iter().take(10) {
        println!("  WRONG          {what}");
    }
    ensure!(wrong.is_empty(), "{} sends went wrong", wrong.len());
    ensure!(
        owned == 4096 && orphans == 0 && left == 0 && stored == sent.len() as u64 && closed == 0,
        "the shards do not hold what they should"
    );
    println!("K holds");
    Ok(())
}
