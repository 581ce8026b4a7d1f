//! The connections of a store, and their sessions.

use super::super::served_slots::ServedSlotsCache;
use super::super::{ServedSlots, StoreError};
use super::error::{classify, unreachable};
use super::sql::{SELECT_OWNED, holding};
use crate::config;
use mysql_async::prelude::Queryable;
use mysql_async::{
    ClientIdentity, Conn, Opts, OptsBuilder, Pool, PoolConstraints, PoolOpts, SslOpts,
};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;

/// A shard in MySQL or MariaDB. Connections live on the runtime that was handed in.
pub struct MysqlStore {
    pub(super) opts: Opts,
    /// Apart, so that reads never take a connection from a write.
    pub(super) writes: Connections,
    pub(super) reads: Connections,
    pub(super) runtime: Handle,
    pub(super) connect_limit: Duration,
    pub(super) held: ServedSlotsCache,
}

/// Every session: ranges of keys estimated by statistics rather than by a dive into the index for
/// each key; the isolation that the write path is built for; text exactly as it was sent; and an
/// end to the locks of an instance that vanished without a word: MariaDB has a limit for idle
/// transactions, MySQL one for idle sessions.
const SETUP: [&str; 2] = [
    "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
    "SET SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION', time_zone = '+00:00', innodb_lock_wait_timeout = 1, \
     wait_timeout = 10, eq_range_index_dive_limit = 1 /*M! , idle_transaction_timeout = 5 */",
];

/// Connections of one kind, and how many of them may be in use.
pub(super) struct Connections {
    pub(super) pool: Pool,
    free: Semaphore,
}

/// Beside those of sends and of reads that wait for their turn: for the steps of changes, and looks
/// at the slots.
const CONTROL_CONNECTIONS: usize = 8;

/// How long a connection that is in use is waited for.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);

/// Below `wait_timeout`, so that a connection is closed by us and not under us.
const IDLE_LIMIT: Duration = Duration::from_secs(5);

/// TLS towards a shard, with its own CAs only if there are any.
fn ssl(settings: &config::ClientTls) -> SslOpts {
    let own = settings
        .certificate_file
        .clone()
        .zip(settings.key_file.clone());
    let own = own.map(|(certificate, key)| ClientIdentity::new(certificate.into(), key.into()));
    SslOpts::default()
        .with_disable_built_in_roots(settings.ca_file.is_some())
        .with_root_certs(
            settings
                .ca_file
                .iter()
                .map(|file| file.clone().into())
                .collect(),
        )
        .with_client_identity(own)
}

impl MysqlStore {
    /// A store for `mysql://user:password@host:port/database`. Opens no connection yet.
    ///
    /// # Errors
    /// [`StoreError::Refused`] if the URL is not of that form.
    pub fn new(url: &str, settings: &config::Store, runtime: Handle) -> Result<Self, StoreError> {
        let opts = Opts::from_url(url).map_err(|_| {
            StoreError::Refused("the url is not mysql://user:password@host:port/database".into())
        })?;
        if opts.db_name().is_none_or(str::is_empty) {
            return Err(StoreError::Refused(
                "the url names no database; end it in /NAME".into(),
            ));
        }
        let ssl = match settings.tls.required {
            true => Some(ssl(&settings.tls)),
            // As the URL has it.
            false => opts.ssl_opts().cloned(),
        };
        let opts = OptsBuilder::from_opts(opts)
            .ssl_opts(ssl)
            .prefer_socket(false)
            .tcp_nodelay(true)
            .tcp_keepalive(Some(Duration::from_secs(5)))
            .setup(SETUP.to_vec());
        let connections = |most: usize| {
            let constraints = PoolConstraints::new(0, most).unwrap_or_default();
            let pool = PoolOpts::default()
                .with_constraints(constraints)
                // A connection whose transaction failed is not put back.
                .with_reset_connection(false)
                .with_inactive_connection_ttl(IDLE_LIMIT)
                .with_ttl_check_interval(Duration::from_secs(2));
            let _inside = runtime.enter();
            Connections {
                pool: Pool::new(opts.clone().pool_opts(pool)),
                free: Semaphore::new(most),
            }
        };
        let writes = connections(settings.lanes.max(1) + CONTROL_CONNECTIONS);
        let reads = connections(settings.read_connections.max(1) + CONTROL_CONNECTIONS);
        let connect_limit = Duration::from_millis(settings.connect_ms);
        Ok(Self {
            opts: opts.into(),
            writes,
            reads,
            runtime,
            connect_limit,
            held: ServedSlotsCache::default(),
        })
    }

    /// A connection, and its place among those that may be in use. That all are in use says nothing
    /// about the database: only a connection that cannot be made does.
    pub(super) async fn connection<'a>(
        &self,
        of: &'a Connections,
        patience: Duration,
    ) -> Result<(SemaphorePermit<'a>, Conn), StoreError> {
        let Ok(Ok(place)) = timeout(patience, of.free.acquire()).await else {
            let waited = patience.as_millis();
            return Err(StoreError::Busy(format!(
                "no connection came free within {waited} ms"
            )));
        };
        match timeout(self.connect_limit, of.pool.get_conn()).await {
            Ok(Ok(conn)) => Ok((place, conn)),
            Ok(Err(e)) => Err(unreachable(e)),
            Err(_) => Err(StoreError::Slow(format!(
                "no connection within {} ms",
                self.connect_limit.as_millis()
            ))),
        }
    }

    /// Runs `work` on a connection, and puts the connection back only if it is fit to be used
    /// again.
    async fn on<T>(
        &self,
        of: &Connections,
        work: impl AsyncFnOnce(&mut Conn) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let (_place, conn) = self.connection(of, PATIENCE).await?;
        let mut lent = Lent {
            conn: Some(conn),
            runtime: &self.runtime,
            limit: self.connect_limit,
        };
        let Some(conn) = &mut lent.conn else {
            return Err(StoreError::Lost("the connection is gone".into()));
        };
        let result = work(conn).await;
        if result.is_ok() {
            drop(lent.conn.take());
        }
        result
    }

    /// The slots that are answered for, in the snapshot that `conn` is in; read only if they have
    /// changed since they last were.
    pub(super) async fn holding(
        &self,
        conn: &mut Conn,
        revision: u64,
    ) -> Result<ServedSlots, StoreError> {
        if let Some(holding) = self.held.of(revision) {
            return Ok(holding);
        }
        let words = conn.query(SELECT_OWNED).await.map_err(classify)?;
        let holding = holding(words)?;
        self.held.keep(revision, &holding);
        Ok(holding)
    }

    pub(super) async fn on_write<T>(
        &self,
        work: impl AsyncFnOnce(&mut Conn) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.on(&self.writes, work).await
    }

    pub(super) async fn on_read<T>(
        &self,
        work: impl AsyncFnOnce(&mut Conn) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.on(&self.reads, work).await
    }
}

/// A connection that is in use. Unless it is taken out, when its transaction has ended, it is
/// closed: whatever the transaction holds is let go when the server sees that.
struct Lent<'a> {
    conn: Option<Conn>,
    pub(super) runtime: &'a Handle,
    limit: Duration,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        if let Some(conn) = self.conn.take() {
            self.runtime.spawn(timeout(self.limit, conn.disconnect()));
        }
    }
}
