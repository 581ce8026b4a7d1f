//! The order of each dialog for one session: messages without a gap, and none twice.
//!
//! Live events may be lost, repeated or out of order. For each dialog the sequencer keeps the
//! position up to which the session has every message. The next message is sent on. A message ahead
//! of the next one is held until the messages in between arrive; those that do not arrive are read
//! from the shard. The answer to the send that stored a message (`sent`) takes the place of the
//! message in that order. An answer that is sent elsewhere says so (`early`).

use crate::domain::dialog::{DialogId, Seq, Timestamp};
use bytestring::ByteString;
use std::collections::{BTreeMap, HashMap, VecDeque};

/// The limits of what a session tracks.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Dialogs. Beyond this number, those without a message for the longest time are forgotten.
    pub dialogs: usize,
    /// Bytes of held frames.
    pub held_bytes: usize,
}

/// Held frames of one dialog.
const HELD: usize = 16;

/// See the module.
pub struct Sequencer {
    streams: HashMap<DialogId, Stream>,
    bounds: Bounds,
    held_bytes: usize,
    /// Dialogs that must be read, in the order in which this was noticed.
    due: VecDeque<DialogId>,
    /// No event is lost between the shards and this session, and the client was not away before it:
    /// the first message of a dialog that arrives has no earlier one missing.
    lossless: bool,
    /// In a dialog of which no message was sent yet, messages stored before this time are not sent
    /// unless they are requested.
    since: Timestamp,
    clock: u64,
}

/// One dialog.
struct Stream {
    /// The session has every message up to here. `None` while the messages since the session's
    /// begin are looked up.
    last: Option<Seq>,
    /// The highest seq that is known to be stored.
    newest: Seq,
    /// Messages ahead of `last`.
    held: BTreeMap<Seq, Held>,
    reading: Reading,
    /// The highest seq that was sent before the client set its position. An answer up to here
    /// cannot take the place of its message: the client has seen the message, and has forgotten its
    /// text.
    sent: Seq,
    /// Counts the positions that the client has set. A message that was read for an earlier
    /// position is dropped.
    epoch: u32,
    used: u64,
}

struct Held {
    frame: ByteString,
    /// It answers a send of this session.
    own: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Reading {
    CaughtUp,
    Due,
    InProgress,
}

/// The messages of a dialog that must be read from the shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// Their beginning.
    pub from: Start,
    /// The highest seq that is known to be stored.
    pub newest: Seq,
    /// The count of positions that this belongs to.
    pub epoch: u32,
}

/// The beginning of the missing messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Above this seq: the session has every message up to it.
    After(Seq),
    /// At the first message stored at this time or later, by the shard's clock: no message of the
    /// dialog was sent yet.
    Since(Timestamp),
}

impl Sequencer {
    /// Tracks no dialog at first. `since` is when the session began; `lossless` says that live
    /// messages are never lost.
    #[must_use]
    pub fn new(bounds: Bounds, since: Timestamp, lossless: bool) -> Self {
        Self {
            streams: HashMap::new(),
            bounds,
            held_bytes: 0,
            due: VecDeque::new(),
            lossless,
            since,
            clock: 0,
        }
    }

    /// A live message, or the answer to a send of this session (`own`). `send` gets the frames that
    /// can be sent now. Returns whether a dialog must be read.
    pub fn on_message(
        &mut self,
        dialog: DialogId,
        seq: Seq,
        frame: ByteString,
        own: bool,
        mut send: impl FnMut(ByteString),
    ) -> bool {
        let begins = self.lossless || seq == Seq::ZERO.next(0);
        let before = begins.then(|| Seq::new(seq.get() - 1));
        let stream = stream(&mut self.streams, &mut self.clock, dialog, before);
        let answered = own && seq <= stream.sent;
        match stream.last {
            Some(last) if seq <= last => {
                // An answer is sent even if the message was sent before.
                if own {
                    send(early(&frame));
                }
                return false;
            }
            Some(last) if seq.get() == last.get() + 1 && !answered => {
                stream.last = Some(seq);
                stream.newest = stream.newest.max(seq);
                send(frame);
                self.held_bytes -= stream.send_held(&mut send);
                return false;
            }
            Some(_) | None => {}
        }
        stream.newest = stream.newest.max(seq);
        let room = !answered
            && stream.held.len() < HELD
            && self.held_bytes + frame.len() <= self.bounds.held_bytes
            && !stream.held.contains_key(&seq);
        if room {
            self.held_bytes += frame.len();
            stream.held.insert(seq, Held { frame, own });
        } else if own {
            send(early(&frame));
        }
        self.want(dialog)
    }

    /// The answer to a send whose message was stored before, and that message as `frame`. The
    /// answer, which says `early`, is sent at once. It never takes the place of the message: a
    /// client that received the message, or an answer, has forgotten its text.
    pub fn on_repeat(
        &mut self,
        dialog: DialogId,
        seq: Seq,
        frame: ByteString,
        answer: ByteString,
        mut send: impl FnMut(ByteString),
    ) -> bool {
        send(answer);
        let stream = self.streams.get_mut(&dialog);
        if let Some(held) = stream.and_then(|stream| stream.held.get_mut(&seq)) {
            self.held_bytes = self.held_bytes - held.frame.len() + frame.len();
            *held = Held { frame, own: false };
            return false;
        }
        self.on_message(dialog, seq, frame, false, send)
    }

    /// `newest` is known to be stored, by a hint or a comparison. Returns whether the dialog must
    /// be read.
    pub fn on_last_seq(&mut self, dialog: DialogId, newest: Seq) -> bool {
        let stream = stream(&mut self.streams, &mut self.clock, dialog, None);
        if stream.last.is_some_and(|last| newest <= last) {
            return false;
        }
        stream.newest = stream.newest.max(newest);
        self.want(dialog)
    }

    /// The client has every message up to `seq` and requests the later ones. Returns the epoch that
    /// begins with it.
    pub fn position(&mut self, dialog: DialogId, seq: Seq, send: impl FnMut(ByteString)) -> u32 {
        let stream = stream(&mut self.streams, &mut self.clock, dialog, None);
        stream.sent = stream
            .last
            .map_or(stream.sent, |last| last.max(stream.sent));
        stream.last = Some(seq);
        stream.newest = seq;
        stream.epoch += 1;
        self.held_bytes -= stream.send_own(send) + stream.drop_held();
        stream.epoch
    }

    /// The client was connected until `since`: in dialogs of which no message was sent yet,
    /// messages stored from then on are missing.
    pub fn away_since(&mut self, since: Timestamp) {
        self.since = self.since.min(since);
        self.lossless = false;
    }

    /// The client has been shown the dialog up to `seq`. If the dialog is not tracked yet, it is
    /// from there on.
    pub fn track(&mut self, dialog: DialogId, seq: Seq) {
        stream(&mut self.streams, &mut self.clock, dialog, Some(seq));
    }

    /// The next dialog that must be read.
    pub fn next_gap(&mut self) -> Option<DialogId> {
        while let Some(dialog) = self.due.pop_front() {
            let stream = self.streams.get_mut(&dialog);
            if let Some(stream) = stream.filter(|stream| stream.reading == Reading::Due) {
                stream.reading = Reading::InProgress;
                return Some(dialog);
            }
        }
        None
    }

    /// The messages that must be read for a dialog of [`Sequencer::next_gap`]; `None` if they have
    /// arrived meanwhile.
    pub fn gap(&mut self, dialog: DialogId) -> Option<Gap> {
        let since = self.since;
        let stream = self.streams.get_mut(&dialog)?;
        let from = match stream.last {
            Some(after) if after < stream.newest => Start::After(after),
            Some(_) => {
                stream.reading = Reading::CaughtUp;
                return None;
            }
            None => Start::Since(since),
        };
        Some(Gap {
            from,
            newest: stream.newest,
            epoch: stream.epoch,
        })
    }

    /// A message that was read; `false` if the client has set another position meanwhile.
    pub fn found(
        &mut self,
        dialog: DialogId,
        epoch: u32,
        seq: Seq,
        frame: ByteString,
        mut send: impl FnMut(ByteString),
    ) -> bool {
        let Some(stream) = self.of_epoch(dialog, epoch) else {
            return false;
        };
        if stream.last.is_none_or(|last| last < seq) {
            stream.last = Some(seq);
            let held = stream.held.remove(&seq);
            let freed = held.as_ref().map_or(0, |held| held.frame.len());
            // If it is the message of a send of this session, the answer is sent instead.
            send(
                held.filter(|held| held.own)
                    .map_or(frame, |held| held.frame),
            );
            let freed = freed + stream.send_held(&mut send);
            self.held_bytes -= freed;
        }
        true
    }

    /// A read has ended: every message up to `end` was found. More messages may be missing by now.
    pub fn read_through(
        &mut self,
        dialog: DialogId,
        gap: Gap,
        end: Seq,
        mut send: impl FnMut(ByteString),
    ) {
        let Some(stream) = self.of_epoch(dialog, gap.epoch) else {
            return;
        };
        stream.last = Some(stream.last.map_or(end, |last| last.max(end)));
        let mut freed = stream.send_held(&mut send);
        if end < gap.newest {
            // The shard does not have the messages that were announced: they were forgotten with
            // another shard. Held messages are sent.
            freed += stream.send_all_held(&mut send);
            stream.newest = stream.last.unwrap_or(end);
        }
        self.held_bytes -= freed;
    }

    /// The client is asked to reload the dialog: it is tracked from `newest` on. `false` if the
    /// client has set another position meanwhile.
    pub fn skip_to(
        &mut self,
        dialog: DialogId,
        epoch: u32,
        newest: Seq,
        mut send: impl FnMut(ByteString),
    ) -> bool {
        let Some(stream) = self.of_epoch(dialog, epoch) else {
            return false;
        };
        stream.last = Some(newest);
        stream.newest = stream.newest.max(newest);
        let freed = stream.send_held(&mut send);
        self.held_bytes -= freed;
        true
    }

    /// A read has failed and will be tried again. Answers are sent without waiting for it.
    pub fn failed(&mut self, dialog: DialogId, send: impl FnMut(ByteString)) {
        if let Some(stream) = self.streams.get_mut(&dialog) {
            let freed = stream.send_own(send);
            self.held_bytes -= freed;
        }
    }

    /// Sends all held answers: the session ends.
    pub fn release(&mut self, mut send: impl FnMut(ByteString)) {
        for stream in self.streams.values_mut() {
            self.held_bytes -= stream.send_own(&mut send);
        }
    }

    /// The position up to which the session has every message.
    #[must_use]
    pub fn last(&self, dialog: DialogId) -> Option<Seq> {
        self.streams.get(&dialog).and_then(|stream| stream.last)
    }

    /// Whether more dialogs are tracked than the limit allows.
    #[must_use]
    pub fn is_crowded(&self) -> bool {
        self.streams.len() > self.bounds.dialogs
    }

    /// Forgets the quarter of the dialogs without a message for the longest time. If one of them
    /// has a message again, those since `since` are read.
    pub fn forget_some(&mut self, since: Timestamp) {
        let mut idle: Vec<(u64, DialogId)> = self
            .streams
            .iter()
            .filter(|(_, stream)| stream.reading == Reading::CaughtUp && stream.held.is_empty())
            .map(|(dialog, stream)| (stream.used, *dialog))
            .collect();
        idle.sort_unstable();
        for (_, dialog) in idle.iter().take(self.bounds.dialogs / 4 + 1) {
            self.streams.remove(dialog);
        }
        self.since = since;
    }

    fn of_epoch(&mut self, dialog: DialogId, epoch: u32) -> Option<&mut Stream> {
        let stream = self.streams.get_mut(&dialog);
        stream.filter(|stream| stream.epoch == epoch)
    }

    /// Queues a dialog for reading if messages are missing and no read is under way.
    fn want(&mut self, dialog: DialogId) -> bool {
        let Some(stream) = self.streams.get_mut(&dialog) else {
            return false;
        };
        let behind = stream.last.is_none_or(|last| last < stream.newest);
        if behind && stream.reading == Reading::CaughtUp {
            stream.reading = Reading::Due;
            self.due.push_back(dialog);
            return true;
        }
        false
    }
}

/// The state of a dialog, marked as used now; a new one begins at `last`.
fn stream<'a>(
    streams: &'a mut HashMap<DialogId, Stream>,
    clock: &mut u64,
    dialog: DialogId,
    last: Option<Seq>,
) -> &'a mut Stream {
    *clock += 1;
    let stream = streams.entry(dialog).or_insert_with(|| Stream {
        last,
        newest: last.unwrap_or(Seq::ZERO),
        held: BTreeMap::new(),
        reading: Reading::CaughtUp,
        sent: Seq::ZERO,
        epoch: 0,
        used: 0,
    });
    stream.used = *clock;
    stream
}

/// An encoded `sent` that does not take the place of its message. Few are: they are made of the
/// others, so that each answer is encoded once.
fn early(sent: &str) -> ByteString {
    let fields = sent.strip_suffix('}').unwrap_or(sent);
    format!("{fields},\"early\":true}}").into()
}

impl Stream {
    /// Sends the messages that follow `last` and drops those below it. Returns the number of freed
    /// bytes.
    fn send_held(&mut self, send: &mut impl FnMut(ByteString)) -> usize {
        let mut freed = 0;
        while let (Some(last), Some(entry)) = (self.last, self.held.first_entry()) {
            let seq = *entry.key();
            if seq.get() > last.get() + 1 {
                break;
            }
            let held = entry.remove();
            freed += held.frame.len();
            if seq > last {
                self.last = Some(seq);
                send(held.frame);
            } else if held.own {
                send(early(&held.frame));
            }
        }
        freed
    }

    fn send_all_held(&mut self, send: &mut impl FnMut(ByteString)) -> usize {
        let mut freed = 0;
        for (seq, held) in std::mem::take(&mut self.held) {
            freed += held.frame.len();
            self.last = Some(self.last.map_or(seq, |last| last.max(seq)));
            send(held.frame);
        }
        freed
    }

    fn send_own(&mut self, mut send: impl FnMut(ByteString)) -> usize {
        let mut freed = 0;
        self.held.retain(|_, held| {
            if held.own {
                freed += held.frame.len();
                send(early(&held.frame));
            }
            !held.own
        });
        freed
    }

    fn drop_held(&mut self) -> usize {
        let freed = self.held.values().map(|held| held.frame.len()).sum();
        self.held.clear();
        freed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::dialog::UserId;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};
    use std::collections::BTreeSet;

    const BOUNDS: Bounds = Bounds {
        dialogs: 8,
        held_bytes: 1000,
    };

    fn dialog() -> DialogId {
        "7_42".parse().unwrap()
    }

    fn sequencer() -> Sequencer {
        Sequencer::new(BOUNDS, Timestamp::from_micros(0), false)
    }

    fn seq(n: u64) -> Seq {
        Seq::new(n)
    }

    fn time(n: u64) -> Timestamp {
        Timestamp::from_micros(n.try_into().unwrap())
    }

    fn frame(n: u64) -> ByteString {
        format!("{{\"n\":{n}}}").into()
    }

    /// What the client got, as numbers.
    #[derive(Default)]
    struct Got(Vec<u64>);

    impl Got {
        fn taker(&mut self) -> impl FnMut(ByteString) {
            #[derive(serde::Deserialize)]
            struct Frame {
                n: u64,
                #[serde(default)]
                early: bool,
            }
            |frame| {
                let Frame { n, early } = serde_json::from_str(&frame).unwrap();
                self.0.push(n + u64::from(early) * ANSWER);
            }
        }
    }

    /// Reads what is missing from a log that is dense up to `stored`, as a session does.
    fn read(sequencer: &mut Sequencer, stored: u64, got: &mut Got) {
        while let Some(dialog) = sequencer.next_gap() {
            read_one(sequencer, dialog, stored, got);
        }
    }

    fn read_one(sequencer: &mut Sequencer, dialog: DialogId, stored: u64, got: &mut Got) {
        while let Some(gap) = sequencer.gap(dialog) {
            let after = match gap.from {
                Start::After(after) => after.get(),
                // In these tests the message n is stored at the time n.
                Start::Since(since) => since.micros().max(1).unsigned_abs() - 1,
            };
            for n in after + 1..=stored {
                assert!(sequencer.found(dialog, gap.epoch, seq(n), frame(n), got.taker()));
            }
            sequencer.read_through(dialog, gap, seq(stored), got.taker());
        }
    }

    #[test]
    fn what_follows_is_sent_on_and_what_overtakes_waits() {
        let (mut sequencer, mut got) = (sequencer(), Got::default());
        for n in [1, 2, 2, 1, 4] {
            sequencer.on_message(dialog(), seq(n), frame(n), false, got.taker());
        }
        assert_eq!(got.0, [1, 2]);
        assert_eq!(sequencer.next_gap(), Some(dialog()));
        sequencer.on_message(dialog(), seq(3), frame(3), false, got.taker());
        assert_eq!(got.0, [1, 2, 3, 4]);
        assert_eq!(sequencer.gap(dialog()), None, "it has come by itself");
        assert_eq!(sequencer.held_bytes, 0);
    }

    #[test]
    fn what_is_lost_is_read_and_a_hint_betrays_a_loss_at_the_end() {
        let (mut sequencer, mut got) = (sequencer(), Got::default());
        sequencer.on_message(dialog(), seq(1), frame(1), false, got.taker());
        assert!(sequencer.on_message(dialog(), seq(5), frame(5), false, got.taker()));
        read(&mut sequencer, 5, &mut got);
        assert!(!sequencer.on_last_seq(dialog(), seq(5)));
        assert!(sequencer.on_last_seq(dialog(), seq(7)));
        read(&mut sequencer, 7, &mut got);
        assert_eq!(got.0, [1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn an_answer_has_its_place_in_the_order_but_does_not_wait_for_a_shard_that_is_away() {
        let (mut sequencer, mut got) = (sequencer(), Got::default());
        sequencer.position(dialog(), seq(9), got.taker());
        sequencer.on_message(dialog(), seq(11), frame(11), true, got.taker());
        assert_eq!(got.0, [0; 0]);
        assert_eq!(sequencer.next_gap(), Some(dialog()));
        sequencer.failed(dialog(), got.taker());
        assert_eq!(got.0, [ANSWER + 11], "it says that it is early");
        read_one(&mut sequencer, dialog(), 11, &mut got);
        assert_eq!(got.0[1..], [10, 11], "and then the log, whole");
        // A repeat is answered, whatever was sent before.
        sequencer.on_repeat(dialog(), seq(10), frame(10), frame(1000), got.taker());
        assert_eq!(got.0[3..], [1000]);
    }

    #[test]
    fn the_answer_to_a_repeat_never_takes_the_place_of_the_message() {
        let (mut sequencer, mut got) = (sequencer(), Got::default());
        sequencer.position(dialog(), seq(9), got.taker());
        sequencer.on_repeat(dialog(), seq(10), frame(10), frame(1010), got.taker());
        assert_eq!(got.0, [1010, 10], "the next one");
        sequencer.on_message(dialog(), seq(12), frame(1012), true, got.taker());
        sequencer.on_repeat(dialog(), seq(12), frame(12), frame(1012), got.taker());
        assert_eq!(
            got.0,
            [1010, 10, 1012],
            "the answer that waited is given, once for both"
        );
        read(&mut sequencer, 12, &mut got);
        assert_eq!(got.0, [1010, 10, 1012, 11, 12]);
        assert_eq!(sequencer.held_bytes, 0);
        let other = "7_43".parse().unwrap();
        assert!(sequencer.on_repeat(other, seq(5), frame(5), frame(1005), got.taker()));
        read(&mut sequencer, 5, &mut got);
        assert_eq!(
            got.0[5..],
            [1005, 1, 2, 3, 4, 5],
            "an unknown dialog does not begin with it"
        );
    }

    #[test]
    fn an_answer_that_comes_after_its_message_was_sent_does_not_take_its_place() {
        let (mut sequencer, mut got) = (sequencer(), Got::default());
        sequencer.track(dialog(), seq(5));
        sequencer.on_last_seq(dialog(), seq(6));
        read(&mut sequencer, 6, &mut got);
        sequencer.position(dialog(), seq(5), got.taker());
        assert!(sequencer.on_message(dialog(), seq(6), frame(1006), true, got.taker()));
        read(&mut sequencer, 6, &mut got);
        assert_eq!(got.0, [6, ANSWER + 1006, 6]);
    }

    #[test]
    fn a_position_begins_anew_and_voids_what_is_being_read() {
        let (mut sequencer, mut got) = (sequencer(), Got::default());
        sequencer.position(dialog(), seq(100), got.taker());
        sequencer.on_last_seq(dialog(), seq(110));
        let due = sequencer.next_gap().unwrap();
        let gap = sequencer.gap(due).unwrap();
        sequencer.position(dialog(), seq(50), got.taker());
        assert!(!sequencer.found(due, gap.epoch, seq(101), frame(101), got.taker()));
        assert!(!sequencer.skip_to(due, gap.epoch, seq(110), got.taker()));
        sequencer.on_last_seq(dialog(), seq(110));
        assert_eq!(sequencer.gap(due).unwrap().from, Start::After(seq(50)));
        assert_eq!(got.0, [0; 0]);
    }

    #[test]
    fn what_was_shown_is_kept_level_and_what_was_never_seen_is_looked_behind() {
        let (mut sequencer, mut got) = (sequencer(), Got::default());
        sequencer.track(dialog(), seq(5));
        sequencer.on_message(dialog(), seq(6), frame(6), false, got.taker());
        assert_eq!(got.0, [6]);
        let other: DialogId = "7_43".parse().unwrap();
        assert!(sequencer.on_message(other, seq(3), frame(3), false, got.taker()));
        assert_eq!(got.0, [6], "there may be something before it");
        let mut lossless = Sequencer::new(BOUNDS, Timestamp::from_micros(0), true);
        assert!(!lossless.on_message(other, seq(3), frame(3), false, got.taker()));
        assert_eq!(got.0, [6, 3]);
    }

    #[test]
    fn what_a_shard_does_not_have_is_not_waited_for() {
        let (mut sequencer, mut got) = (sequencer(), Got::default());
        sequencer.position(dialog(), seq(5), got.taker());
        sequencer.on_message(dialog(), seq(9), frame(9), false, got.taker());
        read(&mut sequencer, 6, &mut got);
        assert_eq!(got.0, [6, 9]);
        assert_eq!(sequencer.last(dialog()), Some(seq(9)));
    }

    #[test]
    fn few_dialogs_are_kept() {
        let (mut sequencer, mut got) = (sequencer(), Got::default());
        for with in 100..120 {
            let dialog = DialogId::between(UserId::new(7).unwrap(), UserId::new(with).unwrap());
            sequencer.on_message(dialog, seq(1), frame(1), false, got.taker());
            if sequencer.is_crowded() {
                sequencer.forget_some(Timestamp::from_micros(5));
            }
        }
        assert!(sequencer.streams.len() <= BOUNDS.dialogs);
        assert_eq!(sequencer.last(dialog()), None);
    }

    /// What a client has that keeps to PROTOCOL: it forgets a send that it knows to be stored.
    struct Model {
        /// Frames for it: the seq of a message, or `ANSWER` or `REPEAT` more than that.
        got: Got,
        have: u64,
        /// It gives positions. A client that has shown nothing of the dialog yet gives only the
        /// time since when it was away, and begins with the first message that it receives.
        follows: bool,
        unanswered: BTreeSet<u64>,
        /// Its `resume` was not answered yet.
        resuming: bool,
    }

    /// Added to the seq of a message that its `sent` answers.
    const ANSWER: u64 = 1_000_000;

    /// Added to the seq of a message that was stored before: its `sent` is never its place.
    const REPEAT: u64 = 2_000_000;

    impl Model {
        fn take(&mut self, what: &str) {
            for n in std::mem::take(&mut self.got.0) {
                let seq = n % ANSWER;
                let known = self.unanswered.remove(&seq);
                let places = n < ANSWER || (n < REPEAT && known);
                if places && !self.follows {
                    assert_eq!(seq, self.have + 1, "{what}: the first that is received");
                    (self.have, self.follows) = (seq, true);
                } else if places && seq == self.have + 1 {
                    self.have += 1;
                } else if n < ANSWER {
                    assert!(
                        n <= self.have || self.resuming,
                        "{what}: {n} after {}",
                        self.have
                    );
                }
            }
        }
    }

    /// A growing log whose events are lost, repeated and reordered, with sends of the session,
    /// reads that fail, and connections that are lost: what was not answered is sent again, before
    /// or after the position.
    #[test]
    fn whatever_is_lost_doubled_or_overtaken_the_client_has_the_log() {
        for seed in testkit::seeds("CHAT_SEQUENCE", 2000) {
            let mut rng = StdRng::seed_from_u64(seed);
            let what = format!("seed {seed}");
            let lossless = rng.random();
            let connect = |have: u64| {
                let mut sequencer = Sequencer::new(BOUNDS, time(have + 1), lossless);
                sequencer.away_since(time(have + 1));
                sequencer
            };
            let mut sequencer = Sequencer::new(BOUNDS, time(1), lossless);
            let (mut stored, mut on_the_way) = (0, VecDeque::new());
            // Up to where the session has to be before its `resume` is answered.
            let mut level = None;
            let mut client = Model {
                got: Got::default(),
                have: 0,
                follows: rng.random(),
                unanswered: BTreeSet::new(),
                resuming: true,
            };
            for _ in 0..rng.random_range(1..200) {
                let got = &mut client.got;
                match rng.random_range(0..12) {
                    0..4 => {
                        stored += 1;
                        let ours = rng.random_ratio(1, 3);
                        if ours {
                            client.unanswered.insert(stored);
                        }
                        if ours || lossless || rng.random_ratio(4, 5) {
                            let most = if lossless { 0 } else { 3 };
                            let at = rng.random_range(0..=on_the_way.len().min(most));
                            on_the_way.insert(on_the_way.len() - at, (stored, ours, false));
                        }
                        // Stored again by another instance; or the client sent it twice.
                        if rng.random_ratio(1, 10) {
                            on_the_way.push_back((stored, ours && rng.random(), true));
                        }
                    }
                    4..7 => match on_the_way.pop_front() {
                        Some((n, true, false)) => {
                            let answer = frame(ANSWER + n);
                            sequencer.on_message(dialog(), seq(n), answer, true, got.taker());
                        }
                        Some((n, true, true)) => {
                            let answer = frame(REPEAT + n);
                            sequencer.on_repeat(dialog(), seq(n), frame(n), answer, got.taker());
                        }
                        Some((n, false, _)) => {
                            sequencer.on_message(dialog(), seq(n), frame(n), false, got.taker());
                        }
                        None => {}
                    },
                    7 => drop(sequencer.on_last_seq(dialog(), seq(stored))),
                    8 => {
                        if let Some(due) = sequencer.next_gap() {
                            if rng.random_ratio(1, 4) {
                                sequencer.failed(due, got.taker());
                            }
                            read_one(&mut sequencer, due, stored, got);
                        }
                    }
                    9 => {
                        if client.follows {
                            sequencer.position(dialog(), seq(client.have), got.taker());
                        }
                        sequencer.on_last_seq(dialog(), seq(stored));
                        client.resuming = true;
                        level = Some(stored);
                    }
                    _ => {
                        if rng.random_ratio(1, 3) {
                            sequencer = connect(client.have);
                            on_the_way.clear();
                            (client.resuming, level) = (true, None);
                            // Events of before may still arrive, and answers that were lost are
                            // given again.
                            for n in &client.unanswered {
                                if rng.random_ratio(1, 4) {
                                    on_the_way.push_back((*n, false, false));
                                }
                                on_the_way.push_back((*n, true, true));
                            }
                        }
                    }
                }
                client.take(&what);
                if level.is_some_and(|level| sequencer.last(dialog()) >= Some(seq(level))) {
                    (client.resuming, level) = (false, None);
                }
            }
            if client.follows {
                sequencer.position(dialog(), seq(client.have), client.got.taker());
            }
            client.resuming = true;
            sequencer.on_last_seq(dialog(), seq(stored));
            read(&mut sequencer, stored, &mut client.got);
            client.take(&what);
            assert_eq!(client.have, stored, "{what}");
            assert_eq!(sequencer.held_bytes, 0, "{what}");
        }
    }
}
