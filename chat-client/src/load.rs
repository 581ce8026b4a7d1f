//! Random users write to random others, at a rate that does not wait for answers.
//!
//! Latencies count from the moment a message was planned to be sent: a service that falls behind
//! cannot hide it by slowing the generator down (no coordinated omission).

use crate::journal::Journal;
use crate::output;
use crate::report::{Latencies, Percentiles};
use crate::verify::{self, Findings};
use anyhow::{Context, bail};
use chat_client::checker::Acknowledged;
use chat_client::{Access, Client, Event, Events};
use clap::Args;
use indicatif::ProgressBar;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};

#[derive(Args)]
pub struct Options {
    /// How many users are connected.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(2..=1_000_000))]
    users: u64,
    /// The first user's id; the others follow.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1 << 52))]
    first_user: u64,
    /// How many messages are sent.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    messages: u64,
    /// Messages a second, planned.
    #[arg(long, default_value_t = 2000.0, value_parser = rate)]
    rate: f64,
    /// The number of dialogs; by default, pairs are random.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    dialogs: Option<u64>,
    /// Characters of a text.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    chars: u32,
    /// The seed of the random numbers; printed, so that a run can be repeated.
    #[arg(long)]
    seed: Option<u64>,
    /// Write what was acknowledged here, for `verify`.
    #[arg(long)]
    journal: Option<PathBuf>,
    /// Read everything back afterwards and compare.
    #[arg(long)]
    verify: bool,
    /// Write the report here as JSON.
    #[arg(long)]
    report: Option<PathBuf>,
    /// Ask this admin listener for the shares of the shards, e.g. http://127.0.0.1:8081
    #[arg(long)]
    admin: Option<String>,
    /// The admin token, where one is set.
    #[arg(long, env = "ADMIN_TOKEN", hide_env_values = true)]
    admin_token: Option<String>,
    /// How long to wait for the last answers and deliveries, in seconds.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    patience_seconds: u64,
}

/// A rate that a plan can keep.
fn rate(text: &str) -> Result<f64, String> {
    let rate: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.001..=1_000_000.0).contains(&rate) {
        return Ok(rate);
    }
    Err("a rate is from 0.001 to 1000000 messages a second".into())
}

#[derive(Serialize)]
struct Report {
    seed: u64,
    users: u64,
    planned: u64,
    /// It was ended early, by Ctrl-C.
    interrupted: bool,
    acknowledged: u64,
    refused: BTreeMap<String, u64>,
    delivered: u64,
    seconds: f64,
    acknowledged_per_second: f64,
    delivered_per_second: f64,
    planned_send_to_acknowledgement: Percentiles,
    planned_send_to_delivery: Percentiles,
    disconnections: u64,
    shards: Option<Shares>,
    verified: Option<Findings>,
}

#[derive(Serialize)]
struct Shares {
    by_shard: Vec<serde_json::Value>,
    dialogs_max_over_mean: f64,
    messages_max_over_mean: f64,
}

/// One message of the plan.
#[derive(Clone, Copy)]
struct Planned {
    number: u64,
    from: u64,
    to: u64,
    at: Instant,
}

/// What the tasks of a run share.
struct Run {
    id: u64,
    begun: Instant,
    /// Nanoseconds after `begun` at which each message was planned; the number is in its key.
    planned: Vec<AtomicU64>,
    delivered: AtomicU64,
    disconnections: AtomicU64,
    deliveries: Vec<Mutex<Latencies>>,
    bar: ProgressBar,
    chars: u32,
}

/// Parts of what every delivery writes to, so that receivers do not wait for each other.
const PARTS: usize = 16;

pub async fn run(servers: &[Access], options: Options) -> anyhow::Result<()> {
    let mut interrupted = interruption();
    let seed = options.seed.unwrap_or_else(rand::random);
    let mut rng = StdRng::seed_from_u64(seed);
    output::line(&format!("seed {seed}"))?;

    let mut clients = Vec::new();
    let mut receivers = Vec::new();
    for user in options.first_user..options.first_user + options.users {
        let (client, events) = Client::start(servers[user as usize % servers.len()].clone(), user);
        clients.push(client);
        receivers.push((user, events));
    }
    for (_, events) in &mut receivers {
        match events.recv().await.context("a session ended")? {
            Event::Connected => {}
            Event::Closed(e) => return Err(e.into()),
            Event::Disconnected { reason, .. } => bail!("cannot connect: {reason}"),
            Event::Message(_)
            | Event::Entry(_)
            | Event::Read(_)
            | Event::Typing { .. }
            | Event::Presence(_)
            | Event::Resync(_) => {}
        }
    }
    output::line(&format!(
        "{} users are connected to {} instances",
        options.users,
        servers.len()
    ))?;

    let pairs = options.dialogs.map(|count| {
        (0..count)
            .map(|_| pair(&mut rng, &options))
            .collect::<Vec<_>>()
    });
    let next_pair = move |rng: &mut StdRng, options: &Options| match &pairs {
        Some(pairs) => {
            let (a, b) = pairs[rng.random_range(0..pairs.len())];
            if rng.random() { (a, b) } else { (b, a) }
        }
        None => pair(rng, options),
    };
    let run = Arc::new(Run {
        id: rng.random(),
        begun: Instant::now(),
        planned: (0..options.messages).map(|_| AtomicU64::new(0)).collect(),
        delivered: AtomicU64::new(0),
        disconnections: AtomicU64::new(0),
        deliveries: (0..PARTS).map(|_| Mutex::new(Latencies::new())).collect(),
        bar: crate::replay::bar(options.messages),
        chars: options.chars,
    });
    for (user, events) in receivers {
        tokio::spawn(receive(run.clone(), user, events));
    }

    let (acknowledged_out, acknowledged_in) = mpsc::channel(4096);
    let collector = tokio::spawn(collect(
        run.clone(),
        acknowledged_in,
        options.journal.clone(),
        options.verify,
        interrupted.clone(),
    ));
    let begun = Instant::now();
    let mut planned = options.messages;
    for number in 0..options.messages {
        let at = begun + Duration::from_secs_f64(number as f64 / options.rate);
        if at > Instant::now() {
            tokio::select! {
                () = tokio::time::sleep_until(at.into()) => {}
                _ = interrupted.wait_for(|interrupted| *interrupted) => {}
            }
        }
        if *interrupted.borrow() {
            planned = number;
            break;
        }
        let (from, to) = next_pair(&mut rng, &options);
        let client = clients[(from - options.first_user) as usize].clone();
        tokio::spawn(send(
            run.clone(),
            client,
            Planned {
                number,
                from,
                to,
                at,
            },
            acknowledged_out.clone(),
        ));
    }
    drop(acknowledged_out);
    let patience = Duration::from_secs(options.patience_seconds);
    let mut collected = tokio::time::timeout(patience, collector)
        .await
        .context("answers are missing after the time of patience")???;
    let acknowledged_seconds = begun.elapsed().as_secs_f64();
    let give_up = Instant::now() + patience;
    let waits = |count| {
        let delivered = run.delivered.load(Ordering::Relaxed);
        delivered < count && Instant::now() < give_up && !*interrupted.borrow()
    };
    while waits(collected.count) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let seconds = begun.elapsed().as_secs_f64();
    run.bar.finish_and_clear();

    let mut deliveries = Latencies::new();
    for part in &run.deliveries {
        deliveries.merge(&part.lock().unwrap_or_else(PoisonError::into_inner));
    }
    let interrupted = *interrupted.borrow();
    let verified = if options.verify && !interrupted {
        Some(verify::compare(servers, &collected.all).await?)
    } else {
        None
    };
    let shards = match &options.admin {
        Some(admin) => Some(shares(admin, options.admin_token.as_deref()).await?),
        None => None,
    };
    let delivered = run.delivered.load(Ordering::Relaxed);
    let report = Report {
        seed,
        users: options.users,
        planned,
        interrupted,
        acknowledged: collected.count,
        refused: std::mem::take(&mut collected.refused),
        delivered,
        seconds,
        acknowledged_per_second: collected.count as f64 / acknowledged_seconds,
        delivered_per_second: delivered as f64 / seconds,
        planned_send_to_acknowledgement: collected.latencies.percentiles(),
        planned_send_to_delivery: deliveries.percentiles(),
        disconnections: run.disconnections.load(Ordering::Relaxed),
        shards,
        verified,
    };
    let text = serde_json::to_string_pretty(&report)?;
    output::line(&text)?;
    if let Some(path) = &options.report {
        std::fs::write(path, &text).with_context(|| path.display().to_string())?;
    }
    if interrupted {
        bail!("interrupted: the report has what there was until then");
    }
    if report.acknowledged < report.planned {
        let refused = report.planned - report.acknowledged;
        bail!(
            "{refused} of {} messages were not stored; the report has the reasons",
            report.planned
        );
    }
    if report.delivered < report.acknowledged {
        bail!(
            "{} messages were acknowledged and not delivered",
            report.acknowledged - report.delivered
        );
    }
    if report
        .verified
        .as_ref()
        .is_some_and(|findings| !findings.good())
    {
        bail!("the logs are not what was acknowledged");
    }
    Ok(())
}

/// Becomes true with Ctrl-C.
fn interruption() -> watch::Receiver<bool> {
    let (interrupt, interrupted) = watch::channel(false);
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            interrupt.send_replace(true);
        }
        // A second one ends the command.
        let _ = tokio::signal::ctrl_c().await;
        std::process::exit(130);
    });
    interrupted
}

fn pair(rng: &mut StdRng, options: &Options) -> (u64, u64) {
    let from = rng.random_range(0..options.users);
    let other = rng.random_range(0..options.users - 1);
    let to = if other >= from { other + 1 } else { other };
    (options.first_user + from, options.first_user + to)
}

/// How a send ended.
struct Outcome {
    latency: Duration,
    result: Result<Acknowledged, String>,
}

async fn send(run: Arc<Run>, client: Client, planned: Planned, out: mpsc::Sender<Outcome>) {
    let Planned {
        number,
        from,
        to,
        at,
    } = planned;
    run.planned[number as usize].store((at - run.begun).as_nanos() as u64, Ordering::Relaxed);
    let key = format!("{:x}.{number}", run.id);
    let text = text(run.id ^ number, run.chars);
    let result = match client.send(to, key.clone(), text.clone()).await {
        Ok(sent) => Ok(Acknowledged {
            from,
            to,
            key,
            text,
            seq: sent.seq,
        }),
        Err(chat_client::ClientError::Refused(body)) => Err(body.code.to_string()),
        Err(e) => Err(e.to_string()),
    };
    // The collector outlives every send.
    let _ = out
        .send(Outcome {
            latency: at.elapsed(),
            result,
        })
        .await;
}

/// A text that looks like words, different for every message.
fn text(seed: u64, chars: u32) -> String {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..chars)
        .map(|_| {
            if rng.random_ratio(1, 6) {
                ' '
            } else {
                rng.random_range('a'..='z')
            }
        })
        .collect()
}

struct Collected {
    count: u64,
    all: Vec<Acknowledged>,
    refused: BTreeMap<String, u64>,
    latencies: Latencies,
}

async fn collect(
    run: Arc<Run>,
    mut outcomes: mpsc::Receiver<Outcome>,
    journal: Option<PathBuf>,
    keep: bool,
    mut interrupted: watch::Receiver<bool>,
) -> anyhow::Result<Collected> {
    let mut journal = journal.as_deref().map(Journal::create).transpose()?;
    let mut collected = Collected {
        count: 0,
        all: Vec::new(),
        refused: BTreeMap::new(),
        latencies: Latencies::new(),
    };
    loop {
        let outcome = tokio::select! {
            outcome = outcomes.recv() => outcome,
            _ = interrupted.wait_for(|interrupted| *interrupted) => None,
        };
        let Some(outcome) = outcome else { break };
        run.bar.inc(1);
        match outcome.result {
            Ok(acknowledged) => {
                collected.count += 1;
                collected.latencies.add(outcome.latency);
                if let Some(journal) = &mut journal {
                    journal.add(&acknowledged)?;
                }
                if keep {
                    collected.all.push(acknowledged);
                }
            }
            Err(code) => *collected.refused.entry(code).or_default() += 1,
        }
    }
    if let Some(journal) = journal {
        journal.finish()?;
    }
    Ok(collected)
}

/// Counts what comes for a user from others, once each.
async fn receive(run: Arc<Run>, user: u64, mut events: Events) {
    while let Some(event) = events.recv().await {
        match event {
            Event::Message(message) if message.to == Some(user) => {
                let key = message.key.as_deref().and_then(|key| key.split_once('.'));
                let Some((id, number)) = key else { continue };
                if u64::from_str_radix(id, 16) != Ok(run.id) {
                    continue;
                }
                let planned = number
                    .parse()
                    .ok()
                    .and_then(|number: usize| run.planned.get(number));
                let Some(planned) = planned else { continue };
                // A message may arrive twice; the first one takes the plan's entry.
                let at = planned.swap(u64::MAX, Ordering::Relaxed);
                if at != u64::MAX {
                    run.delivered.fetch_add(1, Ordering::Relaxed);
                    let latency = run.begun.elapsed().saturating_sub(Duration::from_nanos(at));
                    run.deliveries[user as usize % PARTS]
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .add(latency);
                }
            }
            Event::Disconnected { .. } => drop(run.disconnections.fetch_add(1, Ordering::Relaxed)),
            Event::Message(_)
            | Event::Entry(_)
            | Event::Read(_)
            | Event::Typing { .. }
            | Event::Presence(_)
            | Event::Resync(_)
            | Event::Connected
            | Event::Closed(_) => {}
        }
    }
}

/// The shares of the shards, as the service counts them.
async fn shares(admin: &str, token: Option<&str>) -> anyhow::Result<Shares> {
    let request = reqwest::Client::new().get(format!("{admin}/admin/shards"));
    let request = match token {
        Some(token) => request.bearer_auth(token),
        None => request,
    };
    let answer: serde_json::Value = request.send().await?.error_for_status()?.json().await?;
    let by_shard = answer["shards"]
        .as_array()
        .context("the admin listener names no shards")?
        .clone();
    let max_over_mean = |field: &str| {
        let counts: Vec<f64> = by_shard
            .iter()
            .filter_map(|shard| shard[field].as_f64())
            .collect();
        let mean = counts.iter().sum::<f64>() / counts.len() as f64;
        counts.iter().copied().fold(0.0, f64::max) / mean
    };
    Ok(Shares {
        dialogs_max_over_mean: max_over_mean("dialogs"),
        messages_max_over_mean: max_over_mean("messages"),
        by_shard,
    })
}
