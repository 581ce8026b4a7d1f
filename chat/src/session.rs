//! One connection as a state machine: frames in, frames out. It knows nothing of sockets.

use crate::config::Limits;
use crate::delivery::{Delivery, encode};
use crate::dialog::{Seq, UserId};
use crate::messages::{Messages, NotDone};
use crate::metrics::Metrics;
use crate::outbox::Outbox;
use crate::refusal::Refusal;
use crate::registry::{Joined, TooMany};
use crate::store::Range;
use chat_wire::{ClientFrame, Close, ErrorCode, ServerFrame};
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use serde::Deserialize;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::Semaphore;

/// What a token said, as far as a session cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Who.
    pub user: UserId,
    /// Until when, in seconds since 1970.
    pub expires: u64,
}

/// Checks tokens; implemented where they are known.
pub trait Authenticate: Send + Sync {
    /// Who a token belongs to.
    ///
    /// # Errors
    /// [`Refusal`] with `unauthenticated`, and why.
    fn authenticate(&self, token: &str) -> Result<Identity, Refusal>;
}

/// What sessions share. A clone is a few references.
#[derive(Clone)]
pub struct Context {
    /// Sends and reads.
    pub messages: Messages,
    /// Tells people.
    pub delivery: Delivery,
    /// Checks tokens.
    pub authenticate: Arc<dyn Authenticate>,
    /// How much of everything.
    pub limits: Arc<Limits>,
    /// What is measured.
    pub metrics: Arc<Metrics>,
}

/// A session of a user, from `welcome` on.
pub struct Session {
    context: Context,
    identity: Identity,
    outbox: Arc<Outbox>,
    joined: Joined,
    /// Requests whose answers are not in the outbox yet.
    pending: FuturesUnordered<BoxFuture<'static, ()>>,
    /// Pages and inboxes weigh much more than a `sent`: fewer of them may be under way.
    reads: Arc<Semaphore>,
    frames: FrameRate,
}

/// The longest `id` of a request, which comes back in its answer.
const MAX_ID_CHARS: usize = 64;

impl Session {
    /// Joins, and says welcome.
    ///
    /// # Errors
    /// [`TooMany`] sessions of this user are here already.
    pub fn begin(
        context: Context,
        identity: Identity,
        outbox: Arc<Outbox>,
    ) -> Result<Self, TooMany> {
        let joined = context.delivery.join(identity.user, outbox.clone())?;
        let limits = &context.limits;
        outbox.push(encode(&ServerFrame::Welcome {
            user: identity.user.get(),
            session: joined.session().to_string(),
            protocol: chat_wire::PROTOCOL.to_owned(),
            limits: chat_wire::Limits {
                text_chars: limits.text_chars,
                frame_bytes: limits.frame_bytes,
                history_page: limits.history_page,
                inbox_page: limits.inbox_page,
                sends_per_second: limits.sends_per_second,
                frames_per_second: limits.frames_per_second,
            },
        }));
        let frames = FrameRate::new(limits.frames_per_second);
        let reads = Arc::new(Semaphore::new(context.limits.reads_in_flight));
        Ok(Self {
            context,
            identity,
            outbox,
            joined,
            pending: FuturesUnordered::new(),
            reads,
            frames,
        })
    }

    /// Takes a text frame. Whatever it says, the answer goes to the outbox, now or when it is known.
    pub fn receive(&mut self, text: &str) {
        if !self.frames.take(Instant::now()) {
            self.outbox.close(Close::TooManyFrames);
            return;
        }
        match serde_json::from_str::<ClientFrame>(text) {
            Ok(frame)
                if names(&frame)
                    .1
                    .is_some_and(|id| id.chars().count() > MAX_ID_CHARS) =>
            {
                let message = format!("an id has at most {MAX_ID_CHARS} characters");
                self.refuse(Refusal::new(ErrorCode::BadRequest, message), None, None);
            }
            Ok(frame) => self.handle(frame),
            Err(e) => {
                let Names { key, id } = serde_json::from_str(text).unwrap_or_default();
                self.refuse(Refusal::new(ErrorCode::BadRequest, describe(&e)), key, id);
            }
        }
    }

    /// Takes a frame that is not text.
    pub fn receive_binary(&mut self) {
        if self.frames.take(Instant::now()) {
            self.refuse(
                Refusal::new(
                    ErrorCode::BadRequest,
                    "binary frames are not spoken here; send JSON as text",
                ),
                None,
                None,
            );
        } else {
            self.outbox.close(Close::TooManyFrames);
        }
    }

    /// Drives the requests that are under way; returns when one of them is answered. Never returns while there is none.
    ///
    /// # Cancel safety
    /// Safe: what is under way stays so.
    pub async fn settle(&mut self) {
        if self.pending.next().await.is_none() {
            std::future::pending::<()>().await;
        }
    }

    /// Waits until every request that is under way is answered.
    pub async fn drain(&mut self) {
        while self.pending.next().await.is_some() {}
    }

    /// How long the token lasts; zero once it has expired.
    #[must_use]
    pub fn token_left(&self) -> Duration {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Duration::from_secs(self.identity.expires).saturating_sub(now)
    }

    /// Says that the token has expired, and closes.
    pub fn expire(&self) {
        self.refuse(
            Refusal::new(ErrorCode::Unauthenticated, "the token has expired"),
            None,
            None,
        );
        self.outbox.close(Close::Unauthenticated);
    }

    fn handle(&mut self, frame: ClientFrame) {
        let asks_for_work = !matches!(frame, ClientFrame::Auth { .. } | ClientFrame::Ping { .. });
        let (key, id) = names(&frame);
        if asks_for_work && self.pending.len() >= self.context.limits.requests_in_flight {
            let message = format!(
                "{} requests of this session are under way; wait for their answers",
                self.pending.len()
            );
            self.refuse(Refusal::new(ErrorCode::Overloaded, message), key, id);
            return;
        }
        let me = self.identity.user;
        let messages = self.context.messages.clone();
        match frame {
            ClientFrame::Send { key, to, text } => {
                match messages.send(me, to, key.clone(), text, Some(self.joined.session())) {
                    Err(e) => self.refuse(e.into(), Some(key), None),
                    Ok(sent) => self.answer(Some(key.clone()), None, (), async move {
                        let sent = sent.await?;
                        let (seq, at) = (sent.place.seq.get(), sent.place.at.to_string());
                        Ok(ServerFrame::Sent {
                            key,
                            dialog: sent.dialog.to_string(),
                            seq,
                            at,
                        })
                    }),
                }
            }
            ClientFrame::History {
                id,
                with,
                before,
                after,
                limit,
            } => {
                let range = match range(before, after) {
                    Ok(range) => range,
                    Err(e) => return self.refuse(e.into(), None, id),
                };
                self.read(id.clone(), async move {
                    let page = messages.history(me, with, range, limit).await?;
                    Ok(ServerFrame::History { id, page })
                });
            }
            ClientFrame::Inbox { id, limit, cursor } => self.read(id.clone(), async move {
                let page = messages.inbox(me, limit, cursor.as_deref()).await?;
                Ok(ServerFrame::Inbox { id, page })
            }),
            ClientFrame::Read { with, seq } => {
                let (delivery, origin) = (self.context.delivery.clone(), self.joined.session());
                self.answer(None, None, (), async move {
                    let (dialog, mark) = messages.mark_read(me, with, seq).await?;
                    delivery.read_mark(dialog, mark.clone(), Some(origin));
                    Ok(ServerFrame::Read(mark))
                });
            }
            ClientFrame::Auth { token } => match self.context.authenticate.authenticate(&token) {
                Ok(fresh) if fresh.user == me => {
                    self.identity = fresh;
                    self.outbox.push(encode(&ServerFrame::Authenticated {
                        expires: fresh.expires,
                    }));
                }
                Ok(_) => self.refuse(
                    Refusal::new(ErrorCode::Forbidden, "the token belongs to another user"),
                    None,
                    None,
                ),
                Err(refusal) => self.refuse(refusal, None, None),
            },
            ClientFrame::Ping { id } => self.outbox.push(encode(&ServerFrame::Pong { id })),
        }
    }

    fn read(
        &self,
        id: Option<String>,
        work: impl Future<Output = Result<ServerFrame, NotDone>> + Send + 'static,
    ) {
        match self.reads.clone().try_acquire_owned() {
            Ok(place) => self.answer(None, id, place, work),
            Err(_) => {
                let message = format!(
                    "{} pages are being read for this session; wait for them",
                    self.context.limits.reads_in_flight
                );
                self.refuse(Refusal::new(ErrorCode::Overloaded, message), None, id);
            }
        }
    }

    /// Puts the result of `work` into the outbox once it is known, and keeps `place` until then.
    fn answer(
        &self,
        key: Option<String>,
        id: Option<String>,
        place: impl Send + 'static,
        work: impl Future<Output = Result<ServerFrame, NotDone>> + Send + 'static,
    ) {
        let (outbox, metrics) = (self.outbox.clone(), self.context.metrics.clone());
        self.pending.push(Box::pin(async move {
            let frame = match work.await {
                Ok(frame) => frame,
                Err(e) => error(&metrics, e.into(), key, id),
            };
            outbox.push_when_room(encode(&frame)).await;
            drop(place);
        }));
    }

    fn refuse(&self, refusal: Refusal, key: Option<String>, id: Option<String>) {
        self.outbox
            .push(encode(&error(&self.context.metrics, refusal, key, id)));
    }
}

/// An error as a frame; also counted.
#[must_use]
pub fn error(
    metrics: &Metrics,
    refusal: Refusal,
    key: Option<String>,
    id: Option<String>,
) -> ServerFrame {
    metrics.error(refusal.code);
    ServerFrame::Error(refusal.body(key, id))
}

/// Which part of a dialog `before` and `after` ask for.
///
/// # Errors
/// Both at once.
pub fn range(before: Option<u64>, after: Option<u64>) -> Result<Range, NotDone> {
    match (before, after) {
        (None, None) => Ok(Range::Newest),
        (Some(seq), None) => Ok(Range::Before(Seq::new(seq))),
        (None, Some(seq)) => Ok(Range::After(Seq::new(seq))),
        (Some(_), Some(_)) => Err(NotDone::BadRequest("before and after exclude each other")),
    }
}

/// What an answer is to be named after, in a frame that may be wrong otherwise.
#[derive(Default, Deserialize)]
struct Names {
    #[serde(default)]
    key: Option<String>,
    #[serde(default)]
    id: Option<String>,
}

fn names(frame: &ClientFrame) -> (Option<String>, Option<String>) {
    match frame {
        ClientFrame::Send { key, .. } => (Some(key.clone()), None),
        ClientFrame::History { id, .. }
        | ClientFrame::Inbox { id, .. }
        | ClientFrame::Ping { id } => (None, id.clone()),
        ClientFrame::Read { .. } | ClientFrame::Auth { .. } => (None, None),
    }
}

fn describe(e: &serde_json::Error) -> String {
    match e.classify() {
        serde_json::error::Category::Data => format!("not a frame of {}: {e}", chat_wire::PROTOCOL),
        serde_json::error::Category::Syntax
        | serde_json::error::Category::Eof
        | serde_json::error::Category::Io => {
            format!("not JSON: {e}")
        }
    }
}

/// Frames of the current second.
struct FrameRate {
    limit: u32,
    second: Instant,
    count: u32,
}

impl FrameRate {
    fn new(limit: u32) -> Self {
        Self {
            limit,
            second: Instant::now(),
            count: 0,
        }
    }

    fn take(&mut self, now: Instant) -> bool {
        if now.duration_since(self.second) >= Duration::from_secs(1) {
            self.second = now;
            self.count = 0;
        }
        self.count += 1;
        self.count <= self.limit
    }
}
