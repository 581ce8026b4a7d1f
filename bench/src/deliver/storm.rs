//! Thousands of clients lose their instance at once.

use super::{Options, Users, millis, reconnections};
use crate::devices::{Device, Talk, Traffic, all_connected, answered, caught_up, compare};
use crate::service::{Service, locked};
use anyhow::ensure;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

pub(super) async fn storm(
    service: &mut Service,
    options: &Options,
    users: Users,
) -> anyhow::Result<()> {
    let crowd = Users {
        count: options.count.unwrap_or(5000),
        first: users.first + 100_000,
        ..users
    };
    // A crowd on one instance; and others on the other one, which notice it only as neighbours.
    let access = [service.access_to_any(0), service.access(1)];
    let crowd_devices: Vec<Device> = (0..crowd.count)
        .map(|n| Device::start(access[0].clone(), crowd.user(n)))
        .collect();
    let others: Vec<Device> = (0..users.count)
        .map(|n| Device::start(access[1].clone(), users.user(n)))
        .collect();
    all_connected(&crowd_devices).await?;
    all_connected(&others).await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let (traffic, aside) = (Arc::new(Traffic::default()), Arc::new(Traffic::default()));
    let in_crowd = Talk {
        pairs: crowd.pairs(crowd.count),
        rate: options.rate / 3.0,
        seconds: 25.0,
        seed: crowd.seed,
    };
    let beside = Talk {
        pairs: users.pairs(users.count * 2),
        rate: options.rate / 3.0,
        seconds: 25.0,
        seed: users.seed + 1,
    };
    let kill = async {
        tokio::time::sleep(Duration::from_secs(8)).await;
        service.kill_instance(0)?;
        let killed = Instant::now();
        while !crowd_devices.iter().all(|device| {
            device.record.connected.load(Ordering::Relaxed)
                && locked(&device.record.reconnected).len() > 1
        }) {
            ensure!(
                killed.elapsed() < Duration::from_secs(60),
                "not all are back"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        anyhow::Ok((killed, Instant::now()))
    };
    let ((), (), storm) = tokio::join!(
        in_crowd.run(&crowd_devices, &traffic),
        beside.run(&others, &aside),
        kill
    );
    let (killed, back) = storm?;
    for (devices, traffic) in [(&crowd_devices, &traffic), (&others, &aside)] {
        answered(traffic).await?;
        let took = caught_up(devices, traffic, Instant::now(), Duration::from_secs(5)).await?;
        let compared = compare(service, 1, devices, traffic).await?;
        println!(
            "  {} devices: all caught up {} ms after the last acknowledgement; {compared} deliveries compared with the logs",
            devices.len(),
            took.as_millis()
        );
    }
    let came = reconnections(&crowd_devices, killed);
    println!(
        "  {} clients lost their instance at once: half were back after {} ms, 99 % after {} ms, all after {} ms",
        came.len(),
        millis(&came, 0.5),
        millis(&came, 0.99),
        (back - killed).as_millis()
    );
    println!(
        "  p99 of the others {:.1} ms before, {:.1} ms until all were back, {:.1} ms afterwards",
        aside.p99(
            killed - Duration::from_secs(6),
            killed - Duration::from_secs(2),
            |_| true
        ),
        aside.p99(killed, back, |_| true),
        aside.p99(back, Instant::now(), |_| true)
    );
    Ok(())
}
