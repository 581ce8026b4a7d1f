//! So many a second, for each of many.

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use std::hash::Hash;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Limits each key on its own.
pub struct Rates<K: Clone + Hash + Eq> {
    limiter: DefaultKeyedRateLimiter<K>,
    clock: DefaultClock,
    asked: AtomicU64,
}

/// After so many questions those who have been quiet are forgotten.
const FORGET_EVERY: u64 = 65_536;

impl<K: Clone + Hash + Eq> Rates<K> {
    /// `per_second` in the long run, and `burst` at once.
    #[must_use]
    pub fn new(per_second: u32, burst: u32) -> Self {
        let at_least_one = |n: u32| NonZeroU32::new(n).unwrap_or(NonZeroU32::MIN);
        let quota = Quota::per_second(at_least_one(per_second)).allow_burst(at_least_one(burst));
        Self {
            limiter: RateLimiter::keyed(quota),
            clock: DefaultClock::default(),
            asked: AtomicU64::new(0),
        }
    }

    /// Counts one more of `key`.
    ///
    /// # Errors
    /// How long to wait, if that is one too many.
    pub fn take(&self, key: &K) -> Result<(), Duration> {
        if self.asked.fetch_add(1, Ordering::Relaxed) % FORGET_EVERY == FORGET_EVERY - 1 {
            self.limiter.retain_recent();
            self.limiter.shrink_to_fit();
        }
        self.limiter
            .check_key(key)
            .map_err(|until| until.wait_time_from(self.clock.now()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_its_own_measure_and_is_told_how_long_to_wait() {
        let rates = Rates::new(10, 3);
        assert!((0..3).all(|_| rates.take(&7).is_ok()));
        let wait = rates.take(&7).unwrap_err();
        assert!(wait > Duration::ZERO && wait <= Duration::from_millis(100));
        assert!(rates.take(&8).is_ok());
    }
}
