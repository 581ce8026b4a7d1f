//! The service as a client meets it: WebSocket and REST, an instance of its own, SQLite below.

#![allow(missing_docs, clippy::wildcard_enum_match_arm)]

use chat_client::{Access, Api, TokenSource};
use chat_wire::{ClientFrame, Close, ErrorCode, ServerFrame};
use futures_util::SinkExt;
use serde_json::json;
use std::collections::BTreeSet;
use testkit::instance::{Instance, refusal};
use testkit::socket::Socket;
use testkit::{Databases, Kind, SECRET, until};
use tokio_tungstenite::tungstenite::Message;

async fn instance(settings: testkit::instance::Settings<'_>) -> (Databases, Instance) {
    let databases = Databases::new(Kind::Sqlite, 4).await;
    let instance = Instance::start(&databases.shards_file(), settings).await;
    (databases, instance)
}

#[tokio::test(flavor = "multi_thread")]
async fn two_people_talk_and_both_read_the_same_history() {
    let (_databases, instance) = instance(&[]).await;
    let (mut seven, mut other_tab, mut forty_two) = (
        Socket::of(&instance, 7).await,
        Socket::of(&instance, 7).await,
        Socket::of(&instance, 42).await,
    );
    seven.send_text("a", 42, "hello").await;
    assert_eq!(seven.sent().await, ("a".into(), 1));
    forty_two.send_text("a", 7, "hi").await;
    assert_eq!(forty_two.message().await.text, "hello");
    assert_eq!(forty_two.sent().await, ("a".into(), 2));
    // The tab that did not send receives both; the one that sent receives only the answer.
    assert_eq!(
        (
            other_tab.message().await.text.as_str(),
            other_tab.message().await.text.as_str()
        ),
        ("hello", "hi")
    );
    assert_eq!(seven.message().await.from, 42);

    seven
        .send(json!({"type": "history", "id": "h", "with": 42}))
        .await;
    let ServerFrame::History { id, page } = seven.next().await else {
        panic!()
    };
    assert_eq!(
        (id.as_deref(), page.first, page.last, page.more, page.gap),
        (Some("h"), 1, 2, false, false)
    );
    let messages: Vec<_> = page
        .messages
        .iter()
        .map(|m| (m.seq, m.from, m.to, m.text.as_str()))
        .collect();
    assert_eq!(
        messages,
        [(1, 7, Some(42), "hello"), (2, 42, Some(7), "hi")]
    );
    assert_eq!(
        instance.api(42).await.log_downwards(7).await.unwrap(),
        page.messages
    );

    forty_two
        .send(json!({"type": "read", "with": 7, "seq": 9}))
        .await;
    for socket in [&mut forty_two, &mut seven, &mut other_tab] {
        assert!(
            matches!(socket.next().await, ServerFrame::Read(mark) if (mark.user, mark.seq) == (42, 2))
        );
    }
    forty_two.send(json!({"type": "inbox", "id": "i"})).await;
    let ServerFrame::Inbox { page, .. } = forty_two.next().await else {
        panic!()
    };
    assert_eq!(
        (
            page.dialogs[0].with,
            page.dialogs[0].read,
            page.dialogs[0].unread,
            page.incomplete.len()
        ),
        (Some(7), 2, 0, 0)
    );
    let inbox = instance.api(7).await.inbox(10, None).await.unwrap();
    assert_eq!(
        (
            inbox.dialogs[0].with,
            inbox.dialogs[0].read,
            inbox.dialogs[0].unread
        ),
        (Some(42), 0, 1)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_add_up_to_the_dialog_in_both_directions_and_inboxes_to_all_dialogs() {
    let (_databases, instance) = instance(&[("LIMITS__SENDS_BURST", "10000")]).await;
    let api = instance.api(7).await;
    for n in 0..430 {
        api.send(42, &format!("k{n}"), &format!("{n}"))
            .await
            .unwrap();
    }
    let (up, down) = (
        api.log_upwards(42).await.unwrap(),
        api.log_downwards(42).await.unwrap(),
    );
    assert_eq!(up, down);
    assert_eq!(
        up.iter().map(|m| m.seq).collect::<Vec<_>>(),
        (1..=430).collect::<Vec<_>>()
    );

    for peer in 100..125 {
        api.send(peer, "k", "x").await.unwrap();
    }
    let (mut seen, mut cursor) = (Vec::new(), None);
    loop {
        let page = api.inbox(10, cursor.as_deref()).await.unwrap();
        seen.extend(page.dialogs.iter().filter_map(|dialog| dialog.with));
        cursor = page.cursor;
        if cursor.is_none() {
            break;
        }
    }
    assert_eq!(seen, (100..125).rev().chain([42]).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_mistake_is_answered_with_its_code_and_the_connection_stays() {
    let (_databases, instance) = instance(&[]).await;
    let mut socket = Socket::of(&instance, 7).await;
    let long = "x".repeat(4001);
    let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
    for (frame, code, key) in [
        ("{".to_owned(), ErrorCode::BadRequest, None),
        ("[]".to_owned(), ErrorCode::BadRequest, None),
        (deep, ErrorCode::BadRequest, None),
        (
            r#"{"type":"dance","id":"x"}"#.to_owned(),
            ErrorCode::BadRequest,
            None,
        ),
        (
            r#"{"type":"send","key":"k"}"#.to_owned(),
            ErrorCode::BadRequest,
            Some("k"),
        ),
        (
            r#"{"type":"send","key":"k","to":"42","text":"x"}"#.to_owned(),
            ErrorCode::BadRequest,
            Some("k"),
        ),
        (
            r#"{"type":"send","key":"k","to":-1,"text":"x"}"#.to_owned(),
            ErrorCode::BadRequest,
            Some("k"),
        ),
        (
            r#"{"type":"send","key":"k","to":42,"text":"\ud800"}"#.to_owned(),
            ErrorCode::BadRequest,
            Some("k"),
        ),
        (
            json!({"type": "send", "key": "k", "to": 0, "text": "x"}).to_string(),
            ErrorCode::BadUser,
            Some("k"),
        ),
        (
            json!({"type": "send", "key": "k", "to": 1u64 << 53, "text": "x"}).to_string(),
            ErrorCode::BadUser,
            Some("k"),
        ),
        (
            json!({"type": "send", "key": "k", "to": 42, "text": ""}).to_string(),
            ErrorCode::TextEmpty,
            Some("k"),
        ),
        (
            json!({"type": "send", "key": "k", "to": 42, "text": long}).to_string(),
            ErrorCode::TextTooLong,
            Some("k"),
        ),
        (
            json!({"type": "send", "key": "", "to": 42, "text": "x"}).to_string(),
            ErrorCode::BadRequest,
            Some(""),
        ),
        (
            json!({"type": "send", "key": "k".repeat(65), "to": 42, "text": "x"}).to_string(),
            ErrorCode::BadRequest,
            Some(&*"k".repeat(65)),
        ),
        (
            json!({"type": "history", "with": 42, "before": 1, "after": 1}).to_string(),
            ErrorCode::BadRequest,
            None,
        ),
        (
            json!({"type": "history", "with": 42, "limit": 0}).to_string(),
            ErrorCode::BadRequest,
            None,
        ),
        (
            json!({"type": "inbox", "cursor": "nonsense"}).to_string(),
            ErrorCode::BadRequest,
            None,
        ),
        (
            json!({"type": "ping", "id": "x".repeat(65)}).to_string(),
            ErrorCode::BadRequest,
            None,
        ),
        (
            json!({"type": "read", "with": 999, "seq": 1}).to_string(),
            ErrorCode::NotFound,
            None,
        ),
        (
            json!({"type": "auth", "token": "nonsense"}).to_string(),
            ErrorCode::Unauthenticated,
            None,
        ),
    ] {
        use futures_util::SinkExt;
        socket
            .0
            .send(tokio_tungstenite::tungstenite::Message::Text(
                frame.clone().into(),
            ))
            .await
            .unwrap();
        let error = socket.error().await;
        assert_eq!(
            (error.code, error.key.as_deref()),
            (code, key),
            "{frame} → {error:?}"
        );
        assert!(!error.retryable);
    }
    use futures_util::SinkExt;
    socket
        .0
        .send(tokio_tungstenite::tungstenite::Message::Binary(
            vec![1, 2, 3].into(),
        ))
        .await
        .unwrap();
    assert_eq!(socket.error().await.code, ErrorCode::BadRequest);
    socket
        .send(json!({"type": "ping", "id": "still here", "unknown": "fields are ignored"}))
        .await;
    assert_eq!(
        socket.next().await,
        ServerFrame::Pong {
            id: Some("still here".into())
        }
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn rest_answers_mistakes_with_the_same_codes_and_fitting_statuses() {
    let (_databases, instance) = instance(&[]).await;
    let token = instance.access().token(7).await.unwrap();
    let http = reqwest::Client::new();
    let url = |path: &str| format!("{}{path}", instance.url);
    let long = json!({"key": "k", "text": "x".repeat(4001)});
    for (request, status, code) in [
        (http.get(url("/v1/dialogs")), 401, "unauthenticated"),
        (
            http.get(url("/v1/dialogs")).bearer_auth("nonsense"),
            401,
            "unauthenticated",
        ),
        (
            http.get(url("/v1/nothing")).bearer_auth(&token),
            404,
            "not_found",
        ),
        (
            http.get(url("/v1/dialogs/0/messages")).bearer_auth(&token),
            400,
            "bad_user",
        ),
        (
            http.get(url("/v1/dialogs/seven/messages"))
                .bearer_auth(&token),
            400,
            "bad_user",
        ),
        (
            http.get(url("/v1/dialogs/42/messages?before=x"))
                .bearer_auth(&token),
            400,
            "bad_request",
        ),
        (
            http.get(url("/v1/dialogs/42/messages?before=1&after=1"))
                .bearer_auth(&token),
            400,
            "bad_request",
        ),
        (
            http.post(url("/v1/dialogs/42/messages"))
                .bearer_auth(&token)
                .body("{"),
            400,
            "bad_request",
        ),
        (
            http.post(url("/v1/dialogs/42/messages"))
                .bearer_auth(&token)
                .json(&long),
            400,
            "text_too_long",
        ),
        (
            http.post(url("/v1/dialogs/42/messages"))
                .bearer_auth(&token)
                .json(&json!({"key": "k", "text": ""})),
            400,
            "text_empty",
        ),
        (
            http.post(url("/v1/dialogs/42/messages"))
                .bearer_auth(&token)
                .json(&json!({"key": "k", "text": "x".repeat(100_000)})),
            413,
            "frame_too_large",
        ),
        (
            http.put(url("/v1/dialogs/42/read"))
                .bearer_auth(&token)
                .json(&json!({"seq": 1})),
            404,
            "not_found",
        ),
        (
            http.post(url("/v1/dev/token")).json(&json!({"user": 7})),
            404,
            "not_found",
        ),
    ] {
        let response = request.send().await.unwrap();
        let (found, url) = (response.status().as_u16(), response.url().clone());
        let body: serde_json::Value = response.json().await.unwrap();
        assert_eq!(
            (found, body["code"].as_str()),
            (status, Some(code)),
            "{url} {body}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_stored_once_and_not_for_another_text() {
    let (databases, instance) = instance(&[]).await;
    let mut socket = Socket::of(&instance, 7).await;
    for _ in 0..3 {
        socket.send_text("k", 42, "hello").await;
        assert_eq!(socket.sent().await, ("k".into(), 1));
    }
    socket.send_text("k", 42, "something else").await;
    let error = socket.error().await;
    assert_eq!(
        (error.code, error.retryable, error.key.as_deref()),
        (ErrorCode::KeyReused, false, Some("k"))
    );
    let http = reqwest::Client::new();
    let token = instance.access().token(7).await.unwrap();
    let post = async |key: &str| {
        let url = format!("{}/v1/dialogs/42/messages", instance.url);
        http.post(url)
            .bearer_auth(&token)
            .json(&json!({"key": key, "text": "hello"}))
            .send()
            .await
            .unwrap()
            .status()
            .as_u16()
    };
    assert_eq!(
        (post("k").await, post("new").await, post("new").await),
        (200, 201, 200)
    );
    assert_eq!(databases.total("SELECT COUNT(*) FROM messages").await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_say_which_one_it_was_and_when_to_try_again() {
    let (_databases, instance) = instance(&[
        ("LIMITS__SENDS_PER_SECOND", "5"),
        ("LIMITS__SENDS_BURST", "3"),
        ("LIMITS__FRAMES_PER_SECOND", "30"),
        ("LIMITS__SESSIONS_PER_USER", "2"),
    ])
    .await;
    let mut socket = Socket::of(&instance, 7).await;
    for n in 0..4 {
        socket.send_text(&format!("k{n}"), 42, "x").await;
    }
    let mut limited = 0;
    for _ in 0..4 {
        match socket.next().await {
            ServerFrame::Sent { .. } => {}
            ServerFrame::Error(error) => {
                assert_eq!(
                    (error.code, error.retryable),
                    (ErrorCode::RateLimited, true)
                );
                assert!((1..=1000).contains(&error.retry_after_ms.unwrap()));
                limited += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(limited, 1);
    let _second = Socket::of(&instance, 7).await;
    let token = instance.access().token(7).await.unwrap();
    let mut third = Socket::open(
        &instance.url,
        &[("authorization", format!("Bearer {token}"))],
    )
    .await;
    let why = third.error().await;
    assert_eq!((why.code, why.retryable), (ErrorCode::Overloaded, true));
    assert_eq!(why.retry_after_ms, Some(5000));
    assert!(
        why.message.contains("at most 2 sessions"),
        "{}",
        why.message
    );
    assert_eq!(
        third.until_closed().await.1,
        Some(Close::TooManyConnections.code())
    );
    let ping = Message::text(json!({"type": "ping"}).to_string());
    for _ in 0..40 {
        // The server may have closed already.
        let _ = socket.0.send(ping.clone()).await;
    }
    assert_eq!(
        socket.until_closed().await.1,
        Some(Close::TooManyFrames.code())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_over_rest_and_an_address_that_connects_are_limited_and_told_when_to_come_again() {
    let (_databases, instance) = instance(&[
        ("LIMITS__REQUESTS_PER_SECOND", "5"),
        ("LIMITS__REQUESTS_BURST", "3"),
        ("LIMITS__CONNECTS_PER_SECOND", "1"),
        ("LIMITS__CONNECTS_BURST", "2"),
    ])
    .await;
    let token = instance.access().token(7).await.unwrap();
    let http = reqwest::Client::new();
    let ask = async || {
        let url = format!("{}/v1/dialogs", instance.url);
        http.get(url).bearer_auth(&token).send().await.unwrap()
    };
    for _ in 0..3 {
        assert_eq!(ask().await.status(), 200);
    }
    let refused = ask().await;
    assert_eq!(refused.status(), 429);
    assert_eq!(refused.headers()["retry-after"], "1");
    let body: chat_wire::ErrorBody = refused.json().await.unwrap();
    assert_eq!(body.code, ErrorCode::RateLimited);
    assert!((1..=200).contains(&body.retry_after_ms.unwrap()));
    // Our own client waits for the time in the answer, and another user has a budget of their own.
    assert!(instance.api(7).await.inbox(10, None).await.is_ok());
    assert!(instance.api(8).await.inbox(10, None).await.is_ok());
    let (_one, _two) = (
        Socket::of(&instance, 7).await,
        Socket::of(&instance, 8).await,
    );
    let headers = [("authorization", format!("Bearer {token}"))];
    let mut third = Socket::open(&instance.url, &headers).await;
    let why = third.error().await;
    assert_eq!((why.code, why.retryable), (ErrorCode::RateLimited, true));
    assert!((1..=1000).contains(&why.retry_after_ms.unwrap()));
    assert_eq!(
        third.until_closed().await.1,
        Some(Close::TooManyConnections.code())
    );
    let (_client, mut events) = chat_client::Client::start(instance.access(), 9);
    until("a client of ours comes in by waiting", async || {
        matches!(events.recv().await, Some(chat_client::Event::Connected)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_of_one_address_are_counted() {
    let (_databases, instance) = instance(&[("LIMITS__CONNECTIONS_PER_IP", "2")]).await;
    let (one, _two) = (
        Socket::of(&instance, 7).await,
        Socket::of(&instance, 8).await,
    );
    let token = instance.access().token(9).await.unwrap();
    let knock = async || {
        Socket::open(
            &instance.url,
            &[("authorization", format!("Bearer {token}"))],
        )
        .await
        .until_closed()
        .await
    };
    assert_eq!(knock().await.1, Some(Close::TooManyConnections.code()));
    drop(one);
    until("a place is free again", async || {
        let mut socket = Socket::open(
            &instance.url,
            &[("authorization", format!("Bearer {token}"))],
        )
        .await;
        use futures_util::StreamExt;
        let first = socket.0.next().await.unwrap().unwrap();
        first.to_text().unwrap().contains("welcome").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_renewed_in_time_or_closes_the_session() {
    let (_databases, instance) = instance(&[]).await;
    let mint = |user: u64, seconds: u64| {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs();
        let claims = json!({"sub": user.to_string(), "exp": now + seconds});
        let key = jsonwebtoken::EncodingKey::from_secret(SECRET.as_bytes());
        jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).unwrap()
    };
    let open = async |token: String| {
        Socket::open(
            &instance.url,
            &[("authorization", format!("Bearer {token}"))],
        )
        .await
    };
    let began = std::time::Instant::now();
    let (mut renewed, mut forgotten) = (open(mint(7, 3)).await, open(mint(7, 3)).await);
    let mut of_another = open(mint(7, 3)).await;
    of_another.next().await;
    of_another
        .send(json!({"type": "auth", "token": mint(8, 60)}))
        .await;
    assert_eq!(of_another.error().await.code, ErrorCode::Forbidden);
    renewed.next().await;
    renewed
        .send(json!({"type": "auth", "token": mint(8, 60)}))
        .await;
    assert_eq!(renewed.error().await.code, ErrorCode::Forbidden);
    renewed
        .send(json!({"type": "auth", "token": mint(7, 60)}))
        .await;
    assert!(matches!(
        renewed.next().await,
        ServerFrame::Authenticated { .. }
    ));
    let (before, code) = forgotten.until_closed().await;
    assert_eq!(code, Some(Close::Unauthenticated.code()));
    assert!(before.last().unwrap().contains("expired"), "{before:?}");
    let (_, code) = of_another.until_closed().await;
    assert_eq!(
        code,
        Some(Close::Unauthenticated.code()),
        "another's token keeps nothing open"
    );
    let lasted = began.elapsed().as_secs();
    assert!((2..3 + 5).contains(&lasted), "{lasted} s");
    renewed.send(json!({"type": "ping", "id": "x"})).await;
    assert_eq!(
        renewed.next().await,
        ServerFrame::Pong {
            id: Some("x".into())
        }
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_brings_its_token_as_a_subprotocol_and_only_from_an_origin_that_is_allowed() {
    let (_databases, instance) = instance(&[(
        "AUTH__ALLOWED_ORIGINS",
        "https://app.example.org,https://two.example.org",
    )])
    .await;
    let token = instance.access().token(7).await.unwrap();
    let own = instance.url.clone();
    for (origin, allowed) in [
        (own.as_str(), true),
        ("https://two.example.org", true),
        ("https://evil.example.org", false),
        ("https://app.example.org.evil.org", false),
        ("null", false),
    ] {
        let headers = [
            ("sec-websocket-protocol", format!("chat.v1, bearer.{token}")),
            ("origin", origin.to_owned()),
        ];
        let mut socket = Socket::open(&instance.url, &headers).await;
        if allowed {
            assert!(
                matches!(socket.next().await, ServerFrame::Welcome { user: 7, .. }),
                "{origin}"
            );
        } else {
            assert_eq!(
                socket.until_closed().await.1,
                Some(Close::ForbiddenOrigin.code()),
                "{origin}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_description_of_the_api_the_page_and_the_metrics_are_there() {
    let (_databases, instance) = instance(&[]).await;
    let mut socket = Socket::of(&instance, 7).await;
    socket.send_text("a", 42, "hello").await;
    socket.sent().await;
    let (status, api) = instance
        .get(&format!("{}/v1/openapi.json", instance.url))
        .await;
    assert_eq!(status, 200);
    for path in [
        "/v1/dialogs",
        "/v1/dialogs/{user}/messages",
        "/v1/dialogs/{user}/read",
    ] {
        assert!(api["paths"][path].is_object(), "{path}");
    }
    for (url, expected) in [
        (format!("{}/", instance.url), "<title>chat</title>"),
        (format!("{}/docs", instance.url), "swagger-ui"),
        (format!("{}/livez", instance.url), "ok"),
        (
            format!("{}/metrics", instance.admin),
            "chat_messages_stored_total{shard=",
        ),
        (format!("{}/metrics", instance.admin), "chat_sessions 1"),
        (
            format!("{}/admin/where/42/7", instance.admin),
            "\"dialog\":\"7_42\"",
        ),
        (
            format!("{}/admin/topology", instance.admin),
            "\"version\":1",
        ),
    ] {
        let text = reqwest::get(&url).await.unwrap().text().await.unwrap();
        assert!(text.contains(expected), "{url}: {text}");
    }
    let openmetrics = "application/openmetrics-text;version=1.0.0";
    let older = "text/plain;version=0.0.4";
    for (accept, expected, type_line) in [
        (
            "*/*".to_owned(),
            openmetrics,
            "# TYPE chat_received_frames counter",
        ),
        (
            older.to_owned(),
            older,
            "# TYPE chat_received_frames_total counter",
        ),
        (
            format!("{openmetrics};q=0.75,{older};q=0.5,*/*;q=0.1"),
            openmetrics,
            "# TYPE chat_received_frames counter",
        ),
        (
            format!("{openmetrics};q=0.3,{older};q=0.5"),
            older,
            "# TYPE chat_received_frames_total counter",
        ),
    ] {
        let request = reqwest::Client::new()
            .get(format!("{}/metrics", instance.admin))
            .header("Accept", &accept);
        let response = request.send().await.unwrap();
        let kind = response.headers()["content-type"].to_str().unwrap();
        let kind = kind.replace("; ", ";");
        assert!(kind.starts_with(expected), "{accept}: {kind}");
        let text = response.text().await.unwrap();
        assert!(
            text.lines().any(|line| line == type_line),
            "{accept}: {text}"
        );
        assert_eq!(text.contains("# EOF"), expected == openmetrics);
        let described = |name: &str| text.contains(&format!("# HELP {name} Frames received"));
        let (base, total) = ("chat_received_frames", "chat_received_frames_total");
        assert_eq!(described(base), expected == openmetrics);
        assert_eq!(described(total), expected == older);
    }
    assert_eq!(
        reqwest::get(format!("{}/metrics", instance.url))
            .await
            .unwrap()
            .status()
            .as_u16(),
        404,
        "not on the public listener"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_on_several_threads_talk_and_are_handed_over() {
    let (_databases, mut instance) =
        instance(&[("THREADS", "3"), ("LIMITS__SHUTDOWN_MS", "100")]).await;
    let mut sockets = Vec::new();
    for user in 0..6 {
        sockets.push(Socket::of(&instance, user + 1).await);
    }
    // Each thread takes its turn with a connection: from every thread to every other one.
    for from in 0..3 {
        for to in 3..6 {
            let key = format!("{from}-{to}");
            sockets[from].send_text(&key, to as u64 + 1, &key).await;
            sockets[from].sent().await;
            assert_eq!(sockets[to].message().await.text, key);
        }
    }
    let metrics = reqwest::get(format!("{}/metrics", instance.admin)).await;
    let metrics = metrics.unwrap().text().await.unwrap();
    let busy = |thread: usize| -> f64 {
        let name = format!("chat_thread_busy_seconds_total{{thread=\"{thread}\"}} ");
        let value = metrics.lines().find_map(|line| line.strip_prefix(&name));
        value
            .unwrap_or_else(|| panic!("no {name}in {metrics}"))
            .parse()
            .unwrap()
    };
    assert!((0..3).all(|thread| busy(thread) > 0.0), "{metrics}");
    instance.terminate();
    for socket in &mut sockets {
        assert_eq!(socket.until_closed().await.1, Some(Close::Restart.code()));
    }
    assert!(instance.ended().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_is_asked_to_stop_hands_its_sessions_over() {
    let (_databases, mut instance) = instance(&[("LIMITS__SHUTDOWN_MS", "500")]).await;
    let mut sockets = Vec::new();
    for user in 1..=20 {
        sockets.push(Socket::of(&instance, user).await);
    }
    // What was asked before is still answered.
    for (n, socket) in sockets.iter_mut().enumerate() {
        socket
            .send_text("last", n as u64 + 100, "before the end")
            .await;
    }
    instance.terminate();
    for socket in &mut sockets {
        let (before, code) = socket.until_closed().await;
        assert_eq!(code, Some(Close::Restart.code()));
        assert!(
            before.iter().any(|frame| frame.contains("\"sent\"")),
            "{before:?}"
        );
    }
    assert!(instance.ended().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_must_be_mended_before_a_start_is_said_in_one_line() {
    let databases = Databases::new(Kind::Sqlite, 2).await;
    let good = databases.shards_file();
    let bad = databases.directory().join("bad.toml");
    std::fs::write(
        &bad,
        "[[shard]]\nname = \"a\"\nurl = \"sqlite:x\"\ncolour = 1\n",
    )
    .unwrap();
    let duplicate_url = databases.shards_file_with(&[
        databases.url(0),
        databases
            .url(0)
            .replace("sqlite:", "sqlite:./")
            .replace("./", "/"),
    ]);
    let missing = databases.directory().join("nowhere.toml");
    let sample = chat::http::SAMPLE_SECRET;
    for (shards, settings, expected) in [
        (
            &good,
            [("AUTH__SECRET", "")].as_slice(),
            "auth.secret is not set",
        ),
        (
            &good,
            &[("AUTH__SECRET", "short")],
            "auth.secret has 5 bytes",
        ),
        (&good, &[("AUTH__SECRET", sample)], "the sample secret"),
        (
            &good,
            &[("AUTH__ALGORITHM", "none")],
            "auth.algorithm 'none'",
        ),
        (
            &good,
            &[("AUTH__ALGORITHM", "EdDSA")],
            "auth.key_file is needed",
        ),
        (
            &good,
            &[("LIMITS__TEXT_CHARACTERS", "7")],
            "text_characters",
        ),
        (&good, &[("ADMIN_LISTEN", "0.0.0.0:0")], "set admin_token"),
        (
            &good,
            &[("ADMIN_LISTEN", "0.0.0.0:0"), ("ADMIN_TOKEN", "")],
            "set admin_token",
        ),
        (
            &good,
            &[("ADMIN_TOKEN", "short")],
            "admin_token has 5 bytes",
        ),
        (
            &good,
            &[("ADMIN_TOKEN", "sample-admin-token")],
            "the sample token",
        ),
        (
            &good,
            &[("AUTH__ALLOWED_ORIGINS", "https://a.example,b.example")],
            "allowed_origins has 'b.example'",
        ),
        (
            &good,
            &[("LIMITS__PING_EVERY_MS", "0")],
            "ping_every_ms is 0",
        ),
        (&missing, &[], "nowhere.toml"),
        (&bad, &[], "bad.toml: line 4: unknown field `colour`"),
        (&duplicate_url, &[], "every shard needs its own"),
    ] {
        let error = refusal(shards, settings);
        assert!(error.contains(expected), "{expected}: {error}");
        assert!(!error.contains("panicked"), "{error}");
    }
    drop(Instance::start(&good, &[("AUTH__SECRET", sample), ("DEMO", "true")]).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_not_kept_and_refusals_name_the_scheme() {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    let instance = Instance::start(&databases.shards_file(), &[]).await;
    let access = instance.access();
    let token = access.token(7).await.unwrap();
    let get = |path: &str| {
        access
            .http()
            .get(access.url(path))
            .bearer_auth(&token)
            .send()
    };
    for (path, cached) in [
        ("/v1/dialogs", "no-store"),
        ("/docs/", "no-store"),
        ("/", "no-cache"),
    ] {
        let answer = get(path).await.unwrap();
        assert_eq!(answer.status(), 200, "{path}");
        let header = |name: &str| answer.headers()[name].to_str().unwrap();
        assert_eq!(header("cache-control"), cached, "{path}");
        assert_eq!(header("x-content-type-options"), "nosniff", "{path}");
        assert!(
            header("content-security-policy").contains("frame-ancestors 'none'"),
            "{path}"
        );
    }
    for path in ["/v1/dialogs?limt=3", "/v1/dialogs/42/messages?befor=3"] {
        let answer = get(path).await.unwrap();
        assert_eq!(answer.status(), 400, "{path}");
        let error: serde_json::Value = answer.json().await.unwrap();
        assert_eq!(error["code"], "bad_request", "{path}: {error}");
    }
    let answer = access.http().get(access.url("/v1/dialogs")).send().await;
    assert_eq!(answer.unwrap().headers()["www-authenticate"], "Bearer");
}

/// A secret of digits is a text, and not a number that is printed in another form.
#[tokio::test(flavor = "multi_thread")]
async fn a_secret_of_digits_is_taken_as_it_is() {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    let secret = "12345678123456781234567812345678";
    let instance = Instance::start(&databases.shards_file(), &[("AUTH__SECRET", secret)]).await;
    let access = Access::new(&instance.url, TokenSource::Secret(secret.to_owned()));
    let api = Api::new(access, 7).await.unwrap();
    assert_eq!(api.send(42, "k", "hi").await.unwrap().seq, 1);
}

/// What browsers send and what an operator writes are compared in one form.
#[tokio::test(flavor = "multi_thread")]
async fn an_allowed_origin_may_have_a_slash_a_port_and_capitals() {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    let settings = [(
        "AUTH__ALLOWED_ORIGINS",
        "https://A.example:443/, http://b.example:8080",
    )];
    let instance = Instance::start(&databases.shards_file(), &settings).await;
    let token = instance.access().token(7).await.unwrap();
    for (origin, allowed) in [
        ("https://a.example", true),
        ("http://b.example:8080", true),
        ("http://a.example", false),
        ("https://b.example:8080", false),
        ("null", false),
    ] {
        let headers = [
            ("authorization", format!("Bearer {token}")),
            ("origin", origin.to_owned()),
        ];
        let mut socket = Socket::open(&instance.url, &headers).await;
        let welcomed = matches!(socket.next().await, ServerFrame::Welcome { .. });
        assert_eq!(welcomed, allowed, "{origin}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_was_wiped_or_swapped_is_not_taken_for_itself() {
    let mut databases = Databases::new(Kind::Sqlite, 2).await;
    let file = databases.shards_file();
    drop(Instance::start(&file, &[]).await);
    let swapped = databases.shards_file_with(&[databases.url(1), databases.url(0)]);
    assert!(refusal(&swapped, &[]).contains("leads to the database of"));
    let fresh = databases.add().await;
    let wiped = databases.shards_file_with(&[databases.url(0), databases.url(fresh)]);
    assert!(
        refusal(&wiped, &[])
            .contains("the database of shard2 is empty, but it is a shard of this service")
    );
    let mut foreign = Databases::new(Kind::Sqlite, 2).await;
    foreign.add().await;
    drop(Instance::start(&foreign.shards_file(), &[]).await);
    let mixed = databases.shards_file_with(&[databases.url(0), foreign.url(1)]);
    assert!(refusal(&mixed, &[]).contains("foreign database"));
}

/// All properties of a schema, and those that must be there; references and parts are followed.
fn properties(
    document: &serde_json::Value,
    schema: &serde_json::Value,
) -> (BTreeSet<String>, BTreeSet<String>) {
    let (mut all, mut required) = (BTreeSet::new(), BTreeSet::new());
    if let Some(name) = schema["$ref"].as_str() {
        let name = name.trim_start_matches("#/components/schemas/");
        return properties(document, &document["components"]["schemas"][name]);
    }
    all.extend(
        schema["properties"]
            .as_object()
            .into_iter()
            .flat_map(|of| of.keys().cloned()),
    );
    let names = schema["required"].as_array().into_iter().flatten();
    required.extend(names.map(|name| name.as_str().unwrap().to_owned()));
    for part in schema["allOf"].as_array().into_iter().flatten() {
        let (of_part, required_there) = properties(document, part);
        all.extend(of_part);
        required.extend(required_there);
    }
    (all, required)
}

/// docs/asyncapi.json is what the types say, and what PROTOCOL.md shows fits it.
/// `CHAT_WRITE_DOCS=1` writes it anew.
#[test]
fn the_asyncapi_file_the_protocol_page_and_the_types_say_the_same() {
    let document = chat::http::asyncapi_document();
    for (name, document) in [
        ("asyncapi.json", &document),
        ("openapi.json", &chat::http::openapi_document()),
    ] {
        let text = serde_json::to_string_pretty(document).unwrap() + "\n";
        let path = format!("{}/../docs/{name}", env!("CARGO_MANIFEST_DIR"));
        if std::env::var_os("CHAT_WRITE_DOCS").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        assert!(
            std::fs::read_to_string(path).is_ok_and(|there| there == text),
            "docs/{name} is outdated: CHAT_WRITE_DOCS=1 writes it anew"
        );
    }
    let page = include_str!("../../docs/PROTOCOL.md");
    let mut shown = BTreeSet::new();
    for (side, section) in [
        ("client", "## From client to server"),
        ("server", "## From server to client"),
    ] {
        let from = page.find(section).unwrap();
        for line in page[from..]
            .split("```")
            .nth(1)
            .unwrap()
            .lines()
            .filter(|line| line.starts_with('{'))
        {
            let frame: serde_json::Value = serde_json::from_str(line).unwrap();
            let name = format!("{side}_{}", frame["type"].as_str().unwrap());
            let payload = &document["components"]["messages"][&name]["payload"];
            let (all, required) = properties(&document, payload);
            let has: BTreeSet<String> = frame.as_object().unwrap().keys().cloned().collect();
            assert!(
                has.is_subset(&all) && required.is_subset(&has),
                "{name}: {has:?}, {all:?}, {required:?}"
            );
            shown.insert(name);
        }
    }
    let described = document["components"]["messages"]
        .as_object()
        .unwrap()
        .keys()
        .cloned()
        .collect();
    assert_eq!(shown, described);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_request_may_carry_an_id_that_its_answer_and_its_error_bring_back() {
    let (_databases, instance) = instance(&[]).await;
    let mut socket = Socket::of(&instance, 7).await;
    let token = instance.access().token(7).await.unwrap();
    let others = instance.access().token(8).await.unwrap();
    let requests = [
        (
            json!({"type": "send", "key": "k", "to": 42, "text": "x"}),
            "sent",
        ),
        (
            json!({"type": "send", "key": "k", "to": 42, "text": "x"}),
            "sent",
        ),
        (json!({"type": "history", "with": 42}), "history"),
        (json!({"type": "inbox"}), "inbox"),
        (json!({"type": "resume", "positions": {}}), "resumed"),
        (json!({"type": "read", "with": 42, "seq": 1}), "done"),
        (json!({"type": "read", "with": 42, "seq": 0}), "done"),
        (json!({"type": "typing", "with": 42}), "done"),
        (json!({"type": "watch", "users": [42]}), "done"),
        (json!({"type": "unwatch", "users": [42]}), "done"),
        (json!({"type": "auth", "token": token}), "authenticated"),
        (json!({"type": "ping"}), "pong"),
        // Errors: of the same requests.
        (
            json!({"type": "send", "key": "k", "to": 42, "text": "another"}),
            "error",
        ),
        (
            json!({"type": "send", "key": "k", "to": 42, "text": ""}),
            "error",
        ),
        (json!({"type": "send", "key": "k", "to": 42}), "error"),
        (
            json!({"type": "history", "with": 42, "before": 1, "after": 1}),
            "error",
        ),
        (json!({"type": "history", "with": 0}), "error"),
        (json!({"type": "inbox", "cursor": "x"}), "error"),
        (json!({"type": "resume", "positions": {"8_9": 1}}), "error"),
        (json!({"type": "read", "with": 999, "seq": 1}), "error"),
        (json!({"type": "typing", "with": 0}), "error"),
        (json!({"type": "watch", "users": [0]}), "error"),
        (json!({"type": "auth", "token": "nonsense"}), "error"),
        (json!({"type": "auth", "token": others}), "error"),
        (json!({"type": "dance"}), "error"),
    ];
    for (n, (mut frame, kind)) in requests.into_iter().enumerate() {
        let id = format!("request {n}");
        frame["id"] = json!(id);
        socket.send(frame.clone()).await;
        // Events, for instance a read mark, come beside it.
        let answer = loop {
            let answer = serde_json::to_value(socket.next().await).unwrap();
            if !answer["id"].is_null() {
                break answer;
            }
        };
        assert_eq!(
            (&answer["id"], &answer["type"]),
            (&json!(id), &json!(kind)),
            "{frame}: {answer}"
        );
        if kind == "error" && frame["text"].is_string() {
            assert_eq!(answer["dialog"], "7_42", "{answer}");
        }
    }
}

/// Name with its label, type and meaning of every metric.
fn described_metrics() -> Vec<(String, String, String)> {
    let metrics = chat::metrics::Metrics::new();
    // A metric with a label is shown once it has a value.
    metrics.error(ErrorCode::Internal);
    metrics.close(Close::Silent);
    let _ = metrics.shard("s");
    metrics.slots("s").set(0);
    metrics.writer("s").redone("seq");
    let thread = tokio::runtime::Handle::current().metrics();
    metrics.thread_busy_seconds.of(vec![thread]);
    let text = metrics.encode();
    let mut found = Vec::new();
    for entry in text.split("# HELP ").skip(1) {
        let mut lines = entry.lines();
        let (name, help) = lines.next().unwrap().split_once(' ').unwrap();
        let kind = lines.next().unwrap().rsplit(' ').next().unwrap();
        let sample = lines.find_map(|line| Some(line.split_once('{')?.1.split_once('}')?.0));
        let labels = sample.into_iter().flat_map(|sample| sample.split(','));
        let names = labels.filter_map(|label| label.split_once('=').map(|label| label.0));
        let names: Vec<_> = names.filter(|name| *name != "le").collect();
        let label = if names.is_empty() {
            String::new()
        } else {
            format!("{{{}}}", names.join(", "))
        };
        let total = if kind == "counter" { "_total" } else { "" };
        found.push((
            format!("{name}{total}{label}"),
            kind.into(),
            help.trim_end_matches('.').into(),
        ));
    }
    found
}

/// docs/REFERENCE.md lists the settings and metrics as they are in the code. `CHAT_WRITE_DOCS=1`
/// writes it anew.
#[tokio::test]
async fn the_reference_page_lists_every_setting_and_metric() {
    let mut page = String::from(
        "# Reference\n\nA test writes this page from the code. Do not edit it: edit `chat/src/config/` and `chat/src/metrics.rs`, then run\n`CHAT_WRITE_DOCS=1 ./test --test api reference`.\n\n## Settings\n\nLimits hold on each instance. A list in an environment variable is separated by commas. A change needs a restart; only `shards.toml` is read\nwhile the server runs.\n",
    );
    let mut table = String::new();
    for line in chat::config::DEFAULTS.lines().skip(1) {
        let (entry, comment) = line.split_once('#').unwrap_or((line, ""));
        let (entry, comment) = (entry.trim(), comment.trim());
        if let Some(name) = entry.strip_prefix('[') {
            table = format!("{}.", name.trim_end_matches(']'));
        }
        if entry.is_empty() || entry.starts_with('[') {
            let head = "| setting | default | range | meaning |\n|---|---|---|---|";
            match (entry.is_empty(), comment.split_once(" = ")) {
                (true, Some((key, comment))) => {
                    let comment = comment.trim_start_matches(['…', ' ', '#']);
                    page += &format!("| `{table}{key}` | not set | | {comment} |\n");
                }
                (true, None) if page.ends_with("|\n") => {}
                (true, None) => page += &format!("\n{head}\n"),
                (false, _) => page += &format!("\n### `{entry}`\n\n{head}\n"),
            }
            continue;
        }
        let (key, default) = entry.split_once(" = ").unwrap();
        let name = format!("{table}{key}");
        assert!(!comment.is_empty(), "{name} has no comment");
        let range = chat::config::RANGES.iter().find(|(of, _)| *of == name);
        let range = range.map_or(String::new(), |(_, range)| {
            format!("{} to {}", range.start(), range.end())
        });
        page += &format!("| `{name}` | `{default}` | {range} | {comment} |\n");
    }
    page += "\n## Metrics\n\n| metric | type | meaning |\n|---|---|---|\n";
    for (name, kind, help) in described_metrics() {
        page += &format!("| `{name}` | {kind} | {help} |\n");
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/REFERENCE.md");
    if std::env::var_os("CHAT_WRITE_DOCS").is_some() {
        std::fs::write(path, &page).unwrap();
    }
    assert!(
        std::fs::read_to_string(path).unwrap_or_default() == page,
        "docs/REFERENCE.md is outdated: CHAT_WRITE_DOCS=1 writes it anew"
    );
}

/// PROTOCOL.md shows a frame of every kind; each must be one, and none may be missing.
#[test]
fn the_protocol_page_and_the_types_say_the_same() {
    let page = include_str!("../../docs/PROTOCOL.md");
    let frames = |section: &str| -> Vec<String> {
        let from = page.find(section).unwrap_or_else(|| panic!("{section}"));
        let block = page[from..].split("```").nth(1).unwrap();
        block
            .lines()
            .filter(|line| line.starts_with('{'))
            .map(str::to_owned)
            .collect()
    };
    let kinds = |frames: &[String]| -> std::collections::BTreeSet<String> {
        frames
            .iter()
            .map(|frame| {
                serde_json::from_str::<serde_json::Value>(frame).unwrap()["type"]
                    .as_str()
                    .unwrap()
                    .to_owned()
            })
            .collect()
    };
    let (client, server) = (
        frames("## From client to server"),
        frames("## From server to client"),
    );
    for frame in &client {
        serde_json::from_str::<ClientFrame>(frame).unwrap_or_else(|e| panic!("{frame}: {e}"));
    }
    for frame in &server {
        let read: ServerFrame =
            serde_json::from_str(frame).unwrap_or_else(|e| panic!("{frame}: {e}"));
        let written = serde_json::to_value(&read).unwrap();
        assert_eq!(
            written,
            serde_json::from_str::<serde_json::Value>(frame).unwrap(),
            "a field is missing or too many"
        );
    }
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    assert_eq!(
        kinds(&client),
        set(&[
            "send", "create", "members", "history", "inbox", "resume", "read", "typing", "watch",
            "unwatch", "auth", "ping"
        ])
    );
    assert_eq!(
        kinds(&server),
        set(&[
            "welcome",
            "sent",
            "created",
            "message",
            "entry",
            "history",
            "inbox",
            "resumed",
            "read",
            "typing",
            "presence",
            "authenticated",
            "pong",
            "done",
            "error"
        ])
    );
    for code in ErrorCode::ALL {
        assert!(page.contains(&format!("`{code}`")), "{code}");
    }
    for close in Close::ALL {
        assert!(page.contains(&format!("| {} ", close.code())), "{close:?}");
    }
}
