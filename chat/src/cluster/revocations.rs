//! Tokens that are refused before they expire: for a user, those issued before a time.
//!
//! Every shard has all of them, so that they outlive any one. Every instance has them in memory,
//! because each token is compared with them. An instance publishes a digest of all, once a second
//! and when something is revoked: one with another digest reads the shards again. The bus is a
//! hint: nobody who reaches it can revoke anything.

use super::Cluster;
use crate::bus::{Bus, Listening, Topic};
use crate::domain::dialog::UserId;
use crate::store::Shard;
use bytes::Bytes;
use futures_util::future::join_all;
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{Notify, broadcast};
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

/// Between two digests.
const DIGEST_EVERY: Duration = Duration::from_secs(1);

/// Between two readings of all shards, at least.
const READ_PAUSE: Duration = Duration::from_millis(250);

/// Between two readings of all shards without an occasion: a shard that was away when something was
/// revoked gets it then.
const READ_EVERY: Duration = Duration::from_secs(60);

/// Notices that a slow receiver may have waiting.
const NOTICES: usize = 256;

/// What the sessions of a user must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Tokens of the user that were issued before this time are refused, in seconds since 1970.
    Revoked(UserId, u64),
    /// The sessions of the user end.
    Disconnect(UserId),
}

/// A handle; a clone is one more reference.
#[derive(Clone)]
pub struct Revocations {
    inner: Arc<Inner>,
    _listening: Arc<Listening>,
    _task: Arc<AbortOnDropHandle<()>>,
}

struct Inner {
    cluster: Cluster,
    bus: Arc<dyn Bus>,
    all: RwLock<BTreeMap<UserId, u64>>,
    notices: broadcast::Sender<Notice>,
    /// Another instance has something else.
    differs: Notify,
}

impl Revocations {
    /// Reads what is revoked from the shards, and follows the other instances until the last handle
    /// is dropped.
    pub async fn start(cluster: &Cluster, bus: Arc<dyn Bus>, runtime: &Handle) -> Self {
        let inner = Arc::new(Inner {
            cluster: cluster.clone(),
            bus: bus.clone(),
            all: RwLock::default(),
            notices: broadcast::Sender::new(NOTICES),
            differs: Notify::new(),
        });
        inner.read().await;
        let receiver = Arc::downgrade(&inner);
        let listening = bus.listen(
            Topic::Revocations,
            Arc::new(move |payload| {
                if let Some(inner) = receiver.upgrade() {
                    inner.receive(&payload);
                }
            }),
        );
        let task = runtime.spawn(inner.clone().follow());
        Self {
            inner,
            _listening: Arc::new(listening),
            _task: Arc::new(AbortOnDropHandle::new(task)),
        }
    }

    /// The time before which the tokens of a user must not have been issued, in seconds since 1970.
    #[must_use]
    pub fn issued_before(&self, user: UserId) -> Option<u64> {
        self.inner.all().get(&user).copied()
    }

    /// What concerns sessions, from now on.
    #[must_use]
    pub fn notices(&self) -> broadcast::Receiver<Notice> {
        self.inner.notices.subscribe()
    }

    /// Refuses the tokens of a user that were issued before a time, here at once, on the other
    /// instances within a second. Returns the shards that did not store it: they get it later.
    ///
    /// # Errors
    /// If no shard stored it.
    pub async fn revoke(&self, user: UserId, issued_before: u64) -> Result<Vec<String>, Unstored> {
        let shards = self.inner.shards();
        let stored = shards
            .iter()
            .map(|shard| store(shard, vec![(user, issued_before)]));
        let stored = join_all(stored).await;
        if !stored.contains(&true) {
            return Err(Unstored);
        }
        self.inner.learn(user, issued_before);
        self.inner.publish_digest();
        let missing = shards.iter().zip(stored).filter(|(_, stored)| !stored);
        Ok(missing.map(|(shard, _)| shard.name().to_owned()).collect())
    }

    /// Ends the sessions of a user on all instances that can be reached.
    pub fn disconnect(&self, user: UserId) {
        let text = format!("disconnect {user}");
        self.inner.bus.publish(Topic::Revocations, text.into());
        // There may be no receiver.
        let _ = self.inner.notices.send(Notice::Disconnect(user));
    }
}

/// No shard has stored a revocation.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("no shard answers: nothing is revoked")]
pub struct Unstored;

async fn store(shard: &Shard, revocations: Vec<(UserId, u64)>) -> bool {
    let stored = shard
        .ask(move |store, identity| async move { store.revoke(&identity, &revocations).await })
        .await;
    stored.is_ok()
}

impl Inner {
    fn all(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<UserId, u64>> {
        self.all.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn shards(&self) -> Vec<Shard> {
        self.cluster.view().shards.clone()
    }

    /// Remembers a revocation, if it is later than what is known.
    fn learn(&self, user: UserId, issued_before: u64) {
        let mut all = self.all.write().unwrap_or_else(PoisonError::into_inner);
        let known = all.entry(user).or_default();
        if *known < issued_before {
            *known = issued_before;
            drop(all);
            // There may be no receiver.
            let _ = self.notices.send(Notice::Revoked(user, issued_before));
        }
    }

    /// Reads all shards, and writes to each what only others have.
    async fn read(&self) {
        let read = |shard: Shard| async move {
            let ask =
                shard.ask(|store, identity| async move { store.revocations(&identity).await });
            let there = ask.await.ok()?;
            Some((shard, there))
        };
        let read = join_all(self.shards().into_iter().map(read)).await;
        let read: Vec<_> = read.into_iter().flatten().collect();
        for (user, issued_before) in read.iter().flat_map(|(_, there)| there) {
            self.learn(*user, *issued_before);
        }
        let all = self.all().clone();
        for (shard, there) in read {
            let lacks = |(user, time): &(&UserId, &u64)| there.get(user) != Some(time);
            let missing = all.iter().filter(lacks).map(|(user, time)| (*user, *time));
            let missing: Vec<_> = missing.collect();
            if !missing.is_empty() {
                // It is tried again with the next reading.
                store(&shard, missing).await;
            }
        }
    }

    fn receive(&self, payload: &Bytes) {
        let Ok(text) = std::str::from_utf8(payload) else {
            return;
        };
        let mut words = text.split(' ');
        let kind = words.next();
        match (kind, words.next()) {
            (Some("digest"), Some(digest)) if digest != self.digest() => {
                self.differs.notify_one();
            }
            (Some("disconnect"), Some(user)) => {
                if let Ok(user) = user.parse() {
                    // There may be no receiver.
                    let _ = self.notices.send(Notice::Disconnect(user));
                }
            }
            _ => {}
        }
    }

    /// The same wherever the same is revoked.
    fn digest(&self) -> String {
        use std::hash::{Hash, Hasher};
        let mut hasher = siphasher::sip::SipHasher13::new();
        for (user, time) in self.all().iter() {
            (user.get(), time).hash(&mut hasher);
        }
        format!("{:016x}", hasher.finish())
    }

    fn publish_digest(&self) {
        let text = format!("digest {}", self.digest());
        self.bus.publish(Topic::Revocations, text.into());
    }

    /// Publishes the digest, and reads the shards when another instance has a different one.
    async fn follow(self: Arc<Self>) {
        let digests = async {
            loop {
                self.publish_digest();
                sleep(DIGEST_EVERY).await;
            }
        };
        let readings = async {
            loop {
                let _ = tokio::time::timeout(READ_EVERY, self.differs.notified()).await;
                self.read().await;
                // The other instance reads, too, if it is the one that lacks something.
                sleep(READ_PAUSE).await;
            }
        };
        tokio::join!(digests, readings);
    }
}
