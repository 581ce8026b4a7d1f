//! Who is connected to this instance: sessions by user, and the interest in the bus that goes with them.
//!
//! Cut into many stripes by user, so that no single lock sees every message.

use crate::bus::event::BusEvent;
use crate::bus::{Bus, Listening, Sink, Topic};
use crate::delivery::outbound_queue::OutboundQueue;
use crate::delivery::subscriber::Subscriber;
use crate::domain::dialog::{DialogId, Seq, UserId};
use bytes::Bytes;
use bytestring::ByteString;
use chat_wire::Close;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use tokio::sync::watch;

/// How many stripes there are.
const STRIPES: usize = 64;

/// A handle; a clone is one more reference.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

struct Inner {
    bus: Arc<dyn Bus>,
    stripes: Vec<Mutex<HashMap<UserId, Present>>>,
    next_session: AtomicU64,
    sessions_per_user: usize,
    /// Told when a user comes or goes, as the other instances are.
    told: OnceLock<Arc<dyn Fn(UserId, bool) + Send + Sync>>,
    /// Told of messages that other instances have stored.
    heard: OnceLock<Arc<dyn Fn(DialogId, Seq) + Send + Sync>>,
}

/// A user with at least one session here.
struct Present {
    sessions: Vec<(u64, Arc<Subscriber>)>,
    listening: Listening,
}

/// The user has as many sessions here as are allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMany;

/// The session that a message comes from, and the answer that it gets in the place of the message.
#[derive(Clone, Debug)]
pub struct Origin {
    /// Which.
    pub session: u64,
    /// The frame `sent`.
    pub frame: ByteString,
    /// It was stored before.
    pub repeat: bool,
}

impl Registry {
    /// Nobody yet; each user may have `sessions_per_user`.
    #[must_use]
    pub fn new(sessions_per_user: usize, bus: Arc<dyn Bus>) -> Self {
        let stripes = (0..STRIPES).map(|_| Mutex::default()).collect();
        Self {
            inner: Arc::new(Inner {
                bus,
                stripes,
                next_session: AtomicU64::new(1),
                sessions_per_user,
                told: OnceLock::new(),
                heard: OnceLock::new(),
            }),
        }
    }

    /// From now on `told` hears when the first session of a user comes here (`true`), and when the last goes. The first who
    /// asks for it is told.
    pub fn on_presence_change(&self, told: Arc<dyn Fn(UserId, bool) + Send + Sync>) {
        let _ = self.inner.told.set(told);
    }

    /// From now on `heard` is told of messages for people here that other instances have stored. The first who asks for it is told.
    pub fn on_remote_message(&self, heard: Arc<dyn Fn(DialogId, Seq) + Send + Sync>) {
        let _ = self.inner.heard.set(heard);
    }

    fn stripe(&self, user: UserId) -> MutexGuard<'_, HashMap<UserId, Present>> {
        self.inner.stripes[(user.get() % STRIPES as u64) as usize]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a session of `user`, once `welcome` has given it the first frame. It leaves when the guard is dropped.
    ///
    /// # Errors
    /// [`TooMany`].
    pub fn join(
        &self,
        user: UserId,
        subscriber: Arc<Subscriber>,
        welcome: impl FnOnce(u64) -> ByteString,
    ) -> Result<Joined, TooMany> {
        let session = self.inner.next_session.fetch_add(1, Ordering::Relaxed);
        let mut stripe = self.stripe(user);
        let (effective, first) = if let Some(present) = stripe.get_mut(&user) {
            if present.sessions.len() >= self.inner.sessions_per_user {
                return Err(TooMany);
            }
            subscriber.outbound().push(welcome(session));
            present.sessions.push((session, subscriber));
            (present.listening.effective(), false)
        } else {
            subscriber.outbound().push(welcome(session));
            let registry = self.clone();
            let sink: Sink = Arc::new(move |payload| {
                if let Some(event) = BusEvent::decode(&payload) {
                    if let (BusEvent::Message { dialog, seq, .. }, Some(heard)) =
                        (&event, registry.inner.heard.get())
                    {
                        heard(*dialog, *seq);
                    }
                    registry.deliver(user, &event, None);
                }
            });
            let listening = self.inner.bus.listen(Topic::User(user), sink);
            let effective = listening.effective();
            stripe.insert(
                user,
                Present {
                    sessions: vec![(session, subscriber)],
                    listening,
                },
            );
            (effective, true)
        };
        drop(stripe);
        if first {
            self.tell(user, true);
        }
        Ok(Joined {
            registry: self.clone(),
            user,
            session,
            effective,
        })
    }

    fn tell(&self, user: UserId, is_here: bool) {
        let payload: &[u8] = if is_here { b"+" } else { b"-" };
        let payload = Bytes::from_static(payload);
        self.inner.bus.publish(Topic::Presence(user), payload);
        if let Some(told) = self.inner.told.get() {
            told(user, is_here);
        }
    }

    /// Gives event to every session of `user` here; to the one that a message comes from its answer.
    pub fn deliver(&self, user: UserId, event: &BusEvent, origin: Option<&Origin>) {
        if let Some(present) = self.stripe(user).get(&user) {
            for (session, subscriber) in &present.sessions {
                match (event, origin.filter(|origin| origin.session == *session)) {
                    (BusEvent::Message { dialog, seq, .. }, Some(origin)) => {
                        subscriber.sent(*dialog, *seq, origin.frame.clone(), origin.repeat);
                    }
                    (_, _) => subscriber.take(event),
                }
            }
        }
    }

    /// Whether a user has a session here.
    #[must_use]
    pub fn has(&self, user: UserId) -> bool {
        self.stripe(user).contains_key(&user)
    }

    /// Everyone who has a session here.
    #[must_use]
    pub fn users(&self) -> Vec<UserId> {
        let of_part = |stripe: &Mutex<HashMap<UserId, Present>>| {
            let stripe = stripe.lock().unwrap_or_else(PoisonError::into_inner);
            stripe.keys().copied().collect::<Vec<_>>()
        };
        self.inner.stripes.iter().flat_map(of_part).collect()
    }

    /// All sessions, to be closed.
    #[must_use]
    pub fn outbound_queues(&self) -> Vec<Arc<OutboundQueue>> {
        let of_part = |stripe: &Mutex<HashMap<UserId, Present>>| {
            let stripe = stripe.lock().unwrap_or_else(PoisonError::into_inner);
            stripe
                .values()
                .flat_map(|present| {
                    present
                        .sessions
                        .iter()
                        .map(|(_, subscriber)| subscriber.outbound().clone())
                })
                .collect::<Vec<_>>()
        };
        self.inner.stripes.iter().flat_map(of_part).collect()
    }

    /// How many sessions there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.outbound_queues().len()
    }

    /// Whether nobody is here.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Closes every session with `reason`, spread evenly over `time`.
    pub async fn close_all(&self, reason: Close, time: std::time::Duration) {
        let outbound_queues = self.outbound_queues();
        let begun = tokio::time::Instant::now();
        let count = outbound_queues.len().max(1) as u32;
        for (i, outbound) in outbound_queues.iter().enumerate() {
            outbound.close(reason);
            tokio::time::sleep_until(begun + time * (i as u32) / count).await;
        }
    }
}

/// A session's place; leaves when it is dropped.
pub struct Joined {
    registry: Registry,
    user: UserId,
    session: u64,
    effective: watch::Receiver<bool>,
}

impl Joined {
    /// Waits until what other instances publish for the user is heard here; what is read from the shards after that misses
    /// nothing that is not told.
    pub fn listening(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        let mut effective = self.effective.clone();
        async move {
            // Gone with the bus: then nothing is heard from others anyway.
            let _ = effective.wait_for(|effective| *effective).await;
        }
    }

    /// The session's number on this instance.
    #[must_use]
    pub fn session(&self) -> u64 {
        self.session
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        let left = {
            let mut stripe = self.registry.stripe(self.user);
            let Some(present) = stripe.get_mut(&self.user) else {
                return;
            };
            present
                .sessions
                .retain(|(session, _)| *session != self.session);
            if present.sessions.is_empty() {
                stripe.remove(&self.user)
            } else {
                None
            }
        };
        // Leaving the bus is somebody else's code: not under our lock.
        if let Some(left) = left {
            drop(left);
            self.registry.tell(self.user, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::LocalBus;
    use crate::delivery::outbound_queue::Next;
    use crate::delivery::sequencer::Bounds;

    fn user(id: u64) -> UserId {
        UserId::new(id).unwrap()
    }

    fn registry(sessions_per_user: usize) -> Registry {
        Registry::new(sessions_per_user, Arc::new(LocalBus::alone()))
    }

    fn join(registry: &Registry, subscriber: Arc<Subscriber>) -> Result<Joined, TooMany> {
        registry.join(user(7), subscriber, |session| {
            format!("welcome {session}").into()
        })
    }

    fn subscriber() -> Arc<Subscriber> {
        let bounds = Bounds {
            dialogs: 10,
            held_bytes: 100,
        };
        Arc::new(Subscriber::new(
            Arc::new(OutboundQueue::new(100)),
            bounds,
            true,
        ))
    }

    #[tokio::test]
    async fn every_session_of_a_user_hears_it_and_the_one_it_came_from_gets_its_answer() {
        let registry = registry(10);
        let subscribers: Vec<_> = (0..3).map(|_| subscriber()).collect();
        let joined: Vec<_> = subscribers
            .iter()
            .map(|subscriber| join(&registry, subscriber.clone()).unwrap())
            .collect();
        let (dialog, seq) = ("7_42".parse().unwrap(), Seq::new(5));
        let event = BusEvent::Message {
            dialog,
            seq,
            frame: "message".into(),
        };
        let origin = Origin {
            session: joined[1].session(),
            frame: "sent".into(),
            repeat: false,
        };
        registry.deliver(user(7), &event, Some(&origin));
        registry.deliver(user(8), &event, None);
        let typing = BusEvent::Ephemeral {
            frame: "typing".into(),
        };
        registry.deliver(user(7), &typing, None);
        for (subscriber, expected) in subscribers.iter().zip([
            &["welcome 1", "message", "typing"][..],
            &["welcome 2", "sent", "typing"],
            &["welcome 3", "message", "typing"],
        ]) {
            subscriber.outbound().close(Close::Normal);
            for frame in expected {
                assert_eq!(
                    subscriber.outbound().next().await,
                    Next::Frame((*frame).into())
                );
            }
            assert_eq!(
                subscriber.outbound().next().await,
                Next::Close(Close::Normal)
            );
        }
    }

    #[test]
    fn a_session_leaves_with_its_guard_and_the_limit_counts_only_those_present() {
        let registry = registry(2);
        let told = Arc::new(Mutex::new(Vec::new()));
        let tells = told.clone();
        registry.on_presence_change(Arc::new(move |user, here| {
            tells.lock().unwrap().push((user.get(), here));
        }));
        let joined = join(&registry, subscriber()).unwrap();
        let second = join(&registry, subscriber()).unwrap();
        assert_eq!(join(&registry, subscriber()).err(), Some(TooMany));
        assert_eq!(registry.len(), 2);
        drop(joined);
        assert!(registry.has(user(7)));
        drop(second);
        assert!(registry.is_empty() && !registry.has(user(7)));
        assert!(join(&registry, subscriber()).is_ok());
        let (come, gone) = ((7, true), (7, false));
        assert_eq!(
            *told.lock().unwrap(),
            [come, gone, come, gone],
            "the first and the last only"
        );
    }
}
