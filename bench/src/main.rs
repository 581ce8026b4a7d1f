//! What the service is measured against, each in its plainest form: `bench/saturation` and `bench/idle` run these beside it.

mod echo;
mod idle;
mod plain;

use clap::{Parser, Subcommand};

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
    #[command(subcommand)]
    Ratio(Ratio),
}

#[derive(Subcommand)]
enum Ratio {
    /// Prints acknowledged and delivered messages a second of a report of `chat-client load` over a plain rate.
    Saturation { report: std::path::PathBuf, plain: f64 },
}

#[actix_web::main]
async fn main() -> anyhow::Result<()> {
    match Cli::parse() {
        Cli::Plain(options) => plain::run(options).await,
        Cli::Echo { listen } => echo::serve(&listen).await,
        Cli::Idle(options) => idle::run(options).await,
        Cli::Ratio(Ratio::Saturation { report, plain }) => {
            let report: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(report)?)?;
            let rate = |name: &str| report[name].as_f64().unwrap_or(f64::NAN);
            let (acknowledged, delivered) = (rate("acknowledged_per_second"), rate("delivered_per_second"));
            println!("plain INSERT   {plain:>9.0} rows/s");
            println!("acknowledged   {acknowledged:>9.0} messages/s   ratio {:.2}", acknowledged / plain);
            println!("delivered      {delivered:>9.0} messages/s   ratio {:.2}", delivered / plain);
            Ok(())
        }
    }
}
