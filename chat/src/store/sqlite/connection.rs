//! The connections to the file: one that writes, and a pool of readers.

use crate::config;
use crate::rng;
use crate::store::StoreError;
use crate::store::served_slots::ServedSlotsCache;
use rusqlite::{Connection, ErrorCode, Transaction, TransactionBehavior};
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;

/// A shard in a file. Calls run on the blocking threads of the runtime that was handed in.
pub struct SqliteStore {
    path: Arc<PathBuf>,
    writer: Arc<Mutex<Option<Connection>>>,
    readers: Arc<Mutex<Vec<Connection>>>,
    /// How many may read at once; what waits here holds no thread.
    permits: Arc<tokio::sync::Semaphore>,
    pub(super) held: Arc<ServedSlotsCache>,
    runtime: Handle,
}

/// How long a writer waits for another process that writes to the same file.
const BUSY_LIMIT: Duration = Duration::from_secs(1);

impl SqliteStore {
    /// A store in the file `path`, which is made when it is first used.
    #[must_use]
    pub fn new(path: &str, settings: &config::Store, runtime: Handle) -> Self {
        Self {
            path: Arc::new(PathBuf::from(path)),
            writer: Arc::default(),
            readers: Arc::default(),
            permits: Arc::new(tokio::sync::Semaphore::new(
                settings.read_connections.max(1),
            )),
            held: Arc::default(),
            runtime,
        }
    }

    pub(super) async fn write_on<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (path, writer) = (self.path.clone(), self.writer.clone());
        self.blocking(move || {
            // A panic while it was held left no transaction behind: rusqlite rolls back when one is
            // dropped.
            let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
            let connection = match &mut *writer {
                Some(connection) => connection,
                none => none.insert(open(&path)?),
            };
            work(connection)
        })
        .await
    }

    pub(super) async fn read_on<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let _permit = self
            .permits
            .acquire()
            .await
            .map_err(|_| StoreError::Unreachable("closed".into()))?;
        let (path, readers) = (self.path.clone(), self.readers.clone());
        self.blocking(move || {
            let pooled = readers.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let mut connection = pooled.map_or_else(|| open(&path), Ok)?;
            let result = connection
                .transaction()
                .map_err(|e| classify(&e))
                .and_then(|snapshot| work(&snapshot));
            readers
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(connection);
            result
        })
        .await
    }

    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let joined = self.runtime.spawn_blocking(work).await;
        joined.unwrap_or_else(|e| {
            Err(StoreError::Refused(format!(
                "the store's thread failed: {e}"
            )))
        })
    }
}

fn open(path: &Path) -> Result<Connection, StoreError> {
    make_private(path).map_err(|e| StoreError::Unreachable(e.to_string()))?;
    let connection = Connection::open(path).map_err(|e| StoreError::Unreachable(e.to_string()))?;
    connection
        .busy_timeout(BUSY_LIMIT)
        .map_err(|e| classify(&e))?;
    connection
        .execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;",
        )
        .map_err(|e| StoreError::Unreachable(e.to_string()))?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

/// Makes the file, for its owner only, if it is missing; SQLite gives its mode to the files beside
/// it. An existing file must not be opened here: closing it would drop the locks of all connections
/// that this process has to it. So a new one gets its name when it is closed.
fn make_private(path: &Path) -> io::Result<()> {
    if path.exists() {
        return Ok(());
    }
    let mut new = path.as_os_str().to_owned();
    new.push(format!(".new-{:032x}", rng::number()));
    OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(&new)?;
    let named = std::fs::hard_link(&new, path);
    std::fs::remove_file(&new)?;
    match named {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        named => named,
    }
}

pub(super) fn immediate(connection: &mut Connection) -> Result<Transaction<'_>, StoreError> {
    connection
        .transaction_with_behavior(TransactionBehavior::Immediate)
        .map_err(|e| classify(&e))
}

pub(super) fn classify(e: &rusqlite::Error) -> StoreError {
    match e.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            StoreError::Conflict(e.to_string())
        }
        Some(ErrorCode::CannotOpen | ErrorCode::NotADatabase | ErrorCode::SystemIoFailure) => {
            StoreError::Unreachable(e.to_string())
        }
        // Other messages name tables and columns at most: values are bound, never part of a
        // statement.
        _ => StoreError::Refused(e.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::open;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    /// The kernel drops all POSIX locks that a process has on a file when it closes any descriptor
    /// of that file: another process could then take the WAL for abandoned.
    #[test]
    fn a_connection_keeps_its_locks_when_another_one_is_opened() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shard.db");
        let connection = open(&path).unwrap();
        connection.execute_batch("CREATE TABLE t (n)").unwrap();
        let file = std::fs::metadata(&path).unwrap();
        assert_eq!(file.permissions().mode() & 0o777, 0o600);
        let (owner, inode) = (std::process::id().to_string(), format!(":{}", file.ino()));
        let locks = || {
            let locks = std::fs::read_to_string("/proc/locks").unwrap();
            let ours = locks
                .lines()
                .map(|line| line.split_whitespace().collect::<Vec<_>>());
            ours.filter(|lock| lock[4] == owner && lock[5].ends_with(&inode))
                .count()
        };
        assert!(locks() > 0);
        let other = open(&path).unwrap();
        assert!(locks() > 0, "the locks are gone");
        drop((connection, other));
    }
}
