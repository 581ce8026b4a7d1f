//! The command `chat`: reads settings, builds, runs.

mod cli;

use anyhow::Context;
use chat::config::{LogFormat, Secret, Settings};
use chat::domain::dialog::{DialogId, UserId};
use chat::http::Tokens;
use chat::server::Server;
use clap::{Parser, Subcommand};
use std::io::{IsTerminal, Write};
use std::net::{AddrParseError, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

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
        #[command(flatten)]
        embedded: Embedded,
    },
    /// Print a token for a user, signed with the configured secret.
    Token {
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
        #[command(flatten)]
        embedded: Embedded,
    },
    /// Show the shards, the topology in effect and the progress of rebalancing.
    Status {
        /// Repeat every second, until Ctrl-C.
        #[arg(long)]
        watch: bool,
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
    },
    /// Resume rebalancing.
    Resume {
        /// The admin listener of a running instance; that of the settings if left out.
        #[arg(long, value_parser = admin_address)]
        admin: Option<SocketAddr>,
    },
    /// Show the slot, owner and target shard of the dialog of two users.
    Where {
        a: u64,
        b: u64,
        #[command(flatten)]
        embedded: Embedded,
    },
}

#[derive(clap::Args)]
struct Embedded {
    /// Everything in one process and in files: four SQLite shards, no NATS, tokens for everyone on
    /// this machine.
    #[arg(long)]
    embedded: bool,
    /// Where embedded mode keeps its files.
    #[arg(long, default_value = "data", requires = "embedded")]
    data: PathBuf,
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
    let mut settings = Settings::load(cli.config.as_deref()).context("settings")?;
    let filter = EnvFilter::try_new(&settings.log.filter).context("log.filter")?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match settings.log.format {
        LogFormat::Text => log.with_target(false).init(),
        LogFormat::Json => log.json().init(),
    }
    let command = cli.command.unwrap_or(Command::Serve {
        embedded: Embedded {
            embedded: false,
            data: PathBuf::from("data"),
        },
    });
    match command {
        Command::Serve { embedded } => {
            embedded.apply(&mut settings)?;
            serve(settings).await
        }
        Command::Token {
            user,
            seconds,
            embedded,
        } => {
            embedded.apply(&mut settings)?;
            let tokens = Tokens::new(&settings.auth, settings.demo)?;
            println!(
                "{}",
                tokens.mint(UserId::new(user)?, Duration::from_secs(seconds))?
            );
            Ok(())
        }
        Command::Plan { file, embedded } => {
            embedded.apply(&mut settings)?;
            cli::plan(&settings, &file).await
        }
        Command::Status {
            watch,
            admin,
            embedded,
        } => {
            embedded.apply(&mut settings)?;
            let admin = admin.unwrap_or(settings.admin_listen);
            cli::status(admin, settings.admin_token.as_ref(), watch).await
        }
        Command::Pause { admin } => {
            let admin = admin.unwrap_or(settings.admin_listen);
            cli::pause(admin, settings.admin_token.as_ref(), true).await
        }
        Command::Resume { admin } => {
            let admin = admin.unwrap_or(settings.admin_listen);
            cli::pause(admin, settings.admin_token.as_ref(), false).await
        }
        Command::Where { a, b, embedded } => {
            embedded.apply(&mut settings)?;
            cli::find(
                &settings,
                DialogId::between(UserId::new(a)?, UserId::new(b)?),
            )
            .await
        }
    }
}

async fn serve(settings: Settings) -> anyhow::Result<()> {
    let embedded = settings.embedded;
    let server = Server::build(settings).await?;
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
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    server
        .run_until(async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        })
        .await
}

impl Embedded {
    /// Lays embedded mode over the settings, and makes its files on the first run.
    fn apply(&self, settings: &mut Settings) -> anyhow::Result<()> {
        if !self.embedded {
            return Ok(());
        }
        std::fs::create_dir_all(&self.data).with_context(|| self.data.display().to_string())?;
        settings.embedded = true;
        settings.shards_file = self.data.join("shards.toml");
        if !settings.shards_file.exists() {
            let data = std::fs::canonicalize(&self.data)?;
            std::fs::write(&settings.shards_file, embedded_shards(&data))?;
        }
        if settings.auth.secret.is_none() {
            settings.auth.secret = Some(Secret::new(embedded_secret(&self.data.join("secret"))?));
        }
        Ok(())
    }
}

fn embedded_shards(data: &Path) -> String {
    let mut text = String::from("# The shards of this service: four SQLite files.\n");
    for n in 1..=4 {
        text += &format!(
            "\n[[shard]]\nname = \"shard{n}\"\nurl = \"sqlite:{}\"\n",
            data.join(format!("shard{n}.db")).display()
        );
    }
    text
}

/// The secret of embedded mode, made on the first run, so that tokens outlive a restart.
fn embedded_secret(path: &Path) -> anyhow::Result<String> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    if !path.exists() {
        let secret = format!(
            "{:032x}{:032x}",
            rand::random::<u128>(),
            rand::random::<u128>()
        );
        let mut file = std::fs::OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(0o600)
            .open(path)?;
        file.write_all(secret.as_bytes())?;
    }
    std::fs::read_to_string(path).with_context(|| path.display().to_string())
}
