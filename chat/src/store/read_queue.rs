//! The queue in front of the read connections of a shard: round robin by payer. A user with many
//! requests waits behind their own ones, and every other user behind one of them at most.

use crate::domain::dialog::UserId;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::timeout;

/// The payer of a read; `None` for the service itself.
pub type Payer = Option<UserId>;

/// The permits of one shard.
pub struct ReadQueue {
    state: Arc<Mutex<State>>,
    limit: Duration,
}

struct State {
    free: usize,
    waiting: HashMap<Payer, VecDeque<oneshot::Sender<ReadPermit>>>,
    /// Payers with waiting reads, in the order in which they are served.
    order: VecDeque<Payer>,
}

/// A permit; the next read gets it when this is dropped.
pub struct ReadPermit {
    state: Arc<Mutex<State>>,
}

/// No permit: too many reads of this payer wait already, or it did not come in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Busy;

/// The number of reads of one payer that may wait for one shard.
const WAITING: usize = 64;

impl ReadQueue {
    /// A queue with this many permits. A read that has waited for `limit` is refused as busy.
    #[must_use]
    pub fn new(at_once: usize, limit: Duration) -> Self {
        Self {
            state: Arc::new(Mutex::new(State {
                free: at_once.max(1),
                waiting: HashMap::new(),
                order: VecDeque::new(),
            })),
            limit,
        }
    }

    /// Waits for a permit.
    ///
    /// # Errors
    /// [`Busy`].
    ///
    /// # Cancel safety
    /// If it is dropped, the read does not wait any more.
    pub async fn take(&self, payer: Payer) -> Result<ReadPermit, Busy> {
        let turn = {
            let mut state = lock(&self.state);
            if state.free > 0 {
                state.free -= 1;
                return Ok(ReadPermit {
                    state: self.state.clone(),
                });
            }
            let (sender, turn) = oneshot::channel();
            let waiting = state.waiting.entry(payer).or_default();
            // Cancelled reads make room for new ones.
            waiting.retain(|waiting| !waiting.is_closed());
            if waiting.len() >= WAITING {
                return Err(Busy);
            }
            waiting.push_back(sender);
            if !state.order.contains(&payer) {
                state.order.push_back(payer);
            }
            turn
        };
        match timeout(self.limit, turn).await {
            Ok(Ok(turn)) => Ok(turn),
            Ok(Err(_)) | Err(_) => Err(Busy),
        }
    }
}

impl Drop for ReadPermit {
    fn drop(&mut self) {
        // Handed to the next read that waits. If that is cancelled at this moment, it drops the
        // permit and so hands it on.
        let state = self.state.clone();
        let next = lock(&self.state).next();
        if let Some(next) = next {
            drop(next.send(ReadPermit { state }));
        }
    }
}

impl State {
    /// The next read that waits; without one, the permit is free.
    fn next(&mut self) -> Option<oneshot::Sender<ReadPermit>> {
        while let Some(payer) = self.order.pop_front() {
            let Some(waiting) = self.waiting.get_mut(&payer) else {
                continue;
            };
            let sender = std::iter::from_fn(|| waiting.pop_front()).find(|next| !next.is_closed());
            if waiting.is_empty() {
                self.waiting.remove(&payer);
            } else {
                self.order.push_back(payer);
            }
            if sender.is_some() {
                return sender;
            }
        }
        self.free += 1;
        None
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    fn user(id: u64) -> Payer {
        Some(UserId::new(id).unwrap())
    }

    const LIMIT: Duration = Duration::from_secs(1);

    #[tokio::test]
    async fn payers_are_served_in_turn_however_much_one_asks_for() {
        let turns = ReadQueue::new(1, LIMIT);
        let first = turns.take(user(1)).await.unwrap();
        let mut greedy: Vec<_> = (0..10).map(|_| Box::pin(turns.take(user(1)))).collect();
        for waiting in &mut greedy {
            assert!(waiting.now_or_never().is_none());
        }
        let mut modest = Box::pin(turns.take(user(2)));
        assert!((&mut modest).now_or_never().is_none());
        drop(first);
        let second = (&mut greedy[0]).now_or_never().unwrap().unwrap();
        drop(second);
        assert!(modest.now_or_never().unwrap().is_ok(), "behind one of them");
    }

    #[tokio::test]
    async fn what_nobody_waits_for_any_more_is_passed_over() {
        let turns = ReadQueue::new(1, LIMIT);
        let first = turns.take(user(1)).await.unwrap();
        let mut gone = Box::pin(turns.take(user(1)));
        assert!((&mut gone).now_or_never().is_none());
        let mut stays = Box::pin(turns.take(user(1)));
        assert!((&mut stays).now_or_never().is_none());
        drop(gone);
        drop(first);
        let turn = stays.now_or_never().unwrap().unwrap();
        drop(turn);
        assert!(turns.take(user(3)).now_or_never().unwrap().is_ok());
        assert_eq!(lock(&turns.state).free, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn too_many_of_one_payer_are_refused_at_once_and_who_waits_too_long_is_too() {
        let turns = ReadQueue::new(1, LIMIT);
        let _first = turns.take(user(1)).await.unwrap();
        let mut waiting: Vec<_> = (0..WAITING)
            .map(|_| Box::pin(turns.take(user(1))))
            .collect();
        for waiting in &mut waiting {
            assert!(waiting.now_or_never().is_none());
        }
        assert!(matches!(
            turns.take(user(1)).now_or_never(),
            Some(Err(Busy))
        ));
        let others = turns.take(None);
        assert!(matches!(others.await, Err(Busy)), "in the end");
    }
}
