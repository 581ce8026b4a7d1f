//! The queue of a slot: its sends in the order of their arrival, and its read marks. It stays with
//! the slot when the slot moves.
//!
//! A slot is idle, ready for a writer to take from, in flight with a writer, or buffered because
//! its owner is not known. It is in one of these states at a time. So its sends are stored in
//! order, by one transaction after the other, and a read mark is never published after a higher
//! one.

use crate::domain::dialog::{DialogId, UserId};
use crate::domain::room::Refusal;
use crate::domain::slot::Slot;
use crate::store::{self, MarkOutcome, NewMark, NewMessage};
use prometheus_client::metrics::gauge::Gauge;
use std::collections::VecDeque;
use std::collections::btree_map::{BTreeMap, Entry};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::time::Instant;

/// The outcome of a send that a shard has processed.
#[derive(Clone, Debug)]
pub enum Settled {
    /// It is stored; `repeat` if an earlier send with the same key had stored it.
    Stored {
        /// Its place.
        place: store::Receipt,
        /// Whether an earlier send with this key had stored it.
        repeat: bool,
    },
    /// The key belongs to another text.
    KeyReused,
    /// It changes nothing, and is not stored.
    Unchanged,
    /// The room does not take it.
    Refused(Refusal),
}

/// The reason why a request was not processed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsettled {
    /// The shard does not answer.
    ShardDown,
    /// It took too long or the database refused it; the reason is in the log.
    Unavailable,
}

/// The outcome of a request to a shard.
pub type Answer<T> = Result<T, Unsettled>;

/// A session that waits for the answer to a send.
#[derive(Clone, Debug)]
pub struct Requester {
    /// Its number on this instance.
    pub session: u64,
    /// The id of its request, if it has one.
    pub id: Option<String>,
}

/// A queued send.
pub struct Job {
    /// The message.
    pub message: NewMessage,
    /// The session that sent it, which gets `sent` instead of `message`; `None` for REST.
    pub origin: Option<Requester>,
    /// The receiver of the answer.
    pub reply: Reply<Settled>,
}

/// A queued read mark: the highest that was requested, and the receivers of the answers.
pub struct MarkJob {
    /// The mark.
    pub mark: NewMark,
    /// One for each request, in order.
    pub replies: Vec<Reply<MarkOutcome>>,
}

impl MarkJob {
    /// Answers all requests.
    pub fn answer(self, with: Answer<MarkOutcome>) {
        for reply in self.replies {
            reply.answer(with);
        }
    }
}

/// The receiver of an answer, with a deadline. If it is dropped without an answer, it answers with
/// a timeout.
pub struct Reply<T> {
    /// After this the answer is a timeout.
    pub deadline: Instant,
    /// The time since which the owner of its slot has been unknown.
    pub buffered: Option<Instant>,
    /// Its permit among the sends that wait for a shard.
    pub place: QueuePermit,
    answer: Option<Box<dyn FnOnce(Answer<T>) + Send>>,
}

impl<T> Reply<T> {
    /// Calls `answer` once; it must not block.
    #[must_use]
    pub fn new(
        deadline: Instant,
        place: QueuePermit,
        answer: Box<dyn FnOnce(Answer<T>) + Send>,
    ) -> Self {
        Self {
            deadline,
            buffered: None,
            place,
            answer: Some(answer),
        }
    }

    fn is_late(&self, buffered_before: Instant, now: Instant) -> bool {
        self.buffered.is_some_and(|since| since <= buffered_before) || self.deadline <= now
    }

    /// Answers.
    pub fn answer(mut self, with: Answer<T>) {
        if let Some(answer) = self.answer.take() {
            answer(with);
        }
    }
}

impl<T> Drop for Reply<T> {
    fn drop(&mut self) {
        if let Some(answer) = self.answer.take() {
            answer(Err(Unsettled::Unavailable));
        }
    }
}

/// One of a number of permits; it is free again when this is dropped.
pub struct QueuePermit(Gauge);

impl QueuePermit {
    /// A permit, if fewer than `limit` are taken.
    #[must_use]
    pub fn take(taken: &Gauge, limit: usize) -> Option<Self> {
        if taken.inc() < i64::try_from(limit).unwrap_or(i64::MAX) {
            return Some(Self(taken.clone()));
        }
        taken.dec();
        None
    }
}

impl Drop for QueuePermit {
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
    marks: BTreeMap<(DialogId, UserId), MarkJob>,
    stage: Stage,
}

/// The size of a transaction.
#[derive(Clone, Copy, Debug)]
pub struct Most {
    /// The number of sends.
    pub jobs: usize,
    /// The bytes of sends, by [`store::size`]; a single send may be larger.
    pub bytes: usize,
    /// The number of read marks.
    pub marks: usize,
}

impl Most {
    /// Whether a transaction that has `taken` has room for one more send of this size.
    fn fits(&self, taken: &Taken, size: usize) -> bool {
        taken.jobs.is_empty() || (taken.jobs.len() < self.jobs && taken.bytes + size <= self.bytes)
    }
}

/// Requests that were taken out of queues.
#[derive(Default)]
pub struct Taken {
    /// Sends, in order within each slot.
    pub jobs: Vec<Job>,
    /// Bytes of the sends that were taken for a transaction.
    bytes: usize,
    /// Read marks.
    pub marks: Vec<MarkJob>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    /// The queue is empty.
    #[default]
    Idle,
    /// A writer has been notified of read marks; there are no sends.
    Gathering,
    /// A writer has been notified of sends.
    Ready,
    /// A writer has taken requests.
    InFlight,
    /// The requests wait until the owner is known.
    Parked,
}

/// The next step after a change of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Nothing.
    Nothing,
    /// Notify the writer of the owner.
    TellWriter,
    /// Notify the writer of the owner of read marks, which may wait for its next batch.
    Gather,
    /// Find the owner.
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
        match self.stage {
            Stage::Idle | Stage::Gathering => {
                self.stage = Stage::Ready;
                Then::TellWriter
            }
            Stage::Ready | Stage::InFlight | Stage::Parked => Then::Nothing,
        }
    }

    /// Queues a read mark. Of several marks of a dialog and user the highest counts.
    #[must_use]
    pub fn push_mark(&mut self, mark: MarkJob) -> Then {
        self.gather(mark);
        if self.stage == Stage::Idle {
            self.stage = Stage::Gathering;
            return Then::Gather;
        }
        Then::Nothing
    }

    fn gather(&mut self, job: MarkJob) {
        match self.marks.entry((job.mark.dialog, job.mark.user)) {
            Entry::Vacant(none) => drop(none.insert(job)),
            Entry::Occupied(mut there) => {
                let there = there.get_mut();
                there.mark.seq = there.mark.seq.max(job.mark.seq);
                there.replies.extend(job.replies);
            }
        }
    }

    /// Takes sends and read marks of a slot that is ready, until there are `most` of each in
    /// `into`. The slot is in flight from now on, until [`SlotQueue::landed`]. `false` if it has
    /// more sends than `into` has room for.
    pub fn take_off(&mut self, most: Most, into: &mut Taken) -> bool {
        self.stage = Stage::InFlight;
        while let Some(job) = self.jobs.front()
            && let size = store::size(job.message.body.text())
            && most.fits(into, size)
        {
            into.bytes += size;
            into.jobs.extend(self.jobs.pop_front());
        }
        self.take_marks(most.marks, into);
        self.jobs.is_empty()
    }

    fn take_marks(&mut self, most: usize, into: &mut Taken) {
        while into.marks.len() < most
            && let Some((_, job)) = self.marks.pop_first()
        {
            into.marks.push(job);
        }
    }

    /// Takes the read marks of a slot without sends, as [`SlotQueue::take_off`]; `false` if it has
    /// sends meanwhile.
    #[must_use]
    pub fn take_marks_off(&mut self, most: usize, into: &mut Taken) -> bool {
        let gathering = self.stage == Stage::Gathering;
        if gathering {
            self.take_marks(most, into);
            self.stage = Stage::InFlight;
        }
        gathering
    }

    /// The requests in flight are processed; `refused` are, in order, those whose shard does not
    /// own the slot.
    #[must_use]
    pub fn landed(&mut self, refused: Taken, now: Instant) -> Then {
        let buffered = !refused.jobs.is_empty() || !refused.marks.is_empty();
        for mut job in refused.jobs.into_iter().rev() {
            job.reply.buffered.get_or_insert(now);
            self.jobs.push_front(job);
        }
        for mut job in refused.marks {
            for reply in &mut job.replies {
                reply.buffered.get_or_insert(now);
            }
            self.gather(job);
        }
        let (stage, then) = match (buffered, self.jobs.is_empty(), self.marks.is_empty()) {
            (true, ..) => (Stage::Parked, Then::FindOwner),
            (false, false, _) => (Stage::Ready, Then::TellWriter),
            (false, true, false) => (Stage::Gathering, Then::Gather),
            (false, true, true) => (Stage::Idle, Then::Nothing),
        };
        self.stage = stage;
        then
    }

    /// The owner of a buffered slot is known.
    #[must_use]
    pub fn release(&mut self) -> Then {
        self.stage = Stage::Ready;
        Then::TellWriter
    }

    /// Takes out requests that have been buffered since before `buffered_before`, or whose deadline
    /// is over; `true` if the queue is empty and the slot idle.
    pub fn give_up(&mut self, buffered_before: Instant, now: Instant, into: &mut Taken) -> bool {
        let (late, kept) = std::mem::take(&mut self.jobs)
            .into_iter()
            .partition(|job| job.reply.is_late(buffered_before, now));
        self.jobs = kept;
        into.jobs.extend::<VecDeque<Job>>(late);
        for job in self.marks.values_mut() {
            let late = |reply: &mut Reply<MarkOutcome>| reply.is_late(buffered_before, now);
            let replies: Vec<_> = job.replies.extract_if(.., late).collect();
            if !replies.is_empty() {
                let mark = job.mark;
                into.marks.push(MarkJob { mark, replies });
            }
        }
        self.marks.retain(|_, job| !job.replies.is_empty());
        let idle = self.jobs.is_empty() && self.marks.is_empty();
        if idle {
            self.stage = Stage::Idle;
        }
        idle
    }

    /// Takes out all requests, because no shard can process them. The caller drops them without the
    /// lock; that answers them.
    #[must_use]
    pub fn give_all_up(&mut self) -> Self {
        std::mem::take(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::dialog::{Key, Seq, Text, UserId};
    use crate::store::Body;
    use std::time::Duration;

    fn job(key: &str, taken: &Gauge) -> Job {
        job_of(key, "x", taken)
    }

    fn job_of(key: &str, text: &str, taken: &Gauge) -> Job {
        let dialog: crate::domain::dialog::DialogId = "7_42".parse().unwrap();
        let (key, text) = (
            Key::new(key.into()).unwrap(),
            Text::new(text.into(), text.len()).unwrap(),
        );
        let place = QueuePermit::take(taken, 10).unwrap();
        Job {
            message: NewMessage::new(dialog, UserId::new(7).unwrap(), key, Body::Text(text)),
            origin: None,
            reply: Reply::new(Instant::now(), place, Box::new(drop)),
        }
    }

    fn most(jobs: usize) -> Most {
        let (bytes, marks) = (1 << 20, 10);
        Most { jobs, bytes, marks }
    }

    fn keys(taken: &Taken) -> Vec<&str> {
        taken
            .jobs
            .iter()
            .map(|job| job.message.key.as_str())
            .collect()
    }

    #[test]
    fn sends_keep_their_order_through_refusal_and_parking() {
        let taken = Gauge::default();
        let mut queue = SlotQueue::default();
        assert_eq!(queue.push(job("a", &taken)), Then::TellWriter);
        assert_eq!(queue.push(job("b", &taken)), Then::Nothing);
        let mut batch = Taken::default();
        queue.take_off(most(1), &mut batch);
        assert_eq!(
            queue.push(job("c", &taken)),
            Then::Nothing,
            "it is in flight"
        );
        assert_eq!(queue.landed(batch, Instant::now()), Then::FindOwner);
        assert_eq!(
            queue.push(job("d", &taken)),
            Then::Nothing,
            "it is buffered"
        );
        assert_eq!(queue.release(), Then::TellWriter);
        let mut batch = Taken::default();
        queue.take_off(most(10), &mut batch);
        assert_eq!(keys(&batch), ["a", "b", "c", "d"]);
        assert_eq!(
            queue.landed(Taken::default(), Instant::now()),
            Then::Nothing
        );
        assert_eq!(taken.get(), 4);
        drop(batch);
        assert_eq!(taken.get(), 0);
        assert_eq!(queue.push(job("e", &taken)), Then::TellWriter);
    }

    #[test]
    fn a_transaction_takes_so_many_bytes_but_a_single_send_of_any_size() {
        let taken = Gauge::default();
        let mut queue = SlotQueue::default();
        let bytes = store::size("x") * 2;
        let most = Most { bytes, ..most(10) };
        for (key, text) in [
            ("a", "x"),
            ("b", "x"),
            ("c", "x"),
            ("d", &"x".repeat(bytes)),
        ] {
            let _ = queue.push(job_of(key, text, &taken));
        }
        for (expected, all) in [(&["a", "b"][..], false), (&["c"], false), (&["d"], true)] {
            let mut batch = Taken::default();
            assert_eq!(queue.take_off(most, &mut batch), all);
            assert_eq!(keys(&batch), expected);
            let then = queue.landed(Taken::default(), Instant::now());
            assert_eq!(then == Then::Nothing, all);
        }
    }

    #[test]
    fn what_comes_while_a_slot_is_in_flight_makes_it_ready_again() {
        let taken = Gauge::default();
        let mut queue = SlotQueue::default();
        let _ = queue.push(job("a", &taken));
        let mut batch = Taken::default();
        queue.take_off(most(10), &mut batch);
        let _ = queue.push(job("b", &taken));
        assert_eq!(
            queue.landed(Taken::default(), Instant::now()),
            Then::TellWriter
        );
    }

    fn mark(user: u64, seq: u64, taken: &Gauge) -> MarkJob {
        let user = UserId::new(user).unwrap();
        let place = QueuePermit::take(taken, 10).unwrap();
        MarkJob {
            mark: NewMark::new("7_42".parse().unwrap(), user, Seq::new(seq)),
            replies: vec![Reply::new(Instant::now(), place, Box::new(drop))],
        }
    }

    fn marks(taken: &Taken) -> Vec<(u64, u64, usize)> {
        let mut marks: Vec<_> = taken
            .marks
            .iter()
            .map(|job| (job.mark.user.get(), job.mark.seq.get(), job.replies.len()))
            .collect();
        marks.sort_unstable();
        marks
    }

    #[test]
    fn of_read_marks_the_highest_counts_and_all_who_asked_are_answered() {
        let taken = Gauge::default();
        let mut queue = SlotQueue::default();
        assert_eq!(queue.push_mark(mark(7, 5, &taken)), Then::Gather);
        assert_eq!(queue.push_mark(mark(7, 3, &taken)), Then::Nothing);
        assert_eq!(queue.push_mark(mark(42, 4, &taken)), Then::Nothing);
        let mut batch = Taken::default();
        assert!(queue.take_marks_off(10, &mut batch));
        assert_eq!(marks(&batch), [(7, 5, 2), (42, 4, 1)]);
        let _ = queue.push_mark(mark(7, 4, &taken));
        let mut none = Taken::default();
        assert!(!queue.take_marks_off(10, &mut none), "it is in flight");
        assert_eq!(queue.landed(batch, Instant::now()), Then::FindOwner);
        assert_eq!(queue.release(), Then::TellWriter);
        let mut batch = Taken::default();
        queue.take_off(most(10), &mut batch);
        assert_eq!(marks(&batch), [(7, 5, 3), (42, 4, 1)]);
        let _ = queue.push_mark(mark(7, 6, &taken));
        assert_eq!(queue.landed(none, Instant::now()), Then::Gather);
    }

    #[test]
    fn a_transaction_takes_so_many_read_marks_and_the_others_go_with_the_next() {
        let taken = Gauge::default();
        let mut queue = SlotQueue::default();
        for user in [7, 42] {
            let _ = queue.push_mark(mark(user, 5, &taken));
        }
        let mut batch = Taken::default();
        assert!(queue.take_marks_off(1, &mut batch));
        assert_eq!(marks(&batch), [(7, 5, 1)]);
        let then = queue.landed(Taken::default(), Instant::now());
        assert_eq!(then, Then::Gather);
        assert!(queue.take_marks_off(2, &mut batch));
        assert_eq!(marks(&batch), [(7, 5, 1), (42, 5, 1)]);
    }

    #[test]
    fn read_marks_go_with_sends() {
        let taken = Gauge::default();
        let mut queue = SlotQueue::default();
        let _ = queue.push_mark(mark(7, 5, &taken));
        assert_eq!(queue.push(job("a", &taken)), Then::TellWriter);
        let mut batch = Taken::default();
        assert!(!queue.take_marks_off(10, &mut batch), "it has sends");
        queue.take_off(most(10), &mut batch);
        assert_eq!((keys(&batch), marks(&batch)), (vec!["a"], vec![(7, 5, 1)]));
        assert_eq!(
            queue.landed(Taken::default(), Instant::now()),
            Then::Nothing
        );
    }

    #[test]
    fn what_is_parked_for_too_long_is_given_up() {
        let taken = Gauge::default();
        let (begun, long) = (Instant::now(), Duration::from_secs(60));
        let mut queue = SlotQueue::default();
        let patient = |key| {
            let mut job = job(key, &taken);
            job.reply.deadline = begun + long;
            job
        };
        let _ = queue.push(patient("a"));
        let _ = queue.push_mark(mark(7, 5, &taken));
        let mut batch = Taken::default();
        queue.take_off(most(10), &mut batch);
        let _ = queue.landed(batch, begun);
        let _ = queue.push(patient("b"));
        let mut late = Taken::default();
        let before = begun.checked_sub(long).unwrap();
        assert!(!queue.give_up(before, begun + long / 2, &mut late));
        assert_eq!((keys(&late).len(), marks(&late)), (0, vec![(7, 5, 1)]));
        assert!(!queue.give_up(begun, begun + long / 2, &mut late));
        assert_eq!(keys(&late), ["a"]);
        assert!(queue.give_up(before, begun + long, &mut late));
        assert_eq!(keys(&late), ["a", "b"]);
        assert_eq!(queue.push(job("c", &taken)), Then::TellWriter, "it is idle");
    }

    #[test]
    fn who_asked_for_a_read_mark_too_long_ago_does_not_wait_for_those_who_asked_later() {
        let (taken, now) = (Gauge::default(), Instant::now());
        let mut queue = SlotQueue::default();
        let _ = queue.push_mark(mark(7, 5, &taken));
        let mut patient = mark(7, 6, &taken);
        patient.replies[0].deadline = now + Duration::from_secs(60);
        let _ = queue.push_mark(patient);
        let mut late = Taken::default();
        let before = now.checked_sub(Duration::from_secs(60)).unwrap();
        let then = now + Duration::from_secs(1);
        assert!(!queue.give_up(before, then, &mut late));
        assert_eq!(marks(&late), [(7, 6, 1)]);
        assert!(!queue.give_up(before, then, &mut late), "one still waits");
        assert_eq!(late.marks.len(), 1);
    }

    #[test]
    fn a_reply_that_is_dropped_says_that_it_is_not_through() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let place = QueuePermit::take(&Gauge::default(), 1).unwrap();
        let answer = Box::new(move |answer: Answer<Settled>| sender.send(answer).unwrap());
        drop(Reply::new(Instant::now(), place, answer));
        assert!(matches!(receiver.recv(), Ok(Err(Unsettled::Unavailable))));
    }

    #[test]
    fn places_are_limited() {
        let taken = Gauge::default();
        let first = QueuePermit::take(&taken, 1);
        assert!(first.is_some() && QueuePermit::take(&taken, 1).is_none());
        drop(first);
        assert!(QueuePermit::take(&taken, 1).is_some());
    }
}
