//! A session that outlives its connections.

use crate::connection::{Connection, Incoming};
use crate::{Access, ClientError};
use chat_wire::{
    ClientFrame, Close, ErrorBody, ErrorCode, HistoryPage, InboxPage, Message, ReadMark, Sent,
    ServerFrame,
};
use rand::RngExt;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_tungstenite::tungstenite::Utf8Bytes;

/// What happens without being asked for.
#[derive(Clone, Debug)]
pub enum Event {
    /// A connection is up, and everything that was not answered is sent again.
    Connected,
    /// It is down; it will be tried again, unless `Closed` follows.
    Disconnected {
        /// The close code of the server, if it gave one.
        code: Option<u16>,
        /// What happened.
        reason: String,
    },
    /// A message to us, or one of ours from another session. Not in order across dialogs, and not without gaps across
    /// reconnections; who needs both compares `seq` and reads the history in between.
    Message(Message),
    /// Somebody has read.
    Read(ReadMark),
    /// The server will not have us: no further attempt is made.
    Closed(ClientError),
}

/// The events of a client. While nobody takes them, nothing else is read from the connection either; dropped, they are
/// no longer collected.
pub type Events = mpsc::Receiver<Event>;

/// A handle to a session; a clone is one more reference. The session ends when the last is dropped.
#[derive(Clone)]
pub struct Client {
    commands: mpsc::Sender<Command>,
}

enum Command {
    Send {
        key: String,
        to: u64,
        text: String,
        answer: oneshot::Sender<Result<Sent, ClientError>>,
    },
    Ask {
        frame: Box<dyn FnOnce(String) -> ClientFrame + Send>,
        answer: oneshot::Sender<Result<ServerFrame, ClientError>>,
    },
    Mark {
        with: u64,
        seq: u64,
    },
    Repeat {
        order: u64,
    },
}

/// Events and commands that may wait.
const QUEUE: usize = 1024;

impl Client {
    /// Starts a session of `user`, which connects by itself, and again whenever it has to.
    #[must_use]
    pub fn start(access: Access, user: u64) -> (Self, Events) {
        let (commands, commands_in) = mpsc::channel(QUEUE);
        let (events_out, events) = mpsc::channel(QUEUE);
        let repeats = commands.downgrade();
        let actor = Actor {
            access,
            user,
            events: events_out,
            repeats,
            sends: BTreeMap::new(),
            orders: HashMap::new(),
            asked: BTreeMap::new(),
            next: 0,
            queue: BTreeSet::new(),
            pace: Pace::new(1),
            marks: Vec::new(),
            recent: HashMap::new(),
        };
        tokio::spawn(actor.run(commands_in));
        (Self { commands }, events)
    }

    /// Sends a text under a key that is unique to this author and dialog. Repeats it with the same key, across
    /// reconnections, for as long as the server says that it may succeed later.
    ///
    /// # Errors
    /// [`ClientError::Refused`] for good, or [`ClientError::Closed`].
    pub async fn send(&self, to: u64, key: String, text: String) -> Result<Sent, ClientError> {
        let (answer, answered) = oneshot::channel();
        self.command(Command::Send {
            key,
            to,
            text,
            answer,
        })
        .await?;
        answered.await.map_err(|_| ClientError::Closed)?
    }

    /// A page of the dialog with `with`.
    ///
    /// # Errors
    /// As [`Client::send`].
    pub async fn history(
        &self,
        with: u64,
        before: Option<u64>,
        after: Option<u64>,
        limit: Option<u32>,
    ) -> Result<HistoryPage, ClientError> {
        let answer = self
            .ask(move |id| ClientFrame::History {
                id: Some(id),
                with,
                before,
                after,
                limit,
            })
            .await?;
        let ServerFrame::History { page, .. } = answer else {
            return Err(another());
        };
        Ok(page)
    }

    /// A page of the inbox.
    ///
    /// # Errors
    /// As [`Client::send`].
    pub async fn inbox(
        &self,
        limit: Option<u32>,
        cursor: Option<String>,
    ) -> Result<InboxPage, ClientError> {
        let answer = self
            .ask(move |id| ClientFrame::Inbox {
                id: Some(id),
                limit,
                cursor,
            })
            .await?;
        let ServerFrame::Inbox { page, .. } = answer else {
            return Err(another());
        };
        Ok(page)
    }

    /// Marks the dialog with `with` as read up to `seq`, if there is a connection.
    ///
    /// # Errors
    /// [`ClientError::Closed`].
    pub async fn mark_read(&self, with: u64, seq: u64) -> Result<(), ClientError> {
        // The server answers a mark with the mark, which comes as an event; nobody waits for it here.
        self.command(Command::Mark { with, seq }).await
    }

    async fn ask(
        &self,
        frame: impl FnOnce(String) -> ClientFrame + Send + 'static,
    ) -> Result<ServerFrame, ClientError> {
        let (answer, answered) = oneshot::channel();
        self.command(Command::Ask {
            frame: Box::new(frame),
            answer,
        })
        .await?;
        answered.await.map_err(|_| ClientError::Closed)?
    }

    async fn command(&self, command: Command) -> Result<(), ClientError> {
        self.commands
            .send(command)
            .await
            .map_err(|_| ClientError::Closed)
    }
}

/// An answer with the id of a request, but of another kind.
fn another() -> ClientError {
    ClientError::Connection("the server answered something else".into())
}

struct Actor {
    access: Access,
    user: u64,
    events: mpsc::Sender<Event>,
    repeats: mpsc::WeakSender<Command>,
    /// Sends without an answer, in the order they were made.
    sends: BTreeMap<u64, Unanswered<Sent>>,
    /// By key, where in `sends`.
    orders: HashMap<(u64, String), u64>,
    /// Requests without an answer, by the number that is their id.
    asked: BTreeMap<u64, Unanswered<ServerFrame>>,
    next: u64,
    /// Numbers of what is to be sent, in order, as fast as the server takes it.
    queue: BTreeSet<u64>,
    pace: Pace,
    /// Read marks to be sent; while there is no connection they are lost.
    marks: Vec<Utf8Bytes>,
    /// Per dialog, the last few seqs: a message may be published twice.
    recent: HashMap<String, VecDeque<u64>>,
}

struct Unanswered<T> {
    to: u64,
    key: String,
    frame: Utf8Bytes,
    answer: oneshot::Sender<Result<T, ClientError>>,
}

/// How many seqs of a dialog are remembered.
const RECENT: usize = 64;

/// The first pause before a new attempt, and the longest.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// How long an attempt may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Commands that are sent together.
const TOGETHER: usize = 64;

impl Actor {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut pause = BACKOFF.0;
        loop {
            let (lasted, ended) =
                match timeout(CONNECT_LIMIT, Connection::open(&self.access, self.user)).await {
                    Ok(Ok(connection)) => {
                        let begun = Instant::now();
                        let ended = self.serve(connection, &mut commands).await;
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
                Ended::ForGood(e) => {
                    self.emit(Event::Closed(e)).await;
                    return;
                }
                Ended::Lost(code, reason) => (code, reason),
            };
            self.emit(Event::Disconnected { code, reason }).await;
            // A connection that held for a while starts the pauses anew. Jitter keeps a crowd from coming back in step.
            pause = if lasted > BACKOFF.1 {
                BACKOFF.0
            } else {
                (pause * 2).min(BACKOFF.1)
            };
            let jittered = pause.mul_f64(rand::rng().random_range(0.5..1.0));
            sleep(jittered).await;
        }
    }

    async fn serve(
        &mut self,
        mut connection: Connection,
        commands: &mut mpsc::Receiver<Command>,
    ) -> Ended {
        match timeout(CONNECT_LIMIT, connection.next()).await {
            Ok(Incoming::Frame(frame)) => {
                if let ServerFrame::Error(body) = *frame {
                    return if body.retryable {
                        Ended::Lost(None, body.message)
                    } else {
                        Ended::ForGood(ClientError::Refused(Box::new(body)))
                    };
                }
                let ServerFrame::Welcome { limits, .. } = *frame else {
                    return Ended::Lost(None, "the server does not say welcome".into());
                };
                self.pace = Pace::new(limits.sends_per_second);
            }
            Ok(Incoming::Closed(code, reason)) => return Ended::of(code, reason),
            Err(_) => return Ended::Lost(None, "no welcome in time".into()),
        }
        self.emit(Event::Connected).await;
        self.queue = self
            .sends
            .keys()
            .chain(self.asked.keys())
            .copied()
            .collect();
        let mut batch = Vec::with_capacity(TOGETHER);
        loop {
            let due = self.due(Instant::now());
            if !due.is_empty()
                && let Err(e) = connection.send(due).await
            {
                return Ended::Lost(None, e.to_string());
            }
            let next = self.pace.next;
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
                () = sleep_until(next), if !self.queue.is_empty() => {}
            }
        }
    }

    /// What may be sent now, in order; what was answered meanwhile is passed over.
    fn due(&mut self, now: Instant) -> Vec<Utf8Bytes> {
        let mut due = std::mem::take(&mut self.marks);
        while due.len() < TOGETHER && !self.queue.is_empty() && self.pace.allows(now) {
            let Some(number) = self.queue.pop_first() else {
                break;
            };
            let sent = self.sends.get(&number).map(|send| &send.frame);
            if let Some(frame) = sent.or_else(|| self.asked.get(&number).map(|ask| &ask.frame)) {
                due.push(frame.clone());
                self.pace.take(now);
            }
        }
        due
    }

    /// Remembers what a command waits for, and puts it into the queue.
    fn accept(&mut self, command: Command) {
        self.next += 1;
        let number = self.next;
        match command {
            Command::Send {
                key,
                to,
                text,
                answer,
            } => {
                let frame = encode(&ClientFrame::Send {
                    key: key.clone(),
                    to,
                    text,
                });
                self.orders.insert((to, key.clone()), number);
                self.sends.insert(
                    number,
                    Unanswered {
                        to,
                        key,
                        frame,
                        answer,
                    },
                );
                self.queue.insert(number);
            }
            Command::Ask { frame, answer } => {
                let frame = encode(&frame(number.to_string()));
                self.asked.insert(
                    number,
                    Unanswered {
                        to: 0,
                        key: String::new(),
                        frame,
                        answer,
                    },
                );
                self.queue.insert(number);
            }
            Command::Mark { with, seq } => {
                self.marks.push(encode(&ClientFrame::Read { with, seq }))
            }
            Command::Repeat { order } => drop(self.queue.insert(order)),
        }
    }

    async fn take(&mut self, frame: ServerFrame) {
        match frame {
            ServerFrame::Sent {
                key,
                dialog,
                seq,
                at,
            } => {
                let to = self.counterpart(&dialog);
                if let Some(send) = self
                    .orders
                    .remove(&(to, key))
                    .and_then(|order| self.sends.remove(&order))
                {
                    // Whoever asked may have gone.
                    let _ = send.answer.send(Ok(Sent { dialog, seq, at }));
                }
            }
            ServerFrame::Message(message) => {
                let recent = self.recent.entry(message.dialog.clone()).or_default();
                if recent.contains(&message.seq) {
                    return;
                }
                if recent.len() == RECENT {
                    recent.pop_front();
                }
                recent.push_back(message.seq);
                self.emit(Event::Message(message)).await;
            }
            ServerFrame::Read(mark) => self.emit(Event::Read(mark)).await,
            ServerFrame::Error(body) => self.refused(body),
            ServerFrame::History { ref id, .. } | ServerFrame::Inbox { ref id, .. } => {
                let number = id.as_deref().and_then(|id| id.parse().ok());
                if let Some(ask) = number.and_then(|number: u64| self.asked.remove(&number)) {
                    let _ = ask.answer.send(Ok(frame));
                }
            }
            ServerFrame::Welcome { .. }
            | ServerFrame::Authenticated { .. }
            | ServerFrame::Pong { .. } => {}
        }
    }

    /// Repeats what may succeed later; hands everything else to whoever asked.
    fn refused(&mut self, body: ErrorBody) {
        let order = match (&body.key, &body.id) {
            // The error does not say which dialog: among several sends with one key it is the oldest that is answered.
            (Some(key), _) => self
                .sends
                .iter()
                .find(|(_, send)| send.key == *key)
                .map(|(order, _)| *order),
            (None, Some(id)) => id.parse().ok(),
            (None, None) => None,
        };
        let Some(order) = order else { return };
        if body.code == ErrorCode::RateLimited {
            // Not this one alone is too early, but whatever comes from us: the queue waits, and keeps its order.
            let after = Duration::from_millis(body.retry_after_ms.unwrap_or(1000));
            self.pace.next = self.pace.next.max(Instant::now() + after);
            self.queue.insert(order);
            return;
        }
        if body.retryable {
            let Some(commands) = self.repeats.upgrade() else {
                return;
            };
            let after = Duration::from_millis(body.retry_after_ms.unwrap_or(200))
                .mul_f64(rand::rng().random_range(1.0..1.5));
            tokio::spawn(async move {
                sleep(after).await;
                // A full queue would block us here; waiting is what this task is for.
                let _ = commands.send(Command::Repeat { order }).await;
            });
            return;
        }
        if let Some(send) = self.sends.remove(&order) {
            self.orders.remove(&(send.to, send.key));
            let _ = send.answer.send(Err(ClientError::Refused(Box::new(body))));
        } else if let Some(ask) = self.asked.remove(&order) {
            let _ = ask.answer.send(Err(ClientError::Refused(Box::new(body))));
        }
    }

    /// The other user of a dialog of ours.
    fn counterpart(&self, dialog: &str) -> u64 {
        let mut users = dialog
            .split('_')
            .filter_map(|user| user.parse::<u64>().ok());
        let (low, high) = (users.next().unwrap_or(0), users.next().unwrap_or(0));
        if low == self.user { high } else { low }
    }

    async fn emit(&self, event: Event) {
        // Nobody may want them.
        let _ = self.events.send(event).await;
    }
}

/// When the next frame may be sent: as many a second as the server takes, and up to a second's worth at once.
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
        let for_good = [Close::Unauthenticated, Close::ForbiddenOrigin].map(Close::code);
        match code {
            Some(code) if for_good.contains(&code) => Ended::ForGood(ClientError::Connection(
                format!("closed with {code} {reason}"),
            )),
            code => Ended::Lost(code, reason),
        }
    }
}

fn encode(frame: &ClientFrame) -> Utf8Bytes {
    // A frame has only strings for keys, and no value that JSON cannot write.
    serde_json::to_string(frame)
        .expect("a frame is JSON")
        .into()
}
