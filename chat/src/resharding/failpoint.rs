//! Places at which a test makes the process die or stop:
//! `CHAT_FAILPOINTS=sealed=kill@3,copied=stop@1`.
//!
//! Without that variable a place costs one load of a pointer. It is read once.

use std::collections::HashMap;
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Every place there is, in the order in which changes pass them; tests go through all of them.
pub const FAILPOINTS: [&str; 12] = [
    "installing",
    "installed",
    "prepared",
    "copied",
    "sealed",
    "compared",
    "activated",
    "released",
    "purging",
    "claimed",
    "failover_decided",
    "merging",
];

struct Fault {
    /// What it is sent: `KILL`, or `STOP` until `CONT` is sent.
    signal: &'static str,
    /// Passes until it strikes.
    left: AtomicU64,
}

fn faults() -> &'static HashMap<String, Fault> {
    static FAULTS: OnceLock<HashMap<String, Fault>> = OnceLock::new();
    FAULTS.get_or_init(|| {
        let text = std::env::var("CHAT_FAILPOINTS").unwrap_or_default();
        let parse = |part: &str| {
            let (place, what) = part.split_once('=')?;
            let (action, pass) = what.split_once('@').unwrap_or((what, "1"));
            let left = AtomicU64::new(pass.parse().ok()?);
            let signal = match action {
                "kill" => "KILL",
                "stop" => "STOP",
                _ => return None,
            };
            Some((place.to_owned(), Fault { signal, left }))
        };
        text.split(',').filter_map(parse).collect()
    })
}

/// A place that is passed.
pub fn failpoint(place: &'static str) {
    let Some(fault) = faults().get(place) else {
        return;
    };
    let struck = fault
        .left
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
            left.checked_sub(1)
        })
        == Ok(1);
    if struck {
        tracing::warn!(place, "fault");
        let us = std::process::id().to_string();
        // The whole process, with every thread of it, as if the machine had lost it.
        let sent = Command::new("kill")
            .args(["-s", fault.signal, &us])
            .status();
        if let Err(e) = sent {
            tracing::error!(place, reason = %e, "the fault could not be made");
        }
    }
}
