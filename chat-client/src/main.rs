//! The command `chat-client`: talk, ask, and put the service to the test.

mod journal;
mod load;
mod replay;
mod report;
mod talk;
mod verify;

use anyhow::Context;
use chat_client::{Access, Api, Client, Event, TokenSource};
use chat_wire::Message;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(
    version,
    about = "Talk over the dialog messaging service, and put it to the test"
)]
struct Cli {
    #[command(flatten)]
    server: Servers,
    #[command(subcommand)]
    command: Command,
}

/// Where the service is, and how we come by tokens.
#[derive(Args, Clone)]
struct Servers {
    /// An instance, as http://host:port; several for commands that use many users.
    #[arg(
        long,
        global = true,
        env = "CHAT_URL",
        default_value = "http://127.0.0.1:8080",
        value_delimiter = ','
    )]
    url: Vec<String>,
    /// A token. Without one or a secret, an instance in embedded mode is asked for it.
    #[arg(long, global = true, env = "CHAT_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// The service's HS256 secret, to mint tokens here.
    #[arg(
        long,
        global = true,
        env = "CHAT_SECRET",
        hide_env_values = true,
        conflicts_with = "token"
    )]
    secret: Option<String>,
}

impl Servers {
    fn all(&self) -> Vec<Access> {
        let source = match (&self.token, &self.secret) {
            (Some(token), _) => TokenSource::Given(token.clone()),
            (None, Some(secret)) => TokenSource::Secret(secret.clone()),
            (None, None) => TokenSource::Dev,
        };
        self.url
            .iter()
            .map(|url| Access::new(url, source.clone()))
            .collect()
    }

    /// The first; when it is away, one of the others.
    fn first(&self) -> anyhow::Result<Access> {
        let first = self.all().into_iter().next().context("--url is empty")?;
        Ok(first.with_others(self.url.iter().map(String::as_str)))
    }
}

#[derive(Subcommand)]
enum Command {
    /// Talk with a user: type, and see both sides.
    Talk {
        #[arg(long)]
        user: u64,
        #[arg(long)]
        with: u64,
    },
    /// Send one message and print its seq.
    Send {
        #[arg(long)]
        user: u64,
        #[arg(long)]
        to: u64,
        /// The name of this send; a random one if left out. A repeat with the same key is stored
        /// once.
        #[arg(long)]
        key: Option<String>,
        text: String,
    },
    /// Print a dialog, a JSON object a message.
    History {
        #[arg(long)]
        user: u64,
        #[arg(long)]
        with: u64,
        #[arg(long)]
        before: Option<u64>,
        #[arg(long, conflicts_with = "before")]
        after: Option<u64>,
        #[arg(long, default_value_t = 50)]
        limit: u64,
        /// The whole dialog.
        #[arg(long, conflicts_with_all = ["before", "after"])]
        all: bool,
    },
    /// Print a user's dialogs, a JSON object each.
    Inbox {
        #[arg(long)]
        user: u64,
    },
    /// Print what comes for a user as it comes, a JSON object a message.
    Tail {
        #[arg(long)]
        user: u64,
    },
    /// Send the lines of a file ({"from","to","text"}), in order per dialog, as many users at once.
    Replay(replay::Options),
    /// Send random messages at a steady rate, and report latencies, shares and losses.
    Load(load::Options),
    /// Read back what `load` journaled as acknowledged, through every instance, and compare.
    Verify {
        /// What `load --journal` wrote.
        journal: PathBuf,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // One line, with its causes.
            eprintln!("chat-client: {e:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let Cli { server, command } = Cli::parse();
    match command {
        Command::Talk { user, with } => talk::run(server.first()?, user, with).await,
        Command::Send {
            user,
            to,
            key,
            text,
        } => {
            let (client, mut events) = Client::start(server.first()?, user);
            let fate = tokio::spawn(async move { closed(&mut events).await });
            let key = key.unwrap_or_else(new_key);
            let sent = client.send(to, key, text).await;
            drop(client);
            match sent {
                Ok(sent) => print_json(&sent),
                Err(e) => Err(fate.await?.unwrap_or(e).into()),
            }
        }
        Command::History {
            user,
            with,
            before,
            after,
            limit,
            all,
        } => {
            let api = Api::new(server.first()?, user).await?;
            let messages = if all {
                api.log_upwards(with).await?
            } else {
                let bounds = [
                    before.map(|seq| ("before", seq)),
                    after.map(|seq| ("after", seq)),
                    Some(("limit", limit)),
                ];
                let page = api
                    .history(with, &bounds.into_iter().flatten().collect::<Vec<_>>())
                    .await?;
                if page.gap {
                    eprintln!(
                        "messages may be missing here: a shard that was declared down holds some"
                    );
                }
                page.messages
            };
            messages.iter().try_for_each(print_json)
        }
        Command::Inbox { user } => {
            let api = Api::new(server.first()?, user).await?;
            let mut cursor = None;
            loop {
                let page = api.inbox(100, cursor.as_deref()).await?;
                page.dialogs.iter().try_for_each(print_json)?;
                if !page.incomplete.is_empty() {
                    eprintln!("incomplete: {} did not answer", page.incomplete.join(", "));
                }
                cursor = page.cursor;
                if cursor.is_none() {
                    return Ok(());
                }
            }
        }
        Command::Tail { user } => {
            let (_client, mut events) = Client::start(server.first()?, user);
            while let Some(event) = events.recv().await {
                match event {
                    Event::Message(message) => print_json::<Message>(&message)?,
                    Event::Connected => eprintln!("connected"),
                    Event::Disconnected { reason, .. } => eprintln!("disconnected: {reason}"),
                    Event::Closed(e) => return Err(e.into()),
                    Event::Resync(dialog) => {
                        eprintln!("messages were missed in {dialog}: read its history")
                    }
                    Event::Read(_) | Event::Typing { .. } | Event::Presence(_) => {}
                }
            }
            Ok(())
        }
        Command::Replay(options) => replay::run(&server.all(), options).await,
        Command::Load(options) => load::run(&server.all(), options).await,
        Command::Verify { journal } => verify::run(&server.all(), &journal).await,
    }
}

/// Waits for the end of a session that could not be had, and says why; `None` if it ended because
/// we did.
async fn closed(events: &mut chat_client::Events) -> Option<chat_client::ClientError> {
    while let Some(event) = events.recv().await {
        if let Event::Closed(e) = event {
            return Some(e);
        }
    }
    None
}

fn new_key() -> String {
    format!("{:032x}", rand::random::<u128>())
}

fn print_json<T: serde::Serialize>(value: &T) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string(value)?);
    Ok(())
}
