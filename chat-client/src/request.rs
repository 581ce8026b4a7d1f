//! A request over HTTP, and its answer or error.

use crate::ClientError;
use chat_wire::{ErrorBody, ErrorCode};
use reqwest::RequestBuilder;
use serde::de::DeserializeOwned;
use std::time::Duration;

/// Sends a request and reads its answer or its refusal.
pub(crate) async fn answer<T: DeserializeOwned>(request: RequestBuilder) -> Result<T, ClientError> {
    let nothing = || ClientError::Connection("the server answered nothing".into());
    answer_or_nothing(request).await?.ok_or_else(nothing)
}

/// As [`answer`]; `None` if there is nothing to say.
pub(crate) async fn answer_or_nothing<T: DeserializeOwned>(
    request: RequestBuilder,
) -> Result<Option<T>, ClientError> {
    let connection = |e: reqwest::Error| ClientError::Connection(e.to_string());
    let response = request.send().await.map_err(connection)?;
    if response.status() == reqwest::StatusCode::NO_CONTENT {
        return Ok(None);
    }
    if response.status().is_success() {
        return response.json().await.map(Some).map_err(connection);
    }
    let status = response.status();
    match response.json::<ErrorBody>().await {
        Ok(body) => Err(ClientError::Refused(Box::new(body))),
        Err(_) => Err(ClientError::Connection(format!(
            "the server answered {status}"
        ))),
    }
}

/// As [`answer`], for reads: who reads too fast waits for as long as the server says.
pub(crate) async fn answer_in_time<T: DeserializeOwned>(
    mut request: RequestBuilder,
) -> Result<T, ClientError> {
    loop {
        let again = request.try_clone();
        match (answer(request).await, again) {
            (Err(ClientError::Refused(body)), Some(again))
                if body.code == ErrorCode::RateLimited =>
            {
                let wait = body.retry_after_ms.unwrap_or(1000);
                tokio::time::sleep(Duration::from_millis(wait)).await;
                request = again;
            }
            (answer, _) => return answer,
        }
    }
}
