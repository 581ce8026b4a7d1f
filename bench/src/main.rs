//! The benchmarks and proofs of `bench/`, and the baselines that they are measured against.

mod baseline;
mod service;
mod devices;
mod attack;
mod deliver;
mod huge;
mod idle;
mod prove;
mod reads;
mod saturate;

use baseline::{delay, echo, plain};
use clap::Parser;
use std::pin::Pin;
use tokio::signal::unix::{SignalKind, signal};

#[derive(Parser)]
#[command(about = "Baselines for the benchmarks of the service")]
enum Cli {
    /// Multi-row INSERTs into the service's own table, as fast as the servers take them. Prints
    /// rows a second.
    Plain(plain::Options),
    /// Single INSERTs into the same table at a steady pace.
    Paced(plain::PacedOptions),
    /// A stock actix-ws echo server on an address, until it is killed.
    Echo {
        #[arg(long, default_value = "127.0.0.1:9000")]
        listen: String,
    },
    /// Stands before a server, whose answers come late, until it is killed.
    Delay(delay::Options),
    /// Opens many WebSockets, waits, and prints what a process needs for each.
    Idle(idle::Options),
    /// Keeps sends of many users under way and prints what is acknowledged and delivered a second.
    Saturate(saturate::Options),
    /// Changes the set of shards under load, kills processes, and proves that nothing went wrong.
    Prove(prove::Options),
    /// Loses messages of the bus, kills instances, stops readers, and shows that every device has
    /// everything all the same.
    Deliver(deliver::Options),
    /// Ordinary accounts ask for all they can while others talk.
    Attack(attack::Options),
    /// Reads pages of a very long dialog, and inboxes.
    Reads(reads::Options),
    /// Moves a slot with one very long dialog while it is written to and read to its first message.
    Huge(huge::Options),
}

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let work: Pin<Box<dyn Future<Output = anyhow::Result<()>>>> = match Cli::parse() {
        // An actix server wants a runtime of its own kind.
        Cli::Echo { listen } => return actix_web::rt::System::new().block_on(echo::serve(&listen)),
        Cli::Plain(options) => Box::pin(plain::run(options)),
        Cli::Paced(options) => Box::pin(plain::paced(options)),
        Cli::Delay(options) => Box::pin(delay::run(options)),
        Cli::Idle(options) => Box::pin(idle::run(options)),
        Cli::Saturate(options) => Box::pin(saturate::run(options)),
        Cli::Prove(options) => Box::pin(prove::run(options)),
        Cli::Deliver(options) => Box::pin(deliver::run(options)),
        Cli::Attack(options) => Box::pin(attack::run(options)),
        Cli::Reads(options) => Box::pin(reads::run(options)),
        Cli::Huge(options) => Box::pin(huge::run(options)),
    };
    runtime.block_on(async {
        let mut terminated = signal(SignalKind::terminate())?;
        // When the work is dropped, the servers that it has started are killed.
        tokio::select! {
            done = work => done,
            _ = terminated.recv() => anyhow::bail!("terminated"),
            interrupted = tokio::signal::ctrl_c() => Err(interrupted.err().map_or_else(|| anyhow::anyhow!("interrupted"), Into::into)),
        }
    })
}
