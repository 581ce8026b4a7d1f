//! The clock of this machine.

use crate::domain::dialog::Timestamp;
use std::time::{SystemTime, UNIX_EPOCH};

/// The time in microseconds since 1970, UTC. SQLite shards store it; sessions measure their
/// beginning by it. MySQL shards use the clock of their server.
#[must_use]
pub fn now() -> Timestamp {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Timestamp::from_micros(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
}
