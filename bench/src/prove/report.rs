//! Compares everything with what was acknowledged, and prints a page.

use super::{Log, Options, Outcome, Sent};
use crate::service::{Service, locked};
use anyhow::{Context, ensure};
use chat_client::checker;
use chat_client::checker::Acknowledged;
use futures_util::{StreamExt, TryStreamExt, stream};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Compares the log of a dialog with what was acknowledged in it.
pub(super) fn compare(log: &[chat_wire::Message], acknowledged: &[&Sent]) -> anyhow::Result<()> {
    let expected: Vec<Acknowledged> = acknowledged.iter().map(|one| one.acknowledged()).collect();
    let faults = checker::faults(log, &expected.iter().collect::<Vec<_>>());
    ensure!(faults.is_empty(), "{faults:?}");
    // One that came back as a duplicate has no key.
    let keyed = log.iter().filter(|message| message.key.is_some()).count();
    ensure!(
        keyed == acknowledged.len(),
        "{keyed} messages, and {} were acknowledged",
        acknowledged.len()
    );
    // A message that was acknowledged before another was sent has a lower seq.
    let mut in_order = acknowledged.to_vec();
    in_order.sort_by_key(|one| one.seq);
    let mut latest: Option<&Sent> = None;
    for one in in_order {
        if let Some(latest) = latest {
            ensure!(
                one.planned + one.took >= latest.planned,
                "{} was acknowledged before {} was sent, and has a higher seq",
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

pub(super) async fn report(
    service: &Service,
    options: &Options,
    log: &Log,
    outcome: Outcome,
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
    let first = outcome.during.first().map(|(from, _)| *from);
    let before = millis(&|one| first.is_none_or(|first| one.planned + one.took < first));
    let during = millis(&|one| {
        let mut during = outcome.during.iter();
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
            let instances = [service.access(0), service.access(1)];
            let reading = checker::read_everywhere(&instances, (*low, *high)).await?;
            ensure!(
                reading.faults.is_empty(),
                "{low}_{high}: {:?}",
                reading.faults
            );
            compare(&reading.log, expected).with_context(|| format!("{low}_{high}"))?;
            anyhow::Ok(reading.read)
        })
        .buffer_unordered(16)
        .try_fold(0, |sum: u64, read| async move { Ok(sum + read) })
        .await?;

    let (mut owned, mut stored, mut duplicate_rows, mut orphans) = (0, 0, 0, 0);
    for n in outcome.live.iter().copied() {
        owned += service
            .number(n, "SELECT COUNT(*) FROM slots WHERE state = 'owner'")
            .await?;
        let keyed = "SELECT COUNT(*) FROM messages WHERE client_key IS NOT NULL";
        stored += service.number(n, keyed).await?;
        let duplicates = "SELECT COUNT(*) FROM messages WHERE duplicate_of IS NOT NULL";
        duplicate_rows += service.number(n, duplicates).await?;
        for table in ["messages", "dialogs", "members"] {
            orphans += service.number(n, &format!("SELECT COUNT(*) FROM {table} JOIN slots USING (slot) WHERE state <> 'owner'")).await?;
        }
    }
    let mut left = 0;
    for (n, table) in outcome
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
        "\n  planned        {} messages at {}/s over {} dialogs of {} users, seed {}",
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
        "  killed         instances {} times; shards killed or declared down {} times",
        deaths("instance"),
        deaths("shard")
    );
    println!(
        "  read back      {read} messages, as both users, in both directions, through both instances"
    );
    println!(
        "  in the tables  {stored} messages, {duplicate_rows} of them duplicates, {owned} slots owned, {orphans} rows where they do not belong, {left} rows in a shard that was drained"
    );
    for line in &outcome.lines {
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
    println!("all invariants hold");
    Ok(())
}
