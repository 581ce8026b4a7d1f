//! The shards' servers are stopped, made read-only, and left with few connections.

use super::{Log, Outcome, Sent};
use crate::service::{Service, locked};
use anyhow::ensure;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

pub(super) async fn hurt(
    service: &mut Service,
    log: &Log,
    begun: Instant,
    seconds: u64,
) -> anyhow::Result<Outcome> {
    tokio::time::sleep_until((begun + Duration::from_secs(seconds / 9)).into()).await;
    let mut lines = Vec::new();
    for (n, what, hurt, repair, lasts) in [
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
            // Open connections stay open otherwise, and the limit has no effect.
            service.close_connections(n).await?;
        }
        tokio::time::sleep(Duration::from_secs(lasts)).await;
        let repaired = Instant::now();
        match repair {
            None => service.signal_shard(n, "CONT")?,
            Some(sql) => service.execute(n, sql).await?,
        }
        // Every send that waited for it is answered.
        let waited = loop {
            let late = log.under_way.load(Ordering::Relaxed);
            if late < 20 {
                break repaired.elapsed();
            }
            ensure!(
                repaired.elapsed() < Duration::from_secs(30),
                "{late} sends still wait for shard{n}"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let during = |one: &&Sent| one.planned > since && one.planned < repaired;
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
    Ok(Outcome {
        during: Vec::new(),
        live: vec![1, 2, 3, 4],
        empty: None,
        lines,
    })
}
