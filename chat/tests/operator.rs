//! What an operator relies on: the commands and admin routes, tokens signed elsewhere, a load
//! balancer in front, limits under load, a shutdown that a load balancer can follow.

#![allow(missing_docs, clippy::unwrap_used, clippy::wildcard_enum_match_arm)]

use chat_client::{Access, Api, TokenSource};
use chat_wire::{Close, ErrorCode, ServerFrame};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output};
use testkit::instance::{Instance, program, refusal};
use testkit::service::Service;
use testkit::socket::{Socket, raw};
use testkit::{Databases, Kind, SECRET, until};
use tokio::io::AsyncReadExt;

/// Runs `chat ARGUMENTS` with the settings of a service; success, standard output, standard error.
fn chat(shards: &Path, arguments: &[&str], settings: &[(&str, &str)]) -> (bool, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = Command::new(program("chat"))
        .args(arguments)
        .env("CHAT__SHARDS_FILE", shards)
        .env("CHAT__AUTH__SECRET", SECRET)
        .envs(settings.iter().copied())
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.success(), text(stdout), text(stderr))
}

/// The number before `word` in a text.
fn number_before(text: &str, word: &str) -> u64 {
    let before = text.split(word).next().unwrap_or_default();
    let number = before.split_whitespace().last().unwrap_or_default();
    number
        .parse()
        .unwrap_or_else(|_| panic!("no number before {word:?}: {text}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_says_what_an_edit_moves_and_the_edit_moves_that() {
    let mut service = Service::new(Kind::Sqlite, 2, 1).await;
    let instance = service.start(&[]).await;
    let api = instance.api(1).await;
    for with in 2..42 {
        api.send(with, "k", "four").await.unwrap();
    }
    let edit = service.databases.directory().join("edit.toml");
    let file = edit.to_str().unwrap();
    let plan = |text: String| {
        std::fs::write(&edit, text).unwrap();
        chat(&service.file, &["plan", file], &[])
    };

    let (ok, output, _) = plan(service.text());
    assert!(ok && output == "nothing would change\n", "{output}");

    let third = service.entry(2);
    let added =
        service.text() + &format!("[[shard]]\nname = \"shard3\"\nurl = \"{}\"\n", third.url);
    let (ok, output, error) = plan(added.clone());
    assert!(ok, "{error}");
    let new_file = third.url.trim_start_matches("sqlite:");
    assert!(
        !Path::new(new_file).exists(),
        "a plan makes nothing: {new_file}"
    );
    let slots = number_before(&output, "of 4096 slots move");
    assert!(
        (1000..1800).contains(&slots),
        "a third of the slots: {output}"
    );
    assert!(
        output.contains("shard1 -> shard3") && output.contains("shard2 -> shard3"),
        "{output}"
    );

    // The route says the same, with the messages by shard.
    let url = format!("{}/admin/plan", instance.admin);
    let post = |text: String| {
        let request = reqwest::Client::new().post(&url).body(text);
        request.header("content-type", "application/toml").send()
    };
    let body: Value = post(added).await.unwrap().json().await.unwrap();
    let moves = body["moves"].as_array().unwrap();
    let planned = moves
        .iter()
        .map(|one| one[2]["slots"].as_u64().unwrap())
        .sum::<u64>();
    assert_eq!(planned, slots, "{body}");
    let shares = body["shares"].as_object().unwrap().values();
    let after = shares.map(|share| share[1].as_u64().unwrap()).sum::<u64>();
    assert_eq!(after, 40, "{body}");

    // An edit that is refused, and a file that cannot be read, are one line each.
    let down = service
        .text()
        .replace("name = \"shard2\"", "name = \"shard2\"\nstate = \"down\"");
    for (text, expected) in [(down.clone(), "force"), ("[[shard]".to_owned(), "line 1")] {
        let (ok, output, error) = plan(text);
        assert!(!ok && output.is_empty(), "{output}");
        assert!(
            error.contains(expected) && error.contains("edit.toml"),
            "{error}"
        );
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    let refused = post(down).await.unwrap();
    assert_eq!(refused.status(), 400);
    assert_eq!(
        refused.json::<Value>().await.unwrap()["code"],
        "bad_request"
    );

    service.add(2);
    service.settled(&instance, 2).await;
    let took = "SELECT COUNT(*) FROM slots WHERE state = 'owner'";
    assert_eq!(service.databases.number(2, took).await, slots as i64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_stops_the_moves_until_they_are_resumed_and_the_status_says_so() {
    let mut service = Service::new(Kind::Sqlite, 2, 1).await;
    let instance = service.start(&[]).await;
    let admin = instance.admin.clone();
    let output = operate(&service, &admin, "status");
    for expected in [
        "version 1 normal",
        "in effect",
        "shard1",
        "shard2",
        "others: none",
    ] {
        assert!(output.contains(expected), "{expected}: {output}");
    }
    let (ok, output, error) = chat(&service.file, &["status", "--json", "--admin", &admin], &[]);
    assert!(ok, "{error}");
    let all: Value = serde_json::from_str(&output).unwrap();
    assert_eq!(all["resharding"]["version"], 1, "{all}");
    assert_eq!(all["shards"].as_array().map(Vec::len), Some(2), "{all}");
    let (ok, output, error) = chat(&service.file, &["where", "7", "42", "--json"], &[]);
    assert!(ok, "{error}");
    let place: Value = serde_json::from_str(&output).unwrap();
    assert_eq!(
        (&place["dialog"], &place["owner"]),
        (&"7_42".into(), &place["target"])
    );
    assert_eq!(place["rows"].as_array().map(Vec::len), Some(2), "{place}");
    assert!(operate(&service, &admin, "pause").contains("paused"));
    let (_, status) = instance.get(&format!("{admin}/admin/resharding")).await;
    let version = status["version"].as_u64().unwrap();
    assert_eq!(status["paused"], true, "{status}");

    service.add(2);
    service.in_effect(&instance, version + 1).await;
    until("the coordinator reports the pause", async || {
        let (_, status) = instance.get(&format!("{admin}/admin/resharding")).await;
        (status["work"]["stage"] == "paused" && status["work"]["version"] == version + 1)
            .then_some(())
    })
    .await;
    let owned = "SELECT COUNT(*) FROM slots WHERE state = 'owner'";
    assert_eq!(service.databases.number(2, owned).await, 0, "nothing moves");
    let output = operate(&service, &admin, "status");
    assert!(output.contains("paused (by "), "{output}");

    assert!(operate(&service, &admin, "resume").contains("resumed"));
    service.settled(&instance, version + 2).await;
    assert!(service.databases.number(2, owned).await > 1000);
    let output = operate(&service, &admin, "status");
    assert!(output.contains("idle"), "{output}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_goes_back_waits_for_the_purge_of_its_old_rows_and_the_status_says_so() {
    let mut service = Service::new(Kind::Sqlite, 2, 0).await;
    let purge = [("RESHARDING__PURGE_AFTER_MS", "4000")];
    let instance = service.start(&purge).await;
    let api = instance.api(1).await;
    api.send(2, "k", "hello").await.unwrap();
    let (owner, other) = match owner_of(&instance, 2).await.as_str() {
        "shard1" => ("shard1", "shard2"),
        _ => ("shard2", "shard1"),
    };
    service.pin(&[(1, 2)], other);
    service.save();
    until("it has moved", async || {
        (owner_of(&instance, 2).await == other).then_some(())
    })
    .await;
    service.pins.clear();
    service.save();
    until("the status has the reason", async || {
        let output = operate(&service, &instance.admin, "status");
        let reason = "waiting: 1 slots have left their target less than 4 s ago";
        (output.contains(reason) && output.contains("time left unknown")).then_some(())
    })
    .await;
    service.settled(&instance, 3).await;
    let output = operate(&service, &instance.admin, "status");
    assert!(
        output.contains("1 of 1 slots") && output.contains("/s, done"),
        "{output}"
    );
    assert_eq!(owner_of(&instance, 2).await, owner);
    assert_eq!(api.log_upwards(2).await.unwrap().len(), 1);
    until("the log says that the moves are finished", async || {
        let log = instance.log();
        let finished: Vec<&str> = log
            .lines()
            .filter(|line| line.contains("resharding finished") && line.contains("slots_moved=1"))
            .collect();
        (finished.len() >= 2 && finished.last()?.contains("version=3")).then_some(())
    })
    .await;
}

/// OPERATIONS, "Restore a shard from a backup": it is declared down, restored and brought back. The
/// backup has older rows of slots than the other shards.
#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_is_restored_from_a_backup_is_merged_and_owns_nothing_by_itself() {
    let mut service = Service::new(Kind::Sqlite, 3, 0).await;
    let mut instance = service.start(&[]).await;
    let api = instance.api(1).await;
    let users = 2..40_u64;
    let send = async |api: &Api, n: u64| {
        for with in users.clone() {
            api.send(with, &format!("k{n}"), &format!("{n}"))
                .await
                .unwrap();
        }
    };
    for n in 1..=3 {
        send(&api, n).await;
    }
    let mut lost = Vec::new();
    for with in users.clone() {
        if owner_of(&instance, with).await == "shard3" {
            lost.push(with);
        }
    }
    assert!(lost.len() > 3, "{lost:?}");
    let path = service.databases.url(2);
    let path = path.trim_start_matches("sqlite:");
    let backup = format!("{path}.backup");
    rusqlite::Connection::open(path)
        .unwrap()
        .execute("VACUUM INTO ?1", [&backup])
        .unwrap();
    // After the backup: more messages, and a dialog that leaves the shard.
    let moved = lost.pop().unwrap();
    service.pin(&[(1, moved)], "shard1");
    service.save();
    service.settled(&instance, 2).await;
    send(&api, 4).await;

    service.set("shard3", "state = \"down\"");
    service.settled_but_fenced(&instance, 3).await;
    instance.kill();
    for end in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(format!("{path}{end}"));
    }
    std::fs::rename(&backup, path).unwrap();
    let instance = service.start(&[]).await;
    service.set("shard3", "");
    service.settled(&instance, 4).await;

    let api = instance.api(1).await;
    send(&api, 5).await;
    for with in users {
        let log = api.log_upwards(with).await.unwrap();
        let texts: Vec<&str> = log.iter().map(|message| message.text.as_str()).collect();
        if lost.contains(&with) {
            assert_eq!(texts, ["1", "2", "3", "5"], "{with}");
        } else {
            assert_eq!(texts, ["1", "2", "3", "4", "5"], "{with}");
        }
        assert!(log.is_sorted_by_key(|message| message.seq), "{with}");
    }
}

/// The shard that owns the dialog of user 1 and `with`.
async fn owner_of(instance: &Instance, with: u64) -> String {
    let url = format!("{}/admin/where/1/{with}", instance.admin);
    let (_, place) = instance.get(&url).await;
    place["owner"].as_str().unwrap_or_default().to_owned()
}

/// Runs a command of an operator against a running instance; what it prints.
fn operate(service: &Service, admin: &str, command: &str) -> String {
    let (ok, output, error) = chat(&service.file, &[command, "--admin", admin], &[]);
    assert!(ok, "{error}");
    output
}

#[tokio::test(flavor = "multi_thread")]
async fn every_admin_route_asks_for_the_admin_token() {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    let shards = databases.shards_file();
    let token = "an admin token of some length";
    let instance = Instance::start(&shards, &[("ADMIN_TOKEN", token)]).await;
    let http = reqwest::Client::new();
    let routes = [
        ("GET", "/metrics"),
        ("GET", "/admin/topology"),
        ("GET", "/admin/shards"),
        ("GET", "/admin/slots"),
        ("GET", "/admin/where/7/42"),
        ("GET", "/admin/resharding"),
        ("POST", "/admin/plan"),
        ("POST", "/admin/resharding/pause"),
        ("POST", "/admin/resharding/resume"),
    ];
    for (method, path) in routes {
        let request = || {
            let url = format!("{}{path}", instance.admin);
            let file = std::fs::read_to_string(&shards).unwrap();
            http.request(method.parse().unwrap(), url).body(file)
        };
        let status = async |request: reqwest::RequestBuilder| {
            request.send().await.unwrap().status().as_u16()
        };
        assert_eq!(status(request()).await, 401, "{path} without a token");
        assert_eq!(
            status(request().bearer_auth("an admin token of some lengths")).await,
            401,
            "{path}"
        );
        assert_eq!(
            status(request().bearer_auth("an admin token of some lengtH")).await,
            401,
            "{path}"
        );
        assert_eq!(
            status(request().bearer_auth(token)).await,
            200,
            "{path} with the token"
        );
    }
    let arguments = ["status", "--admin", &instance.admin];
    let (ok, _, error) = chat(&shards, &arguments, &[]);
    assert!(!ok && error.contains("admin token"), "{error}");
    let (ok, output, error) = chat(&shards, &arguments, &[("CHAT__ADMIN_TOKEN", token)]);
    assert!(ok && output.contains("shard1"), "{error}");
    assert!(!instance.log().contains(token));
}

/// Runs openssl, and returns what it prints.
fn openssl(folder: &Path, arguments: &str) -> Vec<u8> {
    let mut command = Command::new("openssl");
    let output = command
        .args(arguments.split(' '))
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "openssl {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

fn base64url(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let bits = chunk
            .iter()
            .fold(0u32, |bits, byte| bits << 8 | u32::from(*byte))
            << (8 * (3 - chunk.len()));
        let digits =
            (0..=chunk.len()).map(|i| char::from(DIGITS[(bits >> (18 - 6 * i) & 63) as usize]));
        text.extend(digits);
    }
    text
}

/// A pair of keys in files, and the public one as a member of a key set.
fn key_pair(folder: &Path, algorithm: &str, name: &str) -> Value {
    let generate = match algorithm {
        "EdDSA" => "-algorithm ed25519",
        "ES256" => "-algorithm EC -pkeyopt ec_paramgen_curve:P-256",
        _ => "-algorithm RSA -pkeyopt rsa_keygen_bits:2048",
    };
    openssl(folder, &format!("genpkey {generate} -out {name}.key"));
    openssl(
        folder,
        &format!("pkey -in {name}.key -pubout -out {name}.pem"),
    );
    let public = openssl(folder, &format!("pkey -pubin -in {name}.pem -outform DER"));
    let end = |count: usize| &public[public.len() - count..];
    match algorithm {
        "EdDSA" => {
            json!({"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "kid": name, "x": base64url(end(32))})
        }
        "ES256" => {
            let (x, y) = end(64).split_at(32);
            json!({"kty": "EC", "crv": "P-256", "alg": "ES256", "kid": name, "x": base64url(x), "y": base64url(y)})
        }
        _ => {
            // The modulus of 256 bytes, then two bytes of head and the exponent 65537.
            let modulus = &end(261)[..256];
            json!({"kty": "RSA", "alg": "RS256", "kid": name, "n": base64url(modulus), "e": "AQAB"})
        }
    }
}

/// A token for user 7, signed with a private key.
fn sign(folder: &Path, algorithm: &str, name: &str, kid: Option<&str>) -> String {
    use jsonwebtoken::{Algorithm, EncodingKey, Header};
    let pem = std::fs::read(folder.join(format!("{name}.key"))).unwrap();
    let (algorithm, key) = match algorithm {
        "EdDSA" => (Algorithm::EdDSA, EncodingKey::from_ed_pem(&pem)),
        "ES256" => (Algorithm::ES256, EncodingKey::from_ec_pem(&pem)),
        _ => (Algorithm::RS256, EncodingKey::from_rsa_pem(&pem)),
    };
    let mut header = Header::new(algorithm);
    header.kid = kid.map(str::to_owned);
    let claims = json!({"sub": "7", "exp": 4_000_000_000u64});
    jsonwebtoken::encode(&header, &claims, &key.unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_are_signed_with_a_private_key_are_taken_by_the_public_one() {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    let (shards, folder) = (databases.shards_file(), databases.directory());
    for algorithm in ["EdDSA", "ES256", "RS256"] {
        let [one, two, unknown] =
            ["one", "two", "unknown"].map(|name| key_pair(&folder, algorithm, name));
        let set = folder.join("keys.json");
        // Sets without a key that verifies tokens.
        let (mut for_encryption, mut of_another) = (one.clone(), two.clone());
        for_encryption["use"] = json!("enc");
        of_another["alg"] = json!("ES384");
        let settings = [
            ("AUTH__ALGORITHM", algorithm),
            ("AUTH__KEY_FILE", set.to_str().unwrap()),
        ];
        // Of another type, and it does not say of which algorithm it is.
        let mut of_another_type = match algorithm {
            "RS256" => key_pair(&folder, "ES256", "other"),
            _ => key_pair(&folder, "RS256", "other"),
        };
        of_another_type.as_object_mut().unwrap().remove("alg");
        let secret = json!({"kty": "oct", "kid": "secret", "k": "c2VjcmV0"});
        for keys in [
            json!([]),
            json!([for_encryption, of_another]),
            json!([of_another_type, secret]),
        ] {
            std::fs::write(&set, json!({ "keys": keys }).to_string()).unwrap();
            let error = refusal(&shards, &settings);
            assert!(
                error.contains(&format!("holds no {algorithm} key")),
                "{error}"
            );
        }
        std::fs::write(&set, json!({"keys": [one, two]}).to_string()).unwrap();
        drop(unknown);
        for (file, kids) in [(folder.join("one.pem"), false), (set, true)] {
            let settings = [
                ("AUTH__ALGORITHM", algorithm),
                ("AUTH__KEY_FILE", file.to_str().unwrap()),
            ];
            let instance = Instance::start(&shards, &settings).await;
            let status = async |token: String| {
                let access = Access::new(&instance.url, TokenSource::Given(token));
                match Api::new(access, 7).await.unwrap().inbox(1, None).await {
                    Ok(_) => None,
                    Err(chat_client::ClientError::Refused(body)) => Some(body.code),
                    Err(e) => panic!("{e}"),
                }
            };
            let refused = Some(ErrorCode::Unauthenticated);
            let kid = |name| kids.then_some(name);
            assert_eq!(
                status(sign(&folder, algorithm, "one", kid("one"))).await,
                None,
                "{algorithm} {kids}"
            );
            let other = status(sign(&folder, algorithm, "two", kid("two"))).await;
            assert_eq!(
                other,
                if kids { None } else { refused },
                "{algorithm} {kids}"
            );
            assert_eq!(
                status(sign(&folder, algorithm, "unknown", kid("one"))).await,
                refused
            );
            assert_eq!(
                status(sign(&folder, algorithm, "unknown", kid("unknown"))).await,
                refused
            );
            // A token of the algorithm that would take the public key for a secret.
            let public = std::fs::read(folder.join("one.pem")).unwrap();
            let forged = jsonwebtoken::encode(
                &jsonwebtoken::Header::new(jsonwebtoken::Algorithm::HS256),
                &json!({"sub": "7", "exp": 4_000_000_000u64}),
                &jsonwebtoken::EncodingKey::from_secret(&public),
            );
            assert_eq!(status(forged.unwrap()).await, refused);
        }
    }
}

/// Opens a session as `user` with an `X-Forwarded-For`; the code of the close, if it is refused.
async fn from_address(
    instance: &Instance,
    user: u64,
    forwarded: &str,
) -> Result<Socket, Option<u16>> {
    let token = instance.access().token(user).await.unwrap();
    let headers = [
        ("authorization", format!("Bearer {token}")),
        ("x-forwarded-for", forwarded.to_owned()),
    ];
    let mut socket = Socket::open(&instance.url, &headers).await;
    match socket.next().await {
        ServerFrame::Welcome { .. } => Ok(socket),
        _ => Err(socket.until_closed().await.1),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_counted_by_the_address_that_the_proxy_appends_and_only_if_it_is_trusted() {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    let shards = databases.shards_file();
    let too_many = Some(Close::TooManyConnections.code());
    let one_each = ("LIMITS__CONNECTIONS_PER_IP", "1");
    let instance = Instance::start(&shards, &[one_each, ("TRUST_FORWARDED_FOR", "true")]).await;
    let _first = from_address(&instance, 1, "192.0.2.1").await.unwrap();
    let _second = from_address(&instance, 2, "192.0.2.2").await.unwrap();
    assert_eq!(
        from_address(&instance, 3, "192.0.2.1").await.err(),
        Some(too_many)
    );
    // A client may send the header itself: what the proxy appends is last, and counts.
    assert_eq!(
        from_address(&instance, 4, "198.51.100.9, 192.0.2.2")
            .await
            .err(),
        Some(too_many)
    );
    // With a port, as some proxies write it; and one IPv6 network is one customer.
    assert_eq!(
        from_address(&instance, 4, "192.0.2.2:51000").await.err(),
        Some(too_many)
    );
    let _fifth = from_address(&instance, 5, "192.0.2.1, 2001:db8::1")
        .await
        .unwrap();
    assert_eq!(
        from_address(&instance, 6, "[2001:db8::ffff]:443")
            .await
            .err(),
        Some(too_many)
    );
    drop(instance);
    let instance = Instance::start(&shards, &[one_each]).await;
    let _first = from_address(&instance, 1, "192.0.2.1").await.unwrap();
    assert_eq!(
        from_address(&instance, 2, "192.0.2.2").await.err(),
        Some(too_many)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_refuses_with_a_time_to_come_again_and_takes_sends_when_it_is_empty() {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    let settings = [
        ("STORE__QUEUE_ROWS", "10"),
        ("STORE__BATCH_ROWS", "1"),
        ("LIMITS__SENDS_BURST", "1000"),
        ("LIMITS__FRAMES_PER_SECOND", "1000"),
    ];
    let instance = Instance::start(&databases.shards_file(), &settings).await;
    let mut socket = Socket::of(&instance, 7).await;
    socket.send_text("first", 42, "x").await;
    socket.sent().await;
    // Another process writes to the database file.
    let path = databases.url(0).trim_start_matches("sqlite:").to_owned();
    let other = rusqlite::Connection::open(path).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    for n in 0..60 {
        // Of different dialogs: what one transaction takes at once is bounded, too.
        socket.send_text(&format!("k{n}"), 100 + n, "x").await;
    }
    let refused = socket.error().await;
    assert_eq!(
        (refused.code, refused.retryable),
        (ErrorCode::Overloaded, true)
    );
    assert!(
        refused.retry_after_ms.is_some_and(|wait| wait > 0),
        "{refused:?}"
    );
    other.execute_batch("ROLLBACK").unwrap();
    let (mut stored, mut overloaded) = (0, 1);
    while stored + overloaded < 60 {
        match socket.next().await {
            ServerFrame::Sent { .. } => stored += 1,
            ServerFrame::Error(error) if error.code == ErrorCode::Overloaded => overloaded += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(
        stored >= 10 && overloaded >= 10,
        "{stored} stored, {overloaded} refused"
    );
    socket.send_text("last", 42, "x").await;
    assert_eq!(socket.sent().await.0, "last");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_has_so_many_requests_under_way_and_no_more() {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    let settings = [
        ("LIMITS__REQUESTS_IN_FLIGHT", "5"),
        ("LIMITS__READS_IN_FLIGHT", "2"),
    ];
    let instance = Instance::start(&databases.shards_file(), &settings).await;
    let mut socket = Socket::of(&instance, 7).await;
    socket.send_text("first", 42, "x").await;
    socket.sent().await;
    let path = databases.url(0).trim_start_matches("sqlite:").to_owned();
    let other = rusqlite::Connection::open(path).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    for n in 0..6 {
        socket.send_text(&format!("k{n}"), 42, "x").await;
    }
    let refused = socket.error().await;
    assert_eq!(
        (refused.code, refused.key.as_deref()),
        (ErrorCode::Overloaded, Some("k5"))
    );
    assert!(
        refused.message.contains("5 requests"),
        "{}",
        refused.message
    );
    other.execute_batch("ROLLBACK").unwrap();
    for n in 0..5 {
        assert_eq!(socket.sent().await.0, format!("k{n}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_does_not_answer_pings_is_closed_as_silent() {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    let settings = [
        ("LIMITS__PING_EVERY_MS", "100"),
        ("LIMITS__SILENCE_MS", "300"),
    ];
    let instance = Instance::start(&databases.shards_file(), &settings).await;
    let mut answering = Socket::of(&instance, 42).await;
    let begun = std::time::Instant::now();
    let mut silent = raw(&instance, 7).await;
    let mut received = Vec::new();
    let closed = silent.read_to_end(&mut received);
    tokio::select! {
        _ = closed => {}
        frame = answering.until_closed() => panic!("{frame:?}"),
    }
    assert!(begun.elapsed() >= std::time::Duration::from_millis(300));
    let close = [[0x88, 8].as_slice(), &4000_u16.to_be_bytes(), b"silent"].concat();
    assert!(received.ends_with(&close), "{received:?}");
    assert_eq!(Close::Silent.code(), 4000);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_is_asked_to_stop_is_not_ready_at_once_and_answers_rest_until_it_ends() {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    let settings = [("LIMITS__SHUTDOWN_MS", "1500")];
    let mut instance = Instance::start(&databases.shards_file(), &settings).await;
    let api = instance.api(7).await;
    let mut sockets = Vec::new();
    for user in 1..=10 {
        sockets.push(Socket::of(&instance, user).await);
    }
    assert_eq!(instance.ready().await.0, 200);
    instance.terminate();
    until("it is not ready", async || {
        (instance.ready().await.0 == 503).then_some(())
    })
    .await;
    // A load balancer notices; until then requests still come here.
    api.send(42, "k", "stored").await.unwrap();
    let mut refused = Socket::open(
        &instance.url,
        &[(
            "authorization",
            format!("Bearer {}", instance.access().token(99).await.unwrap()),
        )],
    )
    .await;
    assert_eq!(refused.until_closed().await.1, Some(Close::Restart.code()));
    for socket in &mut sockets {
        assert_eq!(socket.until_closed().await.1, Some(Close::Restart.code()));
    }
    assert!(instance.ended().await.success());
    let again = Instance::start(&databases.shards_file(), &[]).await;
    assert_eq!(again.api(42).await.log_upwards(7).await.unwrap().len(), 1);
}
