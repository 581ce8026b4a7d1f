//! Reads back what was acknowledged, through every instance, and compares.

use crate::journal;
use crate::output;
use crate::replay::bar;
use anyhow::bail;
use chat_client::Access;
use chat_client::checker::{self, Acknowledged, Fault};
use futures_util::{StreamExt, TryStreamExt, stream};
use std::path::Path;

/// The faults that are named; further ones are only counted.
const NAMED: usize = 10;

/// What was compared, and the faults that were found.
#[derive(Debug, Default, serde::Serialize)]
pub struct Findings {
    /// Acknowledged messages.
    pub acknowledged: u64,
    /// Dialogs they are in.
    pub dialogs: u64,
    /// Readings of a message: each dialog as both its users, through every instance, in both
    /// directions.
    pub read: u64,
    /// Acknowledged messages that are not at their seq.
    pub lost: u64,
    /// Keys that are stored more than once, or elsewhere.
    pub duplicates: u64,
    /// Gaps, and readings of a dialog that differ.
    pub disordered: u64,
    /// The first faults.
    pub faults: Vec<String>,
}

impl Findings {
    fn add(mut self, dialog: (u64, u64), read: u64, faults: &[Fault]) -> Self {
        self.read += read;
        for fault in faults {
            match fault {
                Fault::Lost { .. } => self.lost += 1,
                Fault::Duplicate { .. } => self.duplicates += 1,
                Fault::Gap { .. } | Fault::Differs { .. } => self.disordered += 1,
            }
            if self.faults.len() < NAMED {
                let (low, high) = dialog;
                self.faults.push(format!("{low}_{high}: {fault}"));
            }
        }
        self
    }

    /// Whether no fault was found.
    pub fn good(&self) -> bool {
        self.faults.is_empty()
    }
}

pub async fn run(servers: &[Access], journal: &Path) -> anyhow::Result<()> {
    let findings = compare(servers, &journal::read(journal)?).await?;
    output::line(&serde_json::to_string_pretty(&findings)?)?;
    if !findings.good() {
        bail!("the logs are not what was acknowledged");
    }
    Ok(())
}

/// Compares what was acknowledged with the logs that every instance returns.
pub async fn compare(
    servers: &[Access],
    acknowledged: &[Acknowledged],
) -> anyhow::Result<Findings> {
    let dialogs = checker::by_dialog(acknowledged);
    let bar = bar(dialogs.len() as u64);
    let sum = Findings {
        acknowledged: acknowledged.len() as u64,
        dialogs: dialogs.len() as u64,
        ..Findings::default()
    };
    let findings = stream::iter(&dialogs)
        .map(|(users, acknowledged)| {
            let bar = &bar;
            async move {
                let reading = checker::read_everywhere(servers, *users).await?;
                let mut faults = reading.faults;
                faults.extend(checker::faults(&reading.log, acknowledged));
                bar.inc(1);
                anyhow::Ok((*users, reading.read, faults))
            }
        })
        .buffer_unordered(16)
        .try_fold(sum, |sum, (users, read, faults)| async move {
            Ok(sum.add(users, read, &faults))
        })
        .await?;
    bar.finish_and_clear();
    Ok(findings)
}
