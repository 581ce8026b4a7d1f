//! What the service is measured against, each in its plainest form: `bench/saturation` and `bench/idle` run these beside it.

mod echo;
mod huge;
mod idle;
mod plain;
mod prove;
mod saturate;
mod service;

use clap::Parser;

#[derive(Parser)]
#[command(about = "Baselines for the benchmarks of the service")]
enum Cli {
    /// Multi-row INSERTs into the service's own table, as fast as the servers take them. Prints rows a second.
    Plain(plain::Options),
    /// A stock actix-ws echo server on an address, until it is killed.
    Echo {
        #[arg(long, default_value = "127.0.0.1:9000")]
        listen: String,
    },
    /// Opens many WebSockets, waits, and prints what a process needs for each.
    Idle(idle::Options),
    /// Keeps sends of many users under way and prints what is acknowledged and delivered a second.
    Saturate(saturate::Options),
    /// Changes the set of shards under load, kills processes, and proves that nothing went wrong.
    Prove(prove::Options),
    /// Moves a slot with one very long dialog while it is written to and read to its first message.
    Huge(huge::Options),
}

#[actix_web::main]
async fn main() -> anyhow::Result<()> {
    match Cli::parse() {
        Cli::Plain(options) => plain::run(options).await,
        Cli::Echo { listen } => echo::serve(&listen).await,
        Cli::Idle(options) => idle::run(options).await,
        Cli::Saturate(options) => saturate::run(options).await,
        Cli::Prove(options) => prove::run(options).await,
        Cli::Huge(options) => huge::run(options).await,
    }
}
