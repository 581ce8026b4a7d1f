//! The proof that every device receives every message once and in order: on real servers, while the
//! bus loses messages, instances are killed and asked to stop, readers stop, and crowds reconnect
//! at once.

mod lossy;
mod killed;
mod slow;
mod handover;
mod storm;
mod marks;
mod talk;
mod order;
mod removals;

use crate::devices::Device;
use crate::service::{Service, locked};
use anyhow::Context;
use clap::{Args, ValueEnum};
use handover::handover;
use killed::killed;
use lossy::lossy;
use marks::marks;
use order::order;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use removals::removals;
use slow::slow;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use storm::storm;
use talk::talk;
use testkit::lossy::Lossy;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// The bus loses messages at random, and is killed and started again twice.
    Lossy,
    /// One of two instances is killed.
    Killed,
    /// A client stops reading while much is sent to it.
    Slow,
    /// Sends, read marks and reconnections at random, with a shard added on the way: inboxes must
    /// agree with the logs.
    Marks,
    /// An instance with many sessions is asked to go.
    Handover,
    /// Many clients come back at once.
    Storm,
    /// `chat-client talk` through a connection that is cut every few seconds.
    Talk,
    /// Many runs of `chat-client talk` with piped lines, while shards refuse and instances are
    /// killed.
    Order,
    /// Members are removed from rooms while the bus loses messages, instances are killed and slots
    /// move.
    Removals,
}

#[derive(Args)]
pub struct Options {
    /// What goes wrong; all of it, one after the other, if left out.
    #[arg(long, value_enum)]
    scenario: Option<Scenario>,
    /// The server.
    #[arg(long, default_value = "target/release/chat")]
    chat: PathBuf,
    /// The client.
    #[arg(long, default_value = "target/release/chat-client")]
    chat_client: PathBuf,
    /// Where servers, logs and the shards file are put.
    #[arg(long)]
    dir: PathBuf,
    /// How long users write, in seconds.
    #[arg(long, default_value_t = 120.0)]
    seconds: f64,
    /// Messages a second, planned.
    #[arg(long, default_value_t = 300.0)]
    rate: f64,
    /// Users.
    #[arg(long, default_value_t = 200)]
    users: u64,
    /// Of a hundred messages of the bus, how many are lost.
    #[arg(long, default_value_t = 5)]
    losses: u64,
    /// Clients of the handover and of the storm, messages for the slow reader, runs of the order,
    /// removals.
    #[arg(long)]
    count: Option<u64>,
    /// Everything over TLS with a private CA: the instances, MySQL and NATS, which ask for
    /// certificates, and NATS for a user.
    #[arg(long)]
    tls: bool,
    /// The seed of the random numbers; printed.
    #[arg(long, default_value_t = 7)]
    seed: u64,
    /// The first of some dozens of ports.
    #[arg(long, default_value_t = 8500)]
    port: u16,
}

pub async fn run(options: Options) -> anyhow::Result<()> {
    std::fs::create_dir_all(&options.dir)?;
    println!("seed {}", options.seed);
    let all = [
        Scenario::Lossy,
        Scenario::Killed,
        Scenario::Slow,
        Scenario::Marks,
        Scenario::Handover,
        Scenario::Storm,
        Scenario::Talk,
        Scenario::Order,
        Scenario::Removals,
    ];
    let scenarios = options.scenario.map_or(all.to_vec(), |one| vec![one]);
    let mut service = Service::new(options.chat.clone(), options.dir.clone(), options.port);
    if options.tls {
        service.use_tls()?;
    }
    let mut done = prepare(&service);
    for (n, scenario) in scenarios.into_iter().enumerate() {
        if done.is_err() {
            break;
        }
        println!("\n{scenario:?}");
        done = one(&mut service, &options, scenario, n as u64)
            .await
            .with_context(|| format!("{scenario:?}"));
        for i in 0..2 {
            service.kill_instance(i)?;
        }
        service.bus = [None, None];
    }
    done
}

fn prepare(service: &Service) -> anyhow::Result<()> {
    service.start_servers()?;
    service.save(&[(1, ""), (2, ""), (3, ""), (4, "")])
}

async fn one(
    service: &mut Service,
    options: &Options,
    scenario: Scenario,
    n: u64,
) -> anyhow::Result<()> {
    let mut losing = Vec::new();
    if matches!(scenario, Scenario::Lossy | Scenario::Removals) {
        for i in 0..2 {
            let rng = Mutex::new(StdRng::seed_from_u64(options.seed + i as u64));
            let losses = options.losses;
            let loses = move |_: &str, _: &[u8]| locked(&rng).random_range(0..100) < losses;
            let lossy = Lossy::to(&service.nats(), Arc::new(loses), service.lossy_tls()).await?;
            service.bus[i] = Some(lossy.url.clone());
            losing.push(lossy);
        }
    }
    service.start_instance(0, "").await?;
    service.start_instance(1, "").await?;
    // Each scenario has users of its own, so that every dialog begins with its first message.
    let users = Users {
        first: 1 + n * 1_000_000,
        count: options.users,
        seed: options.seed + n,
    };
    match scenario {
        Scenario::Lossy => lossy(service, options, users, &losing).await,
        Scenario::Killed => killed(service, options, users).await,
        Scenario::Slow => slow(service, options, users).await,
        Scenario::Marks => marks(service, options, users).await,
        Scenario::Handover => handover(service, options, users).await,
        Scenario::Storm => storm(service, options, users).await,
        Scenario::Talk => talk(service, options, users).await,
        Scenario::Order => order(service, options, users).await,
        Scenario::Removals => removals(service, options, users, &losing).await,
    }
}

/// The users of a scenario.
#[derive(Clone, Copy)]
struct Users {
    first: u64,
    count: u64,
    seed: u64,
}

impl Users {
    fn user(self, n: u64) -> u64 {
        self.first + n
    }

    /// Some pairs of them, each once.
    fn pairs(self, count: u64) -> Vec<(u64, u64)> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let mut pairs: Vec<(u64, u64)> = (0..count)
            .map(|_| {
                let a = rng.random_range(0..self.count);
                let b = (a + 1 + rng.random_range(0..self.count - 1)) % self.count;
                (self.user(a.min(b)), self.user(a.max(b)))
            })
            .collect();
        pairs.sort_unstable();
        pairs.dedup();
        pairs
    }

    /// A device for each, and a second one on the other instance for every third.
    fn devices(self, service: &Service) -> Vec<Device> {
        let access = [0, 1].map(|i| service.access_to_any(i));
        let mut devices = Vec::new();
        for n in 0..self.count {
            let first = (n % 2) as usize;
            devices.push(Device::start(access[first].clone(), self.user(n)));
            if n % 3 == 0 {
                devices.push(Device::start(access[1 - first].clone(), self.user(n)));
            }
        }
        devices
    }
}

/// Every second device follows its dialogs from the start; the others just listen.
async fn follow(devices: &[Device], pairs: &[(u64, u64)]) -> anyhow::Result<()> {
    for device in devices.iter().step_by(2) {
        for (low, high) in pairs
            .iter()
            .filter(|pair| [pair.0, pair.1].contains(&device.user))
        {
            device.client.follow(format!("{low}_{high}"), 0).await?;
        }
    }
    Ok(())
}

/// How long after `since` each device that was cut off was connected again.
fn reconnections(devices: &[Device], since: Instant) -> Vec<Duration> {
    let mut back: Vec<Duration> = devices
        .iter()
        .filter_map(|device| {
            let again = locked(&device.record.reconnected);
            again.iter().find(|at| **at > since).map(|at| *at - since)
        })
        .collect();
    back.sort();
    back
}

fn millis(sorted: &[Duration], share: f64) -> u128 {
    let last = sorted.len().saturating_sub(1);
    sorted
        .get(((sorted.len() as f64 * share) as usize).min(last))
        .map_or(0, Duration::as_millis)
}

/// What the model knows of a user in a dialog.
type MarksOf = BTreeMap<(u64, String), u64>;
