//! The command `chat-client`, as a user and a script run it: closed pipes, absurd numbers, wrong
//! tokens, no server.

#![allow(missing_docs, clippy::unwrap_used)]

use chat_client::{Access, Api, TokenSource};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};
use testkit::instance::Instance;
use testkit::{Databases, Kind, SECRET};

fn client(url: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_chat-client"));
    command
        .args(arguments)
        .args(["--url", url])
        .env_remove("CHAT_TOKEN")
        .env("CHAT_SECRET", SECRET);
    command
}

/// The exit code, standard output and standard error.
fn run(command: &mut Command) -> (Option<i32>, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

/// Standard error of a command that must fail in one line, without a panic.
fn refusal(command: &mut Command) -> String {
    let (code, _, error) = run(command);
    assert_eq!(code, Some(1), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    error
}

async fn service() -> (Databases, Instance) {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    let instance = Instance::start(&databases.shards_file(), &[]).await;
    (databases, instance)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_pipe_ends_a_command_without_a_word() {
    let (_databases, instance) = service().await;
    let api = instance.api(7).await;
    // More than a pipe holds.
    let text = "x".repeat(3000);
    for n in 0..40 {
        api.send(42, &format!("k{n}"), &text).await.unwrap();
    }
    let mut command = client(
        &instance.url,
        &["history", "--user", "7", "--with", "42", "--all"],
    );
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = String::new();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    lines.read_line(&mut first).unwrap();
    drop(lines);
    let output = child.wait_with_output().unwrap();
    assert!(first.contains("\"seq\":1"), "{first}");
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_received_cannot_steer_a_terminal() {
    let (_databases, instance) = service().await;
    let text = "\u{1b}[2J\u{9b}31m\u{85}\u{202e}";
    instance.api(7).await.send(42, "k", text).await.unwrap();
    for arguments in [
        ["history", "--user", "42", "--with", "7"].as_slice(),
        &["inbox", "--user", "42"],
    ] {
        let (code, output, _) = run(&mut client(&instance.url, arguments));
        assert_eq!(code, Some(0));
        let line: Value = serde_json::from_str(output.trim()).unwrap();
        let message = line.get("last").unwrap_or(&line);
        assert_eq!(message["text"], text);
        let steers = |c: char| c != '\n' && (c.is_control() || c == '\u{202e}');
        assert!(!output.chars().any(steers), "{output:?}");
    }
}

#[test]
fn absurd_arguments_are_refused_at_once() {
    for arguments in [
        ["load", "--rate", "0"].as_slice(),
        &["load", "--rate", "inf"],
        &["load", "--rate", "-5"],
        &["load", "--users", "1"],
        &["load", "--messages", "0"],
        &["load", "--dialogs", "0"],
        &["load", "--dialogs", "18446744073709551615"],
        &["load", "--chars", "4000000000"],
        &["load", "--patience-seconds", "18446744073709551615"],
        &["replay", "file", "--at-once", "0"],
        &["send", "--user", "7", "--to", "42", "--timeout", "0", "x"],
    ] {
        let (code, _, error) = run(&mut client("http://127.0.0.1:1", arguments));
        assert_eq!(code, Some(2), "{arguments:?}: {error}");
    }
    for url in [
        "127.0.0.1:8080",
        "ftp://127.0.0.1",
        "http://",
        "http://a/b",
        "nonsense",
    ] {
        let (code, _, error) = run(&mut client(url, &["inbox", "--user", "7"]));
        assert_eq!(code, Some(2), "{url}: {error}");
        assert!(error.contains("http://host:port"), "{url}: {error}");
    }
}

#[test]
fn a_server_that_is_not_there_is_named_and_not_waited_for_for_ever() {
    let error = refusal(&mut client("http://127.0.0.1:1", &["inbox", "--user", "7"]));
    assert!(error.contains("no instance answers"), "{error}");
    let send = ["send", "--user", "7", "--to", "42", "--timeout", "1", "x"];
    let (code, _, error) = run(&mut client("http://127.0.0.1:1", &send));
    assert_eq!(code, Some(1), "{error}");
    assert!(error.contains("not connected: "), "{error}");
    assert!(error.contains("repeat it with --key"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_go_to_an_instance_that_answers() {
    let (_databases, instance) = service().await;
    instance.api(7).await.send(42, "k", "hi").await.unwrap();
    let urls = format!("http://127.0.0.1:1,{}", instance.url);
    let (code, output, error) = run(&mut client(&urls, &["inbox", "--user", "7"]));
    assert_eq!(code, Some(0), "{error}");
    assert!(output.contains("\"7_42\""), "{output}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_used_for_its_own_user_and_arguments_beat_the_environment() {
    let (databases, instance) = service().await;
    let token = instance.access().token(9).await.unwrap();
    let file = databases.directory().join("token");
    std::fs::write(&file, format!("{token}\n")).unwrap();
    let file = file.to_str().unwrap();
    // CHAT_SECRET is in the environment of all of these.
    for given in [["--token", token.as_str()], ["--token-file", file]] {
        let send = |user| {
            let mut command = client(&instance.url, &["send", "--user", user, "--to", "42", "hi"]);
            command.args(given);
            command
        };
        let (code, _, error) = run(&mut send("9"));
        assert_eq!(code, Some(0), "{error}");
        let (code, _, error) = run(&mut send("7"));
        assert_eq!(code, Some(1), "{error}");
        assert!(
            error.contains("the token is of user 9, not of 7"),
            "{error}"
        );
    }
    let access = Access::new(&instance.url, TokenSource::Given(token));
    assert!(Api::new(access.clone(), 7).await.is_err());
    let api = Api::new(access, 9).await.unwrap();
    let texts: Vec<_> = api.log_upwards(42).await.unwrap();
    let texts: Vec<_> = texts
        .into_iter()
        .map(|message| json!(message.text))
        .collect();
    assert_eq!(texts, [json!("hi"), json!("hi")]);
}
