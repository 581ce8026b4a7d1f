//! The bus loses a twentieth of what it carries, and is killed twice.

use super::{Options, Users, follow};
use crate::devices::{Talk, Traffic, all_connected, answered, caught_up, compare};
use crate::service::{Service, locked};
use std::sync::Arc;
use std::time::{Duration, Instant};
use testkit::lossy::Lossy;

pub(super) async fn lossy(
    service: &mut Service,
    options: &Options,
    users: Users,
    losing: &[Lossy],
) -> anyhow::Result<()> {
    let devices = users.devices(service);
    all_connected(&devices).await?;
    let pairs = users.pairs(users.count * 3);
    follow(&devices, &pairs).await?;
    let traffic = Arc::new(Traffic::default());
    let plan = Talk {
        pairs,
        rate: options.rate,
        seconds: options.seconds,
        seed: users.seed,
    };
    let begun = Instant::now();
    let faults = async {
        for part in [1.0, 2.0] {
            let at = begun + Duration::from_secs_f64(options.seconds * part / 3.0);
            tokio::time::sleep_until(at.into()).await;
            service.kill_nats()?;
            tokio::time::sleep(Duration::from_secs(2)).await;
            service.start_nats()?;
        }
        anyhow::Ok(())
    };
    let ((), faults) = tokio::join!(plan.run(&devices, &traffic), faults);
    faults?;
    answered(&traffic).await?;
    let took = caught_up(&devices, &traffic, Instant::now(), Duration::from_secs(5)).await?;
    let compared = compare(service, 0, &devices, &traffic).await?;
    let mut read = 0.0;
    for i in 0..2 {
        read += service.metric(i, "chat_messages_caught_up_total").await?;
    }
    let counts = losing.iter().map(Lossy::counts);
    let (lost, passed) = counts.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    println!(
        "  {} messages; the bus lost {lost} of {} that it carried, and was killed twice; {} devices",
        locked(&traffic.sent).len(),
        lost + passed,
        devices.len()
    );
    println!(
        "  all caught up {} ms after the last acknowledgement; {read} deliveries were read from the shards",
        took.as_millis()
    );
    println!("  {compared} deliveries compared with the logs: each once, in order, unchanged");
    Ok(())
}
