//! Who reads from a shard next. Reads wait in front of the connections, by payer and round robin: a user who asks for much waits
//! behind their own requests, and everybody else behind one of them at most.

use crate::domain::dialog::UserId;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::timeout;

/// Whose read it is; `None` for the service's own.
pub type Payer = Option<UserId>;

/// The turns of one shard.
pub struct ReadQueue {
    state: Arc<Mutex<State>>,
    limit: Duration,
}

struct State {
    free: usize,
    waiting: HashMap<Payer, VecDeque<oneshot::Sender<ReadPermit>>>,
    /// Payers with something waiting, in the order in which they are served.
    order: VecDeque<Payer>,
}

/// A turn; the next has it when this is dropped.
pub struct ReadPermit {
    state: Arc<Mutex<State>>,
}

/// No turn: too many reads of this payer wait already, or it did not come in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Busy;

/// Reads of one payer that may wait for one shard.
const WAITING: usize = 64;

impl ReadQueue {
    /// So many at once; who has waited for `limit` is told that the shard is busy.
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

    /// Waits for a turn.
    ///
    /// # Errors
    /// [`Busy`].
    ///
    /// # Cancel safety
    /// Dropped, it waits no more, and nothing is done for it.
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
            // Those that have gone make room for those that have not.
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
        // Handed to the next who is there; one that goes at this very moment drops it, and so hands it on.
        let state = self.state.clone();
        let next = lock(&self.state).next();
        if let Some(next) = next {
            drop(next.send(ReadPermit { state }));
        }
    }
}

impl State {
    /// The next who waits; without any, a turn is free from now on.
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
