//! How fast slots move, merge and are purged: as fast as they can where nobody writes, and so that people do not feel it where they
//! do.

use crate::store::Shard;
use std::time::Duration;
use tokio::sync::{Semaphore, SemaphorePermit};

/// Where there is live traffic, work is followed by a rest of so many times its length: `REST`, and `REST_OF_STRAIN` for each time
/// that transactions of sends take longer than `UNFELT` times as long as usual.
const REST: f64 = 1.0;
const UNFELT: f64 = 1.05;
const REST_OF_STRAIN: f64 = 20.0;
const LONGEST_REST: f64 = 10.0;

/// How moves are carried out.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Sealed for longer than this, the attempt is cancelled.
    pub freeze: Duration,
    /// After a slot has left, its rows stay for so long.
    pub purge_after: Duration,
    /// Whether live traffic counts.
    pub throttle: bool,
}

impl Pace {
    /// How many times as long as usual live traffic takes at the shard that feels it most; 0 where there is none that counts.
    #[must_use]
    pub fn strain(&self, shards: &[&Shard]) -> f64 {
        if !self.throttle {
            return 0.0;
        }
        let strain = shards.iter().map(|shard| shard.strain());
        strain.fold(0.0, f64::max)
    }

    /// Leaves shards alone for a while after so much work, where there is live traffic.
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

/// How many slots move at once: some where there is no live traffic, and one where there is.
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

    /// Waits until work at these shards may begin; it may go on until the permit is dropped.
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
        assert_eq!(rest(0.0), 0, "nobody writes");
        assert_eq!((rest(0.5), rest(1.0)), (10, 10), "nobody feels it");
        assert!(rest(1.1) > 10 && rest(1.2) > rest(1.1));
        assert_eq!(rest(50.0), 100);
    }
}
