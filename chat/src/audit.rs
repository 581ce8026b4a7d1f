//! The audit log: who was refused, and what operators did. Its target is `chat::audit`; the command
//! writes it as JSON.

use crate::rate_limit::RateLimiter;
use std::fmt::Display;
use std::net::IpAddr;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// The target of its events.
pub const TARGET: &str = "chat::audit";

/// Refusals a second that are logged one by one, at each door. An attacker cannot fill the disk,
/// nor hide what happens at another door.
const REFUSALS_PER_SECOND: u32 = 20;

static REFUSALS: LazyLock<RateLimiter<&'static str>> =
    LazyLock::new(|| RateLimiter::new(REFUSALS_PER_SECOND, REFUSALS_PER_SECOND));

/// Refusals that were not logged since the last one that was.
static UNLOGGED: AtomicU64 = AtomicU64::new(0);

/// An admission that was refused: at which door, from where, and why.
pub fn refused(door: &'static str, address: Option<IpAddr>, code: impl Display, reason: &str) {
    if REFUSALS.check(&door).is_err() {
        UNLOGGED.fetch_add(1, Ordering::Relaxed);
        return;
    }
    let unlogged = UNLOGGED.swap(0, Ordering::Relaxed);
    let address = address.map(tracing::field::display);
    tracing::warn!(target: "chat::audit", door, address, %code, reason, unlogged, "refused");
}

/// An act of an operator.
pub fn act(act: &'static str, address: Option<IpAddr>, on: &str) {
    let address = address.map(tracing::field::display);
    tracing::info!(target: "chat::audit", act, address, on, "done by an operator");
}
