//! The bus between instances: NATS core, one subject a user. An instance hears only what concerns its own people.

use super::{Bus, BusState, Listening, Sink, Topic};
use crate::metrics::Metrics;
use async_nats::{Client, ConnectOptions, Event};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::task::unconstrained;
use tokio_util::task::AbortOnDropHandle;

/// One instance's end of a NATS bus.
pub struct NatsBus {
    /// Tells the services apart that share a NATS.
    service: String,
    client: Client,
    connected: Arc<AtomicBool>,
    runtime: Handle,
    metrics: Arc<Metrics>,
}

/// A dead link shows after two of these.
const PING_EVERY: Duration = Duration::from_secs(5);

/// Commands that may wait for the connection, and deliveries that may wait for one listener.
const CAPACITY: usize = 65_536;

/// The longest pause between two attempts to connect.
const RECONNECT_MAX: Duration = Duration::from_secs(2);

impl NatsBus {
    /// Connects the service with that id to `nats://…`, and goes on trying: a server that is away is no reason not to start.
    ///
    /// # Errors
    /// If the URL is not one.
    pub async fn connect(
        url: &str,
        service: &str,
        runtime: &Handle,
        metrics: Arc<Metrics>,
    ) -> anyhow::Result<Self> {
        let connected = Arc::new(AtomicBool::new(false));
        let (seen, gauge) = (connected.clone(), metrics.clone());
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
                    }
                    Event::Disconnected | Event::Closed => {
                        seen.store(false, Ordering::Relaxed);
                        gauge.bus_connected.set(0);
                        tracing::warn!("bus away: storing and local delivery go on");
                    }
                    Event::SlowConsumer(_) => {
                        gauge.bus_dropped.inc();
                        tracing::warn!(
                            "bus: a listener was too slow, and something for it was dropped"
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
        let url = url.to_owned();
        let client = runtime
            .spawn(async move { options.connect(url).await })
            .await??;
        Ok(Self {
            service: service.to_owned(),
            client,
            connected,
            runtime: runtime.clone(),
            metrics,
        })
    }

    fn subject(&self, topic: Topic) -> String {
        match topic {
            Topic::User(user) => format!("chat.{}.u.{user}", self.service),
            Topic::Instances => format!("chat.{}.i", self.service),
        }
    }
}

impl Bus for NatsBus {
    fn publish(&self, topic: Topic, payload: Bytes) {
        // Away, the client would keep it for a while and then throw it away; and its queue, once full, would make us wait.
        // `unconstrained`: a batch publishes more than a task of tokio may do in one turn, and would seem to meet a full queue.
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
        let subject = self.subject(topic);
        let listener = self.runtime.spawn(async move {
            match client.subscribe(subject).await {
                Ok(mut deliveries) => {
                    while let Some(delivery) = deliveries.next().await {
                        metrics.bus_received.inc();
                        sink(delivery.payload);
                    }
                }
                Err(e) => tracing::warn!(reason = %e, "bus: cannot listen"),
            }
        });
        // The subscription belongs to the task: aborting it unsubscribes.
        Listening::until_dropped(AbortOnDropHandle::new(listener))
    }

    fn state(&self) -> BusState {
        if self.connected.load(Ordering::Relaxed) {
            BusState::Connected
        } else {
            BusState::Away
        }
    }
}
