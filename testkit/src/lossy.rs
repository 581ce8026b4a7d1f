//! A proxy in front of a NATS server that loses chosen messages: the bus promises nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// Whether a message of this subject with this payload is lost on its way to the client.
pub type Loses = Arc<dyn Fn(&str, &[u8]) -> bool + Send + Sync>;

/// The proxy; it ends with the runtime.
#[derive(Clone)]
pub struct Lossy {
    pub url: String,
    lost: Arc<AtomicU64>,
    passed: Arc<AtomicU64>,
}

impl Lossy {
    /// In front of `nats://host:port`.
    pub async fn to(nats: &str, loses: Loses) -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let lossy = Self {
            url: format!("nats://{}", listener.local_addr()?),
            lost: Arc::default(),
            passed: Arc::default(),
        };
        let (counts, target) = (lossy.clone(), nats.trim_start_matches("nats://").to_owned());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (counts, target, loses) = (counts.clone(), target.clone(), loses.clone());
                // A connection that breaks ends its carrier, and nothing else is needed.
                tokio::spawn(async move { counts.carry(client, &target, loses).await.err() });
            }
        });
        Ok(lossy)
    }

    /// How many messages were lost, and how many were not.
    pub fn counts(&self) -> (u64, u64) {
        let [lost, passed] = [&self.lost, &self.passed].map(|count| count.load(Ordering::Relaxed));
        (lost, passed)
    }

    async fn carry(&self, client: TcpStream, target: &str, loses: Loses) -> std::io::Result<()> {
        let server = TcpStream::connect(target).await?;
        let (mut client_in, mut client_out) = client.into_split();
        let (server_in, mut server_out) = server.into_split();
        let up = async move {
            tokio::io::copy(&mut client_in, &mut server_out).await?;
            Ok(())
        };
        let down = async move {
            let mut server_in = BufReader::new(server_in);
            let mut line = Vec::new();
            loop {
                line.clear();
                if server_in.read_until(b'\n', &mut line).await? == 0 {
                    return Ok(());
                }
                let text = String::from_utf8_lossy(&line).into_owned();
                let words: Vec<&str> = text.split_whitespace().collect();
                // MSG subject sid [reply] bytes, and HMSG, whose payload begins with headers.
                let Some(&"MSG" | &"HMSG") = words.first() else {
                    client_out.write_all(&line).await?;
                    continue;
                };
                let bytes = words.last().and_then(|bytes| bytes.parse::<usize>().ok());
                let bytes = bytes.ok_or_else(|| std::io::Error::other("not NATS"))?;
                let mut payload = vec![0; bytes + 2];
                server_in.read_exact(&mut payload).await?;
                if loses(words[1], &payload[..bytes]) {
                    self.lost.fetch_add(1, Ordering::Relaxed);
                } else {
                    self.passed.fetch_add(1, Ordering::Relaxed);
                    client_out.write_all(&line).await?;
                    client_out.write_all(&payload).await?;
                }
            }
        };
        tokio::select! {
            ended = up => ended,
            ended = down => ended,
        }
    }
}
