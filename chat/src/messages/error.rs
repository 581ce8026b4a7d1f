//! Why a request was not carried out.

use super::dispatch::SubmitError;
use super::slot_queue::Unsettled;
use crate::domain::dialog::{InvalidKey, InvalidText, InvalidUserId};
use crate::domain::room::Refusal;
use crate::store::ShardError;
use std::time::Duration;

/// What was asked for is not done, and why. `error.rs` gives each its code.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum RequestError {
    #[error(transparent)]
    InvalidUserId(#[from] InvalidUserId),
    #[error(transparent)]
    InvalidText(#[from] InvalidText),
    #[error(transparent)]
    InvalidKey(#[from] InvalidKey),
    #[error("{0}")]
    BadRequest(&'static str),
    #[error("this key was already used in this dialog for another text")]
    KeyReused,
    #[error("too many sends: at most {limit} a second")]
    RateLimited { limit: u32, retry_after: Duration },
    #[error(
        "too much work: each user has a budget for reads, marks and watches; see the limits in welcome"
    )]
    TooMuchWork { retry_after: Duration },
    #[error("too much is waiting for the shard already")]
    Overloaded,
    #[error("the shard of this dialog does not answer")]
    ShardDown,
    #[error("not through in time; it may or may not be done")]
    Unavailable,
    #[error("there is no such dialog yet")]
    NoDialog,
    #[error("this dialog is not one of yours")]
    NotYours,
    #[error(transparent)]
    Refused(#[from] Refusal),
}

impl From<SubmitError> for RequestError {
    fn from(not_taken: SubmitError) -> Self {
        match not_taken {
            SubmitError::NoRoute => RequestError::Unavailable,
            SubmitError::ShardDown => RequestError::ShardDown,
            SubmitError::Full => RequestError::Overloaded,
        }
    }
}

impl From<Unsettled> for RequestError {
    fn from(unsettled: Unsettled) -> Self {
        match unsettled {
            Unsettled::ShardDown => RequestError::ShardDown,
            Unsettled::Unavailable => RequestError::Unavailable,
        }
    }
}

impl From<ShardError> for RequestError {
    /// Of a read.
    fn from(e: ShardError) -> Self {
        match e {
            ShardError::Unreachable(_) => RequestError::ShardDown,
            ShardError::Busy(_) => RequestError::Overloaded,
            ShardError::Failed(shard, e) => {
                tracing::warn!(%shard, reason = %e, "read failed");
                RequestError::Unavailable
            }
        }
    }
}
