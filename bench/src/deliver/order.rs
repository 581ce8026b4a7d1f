//! Lines that are piped into `chat-client talk`, while shards refuse and return and instances are
//! killed: each dialog has its lines once and in order.

use super::{Options, Users};
use crate::service::{Service, locked};
use anyhow::{Context, ensure};
use chat_client::Api;
use futures_util::{StreamExt, TryStreamExt, stream};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::path::Path;
use std::process::Stdio;
use std::sync::Mutex;
use std::time::Duration;
use testkit::SECRET;
use tokio::io::AsyncWriteExt;

/// Lines of a run.
const LINES: usize = 8;

/// Runs at once.
const AT_ONCE: usize = 8;

const READ_ONLY: &str = "SET GLOBAL super_read_only = 1";
const WRITABLE: &str = "SET GLOBAL super_read_only = 0; SET GLOBAL read_only = 0";

/// What was done to the service.
#[derive(Default)]
struct Faults {
    killed: u64,
    stopped: u64,
    read_only: u64,
}

pub(super) async fn order(
    service: &mut Service,
    options: &Options,
    users: Users,
) -> anyhow::Result<()> {
    let runs = options.count.unwrap_or(1000);
    let urls = [service.url(0), service.url(1)];
    let access = service.access_to_any(0);
    // Lines that were shown as not sent for the moment.
    let waited = Mutex::new(0_u64);
    let all = stream::iter(0..runs)
        .map(|run| {
            let with_first = [&urls[run as usize % 2], &urls[(run as usize + 1) % 2]];
            let url = format!("{},{}", with_first[0], with_first[1]);
            let waited = &waited;
            async move {
                let (me, peer) = (users.user(2 * run), users.user(2 * run + 1));
                let shown = talk(&options.chat_client, &url, me, peer).await?;
                *locked(waited) += u64::from(shown.contains("waiting"));
                anyhow::Ok(())
            }
        })
        .buffer_unordered(AT_ONCE)
        .try_for_each(|()| async { Ok(()) });
    let mut faults = Faults::default();
    tokio::select! {
        done = all => done?,
        broken = disturb(service, users.seed, &mut faults) => broken?,
    }
    // The last disturbance may have been left half way.
    for shard in 1..=4 {
        service.signal_shard(shard, "CONT")?;
        service.execute(shard, WRITABLE).await?;
    }
    for i in 0..2 {
        service.kill_instance(i)?;
        service.start_instance(i, "").await?;
    }
    let expected: Vec<String> = (0..LINES).map(|n| format!("line {n}")).collect();
    let wrong = stream::iter(0..runs).map(|run| {
        let (access, expected) = (access.clone(), &expected);
        async move {
            let (me, peer) = (users.user(2 * run), users.user(2 * run + 1));
            let log = Api::new(access, me).await?.log_upwards(peer).await?;
            let texts: Vec<String> = log.into_iter().map(|message| message.text).collect();
            ensure!(texts == *expected, "dialog {me}_{peer}: {texts:?}");
            anyhow::Ok(())
        }
    });
    wrong
        .buffer_unordered(AT_ONCE)
        .try_for_each(|()| async { Ok(()) })
        .await?;
    println!(
        "  {runs} runs of {LINES} lines: each dialog has its lines once and in order; {} runs had to wait",
        locked(&waited)
    );
    println!(
        "  instances killed {} times, shards stopped {} times and read-only {} times",
        faults.killed, faults.stopped, faults.read_only
    );
    ensure!(
        faults.killed > 0 && faults.stopped > 0,
        "nothing was disturbed"
    );
    Ok(())
}

/// One run: what it has shown.
async fn talk(program: &Path, url: &str, me: u64, peer: u64) -> anyhow::Result<String> {
    let (me, peer) = (me.to_string(), peer.to_string());
    let mut child = tokio::process::Command::new(program)
        .args(["talk", "--url", url, "--user", &me, "--with", &peer])
        .env("CHAT_SECRET", SECRET)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("chat-client")?;
    let lines: String = (0..LINES).map(|n| format!("line {n}\n")).collect();
    let mut keyboard = child.stdin.take().context("stdin")?;
    keyboard.write_all(lines.as_bytes()).await?;
    drop(keyboard);
    let output = child.wait_with_output().await?;
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{me} with {peer}: {error}{shown}");
    Ok(shown)
}

/// Kills instances, stops shards and makes them read-only, until it is dropped.
async fn disturb(service: &mut Service, seed: u64, faults: &mut Faults) -> anyhow::Result<()> {
    let mut rng = StdRng::seed_from_u64(seed);
    loop {
        let pause = Duration::from_millis(rng.random_range(200..1200));
        let shard = rng.random_range(1..=4);
        match rng.random_range(0..3) {
            0 => {
                let instance = rng.random_range(0..2);
                service.kill_instance(instance)?;
                tokio::time::sleep(pause).await;
                service.start_instance(instance, "").await?;
                faults.killed += 1;
            }
            1 => {
                service.signal_shard(shard, "STOP")?;
                tokio::time::sleep(pause).await;
                service.signal_shard(shard, "CONT")?;
                faults.stopped += 1;
            }
            _ => {
                service.execute(shard, READ_ONLY).await?;
                tokio::time::sleep(pause).await;
                service.execute(shard, WRITABLE).await?;
                faults.read_only += 1;
            }
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}
