//! What was acknowledged, a JSON line each: what `load` writes and `verify` compares with.

use anyhow::Context;
use chat_client::checker::Acknowledged;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;

/// Writes a journal.
pub struct Journal(BufWriter<File>);

impl Journal {
    /// Begins a journal.
    pub fn create(path: &Path) -> anyhow::Result<Self> {
        Ok(Self(BufWriter::new(
            File::create(path).with_context(|| path.display().to_string())?,
        )))
    }

    /// Adds a line.
    pub fn add(&mut self, acknowledged: &Acknowledged) -> anyhow::Result<()> {
        serde_json::to_writer(&mut self.0, acknowledged)?;
        self.0.write_all(b"\n")?;
        Ok(())
    }

    /// Writes out what is buffered.
    pub fn finish(mut self) -> anyhow::Result<()> {
        Ok(self.0.flush()?)
    }
}

/// Reads a journal. A last line that was cut off by a crash is left out.
pub fn read(path: &Path) -> anyhow::Result<Vec<Acknowledged>> {
    let file = BufReader::new(File::open(path).with_context(|| path.display().to_string())?);
    let mut lines: Vec<String> = file.lines().collect::<Result<_, _>>()?;
    let mut acknowledged = Vec::with_capacity(lines.len());
    let last = lines.pop();
    for (number, line) in lines.iter().enumerate() {
        acknowledged.push(
            serde_json::from_str(line)
                .with_context(|| format!("{}:{}", path.display(), number + 1))?,
        );
    }
    acknowledged.extend(last.and_then(|line| serde_json::from_str(&line).ok()));
    Ok(acknowledged)
}
