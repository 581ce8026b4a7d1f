//! The bus between instances: NATS core, one subject a user. An instance receives only the events
//! of its own users.

use super::{Bus, BusState, Listening, Loss, Sink, Topic};
use crate::config;
use crate::metrics::Metrics;
use anyhow::Context;
use async_nats::client::RequestErrorKind;
use async_nats::{Client, ConnectOptions, Event};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
use percent_encoding::percent_decode_str;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{broadcast, watch};
use tokio::task::unconstrained;
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;
use url::Url;

/// One instance's end of a NATS bus.
pub struct NatsBus {
    /// Separates the services that share a NATS.
    service: String,
    client: Client,
    connected: Arc<AtomicBool>,
    losses: broadcast::Sender<Loss>,
    runtime: Handle,
    metrics: Arc<Metrics>,
}

/// A dead link shows after two of these.
const PING_EVERY: Duration = Duration::from_secs(5);

/// Commands that may wait for the connection, and deliveries that may wait for one listener.
const CAPACITY: usize = 65_536;

/// The longest pause between two attempts to connect.
const RECONNECT_MAX: Duration = Duration::from_secs(2);

/// How long an answer of the server, or of another instance, is waited for.
const ANSWER: Duration = Duration::from_secs(1);

/// Losses that may wait for a receiver; a receiver that misses some has got others.
const LOSSES: usize = 16;

/// The options with the credentials and TLS of the settings.
async fn authenticated(
    mut options: ConnectOptions,
    settings: &config::Nats,
) -> anyhow::Result<ConnectOptions> {
    let url = settings
        .url
        .as_ref()
        .and_then(|url| Url::parse(url.expose()).ok());
    let of_url = url.filter(|url| !url.username().is_empty());
    if let Some(url) = of_url {
        let plain = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
        let user = plain(url.username());
        options = match url.password() {
            Some(password) => options.user_and_password(user, plain(password)),
            None => options.token(user),
        };
    }
    if let (Some(user), Some(password)) = (&settings.user, &settings.password) {
        options = options.user_and_password(user.clone(), password.expose().to_owned());
    }
    if let Some(token) = &settings.token {
        options = options.token(token.expose().to_owned());
    }
    if let Some(file) = &settings.credentials_file {
        let read = options.credentials_file(file).await;
        options = read.with_context(|| format!("nats.credentials_file {}", file.display()))?;
    }
    let tls = &settings.tls;
    options = options.require_tls(tls.required);
    if let Some(file) = &tls.ca_file {
        options = options.add_root_certificates(file.clone());
    }
    if let (Some(certificate), Some(key)) = (&tls.certificate_file, &tls.key_file) {
        options = options.add_client_certificate(certificate.clone(), key.clone());
    }
    Ok(options)
}

impl NatsBus {
    /// Connects the service with that id to `nats://…`, and retries in the background: the start
    /// does not depend on the server.
    ///
    /// # Errors
    /// If the URL is not one, or a file of the settings cannot be read.
    pub async fn connect(
        settings: &config::Nats,
        service: &str,
        runtime: &Handle,
        metrics: Arc<Metrics>,
    ) -> anyhow::Result<Self> {
        let connected = Arc::new(AtomicBool::new(false));
        let (seen, gauge) = (connected.clone(), metrics.clone());
        let losses = broadcast::Sender::new(LOSSES);
        let (lost, left) = (losses.clone(), Mutex::new(None::<Instant>));
        let options = ConnectOptions::new()
            .name("chat")
            // What we publish, our own registry has delivered already.
            .no_echo()
            .retry_on_initial_connect()
            .ping_interval(PING_EVERY)
            .client_capacity(CAPACITY)
            .subscription_capacity(CAPACITY)
            .reconnect_delay_callback(|attempt| {
                let pause = Duration::from_millis(50 << attempt.min(5)).min(RECONNECT_MAX);
                // Instances that lost the same server do not come back in step.
                pause.mul_f64(0.5 + rand::random::<f64>() / 2.0)
            })
            .event_callback(move |event| {
                match &event {
                    Event::Connected => {
                        seen.store(true, Ordering::Relaxed);
                        gauge.bus_connected.set(1);
                        tracing::info!("bus connected");
                        let left = left.lock().unwrap_or_else(PoisonError::into_inner).take();
                        if let Some(left) = left {
                            // There may be no receiver.
                            let _ = lost.send(Loss::Disconnected(left.elapsed()));
                        }
                    }
                    Event::Disconnected | Event::Closed => {
                        seen.store(false, Ordering::Relaxed);
                        gauge.bus_connected.set(0);
                        let mut left = left.lock().unwrap_or_else(PoisonError::into_inner);
                        left.get_or_insert_with(Instant::now);
                        tracing::warn!("NATS disconnected; messages are still stored, and delivered on this instance");
                    }
                    Event::SlowConsumer(_) => {
                        gauge.bus_dropped.inc();
                        let _ = lost.send(Loss::SlowConsumer);
                        tracing::warn!(
                            "NATS dropped messages because a subscription was too slow"
                        );
                    }
                    Event::LameDuckMode
                    | Event::Draining
                    | Event::ServerError(_)
                    | Event::ClientError(_) => {
                        tracing::debug!(%event, "bus");
                    }
                }
                std::future::ready(())
            });
        let options = authenticated(options, settings).await?;
        let url = settings.url.as_ref().context("it is not set")?;
        let url = url.expose().to_owned();
        let client = runtime
            .spawn(async move { options.connect(url).await })
            .await??;
        Ok(Self {
            service: service.to_owned(),
            client,
            connected,
            losses,
            runtime: runtime.clone(),
            metrics,
        })
    }

    fn subject(&self, topic: Topic) -> String {
        match topic {
            Topic::User(user) => format!("chat.{}.u.{user}", self.service),
            Topic::Presence(user) => format!("chat.{}.p.{user}", self.service),
            Topic::Heartbeats => format!("chat.{}.heartbeats", self.service),
            Topic::Revocations => format!("chat.{}.revocations", self.service),
            Topic::Hints => format!("chat.{}.hints", self.service),
        }
    }
}

impl Bus for NatsBus {
    fn publish(&self, topic: Topic, payload: Bytes) {
        // Away, the client would keep it for a while and then throw it away; and its queue, once
        // full, would make us wait. `unconstrained`: a batch publishes more than a task of tokio
        // may do in one turn, and would seem to meet a full queue.
        let handed_over = self.connected.load(Ordering::Relaxed)
            && matches!(
                unconstrained(self.client.publish(self.subject(topic), payload)).now_or_never(),
                Some(Ok(()))
            );
        if handed_over {
            self.metrics.bus_published.inc()
        } else {
            self.metrics.bus_dropped.inc()
        };
    }

    fn listen(&self, topic: Topic, sink: Sink) -> Listening {
        let (client, metrics) = (self.client.clone(), self.metrics.clone());
        let (subject, unused) = (self.subject(topic), format!("chat.{}.unused", self.service));
        let (effective, is_effective) = watch::channel(false);
        let listener = self.runtime.spawn(async move {
            let mut deliveries = match client.subscribe(subject).await {
                Ok(deliveries) => deliveries,
                Err(e) => return tracing::warn!(reason = %e, "bus: cannot listen"),
            };
            // The server handles our commands in order: once it has answered that this subject has
            // no subscriber, it has our subscription.
            let asking = client.clone();
            let mut round_trip = async move {
                let _ = timeout(ANSWER, asking.request(unused, Bytes::new())).await;
            }
            .boxed();
            loop {
                tokio::select! {
                    () = &mut round_trip => {
                        effective.send_replace(true);
                        round_trip = std::future::pending().boxed();
                    }
                    delivery = deliveries.next() => {
                        let Some(delivery) = delivery else { return };
                        if let Some(asked) = delivery.reply {
                            // Another instance asks whether we subscribe. If the answer is lost, it
                            // asks again.
                            let _ = client.publish(asked, Bytes::new()).await;
                            continue;
                        }
                        metrics.bus_received.inc();
                        sink(delivery.payload);
                    }
                }
            }
        });
        // The subscription belongs to the task: aborting it unsubscribes.
        Listening::until_dropped(AbortOnDropHandle::new(listener), is_effective)
    }

    fn flush(&self) -> BoxFuture<'static, ()> {
        let client = self.client.clone();
        // Away there is nothing to be flushed to.
        Box::pin(async move { drop(timeout(ANSWER, client.flush()).await) })
    }

    fn ask(&self, topic: Topic) -> BoxFuture<'static, Option<bool>> {
        if self.state() == BusState::Disconnected {
            return Box::pin(std::future::ready(None));
        }
        let (client, subject) = (self.client.clone(), self.subject(topic));
        let connected = self.connected.clone();
        Box::pin(async move {
            match timeout(ANSWER, client.request(subject, Bytes::new())).await {
                Ok(Ok(_)) => Some(true),
                Ok(Err(e)) if e.kind() == RequestErrorKind::NoResponders => Some(false),
                // An instance that does not answer has no reachable session; but this one may be
                // disconnected itself.
                Ok(Err(_)) | Err(_) => connected.load(Ordering::Relaxed).then_some(false),
            }
        })
    }

    fn losses(&self) -> broadcast::Receiver<Loss> {
        self.losses.subscribe()
    }

    fn state(&self) -> BusState {
        if self.connected.load(Ordering::Relaxed) {
            BusState::Connected
        } else {
            BusState::Disconnected
        }
    }
}
