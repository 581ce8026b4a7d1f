//! The registry of sessions on this instance, by user, and the bus subscriptions that they need.
//!
//! It is cut into many stripes by user, so that no single lock is taken for every message.

use crate::bus::event::BusEvent;
use crate::bus::{Bus, Listening, Sink, Topic};
use crate::delivery::outbound_queue::OutboundQueue;
use crate::delivery::subscriber::Subscriber;
use crate::domain::dialog::{DialogId, Seq, UserId};
use bytes::Bytes;
use bytestring::ByteString;
use chat_wire::{Close, Kind};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use tokio::sync::watch;

/// The number of stripes.
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
    /// Called when the first session of a user begins here and when the last one ends.
    on_presence_change: OnceLock<Arc<dyn Fn(UserId, bool) + Send + Sync>>,
    /// Called for messages that other instances have stored.
    on_remote_message: OnceLock<OnRemoteMessage>,
}

/// Called with an entry that another instance has stored, and whether it changes a room.
pub type OnRemoteMessage = Arc<dyn Fn(DialogId, Seq, bool) + Send + Sync>;

/// A user with at least one session here.
struct Present {
    sessions: Vec<(u64, Arc<Subscriber>)>,
    listening: Listening,
}

/// The user has the maximum number of sessions on this instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMany;

/// The session that sent a message, and the answer that it gets instead of the message.
#[derive(Clone, Debug)]
pub struct Origin {
    /// Its number on this instance.
    pub session: u64,
    /// The frame `sent`.
    pub answer: ByteString,
    /// Whether the message had been stored before.
    pub repeat: bool,
}

impl Registry {
    /// An empty registry that allows `sessions_per_user` sessions to each user.
    #[must_use]
    pub fn new(sessions_per_user: usize, bus: Arc<dyn Bus>) -> Self {
        let stripes = (0..STRIPES).map(|_| Mutex::default()).collect();
        Self {
            inner: Arc::new(Inner {
                bus,
                stripes,
                next_session: AtomicU64::new(1),
                sessions_per_user,
                on_presence_change: OnceLock::new(),
                on_remote_message: OnceLock::new(),
            }),
        }
    }

    /// Registers a callback for the first session of a user (`true`) and the end of the last one
    /// (`false`). Only the first registration counts.
    pub fn on_presence_change(&self, callback: Arc<dyn Fn(UserId, bool) + Send + Sync>) {
        let _ = self.inner.on_presence_change.set(callback);
    }

    /// Registers a callback for messages to users of this instance that other instances have
    /// stored. Only the first registration counts.
    pub fn on_remote_message(&self, callback: OnRemoteMessage) {
        let _ = self.inner.on_remote_message.set(callback);
    }

    fn stripe(&self, user: UserId) -> MutexGuard<'_, HashMap<UserId, Present>> {
        self.inner.stripes[(user.get() % STRIPES as u64) as usize]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a session of `user`, after `welcome` has written its first frame. The session is
    /// removed when the guard is dropped.
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
                if let Some(event) = BusEvent::decode(&payload, Some(user)) {
                    if let (
                        BusEvent::Message {
                            dialog, seq, kind, ..
                        },
                        Some(callback),
                    ) = (&event, registry.inner.on_remote_message.get())
                    {
                        callback(*dialog, *seq, *kind == Kind::Member);
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
            self.notify(user, true);
        }
        Ok(Joined {
            registry: self.clone(),
            user,
            session,
            effective,
        })
    }

    fn notify(&self, user: UserId, is_here: bool) {
        let payload: &[u8] = if is_here { b"+" } else { b"-" };
        let payload = Bytes::from_static(payload);
        self.inner.bus.publish(Topic::Presence(user), payload);
        if let Some(callback) = self.inner.on_presence_change.get() {
            callback(user, is_here);
        }
    }

    /// Gives an event to every session of `user` on this instance; the session that sent the
    /// message gets its answer instead.
    pub fn deliver(&self, user: UserId, event: &BusEvent, origin: Option<&Origin>) {
        if let Some(present) = self.stripe(user).get(&user) {
            for (session, subscriber) in &present.sessions {
                match (event, origin.filter(|origin| origin.session == *session)) {
                    (
                        BusEvent::Message {
                            dialog, seq, frame, ..
                        },
                        Some(origin),
                    ) => {
                        let answer = origin.answer.clone();
                        if origin.repeat {
                            subscriber.repeated(*dialog, *seq, frame.clone(), answer);
                        } else {
                            subscriber.sent(*dialog, *seq, answer);
                        }
                    }
                    (_, _) => subscriber.take(event),
                }
            }
        }
    }

    /// Closes the sessions of a user whose token was issued before a time, in seconds since 1970.
    /// Returns their number.
    pub fn close_issued_before(&self, user: UserId, time: u64, reason: Close) -> usize {
        let stripe = self.stripe(user);
        let sessions = stripe
            .get(&user)
            .into_iter()
            .flat_map(|present| &present.sessions);
        let old = sessions.filter(|(_, subscriber)| subscriber.issued() < time);
        old.map(|(_, subscriber)| subscriber.outbound().close(reason))
            .count()
    }

    /// The number of sessions of a user here.
    #[must_use]
    pub fn sessions_of(&self, user: UserId) -> usize {
        let stripe = self.stripe(user);
        stripe
            .get(&user)
            .map_or(0, |present| present.sessions.len())
    }

    /// Whether a user has a session here.
    #[must_use]
    pub fn has(&self, user: UserId) -> bool {
        self.stripe(user).contains_key(&user)
    }

    /// All users with a session here.
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

    /// The number of sessions.
    #[must_use]
    pub fn len(&self) -> usize {
        self.outbound_queues().len()
    }

    /// Whether there is no session.
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

/// The registration of a session; it ends when this is dropped.
pub struct Joined {
    registry: Registry,
    user: UserId,
    session: u64,
    effective: watch::Receiver<bool>,
}

impl Joined {
    /// Waits until the bus subscription of the user is active. A read from the shards after that,
    /// together with the events of the bus, misses no message.
    pub fn listening(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        let mut effective = self.effective.clone();
        async move {
            // The subscription ended with the bus: there are no events of other instances anyway.
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
                let left = stripe.remove(&self.user);
                // A crowd that has left takes no memory.
                if stripe.len() * 4 < stripe.capacity() {
                    let room = stripe.len() * 2;
                    stripe.shrink_to(room);
                }
                left
            } else {
                None
            }
        };
        // The subscription ends in code of a library: not while our lock is held.
        if let Some(left) = left {
            drop(left);
            self.registry.notify(self.user, false);
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
            None,
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
            kind: Kind::Text,
            frame: "message".into(),
        };
        let origin = Origin {
            session: joined[1].session(),
            answer: "sent".into(),
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
    fn a_crowd_that_has_left_leaves_no_room_behind() {
        let registry = registry(1);
        let room = |registry: &Registry| -> usize {
            let stripes = registry.inner.stripes.iter();
            stripes
                .map(|stripe| stripe.lock().unwrap().capacity())
                .sum()
        };
        let joined: Vec<_> = (1..=5000)
            .map(|id| {
                registry
                    .join(user(id), subscriber(), |_| "".into())
                    .unwrap()
            })
            .collect();
        assert!(room(&registry) >= 5000);
        drop(joined);
        assert_eq!(room(&registry), 0);
    }

    #[test]
    fn a_session_leaves_with_its_guard_and_the_limit_counts_only_those_present() {
        let registry = registry(2);
        let changes = Arc::new(Mutex::new(Vec::new()));
        let sink = changes.clone();
        registry.on_presence_change(Arc::new(move |user, here| {
            sink.lock().unwrap().push((user.get(), here));
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
            *changes.lock().unwrap(),
            [come, gone, come, gone],
            "the first and the last only"
        );
    }
}
