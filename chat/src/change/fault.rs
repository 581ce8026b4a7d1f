//! Places at which a test makes the process die, or hang for a while: `CHAT_FAULT=sealed=abort@3,copied=hang@1`.
//!
//! Without that variable a place costs one load of a pointer. It is read once.

use std::collections::HashMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Every place there is, in the order in which a move passes them; tests go through all of them.
pub const PLACES: [&str; 12] = [
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
    "judged",
    "merging",
];

/// How long a hanging place hangs: longer than anybody waits for a turn.
const HANG: Duration = Duration::from_secs(15);

struct Fault {
    abort: bool,
    /// Passes until it strikes.
    left: AtomicU64,
}

fn faults() -> &'static HashMap<String, Fault> {
    static FAULTS: OnceLock<HashMap<String, Fault>> = OnceLock::new();
    FAULTS.get_or_init(|| {
        let text = std::env::var("CHAT_FAULT").unwrap_or_default();
        let parse = |part: &str| {
            let (place, what) = part.split_once('=')?;
            let (action, pass) = what.split_once('@').unwrap_or((what, "1"));
            let left = AtomicU64::new(pass.parse().ok()?);
            let abort = match action {
                "abort" => true,
                "hang" => false,
                _ => return None,
            };
            Some((place.to_owned(), Fault { abort, left }))
        };
        text.split(',').filter_map(parse).collect()
    })
}

/// A place that is passed.
pub async fn point(place: &'static str) {
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
        if fault.abort {
            std::process::abort();
        }
        tokio::time::sleep(HANG).await;
    }
}
