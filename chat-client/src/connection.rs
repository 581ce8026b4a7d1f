//! One WebSocket connection: frames out, frames in.

use crate::{Access, ClientError};
use chat_wire::ServerFrame;
use futures_util::{SinkExt, StreamExt};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tokio_tungstenite::tungstenite::Error;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};
use tokio_tungstenite::{
    Connector, MaybeTlsStream, WebSocketStream, connect_async_tls_with_config,
};

/// An open connection.
pub struct Connection {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    last_received: Instant,
}

/// The server pings every 25 seconds unless it is set otherwise: after so long the connection is
/// dead.
const SILENCE: Duration = Duration::from_secs(70);

/// Some dozens of ordinary frames.
const READ_BUFFER_BYTES: usize = 8192;

/// What came.
pub enum Incoming {
    /// A frame.
    Frame(Box<ServerFrame>),
    /// The connection is over; the code, if the server gave one.
    Closed(Option<u16>, String),
}

/// The refusal in the answer to a handshake: from a server that refuses many at once.
fn refused(error: &Error) -> Option<ClientError> {
    let Error::Http(response) = error else {
        return None;
    };
    let body = serde_json::from_slice(response.body().as_ref()?).ok()?;
    Some(ClientError::Refused(body))
}

impl Connection {
    /// Connects as the user of the token, to another instance at each attempt if there are several.
    /// `since`: see [`ClientFrame::Resume`](chat_wire::ClientFrame::Resume). Whether the server
    /// takes us is in its first frame.
    pub async fn open(
        access: &Access,
        token: &str,
        attempt: usize,
        since: Option<&str>,
    ) -> Result<Self, ClientError> {
        let connection = |e: Error| ClientError::Connection(e.to_string());
        let mut url = access.socket_url_of_attempt(attempt);
        if let Some(since) = since {
            url = format!("{url}?since={since}");
        }
        let mut request = url.into_client_request().map_err(connection)?;
        let bearer = HeaderValue::try_from(format!("Bearer {token}"));
        let bearer = bearer.map_err(|_| {
            ClientError::Connection("the token has characters that no token has".into())
        })?;
        request.headers_mut().insert("authorization", bearer);
        request.headers_mut().insert(
            "sec-websocket-protocol",
            HeaderValue::from_static(chat_wire::PROTOCOL),
        );
        // The default of 128 KiB is filled with zeros at every read.
        let config = WebSocketConfig::default().read_buffer_size(READ_BUFFER_BYTES);
        let connected = connect_async_tls_with_config(
            request,
            Some(config),
            true,
            access.tls().map(Connector::Rustls),
        );
        let (socket, _) = connected
            .await
            .map_err(|e| refused(&e).unwrap_or_else(|| connection(e)))?;
        Ok(Self {
            socket,
            last_received: Instant::now(),
        })
    }

    /// Queues frames and sends them together.
    pub async fn send(
        &mut self,
        frames: impl IntoIterator<Item = Utf8Bytes>,
    ) -> Result<(), ClientError> {
        let connection = |e: Error| ClientError::Connection(e.to_string());
        for frame in frames {
            self.socket
                .feed(Message::Text(frame))
                .await
                .map_err(connection)?;
        }
        self.socket.flush().await.map_err(connection)
    }

    /// The next frame. Pings are answered on the way; frames of a newer server that are not
    /// understood are passed over.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn next(&mut self) -> Incoming {
        loop {
            let Ok(next) = timeout_at(self.last_received + SILENCE, self.socket.next()).await
            else {
                return Incoming::Closed(None, "the server sent nothing for too long".into());
            };
            self.last_received = Instant::now();
            match next {
                Some(Ok(Message::Text(text))) => {
                    if let Ok(frame) = serde_json::from_str(&text) {
                        return Incoming::Frame(Box::new(frame));
                    }
                }
                Some(Ok(Message::Close(Some(CloseFrame { code, reason })))) => {
                    return Incoming::Closed(Some(code.into()), reason.to_string());
                }
                Some(Ok(Message::Close(None))) | None => {
                    return Incoming::Closed(None, "closed".into());
                }
                Some(Ok(
                    Message::Binary(_) | Message::Ping(_) | Message::Pong(_) | Message::Frame(_),
                )) => {}
                Some(Err(e)) => return Incoming::Closed(None, e.to_string()),
            }
        }
    }

    /// Says goodbye.
    pub async fn close(mut self) {
        // The server may have gone already.
        let _ = self.socket.close(None).await;
    }
}
