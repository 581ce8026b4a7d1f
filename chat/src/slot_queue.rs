//! The sends of a slot, in the order in which they came, wherever the slot is and goes.
//!
//! A slot is idle, ready for a writer to take sends from, in flight with a writer, or parked because its owner is not known.
//! It is at one of them at a time: so its sends are stored in order, by one transaction after the other.

use crate::ring::Slot;
use crate::store::{self, NewMessage};
use prometheus_client::metrics::gauge::Gauge;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::time::Instant;

/// What became of a send.
#[derive(Clone, Copy, Debug)]
pub enum Answer {
    /// It is stored; `repeat` if it was before.
    Stored {
        /// Where.
        place: store::Place,
        /// Whether an earlier send with this key had stored it.
        repeat: bool,
    },
    /// The key stands for another text.
    KeyReused,
    /// The shard does not answer.
    ShardDown,
    /// Not through in time, or refused by the database; the reason is in the log.
    Unavailable,
}

/// A send on its way.
pub struct Job {
    /// What to store.
    pub message: NewMessage,
    /// Who asked.
    pub reply: Reply,
}

/// Who asked for a send, and until when. Dropped without an answer, it says that the send is not through.
pub struct Reply {
    /// The session it came from, which gets `sent` and not `message`; `None` for REST.
    pub origin: Option<u64>,
    /// After this, the answer is that it is not through.
    pub deadline: Instant,
    /// Since when it has been waiting for an owner of its slot to be known.
    pub parked: Option<Instant>,
    /// Its place among the sends that wait for a shard.
    pub place: Place,
    answer: Option<Box<dyn FnOnce(Answer) + Send>>,
}

impl Reply {
    /// Calls `answer` once; it must not wait.
    #[must_use]
    pub fn new(
        origin: Option<u64>,
        deadline: Instant,
        place: Place,
        answer: Box<dyn FnOnce(Answer) + Send>,
    ) -> Self {
        Self {
            origin,
            deadline,
            parked: None,
            place,
            answer: Some(answer),
        }
    }

    /// Answers.
    pub fn answer(mut self, with: Answer) {
        if let Some(answer) = self.answer.take() {
            answer(with);
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(answer) = self.answer.take() {
            answer(Answer::Unavailable);
        }
    }
}

/// One of a number of places; free again when it is dropped.
pub struct Place(Gauge);

impl Place {
    /// A place, if fewer than `limit` are taken.
    #[must_use]
    pub fn take(taken: &Gauge, limit: usize) -> Option<Self> {
        if taken.inc() < i64::try_from(limit).unwrap_or(i64::MAX) {
            return Some(Self(taken.clone()));
        }
        taken.dec();
        None
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// The queues of all slots; a clone is one more reference.
#[derive(Clone)]
pub struct SlotQueues {
    queues: Arc<Vec<Mutex<SlotQueue>>>,
}

/// The queue of one slot.
#[derive(Default)]
pub struct SlotQueue {
    jobs: VecDeque<Job>,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    /// Nothing is queued.
    #[default]
    Idle,
    /// A writer knows that something is queued.
    Ready,
    /// A writer has taken some.
    InFlight,
    /// What is queued waits for an owner.
    Parked,
}

/// What a slot needs after something was done with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Nothing.
    Nothing,
    /// The writer of its owner is to be told that it is ready.
    TellWriter,
    /// Its owner is to be found.
    FindOwner,
}

impl Default for SlotQueues {
    fn default() -> Self {
        Self {
            queues: Arc::new(Slot::all().map(|_| Mutex::default()).collect()),
        }
    }
}

impl SlotQueues {
    /// The queue of a slot.
    pub fn of(&self, slot: Slot) -> MutexGuard<'_, SlotQueue> {
        self.queues[slot.index()]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl SlotQueue {
    /// Queues a send.
    #[must_use]
    pub fn push(&mut self, job: Job) -> Then {
        self.jobs.push_back(job);
        if self.stage == Stage::Idle {
            self.stage = Stage::Ready;
            return Then::TellWriter;
        }
        Then::Nothing
    }

    /// Takes at most `limit` sends of a slot that is ready: it is in flight from now on, until [`SlotQueue::landed`].
    pub fn take_off(&mut self, limit: usize, into: &mut Vec<Job>) {
        self.stage = Stage::InFlight;
        let count = limit.min(self.jobs.len());
        into.extend(self.jobs.drain(..count));
    }

    /// What was in flight has ended; `refused` are those, in order, whose shard does not own the slot.
    #[must_use]
    pub fn landed(&mut self, refused: Vec<Job>, now: Instant) -> Then {
        let parked = !refused.is_empty();
        for mut job in refused.into_iter().rev() {
            job.reply.parked.get_or_insert(now);
            self.jobs.push_front(job);
        }
        let (stage, then) = match (parked, self.jobs.is_empty()) {
            (true, _) => (Stage::Parked, Then::FindOwner),
            (false, false) => (Stage::Ready, Then::TellWriter),
            (false, true) => (Stage::Idle, Then::Nothing),
        };
        self.stage = stage;
        then
    }

    /// The owner of a parked slot is known.
    #[must_use]
    pub fn unpark(&mut self) -> Then {
        self.stage = Stage::Ready;
        Then::TellWriter
    }

    /// Takes out what `is_late` of what is parked; `true` if nothing is left, and the slot is idle.
    pub fn give_up(&mut self, is_late: impl Fn(&Reply) -> bool, into: &mut Vec<Job>) -> bool {
        let (late, kept) = std::mem::take(&mut self.jobs)
            .into_iter()
            .partition(|job| is_late(&job.reply));
        self.jobs = kept;
        into.extend::<VecDeque<Job>>(late);
        if self.jobs.is_empty() {
            self.stage = Stage::Idle;
        }
        self.jobs.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialog::{Key, Text, UserId};
    use std::time::Duration;

    fn job(key: &str, taken: &Gauge) -> Job {
        let dialog: crate::dialog::DialogId = "7_42".parse().unwrap();
        let (key, text) = (
            Key::new(key.into()).unwrap(),
            Text::new("x".into(), 1).unwrap(),
        );
        let place = Place::take(taken, 10).unwrap();
        Job {
            message: NewMessage::new(dialog, UserId::new(7).unwrap(), key, text),
            reply: Reply::new(None, Instant::now(), place, Box::new(drop)),
        }
    }

    fn keys(jobs: &[Job]) -> Vec<&str> {
        jobs.iter().map(|job| job.message.key.as_str()).collect()
    }

    #[test]
    fn sends_keep_their_order_through_refusal_and_parking() {
        let taken = Gauge::default();
        let mut queue = SlotQueue::default();
        assert_eq!(queue.push(job("a", &taken)), Then::TellWriter);
        assert_eq!(queue.push(job("b", &taken)), Then::Nothing);
        let mut batch = Vec::new();
        queue.take_off(1, &mut batch);
        assert_eq!(
            queue.push(job("c", &taken)),
            Then::Nothing,
            "it is in flight"
        );
        assert_eq!(queue.landed(batch, Instant::now()), Then::FindOwner);
        assert_eq!(queue.push(job("d", &taken)), Then::Nothing, "it is parked");
        assert_eq!(queue.unpark(), Then::TellWriter);
        let mut batch = Vec::new();
        queue.take_off(10, &mut batch);
        assert_eq!(keys(&batch), ["a", "b", "c", "d"]);
        assert_eq!(queue.landed(Vec::new(), Instant::now()), Then::Nothing);
        assert_eq!(taken.get(), 4);
        drop(batch);
        assert_eq!(taken.get(), 0);
        assert_eq!(queue.push(job("e", &taken)), Then::TellWriter);
    }

    #[test]
    fn what_comes_while_a_slot_is_in_flight_makes_it_ready_again() {
        let taken = Gauge::default();
        let mut queue = SlotQueue::default();
        let _ = queue.push(job("a", &taken));
        let mut batch = Vec::new();
        queue.take_off(10, &mut batch);
        let _ = queue.push(job("b", &taken));
        assert_eq!(queue.landed(Vec::new(), Instant::now()), Then::TellWriter);
    }

    #[test]
    fn what_is_parked_for_too_long_is_given_up() {
        let taken = Gauge::default();
        let mut queue = SlotQueue::default();
        let _ = queue.push(job("a", &taken));
        let mut batch = Vec::new();
        queue.take_off(10, &mut batch);
        let then = Instant::now();
        let _ = queue.landed(batch, then);
        let _ = queue.push(job("b", &taken));
        let late = |reply: &Reply| {
            reply
                .parked
                .is_some_and(|since| since.elapsed() >= Duration::ZERO)
        };
        let mut given_up = Vec::new();
        assert!(!queue.give_up(late, &mut given_up));
        assert_eq!(keys(&given_up), ["a"]);
        assert!(queue.give_up(|_| true, &mut given_up));
        assert_eq!(queue.push(job("c", &taken)), Then::TellWriter, "it is idle");
    }

    #[test]
    fn a_reply_that_is_dropped_says_that_it_is_not_through() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let place = Place::take(&Gauge::default(), 1).unwrap();
        let answer = Box::new(move |answer| sender.send(answer).unwrap());
        drop(Reply::new(None, Instant::now(), place, answer));
        assert!(matches!(receiver.recv(), Ok(Answer::Unavailable)));
    }

    #[test]
    fn places_are_limited() {
        let taken = Gauge::default();
        let first = Place::take(&taken, 1);
        assert!(first.is_some() && Place::take(&taken, 1).is_none());
        drop(first);
        assert!(Place::take(&taken, 1).is_some());
    }
}
