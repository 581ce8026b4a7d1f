//! Pages of a very long dialog, and inboxes of users with many dialogs: a page costs what is on it.

use crate::attack::{COUNTERPART, fill};
use crate::service::Service;
use chat_client::Api;
use clap::Args;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

#[derive(Args)]
pub struct Options {
    /// The server's program.
    #[arg(long, default_value = "target/release/chat")]
    chat: PathBuf,
    /// Where servers keep their data; removed before.
    #[arg(long, default_value = ".dev/reads")]
    dir: PathBuf,
    #[arg(long, default_value_t = 9400)]
    port: u16,
    /// Messages of the long dialog.
    #[arg(long, default_value_t = 1_000_000)]
    messages: u64,
    /// Dialogs of the user with many dialogs.
    #[arg(long, default_value_t = 100_000)]
    dialogs: u64,
    /// Reads of each kind.
    #[arg(long, default_value_t = 500)]
    reads: usize,
    /// Users with a hundred dialogs each, who ask for their inboxes as fast as they are answered.
    #[arg(long, default_value_t = 200)]
    users: u64,
    /// Inboxes under way.
    #[arg(long, default_value_t = 16)]
    window: u64,
}

/// The user with many dialogs, the user with few, and the first of those with a hundred each.
const MANY: u64 = 900_001;
const FEW: u64 = 900_002;
const CROWD: u64 = 910_000;

const PAGE: u64 = 50;

pub async fn run(options: Options) -> anyhow::Result<()> {
    let _ = std::fs::remove_dir_all(&options.dir);
    std::fs::create_dir_all(&options.dir)?;
    let dir = std::fs::canonicalize(&options.dir)?;
    let mut service = Service::new(options.chat.clone(), dir, options.port);
    for n in 1..=4 {
        service.start_shard(n)?;
    }
    service.start_nats()?;
    service.save(&[(1, ""), (2, ""), (3, ""), (4, "")])?;
    service.start_instance(0, "").await?;
    fill(&service, MANY, options.dialogs, options.messages).await?;
    fill(&service, FEW, 100, 1).await?;
    for n in 0..options.users {
        fill(&service, CROWD + n, 100, 1).await?;
    }

    let many = Api::new(service.access(0), MANY).await?;
    let few = Api::new(service.access(0), FEW).await?;
    let (middle, mut took) = (options.messages / 2, [const { Vec::new() }; 6]);
    let pages = [
        ("before", options.messages + 1),
        ("before", middle),
        ("after", middle),
        ("after", 0),
    ];
    // In a random order each time: the machine, and the request before, affect all alike.
    let mut rng = StdRng::seed_from_u64(1);
    let mut order = [0, 1, 2, 3, 4, 5];
    for _ in 0..options.reads {
        order.shuffle(&mut rng);
        for kind in order {
            let begun = Instant::now();
            let length = if let Some((bound, seq)) = pages.get(kind) {
                let query = [(*bound, *seq), ("limit", PAGE)];
                many.history(COUNTERPART, &query).await?.messages.len()
            } else {
                let api = if kind == 4 { &few } else { &many };
                api.inbox(PAGE as u32, None).await?.dialogs.len()
            };
            took[kind].push(begun.elapsed());
            anyhow::ensure!(length as u64 == PAGE, "{length} of kind {kind}");
        }
    }
    let [end, down, up, beginning, few, many] = took.map(median);
    println!(
        "pages of {PAGE} in a dialog of {} messages, p50:",
        options.messages
    );
    println!(
        "  at the end {end:.2} ms, in the middle {down:.2} (before) and {up:.2} (after), at the beginning {beginning:.2}"
    );
    let pages = [end, down, up, beginning];
    let (least, most) = (
        pages.iter().copied().fold(f64::MAX, f64::min),
        pages.iter().copied().fold(0.0, f64::max),
    );
    println!("  the slowest over the fastest: {:.2}", most / least);
    println!("first page of an inbox, p50:");
    println!(
        "  100 dialogs {few:.2} ms, {} dialogs {many:.2} ms, ratio {:.2}",
        options.dialogs,
        many / few
    );
    crowd(&service, &options).await
}

/// Inboxes as fast as they are answered.
async fn crowd(service: &Service, options: &Options) -> anyhow::Result<()> {
    let span = Duration::from_secs(10);
    let (begun, count) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    let before = service.shard_ticks()?;
    let mut asking = Vec::new();
    for lane in 0..options.window {
        let users = (0..options.users).filter(move |n| n % options.window == lane);
        let (access, count) = (service.access(0), count.clone());
        let users: Vec<u64> = users.collect();
        asking.push(tokio::spawn(async move {
            let mut apis = Vec::new();
            for n in users {
                apis.push(Api::new(access.clone(), CROWD + n).await?);
            }
            while begun.elapsed() < span {
                for api in &apis {
                    api.inbox(PAGE as u32, None).await?;
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
            anyhow::Ok(())
        }));
    }
    for lane in asking {
        lane.await??;
    }
    let (seconds, count) = (begun.elapsed().as_secs_f64(), count.load(Ordering::Relaxed));
    let mysqld = (service.shard_ticks()? - before) as f64 * 10_000.0;
    println!(
        "{:.0} inboxes a second, {} at a time; mysqld {:.0} us of processor time an inbox",
        count as f64 / seconds,
        options.window,
        mysqld / count as f64
    );
    Ok(())
}

/// In milliseconds.
fn median(mut took: Vec<Duration>) -> f64 {
    took.sort_unstable();
    took[took.len() / 2].as_secs_f64() * 1000.0
}
