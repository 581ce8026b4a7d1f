//! Reads back what was acknowledged and compares: nothing lost, nothing doubled, nothing moved.

use crate::journal::{self, Acknowledged};
use crate::replay::bar;
use anyhow::bail;
use chat_client::{Access, Api};
use chat_wire::Message;
use futures_util::{StreamExt, TryStreamExt, stream};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// What was found wrong, and how much was compared.
#[derive(Debug, Default, serde::Serialize)]
pub struct Findings {
    /// Acknowledged messages.
    pub acknowledged: u64,
    /// Dialogs they are in.
    pub dialogs: u64,
    /// Readings of a message: each dialog as both its users, through every instance, in both directions.
    pub read: u64,
    /// Acknowledged, and not there (at all, or not where it was said to be, or with another text).
    pub lost: u64,
    /// Keys that stand in a log more than once.
    pub doubled: u64,
    /// Dialogs whose seqs are not 1, 2, 3 … or whose readings differ.
    pub disordered: u64,
}

impl Findings {
    fn add(mut self, other: &Findings) -> Self {
        self.read += other.read;
        self.lost += other.lost;
        self.doubled += other.doubled;
        self.disordered += other.disordered;
        self
    }

    /// Whether everything is as it should be.
    pub fn good(&self) -> bool {
        self.lost == 0 && self.doubled == 0 && self.disordered == 0
    }
}

pub async fn run(servers: &[Access], journal: &Path) -> anyhow::Result<()> {
    let findings = compare(servers, &journal::read(journal)?).await?;
    println!("{}", serde_json::to_string_pretty(&findings)?);
    if !findings.good() {
        bail!("the logs are not what was acknowledged");
    }
    Ok(())
}

/// Compares what was acknowledged with what every instance says.
pub async fn compare(
    servers: &[Access],
    acknowledged: &[Acknowledged],
) -> anyhow::Result<Findings> {
    let mut dialogs = BTreeMap::<(u64, u64), Vec<&Acknowledged>>::new();
    for one in acknowledged {
        dialogs
            .entry((one.from.min(one.to), one.from.max(one.to)))
            .or_default()
            .push(one);
    }
    let bar = bar(dialogs.len() as u64);
    let sum = Findings {
        acknowledged: acknowledged.len() as u64,
        dialogs: dialogs.len() as u64,
        ..Findings::default()
    };
    let findings = stream::iter(&dialogs)
        .map(|((low, high), acknowledged)| {
            let bar = &bar;
            async move {
                let mut findings = Findings::default();
                let mut first: Option<Vec<Message>> = None;
                for server in servers {
                    for (user, with) in [(*low, *high), (*high, *low)] {
                        let api = Api::new(server.clone(), user).await?;
                        for log in [api.log_upwards(with).await?, api.log_downwards(with).await?] {
                            findings.read += log.len() as u64;
                            match &first {
                                Some(first) if *first != log => findings.disordered += 1,
                                Some(_) => {}
                                None => first = Some(log),
                            }
                        }
                    }
                }
                examine(&first.unwrap_or_default(), acknowledged, &mut findings);
                bar.inc(1);
                anyhow::Ok(findings)
            }
        })
        .buffer_unordered(16)
        .try_fold(sum, |sum, one| async move { Ok(sum.add(&one)) })
        .await?;
    bar.finish_and_clear();
    Ok(findings)
}

fn examine(log: &[Message], acknowledged: &[&Acknowledged], findings: &mut Findings) {
    if log
        .iter()
        .enumerate()
        .any(|(i, message)| message.seq != i as u64 + 1)
    {
        findings.disordered += 1;
    }
    let mut keys = HashMap::<(u64, &str), u64>::new();
    for message in log {
        if let Some(key) = &message.key {
            *keys.entry((message.from, key)).or_default() += 1;
        }
    }
    findings.doubled += keys.values().filter(|count| **count > 1).count() as u64;
    let lies_where_said = |one: &Acknowledged| {
        let there = one
            .seq
            .checked_sub(1)
            .and_then(|index| log.get(index as usize));
        there.is_some_and(|message| {
            message.from == one.from
                && message.key.as_deref() == Some(&one.key)
                && message.text == one.text
        })
    };
    findings.lost += acknowledged
        .iter()
        .filter(|one| !lies_where_said(one))
        .count() as u64;
}
