//! Jitter and names: random, unless a simulation has given this thread a seed, so that what it
//! finds can be found again.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::cell::RefCell;

thread_local! {
    static SEEDED: RefCell<Option<StdRng>> = const { RefCell::new(None) };
}

/// From now on everything random on this thread follows from `seed`.
pub fn seed(seed: u64) {
    SEEDED.set(Some(StdRng::seed_from_u64(seed)));
}

/// A number from 0 to 1, for jitter.
#[must_use]
pub fn fraction() -> f64 {
    SEEDED.with_borrow_mut(|seeded| match seeded {
        Some(rng) => rng.random(),
        None => rand::random(),
    })
}

/// A number for a unique name.
#[must_use]
pub fn number() -> u128 {
    SEEDED.with_borrow_mut(|seeded| match seeded {
        Some(rng) => rng.random(),
        None => rand::random(),
    })
}
