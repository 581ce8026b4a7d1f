//! An instance is asked to stop; its sessions go to the other.

use super::{Options, Users, millis, reconnections};
use crate::devices::{Device, Talk, Traffic, all_connected, answered, caught_up, compare};
use crate::service::{Service, locked};
use anyhow::{Context, ensure};
use chat_wire::Close;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub(super) async fn handover(
    service: &mut Service,
    options: &Options,
    users: Users,
) -> anyhow::Result<()> {
    let users = Users {
        count: options.count.unwrap_or(1000),
        ..users
    };
    let access = service.access_to_any(0);
    let devices: Vec<Device> = (0..users.count)
        .map(|n| Device::start(access.clone(), users.user(n)))
        .collect();
    all_connected(&devices).await?;
    let traffic = Arc::new(Traffic::default());
    let plan = Talk {
        pairs: users.pairs(users.count),
        rate: options.rate,
        seconds: 20.0,
        seed: users.seed,
    };
    let (url, went) = (service.url(0), Mutex::new((None, None, None)));
    let go = async {
        tokio::time::sleep(Duration::from_secs(4)).await;
        let asked = Instant::now();
        service.terminate_instance(0)?;
        let mut not_ready = None;
        while !service.has_ended(0)? {
            if not_ready.is_none()
                && let Ok(answer) = reqwest::get(format!("{url}/readyz")).await
                && answer.status() == 503
            {
                not_ready = Some(asked.elapsed());
            }
            ensure!(asked.elapsed() < Duration::from_secs(30), "it does not go");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        *locked(&went) = (Some(asked), not_ready, Some(asked.elapsed()));
        anyhow::Ok(())
    };
    let ((), gone) = tokio::join!(plan.run(&devices, &traffic), go);
    gone?;
    answered(&traffic).await?;
    let took = caught_up(&devices, &traffic, Instant::now(), Duration::from_secs(5)).await?;
    let compared = compare(service, 1, &devices, &traffic).await?;
    let (asked, not_ready, ended) = *locked(&went);
    let (asked, not_ready) = (
        asked.context("not asked")?,
        not_ready.context("it was never not ready")?,
    );
    let mut closed: Vec<(Option<u16>, Duration)> = devices
        .iter()
        .flat_map(|device| locked(&device.record.closed).clone())
        .filter(|(_, at)| *at > asked)
        .map(|(code, at)| (code, at - asked))
        .collect();
    closed.sort_by_key(|(_, after)| *after);
    let with_1012 = closed
        .iter()
        .filter(|(code, _)| *code == Some(Close::Restart.code()))
        .count();
    let after: Vec<Duration> = closed.iter().map(|(_, after)| *after).collect();
    println!(
        "  {} sessions; not ready after {} ms, gone after {} ms",
        devices.len(),
        not_ready.as_millis(),
        ended.unwrap_or_default().as_millis()
    );
    println!(
        "  {} closings, {with_1012} of them 1012: the first after {} ms, half after {}, the last after {}",
        closed.len(),
        millis(&after, 0.0),
        millis(&after, 0.5),
        millis(&after, 1.0)
    );
    println!(
        "  back on the other: half after {} ms, all after {} ms",
        millis(&reconnections(&devices, asked), 0.5),
        millis(&reconnections(&devices, asked), 1.0)
    );
    println!(
        "  {} messages meanwhile; all caught up {} ms after the last acknowledgement; {compared} deliveries compared with the logs",
        locked(&traffic.sent).len(),
        took.as_millis()
    );
    println!(
        "  p99 of all sends {:.1} ms before, {:.1} ms from then on",
        traffic.p99(asked - Duration::from_secs(3), asked, |_| true),
        traffic.p99(asked, Instant::now(), |_| true)
    );
    ensure!(
        with_1012 >= devices.len(),
        "not every session got the reason"
    );
    Ok(())
}
