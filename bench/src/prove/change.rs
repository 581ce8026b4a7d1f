//! A fifth shard is added, the second drained and removed.

use super::repeat::repeat_all;
use super::{Log, Outcome};
use crate::service::Service;
use std::time::{Duration, Instant};

pub(super) async fn change(
    service: &mut Service,
    log: &Log,
    begun: Instant,
    seconds: u64,
    faults: &mut Vec<&'static str>,
) -> anyhow::Result<Outcome> {
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
    Ok(Outcome {
        during,
        live: vec![1, 3, 4, 5],
        empty: Some(2),
        lines: vec![format!(
            "fifth shard    took {moved} slots ({:.1} %), {between_old} moved between the old four",
            100.0 * moved as f64 / 4096.0
        )],
    })
}
