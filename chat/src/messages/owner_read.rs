//! Reads a dialog from the shard that owns its slot, also while the slot moves.

use super::error::RequestError;
use super::service::Messages;
use crate::cluster::OwnerRetry;
use crate::domain::ownership::{SlotState, SlotView};
use crate::domain::slot::Slot;
use crate::store::Shard;

impl Messages {
    /// What `read` finds at the owner of a slot. `view` gives the row of the slot that was read in
    /// the same snapshot; `accept` says whether the answer will do, or is to be read again.
    ///
    /// # Errors
    /// [`RequestError`].
    pub(super) async fn read_at_owner<T, F: Future<Output = Result<T, RequestError>>>(
        &self,
        slot: Slot,
        read: impl Fn(Shard) -> F,
        view: impl Fn(&T) -> Option<SlotView>,
        accept: impl Fn(&T) -> bool,
    ) -> Result<T, RequestError> {
        let cluster = &self.inner.cluster;
        let mut retry = OwnerRetry::default();
        while retry.next().await {
            if retry.is_repeat() {
                cluster.find(slot).await;
            }
            let shard = cluster.route(slot).ok_or(RequestError::Unavailable)?;
            let found = read(shard).await?;
            let Some(row) = view(&found) else { continue };
            let found = match (row.state, &row.peer) {
                (SlotState::Owner, _) => found,
                (SlotState::Sealed, Some(peer)) => {
                    // It was not written to since it was sealed, unless the target has taken over
                    // already.
                    let Some(peer) = cluster.view().shard(peer).cloned() else {
                        return Err(RequestError::Unavailable);
                    };
                    let theirs = read(peer).await?;
                    let state = view(&theirs).map(|row| row.state);
                    match state {
                        Some(SlotState::Owner) => theirs,
                        Some(SlotState::Incoming) => found,
                        Some(SlotState::None | SlotState::Sealed | SlotState::Fenced) | None => {
                            continue;
                        }
                    }
                }
                (
                    SlotState::None | SlotState::Sealed | SlotState::Incoming | SlotState::Fenced,
                    _,
                ) => continue,
            };
            if accept(&found) {
                return Ok(found);
            }
        }
        Err(RequestError::Unavailable)
    }
}
