//! How long a writer waits between two transactions, so that more sends gather for the next one (a
//! commit delay).
//!
//! A small transaction costs its shard much more for each send than a large one. Where a
//! transaction takes no longer than usual that does not matter: the shard has time to spare, and
//! waiting would only delay. Where it takes much longer, the shard or this machine is full, and
//! sends wait for the processor instead: then the writer waits in proportion, fewer and larger
//! transactions are made, and all sends are answered sooner. The shortest recent time is that of a
//! shard without load, so a slow disk or a slow network causes no delay.

use std::time::Duration;
use tokio::time::Instant;

/// The delay of one writer.
pub struct CommitDelay {
    /// The shortest transaction of this span and of the one before.
    shortest: [Duration; 2],
    span_began: Instant,
    until: Instant,
}

/// For so long at least, and twice as long at most, the shortest transaction is remembered.
const SPAN: Duration = Duration::from_secs(10);

/// A transaction of so many rows is large: more of them would not make it much cheaper.
const LARGE: usize = 32;

/// A transaction that takes so many times as long as the shortest is no reason to wait.
const USUAL: f64 = 2.0;

/// The longest delay.
const LONGEST: Duration = Duration::from_millis(10);

impl CommitDelay {
    /// Begins without a delay.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self {
            shortest: [Duration::MAX; 2],
            span_began: now,
            until: now,
        }
    }

    /// When the next transaction may begin.
    #[must_use]
    pub fn until(&self) -> Instant {
        self.until
    }

    /// A transaction of so many rows has ended, and took so long.
    pub fn ended(&mut self, rows: usize, took: Duration, now: Instant) {
        if now - self.span_began > SPAN {
            self.shortest = [Duration::MAX, self.shortest[0]];
            self.span_began = now;
        }
        self.shortest[0] = self.shortest[0].min(took);
        if rows < LARGE {
            let shortest = self.shortest[0].min(self.shortest[1]).as_secs_f64();
            let beyond = took.as_secs_f64() / (USUAL * shortest.max(f64::EPSILON)) - 1.0;
            self.until = now + took.mul_f64(beyond.clamp(0.0, 1.0)).min(LONGEST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// The delay after small transactions that take so many milliseconds, one after the other.
    fn delay_after(took: &[u64]) -> Duration {
        let mut now = Instant::now();
        let mut delay = CommitDelay::new(now);
        for took in took {
            now += ms(*took);
            delay.ended(1, ms(*took), now);
        }
        delay.until() - now
    }

    #[test]
    fn nobody_waits_while_transactions_take_as_long_as_usual() {
        assert_eq!(delay_after(&[1]), ms(0));
        assert_eq!(delay_after(&[2, 1, 2]), ms(0));
        assert_eq!(delay_after(&[100, 90, 180]), ms(0), "a slow network");
    }

    #[test]
    fn the_longer_transactions_take_the_longer_the_next_one_waits_up_to_a_bound() {
        assert_eq!(delay_after(&[1, 3]), ms(3) / 2);
        assert_eq!(delay_after(&[1, 4]), ms(4));
        assert_eq!(delay_after(&[1, 8]), ms(8));
        assert_eq!(delay_after(&[1, 500]), LONGEST);
        assert_eq!(delay_after(&[1, 500, 1]), ms(0));
    }

    #[test]
    fn a_large_transaction_makes_nobody_wait() {
        let now = Instant::now();
        let mut delay = CommitDelay::new(now);
        delay.ended(1, ms(1), now);
        delay.ended(LARGE, ms(20), now);
        assert_eq!(delay.until(), now);
    }

    #[test]
    fn what_is_usual_is_forgotten() {
        let mut now = Instant::now();
        let mut delay = CommitDelay::new(now);
        delay.ended(1, ms(1), now);
        for _ in 0..2 {
            now += SPAN + ms(1);
            delay.ended(1, ms(8), now);
        }
        assert_eq!(delay.until(), now);
    }
}
