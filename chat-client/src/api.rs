//! The REST API.

use crate::request::{answer, answer_in_time, answer_or_nothing};
use crate::{Access, ClientError, To};
use chat_wire::{
    ChangeRoomRequest, CreateRoomRequest, HistoryPage, InboxPage, Message, ReadMark, ReadRequest,
    Room, RoomMember, RoomMembersPage, SendRequest, Sent,
};
use reqwest::RequestBuilder;

/// One user's requests over REST.
#[derive(Clone)]
pub struct Api {
    access: Access,
    user: u64,
    token: String,
}

impl Api {
    /// Comes by a token for `user`.
    ///
    /// # Errors
    /// If there is none to be had.
    pub async fn new(access: Access, user: u64) -> Result<Self, ClientError> {
        let token = access.token(user).await?;
        Ok(Self {
            access,
            user,
            token,
        })
    }

    /// Who asks.
    #[must_use]
    pub fn user(&self) -> u64 {
        self.user
    }

    fn with_token(&self, request: RequestBuilder) -> RequestBuilder {
        request.bearer_auth(&self.token)
    }

    /// Stores a message once.
    ///
    /// # Errors
    /// [`ClientError`]; a retryable refusal is not repeated here.
    pub async fn send(
        &self,
        to: impl Into<To>,
        key: &str,
        text: &str,
    ) -> Result<Sent, ClientError> {
        let url = self.access.url(&(to.into().path() + "/messages"));
        let body = SendRequest {
            key: key.to_owned(),
            text: text.to_owned(),
        };
        answer(self.with_token(self.access.http().post(url)).json(&body)).await
    }

    /// A page of a dialog; `query` as in the API: `before`, `after`, `limit`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn history(
        &self,
        of: impl Into<To>,
        query: &[(&str, u64)],
    ) -> Result<HistoryPage, ClientError> {
        let url = self.access.url(&(of.into().path() + "/messages"));
        answer_in_time(self.with_token(self.access.http().get(url)).query(query)).await
    }

    /// A whole dialog, read upwards from the first message.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn log_upwards(&self, of: impl Into<To>) -> Result<Vec<Message>, ClientError> {
        let of = of.into();
        let mut log = Vec::<Message>::new();
        loop {
            let after = log.last().map_or(0, |message| message.seq);
            let page = self
                .history(&of, &[("after", after), ("limit", 200)])
                .await?;
            log.extend(page.messages);
            if !page.more {
                return Ok(log);
            }
        }
    }

    /// A whole dialog, read downwards from the newest message; ascending.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn log_downwards(&self, of: impl Into<To>) -> Result<Vec<Message>, ClientError> {
        let of = of.into();
        let mut pages = Vec::new();
        let mut before = None;
        loop {
            let query: Vec<(&str, u64)> = before
                .map(|seq| ("before", seq))
                .into_iter()
                .chain([("limit", 200)])
                .collect();
            let page = self.history(&of, &query).await?;
            before = Some(page.first);
            let more = page.more;
            pages.push(page.messages);
            if !more {
                return Ok(pages.into_iter().rev().flatten().collect());
            }
        }
    }

    /// A page of the inbox.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn inbox(&self, limit: u32, cursor: Option<&str>) -> Result<InboxPage, ClientError> {
        let request = self
            .with_token(self.access.http().get(self.access.url("/v1/dialogs")))
            .query(&[("limit", limit)]);
        answer_in_time(match cursor {
            Some(cursor) => request.query(&[("cursor", cursor)]),
            None => request,
        })
        .await
    }

    /// Marks a dialog as read up to `seq`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn mark_read(&self, of: impl Into<To>, seq: u64) -> Result<ReadMark, ClientError> {
        let url = self.access.url(&(of.into().path() + "/read"));
        answer_in_time(
            self.with_token(self.access.http().put(url))
                .json(&ReadRequest { seq }),
        )
        .await
    }

    /// Makes a room; its id is the `dialog` of the answer. The same key names the same room, so it
    /// is asked for again as long as it is asked for too fast.
    ///
    /// # Errors
    /// [`ClientError`]; another retryable refusal is not repeated here.
    pub async fn create_room(&self, room: &CreateRoomRequest) -> Result<Sent, ClientError> {
        let url = self.access.url("/v1/rooms");
        answer_in_time(self.with_token(self.access.http().post(url)).json(room)).await
    }

    /// Changes a room; `None` if it is like that already.
    ///
    /// # Errors
    /// [`ClientError`]; a retryable refusal is not repeated here.
    pub async fn change_room(
        &self,
        room: &str,
        change: &ChangeRoomRequest,
    ) -> Result<Option<Sent>, ClientError> {
        let url = self.access.url(&format!("/v1/rooms/{room}/members"));
        answer_or_nothing(self.with_token(self.access.http().post(url)).json(change)).await
    }

    /// A room of this user.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn room(&self, room: &str) -> Result<Room, ClientError> {
        let url = self.access.url(&format!("/v1/rooms/{room}"));
        answer_in_time(self.with_token(self.access.http().get(url))).await
    }

    /// All members of a room.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn room_members(&self, room: &str) -> Result<Vec<RoomMember>, ClientError> {
        self.all_members(&format!("/v1/rooms/{room}/members"), None)
            .await
    }

    /// The members of a room who have read up to a message.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn room_readers(&self, room: &str, seq: u64) -> Result<Vec<RoomMember>, ClientError> {
        self.all_members(&format!("/v1/rooms/{room}/readers"), Some(seq))
            .await
    }

    async fn all_members(
        &self,
        path: &str,
        seq: Option<u64>,
    ) -> Result<Vec<RoomMember>, ClientError> {
        let (mut members, mut after) = (Vec::new(), None);
        loop {
            let query = [("seq", seq), ("after", after), ("limit", Some(1000))];
            let query = query.map(|(name, value)| value.map(|value| (name, value)));
            let query: Vec<(&str, u64)> = query.into_iter().flatten().collect();
            let request = self.with_token(self.access.http().get(self.access.url(path)));
            let page: RoomMembersPage = answer_in_time(request.query(&query)).await?;
            members.extend(page.members);
            after = page.next;
            if after.is_none() {
                return Ok(members);
            }
        }
    }
}
