//! The command `chat-client`: talk, ask, and put the service to the test.

mod journal;
mod load;
mod output;
mod replay;
mod report;
mod room;
mod talk;
mod verify;

use anyhow::{Context, bail};
use chat_client::{Access, Api, Client, Event, To, TokenSource};
use chat_wire::{InboxEntry, Message};
use clap::builder::RangedU64ValueParser;
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

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
        value_delimiter = ',',
        value_parser = instance
    )]
    url: Vec<String>,
    /// A token. Without one or a secret, an instance in embedded mode is asked for it.
    #[arg(long, global = true, env = "CHAT_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// A file with a token, which is not shown in the list of processes; `-` is standard input.
    #[arg(long, global = true, conflicts_with = "token")]
    token_file: Option<PathBuf>,
    /// A PEM file with the CAs of the service, if it does not have a public one.
    #[arg(long, global = true, env = "CHAT_CA")]
    ca: Option<PathBuf>,
    /// The service's HS256 secret, to mint tokens here.
    #[arg(long, global = true, env = "CHAT_SECRET", hide_env_values = true)]
    secret: Option<String>,
}

/// What a user id may be.
fn user_id() -> RangedU64ValueParser {
    RangedU64ValueParser::new().range(1..=chat_wire::MAX_USER_ID)
}

/// The address of an instance.
fn instance(text: &str) -> Result<String, String> {
    let url =
        reqwest::Url::parse(text).map_err(|e| format!("{e}; an instance is http://host:port"))?;
    if !matches!(url.scheme(), "http" | "https") || url.host().is_none() || url.path() != "/" {
        return Err("an instance is http://host:port or https://host:port".into());
    }
    Ok(text.to_owned())
}

impl Servers {
    /// What is given on the command line comes before what the environment has.
    fn prefer_arguments(&mut self, matches: &ArgMatches) -> anyhow::Result<()> {
        let given = |name| matches.value_source(name) == Some(ValueSource::CommandLine);
        if let Some(path) = &self.token_file {
            self.token = Some(read_token(path).with_context(|| path.display().to_string())?);
            self.secret = None;
        } else if given("token") {
            self.secret = None;
        } else if given("secret") {
            self.token = None;
        }
        Ok(())
    }

    fn all(&self) -> anyhow::Result<Vec<Access>> {
        let source = match (&self.token, &self.secret) {
            (Some(token), _) => TokenSource::Given(token.clone()),
            (None, Some(secret)) => TokenSource::Secret(secret.clone()),
            (None, None) => TokenSource::Dev,
        };
        let ca = match &self.ca {
            None => None,
            Some(path) => {
                let name = || path.display().to_string();
                let pem = std::fs::read(path).with_context(name)?;
                Some((pem, path))
            }
        };
        self.url
            .iter()
            .map(|url| {
                let access = Access::new(url, source.clone());
                let Some((pem, path)) = &ca else {
                    return Ok(access);
                };
                let with_ca = access.with_ca(pem);
                with_ca.with_context(|| path.display().to_string())
            })
            .collect()
    }

    /// The first, for a session: it goes to one of the others when that is away.
    fn first(&self) -> anyhow::Result<Access> {
        let first = self.all()?.into_iter().next().context("--url is empty")?;
        Ok(first.with_others(self.url.iter().map(String::as_str)))
    }

    /// The first that answers, for requests.
    async fn answering(&self) -> anyhow::Result<Access> {
        let mut reasons = Vec::new();
        for access in self.all()? {
            let url = access.url("/livez");
            let request = access.http().get(&url).timeout(ANSWER_LIMIT).send().await;
            match request.and_then(reqwest::Response::error_for_status) {
                Ok(_) => return Ok(access),
                Err(e) => reasons.push(format!("{url}: {}", cause(&e))),
            }
        }
        bail!("no instance answers: {}", reasons.join("; "))
    }
}

/// How long an instance may take to answer before the next one is tried.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);

/// The innermost reason of an error, which names what the system said.
fn cause(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

fn read_token(path: &Path) -> std::io::Result<String> {
    let text = if path == Path::new("-") {
        std::io::read_to_string(std::io::stdin())?
    } else {
        std::fs::read_to_string(path)?
    };
    Ok(text.trim().to_owned())
}

#[derive(Subcommand)]
enum Command {
    /// Talk with a user, or in a room: type, and see all sides.
    Talk {
        /// The user id.
        #[arg(long, value_parser = user_id())]
        user: u64,
        /// The user id of the other.
        #[arg(long, value_parser = user_id(), required_unless_present = "room")]
        with: Option<u64>,
        /// Instead: the id of a room.
        #[arg(long, conflicts_with = "with")]
        room: Option<String>,
    },
    /// Make rooms, change them, and see who is in them.
    #[command(subcommand)]
    Room(room::Command),
    /// Send one message and print its seq.
    Send {
        /// The user id.
        #[arg(long, value_parser = user_id())]
        user: u64,
        /// The user id of the recipient.
        #[arg(long, value_parser = user_id(), required_unless_present = "room")]
        to: Option<u64>,
        /// Instead: the id of a room.
        #[arg(long, conflicts_with = "to")]
        room: Option<String>,
        /// The name of this send; a random one if left out. A repeat with the same key is stored
        /// once.
        #[arg(long)]
        key: Option<String>,
        /// How long to wait for the acknowledgement, in seconds.
        #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400))]
        timeout: u64,
        /// The text of the message.
        text: String,
    },
    /// Print a dialog, a JSON object a message.
    History {
        /// The user id.
        #[arg(long, value_parser = user_id())]
        user: u64,
        /// The user id of the other.
        #[arg(long, value_parser = user_id(), required_unless_present = "room")]
        with: Option<u64>,
        /// Instead: the id of a room.
        #[arg(long, conflicts_with = "with")]
        room: Option<String>,
        /// Messages below this seq, the newest of them.
        #[arg(long)]
        before: Option<u64>,
        /// Messages above this seq, the oldest of them.
        #[arg(long, conflicts_with = "before")]
        after: Option<u64>,
        /// The largest number of messages.
        #[arg(long, default_value_t = 50)]
        limit: u64,
        /// The whole dialog.
        #[arg(long, conflicts_with_all = ["before", "after"])]
        all: bool,
    },
    /// Print a user's dialogs, a JSON object each.
    Inbox {
        /// The user id.
        #[arg(long, value_parser = user_id())]
        user: u64,
    },
    /// Print what comes for a user as it comes, a JSON object a message.
    Tail {
        /// The user id.
        #[arg(long, value_parser = user_id())]
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
    /// Print completions for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page.
    Man,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // One line, with its causes.
            output::note(&format!("chat-client: {e:#}"));
            ExitCode::FAILURE
        }
    }
}

async fn run() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let matches = Cli::command().get_matches();
    let Cli {
        mut server,
        command,
    } = Cli::from_arg_matches(&matches)?;
    server.prefer_arguments(&matches)?;
    match command {
        Command::Talk { user, with, room } => {
            talk::run(server.first()?, user, to(with, room)?).await
        }
        Command::Room(command) => room::run(server.answering().await?, command).await,
        Command::Send {
            user,
            to: with,
            room,
            key,
            timeout,
            text,
        } => {
            let to = to(with, room)?;
            let (client, mut events) = Client::start(server.first()?, user);
            let fate = tokio::spawn(async move { closed(&mut events).await });
            let key = key.unwrap_or_else(new_key);
            let limit = Duration::from_secs(timeout);
            let sent = tokio::time::timeout(limit, client.send(to, key.clone(), text)).await;
            drop(client);
            match sent {
                Ok(Ok(sent)) => output::json(&sent),
                Ok(Err(e)) => Err(fate.await?.unwrap_or(e).into()),
                Err(_) => bail!(
                    "no answer within {timeout} s; it may or may not be stored: repeat it with --key {key}"
                ),
            }
        }
        Command::History {
            user,
            with,
            room,
            before,
            after,
            limit,
            all,
        } => {
            let of = to(with, room)?;
            let api = Api::new(server.answering().await?, user).await?;
            let messages = if all {
                api.log_upwards(&of).await?
            } else {
                let bounds = [
                    before.map(|seq| ("before", seq)),
                    after.map(|seq| ("after", seq)),
                    Some(("limit", limit)),
                ];
                let page = api
                    .history(&of, &bounds.into_iter().flatten().collect::<Vec<_>>())
                    .await?;
                if page.gap {
                    eprintln!(
                        "messages may be missing here: a shard that was declared down holds some"
                    );
                }
                page.messages
            };
            messages.iter().try_for_each(output::json)
        }
        Command::Inbox { user } => {
            let api = Api::new(server.answering().await?, user).await?;
            inbox(&api, |_| true).await
        }
        Command::Tail { user } => {
            let (_client, mut events) = Client::start(server.first()?, user);
            while let Some(event) = events.recv().await {
                match event {
                    Event::Message(entry) | Event::Entry(entry) => output::json::<Message>(&entry)?,
                    Event::Connected => eprintln!("connected"),
                    Event::Disconnected { reason, .. } => {
                        output::note(&format!("disconnected: {reason}"));
                    }
                    Event::Closed(e) => return Err(e.into()),
                    Event::Resync(dialog) => {
                        eprintln!("messages were missed in {dialog}: read its history")
                    }
                    Event::Read(_) | Event::Typing { .. } | Event::Presence(_) => {}
                }
            }
            Ok(())
        }
        Command::Replay(options) => replay::run(&server.all()?, options).await,
        Command::Load(options) => load::run(&server.all()?, options).await,
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "chat-client", &mut text);
            output::line(String::from_utf8(text)?.trim_end())
        }
        Command::Man => {
            let mut text = Vec::new();
            clap_mangen::Man::new(Cli::command()).render(&mut text)?;
            output::line(String::from_utf8(text)?.trim_end())
        }
        Command::Verify { journal } => verify::run(&server.all()?, &journal).await,
    }
}

/// The dialog that the arguments name.
fn to(user: Option<u64>, room: Option<String>) -> anyhow::Result<To> {
    let user = user.map(To::User);
    user.or(room.map(To::Dialog))
        .context("name a user or a room")
}

/// Prints the dialogs of an inbox that are `shown`.
async fn inbox(api: &Api, shown: impl Fn(&InboxEntry) -> bool) -> anyhow::Result<()> {
    let mut cursor = None;
    loop {
        let page = api.inbox(100, cursor.as_deref()).await?;
        let dialogs = page.dialogs.iter().filter(|entry| shown(entry));
        dialogs.into_iter().try_for_each(output::json)?;
        if !page.incomplete.is_empty() {
            let names = page.incomplete.join(", ");
            output::note(&format!("incomplete: {names} did not answer"));
        }
        cursor = page.cursor;
        if cursor.is_none() {
            return Ok(());
        }
    }
}

/// Waits for the end of a session, and prints why it is not connected. The reason of a session that
/// was refused; `None` if it ended because this command did.
async fn closed(events: &mut chat_client::Events) -> Option<chat_client::ClientError> {
    let mut last = String::new();
    while let Some(event) = events.recv().await {
        match event {
            Event::Closed(e) => return Some(e),
            Event::Disconnected { reason, .. } if reason != last => {
                output::note(&format!("not connected: {reason}; trying again"));
                last = reason;
            }
            Event::Connected
            | Event::Disconnected { .. }
            | Event::Message(_)
            | Event::Entry(_)
            | Event::Read(_)
            | Event::Typing { .. }
            | Event::Presence(_)
            | Event::Resync(_) => {}
        }
    }
    None
}

fn new_key() -> String {
    format!("{:032x}", rand::random::<u128>())
}

#[cfg(test)]
mod tests {
    use super::Cli;
    use clap::CommandFactory;

    #[test]
    fn every_command_and_argument_has_a_help_text() {
        Cli::command().debug_assert();
        assert_eq!(
            testkit::help::missing(&Cli::command()),
            Vec::<String>::new()
        );
    }
}
