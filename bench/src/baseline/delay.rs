//! A slow network before a server: what the server says is passed on a fixed time later, however
//! much is on its way.

use clap::Args;
use std::collections::VecDeque;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep_until};

#[derive(Args)]
pub struct Options {
    /// Where to listen, and the server to pass on to: `127.0.0.1:4406=127.0.0.1:3306`
    #[arg(required = true)]
    servers: Vec<String>,
    /// Milliseconds that each answer takes longer.
    #[arg(long)]
    millis: u64,
}

/// Passes on until the process ends.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let late = Duration::from_millis(options.millis);
    let mut listening = tokio::task::JoinSet::new();
    for server in options.servers {
        let (listen, target) = server
            .split_once('=')
            .ok_or_else(|| anyhow::anyhow!("{server}: LISTEN=SERVER"))?;
        let (listener, target) = (TcpListener::bind(listen).await?, target.to_owned());
        listening.spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, target.clone(), late));
            }
        });
    }
    listening.join_all().await;
    Ok(())
}

async fn carry(client: TcpStream, target: String, late: Duration) -> std::io::Result<()> {
    let server = TcpStream::connect(target).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (mut client_in, client_out) = client.into_split();
    let (server_in, mut server_out) = server.into_split();
    tokio::select! {
        _ = tokio::io::copy(&mut client_in, &mut server_out) => {}
        _ = pass_late(server_in, client_out, late) => {}
    }
    Ok(())
}

async fn pass_late(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    late: Duration,
) -> std::io::Result<()> {
    let mut under_way = VecDeque::<(Instant, Vec<u8>)>::new();
    let mut buffer = vec![0; 65_536];
    loop {
        let next = under_way.front().map(|(due, _)| *due);
        tokio::select! {
            read = from.read(&mut buffer) => match read? {
                0 => return Ok(()),
                n => under_way.push_back((Instant::now() + late, buffer[..n].to_vec())),
            },
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {
                if let Some((_, bytes)) = under_way.pop_front() {
                    to.write_all(&bytes).await?;
                }
            }
        }
    }
}
