//! The bus within a process. A single instance has no receiver; tests connect several instances.

use super::{Bus, BusState, Listening, Loss, Sink, Topic};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{broadcast, watch};

/// One instance's end of an in-process bus.
pub struct LocalBus {
    instance: u64,
    hub: Arc<Hub>,
    /// Never used: nothing is lost.
    losses: broadcast::Sender<Loss>,
}

#[derive(Default)]
struct Hub {
    next: AtomicU64,
    listeners: Mutex<HashMap<Topic, Vec<Listener>>>,
}

struct Listener {
    id: u64,
    instance: u64,
    sink: Sink,
}

impl LocalBus {
    /// A bus with one instance on it.
    #[must_use]
    pub fn alone() -> Self {
        Self {
            instance: 0,
            hub: Arc::new(Hub {
                next: AtomicU64::new(1),
                ..Hub::default()
            }),
            losses: broadcast::Sender::new(1),
        }
    }

    /// Another instance's end of the same bus.
    #[must_use]
    pub fn join(&self) -> Self {
        Self {
            instance: self.hub.next.fetch_add(1, Ordering::Relaxed),
            hub: self.hub.clone(),
            losses: broadcast::Sender::new(1),
        }
    }
}

impl Bus for LocalBus {
    fn publish(&self, topic: Topic, payload: Bytes) {
        let sinks: Vec<Sink> = {
            let listeners = self
                .hub
                .listeners
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let others = |listener: &&Listener| listener.instance != self.instance;
            listeners
                .get(&topic)
                .into_iter()
                .flatten()
                .filter(others)
                .map(|listener| listener.sink.clone())
                .collect()
        };
        sinks.iter().for_each(|sink| sink(payload.clone()));
    }

    fn listen(&self, topic: Topic, sink: Sink) -> Listening {
        let id = self.hub.next.fetch_add(1, Ordering::Relaxed);
        let mut listeners = self
            .hub
            .listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        listeners.entry(topic).or_default().push(Listener {
            id,
            instance: self.instance,
            sink,
        });
        let leaves = Leaves {
            hub: self.hub.clone(),
            topic,
            id,
        };
        Listening::until_dropped(leaves, watch::channel(true).1)
    }

    fn flush(&self) -> BoxFuture<'static, ()> {
        Box::pin(std::future::ready(()))
    }

    fn ask(&self, topic: Topic) -> BoxFuture<'static, Option<bool>> {
        let listeners = self
            .hub
            .listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut of_topic = listeners.get(&topic).into_iter().flatten();
        let there = of_topic.any(|listener| listener.instance != self.instance);
        Box::pin(std::future::ready(Some(there)))
    }

    fn losses(&self) -> broadcast::Receiver<Loss> {
        self.losses.subscribe()
    }

    fn state(&self) -> BusState {
        BusState::Standalone
    }
}

struct Leaves {
    hub: Arc<Hub>,
    topic: Topic,
    id: u64,
}

impl Drop for Leaves {
    fn drop(&mut self) {
        let mut listeners = self
            .hub
            .listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(of_topic) = listeners.get_mut(&self.topic) {
            of_topic.retain(|listener| listener.id != self.id);
            if of_topic.is_empty() {
                listeners.remove(&self.topic);
            }
        }
    }
}
