//! From settings to a running server: what is built in which order, and what is ended in which.

use crate::bus::{Bus, LocalBus, NatsBus};
use crate::cluster::{Cluster, IfEmpty, Peers, StartError, stores};
use crate::config::Settings;
use crate::delivery::Delivery;
use crate::delivery::Reconcile;
use crate::delivery::presence::Presence;
use crate::delivery::registry::Registry;
use crate::domain::shards_file::ShardsFile;
use crate::http::{self, App, ConnectionLimiter, Listener, Tokens};
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
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A server that is built and listens, but does not serve yet.
pub struct Server {
    address: SocketAddr,
    admin_address: SocketAddr,
    listener: TcpListener,
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
    pub async fn build(settings: Settings) -> anyhow::Result<Self> {
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

        let cluster = start_cluster(&file, &settings, &runtime, &metrics).await?;
        let bus: Arc<dyn Bus> = match &settings.nats_url {
            Some(url) => Arc::new(
                NatsBus::connect(url.expose(), cluster.id(), &runtime, metrics.clone())
                    .await
                    .context("nats_url")?,
            ),
            None => Arc::new(LocalBus::alone()),
        };
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
        registry.on_remote_message(Arc::new(move |dialog, seq| {
            owners.remote_message(dialog, seq)
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
            authenticate: tokens.clone(),
            limits: Arc::new(settings.limits.clone()),
            metrics,
        };
        let app = web::Data::new(App {
            context,
            tokens,
            dev_tokens: settings.embedded && address.ip().is_loopback(),
            allowed_origins: settings.auth.allowed_origins.clone(),
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
            reconcile,
            admin_token: settings.admin_token.clone(),
        });
        Ok(Self {
            address,
            admin_address,
            listener,
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
            admin_listener,
            app,
            settings,
            threads,
            ..
        } = self;
        let limits = &settings.limits;
        let serve = |listener, routes: fn(&mut web::ServiceConfig, usize)| {
            let (app, body_bytes) = (app.clone(), limits.frame_bytes as usize);
            Listener::serve(listener, &threads, limits, move |config| {
                config.app_data(app.clone());
                routes(config, body_bytes);
            })
        };
        let mut public = serve(listener, http::routes)?;
        let mut admin = serve(admin_listener, http::admin_routes)?;
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
