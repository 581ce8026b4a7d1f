//! Shards are declared down and brought back.

use super::{Log, Outcome};
use crate::service::{Service, locked};
use anyhow::ensure;
use chat_client::Api;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Of the dialogs so far, how many pages of the newest messages and how many inboxes say that
/// something may be missing.
pub(super) async fn gaps(service: &Service, log: &Log) -> anyhow::Result<(usize, usize)> {
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

pub(super) async fn lose(
    service: &mut Service,
    log: &Log,
    begun: Instant,
    seconds: u64,
) -> anyhow::Result<Outcome> {
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
        // Recognized by its generation: the first message that a slot of the lost shard has taken.
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
        ensure!(pages > 0 && inboxes == 40, "the gap is not reported");
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
            "{pages} pages and {inboxes} inboxes still report a gap"
        );
        lines.push(format!(
            "{name} back    merged, and its slots moved back, within {} ms; no page and no inbox reports a gap",
            returned.elapsed().as_millis(),
        ));
        service.outage(&name, edited - Duration::from_secs(5));
    }
    Ok(Outcome {
        during: Vec::new(),
        live: vec![1, 2, 3, 4],
        empty: None,
        lines,
    })
}
