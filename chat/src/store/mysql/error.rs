//! Errors of the server and the driver, as the contract has them.

use super::super::StoreError;

pub(super) const DUPLICATE_KEY: u16 = 1062;

pub(super) const NO_SUCH_TABLE: u16 = 1146;

/// Server errors after which the whole transaction may simply be repeated: lock wait timeout,
/// deadlock, and (MariaDB from 11.6) a row that changed since the snapshot.
pub(super) const CONFLICTS: [u16; 3] = [1205, 1213, 1020];

/// The server is going away or will not have us: 1040 too many connections, 1053 shutdown in
/// progress, 1077 and 1079 likewise, 1317 interrupted, 3169 and 4031 session killed or idle for too
/// long.
pub(super) const GOING_AWAY: [u16; 7] = [1040, 1053, 1077, 1079, 1317, 3169, 4031];

pub(super) fn classify(e: mysql_async::Error) -> StoreError {
    match e {
        mysql_async::Error::Server(e) if CONFLICTS.contains(&e.code) => {
            StoreError::Conflict(format!("error {}", e.code))
        }
        mysql_async::Error::Server(e) if GOING_AWAY.contains(&e.code) => {
            StoreError::Lost(format!("error {}: {}", e.code, e.message))
        }
        // The message may quote the statement, and with it the text of a message: the code and the
        // state are enough.
        mysql_async::Error::Server(e) => {
            StoreError::Refused(format!("error {} ({})", e.code, e.state))
        }
        mysql_async::Error::Io(e) => StoreError::Lost(e.to_string()),
        mysql_async::Error::Driver(e) => StoreError::Lost(driver(&e)),
        mysql_async::Error::Other(_) | mysql_async::Error::Url(_) => {
            StoreError::Lost("driver".into())
        }
    }
}

/// As [`classify`], while connecting: nothing can have been written yet.
pub(super) fn unreachable(e: mysql_async::Error) -> StoreError {
    match e {
        // Access denied, unknown database and the like name the user and the database, not the
        // password.
        mysql_async::Error::Server(e) => {
            StoreError::Unreachable(format!("error {}: {}", e.code, e.message))
        }
        mysql_async::Error::Io(e) => StoreError::Unreachable(e.to_string()),
        mysql_async::Error::Driver(e) => StoreError::Unreachable(driver(&e)),
        mysql_async::Error::Other(_) | mysql_async::Error::Url(_) => {
            StoreError::Unreachable("driver".into())
        }
    }
}

#[allow(clippy::wildcard_enum_match_arm)] // whatever else there is or will be is not to be shown
pub(super) fn driver(e: &mysql_async::DriverError) -> String {
    // Some variants carry rows or packets, and with them the text of messages.
    match e {
        mysql_async::DriverError::ConnectionClosed => "the server closed the connection".into(),
        mysql_async::DriverError::PoolDisconnected => "the pool is closed".into(),
        mysql_async::DriverError::PacketTooLarge => {
            "packet too large; raise max_allowed_packet".into()
        }
        _ => "the server answered in an unexpected way".into(),
    }
}
