//! `chat serve` as a process of its own, as an operator runs it.

use crate::process::Process;
use crate::{SECRET, until};
use chat_client::{Access, Api, TokenSource};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

/// A running instance; killed when it is dropped. Its log is printed if a test fails.
pub struct Instance {
    process: Process,
    log: Arc<Mutex<String>>,
    secret: String,
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
    let mut command = bare_command(settings);
    command
        .env("CHAT__AUTH__SECRET", SECRET)
        .env("CHAT__SHARDS_FILE", shards);
    // Settings that a test gives override these.
    for (name, value) in settings.iter().filter(|(name, _)| *name != "FAULT") {
        command.env(format!("CHAT__{name}"), value);
    }
    command
}

fn bare_command(settings: Settings<'_>) -> Command {
    let mut command = Command::new(program("chat"));
    command
        .arg("serve")
        .env("CHAT__LISTEN", "127.0.0.1:0")
        .env("CHAT__ADMIN_LISTEN", "127.0.0.1:0")
        // Tests are faster than users.
        .env("CHAT__LIMITS__REQUESTS_BURST", "1000000")
        .env("CHAT__LIMITS__WORK_PER_SECOND", "1000000")
        .env("CHAT__LIMITS__WORK_BURST", "1000000")
        .env("CHAT__LIMITS__CONNECTS_BURST", "1000000")
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
        Self::of(command(shards, settings), SECRET.to_owned()).await
    }

    /// Starts `serve --embedded` on a folder, and waits until it serves.
    pub async fn start_embedded(data: &Path, settings: Settings<'_>) -> Self {
        let mut command = bare_command(settings);
        command.arg("--embedded").arg("--data").arg(data);
        let mut instance = Self::of(command, String::new()).await;
        instance.secret = std::fs::read_to_string(data.join("secret")).unwrap();
        instance
    }

    async fn of(mut command: Command, secret: String) -> Self {
        let mut child = command.spawn().unwrap();
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
            process: Process(child),
            log,
            secret,
            url: String::new(),
            admin: String::new(),
        };
        let serving = until("the instance serves", async || {
            if let Some(status) = instance.process.ended().unwrap() {
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

    /// The address of the instance and its secret.
    pub fn access(&self) -> Access {
        Access::new(&self.url, TokenSource::Secret(self.secret.clone()))
    }

    /// REST as `user`.
    pub async fn api(&self, user: u64) -> Api {
        Api::new(self.access(), user).await.unwrap()
    }

    pub async fn get(&self, url: &str) -> (u16, serde_json::Value) {
        // The first one installs the crypto provider of this process.
        drop(self.access());
        let response = reqwest::get(url).await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }

    pub async fn ready(&self) -> (u16, serde_json::Value) {
        self.get(&format!("{}/readyz", self.url)).await
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill().unwrap();
    }

    /// SIGTERM.
    pub fn terminate(&self) {
        self.process.signal("TERM").unwrap();
    }

    /// Whether a signal has stopped it, and it was not continued.
    pub fn is_stopped(&self) -> bool {
        self.process.is_stopped().unwrap()
    }

    /// SIGCONT.
    pub fn continues(&self) {
        self.process.signal("CONT").unwrap();
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> std::process::ExitStatus {
        until("the instance ends", async || self.process.ended().unwrap()).await
    }

    /// Bytes of memory that are resident.
    pub fn resident(&self) -> u64 {
        self.process.resident().unwrap()
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the log of {}\n{}", self.url, self.log());
        }
    }
}

/// The address of an instance and the secret of the tests.
pub fn access(url: &str) -> Access {
    Access::new(url, TokenSource::Secret(SECRET.to_owned()))
}
