//! One dialog of a million messages moves to another shard while two users write in it and others
//! read it to its first message, over and over. Then the same rows are inserted plainly, for
//! comparison, into the same server.

use crate::service::Service;
use anyhow::{Context, ensure};
use chat_client::{Api, Client};
use clap::Args;
use mysql_async::prelude::Queryable;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

#[derive(Args)]
pub struct Options {
    /// The server.
    #[arg(long, default_value = "target/release/chat")]
    chat: PathBuf,
    /// Where servers, logs and the shards file are put.
    #[arg(long)]
    dir: PathBuf,
    /// Messages in the dialog.
    #[arg(long, default_value_t = 1_000_000)]
    messages: u64,
    /// Without writers and readers.
    #[arg(long)]
    quiet: bool,
    /// The first port; some dozens above it are used.
    #[arg(long, default_value_t = 8600)]
    port: u16,
}

const SHARDS: [(u16, &str); 4] = [(1, ""), (2, ""), (3, ""), (4, "")];

/// Rows in one INSERT: as many as the mover brings over at once.
const ROWS: u64 = 1000;

pub async fn run(options: Options) -> anyhow::Result<()> {
    std::fs::create_dir_all(&options.dir)?;
    let mut service = Service::new(options.chat.clone(), options.dir.clone(), options.port);
    show(&mut service, options.messages, options.quiet).await
}

async fn show(service: &mut Service, messages: u64, quiet: bool) -> anyhow::Result<()> {
    service.start_servers()?;
    service.save(&SHARDS)?;
    service.start_instance(0, "").await?;
    service.start_instance(1, "").await?;
    let place: serde_json::Value = reqwest::get(format!("{}/admin/where/7/42", service.admin(0)))
        .await?
        .json()
        .await?;
    let owner = place["owner"].as_str().context("the slot has no owner")?;
    let (slot, from) = (place["slot"].as_u64().context("no slot")?, owner.to_owned());
    let from_n: u16 = from.trim_start_matches("shard").parse()?;
    let to_n = 1 + from_n % 4;
    fill(service, from_n, slot, messages).await?;
    println!("{messages} messages are in slot {slot} at {from}; its target is shard{to_n} now");

    let done = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = [(7u64, 42u64), (42, 7)]
        .into_iter()
        .filter(|_| !quiet)
        .enumerate()
        .map(|(i, (me, with))| {
            let access = service.access(i as u16);
            let done = done.clone();
            tokio::spawn(async move {
                let (client, mut events) = Client::start(access, me);
                tokio::spawn(async move { while events.recv().await.is_some() {} });
                let (mut sent, mut slowest) = (0u64, Duration::ZERO);
                while !done.load(Ordering::Relaxed) {
                    let begun = Instant::now();
                    let key = format!("live{sent}");
                    client.send(with, key, format!("{me} says {sent}")).await?;
                    slowest = slowest.max(begun.elapsed());
                    sent += 1;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                anyhow::Ok((sent, slowest))
            })
        })
        .collect();
    let read = Arc::new(AtomicU64::new(0));
    let readers: Vec<_> = (0..2u16)
        .filter(|_| !quiet)
        .map(|i| {
            let (access, done, read) = (service.access(i), done.clone(), read.clone());
            tokio::spawn(async move {
                let api = Api::new(access, 7).await?;
                let mut whole = 0;
                'again: loop {
                    // Down to the first message; each page must begin where the last one ended.
                    let mut before = None;
                    loop {
                        if done.load(Ordering::Relaxed) {
                            return anyhow::Ok(whole);
                        }
                        let query: Vec<(&str, u64)> = before
                            .map(|before| ("before", before))
                            .into_iter()
                            .chain([("limit", 200)])
                            .collect();
                        let page = api.history(42, &query).await?;
                        ensure!(!page.gap, "a gap is reported");
                        let dense = page
                            .messages
                            .windows(2)
                            .all(|pair| pair[1].seq == pair[0].seq + 1);
                        let joins = before.is_none_or(|before| page.last + 1 == before);
                        ensure!(dense && joins, "a hole below {before:?}");
                        read.fetch_add(page.messages.len() as u64, Ordering::Relaxed);
                        before = Some(page.first);
                        if !page.more {
                            ensure!(page.first == 1, "it begins with {}", page.first);
                            whole += 1;
                            continue 'again;
                        }
                    }
                }
            })
        })
        .collect();

    tokio::time::sleep(Duration::from_secs(3)).await;
    let edited = Instant::now();
    service.save_with(
        &SHARDS,
        &format!("[[pin]]\ndialog = \"7_42\"\nshard = \"shard{to_n}\"\n"),
    )?;
    let status = loop {
        let status = service.status().await?;
        let moved = service
            .number(
                to_n,
                &format!("SELECT COUNT(*) FROM slots WHERE slot = {slot} AND state = 'owner'"),
            )
            .await?;
        if moved == 1 && status["work"]["slots_moved"] == 1 {
            break status;
        }
        ensure!(
            edited.elapsed() < Duration::from_secs(600),
            "it does not move: {status}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let took = edited.elapsed();
    // Until its rows are gone from where it was.
    while service
        .number(
            from_n,
            &format!("SELECT COUNT(*) FROM messages WHERE slot = {slot}"),
        )
        .await?
        > 0
    {
        ensure!(
            edited.elapsed() < Duration::from_secs(900),
            "it is not purged"
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let purged = edited.elapsed();
    done.store(true, Ordering::Relaxed);
    let (mut sent, mut slowest) = (0, Duration::ZERO);
    for writer in writers {
        let (count, most) = writer.await??;
        (sent, slowest) = (sent + count, slowest.max(most));
    }
    let mut whole = 0;
    for reader in readers {
        whole += reader.await??;
    }
    let there = service
        .number(
            to_n,
            &format!("SELECT COUNT(*) FROM messages WHERE slot = {slot}"),
        )
        .await?;
    ensure!(
        there == messages + sent,
        "{there} messages are there, not {}",
        messages + sent
    );
    let plain = insert_plainly(service, to_n, messages).await?;
    let copied = status["work"]["messages_copied"].as_u64().unwrap_or(0);
    // From the edit on, which is seen within half a second and takes effect first.
    let rate = copied as f64 / took.as_secs_f64();
    let inserted = messages as f64 / plain.as_secs_f64();
    println!(
        "  moved          {copied} messages in {:.1} s from the edit on, purged after {:.1} s",
        took.as_secs_f64(),
        purged.as_secs_f64()
    );
    println!("  frozen         {} ms", status["work"]["freeze_ms"]["max"]);
    println!(
        "  written        {sent} messages meanwhile, the slowest acknowledged after {} ms",
        slowest.as_millis()
    );
    println!(
        "  read           {} messages in pages without a gap, {whole} times down to the first",
        read.load(Ordering::Relaxed)
    );
    println!(
        "  rate           {rate:.0} messages/s moved, {inserted:.0} rows/s inserted plainly, ratio {:.2}",
        rate / inserted
    );
    Ok(())
}

/// Puts the messages where they would be had they been sent.
async fn fill(service: &Service, shard: u16, slot: u64, messages: u64) -> anyhow::Result<()> {
    let mut conn = mysql_async::Conn::from_url(service.database(shard)).await?;
    conn.query_drop(format!(
        "SET SESSION cte_max_recursion_depth = 100000000;
         INSERT INTO dialogs VALUES ({slot}, '7_42', {messages}, 1);
         INSERT INTO members (slot, dialog, user_id, read_seq, joined_at, last_hour) VALUES ({slot}, '7_42', 7, 0, 1, 0), ({slot}, '7_42', 42, 0, 1, 0);
         INSERT INTO messages (slot, dialog, seq, author, client_key, text_hash, kind, text, created_at)
           WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {messages})
           SELECT {slot}, '7_42', i, IF(i % 2, 7, 42), CONCAT('f', i), UNHEX(LPAD(HEX(i), 32, '0')), 'text',
                  CONCAT('This is message ', i, ' of a very long dialog.'), i FROM n"
    ))
    .await?;
    conn.disconnect().await?;
    Ok(())
}

/// The same rows by multi-row INSERTs, each a transaction, into a table of the same form on the
/// same server.
async fn insert_plainly(service: &Service, shard: u16, messages: u64) -> anyhow::Result<Duration> {
    let mut conn = mysql_async::Conn::from_url(service.database(shard)).await?;
    conn.query_drop("CREATE TABLE plainly LIKE messages")
        .await?;
    let begun = Instant::now();
    for first in (1..=messages).step_by(ROWS as usize) {
        let mut sql = String::from(
            "INSERT INTO plainly (slot, dialog, seq, author, client_key, text_hash, kind, text, created_at) VALUES ",
        );
        for i in first..(first + ROWS).min(messages + 1) {
            let comma = if i == first { "" } else { "," };
            let author = if i % 2 == 1 { 7 } else { 42 };
            write!(
                sql,
                "{comma}(1,'7_42',{i},{author},'f{i}',x'{i:032x}','text','This is message {i} of a very long dialog.',{i})"
            )?;
        }
        conn.query_drop(sql).await?;
    }
    let took = begun.elapsed();
    conn.disconnect().await?;
    Ok(took)
}
