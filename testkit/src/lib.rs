//! The base of tests and benches: fresh databases on real servers, instances as processes, proxies
//! that break connections, a shard in memory.
//!
//! `./test` starts the servers and sets their addresses; a test that misses one fails.

#![allow(
    missing_docs,
    clippy::missing_errors_doc,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::wildcard_enum_match_arm
)]

pub mod process;

pub mod ca;
pub mod fuzz;
pub mod help;
pub mod instance;
pub mod lossy;
pub mod memory;
pub mod proxy;
pub mod service;
pub mod socket;

use mysql_async::prelude::Queryable;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The secret of all test instances.
pub const SECRET: &str = "a secret for tests, of more than 32 bytes";

/// Which database a test runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Sqlite,
    Mysql,
    Mariadb,
    Memory,
}

/// A place for one test's shards, gone with it.
pub struct Databases {
    pub kind: Kind,
    directory: tempfile::TempDir,
    server: Option<String>,
    names: Vec<String>,
    /// Of [`Kind::Memory`], one for each name.
    pub memory: Vec<std::sync::Arc<memory::Server>>,
}

fn server_url(kind: Kind) -> Option<String> {
    let variable = match kind {
        Kind::Sqlite | Kind::Memory => return None,
        Kind::Mysql => "CHAT_TEST_MYSQL",
        Kind::Mariadb => "CHAT_TEST_MARIADB",
    };
    let url = std::env::var(variable);
    Some(url.unwrap_or_else(|_| {
        panic!("{variable} is not set: run the tests with ./test, which starts the servers")
    }))
}

/// The seed of a test: `CHAT_SEED`, or else a random one. It is printed if the test fails.
pub fn seed() -> u64 {
    let given = std::env::var("CHAT_SEED");
    let seed = given.map_or_else(
        |_| rand::random::<u32>().into(),
        |seed| seed.parse().expect("CHAT_SEED is a number"),
    );
    println!("to repeat this: CHAT_SEED={seed}");
    seed
}

/// The seeds of a test: a seed or `FROM..TO` in the environment variable, or else `number` of them
/// from a random one on.
pub fn seeds(variable: &str, number: u64) -> std::ops::Range<u64> {
    let Ok(text) = std::env::var(variable) else {
        let first = u64::from(rand::random::<u32>());
        return first..first + number;
    };
    let seed = |text: &str| match text.parse::<u64>() {
        Ok(seed) => seed,
        Err(_) => panic!("{variable} is a seed or FROM..TO"),
    };
    match text.split_once("..") {
        Some((from, to)) => seed(from)..seed(to),
        None => seed(&text)..seed(&text) + 1,
    }
}

/// `nats://…` of the NATS that `./test` started.
pub fn nats_url() -> String {
    std::env::var("CHAT_TEST_NATS")
        .expect("CHAT_TEST_NATS is not set: run the tests with ./test, which starts the servers")
}

impl Databases {
    pub async fn new(kind: Kind, count: usize) -> Self {
        let server = server_url(kind);
        let mut databases = Self {
            kind,
            directory: tempfile::tempdir().unwrap(),
            server,
            names: Vec::new(),
            memory: Vec::new(),
        };
        for _ in 0..count {
            databases.add().await;
        }
        databases
    }

    /// One more empty database.
    pub async fn add(&mut self) -> usize {
        let name = format!("t_{:016x}", rand::random::<u64>());
        if let Some(server) = &self.server {
            execute(server, &format!("CREATE DATABASE {name}")).await;
        }
        self.names.push(name);
        self.memory.push(memory::Server::new());
        self.names.len() - 1
    }

    /// The URL of the database with index `i`.
    pub fn url(&self, i: usize) -> String {
        match &self.server {
            Some(server) => format!("{server}/{}", self.names[i]),
            None => format!(
                "sqlite:{}",
                self.directory.path().join(&self.names[i]).display()
            ),
        }
    }

    /// The same through a proxy on `port`.
    pub fn url_through(&self, i: usize, port: u16) -> String {
        format!("mysql://root@127.0.0.1:{port}/{}", self.names[i])
    }

    pub fn directory(&self) -> PathBuf {
        self.directory.path().to_owned()
    }

    /// A shards.toml with all of them, named shard1, shard2, …
    pub fn shards_file(&self) -> PathBuf {
        self.shards_file_with(
            &(0..self.names.len())
                .map(|i| self.url(i))
                .collect::<Vec<_>>(),
        )
    }

    /// A shards.toml with these URLs, named shard1, shard2, …
    pub fn shards_file_with(&self, urls: &[String]) -> PathBuf {
        let path = self
            .directory
            .path()
            .join(format!("shards-{:x}.toml", rand::random::<u32>()));
        let text: String = urls
            .iter()
            .enumerate()
            .map(|(i, url)| format!("[[shard]]\nname = \"shard{}\"\nurl = \"{url}\"\n", i + 1))
            .collect();
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Runs a statement in a database, whichever it is.
    pub async fn execute(&self, i: usize, sql: &str) {
        if self.kind == Kind::Sqlite {
            let path = self.directory.path().join(&self.names[i]);
            let conn = rusqlite::Connection::open(path).unwrap();
            return conn.execute_batch(sql).unwrap();
        }
        execute(&self.url(i), sql).await;
    }

    /// A number out of a database, whichever it is.
    pub async fn number(&self, i: usize, sql: &str) -> i64 {
        if self.kind == Kind::Sqlite {
            let path = self.directory.path().join(&self.names[i]);
            return rusqlite::Connection::open(path)
                .unwrap()
                .query_row(sql, [], |row| row.get(0))
                .unwrap();
        }
        let mut conn = mysql_async::Conn::from_url(self.url(i)).await.unwrap();
        let number = conn.query_first::<i64, _>(sql).await.unwrap().unwrap();
        conn.disconnect().await.unwrap();
        number
    }

    /// The sum of a number over all databases.
    pub async fn total(&self, sql: &str) -> i64 {
        let mut total = 0;
        for i in 0..self.names.len() {
            total += self.number(i, sql).await;
        }
        total
    }
}

async fn execute(url: &str, sql: &str) {
    let mut conn = mysql_async::Conn::from_url(url).await.unwrap();
    conn.query_drop(sql).await.unwrap();
    conn.disconnect().await.unwrap();
}

impl Drop for Databases {
    fn drop(&mut self) {
        let (Some(server), names) = (self.server.clone(), std::mem::take(&mut self.names)) else {
            return;
        };
        // Dropped inside and outside of runtimes: a thread of its own has one.
        let dropped = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                for name in names {
                    execute(&server, &format!("DROP DATABASE {name}")).await;
                }
            });
        });
        let _ = dropped.join();
    }
}

/// How long a test waits for a condition before it fails.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A port that nothing listens on now.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Waits until `condition` gives something.
pub async fn until<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = condition().await {
            return found;
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "not within {PATIENCE:?}: {what}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
