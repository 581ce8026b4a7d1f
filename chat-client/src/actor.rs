//! The task behind a [`Client`](crate::Client): it connects, repeats what is not answered, and
//! delivers messages in order.

use crate::access::expiry;
use crate::backlog::{Backlog, Of, Unanswered, encode};
use crate::connection::{Connection, Incoming};
use crate::event::Event;
use crate::streams::Streams;
use crate::{Access, ClientError, To};
use chat_wire::{
    ClientFrame, Close, ErrorBody, ErrorCode, HistoryPage, Kind, Message, Sent, ServerFrame,
};
use rand::RngExt;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_tungstenite::tungstenite::Utf8Bytes;

/// What a handle asks of the task.
pub(crate) enum Command {
    Send {
        key: String,
        to: To,
        text: String,
        answer: oneshot::Sender<Result<Sent, ClientError>>,
    },
    Ask {
        frame: Box<dyn FnOnce(String) -> ClientFrame + Send>,
        answer: oneshot::Sender<Result<ServerFrame, ClientError>>,
    },
    /// Sent if there is a connection.
    Typing {
        to: To,
    },
    Mark {
        of: To,
        seq: u64,
    },
    Watch {
        users: Vec<u64>,
        watch: bool,
    },
    Follow {
        dialog: String,
        after: u64,
    },
}

/// See the module.
pub(crate) struct Actor {
    access: Access,
    user: u64,
    events: mpsc::Sender<Event>,
    /// Requests without an answer.
    backlog: Backlog,
    pace: Pace,
    /// What is sent before them; gone with the connection.
    first: Vec<Utf8Bytes>,
    /// Read marks to be sent, the farthest of each dialog, and when: who reads a hundred messages
    /// at once says so once.
    marks: BTreeMap<String, (To, u64)>,
    marks_due: Instant,
    streams: Streams,
    /// The server's time at which it last confirmed that we have every message.
    since: Option<String>,
    /// Dialogs that one `resume` may name.
    resume_dialogs: usize,
    /// Bytes that a frame may have.
    frame_bytes: usize,
    watched: BTreeSet<u64>,
    /// Counts attempts that failed, so that each goes to another instance.
    attempt: usize,
    /// The server asked for so long a pause.
    wait: Duration,
}

/// The longest first pause before a new attempt, and the longest of all.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(8));

/// A connection that lasted so long was a good one.
const HELD: Duration = Duration::from_secs(5);

/// How long an attempt may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Between two rounds of read marks.
const MARKS_EVERY: Duration = Duration::from_millis(200);

/// The most that a position takes in a `resume`: two user ids and a seq in decimal, with quotes.
const POSITION_BYTES: usize = 64;

/// The most that a user id takes in a `watch`.
const USER_BYTES: usize = 20;

/// Commands that are sent together.
const TOGETHER: usize = 64;

impl Actor {
    pub(crate) fn new(access: Access, user: u64, events: mpsc::Sender<Event>) -> Self {
        Self {
            access,
            user,
            events,
            backlog: Backlog::default(),
            pace: Pace::new(1),
            first: Vec::new(),
            marks: BTreeMap::new(),
            marks_due: Instant::now(),
            streams: Streams::default(),
            since: None,
            resume_dialogs: 1,
            frame_bytes: usize::MAX,
            watched: BTreeSet::new(),
            attempt: 0,
            wait: Duration::ZERO,
        }
    }

    pub(crate) async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut pause = BACKOFF.0;
        loop {
            let (lasted, ended) = match timeout(CONNECT_LIMIT, self.connect()).await {
                Ok(Ok((connection, renew))) => {
                    let begun = Instant::now();
                    let ended = self.serve(connection, renew, &mut commands).await;
                    (begun.elapsed(), ended)
                }
                Ok(Err(ClientError::Refused(body))) if !body.retryable => {
                    self.emit(Event::Closed(ClientError::Refused(body))).await;
                    return;
                }
                Ok(Err(e)) => (Duration::ZERO, Ended::Lost(None, e.to_string())),
                Err(_) => (
                    Duration::ZERO,
                    Ended::Lost(None, "no connection in time".into()),
                ),
            };
            let (code, reason) = match ended {
                Ended::Dropped => return,
                // A token that expired while we were here is replaced; one that is not taken at all
                // stays so.
                Ended::ForGood(_) if self.access.renews() && lasted > HELD => {
                    (None, "the token has expired".into())
                }
                Ended::ForGood(e) => {
                    self.emit(Event::Closed(e)).await;
                    return;
                }
                Ended::Lost(code, reason) => (code, reason),
            };
            self.backlog.disconnected(code, &reason);
            self.attempt += 1;
            self.emit(Event::Disconnected { code, reason }).await;
            // A connection that held for a while starts the pauses anew. Any time within the pause:
            // a crowd that lost the same instance comes back spread over it.
            if lasted > HELD {
                pause = BACKOFF.0;
            }
            let jittered = std::mem::take(&mut self.wait) + pause.mul_f64(rand::rng().random());
            sleep(jittered).await;
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    /// A connection, and when to bring another token.
    async fn connect(&self) -> Result<(Connection, Option<Instant>), ClientError> {
        let token = self.access.token(self.user).await?;
        let since = self.since.as_deref();
        let connection = Connection::open(&self.access, &token, self.attempt, since).await?;
        Ok((connection, self.renewal(&token)))
    }

    /// When to bring another token: after three quarters of its life.
    fn renewal(&self, token: &str) -> Option<Instant> {
        let expires = expiry(token).filter(|_| self.access.renews())?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
        let left = Duration::from_secs(expires).saturating_sub(now);
        Some(Instant::now() + left.mul_f64(0.75))
    }

    async fn serve(
        &mut self,
        mut connection: Connection,
        mut renew: Option<Instant>,
        commands: &mut mpsc::Receiver<Command>,
    ) -> Ended {
        match timeout(CONNECT_LIMIT, connection.next()).await {
            Ok(Incoming::Frame(frame)) => {
                if let ServerFrame::Error(body) = *frame {
                    return if body.retryable {
                        self.wait = Duration::from_millis(body.retry_after_ms.unwrap_or(0));
                        Ended::Lost(None, body.message)
                    } else {
                        Ended::ForGood(ClientError::Refused(Box::new(body)))
                    };
                }
                let ServerFrame::Welcome { limits, now, .. } = *frame else {
                    return Ended::Lost(None, "the server does not say welcome".into());
                };
                self.pace = Pace::new(limits.sends_per_second);
                self.resume_dialogs = (limits.resume_dialogs as usize).max(1);
                self.frame_bytes = limits.frame_bytes as usize;
                self.begin(now);
            }
            Ok(Incoming::Closed(code, reason)) => return Ended::of(code, reason),
            Err(_) => return Ended::Lost(None, "no welcome in time".into()),
        }
        self.emit(Event::Connected).await;
        let mut batch = Vec::with_capacity(TOGETHER);
        loop {
            let due = self.due(Instant::now());
            if !due.is_empty()
                && let Err(e) = connection.send(due).await
            {
                return Ended::Lost(None, e.to_string());
            }
            let next = self.pace.next;
            let wakes = self.backlog.wakes();
            tokio::select! {
                count = commands.recv_many(&mut batch, TOGETHER) => {
                    if count == 0 {
                        connection.close().await;
                        return Ended::Dropped;
                    }
                    batch.drain(..).for_each(|command| self.accept(command));
                }
                incoming = connection.next() => match incoming {
                    Incoming::Frame(frame) => self.take(*frame).await,
                    Incoming::Closed(code, reason) => return Ended::of(code, reason),
                },
                () = sleep_until(next), if self.backlog.is_ready() => {}
                () = sleep_until(wakes.unwrap_or(next)), if wakes.is_some() => {}
                () = sleep_until(self.marks_due), if !self.marks.is_empty() => {}
                () = sleep_until(renew.unwrap_or(next)), if renew.is_some() => {
                    // If there is none now, the connection will be closed in time, and begun anew
                    // with what there is then.
                    let token = self.access.token(self.user).await.ok();
                    renew = token.as_deref().and_then(|token| self.renewal(token));
                    self.first.extend(token.map(|token| encode(&ClientFrame::Auth { id: None, token })));
                }
            }
        }
    }

    /// Says where we are, and asks again what was not answered.
    fn begin(&mut self, now: String) {
        self.first.clear();
        self.backlog.restart();
        self.streams.interrupt();
        match self.since.clone() {
            // Kept until the server confirms that nothing is missing since then.
            Some(since) => self.resume(Some(since)),
            None => {
                self.since = Some(now);
                self.resume(None);
            }
        }
        let users: Vec<u64> = self.watched.iter().copied().collect();
        self.watch(&users);
    }

    /// Sends the positions of the client, in as many frames as needed.
    fn resume(&mut self, mut since: Option<String>) {
        let positions: Vec<(String, u64)> = self.streams.positions().into_iter().collect();
        let fitting = (self.frame_bytes / POSITION_BYTES).max(1);
        let mut parts: Vec<&[(String, u64)]> =
            positions.chunks(self.resume_dialogs.min(fitting)).collect();
        if parts.is_empty() && since.is_some() {
            parts.push(&[]);
        }
        // With the last part, when the server knows the positions of the others.
        let last = parts.len().saturating_sub(1);
        for (n, part) in parts.into_iter().enumerate() {
            let positions: BTreeMap<String, u64> = part.iter().cloned().collect();
            let since = since.take_if(|_| n == last);
            self.resume_these(positions, since);
        }
    }

    /// Positions are sent before anything else.
    fn resume_these(&mut self, positions: BTreeMap<String, u64>, since: Option<String>) {
        let dialogs = positions.keys().cloned().collect();
        let resume = |id| ClientFrame::Resume {
            id: Some(id),
            positions,
            since,
        };
        let frame = self.backlog.transmitted(Of::Resume(dialogs), resume);
        self.first.push(frame);
    }

    fn watch(&mut self, users: &[u64]) {
        let fitting = (self.frame_bytes / USER_BYTES).max(1);
        let frames = users.chunks(fitting).map(|users| ClientFrame::Watch {
            id: None,
            users: users.to_vec(),
        });
        self.first.extend(frames.map(|frame| encode(&frame)));
    }

    /// What may be sent now, in order.
    fn due(&mut self, now: Instant) -> Vec<Utf8Bytes> {
        let mut due = std::mem::take(&mut self.first);
        if !self.marks.is_empty() && self.marks_due <= now {
            let marks = std::mem::take(&mut self.marks).into_values();
            let read = |(of, seq): (To, u64)| {
                let (with, dialog) = of.names();
                ClientFrame::Read {
                    id: None,
                    with,
                    dialog,
                    seq,
                }
            };
            due.extend(marks.map(|mark| encode(&read(mark))));
            self.marks_due = now + MARKS_EVERY;
        }
        // Whatever the pace says: no time that is over is left to be waited for.
        self.backlog.wake(now);
        while due.len() < TOGETHER && self.pace.allows(now) {
            let Some(frame) = self.backlog.next(self.frame_bytes) else {
                break;
            };
            due.push(frame);
            self.pace.take(now);
        }
        due
    }

    /// Remembers what a command waits for, and puts it into the queue.
    fn accept(&mut self, command: Command) {
        match command {
            Command::Send {
                key,
                to,
                text,
                answer,
            } => self.backlog.send(Unanswered {
                dialog: to.dialog(self.user),
                to,
                key,
                text,
                answer,
            }),
            Command::Ask { frame, answer } => self.backlog.ask(Of::Caller(answer), frame),
            Command::Typing { to } => {
                let (with, dialog) = to.names();
                let typing = ClientFrame::Typing {
                    id: None,
                    with,
                    dialog,
                };
                self.first.push(encode(&typing));
            }
            Command::Mark { of, seq } => {
                let mark = self.marks.entry(of.dialog(self.user));
                let (_, farthest) = mark.or_insert((of, seq));
                *farthest = seq.max(*farthest);
            }
            Command::Watch { users, watch } => {
                if watch {
                    self.watched.extend(&users);
                    self.watch(&users);
                } else {
                    self.watched.retain(|user| !users.contains(user));
                    let unwatch = ClientFrame::Unwatch { id: None, users };
                    self.first.push(encode(&unwatch));
                }
            }
            Command::Follow { dialog, after } => {
                self.streams.follow(&dialog, after);
                self.resume_one(dialog, after);
            }
        }
    }

    fn resume_one(&mut self, dialog: String, after: u64) {
        self.resume_these(BTreeMap::from([(dialog, after)]), None);
    }

    async fn take(&mut self, frame: ServerFrame) {
        match frame {
            ServerFrame::Sent {
                key,
                dialog,
                seq,
                at,
                early,
                ..
            } => self.sent(key, dialog, seq, at, early).await,
            ServerFrame::Message(message) => {
                // One of ours that we do not know to be stored, because the answer was lost with a
                // connection.
                if let (true, Some(key)) = (message.from == self.user, &message.key) {
                    self.settle(key, &message);
                }
                if self.streams.message(&message.dialog, message.seq) {
                    self.show(message).await;
                }
            }
            ServerFrame::Entry(entry) => {
                if self.streams.message(&entry.dialog, entry.seq) {
                    self.show(entry).await;
                }
            }
            ServerFrame::Resumed {
                ref id,
                ref resync,
                ref reads,
                ..
            } => {
                if let Some(Of::Resume(dialogs)) = self.backlog.answered(id.as_deref()) {
                    self.streams.resumed(&dialogs);
                }
                for mark in reads.clone() {
                    self.emit(Event::Read(mark)).await;
                }
                for dialog in resync.clone() {
                    if self.streams.resync(&dialog) {
                        self.read_on(dialog, true);
                    } else {
                        self.emit(Event::Resync(dialog)).await;
                    }
                }
                if let ServerFrame::Resumed { now, .. } = frame {
                    self.since = Some(now);
                }
            }
            ServerFrame::Read(mark) => self.emit(Event::Read(mark)).await,
            ServerFrame::Typing { dialog, user } => self.emit(Event::Typing { dialog, user }).await,
            ServerFrame::Presence(presence) => self.emit(Event::Presence(presence)).await,
            ServerFrame::Error(body) => self.refused(body),
            ServerFrame::Created { ref id, .. } => {
                if let Some(Of::Caller(answer)) = self.backlog.answered(id.as_deref()) {
                    drop(answer.send(Ok(frame)));
                }
            }
            ServerFrame::Done { ref id } => {
                if let Some(Of::Caller(answer)) = self.backlog.answered(Some(id)) {
                    drop(answer.send(Ok(frame)));
                }
            }
            ServerFrame::History { ref id, .. } | ServerFrame::Inbox { ref id, .. } => {
                match (self.backlog.answered(id.as_deref()), frame) {
                    // The caller may have been dropped.
                    (Some(Of::Caller(answer)), frame) => drop(answer.send(Ok(frame))),
                    (Some(Of::Reading(dialog, above)), ServerFrame::History { page, .. }) => {
                        self.found(dialog, above, page).await;
                    }
                    _ => {}
                }
            }
            ServerFrame::Welcome { .. }
            | ServerFrame::Authenticated { .. }
            | ServerFrame::Pong { .. } => {}
        }
    }

    async fn sent(&mut self, key: String, dialog: String, seq: u64, at: String, early: bool) {
        let Some(send) = self.backlog.sent(&dialog, &key) else {
            return;
        };
        if !early && self.streams.message(&dialog, seq) {
            self.emit(Event::Message(Message {
                dialog: dialog.clone(),
                seq,
                from: self.user,
                to: self.counterpart(&dialog),
                text: send.text,
                at: at.clone(),
                key: Some(send.key),
                ..Message::default()
            }))
            .await;
        }
        // The caller may have been dropped.
        let _ = send.answer.send(Ok(Sent { dialog, seq, at }));
    }

    /// Reports an entry, if it is of a kind that this version knows.
    async fn show(&self, entry: Message) {
        match entry.kind {
            Kind::Text => self.emit(Event::Message(entry)).await,
            Kind::Member => self.emit(Event::Entry(entry)).await,
            Kind::Other(_) => {}
        }
    }

    fn settle(&mut self, key: &str, message: &Message) {
        if let Some(send) = self.backlog.sent(&message.dialog, key) {
            let _ = send.answer.send(Ok(Sent {
                dialog: message.dialog.clone(),
                seq: message.seq,
                at: message.at.clone(),
            }));
        }
    }

    /// Asks for the next page of what was missed in a dialog; or, if there is nothing above what we
    /// have, for its end.
    fn read_on(&mut self, dialog: String, above: bool) {
        let after = self.streams.last(&dialog).filter(|_| above);
        let name = dialog.clone();
        let page = |id| ClientFrame::History {
            id: Some(id),
            with: None,
            dialog: Some(name),
            before: None,
            after,
            limit: after.is_none().then_some(1),
        };
        self.backlog.ask(Of::Reading(dialog, above), page);
    }

    async fn found(&mut self, dialog: String, above: bool, page: HistoryPage) {
        if !above {
            // The log is shorter than our position: we continue at its end.
            self.streams.follow(&dialog, page.last);
            self.resume_one(dialog.clone(), page.last);
            self.emit(Event::Resync(dialog)).await;
            return;
        }
        let nothing = page.messages.is_empty();
        for message in page.messages {
            if self.streams.found(&dialog, message.seq) {
                self.show(message).await;
            }
        }
        if page.more {
            self.read_on(dialog, true);
        } else if nothing {
            self.read_on(dialog, false);
        } else {
            let last = self.streams.last(&dialog).unwrap_or(page.last);
            self.streams.follow(&dialog, last);
            self.resume_one(dialog, last);
        }
    }

    /// Repeats what may succeed later; returns every other error to the caller.
    fn refused(&mut self, body: ErrorBody) {
        let (dialog, key) = (body.dialog.as_deref(), body.key.as_deref());
        let named = self.backlog.named(dialog, key, body.id.as_deref());
        let Some(number) = named else { return };
        let now = Instant::now();
        if body.code == ErrorCode::RateLimited {
            // Not this one alone is too early, but every request of this client.
            let after = Duration::from_millis(body.retry_after_ms.unwrap_or(1000));
            self.pace.next = self.pace.next.max(now + after);
            self.backlog.repeat(number, now);
        } else if body.retryable {
            let after = Duration::from_millis(body.retry_after_ms.unwrap_or(200));
            let after = after.mul_f64(rand::rng().random_range(1.0..1.5));
            self.backlog.repeat(number, now + after);
        } else {
            let refusal = ClientError::Refused(Box::new(body));
            self.backlog.fail(number, refusal);
        }
    }

    /// The other user of a dialog between two.
    fn counterpart(&self, dialog: &str) -> Option<u64> {
        let (low, high) = dialog.split_once('_')?;
        let (low, high) = (low.parse().ok()?, high.parse().ok()?);
        Some(if low == self.user { high } else { low })
    }

    async fn emit(&self, event: Event) {
        // The receiver may be gone.
        let _ = self.events.send(event).await;
    }
}

/// When the next frame may be sent: as many a second as the server takes, and up to a second's
/// worth at once.
struct Pace {
    step: Duration,
    next: Instant,
}

impl Pace {
    fn new(per_second: u32) -> Self {
        Self {
            step: Duration::from_secs(1) / per_second.max(1),
            next: Instant::now(),
        }
    }

    fn allows(&self, now: Instant) -> bool {
        self.next <= now
    }

    fn take(&mut self, now: Instant) {
        // What was not used for a second is lost.
        let earliest = now.checked_sub(Duration::from_secs(1)).unwrap_or(now);
        self.next = self.next.max(earliest) + self.step;
    }
}

/// How a connection ended.
enum Ended {
    /// The last handle was dropped.
    Dropped,
    /// To be tried again.
    Lost(Option<u16>, String),
    /// Not to be tried again.
    ForGood(ClientError),
}

impl Ended {
    fn of(code: Option<u16>, reason: String) -> Self {
        let for_good = [
            Close::Unauthenticated,
            Close::ForbiddenOrigin,
            Close::Disconnected,
        ]
        .map(Close::code);
        match code {
            Some(code) if for_good.contains(&code) => Ended::ForGood(ClientError::Connection(
                format!("closed with {code} {reason}"),
            )),
            code => Ended::Lost(code, reason),
        }
    }
}
