//! The pace of moves, merges and purges: at full speed without live traffic, and slow enough to
//! leave its latency alone with it.

use crate::store::Shard;
use std::time::Duration;
use tokio::sync::{Semaphore, SemaphorePermit};

/// With live traffic, work is followed by a rest of this many times its duration: `REST`, and
/// `REST_OF_STRAIN` for each multiple by which transactions of sends take longer than `UNFELT`
/// times their usual duration.
const REST: f64 = 1.0;
const UNFELT: f64 = 1.05;
const REST_OF_STRAIN: f64 = 20.0;
const LONGEST_REST: f64 = 10.0;

/// The settings of moves.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// A slot that is sealed for longer than this is unsealed, and the attempt cancelled.
    pub freeze: Duration,
    /// How long the rows of a slot stay after it has left.
    pub purge_after: Duration,
    /// Whether live traffic is taken into account.
    pub throttle: bool,
}

impl Pace {
    /// The duration of live transactions as a multiple of the usual one, at the shard with the
    /// highest; 0 without live traffic.
    #[must_use]
    pub fn strain(&self, shards: &[&Shard]) -> f64 {
        if !self.throttle {
            return 0.0;
        }
        let strain = shards.iter().map(|shard| shard.strain());
        strain.fold(0.0, f64::max)
    }

    /// Rests after work of this duration, if these shards have live traffic.
    pub async fn rest(&self, shards: &[&Shard], worked: Duration) {
        tokio::time::sleep(rest_after(worked, self.strain(shards))).await;
    }
}

fn rest_after(worked: Duration, strain: f64) -> Duration {
    if strain <= 0.0 {
        return Duration::ZERO;
    }
    let rest = REST + (strain - UNFELT).max(0.0) * REST_OF_STRAIN;
    worked.mul_f64(rest.min(LONGEST_REST))
}

/// The number of slots that move at once: several without live traffic, one with it.
pub struct Lanes {
    pace: Pace,
    permits: Semaphore,
    count: u32,
}

impl Lanes {
    /// At most `count` at once.
    #[must_use]
    pub fn new(count: usize, pace: Pace) -> Self {
        let count = u32::try_from(count.max(1)).unwrap_or(u32::MAX);
        Self {
            pace,
            permits: Semaphore::new(count as usize),
            count,
        }
    }

    /// Waits until work at these shards may begin; it ends when the permit is dropped.
    pub async fn enter(&self, shards: &[&Shard]) -> Option<SemaphorePermit<'_>> {
        let all = self.pace.strain(shards) > 0.0;
        let permits = if all { self.count } else { 1 };
        // It is never closed.
        self.permits.acquire_many(permits).await.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rests_grow_with_what_live_traffic_feels() {
        let worked = Duration::from_millis(10);
        let rest = |strain| rest_after(worked, strain).as_millis();
        assert_eq!(rest(0.0), 0, "no writes");
        assert_eq!((rest(0.5), rest(1.0)), (10, 10), "the latency is as usual");
        assert!(rest(1.1) > 10 && rest(1.2) > rest(1.1));
        assert_eq!(rest(50.0), 100);
    }
}
