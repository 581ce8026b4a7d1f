//! The types of a dialog: users, ids, seqs, texts. Input is parsed into them once; no later code
//! checks again.

use data_encoding::BASE32_NOPAD;
use siphasher::sip128::{Hasher128, SipHasher24};
use std::fmt;
use std::hash::Hasher;
use std::str::FromStr;

/// A user: an integer from 1 to 2^53 - 1, so that JavaScript holds it exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UserId(u64);

/// A user id outside 1 … 2^53-1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a user id is an integer from 1 to {}", chat_wire::MAX_USER_ID)]
pub struct InvalidUserId;

impl UserId {
    /// Takes a number for a user id.
    ///
    /// # Errors
    /// [`InvalidUserId`] outside 1 … 2^53-1.
    pub fn new(id: u64) -> Result<Self, InvalidUserId> {
        if (1..=chat_wire::MAX_USER_ID).contains(&id) {
            Ok(Self(id))
        } else {
            Err(InvalidUserId)
        }
    }

    /// The number.
    #[must_use]
    pub fn get(self) -> u64 {
        self.0
    }
}

impl FromStr for UserId {
    type Err = InvalidUserId;

    /// The canonical decimal form only: no sign, no leading zero.
    fn from_str(s: &str) -> Result<Self, InvalidUserId> {
        if s.starts_with('0') || !s.bytes().all(|b| b.is_ascii_digit()) {
            return Err(InvalidUserId);
        }
        s.parse().map_err(|_| InvalidUserId).and_then(Self::new)
    }
}

impl fmt::Display for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A log of entries with an order of its own: a dialog between two users, a room, or a feed.
///
/// Its canonical text is what the placement hashes and the shards store: `7_42`, `r…`, `f7`. What
/// depends on the kind is asked here or in [`super::room`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DialogId {
    /// Between two users: `min_max`.
    Pair(Pair),
    /// Many users, who join and leave: `r` and 26 letters and digits.
    Room(RoomId),
    /// One user writes, everybody may read: `f` and the author.
    Feed(UserId),
}

/// The two users of a dialog; the same user twice for notes to self.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pair {
    low: UserId,
    high: UserId,
}

/// The name of a room: a hash of its creator and of the key of its creation. So the same request
/// names the same room wherever it arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RoomId([u8; 16]);

/// A text that is not the canonical form of a dialog id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a dialog id is written MIN_MAX, as in 7_42, or is that of a room or a feed, as in f7")]
pub struct InvalidDialogId;

impl DialogId {
    /// The dialog between two users; with oneself, the notes to self.
    #[must_use]
    pub fn between(a: UserId, b: UserId) -> Self {
        Self::Pair(Pair {
            low: a.min(b),
            high: a.max(b),
        })
    }

    /// The room that `creator` makes with `key`.
    #[must_use]
    pub fn room(creator: UserId, key: &Key) -> Self {
        let mut hasher = SipHasher24::new();
        hasher.write(&creator.get().to_be_bytes());
        hasher.write(key.as_str().as_bytes());
        Self::Room(RoomId(hasher.finish128().as_bytes()))
    }

    /// The users whom the id names as readers and writers, each once: those of a dialog between
    /// two. Nobody for a room, whose log decides that, and for a feed, which has no list.
    pub fn users(self) -> impl Iterator<Item = UserId> + Clone {
        let (low, high) = match self {
            DialogId::Pair(Pair { low, high }) => (Some(low), (high != low).then_some(high)),
            DialogId::Room(_) | DialogId::Feed(_) => (None, None),
        };
        low.into_iter().chain(high)
    }

    /// Whether the id names `user` as a reader and writer.
    #[must_use]
    pub fn names(self, user: UserId) -> bool {
        self.users().any(|named| named == user)
    }

    /// The other user of a dialog between two, seen from `me`: `to` and `with` on the wire.
    #[must_use]
    pub fn counterpart(self, me: UserId) -> Option<UserId> {
        match self {
            DialogId::Pair(Pair { low, high }) => Some(if me == low { high } else { low }),
            DialogId::Room(_) | DialogId::Feed(_) => None,
        }
    }

    /// Whether it is a room.
    #[must_use]
    pub fn is_room(self) -> bool {
        matches!(self, DialogId::Room(_))
    }
}

impl fmt::Display for DialogId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DialogId::Pair(Pair { low, high }) => write!(f, "{low}_{high}"),
            DialogId::Room(RoomId(hash)) => {
                write!(f, "r{}", BASE32_NOPAD.encode(hash).to_ascii_lowercase())
            }
            DialogId::Feed(author) => write!(f, "f{author}"),
        }
    }
}

impl FromStr for DialogId {
    type Err = InvalidDialogId;

    fn from_str(s: &str) -> Result<Self, InvalidDialogId> {
        let parsed = if let Some(hash) = s.strip_prefix('r') {
            room_of(hash)
        } else if let Some(author) = s.strip_prefix('f') {
            author.parse().ok().map(DialogId::Feed)
        } else {
            s.split_once('_').and_then(|(low, high)| {
                let (low, high) = (low.parse().ok()?, high.parse().ok()?);
                (low <= high).then_some(DialogId::Pair(Pair { low, high }))
            })
        };
        parsed.ok_or(InvalidDialogId)
    }
}

/// The room with this hash, in the canonical notation only: lower case, no bits left over.
fn room_of(hash: &str) -> Option<DialogId> {
    if hash.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return None;
    }
    let bytes = BASE32_NOPAD.decode(hash.to_ascii_uppercase().as_bytes());
    let hash = bytes.ok()?.try_into().ok()?;
    Some(DialogId::Room(RoomId(hash)))
}

/// The place of a message in its dialog: `generation << 40 | n`, n dense from 1 within a
/// generation.
///
/// In generation 0, which lasts until a shard is declared down, that is plain 1, 2, 3 …
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Seq(u64);

impl Seq {
    /// Below every message.
    pub const ZERO: Seq = Seq(0);

    /// A seq of the wire or of a row.
    #[must_use]
    pub fn new(seq: u64) -> Self {
        Self(seq)
    }

    /// The number.
    #[must_use]
    pub fn get(self) -> u64 {
        self.0
    }

    /// Below every message of a generation.
    #[must_use]
    pub fn beginning(generation: u32) -> Self {
        Self(u64::from(generation) * chat_wire::GENERATION)
    }

    /// The seq of the next message of a slot that is in `generation`.
    #[must_use]
    pub fn next(self, generation: u32) -> Self {
        Self(self.max(Self::beginning(generation)).0 + 1)
    }

    /// The generation it was given in: 0 until a shard is declared down.
    #[must_use]
    pub fn generation(self) -> u32 {
        u32::try_from(self.0 / chat_wire::GENERATION).unwrap_or(u32::MAX)
    }

    /// Whether `self` is what [`Seq::next`] may give after `before`: one more, or the first of a
    /// later generation.
    #[must_use]
    pub fn follows(self, before: Seq) -> bool {
        chat_wire::follows(before.0, self.0)
    }
}

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The text of a message: not empty, not over the limit, otherwise exactly what was sent.
#[derive(Clone, PartialEq, Eq)]
pub struct Text(Box<str>);

/// Why a text was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidText {
    /// Not a single character.
    #[error("the text is empty")]
    Empty,
    /// Over the limit.
    #[error("the text has {chars} characters; at most {limit} are taken")]
    TooLong {
        /// How many there were.
        chars: usize,
        /// How many are allowed.
        limit: usize,
    },
}

impl Text {
    /// Takes a text of 1 to `limit` characters (Unicode scalar values).
    ///
    /// # Errors
    /// [`InvalidText`] says which bound it broke.
    pub fn new(text: String, limit: usize) -> Result<Self, InvalidText> {
        if text.is_empty() {
            return Err(InvalidText::Empty);
        }
        // Bytes bound characters from above: only a text that may be too long is counted.
        if text.len() > limit {
            let chars = text.chars().count();
            if chars > limit {
                return Err(InvalidText::TooLong { chars, limit });
            }
        }
        Ok(Self(text.into_boxed_str()))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What the retry of a key is compared by: it outlives an edit or a deletion of the text.
    ///
    /// SipHash-2-4-128 with the zero key. Collisions matter only to an author who sends two texts
    /// under one key.
    #[must_use]
    pub fn hash(&self) -> TextHash {
        let mut hasher = SipHasher24::new();
        hasher.write(self.0.as_bytes());
        TextHash(hasher.finish128().as_bytes())
    }
}

impl fmt::Debug for Text {
    /// Never the text itself: it would end up in a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Text({} bytes)", self.0.len())
    }
}

/// See [`Text::hash`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TextHash(pub [u8; 16]);

impl TextHash {
    /// The hash of a request that is not a text alone. Its parts are kept apart by a byte that no
    /// UTF-8 has.
    #[must_use]
    pub fn of(parts: &[&str]) -> Self {
        let mut hasher = SipHasher24::new();
        for part in parts {
            hasher.write(part.as_bytes());
            hasher.write(&[0xff]);
        }
        Self(hasher.finish128().as_bytes())
    }
}

/// The client's name for a send: 1 to 64 bytes, unique per author and dialog.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(Box<str>);

/// A key that is empty or longer than 64 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a key has 1 to {} bytes", Key::MAX_BYTES)]
pub struct InvalidKey;

impl Key {
    /// The longest key, in bytes.
    pub const MAX_BYTES: usize = 64;

    /// Takes a key.
    ///
    /// # Errors
    /// [`InvalidKey`] if it is empty or too long.
    pub fn new(key: String) -> Result<Self, InvalidKey> {
        if (1..=Self::MAX_BYTES).contains(&key.len()) {
            Ok(Self(key.into_boxed_str()))
        } else {
            Err(InvalidKey)
        }
    }

    /// The key.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A moment by a shard's clock: microseconds since 1970, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Timestamp(i64);

impl Timestamp {
    /// From microseconds since 1970.
    #[must_use]
    pub const fn from_micros(micros: i64) -> Self {
        Self(micros)
    }

    /// Microseconds since 1970.
    #[must_use]
    pub fn micros(self) -> i64 {
        self.0
    }

    /// Microseconds of an hour.
    pub const HOUR: i64 = 3_600_000_000;

    /// Hours since 1970.
    #[must_use]
    pub fn hour(self) -> i64 {
        self.0.max(0) / Self::HOUR
    }
}

/// Not a time in the notation of the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a time is written like 2026-11-21T05:00:00.123456Z")]
pub struct InvalidTimestamp;

impl FromStr for Timestamp {
    type Err = InvalidTimestamp;

    /// RFC 3339.
    fn from_str(s: &str) -> Result<Self, InvalidTimestamp> {
        let form = &time::format_description::well_known::Rfc3339;
        let at = time::OffsetDateTime::parse(s, form).map_err(|_| InvalidTimestamp)?;
        let micros =
            i64::try_from(at.unix_timestamp_nanos() / 1_000).map_err(|_| InvalidTimestamp)?;
        Ok(Self(micros))
    }
}

impl fmt::Display for Timestamp {
    /// RFC 3339 with microseconds, as on the wire: `2026-11-21T05:00:00.123456Z`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const FORM: &[time::format_description::FormatItem<'_>] = time::macros::format_description!(
            "[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z"
        );
        let at = time::OffsetDateTime::from_unix_timestamp_nanos(i128::from(self.0) * 1_000)
            .unwrap_or(time::OffsetDateTime::UNIX_EPOCH);
        f.write_str(&at.format(FORM).map_err(|_| fmt::Error)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(id: u64) -> UserId {
        UserId::new(id).unwrap()
    }

    #[test]
    fn a_user_id_is_an_integer_that_javascript_holds_exactly() {
        assert!(UserId::new(0).is_err());
        assert!(UserId::new(1 << 53).is_err());
        assert_eq!(user((1 << 53) - 1).get(), 9_007_199_254_740_991);
        for bad in [
            "",
            "0",
            "007",
            "+7",
            "-7",
            "7 ",
            "7.0",
            "9007199254740992",
            "99999999999999999999999",
            "٧",
        ] {
            assert_eq!(bad.parse::<UserId>(), Err(InvalidUserId), "{bad}");
        }
    }

    #[test]
    fn a_dialog_has_one_canonical_text_in_both_directions() {
        assert_eq!(DialogId::between(user(42), user(7)).to_string(), "7_42");
        assert_eq!(
            DialogId::between(user(7), user(42)),
            "7_42".parse().unwrap()
        );
        for bad in [
            "", "7", "42_7", "7_", "_7", "7_42_1", "07_42", "7-42", "r7", "f0", "f07", "f", "r",
        ] {
            assert_eq!(bad.parse::<DialogId>(), Err(InvalidDialogId), "{bad}");
        }
    }

    #[test]
    fn notes_to_self_have_one_user() {
        let notes = DialogId::between(user(7), user(7));
        assert_eq!(notes.to_string(), "7_7");
        assert_eq!(notes.users().count(), 1);
        assert_eq!(notes.counterpart(user(7)), Some(user(7)));
    }

    #[test]
    fn a_room_is_named_by_its_creator_and_key_and_a_feed_by_its_author() {
        let key = |key: &str| Key::new(key.into()).unwrap();
        let room = DialogId::room(user(7), &key("k"));
        let name = room.to_string();
        assert!(name.starts_with('r') && name.len() == 27, "{name}");
        assert_eq!(name.parse(), Ok(room));
        assert_eq!(room, DialogId::room(user(7), &key("k")));
        assert_ne!(room, DialogId::room(user(8), &key("k")));
        assert_ne!(room, DialogId::room(user(7), &key("l")));
        assert_eq!((room.users().count(), room.counterpart(user(7))), (0, None));
        for bad in [
            name.to_uppercase(),
            format!("{name}a"),
            format!("R{}", &name[1..]),
        ] {
            assert_eq!(bad.parse::<DialogId>(), Err(InvalidDialogId), "{bad}");
        }
        // The last digit has bits to spare, which must be zero.
        let spare = format!("{}b", &name[..26]);
        assert_eq!(spare.parse::<DialogId>(), Err(InvalidDialogId), "{spare}");
        assert_eq!("f7".parse(), Ok(DialogId::Feed(user(7))));
        assert_eq!(DialogId::Feed(user(7)).to_string(), "f7");
    }

    #[test]
    fn a_seq_counts_on_and_jumps_with_the_generation() {
        let first = Seq::ZERO.next(0);
        assert_eq!(first, Seq::new(1));
        assert_eq!(first.next(0), Seq::new(2));
        let jumped = Seq::new(2).next(1);
        assert_eq!(jumped.get(), (1 << 40) + 1);
        assert!(jumped.follows(Seq::new(2)));
        assert!(!Seq::new(4).follows(Seq::new(2)));
        assert!(!Seq::new(2).follows(Seq::new(2)));
    }

    #[test]
    fn a_text_is_counted_in_characters_and_kept_as_it_is() {
        assert_eq!(Text::new(String::new(), 3), Err(InvalidText::Empty));
        assert_eq!(Text::new("👩🏽‍🚀".into(), 4).unwrap().as_str(), "👩🏽‍🚀");
        assert_eq!(
            Text::new("abcd".into(), 3),
            Err(InvalidText::TooLong { chars: 4, limit: 3 })
        );
        assert_eq!(Text::new(" \u{0} ".into(), 3).unwrap().as_str(), " \u{0} ");
    }

    #[test]
    fn a_timestamp_is_written_as_rfc_3339() {
        assert_eq!(
            Timestamp::from_micros(1_795_237_200_123_456).to_string(),
            "2026-11-21T05:00:00.123456Z"
        );
        let back = "2026-11-21T05:00:00.123456Z".parse();
        assert_eq!(back, Ok(Timestamp::from_micros(1_795_237_200_123_456)));
        assert_eq!("yesterday".parse::<Timestamp>(), Err(InvalidTimestamp));
    }
}
