//! Ordinary accounts that ask for all they can, at the default limits, while others talk: no
//! circuit breaker opens, the others hardly notice, and the accounts get typed errors.

use crate::baseline::disk::Probe;
use crate::service::Service;
use anyhow::{Context, ensure};
use clap::Args;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use mysql_async::prelude::Queryable;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::net::{TcpSocket, TcpStream};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, client_async};

#[derive(Args)]
pub struct Options {
    /// The server's program.
    #[arg(long, default_value = "target/release/chat")]
    chat: PathBuf,
    /// Where servers keep their data; removed before.
    #[arg(long, default_value = ".dev/attack")]
    dir: PathBuf,
    #[arg(long, default_value_t = 9300)]
    port: u16,
    /// Which: inbox, read, pages, resume, watch, ping; all by default.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Accounts that attack at once.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 4])]
    accounts: Vec<u64>,
    /// How long each attack lasts, and the time before it.
    #[arg(long, default_value_t = 8.0)]
    seconds: f64,
    /// Dialogs of an attacking account.
    #[arg(long, default_value_t = 100_000)]
    dialogs: u64,
    /// Messages of its longest dialog.
    #[arg(long, default_value_t = 300_000)]
    messages: u64,
}

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

const ATTACKS: [&str; 6] = ["inbox", "read", "pages", "resume", "watch", "ping"];

/// The first attacking account; the others follow.
const ATTACKER: u64 = 900_001;

/// The other user of the attacker's long dialog.
pub const COUNTERPART: u64 = 1_000_000;

/// Pairs of users, and how often each of them sends.
const PAIRS: u64 = 20;
const EVERY: Duration = Duration::from_millis(200);

/// Sessions of an attacking account, and requests that each keeps under way.
const SESSIONS: usize = 10;
const WINDOW: usize = 16;

pub async fn run(options: Options) -> anyhow::Result<()> {
    let _ = std::fs::remove_dir_all(&options.dir);
    std::fs::create_dir_all(&options.dir)?;
    let dir = std::fs::canonicalize(&options.dir)?;
    let mut service = Service::new(options.chat.clone(), dir, options.port);
    service.at_default_limits = true;
    for n in 1..=4 {
        service.start_shard(n)?;
    }
    service.start_nats()?;
    service.save(&[(1, ""), (2, ""), (3, ""), (4, "")])?;
    service.start_instance(0, "").await?;
    service.start_instance(1, "").await?;
    let most = options.accounts.iter().max().copied().unwrap_or(1);
    for account in ATTACKER..ATTACKER + most {
        fill(&service, account, options.dialogs, options.messages).await?;
    }
    let mut failed = false;
    for attack in ATTACKS {
        if !options.only.is_empty() && !options.only.iter().any(|only| only == attack) {
            continue;
        }
        for accounts in &options.accounts {
            failed |= !one(&service, attack, *accounts, options.seconds).await?;
        }
    }
    ensure!(!failed, "an attack did what it must not");
    Ok(())
}

/// One attack, beside users who write.
async fn one(service: &Service, attack: &str, accounts: u64, seconds: f64) -> anyhow::Result<bool> {
    let span = Duration::from_secs_f64(seconds);
    let (before, disk_before) = talk(service, span).await?;
    let opened = circuits(service).await?;
    let published = service.metric(0, "chat_bus_published_total").await?;
    let memory = service.resident_mib(0)?.max(service.resident_mib(1)?);
    let over = Arc::new(AtomicBool::new(false));
    let (asked, refused) = (Arc::new(AtomicU64::new(0)), Arc::default());
    let mut attacking = Vec::new();
    for account in ATTACKER..ATTACKER + accounts {
        for session in 0..SESSIONS {
            let mut socket = connect(service, (session % 2) as u16, account).await?;
            let (attack, over) = (attack.to_owned(), over.clone());
            let (asked, refused) = (asked.clone(), Arc::clone(&refused));
            let access = service.access((session % 2) as u16);
            attacking.push(tokio::spawn(async move {
                while !over.load(Ordering::Relaxed) {
                    let (sink, stream) = socket.split();
                    assail(&attack, sink, stream, &over, &asked, &refused).await;
                    // An attacker whose connection is closed connects again.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    loop {
                        match open(&access, account).await {
                            Ok(again) => break socket = again,
                            Err(_) if over.load(Ordering::Relaxed) => return,
                            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
                        }
                    }
                }
            }));
        }
    }
    let (during, disk_during) = talk(service, span).await?;
    let grown = service.resident_mib(0)?.max(service.resident_mib(1)?);
    over.store(true, Ordering::Relaxed);
    for task in attacking {
        let _ = tokio::time::timeout(Duration::from_secs(5), task).await;
    }
    let opened = circuits(service).await? - opened;
    let published = service.metric(0, "chat_bus_published_total").await? - published;
    let ratio = during / before;
    println!(
        "{attack:<7} from {accounts}: others' p99 {before:.1} -> {during:.1} ms ({ratio:.1} x); the disk's {disk_before:.1} -> {disk_during:.1}; circuits opened {opened}; memory {memory:.0} -> {grown:.0} MiB; \
         {} asked, refused {:?}; {:.0}/s on the bus",
        asked.load(Ordering::Relaxed),
        refused
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner),
        published / seconds,
    );
    // What was asked is worked off before the next.
    tokio::time::sleep(Duration::from_secs(3)).await;
    Ok(opened == 0.0)
}

type Refused = Arc<std::sync::Mutex<BTreeMap<String, u64>>>;

/// Asks for as much as a session may have under way, until it is closed or it is over.
async fn assail(
    attack: &str,
    mut sink: SplitSink<Socket, Message>,
    mut stream: SplitStream<Socket>,
    over: &AtomicBool,
    asked: &AtomicU64,
    refused: &Refused,
) {
    let count = |what: String| {
        let mut refused = refused
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        *refused.entry(what).or_default() += 1;
    };
    let mut number = 0u64;
    let mut next = || {
        number += 1;
        let users: Vec<u64> = (1..=500).map(|n| 2_000_000 + n).collect();
        let frame = match attack {
            "inbox" => json!({"type": "inbox", "id": "x", "limit": 100}),
            "read" => json!({"type": "read", "with": COUNTERPART, "seq": number}),
            "pages" => {
                json!({"type": "history", "id": "x", "with": COUNTERPART, "limit": 200, "before": 300_001 - number * 200 % 299_000})
            }
            "resume" => {
                json!({"type": "resume", "id": "x", "positions": {}, "since": "1970-01-01T00:00:00Z"})
            }
            "watch" if number.is_multiple_of(2) => json!({"type": "watch", "users": users}),
            "watch" => json!({"type": "unwatch", "users": users}),
            _ => return Message::Ping(vec![0; 8].into()),
        };
        Message::text(frame.to_string())
    };
    let answers = !matches!(attack, "watch" | "ping");
    for _ in 0..WINDOW {
        asked.fetch_add(1, Ordering::Relaxed);
        if sink.send(next()).await.is_err() {
            return;
        }
    }
    while !over.load(Ordering::Relaxed) {
        if answers {
            match tokio::time::timeout(Duration::from_secs(2), stream.next()).await {
                Ok(Some(Ok(Message::Text(text)))) => {
                    let frame: Value = serde_json::from_str(&text).unwrap_or_default();
                    if frame["type"] == "error" {
                        count(frame["code"].as_str().unwrap_or("?").to_owned());
                        // A session that continues at once would be closed for its frames; this
                        // attack is about the work at the shards.
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
                Ok(Some(Ok(Message::Close(close)))) => {
                    return count(format!(
                        "closed {}",
                        close.map_or(0, |close| close.code.into())
                    ));
                }
                Ok(Some(Ok(_))) | Err(_) => {}
                Ok(_) => return,
            }
        } else {
            while let Ok(Some(Ok(frame))) =
                tokio::time::timeout(Duration::from_millis(1), stream.next()).await
            {
                match frame {
                    Message::Close(close) => {
                        return count(format!(
                            "closed {}",
                            close.map_or(0, |close| close.code.into())
                        ));
                    }
                    Message::Text(text) if text.contains("\"error\"") => {
                        let frame: Value = serde_json::from_str(&text).unwrap_or_default();
                        count(frame["code"].as_str().unwrap_or("?").to_owned());
                    }
                    Message::Text(_)
                    | Message::Binary(_)
                    | Message::Ping(_)
                    | Message::Pong(_)
                    | Message::Frame(_) => {}
                }
            }
            if attack == "watch" {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        asked.fetch_add(1, Ordering::Relaxed);
        if sink.send(next()).await.is_err() {
            return;
        }
    }
}

async fn circuits(service: &Service) -> anyhow::Result<f64> {
    let mut opened = 0.0;
    for i in 0..2 {
        for n in 1..=4 {
            let name = format!("chat_circuit_opened_total{{shard=\"shard{n}\"}}");
            opened += service.metric(i, &name).await?;
        }
    }
    Ok(opened)
}

/// Pairs talk, each on two instances; the 99th percentile of the way of a message, and of a durable
/// write meanwhile, in milliseconds.
async fn talk(service: &Service, span: Duration) -> anyhow::Result<(f64, f64)> {
    let disk = Probe::start(service.folder())?;
    let mut talking = Vec::new();
    for pair in 0..PAIRS {
        let (me, with) = (10 + 2 * pair, 11 + 2 * pair);
        let mut mine = connect(service, 0, me).await?;
        let mut theirs = connect(service, 1, with).await?;
        talking.push(tokio::spawn(async move {
            let (begun, mut took) = (Instant::now(), Vec::new());
            let run = format!(
                "{:x}",
                std::process::id() as u128 + begun.elapsed().as_nanos()
            );
            tokio::time::sleep(EVERY * pair as u32 / PAIRS as u32).await;
            for n in 0.. {
                if begun.elapsed() > span {
                    break;
                }
                let stamp = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
                let key = format!("{run}.{}.{n}", stamp.as_nanos());
                let sent = Instant::now();
                let frame = json!({"type": "send", "key": key, "to": with, "text": "hello"});
                mine.send(Message::text(frame.to_string())).await?;
                let received = async {
                    while let Some(frame) = theirs.next().await {
                        if frame?.to_text().is_ok_and(|text| text.contains(&key)) {
                            return Ok(());
                        }
                    }
                    anyhow::bail!("closed")
                };
                if tokio::time::timeout(Duration::from_secs(20), received)
                    .await
                    .is_err()
                {
                    let mut frames = Vec::new();
                    while let Ok(Some(Ok(frame))) =
                        tokio::time::timeout(Duration::ZERO, mine.next()).await
                    {
                        frames.push(frame.to_string());
                    }
                    anyhow::bail!("message {n} of {me} did not arrive; {me} received {frames:?}");
                }
                took.push(sent.elapsed());
                // The own answers are read, too.
                while let Ok(Some(_)) = tokio::time::timeout(Duration::ZERO, mine.next()).await {}
                tokio::time::sleep(EVERY.saturating_sub(sent.elapsed())).await;
            }
            anyhow::Ok(took)
        }));
    }
    let mut all = Vec::new();
    for pair in talking {
        all.extend(pair.await??);
    }
    all.sort_unstable();
    Ok((
        all[all.len() * 99 / 100].as_secs_f64() * 1000.0,
        disk.p99()?,
    ))
}

async fn connect(service: &Service, i: u16, user: u64) -> anyhow::Result<Socket> {
    open(&service.access(i), user).await
}

/// A session from an address of its own: what is refused to an account's address is not refused to
/// others.
async fn open(access: &chat_client::Access, user: u64) -> anyhow::Result<Socket> {
    let mut request = access.socket_url().into_client_request()?;
    let token = format!("Bearer {}", access.token(user).await?);
    request
        .headers_mut()
        .insert("authorization", token.parse()?);
    let host = request.uri().authority().context("no host")?.to_string();
    let line = TcpSocket::new_v4()?;
    line.bind(([127, 0, (user >> 8 & 255) as u8, (user & 255) as u8], 0).into())?;
    let line = line.connect(host.parse()?).await?;
    line.set_nodelay(true)?;
    let (mut socket, _) = client_async(request, MaybeTlsStream::Plain(line)).await?;
    let first = socket.next().await.context("closed")??;
    ensure!(first.to_text()?.contains("welcome"), "{first}");
    Ok(socket)
}

/// A message's key, in hexadecimal.
fn key(number: u64) -> String {
    format!("k{number}")
        .bytes()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Gives an account many dialogs, spread over the past year, and one long one; straight into the
/// shards' tables.
pub async fn fill(
    service: &Service,
    account: u64,
    dialogs: u64,
    messages: u64,
) -> anyhow::Result<()> {
    let hour = 3_600_000_000u64;
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)?
        .as_micros() as u64;
    let mut by_shard: BTreeMap<u16, Vec<(u64, u16)>> = BTreeMap::new();
    let mut owners = BTreeMap::new();
    for shard in 1..=4u16 {
        let mut conn = mysql_async::Conn::from_url(service.database(shard)).await?;
        let owned: Vec<u16> = conn
            .query("SELECT slot FROM slots WHERE state = 'owner'")
            .await?;
        owners.extend(owned.into_iter().map(|slot| (slot, shard)));
        conn.disconnect().await?;
    }
    for n in 0..dialogs {
        let with = COUNTERPART + n;
        let slot = chat::domain::slot::Slot::of(format!("{account}_{with}").parse()?).get();
        by_shard
            .entry(*owners.get(&slot).context("no owner")?)
            .or_default()
            .push((n, slot));
    }
    for (shard, dialogs) in by_shard {
        let mut conn = mysql_async::Conn::from_url(service.database(shard)).await?;
        for part in dialogs.chunks(1000) {
            let (mut rows, mut members, mut texts) = (Vec::new(), Vec::new(), Vec::new());
            for (n, slot) in part {
                let (with, at) = (COUNTERPART + n, now - n * hour / 12);
                let name = format!("{account}_{with}");
                let last = if *n == 0 { messages } else { 1 };
                rows.push(format!("({slot},'{name}',{last},{at})"));
                for user in [account, with] {
                    members.push(format!("({slot},'{name}',{user},0,{at},{})", at / hour));
                }
                if *n > 0 {
                    texts.push(format!("({slot},'{name}',1,{with},x'{}',x'07070707070707070707070707070707','text','hello there',{at})", key(*n)));
                }
            }
            conn.query_drop(format!("INSERT INTO dialogs VALUES {}", rows.join(",")))
                .await?;
            conn.query_drop(format!("INSERT INTO members (slot, dialog, user_id, read_seq, joined_at, last_hour) VALUES {}", members.join(","))).await?;
            if !texts.is_empty() {
                conn.query_drop(format!("INSERT INTO messages (slot, dialog, seq, author, client_key, text_hash, kind, text, created_at) VALUES {}", texts.join(","))).await?;
            }
        }
        if let Some((_, slot)) = dialogs.iter().find(|(n, _)| *n == 0) {
            let name = format!("{account}_{COUNTERPART}");
            for from in (1..=messages).step_by(2000) {
                let rows: Vec<String> = (from..(from + 2000).min(messages + 1))
                    .map(|seq| format!("({slot},'{name}',{seq},{COUNTERPART},x'{}',x'07070707070707070707070707070707','text','hello there, this is a text',{now})", key(seq)))
                    .collect();
                conn.query_drop(format!("INSERT INTO messages (slot, dialog, seq, author, client_key, text_hash, kind, text, created_at) VALUES {}", rows.join(","))).await?;
            }
        }
        conn.disconnect().await?;
    }
    Ok(())
}
