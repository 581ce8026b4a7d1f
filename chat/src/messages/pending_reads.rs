//! Requests for the same page share one read, as long as it has not begun: a read that has begun
//! may not see the latest message.

use crate::domain::dialog::{DialogId, UserId};
use crate::metrics::Metrics;
use crate::store::{Page, Range, Shard, ShardError};
use futures_util::future::{BoxFuture, FutureExt, WeakShared};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

type PageKey = (String, DialogId, Range, u32);
type PageRead = BoxFuture<'static, Result<Arc<Page>, ShardError>>;

/// Reads of pages that have not begun.
#[derive(Clone, Default)]
pub(super) struct PendingReads {
    waiting: Arc<Mutex<HashMap<PageKey, WeakShared<PageRead>>>>,
}

impl PendingReads {
    /// Reads a page, together with the other requests for it.
    pub async fn read(
        &self,
        payer: UserId,
        shard: Shard,
        dialog: DialogId,
        range: Range,
        limit: u32,
        metrics: &Arc<Metrics>,
    ) -> Result<Arc<Page>, ShardError> {
        let key = (shard.name().to_owned(), dialog, range, limit);
        let page = {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(page) = waiting.get(&key).and_then(WeakShared::upgrade) {
                metrics.history_shared.inc();
                page
            } else {
                metrics.history_reads.inc();
                let begins = LeavesList {
                    pages: self.clone(),
                    key: key.clone(),
                };
                let page = async move {
                    // The permit comes when a connection is free: until then other requests may
                    // join.
                    let permit = shard.read_permit(Some(payer)).await;
                    drop(begins);
                    let permit = permit?;
                    let page = shard.page(dialog, range, limit).await;
                    drop(permit);
                    page.map(Arc::new)
                };
                let page = page.boxed().shared();
                // Weak: when all requests that wait are dropped, so is the read, and its place in
                // the queue.
                if let Some(weak) = page.downgrade() {
                    waiting.insert(key, weak);
                }
                page
            }
        };
        page.await
    }
}

/// Removes a read from the list when it begins, and when all requests that wait for it were
/// dropped.
struct LeavesList {
    pages: PendingReads,
    key: PageKey,
}

impl Drop for LeavesList {
    fn drop(&mut self) {
        self.pages
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.key);
    }
}
