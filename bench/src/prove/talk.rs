//! Users write at a steady rate.

use super::repeat::send_again;
use super::{Log, Options, Sent};
use crate::service::locked;
use anyhow::ensure;
use chat_client::{Access, Client};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Sends at a steady rate, whatever comes of it.
pub(super) async fn talk(
    options: Arc<Options>,
    clients: Vec<Client>,
    servers: [Access; 2],
    log: Arc<Log>,
    begun: Instant,
) -> anyhow::Result<()> {
    let mut rng = StdRng::seed_from_u64(options.seed);
    let pairs: Vec<(u64, u64)> = (0..options.dialogs)
        .map(|_| {
            let a = rng.random_range(0..options.users);
            (
                a,
                (a + 1 + rng.random_range(0..options.users - 1)) % options.users,
            )
        })
        .collect();
    let total = (options.rate * options.seconds as f64) as u64;
    for number in 0..total {
        let planned = begun + Duration::from_secs_f64(number as f64 / options.rate);
        tokio::time::sleep_until(planned.into()).await;
        let (a, b) = pairs[rng.random_range(0..options.dialogs) as usize];
        let (from, to) = if rng.random_range(0..2) == 0 {
            (a, b)
        } else {
            (b, a)
        };
        let repeat = rng.random_range(0..100) < options.repeats;
        let (client, log) = (clients[from as usize].clone(), log.clone());
        let other = servers[(from as usize + 1) % 2].clone();
        log.under_way.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            let (key, text) = (format!("k{number}"), format!("text {number}"));
            match client.send(1 + to, key.clone(), text.clone()).await {
                Ok(sent) => {
                    let took = planned.elapsed();
                    if repeat {
                        let again = send_again(&other, 1 + from, 1 + to, &key).await;
                        log.again(&key, sent.seq, again);
                        log.repeated.fetch_add(1, Ordering::Relaxed);
                    }
                    locked(&log.sent).push(Sent {
                        from: 1 + from,
                        to: 1 + to,
                        key,
                        seq: sent.seq,
                        planned,
                        took,
                    });
                }
                Err(e) => locked(&log.wrong).push(format!("{key} was refused: {e}")),
            }
            log.under_way.fetch_sub(1, Ordering::Relaxed);
        });
    }
    let patience = Instant::now() + Duration::from_secs(60);
    while log.under_way.load(Ordering::Relaxed) > 0 {
        ensure!(
            Instant::now() < patience,
            "{} sends are not answered after a minute",
            log.under_way.load(Ordering::Relaxed)
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}
