//! `chat serve` as a process of its own, as an operator runs it.

use crate::{SECRET, until};
use chat_client::{Access, Api, TokenSource};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

/// A running instance; killed when it is dropped.
pub struct Instance {
    child: Child,
    log: Arc<Mutex<String>>,
    pub url: String,
    pub admin: String,
}

/// Settings of an instance, as CHAT__ variables without the prefix.
pub type Settings<'a> = &'a [(&'a str, &'a str)];

/// A program of the workspace, which cargo builds into the folder above that of the test programs.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test.parent().and_then(Path::parent).unwrap().join(name);
    assert!(program.exists(), "{program:?} is not built");
    program
}

fn command(shards: &Path, settings: Settings<'_>) -> Command {
    let mut command = Command::new(program("chat"));
    command
        .arg("serve")
        .env("CHAT__LISTEN", "127.0.0.1:0")
        .env("CHAT__ADMIN_LISTEN", "127.0.0.1:0")
        .env("CHAT__AUTH__SECRET", SECRET)
        // Tests are faster than users.
        .env("CHAT__LIMITS__REQUESTS_BURST", "1000000")
        .env("CHAT__LIMITS__WORK_PER_SECOND", "1000000")
        .env("CHAT__LIMITS__WORK_BURST", "1000000")
        .env("CHAT__LIMITS__CONNECTS_BURST", "1000000")
        .env("CHAT__SHARDS_FILE", shards)
        .env("CHAT__LOG__FILTER", "info,chat=debug,refinery_core=warn")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    for (name, value) in settings {
        // Faults are no setting: see chat/src/resharding/failpoint.rs.
        match *name {
            "FAULT" => command.env("CHAT_FAILPOINTS", value),
            name => command.env(format!("CHAT__{name}"), value),
        };
    }
    command
}

/// Starts an instance that must refuse to start, and returns its output.
pub fn refusal(shards: &Path, settings: Settings<'_>) -> String {
    let output = command(shards, settings).output().unwrap();
    assert!(!output.status.success(), "it started");
    String::from_utf8(output.stderr).unwrap()
}

impl Instance {
    /// Starts an instance and waits until it serves.
    pub async fn start(shards: &Path, settings: Settings<'_>) -> Self {
        let mut child = command(shards, settings).spawn().unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let (stderr, lines) = (BufReader::new(child.stderr.take().unwrap()), log.clone());
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let mut log = lines.lock().unwrap();
                log.push_str(&line);
                log.push('\n');
            }
        });
        let mut instance = Self {
            child,
            log,
            url: String::new(),
            admin: String::new(),
        };
        let serving = until("the instance serves", async || {
            if let Some(status) = instance.child.try_wait().unwrap() {
                panic!("the instance ended with {status}:\n{}", instance.log());
            }
            instance
                .log()
                .lines()
                .find(|line| line.contains("serving address="))
                .map(str::to_owned)
        })
        .await;
        let value = |name: &str| {
            serving
                .split(&format!("{name}="))
                .nth(1)
                .unwrap()
                .split(' ')
                .next()
                .unwrap()
                .to_owned()
        };
        instance.url = format!("http://{}", value("address"));
        instance.admin = format!("http://{}", value("admin"));
        instance
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// A way in.
    pub fn access(&self) -> Access {
        access(&self.url)
    }

    /// REST as `user`.
    pub async fn api(&self, user: u64) -> Api {
        Api::new(self.access(), user).await.unwrap()
    }

    pub async fn get(&self, url: &str) -> (u16, serde_json::Value) {
        // The first that is made sees to the crypto provider of this process.
        drop(self.access());
        let response = reqwest::get(url).await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }

    pub async fn ready(&self) -> (u16, serde_json::Value) {
        self.get(&format!("{}/readyz", self.url)).await
    }

    /// kill -9.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM.
    pub fn terminate(&self) {
        let status = Command::new("kill")
            .arg(self.child.id().to_string())
            .status()
            .unwrap();
        assert!(status.success());
    }

    /// Whether it was stopped by a signal, and has not been sent on.
    pub fn is_stopped(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        stat.rsplit(") ").next().unwrap().starts_with('T')
    }

    /// SIGCONT.
    pub fn goes_on(&self) {
        let id = self.child.id().to_string();
        let status = Command::new("kill").args(["-s", "CONT", &id]).status();
        assert!(status.unwrap().success());
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> std::process::ExitStatus {
        until("the instance ends", async || self.child.try_wait().unwrap()).await
    }

    /// Bytes of memory that are resident.
    pub fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .unwrap();
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
            * 1024
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the log of {}\n{}", self.url, self.log());
        }
    }
}

/// A way into an instance that is known by its URL.
pub fn access(url: &str) -> Access {
    Access::new(url, TokenSource::Secret(SECRET.to_owned()))
}
