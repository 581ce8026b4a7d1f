//! Compares the messages that sessions here were sent with the shards, whenever some may have been
//! lost: this instance was disconnected from the bus, a subscription was too slow, another instance
//! died between a commit and its publication, or a shard returned that had committed a message
//! without answering.

use super::fan_out::Delivery;
use super::presence::Presence;
use crate::bus::Loss;
use crate::cluster::{Cluster, HEARTBEAT_TIMEOUT, PeerEvent, Peers};
use crate::messages::last_seqs::LastSeqReader;
use crate::metrics::Metrics;
use crate::rng;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::sync::broadcast::{Receiver, error::RecvError};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// Clock skew, heartbeats and answers: messages that are older by so much are compared too.
const MARGIN: Duration = Duration::from_secs(30);

/// Older messages are not compared. A session that misses some of them notices by the seq of the
/// next message.
const OLDEST: Duration = Duration::from_secs(60 * 60);

/// Users whose dialogs one query reads.
const USERS_AT_ONCE: usize = 256;

/// Between two queries, so that they do not delay sends.
const BETWEEN: Duration = Duration::from_millis(10);

/// Instances wait for a random time up to this before they compare, so that they do not all ask at
/// once.
const JITTER: Duration = Duration::from_millis(250);

/// Between two looks at which shards answer.
const SHARDS_EVERY: Duration = Duration::from_millis(500);

/// Runs until it is dropped.
pub struct Reconcile {
    _tasks: Vec<AbortOnDropHandle<()>>,
}

/// Messages may be lost: the age of the oldest of them. Requests that arrive before the comparison
/// begins are combined.
#[derive(Clone, Default)]
struct ReconcileRequest(Arc<(Mutex<Duration>, Notify)>);

impl ReconcileRequest {
    fn raise(&self, reason: &str, age: Duration) {
        let age = (age + MARGIN).min(OLDEST);
        tracing::info!(
            reason,
            seconds = age.as_secs(),
            "messages may be lost: comparing sessions with the shards"
        );
        let mut oldest = self.oldest();
        *oldest = age.max(*oldest);
        self.0.1.notify_one();
    }

    fn oldest(&self) -> MutexGuard<'_, Duration> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reconcile {
    /// Starts.
    #[must_use]
    pub fn start(
        cluster: &Cluster,
        last_seqs: &LastSeqReader,
        delivery: &Delivery,
        presence: &Presence,
        peers: &Peers,
        metrics: Arc<Metrics>,
        runtime: &Handle,
    ) -> Self {
        let request = ReconcileRequest::default();
        let compares = compare(
            last_seqs.clone(),
            delivery.clone(),
            presence.clone(),
            request.clone(),
            metrics,
        );
        let losses = watch_bus(delivery.losses(), peers.clone(), request.clone());
        let events = watch_peers(peers.events(), request.clone());
        let shards = watch_shards(cluster.clone(), request);
        let tasks = vec![
            AbortOnDropHandle::new(runtime.spawn(compares)),
            AbortOnDropHandle::new(runtime.spawn(losses)),
            AbortOnDropHandle::new(runtime.spawn(events)),
            AbortOnDropHandle::new(runtime.spawn(shards)),
        ];
        Self { _tasks: tasks }
    }
}

async fn watch_bus(mut losses: Receiver<Loss>, peers: Peers, request: ReconcileRequest) {
    loop {
        match losses.recv().await {
            Ok(Loss::Disconnected(lasted)) => {
                request.raise("this instance was disconnected from the bus", lasted);
                // The other instances did not receive what this one stored meanwhile.
                peers.announce_reconnected(lasted);
            }
            Ok(Loss::SlowConsumer) | Err(RecvError::Lagged(_)) => {
                request.raise("a subscription was too slow", Duration::ZERO);
            }
            Err(RecvError::Closed) => return,
        }
    }
}

async fn watch_peers(mut events: Receiver<PeerEvent>, request: ReconcileRequest) {
    loop {
        match events.recv().await {
            Ok(PeerEvent::Reconnected(lasted)) => {
                request.raise("another instance was disconnected from the bus", lasted);
            }
            Ok(PeerEvent::Left) => request.raise("another instance shut down", Duration::ZERO),
            Ok(PeerEvent::TimedOut) | Err(RecvError::Lagged(_)) => {
                request.raise("another instance timed out", HEARTBEAT_TIMEOUT);
            }
            Ok(PeerEvent::Changed) => {}
            Err(RecvError::Closed) => return,
        }
    }
}

/// A shard may have committed messages without answering. Their senders repeat them, unless they
/// are gone too.
async fn watch_shards(cluster: Cluster, request: ReconcileRequest) {
    let mut down: BTreeSet<String> = BTreeSet::new();
    let mut since = Instant::now();
    loop {
        tokio::time::sleep(SHARDS_EVERY).await;
        let view = cluster.view();
        let of = view.shards.iter().filter(|shard| shard.is_down());
        let now: BTreeSet<String> = of.map(|shard| shard.name().to_owned()).collect();
        if down.is_empty() {
            since = Instant::now();
        }
        if down.difference(&now).next().is_some() {
            request.raise("a shard answers again", since.elapsed());
        }
        down = now;
    }
}

/// Reads the last seqs of dialogs with recent messages, and gives them to the sessions here.
async fn compare(
    last_seqs: LastSeqReader,
    delivery: Delivery,
    presence: Presence,
    request: ReconcileRequest,
    metrics: Arc<Metrics>,
) {
    loop {
        request.0.1.notified().await;
        // By then a bus that was disconnected has its subscriptions back.
        tokio::time::sleep(BETWEEN * 10 + JITTER.mul_f64(rng::fraction())).await;
        let age = std::mem::take(&mut *request.oldest());
        let users = delivery.registry().users();
        for users in users.chunks(USERS_AT_ONCE) {
            let found = last_seqs.of_users(users, age).await;
            for dialog in found.of.values() {
                delivery.last_seq(dialog);
            }
            metrics.reconciled_dialogs.inc_by(found.of.len() as u64);
            tokio::time::sleep(BETWEEN).await;
        }
        presence.ask_for_all().await;
    }
}
