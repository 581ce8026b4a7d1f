//! Refusals as HTTP answers.

use crate::error::{ApiError, RequestName};
use actix_web::http::StatusCode;
use actix_web::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use actix_web::{HttpResponse, ResponseError};
use chat_wire::ErrorCode;
use std::fmt;

/// A refusal on its way to an HTTP client.
#[derive(Debug)]
pub struct HttpError(pub ApiError);

impl<T: Into<ApiError>> From<T> for HttpError {
    fn from(refusal: T) -> Self {
        Self(refusal.into())
    }
}

impl fmt::Display for HttpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The status of each code.
#[must_use]
pub fn status(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::BadRequest
        | ErrorCode::TextEmpty
        | ErrorCode::TextTooLong
        | ErrorCode::BadUser => StatusCode::BAD_REQUEST,
        ErrorCode::Unauthenticated => StatusCode::UNAUTHORIZED,
        ErrorCode::Forbidden | ErrorCode::NotMember => StatusCode::FORBIDDEN,
        ErrorCode::NotFound => StatusCode::NOT_FOUND,
        ErrorCode::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
        ErrorCode::RequestTimeout => StatusCode::REQUEST_TIMEOUT,
        ErrorCode::KeyReused | ErrorCode::RoomFull => StatusCode::CONFLICT,
        ErrorCode::RateLimited => StatusCode::TOO_MANY_REQUESTS,
        ErrorCode::Overloaded
        | ErrorCode::ShardDown
        | ErrorCode::RoomUnavailable
        | ErrorCode::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorCode::FrameTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl ResponseError for HttpError {
    fn status_code(&self) -> StatusCode {
        status(self.0.code)
    }

    fn error_response(&self) -> HttpResponse {
        let mut response = HttpResponse::build(self.status_code());
        if let Some(after) = self.0.retry_after {
            response.insert_header((RETRY_AFTER, after.as_secs().max(1)));
        }
        if self.0.code == ErrorCode::Unauthenticated {
            response.insert_header((WWW_AUTHENTICATE, "Bearer"));
        }
        if self.0.code == ErrorCode::RequestTimeout {
            // The rest of the request is not waited for.
            response.force_close();
        }
        response.json(self.0.clone().body(RequestName::default()))
    }
}
