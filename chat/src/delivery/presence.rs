//! Who is there: a user with a session on any instance. Nothing is stored, so nothing can grow stale: whoever wants to know
//! asks, and whoever has a session of that user answers.
//!
//! A session may watch users. It is told at once how they are, and then of every change: that somebody came, when the first
//! session joins anywhere; that somebody went, when nobody has answered for [`GRACE`]. Now and then those who are watched are
//! asked for again, since what instances tell each other may be lost, and an instance that is killed says nothing.

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

/// How long somebody may be away without being called so: a page that is loaded again, a change from one network to another.
pub const GRACE: Duration = Duration::from_secs(5);

/// How often those who are watched are asked for again.
const ASK_AGAIN: Duration = Duration::from_secs(30);

/// How long interest in a user is kept when nobody watches any more.
const LINGER: Duration = Duration::from_secs(10);

/// How many are asked for at once.
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
    watched: Mutex<HashMap<UserId, Watched>>,
}

/// A user whom somebody here watches.
struct Watched {
    /// `None` until it is known.
    online: Option<bool>,
    /// When there was a sign of life, or doubt began.
    seen: Instant,
    /// Somebody is finding out whether the user has gone.
    in_doubt: bool,
    watchers: HashMap<u64, Arc<Subscriber>>,
    /// Since when nobody watches.
    left: Option<Instant>,
    listening: Listening,
}

impl Presence {
    /// Nobody is watched yet.
    #[must_use]
    pub fn start(registry: Registry, bus: Arc<dyn Bus>, runtime: &Handle) -> Self {
        let inner = Arc::new(Inner {
            registry,
            bus,
            runtime: runtime.clone(),
            watched: Mutex::default(),
        });
        let heard = Arc::downgrade(&inner);
        inner
            .registry
            .on_presence_change(Arc::new(move |user, is_here| {
                if let Some(inner) = heard.upgrade() {
                    inner.heard(user, is_here);
                }
            }));
        runtime.spawn(ask_again(Arc::downgrade(&inner)));
        runtime.spawn(forget(Arc::downgrade(&inner)));
        Self { inner }
    }

    /// Whether a user is there; `None` while that cannot be told.
    pub async fn ask(&self, user: UserId) -> Option<bool> {
        self.inner.ask(user).await
    }

    /// A watch of one session, over nobody yet.
    #[must_use]
    pub fn watch(&self, session: u64, subscriber: Arc<Subscriber>) -> Watch {
        Watch {
            presence: self.clone(),
            session,
            subscriber,
            users: HashSet::new(),
        }
    }

    /// Asks for everyone who is watched, soon.
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

    /// An instance says that a user came or went.
    fn heard(self: &Arc<Self>, user: UserId, is_here: bool) {
        if let Some(watched) = self.watched().get_mut(&user) {
            watched.seen = Instant::now();
            if is_here {
                watched.tell(user, true);
            } else {
                self.doubt(user, watched);
            }
        }
    }

    /// Finds out whether a user has gone, unless that is being done.
    fn doubt(self: &Arc<Self>, user: UserId, watched: &mut Watched) {
        if !std::mem::replace(&mut watched.in_doubt, true) {
            self.runtime.spawn(find_out(Arc::downgrade(self), user));
        }
    }

    /// Takes an answer that nobody had asked for in doubt.
    fn learn(self: &Arc<Self>, user: UserId, online: bool) {
        if let Some(watched) = self.watched().get_mut(&user) {
            if online {
                watched.seen = Instant::now();
                watched.tell(user, true);
            } else if watched.online == Some(true) {
                if !watched.in_doubt {
                    watched.seen = Instant::now();
                }
                self.doubt(user, watched);
            } else {
                watched.tell(user, false);
            }
        }
    }

    async fn ask_for_all(inner: &Arc<Self>, over: Duration) {
        // Also those whom nobody watches just now: a watcher who is back is told what is known of them.
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
    /// Tells the watchers what they do not know.
    fn tell(&mut self, user: UserId, online: bool) {
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

/// Says that a user has gone once nobody has answered, and nothing was heard, for [`GRACE`].
async fn find_out(inner: Weak<Inner>, user: UserId) {
    loop {
        let Some(strong) = inner.upgrade() else {
            return;
        };
        let Some(seen) = strong.watched().get(&user).map(|watched| watched.seen) else {
            return;
        };
        drop(strong);
        tokio::time::sleep_until(seen + GRACE).await;
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
                watched.tell(user, true);
            }
            Some(false) if watched.seen.elapsed() >= GRACE => watched.tell(user, false),
            // A sign of life came meanwhile, and perhaps they went once more.
            Some(false) => continue,
            // Cut off from the others: nobody can tell, until the bus is back and everyone is asked for.
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

/// Leaves the bus for users that nobody has watched for [`LINGER`].
async fn forget(inner: Weak<Inner>) {
    loop {
        tokio::time::sleep(LINGER / 2).await;
        let Some(inner) = inner.upgrade() else { return };
        let is_over = |watched: &Watched| watched.left.is_some_and(|left| left.elapsed() >= LINGER);
        let gone: Vec<(UserId, Watched)> = inner
            .watched()
            .extract_if(|_, watched| is_over(watched))
            .collect();
        // Leaving the bus is somebody else's code: not under our lock.
        drop(gone);
    }
}

/// Whom a session watches; until it is dropped.
pub struct Watch {
    presence: Presence,
    session: u64,
    subscriber: Arc<Subscriber>,
    users: HashSet<UserId>,
}

impl Watch {
    /// How many are watched.
    #[must_use]
    pub fn len(&self) -> usize {
        self.users.len()
    }

    /// Whether nobody is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.users.is_empty()
    }

    /// Whether this user is.
    #[must_use]
    pub fn contains(&self, user: UserId) -> bool {
        self.users.contains(&user)
    }

    /// Watches one more. The session is told how that user is, as soon as it is known.
    pub fn add(&mut self, user: UserId) {
        let inner = &self.presence.inner;
        self.users.insert(user);
        let mut all = inner.watched();
        let watched = all.entry(user).or_insert_with(|| {
            let heard = Arc::downgrade(inner);
            let listening = inner.bus.listen(
                Topic::Presence(user),
                Arc::new(move |payload| {
                    if let Some(inner) = heard.upgrade() {
                        inner.heard(user, payload.first() == Some(&b'+'));
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
            // Listen, then look: who comes between the two would be missed the other way round.
            let _ = effective.wait_for(|effective| *effective).await;
            let Some(inner) = asking.upgrade() else {
                return;
            };
            if let Some(online) = inner.ask(user).await {
                inner.learn(user, online);
            }
        });
    }

    /// Watches one less.
    pub fn remove(&mut self, user: UserId) {
        if self.users.remove(&user) {
            self.leave(user);
        }
    }

    fn leave(&self, user: UserId) {
        if let Some(watched) = self.presence.inner.watched().get_mut(&user) {
            watched.watchers.remove(&self.session);
            if watched.watchers.is_empty() {
                // Interest in the bus is kept for a while: a page that is loaded again watches the same users again.
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
