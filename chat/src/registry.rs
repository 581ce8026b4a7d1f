//! Who is connected to this instance: sessions by user, and the interest in the bus that goes with them.
//!
//! Cut into many parts by user, so that no single lock sees every message.

use crate::bus::{Bus, Listening, Sink, Topic};
use crate::dialog::UserId;
use crate::outbox::Outbox;
use bytestring::ByteString;
use chat_wire::Close;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How many parts there are.
const PARTS: usize = 64;

/// A handle; a clone is one more reference.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

struct Inner {
    parts: Vec<Mutex<HashMap<UserId, Present>>>,
    next_session: AtomicU64,
    sessions_per_user: usize,
}

/// A user with at least one session here.
struct Present {
    sessions: Vec<(u64, Arc<Outbox>)>,
    _listening: Listening,
}

/// The user has as many sessions here as are allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMany;

impl Registry {
    /// Nobody yet; each user may have `sessions_per_user`.
    #[must_use]
    pub fn new(sessions_per_user: usize) -> Self {
        let parts = (0..PARTS).map(|_| Mutex::default()).collect();
        Self {
            inner: Arc::new(Inner {
                parts,
                next_session: AtomicU64::new(1),
                sessions_per_user,
            }),
        }
    }

    fn part(&self, user: UserId) -> MutexGuard<'_, HashMap<UserId, Present>> {
        self.inner.parts[(user.get() % PARTS as u64) as usize]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a session of `user`, whose frames go to `outbox`. It leaves when the guard is dropped.
    ///
    /// # Errors
    /// [`TooMany`].
    pub fn join(
        &self,
        user: UserId,
        outbox: Arc<Outbox>,
        bus: &dyn Bus,
    ) -> Result<Joined, TooMany> {
        let session = self.inner.next_session.fetch_add(1, Ordering::Relaxed);
        let mut part = self.part(user);
        if let Some(present) = part.get_mut(&user) {
            if present.sessions.len() >= self.inner.sessions_per_user {
                return Err(TooMany);
            }
            present.sessions.push((session, outbox));
        } else {
            let registry = self.clone();
            let sink: Sink = Arc::new(move |frame| {
                // Only instances of ours publish, and only frames; anything else is left alone.
                if let Ok(frame) = ByteString::try_from(frame) {
                    registry.deliver(user, &frame, None);
                }
            });
            let listening = bus.listen(Topic::User(user), sink);
            part.insert(
                user,
                Present {
                    sessions: vec![(session, outbox)],
                    _listening: listening,
                },
            );
        }
        Ok(Joined {
            registry: self.clone(),
            user,
            session,
        })
    }

    /// Queues a frame for every session of `user` here, except `origin`.
    pub fn deliver(&self, user: UserId, frame: &ByteString, origin: Option<u64>) {
        if let Some(present) = self.part(user).get(&user) {
            for (_, outbox) in present
                .sessions
                .iter()
                .filter(|(session, _)| Some(*session) != origin)
            {
                outbox.push(frame.clone());
            }
        }
    }

    /// All sessions, to be closed.
    #[must_use]
    pub fn outboxes(&self) -> Vec<Arc<Outbox>> {
        let of_part = |part: &Mutex<HashMap<UserId, Present>>| {
            let part = part.lock().unwrap_or_else(PoisonError::into_inner);
            part.values()
                .flat_map(|present| present.sessions.iter().map(|(_, outbox)| outbox.clone()))
                .collect::<Vec<_>>()
        };
        self.inner.parts.iter().flat_map(of_part).collect()
    }

    /// How many sessions there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.outboxes().len()
    }

    /// Whether nobody is here.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Closes every session with `reason`, spread evenly over `time`.
    pub async fn close_all(&self, reason: Close, time: std::time::Duration) {
        let outboxes = self.outboxes();
        let begun = tokio::time::Instant::now();
        let count = outboxes.len().max(1) as u32;
        for (i, outbox) in outboxes.iter().enumerate() {
            outbox.close(reason);
            tokio::time::sleep_until(begun + time * (i as u32) / count).await;
        }
    }
}

/// A session's place; leaves when it is dropped.
pub struct Joined {
    registry: Registry,
    user: UserId,
    session: u64,
}

impl Joined {
    /// The session's number on this instance.
    #[must_use]
    pub fn session(&self) -> u64 {
        self.session
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        let left = {
            let mut part = self.registry.part(self.user);
            let Some(present) = part.get_mut(&self.user) else {
                return;
            };
            present
                .sessions
                .retain(|(session, _)| *session != self.session);
            if present.sessions.is_empty() {
                part.remove(&self.user)
            } else {
                None
            }
        };
        // Leaving the bus is somebody else's code: not under our lock.
        drop(left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::LocalBus;
    use crate::outbox::Next;

    fn user(id: u64) -> UserId {
        UserId::new(id).unwrap()
    }

    #[tokio::test]
    async fn every_session_of_a_user_hears_it_except_the_one_it_came_from() {
        let (registry, bus) = (Registry::new(10), LocalBus::alone());
        let boxes: Vec<_> = (0..3).map(|_| Arc::new(Outbox::new(100))).collect();
        let joined: Vec<_> = boxes
            .iter()
            .map(|outbox| registry.join(user(7), outbox.clone(), &bus).unwrap())
            .collect();
        registry.deliver(user(7), &"x".into(), Some(joined[1].session()));
        registry.deliver(user(8), &"not for us".into(), None);
        boxes.iter().for_each(|outbox| outbox.close(Close::Normal));
        assert_eq!(boxes[0].next().await, Next::Frame("x".into()));
        assert_eq!(boxes[1].next().await, Next::Close(Close::Normal));
        assert_eq!(boxes[2].next().await, Next::Frame("x".into()));
    }

    #[test]
    fn a_session_leaves_with_its_guard_and_the_limit_counts_only_those_present() {
        let (registry, bus) = (Registry::new(1), LocalBus::alone());
        let outbox = Arc::new(Outbox::new(100));
        let joined = registry.join(user(7), outbox.clone(), &bus).unwrap();
        assert_eq!(
            registry.join(user(7), outbox.clone(), &bus).err(),
            Some(TooMany)
        );
        assert_eq!(registry.len(), 1);
        drop(joined);
        assert!(registry.is_empty());
        assert!(registry.join(user(7), outbox, &bus).is_ok());
    }
}
