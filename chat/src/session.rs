//! One connection as a state machine: frames in, frames out. It knows nothing of sockets.

use crate::budget::cost;
use crate::bus::BusState;
use crate::clock;
use crate::config::Limits;
use crate::delivery::catchup::CatchUp;
use crate::delivery::outbound_queue::OutboundQueue;
use crate::delivery::presence::{Presence, Watch};
use crate::delivery::registry::{Joined, TooMany};
use crate::delivery::sequencer::Bounds;
use crate::delivery::subscriber::Subscriber;
use crate::delivery::{Delivery, encode};
use crate::domain::dialog::{DialogId, Seq, Timestamp, UserId};
use crate::error::{ApiError, RequestName};
use crate::messages::last_seqs::LastSeqReader;
use crate::messages::{Done, Messages, Outgoing, RequestError, Requester, Target};
use crate::metrics::Metrics;
use crate::store::Range;
use bytestring::ByteString;
use chat_wire::{ChangeRoomRequest, ClientFrame, Close, CreateRoomRequest, ErrorCode, ServerFrame};
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{Notify, Semaphore};

/// The content of a token that a session needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The user.
    pub user: UserId,
    /// When it expires, in seconds since 1970.
    pub expires: u64,
    /// When it was issued, in seconds since 1970; 0 if it does not say so.
    pub issued: u64,
}

/// Checks tokens; implemented where the keys are known.
pub trait Authenticate: Send + Sync {
    /// The identity of a token.
    ///
    /// # Errors
    /// [`ApiError`] with `unauthenticated` and the reason.
    fn authenticate(&self, token: &str) -> Result<Identity, ApiError>;

    /// Whether the token of this identity is refused by now.
    fn is_revoked(&self, identity: &Identity) -> bool;
}

/// Shared by all sessions. A clone is a few references.
#[derive(Clone)]
pub struct Context {
    /// Sends and reads.
    pub messages: Messages,
    /// Reads the last seqs of dialogs.
    pub last_seqs: LastSeqReader,
    /// Delivers events.
    pub delivery: Delivery,
    /// The presence of users.
    pub presence: Presence,
    /// Checks tokens.
    pub authenticate: Arc<dyn Authenticate>,
    /// The limits.
    pub limits: Arc<Limits>,
    /// The metrics.
    pub metrics: Arc<Metrics>,
}

/// A session of a user, from `welcome` on.
pub struct Session {
    context: Context,
    identity: Identity,
    outbound: Arc<OutboundQueue>,
    joined: Joined,
    /// The ordered events of this session.
    subscriber: Arc<Subscriber>,
    catch_up: CatchUp,
    watch: Watch,
    /// Sends without an answer.
    unsettled: Arc<Unsettled>,
    /// Other requests whose answers are not in the outbound queue yet.
    pending: FuturesUnordered<BoxFuture<'static, ()>>,
    /// Dialogs whose missed messages are being read; each at most once.
    catching_up: FuturesUnordered<BoxFuture<'static, ()>>,
    /// When the last `typing` was passed on, by dialog.
    typed: HashMap<DialogId, Instant>,
    /// Pages and inboxes are much larger than a `sent`: fewer of them may be in progress.
    reads: Arc<Semaphore>,
    frames: FrameRate,
}

/// The longest `id` of a request, which is repeated in its answer.
const MAX_ID_CHARS: usize = 64;

/// The number of dialogs whose missed messages are read at once.
const CATCH_UPS: usize = 4;

/// The shortest interval between two `typing` of a dialog.
const TYPING_EVERY: Duration = Duration::from_secs(1);

/// The number of dialogs whose `typing` is remembered; beyond, the memory begins anew.
const TYPED: usize = 64;

impl Session {
    /// Begins the session and queues `welcome`. `away`: the client was connected until then.
    ///
    /// # Errors
    /// [`TooMany`] sessions of this user on this instance.
    pub fn begin(
        context: Context,
        identity: Identity,
        outbound: Arc<OutboundQueue>,
        away: Option<Timestamp>,
    ) -> Result<Self, TooMany> {
        let limits = &context.limits;
        let bounds = Bounds {
            dialogs: limits.resume_dialogs as usize,
            held_bytes: limits.outbound_queue_bytes / 4,
        };
        let lossless = context.delivery.bus() == BusState::Standalone;
        let subscriber = Subscriber::new(outbound.clone(), bounds, lossless, away);
        let subscriber = Arc::new(subscriber);
        subscriber.set_issued(identity.issued);
        let welcome = |session| welcome(identity.user, session, limits);
        let joined =
            context
                .delivery
                .registry()
                .join(identity.user, subscriber.clone(), welcome)?;
        // Looked at again: what was revoked since the token was checked has closed the sessions
        // that were registered by then.
        if context.authenticate.is_revoked(&identity) {
            outbound.close(Close::Unauthenticated);
        }
        let frames = FrameRate::new(limits.frames_per_second);
        let reads = Arc::new(Semaphore::new(context.limits.reads_in_flight));
        let catch_up = CatchUp {
            messages: context.messages.clone(),
            last_seqs: context.last_seqs.clone(),
            subscriber: subscriber.clone(),
            me: identity.user,
            replay: u64::from(limits.resume_messages),
            replay_dialogs: limits.resume_dialogs as usize,
            permits: Arc::new(Semaphore::new(CATCH_UPS)),
            metrics: context.metrics.clone(),
        };
        Ok(Self {
            watch: context.presence.watch(joined.session(), subscriber.clone()),
            context,
            identity,
            outbound,
            joined,
            subscriber,
            catch_up,
            unsettled: Arc::default(),
            pending: FuturesUnordered::new(),
            catching_up: FuturesUnordered::new(),
            typed: HashMap::new(),
            reads,
            frames,
        })
    }

    /// Handles a text frame. The answer is put into the outbound queue, now or later.
    pub fn receive(&mut self, text: &str) {
        if !self.count_frame() {
            return;
        }
        match serde_json::from_str::<ClientFrame>(text) {
            Ok(frame) => {
                let mut name = self.name(&frame);
                let too_long = |id: &String| id.chars().count() > MAX_ID_CHARS;
                if name.id.take_if(|id| too_long(id)).is_some() {
                    let message = format!("an id has at most {MAX_ID_CHARS} characters");
                    self.refuse(ApiError::new(ErrorCode::BadRequest, message), name);
                } else {
                    self.handle(frame, name);
                }
            }
            Err(e) => {
                let refusal = ApiError::new(ErrorCode::BadRequest, describe(&e));
                self.refuse(refusal, name_of_broken(text));
            }
        }
    }

    /// Counts a frame without a request: a ping, a pong, a fragment. `false` once there are too
    /// many frames of all kinds.
    pub fn count_frame(&mut self) -> bool {
        let taken = self.frames.take(Instant::now());
        if !taken {
            self.outbound.close(Close::TooManyFrames);
        }
        taken
    }

    /// Handles a binary frame: an error.
    pub fn receive_binary(&mut self) {
        if self.count_frame() {
            self.refuse(
                ApiError::new(
                    ErrorCode::BadRequest,
                    "binary frames are not spoken here; send JSON as text",
                ),
                RequestName::default(),
            );
        }
    }

    /// Drives the requests in progress and reads missed messages; returns now and then. Never
    /// returns while there is nothing to do.
    ///
    /// # Cancel safety
    /// Safe: requests in progress continue.
    pub async fn settle(&mut self) {
        tokio::select! {
            Some(()) = self.pending.next() => {}
            Some(()) = self.catching_up.next() => {}
            dialog = self.subscriber.due() => {
                self.catching_up.push(Box::pin(self.catch_up.clone().dialog(dialog)));
            }
        }
    }

    /// Waits until every request in progress is answered.
    pub async fn drain(&mut self) {
        while self.pending.next().await.is_some() {}
        self.unsettled.none().await;
        self.subscriber.release();
    }

    /// The remaining life of the token, a year at most; zero once it has expired.
    #[must_use]
    pub fn token_left(&self) -> Duration {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        // Bounded: it is added to the time of now.
        let year = Duration::from_secs(365 * 24 * 60 * 60);
        Duration::from_secs(self.identity.expires)
            .saturating_sub(now)
            .min(year)
    }

    /// Queues the error for an expired token, and closes.
    pub fn expire(&self) {
        self.refuse(
            ApiError::new(ErrorCode::Unauthenticated, "the token has expired"),
            RequestName::default(),
        );
        self.outbound.close(Close::Unauthenticated);
    }

    fn handle(&mut self, frame: ClientFrame, name: RequestName) {
        let asks_for_work = !matches!(
            frame,
            ClientFrame::Auth { .. }
                | ClientFrame::Ping { .. }
                | ClientFrame::Typing { .. }
                | ClientFrame::Watch { .. }
                | ClientFrame::Unwatch { .. }
        );
        let under_way = self.pending.len() + self.unsettled.count();
        if asks_for_work && under_way >= self.context.limits.requests_in_flight {
            let message = format!(
                "{under_way} requests of this session are under way; wait for their answers"
            );
            self.refuse(ApiError::new(ErrorCode::Overloaded, message), name);
            return;
        }
        let refused = name.clone();
        let done = match frame {
            ClientFrame::Send {
                key,
                to,
                dialog,
                text,
                ..
            } => Target::of(to, dialog).and_then(|to| self.send(Outgoing { to, key, text }, name)),
            ClientFrame::Create { room, .. } => self.create_room(room, name),
            ClientFrame::Members { dialog, change, .. } => self.change_room(&dialog, change, name),
            ClientFrame::History {
                with,
                dialog,
                before,
                after,
                limit,
                ..
            } => self.dialog(with, dialog).and_then(|dialog| {
                let range = range(before, after)?;
                self.history(name, dialog, range, limit);
                Ok(())
            }),
            ClientFrame::Inbox { limit, cursor, .. } => {
                self.inbox(name, limit, cursor);
                Ok(())
            }
            ClientFrame::Resume {
                positions, since, ..
            } => self.positions(positions, since).map(|(positions, since)| {
                let (catch_up, id) = (self.catch_up.clone(), name.id.clone());
                self.read(name, async move {
                    catch_up.resume(id, positions, since).await;
                    Ok(None)
                });
            }),
            ClientFrame::Read {
                with, dialog, seq, ..
            } => Target::of(with, dialog).map(|of| self.mark_read(name, of, seq)),
            ClientFrame::Typing { with, dialog, .. } => self.dialog(with, dialog).map(|dialog| {
                self.typing(dialog);
                self.done(name.id);
            }),
            ClientFrame::Watch { users, .. } => self.watch(&users).map(|()| self.done(name.id)),
            ClientFrame::Unwatch { users, .. } => {
                for user in users.iter().filter_map(|user| UserId::new(*user).ok()) {
                    self.watch.remove(user);
                }
                self.done(name.id);
                Ok(())
            }
            ClientFrame::Auth { token, .. } => {
                self.renew(&token, name);
                Ok(())
            }
            ClientFrame::Ping { id } => {
                self.outbound.push(encode(&ServerFrame::Pong { id }));
                Ok(())
            }
        };
        if let Err(e) = done {
            self.refuse(e.into(), refused);
        }
    }

    /// The dialog that a frame names.
    fn dialog(&self, with: Option<u64>, dialog: Option<String>) -> Result<DialogId, RequestError> {
        Target::of(with, dialog)?.dialog(self.identity.user)
    }

    /// Answers a request that has no other answer, if it has an id.
    fn done(&self, id: Option<String>) {
        if let Some(id) = id {
            self.outbound.push(encode(&ServerFrame::Done { id }));
        }
    }

    /// The name of a request, for its answer.
    fn name(&self, frame: &ClientFrame) -> RequestName {
        let mut name = RequestName::default();
        let (id, target) = match frame {
            ClientFrame::Send {
                id,
                key,
                to,
                dialog,
                ..
            } => {
                name.key = Some(key.clone());
                (id, Target::of(*to, dialog.clone()).ok())
            }
            ClientFrame::Create { id, room } => {
                name.key = Some(room.key.clone());
                (id, None)
            }
            ClientFrame::Members { id, dialog, change } => {
                name.key = Some(change.key.clone());
                (id, Some(Target::Dialog(dialog.clone())))
            }
            ClientFrame::History {
                id, with, dialog, ..
            }
            | ClientFrame::Read {
                id, with, dialog, ..
            }
            | ClientFrame::Typing { id, with, dialog } => {
                (id, Target::of(*with, dialog.clone()).ok())
            }
            ClientFrame::Inbox { id, .. }
            | ClientFrame::Resume { id, .. }
            | ClientFrame::Watch { id, .. }
            | ClientFrame::Unwatch { id, .. }
            | ClientFrame::Auth { id, .. }
            | ClientFrame::Ping { id } => (id, None),
        };
        name.dialog = target.and_then(|target| target.dialog(self.identity.user).ok());
        name.id.clone_from(id);
        name
    }

    /// Answers with a page. If it reaches the end of the dialog, the session follows the dialog
    /// from there.
    fn history(&self, name: RequestName, dialog: DialogId, range: Range, limit: Option<u32>) {
        let (me, messages) = (self.identity.user, self.context.messages.clone());
        let (subscriber, id) = (self.subscriber.clone(), name.id.clone());
        self.read(name, async move {
            let page = messages.history(me, dialog, range, limit).await?;
            let to_the_end = match range {
                Range::Newest => true,
                Range::After(_) => !page.more,
                Range::Before(_) => false,
            };
            if to_the_end && page.last > 0 {
                subscriber.track(dialog, Seq::new(page.last));
            }
            Ok(Some(ServerFrame::History { id, page }))
        });
    }

    /// Answers with a page of the inbox. The session follows the dialogs on it from their last
    /// messages.
    fn inbox(&self, name: RequestName, limit: Option<u32>, cursor: Option<String>) {
        let (me, messages) = (self.identity.user, self.context.messages.clone());
        let (subscriber, id) = (self.subscriber.clone(), name.id.clone());
        self.read(name, async move {
            let page = messages.inbox(me, limit, cursor.as_deref()).await?;
            for entry in &page.dialogs {
                if let Ok(dialog) = entry.dialog.parse() {
                    subscriber.track(dialog, Seq::new(entry.last.seq));
                }
            }
            Ok(Some(ServerFrame::Inbox { id, page }))
        });
    }

    /// Marks a dialog as read. If the mark has moved, this session receives it as all others do.
    fn mark_read(&self, name: RequestName, of: Target, seq: u64) {
        let (me, messages) = (self.identity.user, self.context.messages.clone());
        let id = name.id.clone();
        self.answer(name, (), async move {
            messages.mark_read(me, &of, seq).await?;
            Ok(id.map(|id| ServerFrame::Done { id }))
        });
    }

    /// Takes a fresh token of the same user.
    fn renew(&mut self, token: &str, name: RequestName) {
        match self.context.authenticate.authenticate(token) {
            Ok(fresh) if fresh.user == self.identity.user => {
                self.identity = fresh;
                self.subscriber.set_issued(fresh.issued);
                if self.context.authenticate.is_revoked(&fresh) {
                    self.outbound.close(Close::Unauthenticated);
                }
                self.outbound.push(encode(&ServerFrame::Authenticated {
                    id: name.id,
                    expires: fresh.expires,
                }));
            }
            Ok(_) => self.refuse(
                ApiError::new(ErrorCode::Forbidden, "the token belongs to another user"),
                name,
            ),
            Err(refusal) => self.refuse(refusal, name),
        }
    }

    /// Sends a message. `sent` takes the place of the message in the dialog, and delivery sends it;
    /// a failure is answered here.
    fn send(&self, message: Outgoing, name: RequestName) -> Result<(), RequestError> {
        let unsettled = Unsettled::one_more(&self.unsettled);
        let (outbound, metrics) = (self.outbound.clone(), self.context.metrics.clone());
        let origin = Some(Requester {
            session: self.joined.session(),
            id: name.id.clone(),
        });
        let settled = move |sent| {
            if let Err(e) = sent {
                outbound.push(encode(&error(&metrics, RequestError::into(e), name)));
            }
            drop(unsettled);
        };
        self.context
            .messages
            .send(self.identity.user, message, origin, settled)
    }

    /// Makes a room. Its first entry is delivered to all its members, this session too.
    fn create_room(&self, room: CreateRoomRequest, name: RequestName) -> Result<(), RequestError> {
        let (unsettled, answers) = (Unsettled::one_more(&self.unsettled), self.answers());
        let key = room.key.clone();
        let created = move |done: Result<Done, RequestError>| {
            let created = done.map(|done| match done {
                Done::Stored(sent) => Some(ServerFrame::Created {
                    id: name.id.clone(),
                    key,
                    dialog: sent.dialog.to_string(),
                    seq: sent.place.seq.get(),
                    at: sent.place.at.to_string(),
                }),
                Done::Unchanged => None,
            });
            answers(created, name);
            drop(unsettled);
        };
        let messages = &self.context.messages;
        messages.create_room(self.identity.user, room, created)
    }

    /// Changes a room. Its entry is delivered to all its members, this session too.
    fn change_room(
        &self,
        room: &str,
        change: ChangeRoomRequest,
        name: RequestName,
    ) -> Result<(), RequestError> {
        let (unsettled, answers) = (Unsettled::one_more(&self.unsettled), self.answers());
        let changed = move |done: Result<Done, RequestError>| {
            let id = name.id.clone();
            answers(done.map(|_| id.map(|id| ServerFrame::Done { id })), name);
            drop(unsettled);
        };
        let messages = &self.context.messages;
        messages.change_room(self.identity.user, room, change, changed)
    }

    /// Puts an answer or an error into the outbound queue.
    fn answers(
        &self,
    ) -> impl Fn(Result<Option<ServerFrame>, RequestError>, RequestName) + Send + 'static + use<>
    {
        let (outbound, metrics) = (self.outbound.clone(), self.context.metrics.clone());
        move |answer, name| {
            let frame = match answer {
                Ok(frame) => frame,
                Err(e) => Some(error(&metrics, e.into(), name)),
            };
            if let Some(frame) = frame {
                outbound.push(encode(&frame));
            }
        }
    }

    /// The positions of a `resume`, ordered by dialog.
    #[allow(clippy::type_complexity)]
    fn positions(
        &self,
        positions: BTreeMap<String, u64>,
        since: Option<String>,
    ) -> Result<(Vec<(DialogId, Seq)>, Option<Timestamp>), RequestError> {
        if positions.len() > self.context.limits.resume_dialogs as usize {
            return Err(RequestError::BadRequest(
                "too many dialogs; welcome says how many a resume may name",
            ));
        }
        let me = self.identity.user;
        let ours = |(dialog, seq): (String, u64)| {
            let dialog: Option<DialogId> = dialog.parse().ok();
            // Who is in a room is looked up with its last entry.
            let dialog = dialog.filter(|dialog| dialog.is_room() || dialog.names(me));
            dialog.map(|dialog| (dialog, Seq::new(seq)))
        };
        let mut positions = positions
            .into_iter()
            .map(ours)
            .collect::<Option<Vec<_>>>()
            .ok_or(RequestError::BadRequest("a position of no dialog of yours"))?;
        positions.sort_unstable();
        let since = since.map(|since| away_since(&since, &self.context.limits));
        let since = since.transpose()?;
        let units = if since.is_some() {
            cost::RESUME
        } else {
            cost::STATEMENT
        };
        let units = units + cost::inbox(positions.len());
        self.context.messages.afford(me, units)?;
        Ok((positions, since))
    }

    fn typing(&mut self, dialog: DialogId) {
        let now = Instant::now();
        let lately = |at: &Instant| now.duration_since(*at) < TYPING_EVERY;
        if self.typed.get(&dialog).is_some_and(lately) {
            return;
        }
        if self.typed.len() >= TYPED {
            self.typed.retain(|_, at| lately(at));
        }
        let me = self.identity.user;
        let affordable = || self.context.messages.afford(me, cost::STATEMENT).is_ok();
        if self.typed.len() < TYPED && affordable() {
            self.typed.insert(dialog, now);
            let delivery = self.context.delivery.clone();
            if dialog.is_room() {
                let messages = self.context.messages.clone();
                self.pending.push(Box::pin(async move {
                    if let Ok(users) = messages.room_audience(me, dialog).await {
                        delivery.typing(dialog, me, users.iter().copied());
                    }
                }));
            } else {
                delivery.typing(dialog, me, dialog.users());
            }
        }
    }

    fn watch(&mut self, users: &[u64]) -> Result<(), RequestError> {
        let users = users.iter().map(|user| UserId::new(*user));
        let users: Vec<UserId> = users.collect::<Result<_, _>>()?;
        let new = users.iter().filter(|user| !self.watch.contains(**user));
        let new = new.count();
        if self.watch.len() + new > self.context.limits.watched_users as usize {
            return Err(RequestError::BadRequest(
                "too many users; welcome says how many a session may watch",
            ));
        }
        let units = cost::STATEMENT.saturating_mul(u32::try_from(new).unwrap_or(u32::MAX));
        self.context.messages.afford(self.identity.user, units)?;
        users.into_iter().for_each(|user| self.watch.add(user));
        Ok(())
    }

    /// Reads from the shards. The bus subscription is active by then, so no message falls between
    /// the read and the live events.
    fn read(
        &self,
        name: RequestName,
        work: impl Future<Output = Result<Option<ServerFrame>, RequestError>> + Send + 'static,
    ) {
        let listening = self.joined.listening();
        let work = async move {
            listening.await;
            work.await
        };
        match self.reads.clone().try_acquire_owned() {
            Ok(place) => self.answer(name, place, work),
            Err(_) => {
                let message = format!(
                    "{} pages are being read for this session; wait for them",
                    self.context.limits.reads_in_flight
                );
                self.refuse(ApiError::new(ErrorCode::Overloaded, message), name);
            }
        }
    }

    /// Puts the result of `work`, if it has one, into the outbound queue, and keeps `place` until
    /// then.
    fn answer(
        &self,
        name: RequestName,
        place: impl Send + 'static,
        work: impl Future<Output = Result<Option<ServerFrame>, RequestError>> + Send + 'static,
    ) {
        let (outbound, metrics) = (self.outbound.clone(), self.context.metrics.clone());
        self.pending.push(Box::pin(async move {
            let frame = match work.await {
                Ok(frame) => frame,
                Err(e) => Some(error(&metrics, e.into(), name)),
            };
            if let Some(frame) = frame {
                outbound.push_when_room(encode(&frame)).await;
            }
            drop(place);
        }));
    }

    fn refuse(&self, refusal: ApiError, name: RequestName) {
        self.outbound
            .push(encode(&error(&self.context.metrics, refusal, name)));
    }
}

/// An error as a frame; also counted.
#[must_use]
pub fn error(metrics: &Metrics, refusal: ApiError, name: RequestName) -> ServerFrame {
    metrics.error(refusal.code);
    ServerFrame::Error(refusal.body(name))
}

/// The first frame of a session.
fn welcome(user: UserId, session: u64, limits: &Limits) -> ByteString {
    encode(&ServerFrame::Welcome {
        user: user.get(),
        session: session.to_string(),
        protocol: chat_wire::PROTOCOL.to_owned(),
        limits: chat_wire::Limits {
            text_chars: limits.text_chars,
            frame_bytes: limits.frame_bytes,
            history_page: limits.history_page,
            inbox_page: limits.inbox_page,
            sends_per_second: limits.sends_per_second,
            frames_per_second: limits.frames_per_second,
            resume_dialogs: limits.resume_dialogs,
            resume_messages: limits.resume_messages,
            watched_users: limits.watched_users,
            room_members: limits.room_members,
            resume_hours: limits.resume_hours,
            work_per_second: limits.work_per_second,
            work_burst: limits.work_burst,
        },
        now: clock::now().to_string(),
    })
}

/// The time until which a client says that it was connected.
///
/// # Errors
/// If it is no time.
pub fn away_since(since: &str, limits: &Limits) -> Result<Timestamp, RequestError> {
    let since: Timestamp = since
        .parse()
        .map_err(|_| RequestError::BadRequest("since is not the now of a welcome"))?;
    // Earlier messages are shown by the inbox.
    let farthest = clock::now().micros() - i64::from(limits.resume_hours) * Timestamp::HOUR;
    Ok(since.max(Timestamp::from_micros(farthest)))
}

/// The part of a dialog that `before` and `after` request.
///
/// # Errors
/// If both are set.
pub fn range(before: Option<u64>, after: Option<u64>) -> Result<Range, RequestError> {
    match (before, after) {
        (None, None) => Ok(Range::Newest),
        (Some(seq), None) => Ok(Range::Before(Seq::new(seq))),
        (None, Some(seq)) => Ok(Range::After(Seq::new(seq))),
        (Some(_), Some(_)) => Err(RequestError::BadRequest(
            "before and after exclude each other",
        )),
    }
}

/// The name of a request that cannot be read otherwise.
fn name_of_broken(text: &str) -> RequestName {
    #[derive(Default, Deserialize)]
    struct Names {
        id: Option<String>,
        key: Option<String>,
    }
    let Names { id, key } = serde_json::from_str(text).unwrap_or_default();
    RequestName {
        id: id.filter(|id| id.chars().count() <= MAX_ID_CHARS),
        key,
        dialog: None,
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

/// Counts the sends of a session without an answer.
#[derive(Default)]
struct Unsettled {
    count: AtomicUsize,
    /// Wakes the tasks that wait for all of them.
    settled: Notify,
}

/// One send without an answer, until it is dropped.
struct OneUnsettled(Arc<Unsettled>);

impl Unsettled {
    fn one_more(of: &Arc<Self>) -> OneUnsettled {
        of.count.fetch_add(1, Ordering::AcqRel);
        OneUnsettled(of.clone())
    }

    fn count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Waits until all sends are answered.
    async fn none(&self) {
        loop {
            let settled = self.settled.notified();
            if self.count() == 0 {
                return;
            }
            settled.await;
        }
    }
}

impl Drop for OneUnsettled {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.settled.notify_waiters();
        }
    }
}

/// The number of frames in the current second.
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
