//! What each user may cost an instance: one budget over all sessions and REST, in units of work at
//! a shard or on the bus.
//!
//! A request is let in while anything is left, and pays when it is known what it cost: so the
//! balance may fall below zero, and the user waits until it is above again.

use crate::domain::dialog::UserId;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// What things cost.
pub mod cost {
    /// A statement at a shard, or a subscription or question on the bus.
    pub const STATEMENT: u32 = 1;

    /// A read mark: many share a transaction.
    pub const MARK: u32 = 3;

    /// A query for all messages of a user since a time, at every shard.
    pub const RESUME: u32 = 20;

    /// Dialogs of an inbox that a unit pays for: what is unread is counted for each.
    const DIALOGS: usize = 4;

    /// One shard's dialogs of an inbox, or the last seqs of so many dialogs.
    #[must_use]
    pub fn inbox(dialogs: usize) -> u32 {
        u32::try_from(dialogs / DIALOGS).unwrap_or(u32::MAX)
    }

    /// Rows and bytes that a unit pays for.
    const ROWS: usize = 20;
    const BYTES: usize = 16 * 1024;

    /// An answer of so many rows and bytes.
    #[must_use]
    pub fn answer(rows: usize, bytes: usize) -> u32 {
        u32::try_from(rows / ROWS + bytes / BYTES).unwrap_or(u32::MAX)
    }
}

/// The budgets of all users.
pub struct Budgets {
    per_second: f64,
    most: f64,
    /// Cut by user, so that no single lock sees every request.
    stripes: Vec<Mutex<HashMap<UserId, Balance>>>,
}

#[derive(Clone, Copy)]
struct Balance {
    left: f64,
    at: Instant,
}

const STRIPES: u64 = 16;

/// Users of a stripe; beyond it, users with a full budget are removed.
const CROWD: usize = 4096;

impl Budgets {
    /// `per_second` units in the long run, and `most` at once.
    #[must_use]
    pub fn new(per_second: u32, most: u32) -> Self {
        Self {
            per_second: f64::from(per_second.max(1)),
            most: f64::from(most.max(1)),
            stripes: (0..STRIPES).map(|_| Mutex::default()).collect(),
        }
    }

    fn stripe(&self, user: UserId) -> MutexGuard<'_, HashMap<UserId, Balance>> {
        let stripe = &self.stripes[(user.get() % STRIPES) as usize];
        stripe.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self, balance: Balance, now: Instant) -> f64 {
        let earned = (now - balance.at).as_secs_f64() * self.per_second;
        (balance.left + earned).min(self.most)
    }

    /// Takes what a request costs at least.
    ///
    /// # Errors
    /// Nothing is left; how long to wait.
    pub fn take(&self, user: UserId, units: u32) -> Result<(), Duration> {
        let now = Instant::now();
        let mut stripe = self.stripe(user);
        let left = stripe
            .get(&user)
            .map_or(self.most, |balance| self.now(*balance, now));
        if left <= 0.0 {
            let wait = (1.0 - left) / self.per_second;
            return Err(Duration::from_secs_f64(wait));
        }
        if stripe.len() >= CROWD && !stripe.contains_key(&user) {
            stripe.retain(|_, balance| self.now(*balance, now) < self.most);
        }
        let left = left - f64::from(units);
        stripe.insert(user, Balance { left, at: now });
        Ok(())
    }

    /// Takes what it turned out to cost beyond that.
    pub fn charge(&self, user: UserId, units: u32) {
        let now = Instant::now();
        if let Some(balance) = self.stripe(user).get_mut(&user) {
            let left = self.now(*balance, now) - f64::from(units);
            *balance = Balance { left, at: now };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(id: u64) -> UserId {
        UserId::new(id).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_is_let_in_while_anything_is_left_and_pays_what_it_cost() {
        let budgets = Budgets::new(10, 20);
        assert_eq!(budgets.take(user(7), 1), Ok(()));
        budgets.charge(user(7), 29);
        let wait = budgets.take(user(7), 1).unwrap_err();
        assert!((1.0..1.2).contains(&wait.as_secs_f64()), "{wait:?}");
        assert_eq!(budgets.take(user(8), 1), Ok(()), "each has its own");
        tokio::time::advance(wait).await;
        assert_eq!(budgets.take(user(7), 1), Ok(()));
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert_eq!(budgets.take(user(7), 20), Ok(()));
        assert!(
            budgets.take(user(7), 1).is_err(),
            "no more than so many at once"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn users_who_have_been_quiet_are_forgotten() {
        let budgets = Budgets::new(10, 20);
        for n in 1..=CROWD as u64 {
            budgets.take(user(n * STRIPES), 1).unwrap();
        }
        tokio::time::advance(Duration::from_secs(1)).await;
        budgets.take(user((CROWD as u64 + 1) * STRIPES), 1).unwrap();
        assert_eq!(budgets.stripe(user(STRIPES)).len(), 1);
    }

    #[test]
    fn what_an_answer_costs_grows_with_its_rows_and_bytes() {
        assert_eq!(cost::answer(19, 1000), 0);
        assert_eq!(cost::answer(200, 100_000), 16);
    }
}
