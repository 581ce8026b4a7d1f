//! A WebSocket, a frame at a time.

use crate::PATIENCE;
use crate::instance::Instance;
use chat_wire::{ErrorBody, ServerFrame};
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

pub struct Socket(pub WebSocketStream<MaybeTlsStream<TcpStream>>);

impl Socket {
    /// Connects with these headers; the server's first frame has not been read.
    pub async fn open(url: &str, headers: &[(&'static str, String)]) -> Self {
        Self::open_with(url, "", headers).await
    }

    async fn open_with(url: &str, query: &str, headers: &[(&'static str, String)]) -> Self {
        let mut request = format!("{}/v1/ws{query}", url.replace("http", "ws"))
            .into_client_request()
            .unwrap();
        for (name, value) in headers {
            request.headers_mut().insert(*name, value.parse().unwrap());
        }
        Self(tokio_tungstenite::connect_async(request).await.unwrap().0)
    }

    /// Connects as `user` and takes the welcome.
    pub async fn of(instance: &Instance, user: u64) -> Self {
        Self::with_query(instance, user, "").await.0
    }

    /// As [`Socket::of`], with this query; also the `now` of the welcome.
    pub async fn with_query(instance: &Instance, user: u64, query: &str) -> (Self, String) {
        let token = instance.access().token(user).await.unwrap();
        let headers = [("authorization", format!("Bearer {token}"))];
        let mut socket = Self::open_with(&instance.url, query, &headers).await;
        match socket.next().await {
            ServerFrame::Welcome {
                user: welcomed,
                now,
                ..
            } if welcomed == user => (socket, now),
            other => panic!("{other:?}"),
        }
    }

    pub async fn send(&mut self, frame: serde_json::Value) {
        self.0
            .send(Message::Text(frame.to_string().into()))
            .await
            .unwrap();
    }

    pub async fn send_text(&mut self, key: &str, to: u64, text: &str) {
        self.send(serde_json::json!({"type": "send", "key": key, "to": to, "text": text}))
            .await;
    }

    /// The next frame, of whatever kind.
    pub async fn next(&mut self) -> ServerFrame {
        loop {
            match timeout(PATIENCE, self.0.next())
                .await
                .expect("a frame in time")
                .expect("an open connection")
                .unwrap()
            {
                Message::Text(text) => {
                    return serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
                }
                Message::Close(close) => panic!("closed: {close:?}"),
                Message::Binary(_) | Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
            }
        }
    }

    pub async fn error(&mut self) -> ErrorBody {
        match self.next().await {
            ServerFrame::Error(body) => body,
            other => panic!("no error, but {other:?}"),
        }
    }

    pub async fn sent(&mut self) -> (String, u64) {
        match self.next().await {
            ServerFrame::Sent { key, seq, .. } => (key, seq),
            other => panic!("not sent, but {other:?}"),
        }
    }

    pub async fn message(&mut self) -> chat_wire::Message {
        match self.next().await {
            ServerFrame::Message(message) => message,
            other => panic!("no message, but {other:?}"),
        }
    }

    /// Reads until the connection is closed; returns what came before, and the code.
    pub async fn until_closed(&mut self) -> (Vec<String>, Option<u16>) {
        let mut before = Vec::new();
        loop {
            match timeout(PATIENCE, self.0.next())
                .await
                .expect("a close in time")
            {
                Some(Ok(Message::Text(text))) => before.push(text.to_string()),
                Some(Ok(Message::Close(close))) => {
                    return (before, close.map(|close| close.code.into()));
                }
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return (before, None),
            }
        }
    }
}

/// A WebSocket as bytes, after the handshake: nothing answers pings.
pub async fn raw(instance: &Instance, user: u64) -> TcpStream {
    let token = instance.access().token(user).await.unwrap();
    let mut stream = TcpStream::connect(instance.url.trim_start_matches("http://"))
        .await
        .unwrap();
    let request = format!(
        "GET /v1/ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nAuthorization: Bearer {token}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    assert!(
        head.starts_with(b"HTTP/1.1 101"),
        "{}",
        String::from_utf8_lossy(&head)
    );
    stream
}
