//! Rooms: made, changed and looked at. Who is in a room is decided by the shard that owns its slot,
//! in the transaction that stores an entry; see [`crate::domain::room`].

use super::error::RequestError;
use super::service::{Done, Messages, page_limit};
use crate::budget::cost;
use crate::domain::dialog::{DialogId, Key, Seq, UserId};
use crate::domain::room::{Refusal, RoomRequest, Settings, TITLE_CHARS};
use crate::domain::slot::Slot;
use crate::store::{Body, Range, RoomMember, RoomView, Shard};
use chat_wire::{ChangeRoomRequest, CreateRoomRequest, Room, RoomMembersPage};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Members of a page.
const MEMBERS_PAGE: u32 = 1000;

impl Messages {
    /// Makes a room of `me`. The same key names the same room. `answer` is called once, when the
    /// request is settled; it must not block.
    ///
    /// # Errors
    /// [`RequestError`]. After a retryable one the same key may be sent again.
    pub fn create_room(
        &self,
        me: UserId,
        request: CreateRoomRequest,
        answer: impl FnOnce(Result<Done, RequestError>) + Send + 'static,
    ) -> Result<(), RequestError> {
        let key = Key::new(request.key)?;
        let create = RoomRequest::Create {
            members: users(&request.members)?,
            settings: Settings {
                title: title(request.title)?,
                history: request.history,
            },
        };
        let body = self.room_body(create);
        self.submit(DialogId::room(me, &key), me, key, body, None, answer)
    }

    /// Changes a room. `answer` is called once, when the request is settled; it must not block.
    ///
    /// # Errors
    /// [`RequestError`]. After a retryable one the same key may be sent again.
    pub fn change_room(
        &self,
        me: UserId,
        room: &str,
        request: ChangeRoomRequest,
        answer: impl FnOnce(Result<Done, RequestError>) + Send + 'static,
    ) -> Result<(), RequestError> {
        let room = room_id(room)?;
        let key = Key::new(request.key)?;
        let (add, remove) = (users(&request.add)?, users(&request.remove)?);
        if add.intersection(&remove).next().is_some() {
            return Err(RequestError::BadRequest(
                "a user is added and removed by the same request",
            ));
        }
        let role = |(user, role): (String, _)| Ok((user.parse::<UserId>()?.get(), role));
        let roles = request.roles.into_iter().map(role);
        let change = RoomRequest::Change {
            add,
            remove,
            roles: roles.collect::<Result<BTreeMap<_, _>, RequestError>>()?,
            title: title(request.title)?,
        };
        let body = self.room_body(change);
        self.submit(room, me, key, body, None, answer)
    }

    fn room_body(&self, request: RoomRequest) -> Body {
        Body::Room {
            request,
            limit: self.inner.limits.room_members as usize,
        }
    }

    /// A room, as `me`, a member, sees it.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn room(&self, me: UserId, room: &str) -> Result<Room, RequestError> {
        let room = room_id(room)?;
        self.afford(me, cost::STATEMENT)?;
        let (view, member) = self.membership(me, room).await?;
        if member.until.is_some() {
            return Err(Refusal::NotMember.into());
        }
        Ok(Room {
            dialog: room.to_string(),
            title: view.settings.title,
            history: view.settings.history,
            members: view.members,
            role: member.role,
            read: member.read.get(),
        })
    }

    /// The members of a room of `me`, by user id above `after`; with `read_to`, those who have read
    /// up to there.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn room_members(
        &self,
        me: UserId,
        room: &str,
        after: Option<u64>,
        read_to: Option<u64>,
        limit: Option<u32>,
    ) -> Result<RoomMembersPage, RequestError> {
        let room = room_id(room)?;
        let after = after.map(UserId::new).transpose()?;
        let limit = page_limit(limit, MEMBERS_PAGE)?;
        self.room(me, &room.to_string()).await?;
        let read_to = read_to.map(Seq::new);
        let mut members = self.members_of(me, room, after, read_to, limit + 1).await?;
        self.charge(me, cost::answer(members.len(), 0));
        let more = members.len() > limit as usize;
        members.truncate(limit as usize);
        let next = members.last().filter(|_| more);
        Ok(RoomMembersPage {
            next: next.map(|last| last.user.get()),
            members: members
                .into_iter()
                .map(|member| chat_wire::RoomMember {
                    user: member.user.get(),
                    role: member.role,
                    read: member.read.get(),
                })
                .collect(),
        })
    }

    /// The members of a room that `me` is in, for an event that is not stored: those of a moment
    /// ago are good enough.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn room_audience(
        &self,
        me: UserId,
        room: DialogId,
    ) -> Result<Arc<[UserId]>, RequestError> {
        let users: Arc<[UserId]> = match self.inner.dispatch.members(room) {
            Some(members) => members.users,
            None => {
                let most = self.inner.limits.room_members;
                let members = self.members_of(me, room, None, None, most).await?;
                members.into_iter().map(|member| member.user).collect()
            }
        };
        if users.contains(&me) {
            Ok(users)
        } else {
            Err(Refusal::NotMember.into())
        }
    }

    async fn members_of(
        &self,
        me: UserId,
        room: DialogId,
        after: Option<UserId>,
        read_to: Option<Seq>,
        limit: u32,
    ) -> Result<Vec<RoomMember>, RequestError> {
        // The row of the slot is read first: while it is that of the owner, the members are there.
        let found = self.read_at_owner(
            Slot::of(room),
            |shard| async move {
                let view = shard.room(room, me).await?;
                let members = shard.room_members(me, room, after, read_to, limit);
                Ok((view, members.await?))
            },
            |(view, _)| view.slot.clone(),
            |_| true,
        );
        Ok(found.await?.1)
    }

    /// What a user is or was in a room.
    ///
    /// # Errors
    /// [`RequestError`], among them [`Refusal::NotMember`] and [`Refusal::NoRoom`].
    pub(super) async fn membership(
        &self,
        me: UserId,
        room: DialogId,
    ) -> Result<(RoomView, RoomMember), RequestError> {
        let read = |shard: Shard| async move { Ok(shard.room(room, me).await?) };
        let view = self
            .read_at_owner(Slot::of(room), read, |view| view.slot.clone(), |_| true)
            .await?;
        if view.slot.as_ref().is_some_and(|slot| slot.unmerged) {
            return Err(Refusal::Unavailable.into());
        }
        match view.me {
            Some(member) => Ok((view, member)),
            None if view.last_seq == Seq::ZERO => Err(Refusal::NoRoom.into()),
            None => Err(Refusal::NotMember.into()),
        }
    }
}

impl RoomMember {
    /// The part of a range that the member may read.
    #[must_use]
    pub fn clamp(&self, range: Range) -> Range {
        let end = self.until.map(|until| Seq::new(until.get() + 1));
        match (range, end) {
            (Range::Newest, None) => Range::Newest,
            (Range::Newest, Some(end)) => Range::Before(end),
            (Range::Before(seq), end) => Range::Before(end.map_or(seq, |end| seq.min(end))),
            (Range::After(seq), _) => {
                let before = Seq::new(self.since.get().saturating_sub(1));
                Range::After(seq.max(before))
            }
        }
    }

    /// Whether the member may read an entry.
    #[must_use]
    pub fn reads(&self, seq: Seq) -> bool {
        seq >= self.since && self.until.is_none_or(|until| seq <= until)
    }
}

/// The id of a room.
fn room_id(name: &str) -> Result<DialogId, RequestError> {
    let room = name
        .parse()
        .ok()
        .filter(|dialog: &DialogId| dialog.is_room());
    room.ok_or(RequestError::BadRequest("that is not the id of a room"))
}

fn users(ids: &[u64]) -> Result<BTreeSet<u64>, RequestError> {
    let ids = ids.iter().map(|id| Ok(UserId::new(*id)?.get()));
    ids.collect()
}

fn title(title: Option<String>) -> Result<Option<String>, RequestError> {
    match title {
        Some(title) if title.is_empty() || title.chars().count() > TITLE_CHARS => {
            Err(RequestError::BadRequest("a title has 1 to 128 characters"))
        }
        title => Ok(title),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use chat_wire::Role;

    #[test]
    fn a_range_is_cut_to_what_the_member_may_read() {
        let member = |since, until: Option<u64>| RoomMember {
            user: UserId::new(7).unwrap(),
            role: Role::Member,
            since: Seq::new(since),
            until: until.map(Seq::new),
            read: Seq::ZERO,
        };
        let (before, after) = (
            |seq| Range::Before(Seq::new(seq)),
            |seq| Range::After(Seq::new(seq)),
        );
        for (since, until, range, cut) in [
            (0, None, Range::Newest, Range::Newest),
            (5, None, Range::Newest, Range::Newest),
            (0, Some(9), Range::Newest, before(10)),
            (0, Some(9), before(20), before(10)),
            (0, Some(9), before(3), before(3)),
            (5, None, after(0), after(4)),
            (5, None, after(7), after(7)),
            (0, Some(9), after(7), after(7)),
        ] {
            assert_eq!(
                member(since, until).clamp(range),
                cut,
                "{since} {until:?} {range:?}"
            );
        }
        let member = member(5, Some(9));
        let read: Vec<u64> = (1..20).filter(|seq| member.reads(Seq::new(*seq))).collect();
        assert_eq!(read, [5, 6, 7, 8, 9]);
    }
}
