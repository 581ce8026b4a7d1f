//! How long the disk takes meanwhile: a machine that is shared, or busy with what was deleted
//! before, takes its time, and a latency that waits for a commit cannot be better.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The pause between two writes.
const EVERY: Duration = Duration::from_millis(10);

/// Writes 4 KiB durably, a hundred times a second, on a thread of its own.
pub struct Probe {
    over: Arc<AtomicBool>,
    writing: JoinHandle<std::io::Result<Vec<Duration>>>,
}

impl Probe {
    /// Begins in a file of this folder.
    pub fn start(folder: &Path) -> std::io::Result<Self> {
        let path = folder.join("disk-probe");
        let mut file = File::create(&path)?;
        let over = Arc::new(AtomicBool::new(false));
        let stop = over.clone();
        let writing = std::thread::spawn(move || {
            let mut took = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                file.write_all(&[0; 4096])?;
                let begun = Instant::now();
                file.sync_data()?;
                took.push(begun.elapsed());
                std::thread::sleep(EVERY);
            }
            std::fs::remove_file(path)?;
            Ok(took)
        });
        Ok(Self { over, writing })
    }

    /// Ends; the 99th percentile in milliseconds.
    pub fn p99(self) -> anyhow::Result<f64> {
        self.over.store(true, Ordering::Relaxed);
        let took = self.writing.join();
        let mut took = took.map_err(|_| anyhow::anyhow!("the disk probe panicked"))??;
        took.sort_unstable();
        let at = took.get(took.len() * 99 / 100).copied().unwrap_or_default();
        Ok(at.as_secs_f64() * 1000.0)
    }
}
