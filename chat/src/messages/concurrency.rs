//! How many transactions of a shard are in flight at once, found by measuring.
//!
//! One at a time makes the largest batches, and is best where a transaction costs the server more
//! than it waits. Where it waits, for a slow disk or a slow network, more in flight commit more. So
//! one more is tried now and then while sends are waiting, and kept if clearly more is committed;
//! one fewer is kept if hardly less is (hill climbing on the throughput).

use std::time::Duration;
use tokio::time::Instant;

/// The limit of one writer.
pub struct InFlight {
    least: usize,
    most: usize,
    limit: usize,
    /// What is being tried, and against which rate.
    trial: Option<Trial>,
    /// The next trial takes one away.
    downwards: bool,
    next_trial: Instant,
    pause: Duration,
    window: Window,
}

struct Trial {
    before: usize,
    rate: f64,
}

/// What was committed while sends were waiting all the time.
struct Window {
    since: Instant,
    rows: usize,
    transactions: usize,
}

/// A rate is taken over so many transactions and so long at least.
const TRANSACTIONS: usize = 48;
const SPAN: Duration = Duration::from_millis(300);

/// One more must commit so much more, one fewer so much at least.
const WORTH: f64 = 1.08;
const ENOUGH: f64 = 0.98;

/// The time between two trials. Each trial without gain doubles it.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

impl InFlight {
    /// Begins with `least`, and never has more than `most`. Nothing is tried where they are the
    /// same.
    #[must_use]
    pub fn new(least: usize, most: usize, now: Instant) -> Self {
        let most = most.max(1);
        let least = least.clamp(1, most);
        Self {
            least,
            most,
            limit: least,
            trial: None,
            downwards: false,
            next_trial: now,
            pause: FIRST_PAUSE,
            window: Window::begin(now),
        }
    }

    /// How many may be in flight.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// A transaction of so many rows has ended; `waiting` if others had to wait for it.
    pub fn ended(&mut self, rows: usize, waiting: bool, now: Instant) {
        if !waiting {
            // What is committed is what comes: it says nothing about how much could be.
            self.window = Window::begin(now);
            return;
        }
        self.window.rows += rows;
        self.window.transactions += 1;
        let span = now - self.window.since;
        if self.window.transactions < TRANSACTIONS || span < SPAN {
            return;
        }
        let rate = self.window.rows as f64 / span.as_secs_f64();
        self.window = Window::begin(now);
        match self.trial.take() {
            Some(trial) => {
                let share = rate / trial.rate;
                let better = share
                    >= if self.limit > trial.before {
                        WORTH
                    } else {
                        ENOUGH
                    };
                if better {
                    self.pause = FIRST_PAUSE;
                    self.next_trial = now;
                } else {
                    self.limit = trial.before;
                    self.downwards = !self.downwards;
                    self.next_trial = now + self.pause;
                    self.pause = (self.pause * 2).min(LONGEST_PAUSE);
                }
            }
            None if now >= self.next_trial => self.attempt(rate),
            None => {}
        }
    }

    fn attempt(&mut self, rate: f64) {
        let before = self.limit;
        self.limit = match (self.downwards, self.limit) {
            (true, limit) if limit > self.least => limit - 1,
            (_, limit) if limit < self.most => limit + 1,
            (_, limit) if limit > self.least => limit - 1,
            _ => return,
        };
        self.trial = Some(Trial { before, rate });
    }
}

impl Window {
    fn begin(now: Instant) -> Self {
        Self {
            since: now,
            rows: 0,
            transactions: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs for so many seconds on a shard that commits `rate(limit)` rows a second.
    fn run(in_flight: &mut InFlight, now: &mut Instant, seconds: u64, rate: impl Fn(usize) -> f64) {
        let until = *now + Duration::from_secs(seconds);
        while *now < until {
            *now += Duration::from_secs_f64(10.0 / rate(in_flight.limit()));
            in_flight.ended(10, true, *now);
        }
    }

    #[test]
    fn it_climbs_while_that_pays_and_comes_down_again() {
        let mut now = Instant::now();
        let mut in_flight = InFlight::new(1, 8, now);
        assert_eq!(in_flight.limit(), 1);
        // Waiting is most of it: five are five times as good as one, and no more than that.
        run(&mut in_flight, &mut now, 60, |limit| {
            2000.0 * limit.min(5) as f64
        });
        assert!(
            (5..=6).contains(&in_flight.limit()),
            "{}",
            in_flight.limit()
        );
        // The disk has become fast.
        run(&mut in_flight, &mut now, 600, |_| 20_000.0);
        assert!(in_flight.limit() <= 2, "{}", in_flight.limit());
    }

    #[test]
    fn it_stays_at_one_where_more_do_not_pay_and_under_its_bound_where_they_do() {
        let mut now = Instant::now();
        let mut in_flight = InFlight::new(1, 4, now);
        run(&mut in_flight, &mut now, 60, |limit| 9000.0 / limit as f64);
        assert!(in_flight.limit() <= 2);
        run(&mut in_flight, &mut now, 300, |limit| 2000.0 * limit as f64);
        assert!((3..=4).contains(&in_flight.limit()));
    }

    #[test]
    fn a_limit_that_is_set_is_kept() {
        let mut now = Instant::now();
        let mut in_flight = InFlight::new(4, 4, now);
        run(&mut in_flight, &mut now, 60, |limit| 9000.0 / limit as f64);
        assert_eq!(in_flight.limit(), 4);
        let mut in_flight = InFlight::new(2, 4, now);
        run(&mut in_flight, &mut now, 300, |limit| 9000.0 / limit as f64);
        assert!((2..=3).contains(&in_flight.limit()));
    }

    #[test]
    fn without_anybody_waiting_nothing_is_tried() {
        let mut now = Instant::now();
        let mut in_flight = InFlight::new(1, 4, now);
        for _ in 0..10_000 {
            now += Duration::from_millis(5);
            in_flight.ended(1, false, now);
        }
        assert_eq!(in_flight.limit(), 1);
    }
}
