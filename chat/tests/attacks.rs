//! Clients that mean no good, on raw sockets: each gets its answer, and the process lives with its
//! memory bounded.

#![allow(missing_docs, clippy::wildcard_enum_match_arm)]

use chat_wire::{Close, ErrorCode, ServerFrame};
use serde_json::json;
use testkit::instance::Instance;
use testkit::socket::{Socket, raw};
use testkit::{Databases, Kind, SECRET, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Bytes that an attack may add to the process: far below what each tries to make it keep.
const ALLOWED: u64 = 48 << 20;

async fn instance() -> (Databases, Instance) {
    let databases = Databases::new(Kind::Sqlite, 2).await;
    let instance = Instance::start(
        &databases.shards_file(),
        &[
            ("LIMITS__SENDS_BURST", "100000"),
            ("LIMITS__FRAMES_PER_SECOND", "100000"),
        ],
    )
    .await;
    (databases, instance)
}

/// The header of a client's frame, masked with zeros.
fn header(first: u8, length: u64) -> Vec<u8> {
    let mut header = vec![first, 0x80 | 127];
    header.extend(length.to_be_bytes());
    header.extend([0; 4]);
    header
}

/// Reads what the server says until it closes; returns the text and the close code.
async fn verdict(stream: &mut (impl AsyncReadExt + Unpin)) -> (String, Option<u16>) {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(testkit::PATIENCE, stream.read_to_end(&mut bytes)).await;
    assert!(read.is_ok(), "the server does not close");
    let mut rest = &bytes[..];
    let (mut text, mut code) = (String::new(), None);
    while rest.len() >= 2 {
        let (opcode, mut length, mut at) = (rest[0] & 0x0f, usize::from(rest[1] & 0x7f), 2);
        if length == 126 {
            length = usize::from(u16::from_be_bytes([rest[2], rest[3]]));
            at = 4;
        }
        let payload = &rest[at..at + length];
        match opcode {
            1 => text.push_str(std::str::from_utf8(payload).unwrap()),
            8 => code = Some(u16::from_be_bytes([payload[0], payload[1]])),
            _ => {}
        }
        rest = &rest[at + length..];
    }
    (text, code)
}

/// Sends as much of `bytes` as the server takes, `times` times.
async fn pour(stream: &mut (impl AsyncWriteExt + Unpin), bytes: &[u8], times: usize) {
    for _ in 0..times {
        if stream.write_all(bytes).await.is_err() {
            return;
        }
    }
}

async fn lives(instance: &Instance) {
    let mut socket = Socket::of(instance, 77).await;
    socket
        .send_text(&format!("{}", rand::random::<u64>()), 78, "still here")
        .await;
    socket.sent().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_frames_and_endless_fragments_are_refused_while_they_are_on_their_way() {
    let (_databases, instance) = instance().await;
    lives(&instance).await;
    let before = instance.resident();
    let chunk = vec![b'x'; 1 << 20];
    let fragments = [
        header(0x01, 1000),
        vec![b'x'; 1000],
        [header(0x00, 1000), vec![b'x'; 1000]].concat().repeat(1000),
    ]
    .concat();
    let empty_fragments = [
        vec![0x01, 0x80, 0, 0, 0, 0],
        [0x00, 0x80, 0, 0, 0, 0].repeat(100_000),
    ]
    .concat();
    for (what, head, body, times) in [
        ("1 MB in one frame", header(0x81, 1 << 20), &chunk, 1),
        (
            "16 GiB announced, 200 MB sent",
            header(0x81, 16 << 30),
            &chunk,
            200,
        ),
        (
            "the largest length there is",
            header(0x81, u64::MAX >> 1),
            &chunk,
            20,
        ),
        ("200 MB of fragments", Vec::new(), &fragments, 200),
        (
            "fragments without end and without content",
            Vec::new(),
            &empty_fragments,
            100,
        ),
    ] {
        let stream = raw(&instance, 7).await;
        let (mut incoming, mut outgoing) = stream.into_split();
        let attack = async {
            pour(&mut outgoing, &head, 1).await;
            pour(&mut outgoing, body, times).await;
        };
        let peak = async {
            let mut peak = 0;
            loop {
                peak = instance.resident().max(peak);
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                if peak > before + ALLOWED {
                    return peak;
                }
            }
        };
        let ((text, code), ()) = tokio::select! {
            both = async { tokio::join!(verdict(&mut incoming), attack) } => both,
            peak = peak => panic!("{what}: {} MiB more", (peak - before) >> 20),
        };
        assert_eq!(code, Some(Close::TooLarge.code()), "{what}");
        assert!(text.contains("frame_too_large"), "{what}: {text}");
        lives(&instance).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_no_text_or_no_websocket_close_only_their_own_connection() {
    let (_databases, instance) = instance().await;
    let masked = |first: u8, payload: &[u8]| {
        [
            vec![first, 0x80 | payload.len() as u8, 0, 0, 0, 0],
            payload.to_vec(),
        ]
        .concat()
    };
    for (what, bytes, expected) in [
        (
            "broken UTF-8",
            masked(0x81, &[0xff, 0xfe, b'x']),
            Close::InvalidText,
        ),
        (
            "half a character",
            masked(0x81, &[0xf0, 0x9f, 0x98]),
            Close::InvalidText,
        ),
        (
            "a frame that is not masked",
            vec![0x81, 1, b'x'],
            Close::ProtocolError,
        ),
        (
            "a reserved opcode",
            masked(0x83, b"x"),
            Close::ProtocolError,
        ),
        (
            "a continuation of nothing",
            masked(0x80, b"x"),
            Close::ProtocolError,
        ),
    ] {
        let mut stream = raw(&instance, 7).await;
        stream.write_all(&bytes).await.unwrap();
        stream.shutdown().await.ok();
        let (_, code) = verdict(&mut stream).await;
        assert_eq!(code, Some(expected.code()), "{what}");
    }
    let mut garbage = TcpStream::connect(instance.url.trim_start_matches("http://"))
        .await
        .unwrap();
    garbage.write_all(&[0u8; 100_000]).await.ok();
    lives(&instance).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_never_reads_is_closed_and_nobody_else_notices() {
    let (_databases, instance) = instance().await;
    let _deaf = raw(&instance, 42).await;
    let mut talking = Socket::of(&instance, 7).await;
    let mut listening = Socket::of(&instance, 9).await;
    let before = instance.resident();
    let text = "x".repeat(4000);
    let mut number = 0;
    until("the slow reader is closed", async || {
        for _ in 0..100 {
            number += 1;
            talking.send_text(&format!("k{number}"), 42, &text).await;
        }
        for _ in 0..100 {
            talking.sent().await;
        }
        talking
            .send_text(&format!("to 9, {number}"), 9, "hello")
            .await;
        talking.sent().await;
        assert_eq!(listening.message().await.from, 7);
        let metrics = reqwest::get(format!("{}/metrics", instance.admin))
            .await
            .unwrap()
            .text()
            .await
            .unwrap();
        metrics
            .contains("chat_closes_total{reason=\"slow_reader\"} 1")
            .then_some(())
    })
    .await;
    let metrics = async || {
        reqwest::get(format!("{}/metrics", instance.admin))
            .await
            .unwrap()
            .text()
            .await
            .unwrap()
    };
    until("its session is gone", async || {
        metrics().await.contains("chat_sessions 2").then_some(())
    })
    .await;
    assert!(
        instance.resident() < before + ALLOWED,
        "{} MiB more",
        (instance.resident() - before) >> 20
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_no_good_token_or_forges_a_sender_gets_nowhere() {
    let (_databases, instance) = instance().await;
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let sign = |algorithm, secret: &str, claims: serde_json::Value| {
        let key = jsonwebtoken::EncodingKey::from_secret(secret.as_bytes());
        jsonwebtoken::encode(&jsonwebtoken::Header::new(algorithm), &claims, &key).unwrap()
    };
    use jsonwebtoken::Algorithm::{HS256, HS384};
    let good = json!({"sub": "7", "exp": now + 60});
    let none =
        "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.eyJzdWIiOiI3IiwiZXhwIjo0MDAwMDAwMDAwfQ.".to_owned();
    for (what, token) in [
        (
            "expired",
            sign(HS256, SECRET, json!({"sub": "7", "exp": now - 10})),
        ),
        ("another algorithm", sign(HS384, SECRET, good.clone())),
        ("alg: none", none),
        (
            "another secret",
            sign(
                HS256,
                "another secret of more than 32 bytes..",
                good.clone(),
            ),
        ),
        (
            "the sample secret",
            sign(HS256, chat::http::SAMPLE_SECRET, good.clone()),
        ),
        (
            "no user",
            sign(HS256, SECRET, json!({"sub": "admin", "exp": now + 60})),
        ),
        ("no token at all", String::new()),
    ] {
        let mut socket = Socket::open(
            &instance.url,
            &[("authorization", format!("Bearer {token}"))],
        )
        .await;
        let (before, code) = socket.until_closed().await;
        assert_eq!(code, Some(Close::Unauthenticated.code()), "{what}");
        assert!(
            before.len() == 1 && before[0].contains("unauthenticated"),
            "{what}: {before:?}"
        );
    }
    let in_the_url = reqwest::get(format!(
        "{}/v1/dialogs?token={}",
        instance.url,
        sign(HS256, SECRET, good)
    ))
    .await
    .unwrap();
    assert_eq!(in_the_url.status().as_u16(), 401);

    // A sender that is named in the frame is not looked at, and a dialog of others cannot be named
    // at all.
    let (mut seven, mut forty_two) = (
        Socket::of(&instance, 7).await,
        Socket::of(&instance, 42).await,
    );
    seven.send(json!({"type": "send", "key": "k", "to": 42, "text": "x", "from": 1, "user": 1, "dialog": "1_2", "seq": 99})).await;
    assert_eq!(seven.sent().await.1, 1);
    let message = forty_two.message().await;
    assert_eq!((message.from, message.dialog.as_str()), (7, "7_42"));
    seven
        .send(json!({"type": "history", "with": 42, "dialog": "42_99", "user": 42}))
        .await;
    assert!(
        matches!(seven.next().await, chat_wire::ServerFrame::History { page, .. } if page.dialog == "7_42")
    );
    seven
        .send(json!({"type": "history", "dialog": "42_99"}))
        .await;
    assert_eq!(seven.error().await.code, ErrorCode::BadRequest);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_was_written_and_no_secret_is_in_the_log() {
    let (_databases, instance) = instance().await;
    let mut seven = Socket::of(&instance, 7).await;
    seven
        .send_text("a-key-to-be-kept", 42, "a text to be kept")
        .await;
    seven.sent().await;
    seven
        .send(json!({"type": "send", "key": "k", "to": "a text to be kept", "text": 1}))
        .await;
    seven.error().await;
    let log = instance.log();
    assert!(log.contains("session begins"), "the log is verbose: {log}");
    let token = instance.access().token(7).await.unwrap();
    for secret in [
        SECRET,
        "a text to be kept",
        "a-key-to-be-kept",
        token.rsplit('.').next().unwrap(),
    ] {
        assert!(!log.contains(secret), "{log}");
    }
}

/// Reads of sessions that have gone are not carried out, and hold nothing.
#[tokio::test(flavor = "multi_thread")]
async fn reads_that_nobody_waits_for_any_more_hold_up_nobody() {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    let settings = [("STORE__READ_CONNECTIONS", "1")];
    let instance = Instance::start(&databases.shards_file(), &settings).await;
    let mut seven = Socket::of(&instance, 7).await;
    for n in 0..20 {
        seven.send_text(&format!("k{n}"), 42, "x").await;
        seven.sent().await;
    }
    for _ in 0..30 {
        let mut gone = Socket::of(&instance, 7).await;
        for before in 2..10 {
            gone.send(json!({"type": "history", "id": "x", "with": 42, "before": before}))
                .await;
        }
    }
    until("all of them have gone", async || {
        let metrics = reqwest::get(format!("{}/metrics", instance.admin));
        let metrics = metrics.await.unwrap().text().await.unwrap();
        metrics.contains("chat_sessions 1\n").then_some(())
    })
    .await;
    let api = instance.api(42).await;
    let page = api.history(7, &[("limit", 5)]).await.unwrap();
    assert_eq!(page.last, 20);
}

/// One budget over all sessions and REST: a user who has spent it is refused, with the time to
/// wait; other users are not.
#[tokio::test(flavor = "multi_thread")]
async fn who_asks_for_too_much_work_is_told_when_to_come_again_and_others_notice_nothing() {
    let databases = Databases::new(Kind::Sqlite, 2).await;
    let settings = [
        ("LIMITS__WORK_PER_SECOND", "5"),
        ("LIMITS__WORK_BURST", "20"),
    ];
    let instance = Instance::start(&databases.shards_file(), &settings).await;
    let (mut one, mut two) = (
        Socket::of(&instance, 7).await,
        Socket::of(&instance, 7).await,
    );
    for socket in [&mut one, &mut two] {
        for n in 0..8 {
            socket
                .send(json!({"type": "inbox", "id": n.to_string()}))
                .await;
        }
    }
    let mut refused = None;
    for socket in [&mut one, &mut two] {
        for _ in 0..8 {
            if let chat_wire::ServerFrame::Error(error) = socket.next().await {
                assert_eq!(error.code, ErrorCode::RateLimited);
                refused = error.retry_after_ms;
            }
        }
    }
    let wait = refused.expect("16 inboxes of two shards cost more than 20");
    assert!((1..10_000).contains(&wait), "{wait}");
    // REST pays from the same budget.
    let inbox = format!("{}/v1/dialogs", instance.url);
    let token = instance.access().token(7).await.unwrap();
    let asked = reqwest::Client::new().get(inbox).bearer_auth(token);
    assert_eq!(asked.send().await.unwrap().status().as_u16(), 429);
    let users: Vec<u64> = (1..=30).collect();
    one.send(json!({"type": "watch", "users": users})).await;
    assert_eq!(one.error().await.code, ErrorCode::RateLimited);
    // What another asks for is done, and what this one sends is stored.
    let other = instance.api(42).await;
    assert!(other.inbox(10, None).await.unwrap().dialogs.is_empty());
    one.send_text("k", 42, "x").await;
    assert_eq!(one.sent().await.1, 1);
}

/// Control frames and fragments count like every other frame.
#[tokio::test(flavor = "multi_thread")]
async fn pings_pongs_and_fragments_without_end_close_the_session() {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    let settings = [("LIMITS__FRAMES_PER_SECOND", "50")];
    let instance = Instance::start(&databases.shards_file(), &settings).await;
    for (what, frame) in [
        ("pings", header(0x89, 0)),
        ("pongs", header(0x8a, 0)),
        (
            "messages in two frames",
            [header(0x01, 0), header(0x80, 0)].concat(),
        ),
    ] {
        // The length of a ping is one byte.
        let frame: Vec<u8> = if frame[0] & 0x08 == 0 {
            frame
        } else {
            vec![frame[0], 0x80, 0, 0, 0, 0]
        };
        let mut stream = raw(&instance, 7).await;
        stream.write_all(&frame.repeat(60)).await.unwrap();
        let mut received = Vec::new();
        // The server closes; what comes last is its close frame.
        let _ = stream.read_to_end(&mut received).await;
        let code = Close::TooManyFrames.code().to_be_bytes();
        assert!(
            received.windows(2).any(|window| window == code),
            "{what}: {}",
            String::from_utf8_lossy(&received)
        );
    }
}

/// A number of a token that no clock can add up.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_for_ever_is_taken_and_breaks_nothing() {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    let instance = Instance::start(&databases.shards_file(), &[]).await;
    let token = jsonwebtoken::encode(
        &jsonwebtoken::Header::default(),
        &json!({"sub": "7", "exp": u64::MAX}),
        &jsonwebtoken::EncodingKey::from_secret(SECRET.as_bytes()),
    );
    let header = [("authorization", format!("Bearer {}", token.unwrap()))];
    let mut socket = Socket::open(&instance.url, &header).await;
    assert!(matches!(socket.next().await, ServerFrame::Welcome { .. }));
    for n in 1..=3 {
        socket.send_text(&format!("k{n}"), 42, "x").await;
        assert_eq!(socket.sent().await.1, n);
    }
    drop(socket);
    let metrics = format!("{}/metrics", instance.admin);
    until("the session is not counted any more", async || {
        let text = reqwest::get(&metrics).await.unwrap().text().await.unwrap();
        text.contains("\nchat_sessions 0\n").then_some(())
    })
    .await;
    assert!(!instance.log().contains("panicked"), "{}", instance.log());
}

/// RFC 6455, 1.4: frames behind a Close are discarded.
#[tokio::test(flavor = "multi_thread")]
async fn a_frame_behind_a_close_is_not_executed() {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    let instance = Instance::start(&databases.shards_file(), &[]).await;
    let mut stream = raw(&instance, 7).await;
    let text = json!({"type": "send", "key": "k", "to": 42, "text": "too late"}).to_string();
    // A control frame has its length in one byte.
    let close = [&[0x88, 0x82, 0, 0, 0, 0][..], &1000_u16.to_be_bytes()].concat();
    let send = [header(0x81, text.len() as u64), text.into_bytes()].concat();
    stream.write_all(&[close, send].concat()).await.unwrap();
    let mut received = Vec::new();
    let _ = stream.read_to_end(&mut received).await;
    assert!(
        received
            .windows(2)
            .any(|code| code == 1000_u16.to_be_bytes()),
        "{received:?}"
    );
    let log = instance.api(42).await.log_upwards(7).await.unwrap();
    assert_eq!(log, []);
}
