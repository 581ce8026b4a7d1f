//! Presence: a user is online while any instance has a session of that user. Nothing is stored, so
//! nothing can be stale: an instance that needs the presence of a user publishes a question, and
//! the instances with a session of that user answer.
//!
//! A session watches users. It receives their presence at once and then every change: online when
//! the first session begins on any instance; offline when no instance has answered for the grace
//! period. Watched users are asked for again at intervals, because events on the bus may be lost,
//! and an instance that is killed sends none.

use crate::bus::{Bus, Listening, Topic};
use crate::delivery::encode;
use crate::delivery::registry::Registry;
use crate::delivery::subscriber::Subscriber;
use crate::domain::dialog::UserId;
use crate::rng;
use chat_wire::ServerFrame;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::time::Instant;

/// The interval at which watched users are asked for again.
const ASK_AGAIN: Duration = Duration::from_secs(30);

/// How long the subscription to a user is kept after the last watch has ended.
const LINGER: Duration = Duration::from_secs(10);

/// The number of users that are asked for at once.
const AT_ONCE: usize = 32;

/// A handle; a clone is one more reference.
#[derive(Clone)]
pub struct Presence {
    inner: Arc<Inner>,
}

struct Inner {
    registry: Registry,
    bus: Arc<dyn Bus>,
    runtime: Handle,
    grace: Duration,
    watched: Mutex<HashMap<UserId, Watched>>,
}

/// A user that a session on this instance watches.
struct Watched {
    /// `None` while it is unknown.
    online: Option<bool>,
    /// When the user was last known to be online, or when the doubt began.
    seen: Instant,
    /// A task is finding out whether the user is offline.
    in_doubt: bool,
    watchers: HashMap<u64, Arc<Subscriber>>,
    /// When the last watch ended.
    left: Option<Instant>,
    listening: Listening,
}

impl Presence {
    /// No user is watched at first. A user without a session counts as online for `grace`: a page
    /// is reloaded, or a device changes its network.
    #[must_use]
    pub fn start(registry: Registry, bus: Arc<dyn Bus>, runtime: &Handle, grace: Duration) -> Self {
        let inner = Arc::new(Inner {
            registry,
            bus,
            runtime: runtime.clone(),
            grace,
            watched: Mutex::default(),
        });
        let weak = Arc::downgrade(&inner);
        inner
            .registry
            .on_presence_change(Arc::new(move |user, is_here| {
                if let Some(inner) = weak.upgrade() {
                    inner.changed(user, is_here);
                }
            }));
        runtime.spawn(ask_again(Arc::downgrade(&inner)));
        runtime.spawn(forget(Arc::downgrade(&inner)));
        Self { inner }
    }

    /// Whether a user is online; `None` while it is unknown.
    pub async fn ask(&self, user: UserId) -> Option<bool> {
        self.inner.ask(user).await
    }

    /// The watches of one session; none at first.
    #[must_use]
    pub fn watch(&self, session: u64, subscriber: Arc<Subscriber>) -> Watch {
        Watch {
            presence: self.clone(),
            session,
            subscriber,
            users: HashSet::new(),
        }
    }

    /// Asks for all watched users, soon.
    pub async fn ask_for_all(&self) {
        Inner::ask_for_all(&self.inner, Duration::ZERO).await;
    }
}

impl Inner {
    fn watched(&self) -> MutexGuard<'_, HashMap<UserId, Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask(&self, user: UserId) -> Option<bool> {
        if self.registry.has(user) {
            return Some(true);
        }
        self.bus.ask(Topic::User(user)).await
    }

    /// An instance reports that a user is online or offline.
    fn changed(self: &Arc<Self>, user: UserId, is_here: bool) {
        if let Some(watched) = self.watched().get_mut(&user) {
            watched.seen = Instant::now();
            if is_here {
                watched.notify(user, true);
            } else {
                self.doubt(user, watched);
            }
        }
    }

    /// Starts to find out whether a user is offline, unless a task already does.
    fn doubt(self: &Arc<Self>, user: UserId, watched: &mut Watched) {
        if !std::mem::replace(&mut watched.in_doubt, true) {
            self.runtime.spawn(find_out(Arc::downgrade(self), user));
        }
    }

    /// Applies an answer that came without a question.
    fn learn(self: &Arc<Self>, user: UserId, online: bool) {
        if let Some(watched) = self.watched().get_mut(&user) {
            if online {
                watched.seen = Instant::now();
                watched.notify(user, true);
            } else if watched.online == Some(true) {
                if !watched.in_doubt {
                    watched.seen = Instant::now();
                }
                self.doubt(user, watched);
            } else {
                watched.notify(user, false);
            }
        }
    }

    async fn ask_for_all(inner: &Arc<Self>, over: Duration) {
        // Includes users without a watch just now: a watcher that returns gets the last known
        // state.
        let users: Vec<UserId> = inner.watched().keys().copied().collect();
        let chunks = users.len().div_ceil(AT_ONCE).max(1) as u32;
        for users in users.chunks(AT_ONCE) {
            let asked = users.iter().map(|user| async move {
                if let Some(online) = inner.ask(*user).await {
                    inner.learn(*user, online);
                }
            });
            futures_util::future::join_all(asked).await;
            tokio::time::sleep(over / chunks).await;
        }
    }
}

impl Watched {
    /// Sends to the watchers the states that they do not have.
    fn notify(&mut self, user: UserId, online: bool) {
        if self.online.replace(online) != Some(online) {
            let frame = encode(&presence(user, online));
            for subscriber in self.watchers.values() {
                subscriber.outbound().push(frame.clone());
            }
        }
    }
}

fn presence(user: UserId, online: bool) -> ServerFrame {
    ServerFrame::Presence(chat_wire::Presence {
        user: user.get(),
        online,
    })
}

/// Reports a user as offline when there was no answer, and no event, for the grace period.
async fn find_out(inner: Weak<Inner>, user: UserId) {
    loop {
        let Some(strong) = inner.upgrade() else {
            return;
        };
        let Some(seen) = strong.watched().get(&user).map(|watched| watched.seen) else {
            return;
        };
        let grace = strong.grace;
        drop(strong);
        tokio::time::sleep_until(seen + grace).await;
        let Some(strong) = inner.upgrade() else {
            return;
        };
        let answer = strong.ask(user).await;
        let mut all = strong.watched();
        let Some(watched) = all.get_mut(&user) else {
            return;
        };
        match answer {
            Some(true) => {
                watched.seen = Instant::now();
                watched.notify(user, true);
            }
            Some(false) if watched.seen.elapsed() >= grace => watched.notify(user, false),
            // The user was online meanwhile, and may have left once more.
            Some(false) => continue,
            // This instance is cut off from the others. The state is unknown until the bus is back
            // and all users are asked for.
            None => {}
        }
        watched.in_doubt = false;
        return;
    }
}

async fn ask_again(inner: Weak<Inner>) {
    loop {
        tokio::time::sleep(ASK_AGAIN.mul_f64(0.25 + rng::fraction() / 4.0)).await;
        let Some(inner) = inner.upgrade() else { return };
        Inner::ask_for_all(&inner, ASK_AGAIN / 2).await;
    }
}

/// Ends the subscriptions to users without a watch for [`LINGER`].
async fn forget(inner: Weak<Inner>) {
    loop {
        tokio::time::sleep(LINGER / 2).await;
        let Some(inner) = inner.upgrade() else { return };
        let is_over = |watched: &Watched| watched.left.is_some_and(|left| left.elapsed() >= LINGER);
        let gone: Vec<(UserId, Watched)> = inner
            .watched()
            .extract_if(|_, watched| is_over(watched))
            .collect();
        // The subscription ends in code of a library: not while our lock is held.
        drop(gone);
    }
}

/// The users that a session watches, until it is dropped.
pub struct Watch {
    presence: Presence,
    session: u64,
    subscriber: Arc<Subscriber>,
    users: HashSet<UserId>,
}

impl Watch {
    /// The number of watched users.
    #[must_use]
    pub fn len(&self) -> usize {
        self.users.len()
    }

    /// Whether no user is watched.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.users.is_empty()
    }

    /// Whether this user is watched.
    #[must_use]
    pub fn contains(&self, user: UserId) -> bool {
        self.users.contains(&user)
    }

    /// Begins to watch a user. The session receives the state as soon as it is known.
    pub fn add(&mut self, user: UserId) {
        let inner = &self.presence.inner;
        self.users.insert(user);
        let mut all = inner.watched();
        let watched = all.entry(user).or_insert_with(|| {
            let weak = Arc::downgrade(inner);
            let listening = inner.bus.listen(
                Topic::Presence(user),
                Arc::new(move |payload| {
                    if let Some(inner) = weak.upgrade() {
                        inner.changed(user, payload.first() == Some(&b'+'));
                    }
                }),
            );
            Watched {
                online: None,
                seen: Instant::now(),
                in_doubt: false,
                watchers: HashMap::new(),
                left: None,
                listening,
            }
        });
        watched.left = None;
        watched
            .watchers
            .insert(self.session, self.subscriber.clone());
        if let Some(online) = watched.online {
            self.subscriber
                .outbound()
                .push(encode(&presence(user, online)));
            return;
        }
        let (asking, mut effective) = (Arc::downgrade(inner), watched.listening.effective());
        inner.runtime.spawn(async move {
            // Subscribes first and asks then: in the other order, a user who comes online in
            // between would be missed.
            let _ = effective.wait_for(|effective| *effective).await;
            let Some(inner) = asking.upgrade() else {
                return;
            };
            if let Some(online) = inner.ask(user).await {
                inner.learn(user, online);
            }
        });
    }

    /// Ends the watch of a user.
    pub fn remove(&mut self, user: UserId) {
        if self.users.remove(&user) {
            self.leave(user);
        }
    }

    fn leave(&self, user: UserId) {
        if let Some(watched) = self.presence.inner.watched().get_mut(&user) {
            watched.watchers.remove(&self.session);
            if watched.watchers.is_empty() {
                // The subscription is kept for a while: a page that is reloaded watches the same
                // users again.
                watched.left = Some(Instant::now());
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        for user in &self.users {
            self.leave(*user);
        }
    }
}
