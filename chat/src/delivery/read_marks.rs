//! The read marks that a session has, so that it is told only marks that have moved.

use crate::domain::dialog::{DialogId, Seq, UserId};
use std::collections::HashMap;

/// See the module. Marks arrive out of order within seconds only, so those without a change for the
/// longest time are forgotten.
pub struct ReadMarks {
    recent: HashMap<(DialogId, UserId), Seq>,
    older: HashMap<(DialogId, UserId), Seq>,
    /// Marks in each of the two, at most.
    capacity: usize,
}

impl ReadMarks {
    /// Remembers at least the last `capacity` marks.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self {
            recent: HashMap::new(),
            older: HashMap::new(),
            capacity,
        }
    }

    /// Whether the session does not have this mark, nor a later one; from now on it has.
    pub fn advance(&mut self, dialog: DialogId, user: UserId, seq: Seq) -> bool {
        let known = self.known(dialog, user);
        let moves = known.is_none_or(|known| known < seq);
        self.set(dialog, user, known.map_or(seq, |known| known.max(seq)));
        moves
    }

    /// The later of this mark and the one that the session has; from now on it has that.
    pub fn at_least(&mut self, dialog: DialogId, user: UserId, seq: Seq) -> Seq {
        let known = self.known(dialog, user);
        let seq = known.map_or(seq, |known| known.max(seq));
        self.set(dialog, user, seq);
        seq
    }

    fn known(&self, dialog: DialogId, user: UserId) -> Option<Seq> {
        let of = |marks: &HashMap<_, Seq>| marks.get(&(dialog, user)).copied();
        of(&self.recent).or_else(|| of(&self.older))
    }

    fn set(&mut self, dialog: DialogId, user: UserId, seq: Seq) {
        if self.recent.len() >= self.capacity && !self.recent.contains_key(&(dialog, user)) {
            self.older = std::mem::take(&mut self.recent);
        }
        self.recent.insert((dialog, user), seq);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(n: u64) -> UserId {
        UserId::new(n).unwrap()
    }

    fn dialog(n: u64) -> DialogId {
        DialogId::between(user(7), user(n))
    }

    #[test]
    fn marks_go_forward_only() {
        let mut marks = ReadMarks::new(4);
        let moved = [3, 5, 4, 5, 6].map(|n| marks.advance(dialog(42), user(42), Seq::new(n)));
        assert_eq!(moved, [true, true, false, false, true]);
        assert!(
            marks.advance(dialog(42), user(7), Seq::new(1)),
            "another user's"
        );
        assert_eq!(marks.at_least(dialog(42), user(42), Seq::new(2)).get(), 6);
        assert_eq!(marks.at_least(dialog(42), user(42), Seq::new(9)).get(), 9);
        assert!(!marks.advance(dialog(42), user(42), Seq::new(8)));
    }

    #[test]
    fn a_bounded_number_is_kept_and_the_last_are_among_them() {
        let mut marks = ReadMarks::new(4);
        for n in 100..200 {
            assert!(marks.advance(dialog(n), user(n), Seq::new(9)));
            for lately in 100.max(n - 3)..=n {
                assert!(!marks.advance(dialog(lately), user(lately), Seq::new(8)));
            }
            assert!(marks.recent.len() + marks.older.len() <= 8);
        }
    }
}
