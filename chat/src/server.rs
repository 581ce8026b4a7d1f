//! From settings to a running server: what is built in which order, and what is ended in which.

use crate::bus::{Bus, LocalBus, NatsBus};
use crate::cluster::{Cluster, IfEmpty, Notice, Peers, Revocations, StartError, stores};
use crate::config::{Secret, Settings};
use crate::delivery::Delivery;
use crate::delivery::Reconcile;
use crate::delivery::presence::Presence;
use crate::delivery::registry::Registry;
use crate::descriptors;
use crate::domain::shards_file::{ShardsFile, StoreUrl};
use crate::http::{self, Admission, App, ConnectionLimiter, Listener, Tls, Tokens};
use crate::messages::Messages;
use crate::messages::last_seqs::LastSeqReader;
use crate::messages::writer::{Committed, OnCommit};
use crate::metrics::Metrics;
use crate::rate_limit::RateLimiter;
use crate::resharding::Resharding;
use crate::resharding::watcher::Source;
use crate::session::Context as SessionContext;
use crate::threads::Threads;
use actix_web::web;
use anyhow::{Context, bail};
use chat_wire::Close;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tokio::sync::broadcast::error::RecvError;
use tokio_util::task::AbortOnDropHandle;
use url::{Host, Url};

/// A server that is built and listens, but does not serve yet.
pub struct Server {
    address: SocketAddr,
    admin_address: SocketAddr,
    listener: TcpListener,
    tls: Option<Tls>,
    admin_listener: TcpListener,
    app: web::Data<App>,
    settings: Settings,
    /// End after everything that uses them.
    threads: Threads,
}

/// Reads and checks a `shards.toml`, with `${VAR}` from the environment; returns its text too.
///
/// # Errors
/// One line with the file, the line and what is wrong.
pub fn read_shards_file(path: &Path) -> anyhow::Result<(ShardsFile, String)> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("shards file {}", path.display()))?;
    let file = ShardsFile::parse(&text, &|name| std::env::var(name).ok())
        .with_context(|| path.display().to_string())?;
    Ok((file, text))
}

impl Server {
    /// Builds everything: takes the shards into service, connects the bus, listens. Port 0 is
    /// replaced by a real one.
    ///
    /// # Errors
    /// One line that says what must be corrected.
    pub async fn build(mut settings: Settings) -> anyhow::Result<Self> {
        descriptors::fit(&mut settings.limits)?;
        let tokens = Arc::new(Tokens::new(&settings.auth, settings.demo)?);
        if !settings.admin_listen.ip().is_loopback() && settings.admin_token.is_none() {
            bail!(
                "admin_listen {} can be reached from outside; set admin_token",
                settings.admin_listen
            );
        }
        let (file, text) = read_shards_file(&settings.shards_file)?;
        let metrics = Metrics::new();
        let threads = Threads::start(settings.threads).context("threads")?;
        metrics.thread_busy_seconds.of(threads.metrics());
        let runtime = threads.store().clone();

        let (address, listener) = listen(settings.listen).context("listen")?;
        let (admin_address, admin_listener) =
            listen(settings.admin_listen).context("admin_listen")?;

        let tls = Tls::new(&settings.tls, &runtime)?;
        warn_of_plaintext(&settings, &file);
        let cluster = start_cluster(&file, &settings, &runtime, &metrics).await?;
        let bus: Arc<dyn Bus> = match &settings.nats.url {
            Some(_) => Arc::new(
                NatsBus::connect(&settings.nats, cluster.id(), &runtime, metrics.clone())
                    .await
                    .context("nats.url")?,
            ),
            None => Arc::new(LocalBus::alone()),
        };
        let revocations = Revocations::start(&cluster, bus.clone(), &runtime).await;
        let registry = Registry::new(settings.limits.sessions_per_user, bus.clone());
        let delivery = Delivery::start(registry.clone(), bus.clone(), &runtime);
        let grace = Duration::from_millis(settings.limits.presence_grace_ms);
        let presence = Presence::start(registry.clone(), bus.clone(), &runtime, grace);
        let on_commit: OnCommit = {
            let delivery = delivery.clone();
            Arc::new(move |committed: Committed<'_>| delivery.committed(&committed))
        };
        let messages = Messages::start(cluster, &settings, on_commit, &runtime, metrics.clone());
        let owners = messages.clone();
        registry.on_remote_message(Arc::new(move |dialog, seq, changes_room| {
            owners.remote_message(dialog, seq, changes_room)
        }));
        let last_seqs = LastSeqReader::new(messages.cluster().clone(), &runtime);
        let peers = Peers::start(messages.cluster(), bus.clone(), &runtime);
        let reconcile = Reconcile::start(
            messages.cluster(),
            &last_seqs,
            &delivery,
            &presence,
            &peers,
            metrics.clone(),
            &runtime,
        );
        let resharding = Resharding::start(
            messages.cluster(),
            Source::file(settings.shards_file.clone()),
            text,
            &settings.resharding,
            &peers,
            metrics.clone(),
            &runtime,
        );
        let context = SessionContext {
            messages,
            last_seqs,
            delivery,
            presence,
            authenticate: Arc::new(Admission {
                tokens: tokens.clone(),
                revocations: revocations.clone(),
            }),
            limits: Arc::new(settings.limits.clone()),
            metrics,
        };
        let app = web::Data::new(App {
            context,
            tokens,
            dev_tokens: settings.embedded && address.ip().is_loopback(),
            allowed_origins: settings.auth.allowed_origins.clone(),
            allowed_hosts: allowed_hosts(&settings),
            upgraded_refusals: Arc::new(Semaphore::new(settings.limits.upgraded_refusals)),
            connections: ConnectionLimiter::new(
                settings.limits.connections_per_ip,
                settings.limits.connections,
            ),
            connects: RateLimiter::new(
                settings.limits.connects_per_second,
                settings.limits.connects_burst,
            ),
            requests: RateLimiter::new(
                settings.limits.requests_per_second,
                settings.limits.requests_burst,
            ),
            trust_forwarded_for: settings.trust_forwarded_for,
            draining: AtomicBool::new(false),
            resharding,
            peers,
            closes_revoked: close_revoked(&revocations, &registry, &runtime),
            revocations,
            reconcile,
            admin_token: settings.admin_token.clone(),
        });
        Ok(Self {
            address,
            admin_address,
            listener,
            tls,
            admin_listener,
            app,
            settings,
            threads,
        })
    }

    /// Where clients connect.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where operators connect.
    #[must_use]
    pub fn admin_address(&self) -> SocketAddr {
        self.admin_address
    }

    /// Serves until `shutdown` is done, then ends in order: not ready, sessions asked to go
    /// elsewhere over a few seconds, what is in flight finished, stop.
    ///
    /// # Errors
    /// If the server itself fails.
    pub async fn run_until(self, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
        let Self {
            listener,
            tls,
            admin_listener,
            app,
            settings,
            threads,
            ..
        } = self;
        let limits = &settings.limits;
        let serve = |listener, tls, of_proxy, routes: fn(&mut web::ServiceConfig, &App, usize)| {
            let (app, body_bytes) = (app.clone(), limits.frame_bytes as usize);
            Listener::serve(listener, tls, &threads, limits, of_proxy, move |config| {
                config.app_data(app.clone());
                routes(config, &app, body_bytes);
            })
        };
        let mut public = serve(listener, tls, settings.trust_forwarded_for, http::routes)?;
        let mut admin = serve(admin_listener, None, false, http::admin_routes)?;
        tokio::select! {
            () = shutdown => {}
            () = public.failed() => bail!("the server ended by itself"),
            () = admin.failed() => bail!("the admin server ended by itself"),
        }

        let begun = Instant::now();
        app.draining.store(true, Ordering::Relaxed);
        let registry = app.context.delivery.registry().clone();
        tracing::info!(sessions = registry.len(), "going away");
        // New clients, and those with a session, are asked to connect elsewhere. Requests of before
        // are still answered.
        registry
            .close_all(Close::Restart, Duration::from_millis(limits.shutdown_ms))
            .await;
        let patience = Instant::now() + DRAIN_LIMIT;
        while !registry.is_empty() && Instant::now() < patience {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        public.stop().await;
        app.peers.announce_shutdown().await;
        admin.stop().await;
        drop(app);
        drop(threads);
        tracing::info!(after_ms = begun.elapsed().as_millis() as u64, "stopped");
        Ok(())
    }
}

/// Names the connections over which others could read along.
fn warn_of_plaintext(settings: &Settings, file: &ShardsFile) {
    let is_far = |url: &str| {
        let url = Url::parse(url).ok();
        let host = url.as_ref().and_then(Url::host);
        host.is_some_and(|host| match host {
            Host::Ipv4(address) => !address.is_loopback(),
            Host::Ipv6(address) => !address.is_loopback(),
            // A URL of another scheme than http has its addresses as names.
            Host::Domain(name) => {
                name != "localhost"
                    && name
                        .parse::<IpAddr>()
                        .map_or(true, |address| !address.is_loopback())
            }
        })
    };
    if settings.tls.certificate_file.is_none() && !settings.listen.ip().is_loopback() {
        tracing::warn!(listen = %settings.listen, "clients connect without TLS, unless a proxy before this has it: tls.certificate_file");
    }
    if !settings.admin_listen.ip().is_loopback() {
        tracing::warn!(admin_listen = %settings.admin_listen, "operators connect without TLS: listen on a loopback address, or close off the network");
    }
    let shards = file.shards.iter().filter(|(_, shard)| match &shard.url {
        StoreUrl::Mysql(url) => is_far(url),
        StoreUrl::Sqlite(_) => false,
    });
    let shards: Vec<&str> = shards.map(|(name, _)| name.as_str()).collect();
    if !settings.store.tls.required && !shards.is_empty() {
        tracing::warn!(
            shards = shards.join(", "),
            "these shards are reached without TLS: store.tls.required"
        );
    }
    let nats = &settings.nats;
    if let Some(url) = nats
        .url
        .as_ref()
        .map(Secret::expose)
        .filter(|url| is_far(url))
    {
        let in_url = Url::parse(url).is_ok_and(|url| !url.username().is_empty());
        let authenticates = in_url
            || nats.user.is_some()
            || nats.token.is_some()
            || nats.credentials_file.is_some()
            || nats.tls.certificate_file.is_some();
        if !authenticates {
            tracing::warn!(
                "NATS is reached without credentials: whoever reaches it reads messages and can forge them; see [nats]"
            );
        }
        if !nats.tls.required && !url.starts_with("tls:") {
            tracing::warn!("NATS is reached without TLS: nats.tls.required");
        }
    }
}

/// Ends the sessions that are disconnected, and those whose token was revoked, until the handle is
/// dropped.
fn close_revoked(
    revocations: &Revocations,
    registry: &Registry,
    runtime: &tokio::runtime::Handle,
) -> AbortOnDropHandle<()> {
    let (mut notices, revocations) = (revocations.notices(), revocations.clone());
    let registry = registry.clone();
    let task = runtime.spawn(async move {
        let revoked = |user, time| {
            registry.close_issued_before(user, time, Close::Unauthenticated);
        };
        loop {
            match notices.recv().await {
                Ok(Notice::Revoked(user, time)) => revoked(user, time),
                Ok(Notice::Disconnect(user)) => {
                    registry.close_issued_before(user, u64::MAX, Close::Disconnected);
                }
                Err(RecvError::Lagged(_)) => {
                    for user in registry.users() {
                        if let Some(time) = revocations.issued_before(user) {
                            revoked(user, time);
                        }
                    }
                }
                Err(RecvError::Closed) => return,
            }
        }
    });
    AbortOnDropHandle::new(task)
}

/// The configured names of the service, and those of the pages that may use it.
fn allowed_hosts(settings: &Settings) -> Vec<String> {
    let origins = settings.auth.allowed_origins.iter();
    let of_pages =
        origins.filter_map(|origin| Some(Url::parse(origin).ok()?.host_str()?.to_owned()));
    settings
        .allowed_hosts
        .iter()
        .cloned()
        .chain(of_pages)
        .collect()
}

/// How long sessions may take to leave after the last was asked to.
const DRAIN_LIMIT: Duration = Duration::from_secs(7);

fn listen(address: SocketAddr) -> anyhow::Result<(SocketAddr, TcpListener)> {
    let listener = http::listen(address).with_context(|| format!("cannot listen on {address}"))?;
    Ok((listener.local_addr()?, listener))
}

/// Opens the shards; waits a while for those that the initialization needs.
async fn start_cluster(
    file: &ShardsFile,
    settings: &Settings,
    runtime: &tokio::runtime::Handle,
    metrics: &Arc<Metrics>,
) -> anyhow::Result<Cluster> {
    let patience = Instant::now() + Duration::from_millis(settings.start_wait_ms);
    let mut logged = String::new();
    loop {
        match Cluster::start(
            file,
            stores(&settings.store, runtime),
            &settings.store,
            IfEmpty::Initialize,
            runtime,
            metrics,
        )
        .await
        {
            Ok(cluster) => return Ok(cluster),
            Err(StartError::Wait(reason)) if Instant::now() < patience => {
                if reason != logged {
                    tracing::warn!(reason, "waiting for shards");
                    logged = reason;
                }
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            Err(e) => return Err(e).context("shards"),
        }
    }
}
