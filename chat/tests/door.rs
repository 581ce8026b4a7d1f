//! The door: hosts, sites, methods, forms, slow bodies, and connections by address.

#![allow(missing_docs, clippy::wildcard_enum_match_arm)]

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Client, Method, RequestBuilder, Response};
use serde_json::{Value, json};
use std::net::{Ipv4Addr, SocketAddr};
use testkit::instance::{Instance, Settings};
use testkit::socket::raw;
use testkit::{Databases, Kind, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

async fn instance(settings: Settings<'_>) -> (Databases, Instance) {
    let databases = Databases::new(Kind::Sqlite, 1).await;
    let instance = Instance::start(&databases.shards_file(), settings).await;
    (databases, instance)
}

/// The HTTP client of a test; the first access installs the crypto provider of this process.
fn http() -> Client {
    drop(testkit::instance::access("http://127.0.0.1:1"));
    Client::new()
}

fn headers(of: &[(&'static str, &str)]) -> HeaderMap {
    of.iter()
        .map(|(name, value)| {
            let value = HeaderValue::from_str(value).unwrap();
            (HeaderName::from_static(name), value)
        })
        .collect()
}

async fn status(request: RequestBuilder) -> u16 {
    request.send().await.unwrap().status().as_u16()
}

fn code_of(answer: &Value) -> &str {
    answer["code"].as_str().unwrap()
}

/// The address of a URL.
fn address(url: &str) -> SocketAddr {
    url.trim_start_matches("http://").parse().unwrap()
}

/// Sends bytes and reads to the end of the connection.
async fn exchange(stream: &mut TcpStream, bytes: &str) -> String {
    stream.write_all(bytes.as_bytes()).await.unwrap();
    rest(stream).await
}

async fn rest(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    let read = tokio::time::timeout(testkit::PATIENCE, stream.read_to_end(&mut text)).await;
    // A reset is an end, too.
    let _ = read.expect("the server closes the connection");
    String::from_utf8_lossy(&text).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_another_site_cannot_act_here() {
    let folder = tempfile::tempdir().unwrap();
    let instance = Instance::start_embedded(folder.path(), &[]).await;
    let http = http();
    let pause = format!("{}/admin/resharding/pause", instance.admin);
    let dev = format!("{}/v1/dev/token", instance.url);
    let token = json!({"user": 7});
    let operator = std::fs::read_to_string(folder.path().join("admin-token")).unwrap();
    let bearer = format!("Bearer {}", operator.trim());
    // A name of the attacker's that leads to this machine; a page, by what browsers say of it.
    for evil in [
        headers(&[("host", "evil.example")]),
        headers(&[
            ("host", "evil.example:8080"),
            ("origin", "http://evil.example:8080"),
        ]),
        headers(&[("origin", "https://evil.example")]),
        headers(&[("origin", "null")]),
        headers(&[("sec-fetch-site", "cross-site")]),
        headers(&[("sec-fetch-site", "same-site")]),
    ] {
        let request = http.post(&dev).json(&token).headers(evil.clone());
        assert_eq!(status(request).await, 403, "{evil:?}");
        let request = http
            .post(&pause)
            .header("authorization", &bearer)
            .headers(evil.clone());
        assert_eq!(status(request).await, 403, "{evil:?}");
    }
    // Without the token of the operator, and as a form has it.
    assert_eq!(status(http.post(&pause).json(&json!({}))).await, 401);
    let form = http
        .post(&dev)
        .header("content-type", "text/plain")
        .body(r#"{"user":7}"#);
    assert_eq!(status(form).await, 400);
    // Our own page, and a program.
    let own = instance.url.clone();
    let page = headers(&[("origin", &own), ("sec-fetch-site", "same-origin")]);
    assert_eq!(
        status(http.post(&dev).json(&token).headers(page)).await,
        200
    );
    assert_eq!(status(http.post(&dev).json(&token)).await, 200);
    let (_, state) = answer(
        http.get(format!("{}/admin/resharding", instance.admin))
            .header("authorization", &bearer),
    )
    .await;
    assert_eq!(state["paused"], false);
    assert_eq!(
        status(http.post(&pause).header("authorization", &bearer)).await,
        200
    );
    // And each of this is in the audit log, without a token.
    until("the audit log has it", async || {
        let log = instance.log();
        let lines = log
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let audit: Vec<Value> = lines
            .filter(|line| line["target"] == "chat::audit")
            .collect();
        let has = |field: &str, value: &str| audit.iter().any(|line| line[field] == value);
        let all = has("door", "admin") && has("door", "http") && has("act", "pause");
        (all && audit.iter().all(|line| line["address"] == "127.0.0.1")).then_some(())
    })
    .await;
    assert!(!instance.log().contains(operator.trim()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_form_cannot_act_on_the_admin_listener_without_a_token() {
    let (_databases, instance) = instance(&[]).await;
    let http = http();
    let pause = format!("{}/admin/resharding/pause", instance.admin);
    for kind in [
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "Multipart/Form-Data; boundary=x",
    ] {
        let request = http.post(&pause).header("content-type", kind);
        assert_eq!(status(request).await, 400, "{kind}");
    }
    assert_eq!(status(http.post(&pause)).await, 400);
    assert_eq!(status(http.post(&pause).json(&json!({}))).await, 200);
}

async fn answer(request: RequestBuilder) -> (u16, Value) {
    let response = request.send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configured_host_is_served_and_no_other() {
    let (_databases, instance) = instance(&[("ALLOWED_HOSTS", "chat.example.org, intern")]).await;
    let http = http();
    for (host, expected) in [
        ("chat.example.org", 200),
        ("Chat.Example.org:443", 200),
        ("intern:8080", 200),
        ("127.0.0.1:1", 200),
        ("localhost", 200),
        ("other.example.org", 403),
    ] {
        let request = http
            .get(format!("{}/livez", instance.url))
            .header("host", host);
        assert_eq!(status(request).await, expected, "{host}");
    }
}

fn header<'a>(response: &'a Response, name: &str) -> &'a str {
    response
        .headers()
        .get(name)
        .map_or("", |value| value.to_str().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_has_its_methods_and_names_them() {
    let (_databases, instance) = instance(&[]).await;
    let http = http();
    let token = instance.access().token(7).await.unwrap();
    for (base, path, methods) in [
        (&instance.url, "/", "GET, HEAD"),
        (&instance.url, "/app.js", "GET, HEAD"),
        (&instance.url, "/livez", "GET, HEAD"),
        (&instance.url, "/readyz", "GET, HEAD"),
        (&instance.url, "/v1/dialogs", "GET, HEAD"),
        (&instance.url, "/v1/dialogs/42/messages", "GET, HEAD, POST"),
        (&instance.url, "/v1/dialogs/42/read", "PUT"),
        (&instance.url, "/v1/users/42/presence", "GET, HEAD"),
        (&instance.url, "/v1/dev/token", "POST"),
        (&instance.url, "/v1/asyncapi.json", "GET, HEAD"),
        (&instance.admin, "/metrics", "GET, HEAD"),
        (&instance.admin, "/admin/slots", "GET, HEAD"),
        (&instance.admin, "/admin/plan", "POST"),
    ] {
        let url = format!("{base}{path}");
        let request = |method: &str| {
            let method = Method::from_bytes(method.as_bytes()).unwrap();
            http.request(method, &url).bearer_auth(&token).send()
        };
        for method in ["DELETE", "PATCH", "OPTIONS", "BREW"] {
            let response = request(method).await.unwrap();
            assert_eq!(response.status(), 405, "{method} {path}");
            assert_eq!(header(&response, "allow"), methods, "{method} {path}");
            let body: Value = response.json().await.unwrap();
            assert_eq!(code_of(&body), "method_not_allowed");
        }
        if methods.starts_with("GET") {
            let (head, get) = (
                request("HEAD").await.unwrap(),
                request("GET").await.unwrap(),
            );
            assert_eq!(head.status(), get.status(), "{path}");
            assert_eq!(
                header(&head, "content-type"),
                header(&get, "content-type"),
                "{path}"
            );
            assert!(head.text().await.unwrap().is_empty());
        }
    }
    let plain = http
        .get(format!("{}/v1/ws", instance.url))
        .bearer_auth(&token);
    let (status, body) = answer(plain).await;
    assert_eq!((status, code_of(&body)), (400, "bad_request"));
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_of_allowed_origins_may_use_rest() {
    let (_databases, instance) =
        instance(&[("AUTH__ALLOWED_ORIGINS", "https://app.example")]).await;
    let http = http();
    let url = format!("{}/v1/dialogs/42/messages", instance.url);
    let preflight = |origin: &str| {
        http.request(Method::OPTIONS, &url)
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header(
                "access-control-request-headers",
                "authorization, content-type",
            )
            .send()
    };
    let allowed = preflight("https://app.example").await.unwrap();
    assert_eq!(allowed.status(), 200);
    assert_eq!(
        header(&allowed, "access-control-allow-origin"),
        "https://app.example"
    );
    assert!(header(&allowed, "access-control-allow-methods").contains("POST"));
    assert!(
        header(&allowed, "access-control-allow-headers")
            .to_lowercase()
            .contains("authorization")
    );
    assert_eq!(header(&allowed, "access-control-allow-credentials"), "");
    let other = preflight("https://evil.example").await.unwrap();
    assert_eq!(header(&other, "access-control-allow-origin"), "");
    let token = instance.access().token(7).await.unwrap();
    let sent = http
        .post(&url)
        .header("origin", "https://app.example")
        .bearer_auth(token)
        .json(&json!({"key": "k", "text": "x"}))
        .send()
        .await
        .unwrap();
    assert_eq!(sent.status(), 201);
    assert_eq!(
        header(&sent, "access-control-allow-origin"),
        "https://app.example"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_does_not_come_is_not_waited_for_for_ever() {
    let (_databases, instance) =
        instance(&[("LIMITS__REQUEST_MS", "1000"), ("STORE__SEND_MS", "900")]).await;
    let token = instance.access().token(7).await.unwrap();
    let head = |token: &str| {
        format!(
            "POST /v1/dialogs/42/messages HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\
             Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{{"
        )
    };
    let mut stream = TcpStream::connect(address(&instance.url)).await.unwrap();
    let answer = exchange(&mut stream, &head(&token)).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(
        answer.contains("request_timeout") && answer.contains("nosniff"),
        "{answer}"
    );
    // Without a token the body is not waited for at all.
    let mut stream = TcpStream::connect(address(&instance.url)).await.unwrap();
    stream.write_all(head("nonsense").as_bytes()).await.unwrap();
    let mut first = [0; 12];
    stream.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 401");
}

/// Connects from an address of this machine.
async fn connect_from(from: [u8; 4], to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((Ipv4Addr::from(from), 0).into()).unwrap();
    socket.connect(to).await.unwrap()
}

/// Whether a connection is served.
async fn is_served(stream: &mut TcpStream) -> bool {
    let asked = stream
        .write_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .await;
    let mut first = [0; 12];
    asked.is_ok() && stream.read_exact(&mut first).await.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_has_a_number_of_connections_and_leaves_the_others_theirs() {
    let limits = [
        ("LIMITS__CONNECTIONS_PER_IP", "6"),
        ("LIMITS__SPARE_CONNECTIONS_PER_IP", "4"),
    ];
    let (_databases, instance) = instance(&limits).await;
    let to = address(&instance.url);
    let mut held = Vec::new();
    for _ in 0..10 {
        let mut stream = connect_from([127, 0, 0, 7], to).await;
        assert!(is_served(&mut stream).await);
        held.push(stream);
    }
    let mut refused = connect_from([127, 0, 0, 7], to).await;
    assert!(!is_served(&mut refused).await);
    let mut other = connect_from([127, 0, 0, 8], to).await;
    assert!(is_served(&mut other).await);
    held.pop();
    until("the place is given back", async || {
        let mut stream = connect_from([127, 0, 0, 7], to).await;
        is_served(&mut stream).await.then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn guesses_of_an_address_are_slowed_down() {
    let limits = [
        ("LIMITS__CONNECTS_PER_SECOND", "1"),
        ("LIMITS__CONNECTS_BURST", "5"),
    ];
    let (_databases, instance) = instance(&limits).await;
    let http = http();
    let mut codes = Vec::new();
    for _ in 0..8 {
        let request = http
            .get(format!("{}/v1/dialogs", instance.url))
            .bearer_auth("nonsense");
        codes.push(status(request).await);
    }
    assert_eq!(codes[..5], [401; 5]);
    assert!(codes[5..].contains(&429), "{codes:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_some_refused_sockets_are_upgraded() {
    let (_databases, instance) = instance(&[("LIMITS__UPGRADED_REFUSALS", "3")]).await;
    let upgrade = "GET /v1/ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    let mut streams = Vec::new();
    let mut kinds = Vec::new();
    for _ in 0..6 {
        let mut stream = TcpStream::connect(address(&instance.url)).await.unwrap();
        stream.write_all(upgrade.as_bytes()).await.unwrap();
        let mut first = [0; 12];
        stream.read_exact(&mut first).await.unwrap();
        kinds.push(std::str::from_utf8(&first[9..]).unwrap().to_owned());
        streams.push(stream);
    }
    assert_eq!(kinds, ["101", "101", "101", "401", "401", "401"]);
    // They are not kept.
    let first = rest(&mut streams[0]).await;
    assert!(first.contains("unauthenticated"), "{first}");
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_requests_leave_no_line_each() {
    let (_databases, instance) = instance(&[]).await;
    let before = instance.log().lines().count();
    for _ in 0..50 {
        let mut stream = TcpStream::connect(address(&instance.url)).await.unwrap();
        exchange(&mut stream, "NONSENSE\r\n\r\n").await;
    }
    // A refused token leaves one, but a flood of them does not.
    let http = http();
    for _ in 0..200 {
        let request = http
            .get(format!("{}/v1/dialogs", instance.url))
            .bearer_auth("nonsense");
        status(request).await;
    }
    let lines = instance.log().lines().count() - before;
    assert!((1..150).contains(&lines), "{lines} lines");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_still_sends_does_not_take_the_close_code_from_it() {
    let (_databases, instance) = instance(&[]).await;
    for _ in 0..20 {
        let stream = raw(&instance, 7).await;
        let (mut incoming, mut outgoing) = stream.into_split();
        let pours = tokio::spawn(async move {
            // A frame over the limit, of which much is on its way when the server closes.
            let head = [
                &[0x81, 0x80 | 127][..],
                &(1_u64 << 20).to_be_bytes(),
                &[0; 4],
            ]
            .concat();
            let _ = outgoing.write_all(&head).await;
            let _ = outgoing.write_all(&vec![b'x'; 1 << 20]).await;
            outgoing
        });
        let mut bytes = Vec::new();
        let read = tokio::time::timeout(testkit::PATIENCE, incoming.read_to_end(&mut bytes));
        read.await
            .expect("the server closes")
            .expect("no reset before the close frame");
        let close = [&1009_u16.to_be_bytes()[..], b"frame_too_large"].concat();
        assert!(bytes.ends_with(&close));
        drop(pours.await.unwrap());
    }
}
