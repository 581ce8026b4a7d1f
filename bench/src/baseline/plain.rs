//! The plainest way to put messages into the same table: prepared multi-row INSERTs, each its own
//! transaction.

use clap::Args;
use mysql_async::prelude::Queryable;
use mysql_async::{Conn, Value};
use std::time::{Duration, Instant};

#[derive(Args)]
pub struct Options {
    /// mysql://…/database of every server; the database has the service's tables and may be written
    /// to.
    #[arg(required = true)]
    urls: Vec<String>,
    /// Rows of a transaction.
    #[arg(long, default_value_t = 64)]
    rows: usize,
    /// Connections to each server.
    #[arg(long, default_value_t = 8)]
    connections: usize,
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Dialogs the rows are spread over.
    #[arg(long, default_value_t = 5000)]
    dialogs: u64,
    /// Characters of a text.
    #[arg(long, default_value_t = 100)]
    chars: usize,
}

pub async fn run(options: Options) -> anyhow::Result<()> {
    for url in &options.urls {
        let mut conn = Conn::from_url(url).await?;
        conn.query_drop("DELETE FROM messages").await?;
        conn.disconnect().await?;
    }
    let begun = Instant::now();
    let until = begun + Duration::from_secs_f64(options.seconds);
    let connections = options.urls.iter().flat_map(|url| {
        (0..options.connections).map(move |connection| (url.clone(), connection as u64))
    });
    let inserting: Vec<_> = connections
        .map(|(url, connection)| {
            tokio::spawn(insert(
                url,
                connection,
                until,
                options.rows,
                options.connections as u64,
                options.dialogs,
                options.chars,
            ))
        })
        .collect();
    let mut rows = 0;
    for connection in inserting {
        rows += connection.await??;
    }
    println!("{:.0}", rows as f64 / begun.elapsed().as_secs_f64());
    Ok(())
}

#[derive(Args)]
pub struct PacedOptions {
    /// mysql://…/database of every server; see `plain`.
    #[arg(required = true)]
    urls: Vec<String>,
    /// Rows a second, all servers together; 0 for one after the other without a pause.
    #[arg(long, default_value_t = 200.0)]
    rate: f64,
    #[arg(long, default_value_t = 20.0)]
    seconds: f64,
    /// Characters of a text.
    #[arg(long, default_value_t = 100)]
    chars: usize,
}

/// One row a transaction, at a steady pace, from server to server. Prints the rows, and the median
/// and the 99th percentile of an INSERT in milliseconds.
pub async fn paced(options: PacedOptions) -> anyhow::Result<()> {
    let mut servers = Vec::new();
    for url in &options.urls {
        let mut conn = Conn::from_url(url).await?;
        conn.query_drop("DELETE FROM messages").await?;
        let statement = conn.prep(INSERT_ONE).await?;
        servers.push((conn, statement));
    }
    let begun = Instant::now();
    let mut took = Vec::new();
    for number in 0u64.. {
        if begun.elapsed().as_secs_f64() >= options.seconds {
            break;
        }
        if options.rate > 0.0 {
            let due = begun + Duration::from_secs_f64(number as f64 / options.rate);
            tokio::time::sleep_until(due.into()).await;
        }
        let server = (number % servers.len() as u64) as usize;
        let (conn, statement) = &mut servers[server];
        let dialog = number.wrapping_mul(7919) % 5000;
        let sent = Instant::now();
        conn.exec_drop(&*statement, row(dialog, number, 0, options.chars))
            .await?;
        took.push(sent.elapsed());
    }
    took.sort_unstable();
    let at = |share: usize| took[took.len() * share / 100].as_secs_f64() * 1000.0;
    println!("{} {:.2} {:.2}", took.len(), at(50), at(99));
    Ok(())
}

const INSERT_ONE: &str = "INSERT INTO messages (slot, dialog, seq, author, client_key, text_hash, kind, text, created_at) \
     VALUES (?, ?, ?, ?, ?, ?, 'text', ?, ?)";

fn row(dialog: u64, number: u64, connection: u64, chars: usize) -> Vec<Value> {
    vec![
        Value::from(dialog * 31 % 4096),
        Value::from(format!("{dialog}_{}", dialog + 1000)),
        Value::from(number),
        Value::from(dialog),
        Value::from(format!("{connection:x}.{number}").into_bytes()),
        Value::from(&[7u8; 16][..]),
        Value::from("x".repeat(chars)),
        Value::from(1_795_000_000_000_000i64),
    ]
}

/// Connection `c` of `n` writes the dialogs whose number is `c` modulo `n`, so that none waits for
/// another.
async fn insert(
    url: String,
    connection: u64,
    until: Instant,
    rows: usize,
    connections: u64,
    dialogs: u64,
    chars: usize,
) -> anyhow::Result<u64> {
    let mut conn = Conn::from_url(url).await?;
    conn.query_drop("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
        .await?;
    let values = vec!["(?, ?, ?, ?, ?, ?, 'text', ?, ?)"; rows].join(",");
    let sql = format!(
        "INSERT INTO messages (slot, dialog, seq, author, client_key, text_hash, kind, text, created_at) VALUES {values}"
    );
    let statement = conn.prep(sql).await?;
    let (mut inserted, mut number) = (0, 0u64);
    while Instant::now() < until {
        let mut params: Vec<Value> = Vec::with_capacity(rows * 8);
        for _ in 0..rows {
            // A step that is coprime to the number of dialogs visits them all, in no order of
            // theirs.
            let dialog =
                number.wrapping_mul(7919) % (dialogs / connections) * connections + connection;
            number += 1;
            params.extend(row(dialog, number, connection, chars));
        }
        conn.exec_drop(&statement, params).await?;
        inserted += rows as u64;
    }
    Ok(inserted)
}
