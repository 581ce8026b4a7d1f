//! A TCP proxy between an instance and a database, which breaks on command.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What happens to the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// They pass.
    Pass,
    /// Connections are accepted, and nothing passes in either direction.
    Hang,
    /// The client's bytes pass; the server's wait.
    HangReplies,
    /// As `Pass` for connections that were there before; on new ones nothing passes.
    HangNew,
    /// Whatever the server says comes 300 ms late, and every hundredth time two seconds.
    Slow,
    /// Connections are closed, and none is accepted.
    Cut,
    /// The client's bytes pass; after a COMMIT the connection is cut before the answer.
    CutReplyToCommit,
    /// The client's bytes pass; after a COMMIT no answer comes back.
    SwallowReplyToCommit,
}

#[derive(Clone)]
pub struct Proxy {
    pub port: u16,
    mode: Arc<watch::Sender<Mode>>,
    /// How many times all connections were cut.
    cuts: Arc<watch::Sender<u64>>,
    commits: Arc<AtomicU64>,
    answers: Arc<AtomicU64>,
    connections: Arc<AtomicU64>,
}

impl Proxy {
    pub async fn to(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Self {
            port: listener.local_addr().unwrap().port(),
            mode: Arc::new(watch::Sender::new(Mode::Pass)),
            cuts: Arc::default(),
            commits: Arc::default(),
            answers: Arc::default(),
            connections: Arc::default(),
        };
        let accepting = proxy.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let mode = *accepting.mode.borrow();
                accepting.connections.fetch_add(1, Ordering::SeqCst);
                if mode == Mode::HangNew {
                    tokio::spawn(accepting.clone().hold(client));
                } else if mode != Mode::Cut {
                    tokio::spawn(accepting.clone().carry(client, target.clone()));
                }
            }
        });
        proxy
    }

    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }

    /// Closes the connections that there are; bytes pass on new ones.
    pub fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
        self.set(Mode::Pass);
    }

    /// How many times a client's COMMIT has passed while its answer was withheld.
    pub fn commits_withheld(&self) -> u64 {
        self.commits.load(Ordering::SeqCst)
    }

    /// How many connections were made.
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::SeqCst)
    }

    /// Keeps a connection open, and says nothing, until the mode is another.
    async fn hold(self, _client: TcpStream) {
        let mut mode = self.mode.subscribe();
        let _ = mode.wait_for(|mode| *mode != Mode::HangNew).await;
    }

    async fn carry(self, client: TcpStream, target: String) {
        let mut cuts = self.cuts.subscribe();
        let Ok(server) = TcpStream::connect(target).await else {
            return;
        };
        let (mut client_in, mut client_out) = client.into_split();
        let (mut server_in, mut server_out) = server.into_split();
        let committing = AtomicBool::new(false);
        let upwards = async {
            let mut buffer = vec![0; 65_536];
            let mut tail = Vec::new();
            while let Ok(n @ 1..) = client_in.read(&mut buffer).await {
                self.passing(&[Mode::Hang]).await;
                // The word may be cut in two.
                tail.extend_from_slice(&buffer[..n]);
                let says = |what: &[u8]| tail.windows(what.len()).any(|window| window == what);
                let commits_text = says(b"; COMMIT") && says(b"INSERT INTO m");
                let stores = commits_text || says(b"CALL append_");
                tail.drain(..tail.len().saturating_sub(14));
                let withhold = matches!(
                    *self.mode.borrow(),
                    Mode::CutReplyToCommit | Mode::SwallowReplyToCommit
                );
                if stores && withhold {
                    committing.store(true, Ordering::SeqCst);
                }
                if server_out.write_all(&buffer[..n]).await.is_err() {
                    break;
                }
            }
        };
        let downwards = async {
            let mut buffer = vec![0; 65_536];
            while let Ok(n @ 1..) = server_in.read(&mut buffer).await {
                self.passing(&[Mode::Hang, Mode::HangReplies]).await;
                if committing.load(Ordering::SeqCst) {
                    // The answer is here, so the commit is done.
                    self.commits.fetch_add(1, Ordering::SeqCst);
                    if *self.mode.borrow() == Mode::CutReplyToCommit {
                        break;
                    }
                    std::future::pending::<()>().await;
                }
                if *self.mode.borrow() == Mode::Slow {
                    let count = self.answers.fetch_add(1, Ordering::Relaxed);
                    let millis = if count % 100 == 99 { 2000 } else { 300 };
                    tokio::time::sleep(Duration::from_millis(millis)).await;
                }
                if client_out.write_all(&buffer[..n]).await.is_err() {
                    break;
                }
            }
        };
        let mut mode = self.mode.subscribe();
        tokio::select! {
            // First: bytes that waited do not pass before the cut.
            biased;
            _ = cuts.changed() => {}
            () = upwards => {}
            () = downwards => {}
            _ = mode.wait_for(|mode| *mode == Mode::Cut) => {}
        }
    }

    async fn passing(&self, hanging: &[Mode]) {
        let mut mode = self.mode.subscribe();
        let _ = mode.wait_for(|mode| !hanging.contains(mode)).await;
    }
}
