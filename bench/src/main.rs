//! What the service is measured against, each in its plainest form: `bench/saturation` and `bench/idle` run these beside it.

mod attack;
mod delay;
mod deliver;
mod devices;
mod echo;
mod huge;
mod idle;
#[path = "../../chat/tests/support/lossy.rs"]
mod lossy;
mod plain;
mod prove;
#[allow(dead_code)] // the tests use more of it
#[path = "../../chat/tests/support/proxy.rs"]
mod proxy;
mod reads;
mod rng;
mod saturate;
mod service;

use clap::Parser;

#[derive(Parser)]
#[command(about = "Baselines for the benchmarks of the service")]
enum Cli {
    /// Multi-row INSERTs into the service's own table, as fast as the servers take them. Prints rows a second.
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
    /// Loses messages of the bus, kills instances, stops readers, and shows that every device has everything all the same.
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
    match Cli::parse() {
        // An actix server wants a runtime of its own kind.
        Cli::Echo { listen } => actix_web::rt::System::new().block_on(echo::serve(&listen)),
        Cli::Plain(options) => runtime.block_on(plain::run(options)),
        Cli::Paced(options) => runtime.block_on(plain::paced(options)),
        Cli::Delay(options) => runtime.block_on(delay::run(options)),
        Cli::Idle(options) => runtime.block_on(idle::run(options)),
        Cli::Saturate(options) => runtime.block_on(saturate::run(options)),
        Cli::Prove(options) => runtime.block_on(prove::run(options)),
        Cli::Deliver(options) => runtime.block_on(deliver::run(options)),
        Cli::Attack(options) => runtime.block_on(attack::run(options)),
        Cli::Reads(options) => runtime.block_on(reads::run(options)),
        Cli::Huge(options) => runtime.block_on(huge::run(options)),
    }
}
