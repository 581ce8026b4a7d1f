//! A process of a test or bench: signals, memory, processor time; killed when it is dropped.

use std::io::{Error, Result};
use std::process::{Child, Command, ExitStatus};

/// A child process.
pub struct Process(pub Child);

impl Process {
    /// The id of the process.
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.0.kill()?;
        self.0.wait()
    }

    /// Sends a signal, e.g. `TERM`.
    pub fn signal(&self, name: &str) -> Result<()> {
        signal(self.id(), name)
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.0.try_wait()
    }

    /// Whether a signal has stopped it, and it was not continued.
    pub fn is_stopped(&self) -> Result<bool> {
        Ok(stat(self.id())?.first().is_some_and(|state| state == "T"))
    }

    /// Bytes of memory that are resident.
    pub fn resident(&self) -> Result<u64> {
        resident(self.id())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// Sends a signal to a process.
pub fn signal(id: u32, name: &str) -> Result<()> {
    let id = id.to_string();
    let sent = Command::new("kill").args(["-s", name, &id]).status()?;
    if sent.success() {
        return Ok(());
    }
    Err(Error::other(format!(
        "{name} could not be sent to process {id}"
    )))
}

/// Bytes of memory of a process that are resident.
pub fn resident(id: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib * 1024)
        .ok_or_else(|| Error::other("no VmRSS"))
}

/// Processor time of a process so far, in hundredths of a second.
pub fn ticks(id: u32) -> Result<u64> {
    // User and system time are the 14th and 15th field of proc(5); the state is the third.
    let times = stat(id)?;
    let times = times.get(11..13).ok_or_else(|| Error::other("no times"))?;
    let ticks = times.iter().filter_map(|time| time.parse::<u64>().ok());
    Ok(ticks.sum())
}

/// The fields of /proc/ID/stat from the state on. The name before may hold blanks.
fn stat(id: u32) -> Result<Vec<String>> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat"))?;
    let fields = stat.rsplit_once(") ").map(|(_, fields)| fields);
    let fields = fields.ok_or_else(|| Error::other("no stat"))?;
    Ok(fields.split_whitespace().map(str::to_owned).collect())
}
