//! What a client has of each dialog, so that it shows everything once and in order, whatever the
//! connection does.

use std::collections::{BTreeMap, HashMap};

/// The dialogs of a client.
#[derive(Default)]
pub struct Streams {
    of: HashMap<String, Stream>,
}

struct Stream {
    /// Everything up to here was shown.
    last: u64,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// The server sends every message in order.
    Live,
    /// The server gets our position; until it has answered, only the next message counts.
    Resuming,
    /// More was missed than the server replays: it is read in pages. Messages that arrive meanwhile
    /// will be in them.
    Reading,
}

impl Streams {
    /// Whether a message that arrives, or an answer that takes its place, is to be shown now.
    pub fn message(&mut self, dialog: &str, seq: u64) -> bool {
        let Some(stream) = self.of.get_mut(dialog) else {
            self.enter(dialog, seq, State::Live);
            return true;
        };
        let follows = stream.last.checked_add(1) == Some(seq);
        let show = match stream.state {
            State::Live => seq > stream.last,
            State::Resuming => follows,
            State::Reading => false,
        };
        if show {
            stream.last = seq;
        }
        show
    }

    /// A page that was read after the last that was shown: shows it, too.
    pub fn found(&mut self, dialog: &str, seq: u64) -> bool {
        match self.of.get_mut(dialog) {
            Some(stream) if stream.state == State::Reading && seq > stream.last => {
                stream.last = seq;
                true
            }
            Some(_) | None => false,
        }
    }

    /// Begins to follow a dialog of which everything up to `last` is known, or knows it better.
    pub fn follow(&mut self, dialog: &str, last: u64) {
        self.enter(dialog, last, State::Resuming);
    }

    /// The connection is gone: everything is to be resumed.
    pub fn interrupt(&mut self) {
        for stream in self.of.values_mut() {
            stream.state = State::Resuming;
        }
    }

    /// The positions that a `resume` must name.
    pub fn positions(&self) -> BTreeMap<String, u64> {
        let resuming = self
            .of
            .iter()
            .filter(|(_, stream)| stream.state == State::Resuming);
        resuming
            .map(|(dialog, stream)| (dialog.clone(), stream.last))
            .collect()
    }

    /// Up to where a dialog was shown.
    pub fn last(&self, dialog: &str) -> Option<u64> {
        self.of.get(dialog).map(|stream| stream.last)
    }

    /// The server keeps these level from now on.
    pub fn resumed<'a>(&mut self, dialogs: impl IntoIterator<Item = &'a String>) {
        for dialog in dialogs {
            if let Some(stream) = self.of.get_mut(dialog) {
                stream.state = State::Live;
            }
        }
    }

    /// The server does not replay what was missed here: `true` if it is to be read, `false` if we
    /// do not follow it.
    pub fn resync(&mut self, dialog: &str) -> bool {
        let Some(stream) = self.of.get_mut(dialog) else {
            return false;
        };
        stream.state = State::Reading;
        true
    }

    fn enter(&mut self, dialog: &str, last: u64, state: State) {
        self.of.insert(dialog.to_owned(), Stream { last, state });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_shown_once_and_in_order_through_a_reconnection() {
        let mut streams = Streams::default();
        assert!(
            streams.message("7_42", 5),
            "the first decides where it begins"
        );
        assert!(
            streams.message("7_42", 6)
                && !streams.message("7_42", 6)
                && !streams.message("7_42", 4)
        );
        streams.interrupt();
        assert_eq!(
            streams.positions(),
            BTreeMap::from([("7_42".to_owned(), 6)])
        );
        assert!(
            !streams.message("7_42", 9),
            "sent before the server had our position"
        );
        assert!(streams.message("7_42", 7) && streams.message("7_42", 8));
        streams.resumed([&"7_42".to_owned()]);
        assert!(streams.message("7_42", 9));
        assert!(streams.positions().is_empty());
        assert!(
            streams.message("7_42", (1 << 40) + 1),
            "the server knows of no hole that can be filled"
        );
    }

    #[test]
    fn what_is_read_in_pages_is_not_taken_twice() {
        let mut streams = Streams::default();
        streams.follow("7_42", 3);
        assert!(streams.resync("7_42") && !streams.resync("7_43"));
        assert!(!streams.message("7_42", 4), "it will be in the pages");
        assert!(streams.found("7_42", 4) && streams.found("7_42", 5) && !streams.found("7_42", 5));
        streams.follow("7_42", 5);
        assert!(!streams.found("7_42", 6));
        assert!(streams.message("7_42", 6));
    }
}
