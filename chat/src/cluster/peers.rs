//! The other instances: each announces itself a few times a second, with the topology that it has
//! adopted. One that announces its shutdown, or is silent for [`HEARTBEAT_TIMEOUT`], is gone.

use super::Cluster;
use crate::bus::{Bus, BusState, Listening, Topic};
use crate::domain::topology::Phase;
use crate::rng;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::broadcast;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// Between two heartbeats.
pub const HEARTBEAT: Duration = Duration::from_millis(250);

/// Between two heartbeats after a topology was adopted: other instances wait for it.
const HEARTBEAT_OF_CHANGE: Duration = Duration::from_millis(100);

/// An instance that is silent for so long is gone.
pub const HEARTBEAT_TIMEOUT: Duration = Duration::from_millis(3200);

/// Events that a slow receiver may have waiting.
const EVENTS: usize = 64;

/// What an instance announces.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Heartbeat {
    /// The id of the process.
    pub instance: String,
    /// The version of the topology that it has adopted.
    pub version: u64,
    /// The phase of that topology.
    pub phase: String,
    /// Progress of the topology change that it coordinates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub work: Option<serde_json::Value>,
    /// Why it is sent.
    #[serde(default)]
    pub status: Status,
}

/// Why a heartbeat is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Time has passed.
    #[default]
    Alive,
    /// The instance was disconnected from the bus for so many milliseconds.
    Reconnected(u64),
    /// The instance shuts down.
    Leaving,
}

/// A change among the other instances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerEvent {
    /// One appeared, or adopted another topology.
    Changed,
    /// One was disconnected from the bus for so long.
    Reconnected(Duration),
    /// One shut down.
    Left,
    /// One has been silent for [`HEARTBEAT_TIMEOUT`].
    TimedOut,
}

/// A handle; a clone is one more reference.
#[derive(Clone)]
pub struct Peers {
    inner: Arc<Inner>,
    _listening: Arc<Listening>,
    _task: Arc<AbortOnDropHandle<()>>,
}

struct Inner {
    instance: String,
    cluster: Cluster,
    bus: Arc<dyn Bus>,
    work: Mutex<Option<serde_json::Value>>,
    others: Mutex<BTreeMap<String, Other>>,
    events: broadcast::Sender<PeerEvent>,
}

/// Another instance.
struct Other {
    heartbeat: Heartbeat,
    received: Instant,
    /// While this instance is disconnected, silence says nothing about the others.
    excused: Instant,
}

impl Peers {
    /// Sends heartbeats and receives those of the other instances, until the last handle is
    /// dropped.
    #[must_use]
    pub fn start(cluster: &Cluster, bus: Arc<dyn Bus>, runtime: &Handle) -> Self {
        let inner = Arc::new(Inner {
            instance: format!("{:016x}", rng::number() as u64),
            cluster: cluster.clone(),
            bus: bus.clone(),
            work: Mutex::default(),
            others: Mutex::default(),
            events: broadcast::Sender::new(EVENTS),
        });
        let receiver = Arc::downgrade(&inner);
        let listening = bus.listen(
            Topic::Heartbeats,
            Arc::new(move |payload| {
                if let Some(inner) = receiver.upgrade() {
                    inner.receive(&payload);
                }
            }),
        );
        let task = runtime.spawn(inner.clone().beat());
        Self {
            inner,
            _listening: Arc::new(listening),
            _task: Arc::new(AbortOnDropHandle::new(task)),
        }
    }

    /// Whether there is no bus to other instances, by configuration.
    #[must_use]
    pub fn is_standalone(&self) -> bool {
        self.inner.bus.state() == BusState::Standalone
    }

    /// The id of this process.
    #[must_use]
    pub fn instance(&self) -> &str {
        &self.inner.instance
    }

    /// Sets the progress that this instance announces; `None` while it does not coordinate.
    pub fn set_work(&self, work: Option<serde_json::Value>) {
        *self.inner.work() = work;
    }

    /// Receives changes from now on.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<PeerEvent> {
        self.inner.events.subscribe()
    }

    /// The last heartbeat of each instance that arrived within [`HEARTBEAT_TIMEOUT`].
    #[must_use]
    pub fn present(&self) -> Vec<Heartbeat> {
        let others = self.inner.others();
        let present = others.values();
        let present = present.filter(|other| other.received.elapsed() < HEARTBEAT_TIMEOUT);
        present.map(|other| other.heartbeat.clone()).collect()
    }

    /// Whether every other instance has adopted this version, in this phase, or a later one.
    #[must_use]
    pub fn all_have(&self, version: u64, phase: Phase) -> bool {
        self.present().iter().all(|other| {
            other.version > version
                || (other.version == version
                    && (other.phase == phase.as_str() || phase != Phase::Normal))
        })
    }

    /// Reports to the other instances that this one was disconnected from the bus: they did not
    /// receive what it published meanwhile.
    pub fn announce_reconnected(&self, disconnected: Duration) {
        let millis = u64::try_from(disconnected.as_millis()).unwrap_or(u64::MAX);
        self.inner.announce(Status::Reconnected(millis));
    }

    /// Reports to the other instances that this one shuts down: it sends no hints for its last
    /// messages.
    pub async fn announce_shutdown(&self) {
        self.inner.announce(Status::Leaving);
        self.inner.bus.flush().await;
    }
}

impl Inner {
    fn others(&self) -> MutexGuard<'_, BTreeMap<String, Other>> {
        self.others.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) -> MutexGuard<'_, Option<serde_json::Value>> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn emit(&self, event: PeerEvent) {
        // An event without a receiver is dropped.
        let _ = self.events.send(event);
    }

    fn announce(&self, status: Status) {
        let view = self.cluster.view();
        let heartbeat = Heartbeat {
            instance: self.instance.clone(),
            version: view.topology_ref.version,
            phase: view.topology_ref.phase.as_str().to_owned(),
            work: self.work().clone(),
            status,
        };
        // Strings, numbers and JSON always serialize.
        if let Ok(payload) = serde_json::to_vec(&heartbeat) {
            self.bus.publish(Topic::Heartbeats, payload.into());
        }
    }

    fn receive(&self, payload: &Bytes) {
        // Another version of this software may send something else.
        let Ok(heartbeat) = serde_json::from_slice::<Heartbeat>(payload) else {
            return;
        };
        match heartbeat.status {
            Status::Leaving => {
                self.others().remove(&heartbeat.instance);
                return self.emit(PeerEvent::Left);
            }
            Status::Reconnected(millis) => {
                self.emit(PeerEvent::Reconnected(Duration::from_millis(millis)));
            }
            Status::Alive => {}
        }
        let now = Instant::now();
        let adopted = (heartbeat.version, heartbeat.phase.clone());
        let other = Other {
            received: now,
            excused: now,
            heartbeat,
        };
        let known = self
            .others()
            .insert(other.heartbeat.instance.clone(), other);
        let known = known.map(|known| (known.heartbeat.version, known.heartbeat.phase));
        if known != Some(adopted) {
            self.emit(PeerEvent::Changed);
        }
    }

    async fn beat(self: Arc<Self>) {
        if self.bus.state() == BusState::Standalone {
            return;
        }
        let mut announced = None;
        loop {
            self.announce(Status::Alive);
            let adopted = self.cluster.view().topology_ref.clone();
            let before = announced.replace(adopted.clone());
            let changed = before.is_some_and(|before| before != adopted);
            tokio::time::sleep(if changed {
                HEARTBEAT_OF_CHANGE
            } else {
                HEARTBEAT
            })
            .await;
            self.expire();
        }
    }

    /// Forgets the instances that are gone.
    fn expire(&self) {
        let now = Instant::now();
        let mut others = self.others();
        if self.bus.state() != BusState::Connected {
            others.values_mut().for_each(|other| other.excused = now);
            return;
        }
        let before = others.len();
        others.retain(|_, other| now - other.excused < HEARTBEAT_TIMEOUT);
        let gone = others.len() < before;
        drop(others);
        if gone {
            self.emit(PeerEvent::TimedOut);
        }
    }
}
