//! File descriptors: how many connections the system allows this process.

use crate::config::Limits;
use anyhow::{Context, ensure};

/// Descriptors for databases, the bus, files and the runtime.
const OWN: usize = 256;

/// Raises the soft limit to the hard limit, and lowers the limits of connections to what fits. A
/// WebSocket and a request have one descriptor each.
///
/// # Errors
/// If hardly any client could connect.
pub fn fit(limits: &mut Limits) -> anyhow::Result<()> {
    let allowed = rlimit::increase_nofile_limit(u64::MAX).context("the limit of descriptors")?;
    let allowed = usize::try_from(allowed).unwrap_or(usize::MAX);
    ensure!(
        allowed >= 2 * OWN,
        "this process may open {allowed} files: it needs {} at least; raise ulimit -n or LimitNOFILE",
        2 * OWN
    );
    let before = limits.connections;
    lower(limits, allowed - OWN);
    if limits.connections < before {
        tracing::info!(
            descriptors = allowed,
            connections = limits.connections,
            "fewer WebSockets are accepted than limits.connections: raise ulimit -n or LimitNOFILE for more"
        );
    }
    Ok(())
}

/// Lowers the limits to `descriptors` altogether; a quarter of them at most is for requests.
fn lower(limits: &mut Limits, descriptors: usize) {
    // Each of the two listeners has its spare connections.
    limits.spare_connections = limits.spare_connections.min(descriptors / 8);
    let rest = descriptors - 2 * limits.spare_connections;
    limits.connections = limits.connections.min(rest);
}

#[cfg(test)]
mod tests {
    use super::lower;
    use crate::config::Settings;

    #[test]
    fn connections_fit_into_the_descriptors() {
        for (descriptors, connections, spare) in [
            (1_000_000, 100_000, 1024),
            (768, 576, 96),
            (20_000, 17_952, 1024),
            (256, 192, 32),
        ] {
            let mut limits = Settings::from_toml("").unwrap().limits;
            lower(&mut limits, descriptors);
            assert_eq!(
                (limits.connections, limits.spare_connections),
                (connections, spare)
            );
            assert!(limits.connections + 2 * limits.spare_connections <= descriptors);
        }
    }
}
