//! The coordinator lock: a named lock at the first shard that answers. It only avoids duplicate
//! work; correctness does not depend on it.

use crate::cluster::TopologyView;
use crate::store::CoordinatorLock;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio_util::task::AbortOnDropHandle;

/// The lock as this instance holds it, or does not.
#[derive(Default)]
pub(super) struct CoordinatorLease {
    held: Option<Held>,
    /// Another instance had it when this one tried last.
    of_another: bool,
}

struct Held {
    /// The name of the shard that keeps the lock.
    shard: String,
    alive: Arc<AtomicBool>,
    _keeper: AbortOnDropHandle<()>,
}

/// Between two signs of life to the shard that keeps the lock.
const KEEP_EVERY: Duration = Duration::from_secs(1);

impl CoordinatorLease {
    /// Whether this instance holds the lock.
    pub fn is_held(&self) -> bool {
        let held = self.held.as_ref();
        held.is_some_and(|held| held.alive.load(Ordering::Relaxed))
    }

    /// Whether another instance has the lock.
    pub fn is_of_another(&self) -> bool {
        self.of_another
    }

    /// Tries to take the lock, or keeps it. `true` if this instance holds it now.
    pub async fn take(&mut self, view: &TopologyView) -> bool {
        let Some(shard) = view.shards.iter().find(|shard| !shard.is_down()) else {
            self.held = None;
            return false;
        };
        let there = self.held.as_ref().map(|held| held.shard.as_str()) == Some(shard.name());
        if there && self.is_held() {
            return true;
        }
        self.held = None;
        let lock = shard
            .ask(|store, _| async move { store.try_lock_coordinator().await })
            .await;
        self.of_another = matches!(lock, Ok(None));
        if let Ok(Some(lock)) = lock {
            let alive = Arc::new(AtomicBool::new(true));
            let keeper = tokio::spawn(keep(lock, alive.clone()));
            self.held = Some(Held {
                shard: shard.name().to_owned(),
                alive,
                _keeper: AbortOnDropHandle::new(keeper),
            });
        }
        self.is_held()
    }
}

async fn keep(mut lock: Box<dyn CoordinatorLock>, alive: Arc<AtomicBool>) {
    while lock.keep().await.is_ok() {
        tokio::time::sleep(KEEP_EVERY).await;
    }
    alive.store(false, Ordering::Relaxed);
}
