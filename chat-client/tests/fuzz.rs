//! The client against a server that sends anything: it does not panic, and goes on.

#![allow(missing_docs, clippy::unwrap_used, clippy::wildcard_enum_match_arm)]

use chat_client::{Access, Client, Event, TokenSource};
use chat_wire::ClientFrame;
use futures_util::{SinkExt, StreamExt};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use testkit::fuzz::{executions, mutated};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::{WebSocketStream, accept_hdr_async};

const WELCOME: &str = r#"{"type":"welcome","user":7,"session":"1","protocol":"chat.v1","limits":{"text_chars":4000,"frame_bytes":65536,"history_page":200,"inbox_page":100,"sends_per_second":1000,"frames_per_second":5000},"now":"2026-11-21T05:00:00.123456Z"}"#;

const FRAMES: [&str; 14] = [
    WELCOME,
    r#"{"type":"sent","key":"c1","dialog":"7_42","seq":119,"at":"2026-11-21T05:00:00.123456Z"}"#,
    r#"{"type":"message","dialog":"7_42","seq":119,"from":7,"to":42,"text":"hi","at":"2026-11-21T05:00:00.123456Z","key":"c1"}"#,
    r#"{"type":"message","dialog":"7_42","seq":120,"from":42,"to":7,"text":"hi","at":"x"}"#,
    r#"{"type":"message","dialog":"nonsense","seq":18446744073709551615,"from":42,"to":7,"text":"hi","at":"x"}"#,
    r#"{"type":"history","id":"1","dialog":"7_42","messages":[],"first":1,"last":1,"more":true,"gap":false}"#,
    r#"{"type":"inbox","id":"2","dialogs":[],"cursor":null,"incomplete":[]}"#,
    r#"{"type":"resumed","id":"1","positions":{"7_42":119},"resync":["7_42","7_9"],"reads":[{"dialog":"7_42","user":42,"seq":118}],"incomplete":["shard1"],"now":"x"}"#,
    r#"{"type":"read","dialog":"7_42","user":42,"seq":118}"#,
    r#"{"type":"typing","dialog":"7_42","user":42}"#,
    r#"{"type":"presence","user":42,"online":true}"#,
    r#"{"type":"done","id":"1"}"#,
    r#"{"type":"error","code":"rate_limited","message":"x","retryable":true,"retry_after_ms":1,"key":"c1","dialog":"7_42"}"#,
    r#"{"type":"error","code":"internal","message":"x","retryable":false,"retry_after_ms":null,"id":"1"}"#,
];

/// Accepts a client, and selects the subprotocol that it offers.
async fn accept(listener: &TcpListener) -> WebSocketStream<TcpStream> {
    let (stream, _) = listener.accept().await.unwrap();
    #[allow(clippy::result_large_err)] // of the library
    let protocol = |_: &Request, mut response: Response| -> Result<Response, ErrorResponse> {
        let name = "chat.v1".parse().unwrap();
        response
            .headers_mut()
            .insert("sec-websocket-protocol", name);
        Ok(response)
    };
    accept_hdr_async(stream, protocol).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_goes_on_whatever_a_server_sends() {
    let (seed, rounds) = (testkit::seed(), executions(20));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let mut sent = 0_u64;
    for round in 0..rounds {
        let mut rng = StdRng::seed_from_u64(seed.wrapping_add(round));
        let access = Access::new(&url, TokenSource::Given("x".into()));
        let (client, mut events) = Client::start(access, 7);
        let takes = tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                if let Event::Closed(e) = event {
                    println!("closed: {e}");
                }
            }
        });
        let mut server = accept(&listener).await;
        server.send(WELCOME.into()).await.unwrap();
        client.follow("7_42".into(), 100).await.unwrap();
        client.watch(vec![42]).await.unwrap();
        client.mark_read(42, 100).await.unwrap();
        // A send, whose answer comes when the server has come to its senses.
        let answered = client
            .enqueue(42, "the send".into(), "text".into())
            .await
            .unwrap();
        for _ in 0..200 {
            let message = match rng.random_range(0..20) {
                0 => Message::Binary(mutated(&mut rng, &FRAMES).into()),
                1 => Message::Ping(b"x".to_vec().into()),
                _ => match String::from_utf8(mutated(&mut rng, &FRAMES)) {
                    Ok(text) => Message::text(text),
                    Err(_) => continue,
                },
            };
            server.send(message).await.unwrap();
            sent += 1;
        }
        let answers = tokio::spawn(async move {
            while let Some(Ok(message)) = server.next().await {
                let Ok(text) = message.to_text() else {
                    continue;
                };
                if let Ok(ClientFrame::Send { key, .. }) = serde_json::from_str(text) {
                    let answer = format!(
                        r#"{{"type":"sent","key":"{key}","dialog":"7_42","seq":500,"at":"2026-11-21T05:00:00.123456Z"}}"#
                    );
                    server.send(answer.into()).await.unwrap();
                }
            }
        });
        let answer = tokio::time::timeout(testkit::PATIENCE, answered).await;
        let answer = answer.unwrap_or_else(|_| panic!("no answer in round {round}"));
        assert_eq!(answer.unwrap().seq, 500);
        drop(client);
        answers.await.unwrap();
        takes.await.unwrap();
    }
    println!("{rounds} clients, {sent} frames");
}
