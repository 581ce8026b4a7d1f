//! Real conversations, sent as they were: in order per dialog, many users at once. As dialogs, or
//! as rooms that each take the lines of several dialogs.

use crate::output;
use anyhow::{Context, bail};
use chat_client::{Access, Api, Client, Event, To, checker};
use chat_wire::{CreateRoomRequest, Message};
use clap::Args;
use futures_util::{StreamExt, TryStreamExt, stream};
use indicatif::{ProgressBar, ProgressStyle};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
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
    /// Send the lines in rooms of 3 to 30 members instead. This seed decides which dialogs share a
    /// room.
    #[arg(long)]
    rooms: Option<u64>,
    /// Afterwards read every dialog back, as all its users, through every instance, in both
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

/// The lines of a dialog or a room, in order.
struct Conversation {
    users: BTreeSet<u64>,
    /// The key of the room, which the first user makes; `None` for a dialog between two.
    room: Option<String>,
    lines: Vec<Line>,
}

/// Members of a room.
const ROOM: std::ops::RangeInclusive<usize> = 3..=30;

pub async fn run(servers: &[Access], options: Options) -> anyhow::Result<()> {
    let dialogs = read(&options.file)?;
    let conversations = match options.rooms {
        Some(seed) => rooms(dialogs, seed),
        None => dialogs,
    };
    let lines: usize = conversations.iter().map(|one| one.lines.len()).sum();
    let kind = if options.rooms.is_some() {
        "rooms"
    } else {
        "dialogs"
    };
    if !options.check_only {
        let begun = std::time::Instant::now();
        send(servers, &conversations, lines, options.at_once as usize).await?;
        let seconds = begun.elapsed().as_secs_f64();
        output::line(&format!(
            "sent      {lines} messages of {} {kind} in {seconds:.1} s ({:.0}/s)",
            conversations.len(),
            lines as f64 / seconds
        ))?;
    }
    if options.check || options.check_only {
        let read = check(servers, &conversations).await?;
        output::line(&format!(
            "compared  {read} messages: every one of the {kind} as all its users, through {} instances, upwards and downwards: all as in the file",
            servers.len()
        ))?;
    }
    Ok(())
}

fn read(file: &Path) -> anyhow::Result<Vec<Conversation>> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let mut dialogs = BTreeMap::<_, Vec<Line>>::new();
    for (number, line) in text.lines().enumerate() {
        let line: Line = serde_json::from_str(line)
            .with_context(|| format!("{}:{}", file.display(), number + 1))?;
        let users = BTreeSet::from([line.from, line.to]);
        dialogs.entry(users).or_default().push(line);
    }
    let dialogs = dialogs.into_iter().map(|(users, lines)| Conversation {
        users,
        room: None,
        lines,
    });
    Ok(dialogs.collect())
}

/// Puts dialogs into rooms, until each has as many members as it is to have.
fn rooms(mut dialogs: Vec<Conversation>, seed: u64) -> Vec<Conversation> {
    let mut rng = StdRng::seed_from_u64(seed);
    dialogs.shuffle(&mut rng);
    let mut rooms = Vec::new();
    let mut dialogs = dialogs.into_iter().peekable();
    while dialogs.peek().is_some() {
        let size = rng.random_range(ROOM);
        let mut room = Conversation {
            users: BTreeSet::new(),
            room: Some(format!("replay.{seed}.{}", rooms.len())),
            lines: Vec::new(),
        };
        // Two users of a dialog join at once.
        while room.users.len() < size
            && let Some(dialog) =
                dialogs.next_if(|dialog| room.users.union(&dialog.users).count() <= *ROOM.end())
        {
            room.users.extend(dialog.users);
            // Lines of the dialogs take turns, as in a room.
            let mut lines = std::mem::take(&mut room.lines).into_iter().peekable();
            let mut more = dialog.lines.into_iter().peekable();
            while lines.peek().is_some() || more.peek().is_some() {
                room.lines.extend(lines.next());
                room.lines.extend(more.next());
            }
        }
        rooms.push(room);
    }
    rooms
}

async fn send(
    servers: &[Access],
    conversations: &[Conversation],
    lines: usize,
    at_once: usize,
) -> anyhow::Result<()> {
    let users: BTreeSet<u64> = conversations
        .iter()
        .flat_map(|one| one.users.iter().copied())
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
    // A line waits for the one before it in its dialog, also of other users; the key says which
    // line of the dialog it is, so that a file that is replayed twice is stored once.
    stream::iter(conversations)
        .map(|conversation| {
            let (clients, bar) = (&clients, &bar);
            async move {
                let room = match conversation.request() {
                    Some((owner, request)) => Some(clients[&owner].create_room(request).await?),
                    None => None,
                };
                for (number, line) in conversation.lines.iter().enumerate() {
                    let to = room.clone().map_or(To::User(line.to), To::Dialog);
                    clients[&line.from]
                        .send(to, format!("replay.{number}"), line.text.clone())
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

impl Conversation {
    /// Who makes the room, and how.
    fn request(&self) -> Option<(u64, CreateRoomRequest)> {
        let owner = *self.users.first()?;
        let request = CreateRoomRequest {
            key: self.room.clone()?,
            members: self.users.iter().copied().collect(),
            ..CreateRoomRequest::default()
        };
        Some((owner, request))
    }

    /// Reads it back as every user, through every instance, in both directions; returns the log
    /// and the number of messages that were read.
    async fn read_everywhere(&self, servers: &[Access]) -> anyhow::Result<(Vec<Message>, u64)> {
        let Some((owner, request)) = self.request() else {
            let mut users = self.users.iter().copied();
            let low = users.next().context("a dialog without users")?;
            let high = users.next().unwrap_or(low);
            let mut reading = checker::read_everywhere(servers, (low, high)).await?;
            reading.faults.extend(checker::gaps(&reading.log));
            if let Some(fault) = reading.faults.first() {
                bail!("dialog {low}_{high}: {fault}");
            }
            return Ok((reading.log, reading.read));
        };
        let first = servers.first().context("--url is empty")?.clone();
        // The same request names the same room.
        let api = Api::new(first, owner).await?;
        let room = api.create_room(&request).await?.dialog;
        let (mut log, mut read) = (None, 0);
        for user in &self.users {
            for server in servers {
                let api = Api::new(server.clone(), *user).await?;
                let logs = [
                    api.log_upwards(room.as_str()).await?,
                    api.log_downwards(room.as_str()).await?,
                ];
                for there in logs {
                    read += there.len() as u64;
                    if log.get_or_insert_with(|| there.clone()) != &there {
                        bail!("room {room}: user {user} reads something else");
                    }
                }
            }
        }
        let log = log.unwrap_or_default();
        if let Some(fault) = checker::gaps(&log).first() {
            bail!("room {room}: {fault}");
        }
        Ok((log, read))
    }
}

async fn check(servers: &[Access], conversations: &[Conversation]) -> anyhow::Result<u64> {
    let bar = bar(conversations.len() as u64);
    let counts = stream::iter(conversations)
        .map(|conversation| {
            let bar = &bar;
            async move {
                let (log, read) = conversation.read_everywhere(servers).await?;
                let name = log.first().map_or("", |first| &first.dialog);
                compare(&log, conversation).with_context(|| format!("dialog {name}"))?;
                bar.inc(1);
                anyhow::Ok(read)
            }
        })
        .buffer_unordered(16)
        .try_collect::<Vec<u64>>()
        .await?;
    bar.finish_and_clear();
    Ok(counts.iter().sum())
}

/// Whether the messages of a log are the lines, in their order.
fn compare(log: &[Message], conversation: &Conversation) -> anyhow::Result<()> {
    let lines = &conversation.lines;
    let log: Vec<&Message> = log.iter().filter(|entry| entry.kind.is_text()).collect();
    if log.len() != lines.len() {
        bail!(
            "{} messages, and {} lines in the file",
            log.len(),
            lines.len()
        );
    }
    for (number, (message, line)) in (1..).zip(log.iter().zip(lines)) {
        let to = conversation.room.is_none().then_some(line.to);
        if (message.from, message.to, &message.text) != (line.from, to, &line.text) {
            bail!("message {} is not line {number}", message.seq);
        }
    }
    Ok(())
}

pub fn bar(length: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} {per_sec} {eta}");
    ProgressBar::new(length).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
