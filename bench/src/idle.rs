//! What an idle session costs a process in memory, and what is left when all have gone.

use chat_client::{Access, TokenSource};
use clap::Args;
use futures_util::StreamExt;
use std::time::Duration;
use testkit::process::resident;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

#[derive(Args)]
pub struct Options {
    /// http://host:port
    url: String,
    /// The process that serves it.
    pid: u32,
    /// The service's secret; without one no token is sent.
    #[arg(long, env = "CHAT_SECRET", hide_env_values = true)]
    secret: Option<String>,
    #[arg(long, default_value_t = 5000)]
    sessions: u64,
    /// How long to wait before measuring, in seconds.
    #[arg(long, default_value_t = 3)]
    settle_seconds: u64,
    /// How long after they have gone, in seconds.
    #[arg(long, default_value_t = 20)]
    rest_seconds: u64,
}

/// Sessions of the first, small crowd.
const WARM_UP: u64 = 100;

pub async fn run(options: Options) -> anyhow::Result<()> {
    // What a process needs once, for its first sessions, is not what a session costs: code that is
    // loaded, tables that are made.
    drop(sit(&options, WARM_UP).await?);
    let rest = Duration::from_secs(options.rest_seconds);
    tokio::time::sleep(rest).await;
    let before = resident(options.pid)?;
    let sockets = sit(&options, options.sessions).await?;
    tokio::time::sleep(Duration::from_secs(options.settle_seconds)).await;
    let after = resident(options.pid)?;
    drop(sockets);
    tokio::time::sleep(rest).await;
    let left = resident(options.pid)?;
    println!(
        "{:.1} {:.2}",
        (after - before) as f64 / options.sessions as f64 / 1024.0,
        left as f64 / before as f64
    );
    Ok(())
}

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// Opens that many sessions, each of its own user, which then do nothing.
async fn sit(options: &Options, sessions: u64) -> anyhow::Result<Vec<Socket>> {
    let access = Access::new(
        &options.url,
        TokenSource::Secret(options.secret.clone().unwrap_or_default()),
    );
    let mut sockets = Vec::new();
    for user in 1..=sessions {
        let mut request = access.socket_url().into_client_request()?;
        if options.secret.is_some() {
            request.headers_mut().insert(
                "authorization",
                format!("Bearer {}", access.token(user).await?).parse()?,
            );
        }
        let (mut socket, _) = tokio_tungstenite::connect_async(request).await?;
        if options.secret.is_some() {
            socket
                .next()
                .await
                .ok_or_else(|| anyhow::anyhow!("closed"))??;
        }
        sockets.push(socket);
    }
    Ok(sockets)
}
