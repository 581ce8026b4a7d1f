//! What instances tell each other about themselves: that they are there, which document they go by, and who is at work.

use crate::bus::{Bus, Listening, Topic};
use crate::store::Phase;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// What an instance says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Peer {
    /// Who.
    pub instance: String,
    /// The version of the document it goes by.
    pub version: u64,
    /// The phase of that.
    pub phase: String,
    /// Its progress, if it is at work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub work: Option<serde_json::Value>,
}

/// The others, as far as they were heard of lately.
pub struct Peers {
    heard: Arc<Mutex<BTreeMap<String, (Instant, Peer)>>>,
    /// Told when somebody goes by a document.
    pub news: Arc<Notify>,
    bus: Arc<dyn Bus>,
    _listening: Listening,
}

/// Who has not been heard of for so long is not there.
const PRESENCE: Duration = Duration::from_secs(3);

impl Peers {
    /// Listens from now on.
    #[must_use]
    pub fn listen(bus: Arc<dyn Bus>) -> Self {
        let heard = Arc::<Mutex<BTreeMap<String, (Instant, Peer)>>>::default();
        let news = Arc::new(Notify::new());
        let (noted, told) = (heard.clone(), news.clone());
        let listening = bus.listen(
            Topic::Instances,
            Arc::new(move |payload| {
                // Another version of this software may say something else.
                let Ok(peer) = serde_json::from_slice::<Peer>(&payload) else {
                    return;
                };
                let mut heard = noted.lock().unwrap_or_else(PoisonError::into_inner);
                heard.retain(|_, (at, _)| at.elapsed() < PRESENCE);
                let known = heard.insert(peer.instance.clone(), (Instant::now(), peer.clone()));
                if known.is_none_or(|(_, known)| {
                    (known.version, known.phase) != (peer.version, peer.phase)
                }) {
                    told.notify_one();
                }
            }),
        );
        Self {
            heard,
            news,
            bus,
            _listening: listening,
        }
    }

    /// Tells the others.
    pub fn tell(&self, us: &Peer) {
        // Strings, numbers and JSON always become JSON.
        if let Ok(payload) = serde_json::to_vec(us) {
            self.bus.publish(Topic::Instances, payload.into());
        }
    }

    /// Those who are there.
    #[must_use]
    pub fn present(&self) -> Vec<Peer> {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard
            .values()
            .filter(|(at, _)| at.elapsed() < PRESENCE)
            .map(|(_, peer)| peer.clone())
            .collect()
    }

    /// Whether everyone who is there goes by `version` at least.
    #[must_use]
    pub fn all_have(&self, version: u64, phase: Phase) -> bool {
        self.present().iter().all(|peer| {
            peer.version > version
                || (peer.version == version
                    && (peer.phase == phase.as_str() || phase != Phase::Normal))
        })
    }
}
