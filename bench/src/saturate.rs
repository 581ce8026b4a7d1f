//! The most that the service carries: every user keeps a number of sends under way. Lean, because
//! on a small machine what the generator takes is missing elsewhere; latencies are for `chat-client
//! load`, which sends at a steady rate.

use anyhow::{Context, bail, ensure};
use chat_client::{Access, TokenSource};
use clap::Args;
use futures_util::{SinkExt, StreamExt};
use serde::Deserialize;
use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::sync::Barrier;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

#[derive(Args)]
pub struct Options {
    /// Instances, as http://host:port
    #[arg(long, required = true, value_delimiter = ',')]
    url: Vec<String>,
    /// The service's secret.
    #[arg(long, env = "CHAT_SECRET", hide_env_values = true)]
    secret: String,
    #[arg(long, default_value_t = 200)]
    users: u64,
    /// Sends that each user keeps under way.
    #[arg(long, default_value_t = 64)]
    window: u64,
    /// Messages altogether.
    #[arg(long, default_value_t = 250_000)]
    messages: u64,
    /// Other users that each writes to.
    #[arg(long, default_value_t = 25)]
    peers: u64,
    /// Characters of a text.
    #[arg(long, default_value_t = 100)]
    chars: usize,
    /// Rows a second of `plain` in the same run, to print the ratio.
    #[arg(long)]
    plain: Option<f64>,
}

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// What the users of a run share.
struct Run {
    id: u64,
    options: Options,
    /// For each message, whether it has arrived: one that arrives twice counts once.
    arrived: Vec<AtomicBool>,
    delivered: AtomicU64,
    acknowledged: AtomicU64,
    /// Milliseconds after the start at which the last answer came.
    acknowledged_by: AtomicU64,
    start: Barrier,
}

/// What is read of a frame; the rest is passed over.
#[derive(Deserialize)]
struct Head<'a> {
    #[serde(rename = "type", borrow)]
    kind: Cow<'a, str>,
    #[serde(default, borrow)]
    key: Option<Cow<'a, str>>,
    #[serde(default)]
    from: u64,
}

/// Without a frame for so long, something is lost.
const PATIENCE: Duration = Duration::from_secs(20);

pub async fn run(options: Options) -> anyhow::Result<()> {
    let (users, messages) = (
        options.users,
        options.messages / options.users * options.users,
    );
    let run = Arc::new(Run {
        id: std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)?
            .as_micros() as u64,
        arrived: (0..messages).map(|_| AtomicBool::new(false)).collect(),
        delivered: AtomicU64::new(0),
        acknowledged: AtomicU64::new(0),
        acknowledged_by: AtomicU64::new(0),
        start: Barrier::new(users as usize + 1),
        options,
    });
    let mut tasks = tokio::task::JoinSet::new();
    for user in 1..=users {
        let socket = connect(&run, user).await?;
        tasks.spawn(talk(run.clone(), user, socket));
    }
    run.start.wait().await;
    let begun = Instant::now();
    // The first failure has the cause; the others only miss messages.
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    let delivered = messages as f64 / begun.elapsed().as_secs_f64();
    let acknowledged =
        messages as f64 / (run.acknowledged_by.load(Ordering::Relaxed) as f64 / 1000.0);
    println!("messages     {messages:>8}");
    match run.options.plain {
        Some(plain) => {
            println!("plain INSERT {plain:>8.0} rows/s");
            println!(
                "acknowledged {acknowledged:>8.0} messages/s   ratio {:.2}",
                acknowledged / plain
            );
            println!(
                "delivered    {delivered:>8.0} messages/s   ratio {:.2}",
                delivered / plain
            );
        }
        None => {
            println!("acknowledged {acknowledged:>8.0} messages/s");
            println!("delivered    {delivered:>8.0} messages/s");
        }
    }
    Ok(())
}

async fn connect(run: &Run, user: u64) -> anyhow::Result<Socket> {
    let url = &run.options.url[user as usize % run.options.url.len()];
    let access = Access::new(url, TokenSource::Secret(run.options.secret.clone()));
    let mut request = access.socket_url().into_client_request()?;
    request.headers_mut().insert(
        "authorization",
        format!("Bearer {}", access.token(user).await?).parse()?,
    );
    let config = WebSocketConfig::default().read_buffer_size(16_384);
    let (mut socket, _) =
        tokio_tungstenite::connect_async_with_config(request, Some(config), true).await?;
    let welcome = socket.next().await.context("closed")??;
    ensure!(
        welcome.to_text()?.contains("\"welcome\""),
        "no welcome, but {welcome}"
    );
    Ok(socket)
}

async fn talk(run: Arc<Run>, user: u64, mut socket: Socket) -> anyhow::Result<()> {
    let options = &run.options;
    let mine = options.messages / options.users;
    let (mut sent, mut acknowledged) = (0, 0);
    let text = "a text of ordinary words ".repeat(options.chars / 25 + 1);
    let text = &text[..options.chars];
    run.start.wait().await;
    let begun = Instant::now();
    while acknowledged < mine || run.delivered.load(Ordering::Relaxed) < run.arrived.len() as u64 {
        let mut fed = false;
        while sent < mine && sent - acknowledged < options.window {
            let number = (user - 1) * mine + sent;
            // The peers follow the user in a circle, so both users of every dialog write.
            let to = (user + sent % options.peers) % options.users + 1;
            let frame = format!(
                "{{\"type\":\"send\",\"key\":\"{:x}.{number}\",\"to\":{to},\"text\":\"{text}\"}}",
                run.id
            );
            socket.feed(Message::Text(frame.into())).await?;
            sent += 1;
            fed = true;
        }
        if fed {
            socket.flush().await?;
        }
        // Others may still wait for the last deliveries when nothing more comes for us.
        let Ok(frame) = timeout(
            if acknowledged < mine {
                PATIENCE
            } else {
                Duration::from_millis(100)
            },
            socket.next(),
        )
        .await
        else {
            ensure!(
                acknowledged == mine,
                "user {user}: {} sends have no answer",
                mine - acknowledged
            );
            ensure!(
                begun.elapsed() < 10 * PATIENCE,
                "messages were acknowledged and not delivered"
            );
            continue;
        };
        let frame = frame.context("closed")??;
        let Message::Text(frame) = frame else {
            continue;
        };
        let head: Head<'_> = serde_json::from_str(&frame)?;
        match &*head.kind {
            "sent" => {
                acknowledged += 1;
                if run.acknowledged.fetch_add(1, Ordering::Relaxed) + 1 == run.arrived.len() as u64
                {
                    run.acknowledged_by
                        .store(begun.elapsed().as_millis() as u64, Ordering::Relaxed);
                }
            }
            "message" if head.from != user => {
                let number = head
                    .key
                    .as_deref()
                    .and_then(|key| key.split_once('.'))
                    .context("a key that is not ours")?
                    .1;
                if !run.arrived[number.parse::<usize>()?].swap(true, Ordering::Relaxed) {
                    run.delivered.fetch_add(1, Ordering::Relaxed);
                }
            }
            "message" => {}
            _ => bail!("{frame}"),
        }
    }
    Ok(())
}
