//! The proof: people talk at a steady rate while shards are added, drained and removed, and while processes are killed in the
//! middle of it. Afterwards everything is compared with what was acknowledged: through every instance, for both users, and
//! straight in the shards' tables; and every key is sent once more.

use anyhow::{Context, bail, ensure};
use chat_client::{Access, Api, Client, ClientError, Event, TokenSource};
use clap::Args;
use futures_util::{StreamExt, TryStreamExt, stream};
use mysql_async::prelude::Queryable;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

#[derive(Args)]
pub struct Options {
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

const SECRET: &str = "a secret for this machine only, 32 bytes and more";

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
    wrong: Mutex<Vec<String>>,
    connected: AtomicU64,
    /// When sessions were closed.
    closed: Mutex<Vec<Instant>>,
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A cheap, repeatable source of chance.
struct Chance(u64);

impl Chance {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// Five databases, a bus, two instances.
struct Service {
    options: Arc<Options>,
    instances: Vec<Option<Child>>,
    /// While these lasted, something was dead: (what, from, until).
    outages: Vec<(String, Instant, Instant)>,
}

impl Service {
    fn servers(command: &[&str]) -> anyhow::Result<()> {
        let status = Command::new("dev/servers")
            .args(command)
            .status()
            .context("dev/servers")?;
        ensure!(status.success(), "dev/servers {command:?} failed");
        Ok(())
    }

    fn dir(&self, name: &str) -> String {
        self.options.dir.join(name).display().to_string()
    }

    fn shard_port(&self, n: u16) -> u16 {
        self.options.port + 10 + n
    }

    fn database(&self, n: u16) -> String {
        format!("mysql://root@127.0.0.1:{}/chat", self.shard_port(n))
    }

    fn url(&self, i: u16) -> String {
        format!("http://127.0.0.1:{}", self.options.port + i)
    }

    fn admin(&self, i: u16) -> String {
        format!("http://127.0.0.1:{}", self.options.port + 5 + i)
    }

    fn access(&self, i: u16) -> Access {
        Access::new(&self.url(i), TokenSource::Secret(SECRET.to_owned()))
    }

    /// Saves the file as an editor does, by renaming. `shards` are numbers and what else is said of them.
    fn save(&self, shards: &[(u16, &str)]) -> anyhow::Result<()> {
        let entry = |(n, more): &(u16, &str)| {
            format!(
                "[[shard]]\nname = \"shard{n}\"\nurl = \"{}\"\n{more}\n",
                self.database(*n)
            )
        };
        let text: String = shards.iter().map(entry).collect();
        let file = self.options.dir.join("shards.toml");
        std::fs::write(file.with_extension("new"), text)?;
        Ok(std::fs::rename(file.with_extension("new"), file)?)
    }

    async fn start_instance(&mut self, i: u16, fault: &str) -> anyhow::Result<()> {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.options.dir.join(format!("instance{i}.log")))?;
        let child = Command::new("target/release/chat")
            .arg("serve")
            .env("CHAT__LISTEN", self.url(i).trim_start_matches("http://"))
            .env(
                "CHAT__ADMIN_LISTEN",
                self.admin(i).trim_start_matches("http://"),
            )
            .env("CHAT__SHARDS_FILE", self.options.dir.join("shards.toml"))
            .env(
                "CHAT__NATS_URL",
                format!("nats://127.0.0.1:{}", self.options.port + 9),
            )
            .env("CHAT__AUTH__SECRET", SECRET)
            .env("CHAT__LIMITS__CONNECTIONS_PER_IP", "100000")
            .env("CHAT__LIMITS__SENDS_PER_SECOND", "100000")
            .env("CHAT__LIMITS__SENDS_BURST", "100000")
            .env("CHAT__LIMITS__FRAMES_PER_SECOND", "100000")
            .env("CHAT__CHANGE__PURGE_AFTER_MS", "3000")
            .env("CHAT_FAULT", fault)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        self.instances[usize::from(i)] = Some(child);
        for _ in 0..600 {
            if reqwest::get(format!("{}/readyz", self.url(i)))
                .await
                .is_ok_and(|answer| answer.status().is_success())
            {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        bail!("instance {i} does not get ready; see its log")
    }

    /// Looks whether an instance has died; starts it again with the next fault.
    async fn revive(&mut self, faults: &mut Vec<&'static str>) -> anyhow::Result<()> {
        for i in 0..2u16 {
            let died = match &mut self.instances[usize::from(i)] {
                Some(child) => child.try_wait()?.is_some(),
                None => false,
            };
            if died {
                let at = Instant::now();
                let fault = faults.pop().unwrap_or("");
                tokio::time::sleep(Duration::from_secs(1)).await;
                self.start_instance(i, fault).await?;
                // Clients come back with a pause that grows to some seconds.
                self.outages.push((
                    format!("instance {i}"),
                    at - Duration::from_millis(300),
                    Instant::now() + Duration::from_secs(6),
                ));
            }
        }
        Ok(())
    }

    async fn status(&self) -> anyhow::Result<Value> {
        for i in 0..2 {
            if let Ok(answer) = reqwest::get(format!("{}/admin/change", self.admin(i))).await {
                return Ok(answer.json().await?);
            }
        }
        Ok(Value::Null)
    }

    async fn slots(&self) -> anyhow::Result<BTreeMap<String, (u64, u64)>> {
        for i in 0..2 {
            if let Ok(answer) = reqwest::get(format!("{}/admin/slots", self.admin(i))).await {
                let answer: Value = answer.json().await?;
                let shards = answer["shards"].as_array().context("no shards")?;
                let number =
                    |shard: &Value, field: &str| shard[field].as_u64().unwrap_or(u64::MAX / 8);
                return Ok(shards
                    .iter()
                    .map(|shard| {
                        let name = shard["name"].as_str().unwrap_or_default().to_owned();
                        let unfinished = number(shard, "sealed")
                            + number(shard, "incoming")
                            + number(shard, "fenced")
                            + number(shard, "to_purge");
                        (name, (number(shard, "owner"), unfinished))
                    })
                    .collect());
            }
        }
        bail!("no instance answers")
    }

    /// Waits until the document of `version` is carried out, reviving what dies meanwhile.
    async fn carried_out(
        &mut self,
        version: u64,
        faults: &mut Vec<&'static str>,
    ) -> anyhow::Result<()> {
        let begun = Instant::now();
        loop {
            self.revive(faults).await?;
            let status = self.status().await?;
            if status["version"] == version
                && status["work"]["stage"] == "idle"
                && status["work"]["version"] == version
            {
                let slots = self.slots().await?;
                let (owned, unfinished) = slots
                    .values()
                    .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
                if owned == 4096 && unfinished == 0 {
                    println!(
                        "{:>6.1} s  version {version} is carried out; slots took no writes for {}",
                        begun.elapsed().as_secs_f64(),
                        status["work"]["freeze_ms"]
                    );
                    return Ok(());
                }
            }
            ensure!(
                begun.elapsed() < Duration::from_secs(120),
                "version {version} is not carried out: {status}"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn number(&self, shard: u16, sql: &str) -> anyhow::Result<u64> {
        let mut conn = mysql_async::Conn::from_url(self.database(shard)).await?;
        let number: Option<u64> = conn.query_first(sql).await?;
        conn.disconnect().await?;
        number.context("no number")
    }

    fn stop(&mut self) {
        for child in self.instances.iter_mut().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
        for name in ["shard1", "shard2", "shard3", "shard4", "shard5", "nats"] {
            let _ = Self::servers(&["kill", &self.dir(name)]);
        }
    }
}

pub async fn run(options: Options) -> anyhow::Result<()> {
    std::fs::create_dir_all(&options.dir)?;
    let options = Arc::new(options);
    let mut service = Service {
        options: options.clone(),
        instances: vec![None, None],
        outages: Vec::new(),
    };
    // Its making chooses the TLS of this process, which every other request needs.
    drop(service.access(0));
    let proved = prove(&mut service, &options).await;
    service.stop();
    proved
}

async fn prove(service: &mut Service, options: &Arc<Options>) -> anyhow::Result<()> {
    for n in 1..=5 {
        Service::servers(&[
            "mysql",
            &service.dir(&format!("shard{n}")),
            &service.shard_port(n).to_string(),
        ])?;
    }
    Service::servers(&[
        "nats",
        &service.dir("nats"),
        &(options.port + 9).to_string(),
    ])?;
    service.save(&[(1, ""), (2, ""), (3, ""), (4, "")])?;
    // Whoever moves dies while copying, then whoever goes on dies with a slot sealed, then one dies while purging.
    let mut faults = vec!["", "purging=abort@20"];
    service.start_instance(0, "copied=abort@80").await?;
    service.start_instance(1, "sealed=abort@80").await?;

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
                        Event::Message(_) | Event::Read(_) | Event::Closed(_) => {}
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
    let at = |seconds: u64| tokio::time::sleep_until((begun + Duration::from_secs(seconds)).into());
    at(options.seconds / 9).await;
    let change_begun = Instant::now();
    println!("shard5 is added");
    let before = service.slots().await?;
    service.save(&[(1, ""), (2, ""), (3, ""), (4, ""), (5, "")])?;
    service.carried_out(2, &mut faults).await?;
    let after = service.slots().await?;
    let moved = after["shard5"].0;
    let between_old: i64 = ["shard1", "shard2", "shard3", "shard4"]
        .iter()
        .map(|name| (after[*name].0 as i64 - before[*name].0 as i64).max(0))
        .sum();
    repeat_all(service, &log, "after the fifth shard was added").await?;

    at(options.seconds * 4 / 9).await;
    println!("shard2 is drained, and shard3 killed");
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
    Service::servers(&[
        "mysql",
        &service.dir("shard3"),
        &service.shard_port(3).to_string(),
    ])?;
    service.outages.push((
        "shard3".into(),
        killed - Duration::from_millis(300),
        Instant::now() + Duration::from_secs(6),
    ));
    service.carried_out(3, &mut faults).await?;
    repeat_all(service, &log, "after shard2 was drained").await?;
    println!("shard2 is removed");
    service.save(&[(1, ""), (3, ""), (4, ""), (5, "")])?;
    service.carried_out(4, &mut faults).await?;
    let change_ended = Instant::now();
    while !talk.is_finished() {
        service.revive(&mut faults).await?;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    talk.await??;
    repeat_all(service, &log, "at the end").await?;
    report(
        service,
        options,
        &log,
        (change_begun, change_ended),
        moved,
        between_old,
    )
    .await
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
                        if let Err(e) = send_again(&other, 1 + from, 1 + to, &key, sent.seq).await {
                            locked(&log.wrong).push(format!("{key}: {e}"));
                        }
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

/// The same key again: the same seq, however often it has to be tried.
async fn send_again(
    server: &Access,
    from: u64,
    to: u64,
    key: &str,
    seq: u64,
) -> anyhow::Result<()> {
    let text = format!("text {}", key.trim_start_matches('k'));
    let patience = Instant::now() + Duration::from_secs(30);
    loop {
        let again = match Api::new(server.clone(), from).await {
            Ok(api) => api.send(to, key, &text).await,
            Err(e) => Err(e),
        };
        match again {
            Ok(again) => {
                ensure!(again.seq == seq, "seq {} now, {seq} before", again.seq);
                return Ok(());
            }
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
                send_again(&other, one.from, one.to, &one.key, one.seq)
                    .await
                    .with_context(|| one.key.clone())
            }
        })
        .buffer_unordered(32)
        .try_collect::<Vec<()>>()
        .await?;
    println!("          {count} keys repeated through the other instance {when}: the same seqs");
    Ok(())
}

async fn report(
    service: &Service,
    options: &Options,
    log: &Log,
    change: (Instant, Instant),
    moved: u64,
    between_old: i64,
) -> anyhow::Result<()> {
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
    let before = millis(&|one| one.planned + one.took < change.0);
    let during = millis(&|one| {
        one.planned > change.0
            && one.planned < change.1
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
            for (n, message) in log.iter().enumerate() {
                ensure!(
                    message.seq == n as u64 + 1,
                    "{low}_{high} has a hole at {}",
                    n + 1
                );
            }
            let mut keys = HashMap::<(u64, &str), Vec<u64>>::new();
            for message in &log {
                keys.entry((message.from, message.key.as_deref().unwrap_or_default()))
                    .or_default()
                    .push(message.seq);
            }
            for one in expected {
                ensure!(
                    keys.get(&(one.from, one.key.as_str())).map(Vec::as_slice) == Some(&[one.seq]),
                    "{low}_{high}: {} is not where it was said to be",
                    one.key
                );
            }
            ensure!(
                log.len() == expected.len(),
                "{low}_{high} has {} messages, and {} were acknowledged",
                log.len(),
                expected.len()
            );
            anyhow::Ok(read)
        })
        .buffer_unordered(16)
        .try_fold(0, |sum, read| async move { Ok(sum + read) })
        .await?;

    let (mut owned, mut stored, mut orphans) = (0, 0, 0);
    for n in [1, 3, 4, 5] {
        owned += service
            .number(n, "SELECT COUNT(*) FROM slots WHERE state = 'owner'")
            .await?;
        stored += service.number(n, "SELECT COUNT(*) FROM messages").await?;
        for table in ["messages", "dialogs", "members"] {
            orphans += service.number(n, &format!("SELECT COUNT(*) FROM {table} JOIN slots USING (slot) WHERE state <> 'owner'")).await?;
        }
    }
    let mut left = 0;
    for table in ["messages", "dialogs", "members"] {
        left += service
            .number(2, &format!("SELECT COUNT(*) FROM {table}"))
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
        "  killed         instances {} times, a shard {} times",
        deaths("instance"),
        deaths("shard")
    );
    println!("  read back      {read} messages, as both users, through both instances");
    println!(
        "  in the tables  {stored} messages, {owned} slots owned, {orphans} rows where they do not belong, {left} rows in shard2"
    );
    println!(
        "  fifth shard    took {moved} slots ({:.1} %), {between_old} moved between the old four",
        100.0 * moved as f64 / 4096.0
    );
    println!("  sessions       {closed} closed while nothing was dead");
    println!("  slowest answer {slowest:.0} ms during the changes, while nothing was dead");
    println!(
        "  p99            {:.1} ms before the changes, {:.1} ms during them, ratio {:.2}",
        p99.0,
        p99.1,
        p99.1 / p99.0
    );
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
