//! Real conversations, sent as they were: in order per dialog, many users at once.

use crate::output;
use anyhow::{Context, bail};
use chat_client::checker;
use chat_client::{Access, Client, Event};
use chat_wire::Message;
use clap::Args;
use futures_util::{StreamExt, TryStreamExt, stream};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

#[derive(Args)]
pub struct Options {
    /// JSON lines with from, to and text.
    file: PathBuf,
    /// Dialogs that are under way at once.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    at_once: u32,
    /// Afterwards read every dialog back, as both users, through every instance, in both
    /// directions, and compare.
    #[arg(long)]
    check: bool,
    /// Only read back and compare.
    #[arg(long)]
    check_only: bool,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
struct Line {
    from: u64,
    to: u64,
    text: String,
}

type Dialogs = BTreeMap<(u64, u64), Vec<Line>>;

pub async fn run(servers: &[Access], options: Options) -> anyhow::Result<()> {
    let dialogs = read(&options.file)?;
    let lines: usize = dialogs.values().map(Vec::len).sum();
    if !options.check_only {
        let begun = std::time::Instant::now();
        send(servers, &dialogs, lines, options.at_once as usize).await?;
        let seconds = begun.elapsed().as_secs_f64();
        output::line(&format!(
            "sent      {lines} messages of {} dialogs in {seconds:.1} s ({:.0}/s)",
            dialogs.len(),
            lines as f64 / seconds
        ))?;
    }
    if options.check || options.check_only {
        let read = check(servers, &dialogs).await?;
        output::line(&format!(
            "compared  {read} messages: every dialog as both its users, through {} instances, upwards and downwards: all as in the file",
            servers.len()
        ))?;
    }
    Ok(())
}

fn read(file: &Path) -> anyhow::Result<Dialogs> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let mut dialogs = Dialogs::new();
    for (number, line) in text.lines().enumerate() {
        let line: Line = serde_json::from_str(line)
            .with_context(|| format!("{}:{}", file.display(), number + 1))?;
        dialogs
            .entry((line.from.min(line.to), line.from.max(line.to)))
            .or_default()
            .push(line);
    }
    Ok(dialogs)
}

async fn send(
    servers: &[Access],
    dialogs: &Dialogs,
    lines: usize,
    at_once: usize,
) -> anyhow::Result<()> {
    let users: BTreeSet<u64> = dialogs
        .keys()
        .flat_map(|(low, high)| [*low, *high])
        .collect();
    let mut clients = BTreeMap::new();
    let mut sessions = Vec::new();
    for user in users {
        let server = &servers[user as usize % servers.len()];
        let (client, events) = Client::start(server.clone(), user);
        clients.insert(user, client);
        sessions.push((user, events));
    }
    // A user who cannot connect, for instance because there are too many, would be waited for
    // without end.
    for (user, mut events) in sessions {
        match events.recv().await.context("a session ended")? {
            Event::Closed(e) => return Err(e.into()),
            Event::Disconnected { reason, .. } => bail!("user {user} cannot connect: {reason}"),
            Event::Connected
            | Event::Message(_)
            | Event::Entry(_)
            | Event::Read(_)
            | Event::Typing { .. }
            | Event::Presence(_)
            | Event::Resync(_) => {}
        }
    }
    let bar = bar(lines as u64);
    // A line waits for the one before it in its dialog, also of the other user; the key says which
    // line of the dialog it is, so that a file that is replayed twice is stored once.
    stream::iter(dialogs.values())
        .map(|lines| {
            let (clients, bar) = (&clients, &bar);
            async move {
                for (number, line) in lines.iter().enumerate() {
                    clients[&line.from]
                        .send(line.to, format!("replay.{number}"), line.text.clone())
                        .await?;
                    bar.inc(1);
                }
                anyhow::Ok(())
            }
        })
        .buffer_unordered(at_once)
        .try_collect::<()>()
        .await?;
    bar.finish_and_clear();
    Ok(())
}

async fn check(servers: &[Access], dialogs: &Dialogs) -> anyhow::Result<u64> {
    let bar = bar(dialogs.len() as u64);
    let counts = stream::iter(dialogs)
        .map(|(users, lines)| {
            let bar = &bar;
            async move {
                let reading = checker::read_everywhere(servers, *users).await?;
                let mut faults = reading.faults;
                faults.extend(checker::gaps(&reading.log));
                let (low, high) = users;
                if let Some(fault) = faults.first() {
                    bail!("dialog {low}_{high}: {fault}");
                }
                compare(&reading.log, lines).with_context(|| format!("dialog {low}_{high}"))?;
                bar.inc(1);
                anyhow::Ok(reading.read)
            }
        })
        .buffer_unordered(16)
        .try_collect::<Vec<u64>>()
        .await?;
    bar.finish_and_clear();
    Ok(counts.iter().sum())
}

/// Whether the messages of a log are the lines, in their order.
fn compare(log: &[Message], lines: &[Line]) -> anyhow::Result<()> {
    if log.len() != lines.len() {
        bail!(
            "{} messages, and {} lines in the file",
            log.len(),
            lines.len()
        );
    }
    for (number, (message, line)) in (1..).zip(log.iter().zip(lines)) {
        if (message.from, message.to, &message.text) != (line.from, Some(line.to), &line.text) {
            bail!("message {} is not line {number}", message.seq);
        }
    }
    Ok(())
}

pub fn bar(length: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} {per_sec} {eta}");
    ProgressBar::new(length).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
