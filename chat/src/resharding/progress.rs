//! What a change has done so far, for operators.

use super::mover::Moved;
use crate::metrics::Metrics;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::time::Instant;

/// The progress of a change.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The version of the topology.
    pub version: u64,
    /// `idle`, `waiting`, `failover`, `moving`, `merging`, `purging` or `paused`.
    pub stage: String,
    /// The reason if it waits.
    pub blocked_by: Option<String>,
    /// Slots whose owner is not their target.
    pub slots_left: u64,
    /// Those of them whose target still has rows of an earlier time, which are purged first.
    #[serde(default)]
    pub slots_to_purge_first: u64,
    /// Slots that were moved since the change began.
    pub slots_moved: u64,
    /// Messages that were copied.
    pub messages_copied: u64,
    /// Slots whose rows were merged back, and slots that wait for it.
    pub slots_merged: u64,
    /// See `slots_merged`.
    pub slots_to_merge: u64,
    /// Attempts that were cancelled, to be made again.
    pub attempts_failed: u64,
    /// Seconds since the change began.
    pub seconds: f64,
    /// Slots a second, over that time.
    pub slots_per_second: f64,
    /// Messages a second, over that time.
    pub messages_per_second: f64,
    /// Seconds until the slots that are left have moved, at the rate of the last moves. Unknown
    /// while nothing moves, and while slots wait for a purge.
    pub seconds_left: Option<f64>,
    /// How long slots took no writes, in milliseconds.
    pub freeze_ms: Freeze,
    /// By `from -> to`, slots that are left.
    pub left_by_pair: BTreeMap<String, u64>,
}

/// Milliseconds for which slots took no writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Freeze {
    /// Half of them at most so long.
    pub p50: f64,
    /// 99 of 100 at most so long.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

/// How many freezes are remembered.
const FREEZES: usize = 4096;

/// Moves that the estimate of the time left is made of. Time without moves does not count: an
/// estimate does not rise because the change had to wait.
const RATE_MOVES: usize = 64;

/// Collects a [`Report`].
pub struct Progress {
    inner: Mutex<Inner>,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct Inner {
    report: Report,
    begun: Option<Instant>,
    ended: Option<Instant>,
    freezes: VecDeque<f64>,
    /// When the present stretch of moving began, or the oldest of its last moves ended, and when
    /// the moves since ended.
    moves: VecDeque<Instant>,
    /// Whether slots were moved, merged or claimed since it began.
    has_worked: bool,
}

impl Inner {
    /// The change is finished, if one has begun.
    fn finish(&mut self, version: u64) {
        let Some(begun) = self.begun.filter(|_| self.ended.is_none()) else {
            return;
        };
        self.ended = Some(Instant::now());
        if self.has_worked {
            tracing::info!(
                version,
                slots_moved = self.report.slots_moved,
                slots_merged = self.report.slots_merged,
                messages_copied = self.report.messages_copied,
                seconds = begun.elapsed().as_secs_f64(),
                "resharding finished"
            );
        }
    }
}

impl Progress {
    /// Nothing has happened yet.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            inner: Mutex::default(),
            metrics,
        }
    }

    fn update(&self, update: impl FnOnce(&mut Inner)) {
        update(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The stage of the work for the topology of that version, and the reason if it is blocked.
    pub fn stage(&self, version: u64, stage: &str, blocked_by: Option<String>) {
        self.update(|inner| {
            let idle = stage == "idle";
            if !idle && (inner.begun.is_none() || inner.ended.is_some()) {
                *inner = Inner {
                    begun: Some(Instant::now()),
                    ..Inner::default()
                };
            }
            if idle {
                inner.finish(version);
            }
            inner.has_worked |= matches!(stage, "moving" | "merging" | "failover");
            if stage != "moving" {
                inner.moves.clear();
            } else if inner.moves.is_empty() {
                inner.moves.push_back(Instant::now());
            }
            inner.report.version = version;
            stage.clone_into(&mut inner.report.stage);
            inner.report.blocked_by = blocked_by;
        });
    }

    /// The number of slots that are left to move, by `from -> to`.
    pub fn left(&self, by_pair: BTreeMap<String, u64>) {
        let left = by_pair.values().sum();
        self.metrics.slots_to_move.set(left as i64);
        self.update(|inner| {
            inner.report.slots_left = left;
            inner.report.left_by_pair = by_pair;
        });
    }

    /// The number of slots that wait for a purge at their target.
    pub fn to_purge_first(&self, slots: u64) {
        self.update(|inner| inner.report.slots_to_purge_first = slots);
    }

    /// The number of slots that wait for their rows of a shard that has returned.
    pub fn to_merge(&self, slots: u64) {
        self.update(|inner| inner.report.slots_to_merge = slots);
    }

    /// A slot has moved.
    pub fn moved(&self, pair: &str, moved: Moved) {
        let frozen = moved.frozen.as_secs_f64() * 1000.0;
        self.metrics.slots_moved.inc();
        self.metrics.messages_moved.inc_by(moved.messages);
        self.metrics.slot_write_pause_seconds.observe(moved.frozen);
        self.update(|inner| {
            let report = &mut inner.report;
            report.slots_moved += 1;
            report.slots_left = report.slots_left.saturating_sub(1);
            report.messages_copied += moved.messages;
            if let Some(left) = report.left_by_pair.get_mut(pair) {
                *left = left.saturating_sub(1);
            }
            inner.moves.push_back(Instant::now());
            if inner.moves.len() > RATE_MOVES + 1 {
                inner.moves.pop_front();
            }
            inner.freezes.push_back(frozen);
            if inner.freezes.len() > FREEZES {
                inner.freezes.pop_front();
            }
        });
    }

    /// A slot was merged.
    pub fn merged(&self, messages: u64) {
        self.update(|inner| {
            inner.report.slots_merged += 1;
            inner.report.slots_to_merge = inner.report.slots_to_merge.saturating_sub(1);
            inner.report.messages_copied += messages;
        });
    }

    /// An attempt was cancelled.
    pub fn failed(&self) {
        self.metrics.moves_failed.inc();
        self.update(|inner| inner.report.attempts_failed += 1);
    }

    /// The state of the change.
    #[must_use]
    pub fn report(&self) -> Report {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let mut report = inner.report.clone();
        if let Some(begun) = inner.begun {
            let seconds = inner
                .ended
                .unwrap_or_else(Instant::now)
                .duration_since(begun)
                .as_secs_f64();
            report.seconds = seconds;
            report.slots_per_second = report.slots_moved as f64 / seconds.max(0.001);
            report.messages_per_second = report.messages_copied as f64 / seconds.max(0.001);
        }
        let moves = inner.moves.len().saturating_sub(1);
        let known = report.slots_left > 0 && report.slots_to_purge_first == 0 && moves > 0;
        report.seconds_left =
            inner.moves.front().filter(|_| known).map(|first| {
                first.elapsed().as_secs_f64() * report.slots_left as f64 / moves as f64
            });
        let mut freezes: Vec<f64> = inner.freezes.iter().copied().collect();
        freezes.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let index = (freezes.len() as f64 * share) as usize;
            freezes
                .get(index.min(freezes.len().saturating_sub(1)))
                .copied()
                .unwrap_or(0.0)
        };
        report.freeze_ms = Freeze {
            p50: at(0.5),
            p99: at(0.99),
            max: freezes.last().copied().unwrap_or(0.0),
        };
        report
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time::advance;

    fn a_slot() -> Moved {
        Moved {
            messages: 10,
            frozen: Duration::from_millis(1),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_estimate_does_not_rise_because_the_change_waits() {
        let progress = Progress::new(Metrics::new());
        progress.stage(2, "waiting", Some("a purge".into()));
        progress.left(BTreeMap::from([("a -> b".to_owned(), 100)]));
        assert_eq!(progress.report().seconds_left, None);
        advance(Duration::from_secs(600)).await;

        progress.stage(2, "moving", None);
        assert_eq!(progress.report().seconds_left, None, "nothing has moved");
        for _ in 0..20 {
            advance(Duration::from_millis(500)).await;
            progress.moved("a -> b", a_slot());
        }
        let left = progress.report().seconds_left.unwrap();
        assert!((left - 40.0).abs() < 0.1, "{left}");

        progress.to_purge_first(3);
        assert_eq!(
            progress.report().seconds_left,
            None,
            "a purge is waited for"
        );
        progress.to_purge_first(0);
        progress.stage(2, "waiting", None);
        assert_eq!(progress.report().seconds_left, None);
        advance(Duration::from_secs(600)).await;
        progress.stage(2, "moving", None);
        advance(Duration::from_secs(1)).await;
        progress.moved("a -> b", a_slot());
        let left = progress.report().seconds_left.unwrap();
        assert!((left - 79.0).abs() < 0.1, "{left}");
    }
}
