//! How many connections there are, by address and altogether.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

/// Counts connections, by address and altogether. A clone counts on the same slate.
#[derive(Clone)]
pub struct ConnectionLimiter {
    by_address: Arc<Mutex<HashMap<IpAddr, usize>>>,
    places: Arc<tokio::sync::Semaphore>,
    per_address: usize,
}

impl ConnectionLimiter {
    /// At most `per_address` from one address, and `altogether`.
    #[must_use]
    pub fn new(per_address: usize, altogether: usize) -> Self {
        let places = altogether.min(tokio::sync::Semaphore::MAX_PERMITS);
        Self {
            by_address: Arc::default(),
            places: Arc::new(tokio::sync::Semaphore::new(places)),
            per_address,
        }
    }

    /// Takes a place, which is given back when it is dropped; `None` if there is none.
    #[must_use]
    pub fn take(&self, address: Option<IpAddr>) -> Option<ConnectionPermit> {
        let place = self.places.clone().try_acquire_owned().ok()?;
        if let Some(address) = address {
            let mut by_address = self
                .by_address
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let count = by_address.entry(address).or_default();
            if *count >= self.per_address {
                return None;
            }
            *count += 1;
        }
        Some(ConnectionPermit {
            by_address: self.by_address.clone(),
            address,
            _place: place,
        })
    }
}

/// A place among the connections.
pub struct ConnectionPermit {
    by_address: Arc<Mutex<HashMap<IpAddr, usize>>>,
    address: Option<IpAddr>,
    _place: tokio::sync::OwnedSemaphorePermit,
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let Some(address) = self.address else { return };
        let mut by_address = self
            .by_address
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = by_address.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                by_address.remove(&address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_counted_by_address_and_given_back() {
        let counter = ConnectionLimiter::new(2, 3);
        let (a, b) = (
            Some(IpAddr::from([127, 0, 0, 1])),
            Some(IpAddr::from([127, 0, 0, 2])),
        );
        let first = counter.take(a).unwrap();
        let _second = counter.take(a).unwrap();
        assert!(counter.take(a).is_none());
        let _other = counter.take(b).unwrap();
        assert!(counter.take(b).is_none(), "three altogether");
        drop(first);
        assert!(counter.take(a).is_some());
    }
}
