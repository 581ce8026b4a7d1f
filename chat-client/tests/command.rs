//! The command `chat-client`, as a user and a script run it: closed pipes, absurd numbers, wrong
//! tokens, no server.

#![allow(missing_docs, clippy::unwrap_used)]

use chat_client::{Access, Api, TokenSource};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
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

/// `talk` with these bytes on standard input.
fn talk(url: &str, with: u64, input: &[u8]) -> Output {
    let with = with.to_string();
    let mut child = client(url, &["talk", "--user", "7", "--with", &with])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap()
}

/// The texts of a dialog, in order.
async fn texts(instance: &Instance, with: u64) -> Vec<String> {
    let log = instance.api(7).await.log_upwards(with).await.unwrap();
    log.into_iter().map(|message| message.text).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_of_a_pipe_are_stored_and_shown_in_their_order() {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    // Most sends are refused at first.
    let slowly = [
        ("LIMITS__SENDS_BURST", "2"),
        ("LIMITS__SENDS_PER_SECOND", "40"),
    ];
    let instance = Instance::start(&databases.shards_file(), &slowly).await;
    for with in 100..110 {
        let lines: Vec<String> = (0..8).map(|n| format!("line {n}")).collect();
        let output = talk(&instance.url, with, lines.join("\n").as_bytes());
        assert_eq!(output.status.code(), Some(0));
        assert_eq!(texts(&instance, with).await, lines);
        let shown = String::from_utf8(output.stdout).unwrap();
        let shown: Vec<&str> = shown
            .lines()
            .filter_map(|line| line.split_once(" 7: "))
            .map(|(_, text)| text)
            .collect();
        assert_eq!(shown, lines);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_input_is_lost_without_a_word() {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    let small = [
        ("LIMITS__TEXT_CHARS", "100"),
        ("LIMITS__FRAME_BYTES", "2000"),
    ];
    let instance = Instance::start(&databases.shards_file(), &small).await;
    let long = "x".repeat(101);
    let longer = "x".repeat(5000);
    let input = [
        b"one\r\nb\xffd\n\n".as_slice(),
        long.as_bytes(),
        b"\n",
        longer.as_bytes(),
        b"\n/two",
    ]
    .concat();
    let output = talk(&instance.url, 42, &input);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(texts(&instance, 42).await, ["one", "/two"]);
    let shown = String::from_utf8(output.stdout).unwrap();
    for reason in ["line 2 is not UTF-8", "text_too_long", "too large: 5"] {
        assert!(
            shown.contains(&format!("not sent: {reason}")),
            "{reason}: {shown}"
        );
    }
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(error, "chat-client: 3 not sent\n");
}

/// What is typed ahead, pasted and commanded at a real terminal.
#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_keeps_what_is_typed_ahead_and_pasted() {
    let (_databases, instance) = service().await;
    let program = env!("CARGO_BIN_EXE_chat-client");
    let command = format!("{program} --url {} talk --user 7 --with 42", instance.url);
    let mut terminal = Command::new("script")
        .args(["--quiet", "--return", "--command", &command, "/dev/null"])
        .env("CHAT_SECRET", SECRET)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut keyboard = terminal.stdin.take().unwrap();
    keyboard.write_all(b"one\rtwo\rthree\r").unwrap();
    testkit::until("they are stored", async || {
        (texts(&instance, 42).await.len() == 3).then_some(())
    })
    .await;
    keyboard
        .write_all(b"\x1b[200~pasted\nlines\x1b[201~\r//four\r/help\r")
        .unwrap();
    testkit::until("they are stored", async || {
        (texts(&instance, 42).await.len() == 5).then_some(())
    })
    .await;
    keyboard.write_all(b"/quit\r").unwrap();
    let output = terminal.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(
        texts(&instance, 42).await,
        ["one", "two", "three", "pasted\nlines", "/four"]
    );
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(shown.contains("Alt-Enter"), "{shown}");
}

#[test]
fn completions_and_a_manual_page_need_no_server() {
    for (arguments, expected) in [
        (["completions", "bash"].as_slice(), "complete -F"),
        (&["completions", "zsh"], "#compdef chat-client"),
        (&["completions", "fish"], "complete -c chat-client"),
        (&["man"], ".SH SUBCOMMANDS"),
    ] {
        let (code, output, error) = run(&mut client("http://127.0.0.1:1", arguments));
        assert_eq!(code, Some(0), "{error}");
        assert!(output.contains(expected), "{expected}: {output}");
    }
}

/// Options of a small load.
const LOAD: [&str; 8] = [
    "load",
    "--users",
    "2",
    "--messages",
    "40",
    "--rate",
    "400",
    "--patience-seconds=5",
];

#[tokio::test(flavor = "multi_thread")]
async fn a_load_that_is_refused_or_interrupted_says_so_and_reports_what_there_is() {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    let small = [("LIMITS__TEXT_CHARS", "50")];
    let instance = Instance::start(&databases.shards_file(), &small).await;
    let (code, output, error) = run(client(&instance.url, &LOAD).args(["--chars", "100"]));
    assert_eq!(code, Some(1), "{output}");
    assert!(
        error.contains("40 of 40 messages were not stored"),
        "{error}"
    );
    assert!(output.contains("\"text_too_long\": 40"), "{output}");
    let (code, output, error) = run(client(&instance.url, &LOAD).args(["--chars", "10"]));
    assert_eq!(code, Some(0), "{error}{output}");

    let mut command = client(&instance.url, &LOAD[..3]);
    command.args(["--messages", "100000", "--rate", "20", "--chars", "10"]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("connected") {
        line.clear();
        output.read_line(&mut line).unwrap();
    }
    testkit::process::signal(child.id(), "INT").unwrap();
    let status = child.wait().unwrap();
    let report = std::io::read_to_string(output).unwrap();
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!(
        (status.code(), &report["interrupted"]),
        (Some(1), &json!(true))
    );
    assert!(report["planned"].as_u64().unwrap() < 100_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_without_an_upgrade_is_understood() {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    let plain = [("LIMITS__UPGRADED_REFUSALS", "0")];
    let instance = Instance::start(&databases.shards_file(), &plain).await;
    let arguments = [
        "send", "--user", "7", "--to", "42", "--token", "nonsense", "hi",
    ];
    let error = refusal(&mut client(&instance.url, &arguments));
    assert!(error.contains("unauthenticated"), "{error}");
}
