//! A WebSocket: the handshake, and the two halves of a connection around a [`Session`].

use super::auth;
use super::connection_limiter::ConnectionPermit;
use super::door::is_own_origin;
use super::frame_reader::{FrameReader, Incoming, ReadError};
use super::tcp::TcpHandle;
use super::{App, HttpError};
use crate::audit;
use crate::config::normalized_origin;
use crate::delivery::encode;
use crate::delivery::outbound_queue::{Next, OutboundQueue};
use crate::domain::dialog::Timestamp;
use crate::error::{ApiError, RequestName};
use crate::metrics::Metrics;
use crate::session::{self, Identity, Session};
use actix_web::dev::Payload;
use actix_web::http::header::ORIGIN;
use actix_web::{FromRequest, HttpRequest, HttpResponse, rt, web};
use actix_ws::{CloseCode, CloseReason};
use chat_wire::{Close, ErrorCode};
use futures_util::FutureExt;
use serde::Deserialize;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::{Instant, sleep_until, timeout};

/// How long a client may take to read the close frame, and what was sent before it.
const CLOSE_LIMIT: Duration = Duration::from_secs(3);

/// How long a client that is refused may take for the same.
const REFUSAL_LIMIT: Duration = Duration::from_secs(1);

/// How long a session that is asked to leave may still wait for answers to what it asked before.
const DRAIN_LIMIT: Duration = Duration::from_secs(6);

/// The query of `GET /v1/ws`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Connect {
    /// The `since` of the `resume` that will follow.
    since: Option<String>,
}

/// `GET /v1/ws`. A rejected client gets an error frame and a close code, because a page cannot see
/// the status of a failed handshake; if many are rejected at once, the others get the status.
pub async fn connect(
    request: HttpRequest,
    payload: web::Payload,
    query: web::Query<Connect>,
    app: web::Data<App>,
) -> Result<HttpResponse, HttpError> {
    let away = query.since.as_deref();
    let away = away.map(|since| session::away_since(since, &app.context.limits));
    let away = away.transpose()?;
    let admitted = admit(&request, &app).map_err(|(refusal, reason)| {
        let address = app.address_of(&request);
        audit::refused("websocket", address, refusal.code, &refusal.message);
        (refusal, reason)
    });
    let place = match &admitted {
        Ok(_) => None,
        Err((refusal, _)) => match app.upgraded_refusals.clone().try_acquire_owned() {
            Ok(place) => Some(place),
            Err(_) => {
                app.context.metrics.error(refusal.code);
                return Err(HttpError(refusal.clone()));
            }
        },
    };
    // actix-ws writes; we read ourselves, with a limit that holds while a frame is on its way.
    let nothing = web::Payload::from_request(&request, &mut Payload::None);
    let nothing = nothing.await.map_err(|e| not_upgraded(&app, &e))?;
    let (response, mut socket, _) =
        actix_ws::handle_with_protocols(&request, nothing, &[chat_wire::PROTOCOL])
            .map_err(|e| not_upgraded(&app, &e))?;
    let limits = &app.context.limits;
    let mut frames = FrameReader::new(
        payload.into_inner(),
        limits.frame_bytes as usize,
        limits.message_fragments,
    );
    let line = TcpHandle::of(&request);
    rt::spawn(async move {
        match admitted {
            Ok((identity, place)) => {
                run(&app, identity, away, frames, socket, &line).await;
                drop(place);
            }
            Err((refusal, reason)) => {
                let name = RequestName::default();
                let frame = encode(&session::error(&app.context.metrics, refusal, name));
                let _ = timeout(REFUSAL_LIMIT, socket.text(frame)).await;
                close(&app, &mut frames, socket, &line, reason, REFUSAL_LIMIT).await;
                drop(place);
            }
        }
    });
    Ok(response)
}

fn not_upgraded(app: &App, error: &actix_web::Error) -> HttpError {
    app.context.metrics.error(ErrorCode::BadRequest);
    let message = format!("this is a WebSocket: {error}");
    HttpError(ApiError::new(ErrorCode::BadRequest, message))
}

/// Who it is, and a place among the connections.
fn admit(
    request: &HttpRequest,
    app: &App,
) -> Result<(Identity, ConnectionPermit), (ApiError, Close)> {
    if app.draining.load(Ordering::Relaxed) {
        return Err((
            ApiError::new(ErrorCode::Unavailable, "this instance is going away"),
            Close::Restart,
        ));
    }
    if !origin_allowed(request, &app.allowed_origins) {
        return Err((
            ApiError::new(ErrorCode::Forbidden, "pages of this origin may not connect"),
            Close::ForbiddenOrigin,
        ));
    }
    // Before the token: who guesses tokens is slowed down, too.
    let address = app.address_of(request);
    if let Some(wait) = address.and_then(|address| app.connects.check(&address).err()) {
        let limit = app.context.limits.connects_per_second;
        let message =
            format!("too many new connections from this address: at most {limit} a second");
        return Err((
            ApiError::new(ErrorCode::RateLimited, message).retry_after(wait),
            Close::TooManyConnections,
        ));
    }
    let missing = || {
        ApiError::new(
            ErrorCode::Unauthenticated,
            "no token; send it as Authorization: Bearer, or as subprotocol bearer.<jwt>",
        )
    };
    let identity = auth::token(request)
        .ok_or_else(missing)
        .and_then(|token| app.context.authenticate.authenticate(token))
        .map_err(|refusal| (refusal, Close::Unauthenticated))?;
    let place = app.connections.take(address).ok_or_else(|| {
        let refusal = ApiError::new(
            ErrorCode::Overloaded,
            "too many connections from this address",
        );
        (refusal.retry_after(PLACE_RETRY), Close::TooManyConnections)
    })?;
    Ok((identity, place))
}

/// Before it is worth asking again for a place among the connections, or among the sessions of a
/// user.
const PLACE_RETRY: Duration = Duration::from_secs(5);

/// Programs send no `Origin`. A page must be our own or be listed.
fn origin_allowed(request: &HttpRequest, allowed: &[String]) -> bool {
    let headers = request.headers();
    let Some(origin) = headers.get(ORIGIN) else {
        return true;
    };
    let origin = origin.to_str().ok().and_then(normalized_origin);
    origin.is_some_and(|origin| is_own_origin(headers, &origin) || allowed.contains(&origin))
}

async fn run(
    app: &App,
    identity: Identity,
    away: Option<Timestamp>,
    mut frames: FrameReader,
    socket: actix_ws::Session,
    line: &TcpHandle,
) {
    let context = &app.context;
    let user = identity.user;
    let outbound = Arc::new(OutboundQueue::new(context.limits.outbound_queue_bytes));
    let mut session = match Session::begin(context.clone(), identity, outbound.clone(), away) {
        Ok(session) => session,
        Err(crate::delivery::registry::TooMany) => {
            let limit = context.limits.sessions_per_user;
            let message = format!("at most {limit} sessions of a user on an instance");
            let refusal = ApiError::new(ErrorCode::Overloaded, message).retry_after(PLACE_RETRY);
            let frame = encode(&session::error(
                &context.metrics,
                refusal,
                RequestName::default(),
            ));
            let mut socket = socket;
            let _ = timeout(REFUSAL_LIMIT, socket.text(frame)).await;
            return close(
                app,
                &mut frames,
                socket,
                line,
                Close::TooManyConnections,
                REFUSAL_LIMIT,
            )
            .await;
        }
    };
    let _counted = Counted::new(&context.metrics);
    // No span: it would live as long as the session, and the subscriber of logs keeps the memory of
    // spans for ever.
    tracing::debug!(%user, "session begins");
    // The writer ends with a reason to close, the reader when the client has gone.
    let reason = tokio::select! {
        reason = write(app, &outbound, socket.clone()) => reason,
        () = read(app, &mut session, &mut frames, &outbound, socket.clone()) => None,
    };
    if let Some(reason) = reason {
        if reason == Close::Restart {
            let _ = timeout(DRAIN_LIMIT, session.drain()).await;
            let rest = async {
                while let Next::Frame(frame) = outbound.next().await {
                    if socket.clone().text(frame).await.is_err() {
                        break;
                    }
                }
            };
            let _ = timeout(CLOSE_LIMIT, rest).await;
        }
        // From here on nothing more is for this session.
        drop(session);
        tracing::debug!(%user, reason = reason.reason(), "session is closed");
        close(app, &mut frames, socket, line, reason, CLOSE_LIMIT).await;
    }
}

/// A session in the count of sessions, however it ends.
struct Counted(Arc<Metrics>);

impl Counted {
    fn new(metrics: &Arc<Metrics>) -> Self {
        metrics.sessions.inc();
        Self(metrics.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.sessions.dec();
    }
}

/// Sends the frames of the outbound queue, and pings. Returns the reason to close, or `None` if the
/// client is gone.
async fn write(
    app: &App,
    outbound: &OutboundQueue,
    mut socket: actix_ws::Session,
) -> Option<Close> {
    let ping_every = Duration::from_millis(app.context.limits.ping_every_ms);
    let mut ping = std::pin::pin!(tokio::time::sleep(ping_every));
    loop {
        tokio::select! {
            next = outbound.next() => match next {
                Next::Frame(frame) => {
                    app.context.metrics.sent_frames.inc();
                    app.context.metrics.sent_bytes.inc_by(frame.len() as u64);
                    tokio::select! {
                        sent = socket.text(frame) => if sent.is_err() { return None },
                        () = outbound.overflow() => return Some(Close::SlowReader),
                    }
                }
                Next::Close(reason) => return Some(reason),
            },
            () = &mut ping => {
                ping.as_mut().reset(Instant::now() + ping_every);
                // No room means that the client does not read: it will not answer anything else
                // either.
                if matches!(socket.ping(b"").now_or_never(), Some(Err(_))) { return None }
            }
        }
    }
}

/// Reads frames until the client is gone. Reasons to close go through the outbound queue, behind
/// the frames that wait there.
async fn read(
    app: &App,
    session: &mut Session,
    frames: &mut FrameReader,
    outbound: &OutboundQueue,
    mut socket: actix_ws::Session,
) {
    let silence = Duration::from_millis(app.context.limits.silence_ms);
    let mut last_received = Instant::now();
    // One timer for both things that time can bring: silence and the end of the token.
    let mut deadline = std::pin::pin!(sleep_until(
        last_received + silence.min(session.token_left())
    ));
    loop {
        tokio::select! {
            incoming = frames.next() => {
                last_received = Instant::now();
                match incoming {
                    Ok(Incoming::Text(text)) => {
                        app.context.metrics.received_frames.inc();
                        app.context.metrics.received_bytes.inc_by(text.len() as u64);
                        session.receive(&text);
                        // A fresh token may have moved the end.
                        let end = last_received + session.token_left();
                        if end < deadline.deadline() { deadline.as_mut().reset(end) }
                    }
                    Ok(Incoming::Binary) => session.receive_binary(),
                    Ok(Incoming::Ping(bytes)) => if session.count_frame() {
                        // No room means that the client does not read.
                        let _ = socket.pong(&bytes).now_or_never();
                    },
                    Ok(Incoming::Pong | Incoming::Fragment) => { session.count_frame(); }
                    Ok(Incoming::Close) => {
                        outbound.close(Close::Normal);
                        // RFC 6455, 1.4: frames behind a Close are discarded; the writer ends us.
                        std::future::pending::<()>().await;
                    }
                    Err(ReadError::Gone) => return,
                    Err(broken) => {
                        let (code, reason, message) = match broken {
                            ReadError::TooLarge => (ErrorCode::FrameTooLarge, Close::TooLarge, "a message over the limit of bytes or fragments"),
                            ReadError::InvalidText => (ErrorCode::BadRequest, Close::InvalidText, "text that is not UTF-8"),
                            ReadError::Protocol | ReadError::Gone => (ErrorCode::BadRequest, Close::ProtocolError, "not the WebSocket protocol"),
                        };
                        outbound.push(encode(&session::error(&app.context.metrics, ApiError::new(code, message), RequestName::default())));
                        outbound.close(reason);
                        // Nothing more can be understood; the writer ends us.
                        std::future::pending::<()>().await;
                    }
                }
            }
            () = session.settle() => {}
            () = &mut deadline => {
                if session.token_left().is_zero() {
                    session.expire();
                    std::future::pending::<()>().await;
                }
                if last_received.elapsed() >= silence {
                    outbound.close(Close::Silent);
                    std::future::pending::<()>().await;
                }
                deadline.as_mut().reset((last_received + silence).min(Instant::now() + session.token_left()));
            }
        }
    }
}

/// Sends a close frame, waits a little for the client to take it and what was sent before it, and
/// ends the connection.
async fn close(
    app: &App,
    frames: &mut FrameReader,
    socket: actix_ws::Session,
    line: &TcpHandle,
    reason: Close,
    limit: Duration,
) {
    app.context.metrics.close(reason);
    let frame = CloseReason {
        code: CloseCode::from(reason.code()),
        description: Some(reason.reason().to_owned()),
    };
    // A client that does not read is not waited for.
    let taken = async {
        // It may be gone already.
        let _ = tokio::join!(socket.close(Some(frame)), frames.discard());
        line.gone().await;
    };
    if timeout(limit, taken).await.is_err() {
        line.cut();
    }
}
