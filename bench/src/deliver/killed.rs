//! An instance is killed; its clients go on at the other.

use super::{Options, Users, millis, reconnections};
use crate::devices::{Talk, Traffic, all_connected, answered, caught_up, compare};
use crate::service::{Service, locked};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(super) async fn killed(
    service: &mut Service,
    options: &Options,
    users: Users,
) -> anyhow::Result<()> {
    let devices = users.devices(service);
    all_connected(&devices).await?;
    let pairs = users.pairs(users.count * 3);
    let traffic = Arc::new(Traffic::default());
    let seconds = (options.seconds / 3.0).max(6.0);
    let plan = Talk {
        pairs,
        rate: options.rate,
        seconds,
        seed: users.seed,
    };
    let kill = async {
        tokio::time::sleep(Duration::from_secs_f64(seconds / 3.0)).await;
        service.kill_instance(0)?;
        anyhow::Ok(Instant::now())
    };
    let ((), killed) = tokio::join!(plan.run(&devices, &traffic), kill);
    let killed = killed?;
    answered(&traffic).await?;
    let took = caught_up(&devices, &traffic, Instant::now(), Duration::from_secs(5)).await?;
    let compared = compare(service, 1, &devices, &traffic).await?;
    let back = reconnections(&devices, killed);
    println!(
        "  {} messages; {} devices lost their instance and were back on the other after {} (half) to {} ms (all)",
        locked(&traffic.sent).len(),
        back.len(),
        millis(&back, 0.5),
        millis(&back, 1.0)
    );
    println!(
        "  all caught up {} ms after the last acknowledgement; {compared} deliveries compared with the logs",
        took.as_millis()
    );
    Ok(())
}
