//! The TCP connection under a request: its options, a way to cut it, and how many there are.

use actix_web::HttpRequest;
use actix_web::dev::Extensions;
use actix_web::rt::net::TcpStream;
use socket2::{SockRef, Socket};
use std::any::Any;
use std::collections::HashMap;
use std::net::{IpAddr, Shutdown};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A second handle to a connection. Closing a WebSocket waits until the client has read what was sent before; cutting the
/// line does not.
#[derive(Clone, Default)]
pub struct TcpHandle(Option<Arc<Socket>>);

/// Enough for a page on a slow line.
const SEND_BUFFER_BYTES: usize = 128 * 1024;

impl TcpHandle {
    /// Sets the options of a new connection and keeps a handle to it; for `HttpServer::on_connect`.
    pub fn keep(connection: &dyn Any, extensions: &mut Extensions, user_timeout: Duration) {
        if let Some(stream) = connection.downcast_ref::<TcpStream>() {
            let socket = SockRef::from(stream);
            // A client that vanished is noticed when what we send is not acknowledged for this long. If an option cannot be
            // set the connection still works, and pings notice in the end.
            let _ = socket.set_tcp_user_timeout(Some(user_timeout));
            let _ = socket.set_tcp_nodelay(true);
            // What a client does not read must not gather in the kernel instead of in its queue.
            let _ = socket.set_send_buffer_size(SEND_BUFFER_BYTES);
            extensions.insert(TcpHandle(socket.try_clone().ok().map(Arc::new)));
        }
    }

    /// The line of a request.
    #[must_use]
    pub fn of(request: &HttpRequest) -> Self {
        request
            .conn_data::<TcpHandle>()
            .cloned()
            .unwrap_or_default()
    }

    /// Ends the connection now.
    pub fn cut(&self) {
        if let Some(socket) = &self.0 {
            // It may be gone already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

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
