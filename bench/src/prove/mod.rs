//! The proof: users write at a steady rate while shards are added, drained and removed, or declared
//! down and brought back, and while processes are killed in the middle of it. Afterwards everything
//! is compared with what was acknowledged: through every instance, for both users, and straight in
//! the shards' tables; and every key is sent once more.

mod change;
mod lose;
mod hurt;
mod talk;
mod repeat;
mod report;

use crate::service::{Service, locked};
use change::change;
use chat_client::checker::Acknowledged;
use chat_client::{Client, Event};
use clap::{Args, ValueEnum};
use hurt::hurt;
use lose::lose;
use repeat::repeat_all;
use report::report;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use talk::talk;

/// What happens to the shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// A fifth is added, the second drained and removed; the coordinator is killed three times, and
    /// a shard once.
    Change,
    /// One dies, is declared down, and returns; another is declared down although it is alive, and
    /// returns.
    Lose,
    /// Their servers are stopped for 20 seconds, made read-only, and left with eight connections,
    /// one after the other.
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
    /// How long users write, in seconds.
    #[arg(long, default_value_t = 180)]
    seconds: u64,
    /// Messages a second, planned.
    #[arg(long, default_value_t = 500.0)]
    rate: f64,
    /// Dialogs that they are in.
    #[arg(long, default_value_t = 2000)]
    dialogs: u64,
    /// Users.
    #[arg(long, default_value_t = 400)]
    users: u64,
    /// Of a hundred messages, so many are sent again at once through the other instance.
    #[arg(long, default_value_t = 2)]
    repeats: u64,
    /// The first port; some dozens above it are used.
    #[arg(long, default_value_t = 8500)]
    port: u16,
    /// The seed of the random numbers.
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
    /// Repeats that were stored again, because the shard that alone had the first was declared
    /// down.
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
        // The coordinator dies while copying, the next one with a slot sealed, and one more while
        // purging.
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
                        | Event::Entry(_)
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
    let outcome = match options.scenario {
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
    report(service, options, &log, outcome).await
}

/// What a scenario hands to the report.
struct Outcome {
    /// When the shards were changing, each time.
    during: Vec<(Instant, Instant)>,
    /// The shards that hold everything in the end, and one that must be empty.
    live: Vec<u16>,
    empty: Option<u16>,
    lines: Vec<String>,
}

impl Log {
    /// What came of sending a key again: the same seq. But where the shard that alone had the first
    /// was declared down, it is stored once more, in a later generation; and it is a duplicate when
    /// that shard returns.
    fn again(&self, key: &str, before: u64, again: anyhow::Result<u64>) {
        match again {
            Ok(now) if now == before => {}
            Ok(now) if now >> 40 > before >> 40 => drop(self.apart.fetch_add(1, Ordering::Relaxed)),
            Ok(now) => locked(&self.wrong).push(format!("{key}: seq {now} now, {before} before")),
            Err(e) => locked(&self.wrong).push(format!("{key}: {e}")),
        }
    }
}

impl Sent {
    fn acknowledged(&self) -> Acknowledged {
        Acknowledged {
            from: self.from,
            to: self.to,
            key: self.key.clone(),
            text: format!("text {}", self.key.trim_start_matches('k')),
            seq: self.seq,
        }
    }
}
