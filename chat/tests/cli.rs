//! The command `chat` for a new user: no database, no settings, no secret.

#![allow(missing_docs, clippy::unwrap_used, clippy::wildcard_enum_match_arm)]

use chat_client::{Access, TokenSource};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use testkit::until;

fn chat(data: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_chat"));
    command
        .args(arguments)
        .arg("--embedded")
        .arg("--data")
        .arg(data)
        .env("CHAT__LISTEN", "127.0.0.1:0")
        .env("CHAT__ADMIN_LISTEN", "127.0.0.1:0")
        .env_remove("CHAT__AUTH__SECRET");
    command
}

/// A command that must fail; what it prints to standard error.
fn refusal(command: &mut Command) -> String {
    let (ok, _, error) = text(&command.output().unwrap());
    assert!(!ok && error.lines().count() == 1, "{error}");
    error
}

/// `serve --embedded`, ended with the test.
struct Embedded(Child, String);

impl Embedded {
    fn start(data: &Path) -> Self {
        let mut child = chat(data, &["serve"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let url = line
            .split_whitespace()
            .find(|word| word.starts_with("http"));
        let url = url.unwrap_or_else(|| panic!("no address in {line:?}"));
        Self(child, url.trim_end_matches('/').to_owned())
    }

    async fn post(&self, path: &str, token: Option<&str>, body: Value) -> (u16, Value) {
        let access = Access::new(&self.1, TokenSource::Given(String::new()));
        let request = access.http().post(access.url(path));
        let request = token
            .into_iter()
            .fold(request, |request, token| request.bearer_auth(token));
        let response = request.json(&body).send().await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn text(output: &Output) -> (bool, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (
        output.status.success(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

#[tokio::test]
async fn one_command_serves_from_nothing_and_keeps_what_it_had_over_kill_9() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let server = Embedded::start(&data);
    let (status, minted) = server.post("/v1/dev/token", None, json!({"user": 7})).await;
    assert_eq!(status, 200);
    let token = minted["token"].as_str().unwrap().to_owned();
    let send = json!({"key": "k", "text": "hi"});
    let path = "/v1/dialogs/42/messages";
    let (status, first) = server.post(path, Some(&token), send.clone()).await;
    assert_eq!((status, &first["seq"]), (201, &json!(1)));
    drop(server);

    let server = Embedded::start(&data);
    // The secret was kept too: the token of before is good, and the message is there.
    let (status, again) = server.post(path, Some(&token), send).await;
    assert_eq!((status, again), (200, first));

    // A token from the command line is as good as one from the route.
    let (ok, printed, _) = text(&chat(&data, &["token", "42"]).output().unwrap());
    assert!(ok);
    let (status, answer) = server
        .post(
            "/v1/dialogs/7/messages",
            Some(printed.trim()),
            json!({"key": "k", "text": "ho"}),
        )
        .await;
    assert_eq!((status, &answer["seq"]), (201, &json!(2)), "{answer}");
}

#[tokio::test]
async fn the_files_of_embedded_mode_are_private() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let server = Embedded::start(&data);
    let (_, minted) = server.post("/v1/dev/token", None, json!({"user": 7})).await;
    let token = minted["token"].as_str();
    let send = json!({"key": "k", "text": "hi"});
    server.post("/v1/dialogs/42/messages", token, send).await;
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&data), 0o700);
    let files: Vec<_> = std::fs::read_dir(&data).unwrap().collect();
    assert!(files.len() > 6, "{files:?}");
    for file in files {
        let path = file.unwrap().path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
}

#[tokio::test]
async fn a_folder_is_used_by_one_server_and_commands_that_read_make_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    for arguments in [["token", "7"].as_slice(), &["where", "1", "2"], &["status"]] {
        let error = refusal(&mut chat(&data, arguments));
        assert!(error.contains("start the server once"), "{error}");
    }
    assert!(!data.exists());
    let server = Embedded::start(&data);
    let error = refusal(&mut chat(&data, &["serve"]));
    assert!(
        error.contains("another chat serve --embedded uses"),
        "{error}"
    );
    drop(server);
    drop(Embedded::start(&data));
}

#[tokio::test]
async fn embedded_mode_is_asked_for_on_the_command_line_only_and_takes_no_secret_of_others() {
    let folder = tempfile::tempdir().unwrap();
    for (name, value, expected) in [
        ("CHAT__EMBEDDED", "true", "embedded"),
        (
            "CHAT__AUTH__SECRET",
            "a secret of more than thirty-two bytes",
            "has a secret of its own",
        ),
        (
            "CHAT__NATS__URL",
            "nats://127.0.0.1:4222",
            "is a single instance",
        ),
    ] {
        let error = refusal(chat(folder.path(), &["serve"]).env(name, value));
        assert!(error.contains(expected), "{name}: {error}");
    }
}

#[tokio::test]
async fn a_terminal_that_is_closed_ends_the_server_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Embedded::start(folder.path());
    testkit::process::signal(server.0.id(), "HUP").unwrap();
    let status = until("it ends", async || server.0.try_wait().unwrap()).await;
    assert!(status.success(), "{status}");
}

#[tokio::test]
async fn a_signal_during_the_start_ends_the_server_in_order() {
    let folder = tempfile::tempdir().unwrap();
    // A new service waits for all its shards, and this one is not there.
    let file = folder.path().join("shards.toml");
    let shard = "[[shard]]\nname = \"a\"\nurl = \"mysql://root@127.0.0.1:1/x\"\n";
    std::fs::write(&file, shard).unwrap();
    let mut server = Command::new(env!("CARGO_BIN_EXE_chat"));
    server
        .arg("serve")
        .env("CHAT__LISTEN", "127.0.0.1:0")
        .env("CHAT__ADMIN_LISTEN", "127.0.0.1:0")
        .env("CHAT__SHARDS_FILE", &file)
        .env("CHAT__AUTH__SECRET", testkit::SECRET)
        .stderr(Stdio::null());
    let mut server = Embedded(server.spawn().unwrap(), String::new());
    let status = format!("/proc/{}/status", server.0.id());
    until("it takes SIGTERM", async || {
        let status = std::fs::read_to_string(&status).unwrap();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        let caught = u64::from_str_radix(caught.unwrap().trim(), 16).unwrap();
        (caught & (1 << 14) != 0).then_some(())
    })
    .await;
    testkit::process::signal(server.0.id(), "TERM").unwrap();
    let status = until("it ends", async || server.0.try_wait().unwrap()).await;
    assert!(status.success(), "{status}");
}

#[tokio::test]
async fn where_names_slot_owner_and_wanted_shard() {
    let folder = tempfile::tempdir().unwrap();
    let asked = |data: &Path| text(&chat(data, &["where", "178", "25"]).output().unwrap());
    let (ok, _, error) = asked(folder.path());
    assert!(!ok && error.contains("start the server once"), "{error}");

    drop(Embedded::start(folder.path()));
    let found = until("the file is free again", async || {
        let (ok, found, _) = asked(folder.path());
        ok.then_some(found)
    })
    .await;
    // The same vectors that pin the placement.
    let vectors = include_str!("data/placement.tsv");
    let vector = vectors
        .lines()
        .find(|line| line.starts_with("25_178\t"))
        .unwrap();
    let fields: Vec<&str> = vector.split('\t').collect();
    for line in [
        "dialog 25_178".to_owned(),
        format!("slot   {} of 4096", fields[1]),
        format!("owner  {}", fields[2]),
        format!("target {}", fields[2]),
    ] {
        assert!(found.lines().any(|found| found == line), "{line}: {found}");
    }
}
