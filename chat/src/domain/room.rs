//! The rules of a room: who is in it, what each may do, and what a change makes of it.
//!
//! The members of a room are a fold of its log: every change is an entry, and an entry names the
//! result, so that applying the entries in order gives the same members everywhere. An entry is
//! decided and applied in the transaction that stores it, behind the lock of the room's row.

use super::dialog::{Seq, UserId};
use chat_wire::{Message, Role, RoomHistory};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Characters of a title.
pub const TITLE_CHARS: usize = 128;

/// A room as it is after an entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// The seq of the entry that last changed the members or the settings.
    pub rev: Seq,
    /// What is not about a single member.
    pub settings: Settings,
    /// Those who are in it now.
    pub members: BTreeMap<UserId, Member>,
}

/// The settings of a room, as they are stored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Its title.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// What those who join may read.
    #[serde(default)]
    pub history: RoomHistory,
}

/// A user who is in a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// What the user may do.
    pub role: Role,
    /// The seq of the entry that last changed this row.
    pub rev: Seq,
    /// Entries from here on can be read.
    pub since: Seq,
    /// The seq of the entry by which the user joined. The smallest joined first.
    pub joined: Seq,
}

/// What is asked of a room.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RoomRequest {
    /// Make it. The author is its owner.
    Create {
        /// Its first members, beside the author.
        members: BTreeSet<u64>,
        /// Its settings.
        settings: Settings,
    },
    /// Change it.
    Change {
        /// Users to add.
        add: BTreeSet<u64>,
        /// Users to remove; with the author among them, the author leaves.
        remove: BTreeSet<u64>,
        /// Roles to give.
        roles: BTreeMap<u64, Role>,
        /// A new title.
        title: Option<String>,
    },
}

/// What a request has made of a room: the content of an entry of the kind `member`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoomChange {
    /// Who has joined.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub joined: Vec<u64>,
    /// Who has left.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left: Vec<u64>,
    /// New roles.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub roles: BTreeMap<u64, Role>,
    /// The new title.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// With the first entry: what those who join may read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<RoomHistory>,
}

/// Why an entry is not taken. `error.rs` gives each its code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is no such room.
    #[error("there is no such room")]
    NoRoom,
    /// The author is not in it.
    #[error("you are not in this room")]
    NotMember,
    /// The author's role does not allow it.
    #[error("only {0} may do this")]
    Role(&'static str),
    /// It would have too many members.
    #[error("a room has at most {0} members")]
    Full(usize),
    /// The user whom it concerns is not in it.
    #[error("user {0} is not in this room")]
    Absent(u64),
    /// A shard that was declared down may have entries of it.
    #[error("the shard with the members of this room is declared down")]
    Unavailable,
}

impl Settings {
    /// Reads the column of a room; the settings of none if it has none, or those of another
    /// version.
    #[must_use]
    pub fn parse(text: Option<&str>) -> Self {
        let settings = text.and_then(|text| serde_json::from_str(text).ok());
        settings.unwrap_or_default()
    }

    /// The column.
    #[must_use]
    pub fn to_text(&self) -> String {
        // Every value is one that JSON can write.
        serde_json::to_string(self).unwrap_or_default()
    }
}

impl RoomRequest {
    /// Whether it makes a room.
    #[must_use]
    pub fn creates(&self) -> bool {
        matches!(self, RoomRequest::Create { .. })
    }
}

impl RoomChange {
    /// Reads what an entry holds; nothing if that is of another version.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        serde_json::from_str(text).unwrap_or_default()
    }

    /// What an entry holds.
    #[must_use]
    pub fn to_text(&self) -> String {
        // The keys are numbers, and every value is one that JSON can write.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Whether it changes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The users whose rows it changes.
    pub fn users(&self) -> impl Iterator<Item = UserId> {
        let users = self
            .joined
            .iter()
            .chain(&self.left)
            .chain(self.roles.keys());
        let users: BTreeSet<u64> = users.copied().collect();
        users.into_iter().filter_map(|user| UserId::new(user).ok())
    }

    /// Fills the fields of the wire format.
    pub fn describe(self, entry: &mut Message) {
        entry.joined = self.joined;
        entry.left = self.left;
        entry.title = self.title;
        let roles = self.roles.into_iter();
        entry.roles = roles.map(|(user, role)| (user.to_string(), role)).collect();
    }
}

impl Room {
    /// The change that a request of `author` makes, and the room does not have yet.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn decide(
        room: Option<&Room>,
        author: UserId,
        request: &RoomRequest,
        limit: usize,
    ) -> Result<RoomChange, Refusal> {
        match (room, request) {
            (_, RoomRequest::Create { members, settings }) => {
                let mut joined: BTreeSet<u64> = members.clone();
                joined.insert(author.get());
                if joined.len() > limit {
                    return Err(Refusal::Full(limit));
                }
                Ok(RoomChange {
                    joined: joined.into_iter().collect(),
                    roles: BTreeMap::from([(author.get(), Role::Owner)]),
                    title: settings.title.clone(),
                    history: Some(settings.history),
                    left: Vec::new(),
                })
            }
            (None, RoomRequest::Change { .. }) => Err(Refusal::NoRoom),
            (Some(room), RoomRequest::Change { .. }) => room.change(author, request, limit),
        }
    }

    fn change(
        &self,
        author: UserId,
        request: &RoomRequest,
        limit: usize,
    ) -> Result<RoomChange, Refusal> {
        let RoomRequest::Change {
            add,
            remove,
            roles,
            title,
        } = request
        else {
            return Ok(RoomChange::default());
        };
        let me = self.members.get(&author).ok_or(Refusal::NotMember)?;
        let role_of = |user: u64| {
            let user = UserId::new(user).ok()?;
            self.members.get(&user).map(|member| member.role)
        };
        let joined: Vec<u64> = add
            .iter()
            .copied()
            .filter(|user| role_of(*user).is_none())
            .collect();
        let left: Vec<u64> = remove
            .iter()
            .copied()
            .filter(|user| role_of(*user).is_some())
            .collect();
        let title = title
            .clone()
            .filter(|title| self.settings.title.as_ref() != Some(title));
        let manages = me.role >= Role::Admin;
        if !manages && (!joined.is_empty() || title.is_some()) {
            return Err(Refusal::Role("an admin"));
        }
        let others = left.iter().filter(|user| **user != author.get());
        let highest = others.filter_map(|user| role_of(*user)).max();
        if highest.is_some_and(|theirs| theirs >= me.role) {
            let who = if highest == Some(Role::Member) {
                "an admin"
            } else {
                "the owner"
            };
            return Err(Refusal::Role(who));
        }
        if !roles.is_empty() && me.role != Role::Owner {
            return Err(Refusal::Role("the owner"));
        }
        let mut change = RoomChange {
            joined,
            left,
            title,
            ..RoomChange::default()
        };
        for (user, role) in roles {
            let stays = !change.left.contains(user);
            let there = role_of(*user).is_some() || change.joined.contains(user);
            if !(stays && there) {
                return Err(Refusal::Absent(*user));
            }
            let before = role_of(*user).unwrap_or(Role::Member);
            if before != *role {
                change.roles.insert(*user, *role);
            }
        }
        self.keep_one_owner(author, &mut change)?;
        if self.members.len() + change.joined.len() - change.left.len() > limit
            && !change.joined.is_empty()
        {
            return Err(Refusal::Full(limit));
        }
        Ok(change)
    }

    /// A room has one owner as long as it has members: an owner who appoints another becomes an
    /// admin, and one who leaves is followed by the oldest admin, or else by the oldest member.
    fn keep_one_owner(&self, author: UserId, change: &mut RoomChange) -> Result<(), Refusal> {
        let owner = self
            .members
            .iter()
            .find(|(_, member)| member.role == Role::Owner);
        let Some((owner, _)) = owner else {
            return Ok(());
        };
        let appointed = |role: &Role| *role == Role::Owner;
        let count = change.roles.values().filter(|role| appointed(role)).count();
        if count > 1 {
            return Err(Refusal::Role("one user"));
        }
        let leaves = change.left.contains(&owner.get());
        if count == 1 {
            if !leaves {
                change.roles.insert(author.get(), Role::Admin);
            }
            return Ok(());
        }
        if !leaves {
            if change.roles.contains_key(&owner.get()) {
                return Err(Refusal::Role("another owner, named in the same request,"));
            }
            return Ok(());
        }
        let stays = self
            .members
            .iter()
            .filter(|(user, _)| !change.left.contains(&user.get()));
        let heir = stays.max_by_key(|(user, member)| {
            let role = change
                .roles
                .get(&user.get())
                .copied()
                .unwrap_or(member.role);
            (role, std::cmp::Reverse((member.joined, **user)))
        });
        let heir = heir.map(|(user, _)| user.get());
        if let Some(heir) = heir.or_else(|| change.joined.first().copied()) {
            change.roles.insert(heir, Role::Owner);
        }
        Ok(())
    }

    /// What the room is after the entry with this seq. Applied twice, it is the same.
    pub fn apply(&mut self, change: &RoomChange, seq: Seq) {
        if seq <= self.rev {
            return;
        }
        self.rev = seq;
        if let Some(history) = change.history {
            self.settings.history = history;
        }
        if change.title.is_some() {
            self.settings.title.clone_from(&change.title);
        }
        let since = match self.settings.history {
            RoomHistory::All => Seq::ZERO,
            RoomHistory::Since => seq,
        };
        for user in change
            .joined
            .iter()
            .filter_map(|user| UserId::new(*user).ok())
        {
            self.members.insert(
                user,
                Member {
                    role: Role::Member,
                    rev: seq,
                    since,
                    joined: seq,
                },
            );
        }
        for user in change
            .left
            .iter()
            .filter_map(|user| UserId::new(*user).ok())
        {
            self.members.remove(&user);
        }
        for (user, role) in &change.roles {
            let member = UserId::new(*user)
                .ok()
                .and_then(|user| self.members.get_mut(&user));
            if let Some(member) = member {
                (member.role, member.rev) = (*role, seq);
            }
        }
    }

    /// Who is sent an entry with this seq: the members who may read it.
    pub fn readers(&self, seq: Seq) -> impl Iterator<Item = UserId> {
        let reads = move |member: &Member| member.since <= seq;
        let members = self.members.iter();
        members.filter_map(move |(user, member)| reads(member).then_some(*user))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: usize = 5;

    fn user(id: u64) -> UserId {
        UserId::new(id).unwrap()
    }

    fn create(members: &[u64], history: RoomHistory) -> RoomRequest {
        RoomRequest::Create {
            members: members.iter().copied().collect(),
            settings: Settings {
                title: Some("t".into()),
                history,
            },
        }
    }

    fn change(add: &[u64], remove: &[u64], roles: &[(u64, Role)]) -> RoomRequest {
        RoomRequest::Change {
            add: add.iter().copied().collect(),
            remove: remove.iter().copied().collect(),
            roles: roles.iter().copied().collect(),
            title: None,
        }
    }

    /// 7 owns it, 8 is an admin, 9 and 10 are members.
    fn room() -> Room {
        let mut room = Room::default();
        let made = Room::decide(None, user(7), &create(&[8, 9, 10], RoomHistory::All), LIMIT);
        room.apply(&made.unwrap(), Seq::new(1));
        let raised = room.change(user(7), &change(&[], &[], &[(8, Role::Admin)]), LIMIT);
        room.apply(&raised.unwrap(), Seq::new(2));
        room
    }

    fn roles(room: &Room) -> Vec<(u64, Role)> {
        let members = room.members.iter();
        members
            .map(|(user, member)| (user.get(), member.role))
            .collect()
    }

    #[test]
    fn a_room_begins_with_its_owner_and_members() {
        let room = room();
        let (admin, member, owner) = (Role::Admin, Role::Member, Role::Owner);
        assert_eq!(
            roles(&room),
            [(7, owner), (8, admin), (9, member), (10, member)]
        );
        assert_eq!(room.settings.title.as_deref(), Some("t"));
        let many = create(&[1, 2, 3, 4, 5], RoomHistory::All);
        let refused = Room::decide(None, user(7), &many, LIMIT);
        assert_eq!(refused, Err(Refusal::Full(LIMIT)));
    }

    #[test]
    fn each_role_may_do_what_it_may() {
        let room = room();
        for (author, request, expected) in [
            (9, change(&[11], &[], &[]), Err(Refusal::Role("an admin"))),
            (9, change(&[], &[10], &[]), Err(Refusal::Role("an admin"))),
            (9, change(&[], &[9], &[]), Ok(())),
            (8, change(&[11], &[9], &[]), Ok(())),
            (8, change(&[], &[7], &[]), Err(Refusal::Role("the owner"))),
            (
                8,
                change(&[], &[], &[(9, Role::Admin)]),
                Err(Refusal::Role("the owner")),
            ),
            (7, change(&[], &[8], &[(9, Role::Admin)]), Ok(())),
            (
                7,
                change(&[], &[], &[(11, Role::Admin)]),
                Err(Refusal::Absent(11)),
            ),
            (7, change(&[11, 12], &[], &[]), Err(Refusal::Full(LIMIT))),
            (7, change(&[11, 12], &[9], &[]), Ok(())),
            (11, change(&[], &[11], &[]), Err(Refusal::NotMember)),
        ] {
            let decided = Room::decide(Some(&room), user(author), &request, LIMIT);
            assert_eq!(decided.map(drop), expected, "{author}: {request:?}");
        }
        let nothing = Room::decide(Some(&room), user(7), &change(&[8], &[11], &[]), LIMIT);
        assert!(nothing.unwrap().is_empty(), "that is so already");
        let none = Room::decide(None, user(7), &change(&[8], &[], &[]), LIMIT);
        assert_eq!(none, Err(Refusal::NoRoom));
    }

    #[test]
    fn a_room_with_members_has_one_owner() {
        for (author, request, expected) in [
            (
                7,
                change(&[], &[7], &[]),
                &[(8, Role::Owner), (9, Role::Member), (10, Role::Member)][..],
            ),
            (
                7,
                change(&[], &[7, 8], &[]),
                &[(9, Role::Owner), (10, Role::Member)],
            ),
            (
                7,
                change(&[], &[7], &[(10, Role::Owner)]),
                &[(8, Role::Admin), (9, Role::Member), (10, Role::Owner)],
            ),
            (
                7,
                change(&[], &[10], &[(9, Role::Owner)]),
                &[(7, Role::Admin), (8, Role::Admin), (9, Role::Owner)],
            ),
            (7, change(&[], &[7, 8, 9, 10], &[]), &[]),
        ] {
            let mut room = room();
            let decided = Room::decide(Some(&room), user(author), &request, LIMIT);
            room.apply(&decided.unwrap(), Seq::new(3));
            assert_eq!(roles(&room), expected, "{request:?}");
        }
        let two = change(&[], &[], &[(9, Role::Owner), (10, Role::Owner)]);
        assert!(Room::decide(Some(&room()), user(7), &two, LIMIT).is_err());
        let none = change(&[], &[], &[(7, Role::Member)]);
        assert!(Room::decide(Some(&room()), user(7), &none, LIMIT).is_err());
    }

    #[test]
    fn the_fold_is_the_same_however_often_an_entry_is_applied() {
        let (mut room, before) = (room(), room());
        let left = RoomChange {
            left: vec![9],
            ..RoomChange::default()
        };
        room.apply(&left, Seq::new(2));
        assert_eq!(room, before, "an earlier entry");
        room.apply(&left, Seq::new(3));
        room.apply(&left, Seq::new(3));
        assert_eq!(room.members.len(), 3);
        assert_eq!(RoomChange::parse(&left.to_text()), left);
        assert!(RoomChange::parse("of a later version").is_empty());
    }

    #[test]
    fn those_who_join_read_what_the_room_allows() {
        let mut room = Room::default();
        let made = Room::decide(None, user(7), &create(&[8], RoomHistory::Since), LIMIT);
        room.apply(&made.unwrap(), Seq::new(1));
        let added = Room::decide(Some(&room), user(7), &change(&[9], &[], &[]), LIMIT);
        room.apply(&added.unwrap(), Seq::new(5));
        let readers = |seq| {
            room.readers(Seq::new(seq))
                .map(UserId::get)
                .collect::<Vec<_>>()
        };
        assert_eq!((readers(4), readers(5)), (vec![7, 8], vec![7, 8, 9]));
    }
}
