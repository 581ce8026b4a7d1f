//! Latencies, as they are reported.

use hdrhistogram::Histogram;
use serde::Serialize;
use std::time::Duration;

/// Collects latencies from 1 µs to 10 minutes with three digits.
pub struct Latencies(Histogram<u64>);

/// Percentiles in milliseconds.
#[derive(Debug, Serialize)]
pub struct Percentiles {
    /// How many were measured.
    pub count: u64,
    /// The median.
    pub p50_ms: f64,
    /// 90 %.
    pub p90_ms: f64,
    /// 99 %.
    pub p99_ms: f64,
    /// 99.9 %.
    pub p99_9_ms: f64,
    /// The slowest.
    pub max_ms: f64,
}

impl Latencies {
    /// None yet.
    pub fn new() -> Self {
        // These bounds are valid.
        Self(Histogram::new_with_bounds(1, 600_000_000, 3).expect("bounds of a histogram"))
    }

    /// Adds one.
    pub fn add(&mut self, latency: Duration) {
        self.0.saturating_record(latency.as_micros() as u64);
    }

    /// Adds those of another.
    pub fn merge(&mut self, other: &Self) {
        // Both have the same bounds.
        let _ = self.0.add(&other.0);
    }

    /// What they are so far.
    pub fn percentiles(&self) -> Percentiles {
        let at = |percent| self.0.value_at_percentile(percent) as f64 / 1000.0;
        Percentiles {
            count: self.0.len(),
            p50_ms: at(50.0),
            p90_ms: at(90.0),
            p99_ms: at(99.0),
            p99_9_ms: at(99.9),
            max_ms: self.0.max() as f64 / 1000.0,
        }
    }
}
