//! The REST API.

use crate::request::{answer, answer_in_time};
use crate::{Access, ClientError};
use chat_wire::{HistoryPage, InboxPage, Message, ReadMark, ReadRequest, SendRequest, Sent};
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
    pub async fn send(&self, to: u64, key: &str, text: &str) -> Result<Sent, ClientError> {
        let url = self.access.url(&format!("/v1/dialogs/{to}/messages"));
        let body = SendRequest {
            key: key.to_owned(),
            text: text.to_owned(),
        };
        answer(self.with_token(self.access.http().post(url)).json(&body)).await
    }

    /// A page of the dialog with `with`; `query` as in the API: `before`, `after`, `limit`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn history(
        &self,
        with: u64,
        query: &[(&str, u64)],
    ) -> Result<HistoryPage, ClientError> {
        let url = self.access.url(&format!("/v1/dialogs/{with}/messages"));
        answer_in_time(self.with_token(self.access.http().get(url)).query(query)).await
    }

    /// The whole dialog with `with`, read upwards from the first message.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn log_upwards(&self, with: u64) -> Result<Vec<Message>, ClientError> {
        let mut log = Vec::<Message>::new();
        loop {
            let after = log.last().map_or(0, |message| message.seq);
            let page = self
                .history(with, &[("after", after), ("limit", 200)])
                .await?;
            log.extend(page.messages);
            if !page.more {
                return Ok(log);
            }
        }
    }

    /// The whole dialog with `with`, read downwards from the newest message; ascending.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn log_downwards(&self, with: u64) -> Result<Vec<Message>, ClientError> {
        let mut pages = Vec::new();
        let mut before = None;
        loop {
            let query: Vec<(&str, u64)> = before
                .map(|seq| ("before", seq))
                .into_iter()
                .chain([("limit", 200)])
                .collect();
            let page = self.history(with, &query).await?;
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

    /// Marks the dialog with `with` as read up to `seq`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn mark_read(&self, with: u64, seq: u64) -> Result<ReadMark, ClientError> {
        let url = self.access.url(&format!("/v1/dialogs/{with}/read"));
        answer_in_time(
            self.with_token(self.access.http().put(url))
                .json(&ReadRequest { seq }),
        )
        .await
    }
}
