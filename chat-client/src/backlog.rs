//! The requests of a client that have no answer yet, through every connection.
//!
//! The sends of a dialog are transmitted one at a time, in the order in which they were made: while
//! one is refused, or repeated after a lost connection, later ones of the dialog wait behind it.
//! Dialogs do not wait for each other.

use crate::{ClientError, To};
use chat_wire::{ClientFrame, Close, Sent, ServerFrame};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Utf8Bytes;

/// See the module.
#[derive(Default)]
pub(crate) struct Backlog {
    /// By number; numbers grow.
    requests: BTreeMap<u64, Request>,
    /// The sends of each dialog in order. The first is the one that is transmitted.
    dialogs: HashMap<String, VecDeque<u64>>,
    next: u64,
    /// Requests that may be transmitted.
    ready: BTreeSet<u64>,
    /// Requests that were refused for now, and when they are ready again.
    later: BTreeSet<(Instant, u64)>,
    /// Requests that were transmitted on this connection.
    in_flight: BTreeSet<u64>,
    /// Requests that were in flight when the server ended a connection because of something that it
    /// had received. They are transmitted alone, until the culprit is known.
    suspects: BTreeSet<u64>,
}

struct Request {
    frame: Utf8Bytes,
    of: Of,
}

/// A request without an answer.
pub(crate) enum Of {
    /// A send.
    Send(Unanswered),
    /// Another request of the caller.
    Caller(oneshot::Sender<Result<ServerFrame, ClientError>>),
    /// A `resume` of these dialogs.
    Resume(Vec<String>),
    /// A page of what was missed in this dialog; `false` once it is known that there is nothing
    /// above what the client has.
    Reading(String, bool),
}

/// A send without an answer.
pub(crate) struct Unanswered {
    pub to: To,
    /// The id of the dialog.
    pub dialog: String,
    pub key: String,
    pub text: String,
    pub answer: oneshot::Sender<Result<Sent, ClientError>>,
}

/// Close codes that say: the connection ended because of something that the client sent.
const FAULTS: [Close; 3] = [Close::ProtocolError, Close::InvalidText, Close::TooLarge];

impl Backlog {
    /// Adds a send, behind those of its dialog.
    pub fn send(&mut self, send: Unanswered) {
        let (to, dialog) = send.to.clone().names();
        let frame = encode(&ClientFrame::Send {
            id: None,
            key: send.key.clone(),
            to,
            dialog,
            text: send.text.clone(),
        });
        let dialog = send.dialog.clone();
        let number = self.add(frame, Of::Send(send));
        let dialog = self.dialogs.entry(dialog).or_default();
        dialog.push_back(number);
        if dialog.len() == 1 {
            self.ready.insert(number);
        }
    }

    /// Adds a request whose id is its number.
    pub fn ask(&mut self, of: Of, frame: impl FnOnce(String) -> ClientFrame) {
        let number = self.next + 1;
        let number = self.add(encode(&frame(number.to_string())), of);
        self.ready.insert(number);
    }

    /// Adds a request that the caller of this transmits; its id is its number.
    pub fn transmitted(&mut self, of: Of, frame: impl FnOnce(String) -> ClientFrame) -> Utf8Bytes {
        let frame = encode(&frame((self.next + 1).to_string()));
        self.add(frame.clone(), of);
        frame
    }

    fn add(&mut self, frame: Utf8Bytes, of: Of) -> u64 {
        self.next += 1;
        self.requests.insert(self.next, Request { frame, of });
        self.next
    }

    /// A new connection: everything without an answer is to be transmitted, but the client's own
    /// requests belong to the connection before.
    pub fn restart(&mut self) {
        self.requests
            .retain(|_, request| matches!(request.of, Of::Send(_) | Of::Caller(_)));
        self.suspects
            .retain(|number| self.requests.contains_key(number));
        self.later.clear();
        self.in_flight.clear();
        let waits = |(number, request): (&u64, &Request)| match &request.of {
            Of::Send(send) => self.is_first(&send.dialog, *number).then_some(*number),
            Of::Caller(_) | Of::Resume(_) | Of::Reading(..) => Some(*number),
        };
        self.ready = self.requests.iter().filter_map(waits).collect();
    }

    /// The connection has ended with this close code. If the server ended it because of a request,
    /// that request fails and is not repeated.
    pub fn disconnected(&mut self, code: Option<u16>, reason: &str) {
        let in_flight = std::mem::take(&mut self.in_flight);
        if !FAULTS.iter().any(|fault| code == Some(fault.code())) {
            return;
        }
        if let (Some(culprit), 1) = (in_flight.first(), in_flight.len()) {
            let message =
                format!("the server closed the connection when it received this: {reason}");
            self.fail(*culprit, ClientError::Connection(message));
        } else {
            self.suspects = in_flight;
        }
    }

    /// Whether a request may be transmitted now.
    pub fn is_ready(&self) -> bool {
        match self.suspects.first() {
            Some(suspect) => self.in_flight.is_empty() && self.ready.contains(suspect),
            None => !self.ready.is_empty(),
        }
    }

    /// When the next request that was refused for now is ready again.
    pub fn wakes(&self) -> Option<Instant> {
        self.later.first().map(|(at, _)| *at)
    }

    /// Requests that were refused for now, and whose time has come, are ready again.
    pub fn wake(&mut self, now: Instant) {
        while self.later.first().is_some_and(|(at, _)| *at <= now) {
            self.ready
                .extend(self.later.pop_first().map(|(_, number)| number));
        }
    }

    /// The next request to be transmitted. One that is longer than `limit` bytes fails.
    pub fn next(&mut self, limit: usize) -> Option<Utf8Bytes> {
        while self.is_ready() {
            let suspect = self.suspects.first().copied();
            let number = match suspect {
                Some(suspect) => self.ready.take(&suspect)?,
                None => self.ready.pop_first()?,
            };
            let Some(request) = self.requests.get(&number) else {
                continue;
            };
            if request.frame.len() <= limit {
                self.in_flight.insert(number);
                return Some(request.frame.clone());
            }
            let message = format!("{} bytes; the server takes {limit}", request.frame.len());
            self.fail(number, ClientError::TooLarge(message));
        }
        None
    }

    /// The send with this key, which is answered.
    pub fn sent(&mut self, dialog: &str, key: &str) -> Option<Unanswered> {
        let number = *self.dialogs.get(dialog)?.front()?;
        let of = self.of(number)?;
        matches!(of, Of::Send(send) if send.key == key)
            .then(|| self.remove(number))
            .and_then(|of| match of? {
                Of::Send(send) => Some(send),
                Of::Caller(_) | Of::Resume(_) | Of::Reading(..) => None,
            })
    }

    /// The request with this id, which is answered.
    pub fn answered(&mut self, id: Option<&str>) -> Option<Of> {
        let number = self.of_id(id)?;
        self.remove(number)
    }

    /// The number of the request with this id. Sends have none: only their keys name them.
    fn of_id(&self, id: Option<&str>) -> Option<u64> {
        let number = id?.parse().ok()?;
        let asked = |of: &&Of| !matches!(of, Of::Send(_));
        self.of(number).filter(asked).map(|_| number)
    }

    /// The number of the request that an error names.
    pub fn named(&self, dialog: Option<&str>, key: Option<&str>, id: Option<&str>) -> Option<u64> {
        // A request with an id has it in its error, whether it has a key or not.
        if let Some(number) = self.of_id(id) {
            return Some(number);
        }
        let key = key?;
        let is_it =
            |number: &u64| matches!(self.of(*number), Some(Of::Send(send)) if send.key == key);
        match dialog {
            Some(dialog) => self.dialogs.get(dialog)?.front().copied().filter(is_it),
            // A server that does not name the dialog: the oldest that is under way.
            None => self.in_flight.iter().copied().find(is_it),
        }
    }

    /// The request is transmitted again at this time.
    pub fn repeat(&mut self, number: u64, at: Instant) {
        self.in_flight.remove(&number);
        if self.requests.contains_key(&number) {
            self.later.insert((at, number));
        }
    }

    /// The request has failed for good.
    pub fn fail(&mut self, number: u64, error: ClientError) {
        // The caller may have been dropped.
        match self.remove(number) {
            Some(Of::Send(send)) => drop(send.answer.send(Err(error))),
            Some(Of::Caller(answer)) => drop(answer.send(Err(error))),
            Some(Of::Resume(_) | Of::Reading(..)) | None => {}
        }
    }

    fn of(&self, number: u64) -> Option<&Of> {
        self.requests.get(&number).map(|request| &request.of)
    }

    fn is_first(&self, dialog: &str, number: u64) -> bool {
        self.dialogs.get(dialog).and_then(VecDeque::front) == Some(&number)
    }

    /// Takes a request out. The next send of its dialog is ready then.
    fn remove(&mut self, number: u64) -> Option<Of> {
        let request = self.requests.remove(&number)?;
        self.in_flight.remove(&number);
        self.ready.remove(&number);
        self.suspects.remove(&number);
        self.later.retain(|(_, later)| *later != number);
        if let Of::Send(send) = &request.of
            && let Some(dialog) = self.dialogs.get_mut(&send.dialog)
        {
            dialog.retain(|other| *other != number);
            match dialog.front() {
                Some(next) if !self.in_flight.contains(next) => {
                    self.ready.insert(*next);
                }
                Some(_) => {}
                None => drop(self.dialogs.remove(&send.dialog)),
            }
        }
        Some(request.of)
    }
}

pub(crate) fn encode(frame: &ClientFrame) -> Utf8Bytes {
    // A frame has only strings for keys, and no value that JSON cannot write.
    serde_json::to_string(frame)
        .expect("a frame is JSON")
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::seq::IteratorRandom;
    use rand::{RngExt, SeedableRng};
    use std::time::Duration;

    const LIMIT: usize = 1000;

    type Answers = Vec<oneshot::Receiver<Result<Sent, ClientError>>>;

    fn send(backlog: &mut Backlog, answers: &mut Answers, to: u64, key: &str, text: &str) {
        let (answer, answered) = oneshot::channel();
        answers.push(answered);
        backlog.send(Unanswered {
            to: To::User(to),
            dialog: to.to_string(),
            key: key.into(),
            text: text.into(),
            answer,
        });
    }

    /// What is transmitted now, as `to/key`.
    fn transmitted(backlog: &mut Backlog, now: Instant) -> Vec<String> {
        backlog.wake(now);
        let next = || backlog.next(LIMIT);
        std::iter::from_fn(next)
            .map(|frame| {
                let ClientFrame::Send { to, key, .. } = serde_json::from_str(&frame).unwrap()
                else {
                    panic!("no send: {frame}");
                };
                format!("{}/{key}", to.unwrap())
            })
            .collect()
    }

    #[test]
    fn a_send_waits_for_the_one_before_it_in_its_dialog() {
        let (mut backlog, mut answers) = (Backlog::default(), Answers::new());
        let now = Instant::now();
        for key in ["a", "b", "c"] {
            send(&mut backlog, &mut answers, 42, key, "x");
        }
        send(&mut backlog, &mut answers, 43, "a", "x");
        assert_eq!(transmitted(&mut backlog, now), ["42/a", "43/a"]);
        let refused = backlog.named(Some("42"), Some("a"), None).unwrap();
        let again = now + Duration::from_secs(1);
        backlog.repeat(refused, again);
        assert_eq!(backlog.wakes(), Some(again));
        assert!(transmitted(&mut backlog, now).is_empty());
        // From its time on it is ready, also if nothing may be transmitted yet: a client that
        // waited for a time that is over would not sleep.
        backlog.wake(again);
        assert!(backlog.is_ready() && backlog.wakes().is_none());
        assert_eq!(transmitted(&mut backlog, again), ["42/a"]);
        assert!(backlog.sent("42", "b").is_none(), "not transmitted");
        assert!(backlog.sent("42", "a").is_some());
        assert_eq!(transmitted(&mut backlog, again), ["42/b"]);
        backlog.disconnected(None, "");
        backlog.restart();
        assert_eq!(transmitted(&mut backlog, again), ["42/b", "43/a"]);
        let refused = backlog.named(Some("42"), Some("b"), None).unwrap();
        backlog.fail(refused, ClientError::Closed);
        assert!(matches!(
            answers[1].try_recv(),
            Ok(Err(ClientError::Closed))
        ));
        assert_eq!(transmitted(&mut backlog, again), ["42/c"]);
    }

    #[test]
    fn what_is_too_long_fails_alone() {
        let (mut backlog, mut answers) = (Backlog::default(), Answers::new());
        send(&mut backlog, &mut answers, 42, "a", &"x".repeat(LIMIT));
        send(&mut backlog, &mut answers, 42, "b", "x");
        assert_eq!(transmitted(&mut backlog, Instant::now()), ["42/b"]);
        assert!(matches!(
            answers[0].try_recv(),
            Ok(Err(ClientError::TooLarge(_)))
        ));
    }

    #[test]
    fn an_answer_with_the_number_of_a_send_does_not_take_it_away() {
        let (mut backlog, mut answers) = (Backlog::default(), Answers::new());
        send(&mut backlog, &mut answers, 42, "a", "x");
        assert!(backlog.answered(Some("1")).is_none());
        assert_eq!(backlog.named(None, None, Some("1")), None);
        assert!(backlog.sent("42", "a").is_some());
    }

    #[test]
    fn what_ends_a_connection_is_found_and_not_repeated() {
        let (mut backlog, mut answers) = (Backlog::default(), Answers::new());
        let now = Instant::now();
        // A request of the client's own, which does not outlive the connection, is among them.
        backlog.ask(Of::Reading("7_42".into(), true), |_| ClientFrame::Send {
            id: None,
            key: "reading".into(),
            to: Some(1),
            dialog: None,
            text: "x".into(),
        });
        for to in [42, 43, 44] {
            send(&mut backlog, &mut answers, to, "a", "x");
        }
        assert_eq!(transmitted(&mut backlog, now).len(), 4);
        backlog.disconnected(Some(1009), "frame_too_large");
        backlog.restart();
        assert_eq!(transmitted(&mut backlog, now), ["42/a"], "alone");
        assert!(backlog.sent("42", "a").is_some());
        assert_eq!(transmitted(&mut backlog, now), ["43/a"]);
        backlog.disconnected(Some(1009), "frame_too_large");
        assert!(answers[1].try_recv().unwrap().is_err());
        backlog.restart();
        assert_eq!(transmitted(&mut backlog, now), ["44/a"]);
    }

    /// A server that stores, refuses, loses answers and loses connections at random. Each dialog
    /// is stored in the order of its sends, whatever happens.
    #[test]
    fn the_order_of_a_dialog_survives_refusals_and_lost_connections() {
        for seed in 0..2000 {
            let mut rng = StdRng::seed_from_u64(seed);
            let (mut backlog, mut answers) = (Backlog::default(), Answers::new());
            let mut now = Instant::now();
            let mut stored: HashMap<String, Vec<u64>> = HashMap::new();
            let (mut made, mut received) = (0, Vec::<String>::new());
            while made < 30 || !backlog.requests.is_empty() {
                match rng.random_range(0..10) {
                    0..3 if made < 30 => {
                        made += 1;
                        let to = rng.random_range(42..45);
                        send(&mut backlog, &mut answers, to, &made.to_string(), "x");
                    }
                    3 => {
                        backlog.disconnected(None, "");
                        backlog.restart();
                    }
                    4 => now += Duration::from_millis(rng.random_range(0..50)),
                    _ => {}
                }
                received.extend(transmitted(&mut backlog, now));
                // The server may still be working at what another connection brought.
                let Some(n) = (0..received.len()).choose(&mut rng) else {
                    continue;
                };
                let name = received.remove(n);
                let (dialog, key) = name.split_once('/').unwrap();
                let number: u64 = key.parse().unwrap();
                let log = stored.entry(dialog.to_owned()).or_default();
                if rng.random_ratio(1, 3) {
                    if let Some(number) = backlog.named(Some(dialog), Some(key), None) {
                        backlog.repeat(number, now + Duration::from_millis(20));
                    }
                } else {
                    if !log.contains(&number) {
                        log.push(number);
                    }
                    if rng.random() {
                        backlog.sent(dialog, key);
                    }
                }
            }
            for log in stored.values() {
                assert!(log.is_sorted(), "seed {seed}: {log:?}");
            }
            assert_eq!(
                stored.values().map(Vec::len).sum::<usize>(),
                30,
                "seed {seed}"
            );
        }
    }
}
