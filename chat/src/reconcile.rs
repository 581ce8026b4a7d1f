//! Compares what people here were sent with the shards, whenever something may have been lost on the way: the bus was away, a
//! listener was too slow, another instance vanished between a commit and its publication, or a shard comes back that had
//! committed what nobody heard the answer of.

use crate::bus::{Bus, BusState, Listening, Loss, Topic};
use crate::chance;
use crate::cluster::Cluster;
use crate::delivery::Delivery;
use crate::heads::Heads;
use crate::metrics::Metrics;
use crate::presence::Presence;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// How often an instance says that it is there.
const PULSE: Duration = Duration::from_secs(1);

/// An instance that said nothing for so long has vanished.
const VANISHED: Duration = Duration::from_millis(3200);

/// Clocks, pulses and answers take their time: what was stored so much earlier is compared too.
const MARGIN: Duration = Duration::from_secs(30);

/// Farther back than this it is not looked: who was cut off for longer is told by the seqs, as soon as something is said.
const FARTHEST: Duration = Duration::from_secs(60 * 60);

/// Users whose dialogs one query asks for.
const USERS_AT_ONCE: usize = 256;

/// Between two queries, so that sends are not in their way.
const BETWEEN: Duration = Duration::from_millis(10);

/// Runs until it is dropped.
pub struct Reconcile {
    instance: String,
    bus: Arc<dyn Bus>,
    _tasks: Vec<AbortOnDropHandle<()>>,
    _listening: Listening,
}

/// That something may be lost, and how far back. The comparison takes the farthest that came in meanwhile.
#[derive(Clone, Default)]
struct Alarm(Arc<(Mutex<Duration>, Notify)>);

impl Alarm {
    fn raise(&self, reason: &str, back: Duration) {
        let back = (back + MARGIN).min(FARTHEST);
        tracing::info!(
            reason,
            back_seconds = back.as_secs(),
            "what was sent is compared with the shards"
        );
        let mut farthest = self.farthest();
        *farthest = back.max(*farthest);
        self.0.1.notify_one();
    }

    fn farthest(&self) -> MutexGuard<'_, Duration> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Others = Arc<Mutex<HashMap<String, Instant>>>;

impl Reconcile {
    /// Starts.
    #[must_use]
    pub fn start(
        cluster: &Cluster,
        heads: &Heads,
        delivery: &Delivery,
        presence: &Presence,
        bus: Arc<dyn Bus>,
        metrics: Arc<Metrics>,
        runtime: &Handle,
    ) -> Self {
        let instance = format!("{:032x}", chance::number());
        let alarm = Alarm::default();
        let others = Others::default();
        let listening = {
            let (alarm, others) = (alarm.clone(), others.clone());
            let sink = move |payload: bytes::Bytes| hear(&payload, &others, &alarm);
            bus.listen(Topic::Pulse, Arc::new(sink))
        };
        let compares = compare(
            heads.clone(),
            delivery.clone(),
            presence.clone(),
            alarm.clone(),
            metrics,
        );
        let beats = pulse(instance.clone(), bus.clone(), others, alarm.clone());
        let hears = hear_of_losses(instance.clone(), bus.clone(), alarm.clone());
        let watches = watch_shards(cluster.clone(), alarm);
        let tasks = vec![
            AbortOnDropHandle::new(runtime.spawn(compares)),
            AbortOnDropHandle::new(runtime.spawn(beats)),
            AbortOnDropHandle::new(runtime.spawn(hears)),
            AbortOnDropHandle::new(runtime.spawn(watches)),
        ];
        Self {
            instance,
            bus,
            _tasks: tasks,
            _listening: listening,
        }
    }

    /// Tells the others that this instance goes: what it told last, it will not hint at any more.
    pub async fn farewell(&self) {
        say(&*self.bus, &self.instance, "bye");
        self.bus.flush().await;
    }
}

fn say(bus: &dyn Bus, instance: &str, what: &str) {
    bus.publish(Topic::Pulse, format!("{instance} {what}").into());
}

/// Another instance is there, goes, or was cut off from us for some milliseconds.
fn hear(payload: &[u8], others: &Others, alarm: &Alarm) {
    let mut words = std::str::from_utf8(payload).unwrap_or_default().split(' ');
    let (Some(instance), Some(what)) = (words.next(), words.next()) else {
        return;
    };
    let mut others = others.lock().unwrap_or_else(PoisonError::into_inner);
    if what == "bye" {
        others.remove(instance);
        drop(others);
        alarm.raise("another instance has gone", Duration::ZERO);
        return;
    }
    others.insert(instance.to_owned(), Instant::now());
    if what == "away" {
        let millis = words
            .next()
            .and_then(|millis| millis.parse().ok())
            .unwrap_or(0);
        alarm.raise(
            "another instance was away from the bus",
            Duration::from_millis(millis),
        );
    }
}

/// Says that we are there, and notices who is not any more.
async fn pulse(instance: String, bus: Arc<dyn Bus>, others: Others, alarm: Alarm) {
    if bus.state() == BusState::Alone {
        return;
    }
    loop {
        say(&*bus, &instance, "here");
        tokio::time::sleep(PULSE).await;
        let mut others = others.lock().unwrap_or_else(PoisonError::into_inner);
        if bus.state() != BusState::Connected {
            // Nobody can be heard now, and that says nothing about them.
            others
                .values_mut()
                .for_each(|heard| *heard = Instant::now());
            continue;
        }
        let before = others.len();
        others.retain(|_, heard| heard.elapsed() < VANISHED);
        if others.len() < before {
            alarm.raise("an instance vanished", VANISHED);
        }
    }
}

async fn hear_of_losses(instance: String, bus: Arc<dyn Bus>, alarm: Alarm) {
    let mut losses = bus.losses();
    loop {
        match losses.recv().await {
            Ok(Loss::Away(lasted)) => {
                alarm.raise("the bus was away", lasted);
                // What we stored meanwhile the others have not heard of either.
                say(&*bus, &instance, &format!("away {}", lasted.as_millis()));
            }
            Ok(Loss::Slow) | Err(RecvError::Lagged(_)) => {
                alarm.raise("the bus dropped something", Duration::ZERO);
            }
            Err(RecvError::Closed) => return,
        }
    }
}

/// A shard may have committed what it could not answer: the sender repeats it, unless the sender is gone too.
async fn watch_shards(cluster: Cluster, alarm: Alarm) {
    let mut down: BTreeSet<String> = BTreeSet::new();
    let mut since = Instant::now();
    loop {
        tokio::time::sleep(PULSE / 2).await;
        let view = cluster.view();
        let of = view.shards.iter().filter(|shard| shard.is_down());
        let now: BTreeSet<String> = of.map(|shard| shard.name().to_owned()).collect();
        if down.is_empty() {
            since = Instant::now();
        }
        if down.difference(&now).next().is_some() {
            alarm.raise("a shard is back", since.elapsed());
        }
        down = now;
    }
}

/// Takes the heads of what was said lately, and gives them to the sessions here as if they had been told.
async fn compare(
    heads: Heads,
    delivery: Delivery,
    presence: Presence,
    alarm: Alarm,
    metrics: Arc<Metrics>,
) {
    loop {
        alarm.0.1.notified().await;
        // Who was cut off listens again by then, and several instances do not ask in step.
        tokio::time::sleep(BETWEEN * 10 + PULSE.mul_f64(chance::fraction() / 4.0)).await;
        let back = std::mem::take(&mut *alarm.farthest());
        let users = delivery.registry().users();
        for users in users.chunks(USERS_AT_ONCE) {
            let found = heads.of_users(users, back).await;
            for head in found.of.values() {
                delivery.head(head.dialog, head.last_seq);
            }
            metrics.heads_compared.inc_by(found.of.len() as u64);
            tokio::time::sleep(BETWEEN).await;
        }
        presence.ask_for_all().await;
    }
}
