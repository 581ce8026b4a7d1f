//! The command `chat`: reads settings, builds, runs.

mod cli;
mod embedded;

use anyhow::Context;
use chat::config::{LogFormat, Settings};
use chat::domain::dialog::{DialogId, UserId};
use chat::http::Tokens;
use chat::server::Server;
use clap::{CommandFactory, Parser, Subcommand};
use embedded::Embedded;
use std::io::{IsTerminal, Write};
use std::net::{AddrParseError, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::Metadata;
use tracing_subscriber::filter::{FilterExt, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// It gives memory back some seconds after a crowd has left; glibc's keeps it.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[derive(Parser)]
#[command(version, about = "A dialog messaging server on sharded MySQL")]
struct Cli {
    /// Settings file; chat.toml if it is there. CHAT__… variables are laid over it.
    #[arg(long, global = true)]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Serve (the default).
    Serve {
        /// The address for clients, instead of `listen` of the settings.
        #[arg(long)]
        listen: Option<SocketAddr>,
        /// The address for operators, instead of `admin_listen` of the settings.
        #[arg(long)]
        admin_listen: Option<SocketAddr>,
        #[command(flatten)]
        embedded: Embedded,
    },
    /// Print a token for a user, signed with the configured secret.
    Token {
        /// The user id.
        user: u64,
        /// How long it lasts, in seconds.
        #[arg(long, default_value_t = 24 * 60 * 60)]
        seconds: u64,
        #[command(flatten)]
        embedded: Embedded,
    },
    /// Show what a shards.toml would do, before anything moves.
    Plan {
        /// The file to look at; usually a copy of shards.toml with the edit in it.
        file: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        embedded: Embedded,
    },
    /// Show the shards, the topology in effect and the progress of rebalancing.
    Status {
        /// Repeat every second, until Ctrl-C.
        #[arg(long)]
        watch: bool,
        /// Print JSON, one line each time.
        #[arg(long)]
        json: bool,
        /// The admin listener of a running instance; that of the settings if left out.
        #[arg(long, value_parser = admin_address)]
        admin: Option<SocketAddr>,
        #[command(flatten)]
        embedded: Embedded,
    },
    /// Pause rebalancing: no slot moves until `chat resume`.
    Pause {
        /// The admin listener of a running instance; that of the settings if left out.
        #[arg(long, value_parser = admin_address)]
        admin: Option<SocketAddr>,
        #[command(flatten)]
        embedded: Embedded,
    },
    /// Resume rebalancing.
    Resume {
        /// The admin listener of a running instance; that of the settings if left out.
        #[arg(long, value_parser = admin_address)]
        admin: Option<SocketAddr>,
        #[command(flatten)]
        embedded: Embedded,
    },
    /// End the sessions of a user on all instances.
    Disconnect {
        /// The user id.
        user: u64,
        /// The admin listener of a running instance; that of the settings if left out.
        #[arg(long, value_parser = admin_address)]
        admin: Option<SocketAddr>,
        #[command(flatten)]
        embedded: Embedded,
    },
    /// Refuse the tokens of a user that were issued before a time, and end the sessions that have
    /// one.
    Revoke {
        /// The user id.
        user: u64,
        /// Seconds since 1970; now if left out.
        #[arg(long)]
        issued_before: Option<u64>,
        /// The admin listener of a running instance; that of the settings if left out.
        #[arg(long, value_parser = admin_address)]
        admin: Option<SocketAddr>,
        #[command(flatten)]
        embedded: Embedded,
    },
    /// Show the slot, owner and target shard of the dialog of two users.
    Where {
        /// The user id of one of them.
        a: u64,
        /// The user id of the other.
        b: u64,
        /// Print JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        embedded: Embedded,
    },
    /// Print completions for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page.
    Man,
}

impl Command {
    /// For commands that need no settings: their output.
    fn about_itself(&self) -> anyhow::Result<Option<Vec<u8>>> {
        let mut output = Vec::new();
        match self {
            Command::Completions { shell } => {
                clap_complete::generate(*shell, &mut Cli::command(), "chat", &mut output);
            }
            Command::Man => clap_mangen::Man::new(Cli::command()).render(&mut output)?,
            Command::Serve { .. }
            | Command::Token { .. }
            | Command::Plan { .. }
            | Command::Status { .. }
            | Command::Pause { .. }
            | Command::Resume { .. }
            | Command::Disconnect { .. }
            | Command::Revoke { .. }
            | Command::Where { .. } => return Ok(None),
        }
        Ok(Some(output))
    }
}

/// A socket address, also as the start of the server prints it: with `http://` before it.
fn admin_address(text: &str) -> Result<SocketAddr, AddrParseError> {
    text.trim_start_matches("http://")
        .trim_end_matches('/')
        .parse()
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // One line, with its causes.
            eprintln!("chat: {e:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> anyhow::Result<()> {
    let cli = Cli::parse();
    if let Some(text) = cli
        .command
        .as_ref()
        .map(Command::about_itself)
        .transpose()?
        .flatten()
    {
        return cli::print(&String::from_utf8(text)?);
    }
    let mut settings = Settings::load(cli.config.as_deref()).context("settings")?;
    let filter = EnvFilter::try_new(&settings.log.filter).context("log.filter")?;
    start_log(&settings.log.format, filter);
    let command = cli.command.unwrap_or(Command::Serve {
        listen: None,
        admin_listen: None,
        embedded: Embedded::off(),
    });
    match command {
        Command::Serve {
            listen,
            admin_listen,
            embedded,
        } => {
            settings.listen = listen.unwrap_or(settings.listen);
            settings.admin_listen = admin_listen.unwrap_or(settings.admin_listen);
            let _lock = embedded.serve(&mut settings)?;
            serve(settings).await
        }
        Command::Token {
            user,
            seconds,
            embedded,
        } => {
            embedded.read(&mut settings)?;
            let tokens = Tokens::new(&settings.auth, settings.demo)?;
            let token = tokens.mint(UserId::new(user)?, Duration::from_secs(seconds))?;
            cli::print(&format!("{token}\n"))
        }
        Command::Plan {
            file,
            json,
            embedded,
        } => {
            embedded.read(&mut settings)?;
            cli::plan(&settings, &file, json).await
        }
        Command::Status {
            watch,
            json,
            admin,
            embedded,
        } => {
            embedded.read(&mut settings)?;
            let admin = admin.unwrap_or(settings.admin_listen);
            cli::status(admin, settings.admin_token.as_ref(), watch, json).await
        }
        Command::Pause { admin, embedded } => {
            embedded.read(&mut settings)?;
            let admin = admin.unwrap_or(settings.admin_listen);
            cli::pause(admin, settings.admin_token.as_ref(), true).await
        }
        Command::Resume { admin, embedded } => {
            embedded.read(&mut settings)?;
            let admin = admin.unwrap_or(settings.admin_listen);
            cli::pause(admin, settings.admin_token.as_ref(), false).await
        }
        Command::Disconnect {
            user,
            admin,
            embedded,
        } => {
            embedded.read(&mut settings)?;
            let admin = admin.unwrap_or(settings.admin_listen);
            cli::disconnect(admin, settings.admin_token.as_ref(), UserId::new(user)?).await
        }
        Command::Revoke {
            user,
            issued_before,
            admin,
            embedded,
        } => {
            embedded.read(&mut settings)?;
            let admin = admin.unwrap_or(settings.admin_listen);
            let token = settings.admin_token.as_ref();
            cli::revoke(admin, token, UserId::new(user)?, issued_before).await
        }
        Command::Where {
            a,
            b,
            json,
            embedded,
        } => {
            embedded.read(&mut settings)?;
            cli::find(
                &settings,
                DialogId::between(UserId::new(a)?, UserId::new(b)?),
                json,
            )
            .await
        }
        Command::Completions { .. } | Command::Man => Ok(()),
    }
}

/// Logs to standard error. The audit log is JSON in either format, and has no filter.
fn start_log(format: &LogFormat, filter: EnvFilter) {
    let audited = |metadata: &Metadata<'_>| metadata.target() == chat::audit::TARGET;
    let colors = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let layer = tracing_subscriber::fmt::layer()
        .with_ansi(colors)
        .with_writer(std::io::stderr);
    let layer = match format {
        LogFormat::Text => layer.with_target(false).boxed(),
        LogFormat::Json => layer.json().boxed(),
    };
    let audit = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .json()
        .flatten_event(true)
        .with_filter(filter_fn(audited));
    let others = filter.and(filter_fn(move |metadata| !audited(metadata)));
    tracing_subscriber::registry()
        .with(layer.with_filter(others))
        .with(audit)
        .init();
}

async fn serve(settings: Settings) -> anyhow::Result<()> {
    let embedded = settings.embedded;
    // Before the address is printed: a signal right after it ends the server in order, too.
    let mut signals = Signals::register()?;
    let server = tokio::select! {
        server = Server::build(settings) => server?,
        () = signals.any() => return Ok(()),
    };
    let address = server.address();
    tracing::info!(%address, admin = %server.admin_address(), "serving");
    if embedded && address.ip().is_loopback() {
        // The parent process may have closed the pipe; that is no reason to end.
        let _ = write!(
            std::io::stdout(),
            "chat is at http://{address}/ — open it in two tabs and sign in as two users.\n\
             Embedded mode: every client that reaches this address can get a token for any user, from POST /v1/dev/token.\n\
             Or talk here:  cargo run --release -p chat-client -- talk --url http://{address} --user 7 --with 42\n"
        );
    }
    server.run_until(signals.any()).await
}

/// The signals that end the server.
struct Signals([Signal; 3]);

impl Signals {
    fn register() -> std::io::Result<Self> {
        Ok(Self([
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
            // The terminal was closed.
            signal(SignalKind::hangup())?,
        ]))
    }

    /// Waits for one of them.
    async fn any(&mut self) {
        let [terminate, interrupt, hangup] = &mut self.0;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
        }
    }
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
