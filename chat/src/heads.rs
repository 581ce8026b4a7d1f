//! Asks the shards how far dialogs have come: of a list of dialogs, or of whatever was said lately to a list of users.
//!
//! While a shard is being asked, the next questions for it gather and are asked together: a crowd that comes back at once, with
//! a question each, makes a few large queries instead of thousands.

use crate::cluster::Cluster;
use crate::dialog::{DialogId, Seq, UserId};
use crate::ring::Slot;
use crate::store::{self, DialogHead, HeadsOf, Shard, ShardDown, SlotSet};
use futures_util::future::join_all;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

/// A handle; a clone is one more reference.
#[derive(Clone)]
pub struct Heads {
    inner: Arc<Inner>,
}

struct Inner {
    cluster: Cluster,
    runtime: Handle,
    /// By the number of the shard.
    gathering: Mutex<HashMap<u16, Gathering>>,
}

/// What waits for a shard that is being asked. Gone when nothing waits.
#[derive(Default)]
struct Gathering {
    questions: Vec<Question>,
}

struct Question {
    of: HeadsOf,
    answer: oneshot::Sender<Answer>,
}

type Answer = Result<Arc<store::Heads>, ShardDown>;

/// How far dialogs have come.
#[derive(Debug, Default)]
pub struct Found {
    /// Of those that are known.
    pub of: HashMap<DialogId, DialogHead>,
    /// Shards that did not answer.
    pub incomplete: BTreeSet<String>,
}

/// Dialogs that one query asks for.
const DIALOGS_AT_ONCE: usize = 1000;

/// Users whose dialogs one query asks for.
const USERS_AT_ONCE: usize = 256;

/// How often it is asked again where a slot is changing hands.
const TRIES: u32 = 8;

/// Before that; grows with each try.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

impl Heads {
    /// Asks the shards of a cluster.
    #[must_use]
    pub fn new(cluster: Cluster, runtime: &Handle) -> Self {
        let inner = Inner {
            cluster,
            runtime: runtime.clone(),
            gathering: Mutex::default(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// How far these dialogs have come. Shards that do not answer are named; of their dialogs nothing is said.
    pub async fn of_dialogs(&self, dialogs: &[DialogId]) -> Found {
        let cluster = &self.inner.cluster;
        let mut left: BTreeSet<DialogId> = dialogs.iter().copied().collect();
        let mut found = Found::default();
        for attempt in 0..TRIES {
            if attempt > 0 {
                tokio::time::sleep(LOOK_AGAIN * attempt).await;
                cluster.refresh().await;
            }
            let mut by_shard: HashMap<u16, (Shard, Vec<DialogId>)> = HashMap::new();
            for dialog in std::mem::take(&mut left) {
                if let Some(shard) = cluster.route(Slot::of(dialog)) {
                    let (_, part) = by_shard
                        .entry(shard.number())
                        .or_insert_with(|| (shard, Vec::new()));
                    part.push(dialog);
                }
            }
            let asked = by_shard
                .values()
                .map(|(shard, part)| self.ask(shard, HeadsOf::Dialogs(part.clone())));
            let last_try = attempt + 1 == TRIES;
            for ((shard, part), answer) in by_shard.values().zip(join_all(asked).await) {
                let Ok(answer) = answer else {
                    found.incomplete.insert(shard.name().to_owned());
                    continue;
                };
                let heads: HashMap<DialogId, &DialogHead> = answer
                    .heads
                    .iter()
                    .map(|head| (head.dialog, head))
                    .collect();
                for dialog in part {
                    let slot = Slot::of(*dialog);
                    // What is sealed may have been taken over already; but when nobody says so it is as it was.
                    let counts = answer.slots.owned.contains(slot)
                        || (last_try && answer.slots.sealed.contains(slot));
                    if counts {
                        let nothing = || DialogHead::nothing(*dialog);
                        let head = heads
                            .get(dialog)
                            .map_or_else(nothing, |head| (*head).clone());
                        found.of.insert(*dialog, head);
                    } else {
                        left.insert(*dialog);
                    }
                }
            }
            if left.is_empty() {
                break;
            }
        }
        found
    }

    /// The dialogs of these users that something was said in lately. Shards that do not answer are named.
    pub async fn of_users(&self, users: &[UserId], within: Duration) -> Found {
        let mut found = Found::default();
        for attempt in 0..TRIES {
            if attempt > 0 {
                tokio::time::sleep(LOOK_AGAIN * attempt).await;
            }
            let view = self.inner.cluster.view();
            let of = HeadsOf::Users {
                users: users.to_vec(),
                within,
            };
            let answers = join_all(view.shards.iter().map(|shard| self.ask(shard, of.clone())));
            found.incomplete = view.strangers().map(str::to_owned).collect();
            let mut covered = SlotSet::empty();
            for (shard, answer) in view.shards.iter().zip(answers.await) {
                let Ok(answer) = answer else {
                    found.incomplete.insert(shard.name().to_owned());
                    continue;
                };
                covered.add(&answer.slots.owned);
                covered.add(&answer.slots.sealed);
                // Others asked with us, for others and perhaps farther back.
                let ours = |head: &&DialogHead| {
                    let of_ours = head.reads.iter().any(|(user, _)| users.contains(user));
                    let micros = answer.now.micros().saturating_sub(head.last_at.micros());
                    of_ours && u128::try_from(micros).unwrap_or(0) <= within.as_micros()
                };
                for head in answer.heads.iter().filter(ours) {
                    // Two may answer for a slot that is changing hands: the one that is further is right.
                    let known = found.of.get(&head.dialog).map(|known| known.last_seq);
                    if known.is_none_or(|known: Seq| known < head.last_seq) {
                        found.of.insert(head.dialog, head.clone());
                    }
                }
            }
            if covered.is_full() || !found.incomplete.is_empty() {
                break;
            }
        }
        found
    }

    /// Asks one shard, together with whoever else wants to know something of it.
    async fn ask(&self, shard: &Shard, of: HeadsOf) -> Answer {
        let (answer, answered) = oneshot::channel();
        let question = Question { of, answer };
        let begins = {
            let mut gathering = self.inner.gathering();
            let begins = !gathering.contains_key(&shard.number());
            let gathering = gathering.entry(shard.number()).or_default();
            gathering.questions.push(question);
            begins
        };
        if begins {
            let (inner, shard) = (self.inner.clone(), shard.clone());
            self.inner
                .runtime
                .spawn(async move { inner.ask_all(&shard).await });
        }
        let gone = || ShardDown::Down(shard.name().to_owned());
        answered.await.unwrap_or_else(|_| Err(gone()))
    }
}

impl Inner {
    fn gathering(&self) -> MutexGuard<'_, HashMap<u16, Gathering>> {
        self.gathering
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks until nothing waits for this shard.
    async fn ask_all(&self, shard: &Shard) {
        loop {
            let questions = {
                let mut gathering = self.gathering();
                let waiting = gathering.entry(shard.number()).or_default();
                if waiting.questions.is_empty() {
                    gathering.remove(&shard.number());
                    return;
                }
                // Those that nobody waits for any more are not asked.
                waiting
                    .questions
                    .retain(|question| !question.answer.is_closed());
                take_together(&mut waiting.questions)
            };
            if questions.is_empty() {
                continue;
            }
            let answer = shard.dialog_heads(together(&questions)).await.map(Arc::new);
            for question in questions {
                // Whoever asked may have gone.
                let _ = question.answer.send(answer.clone());
            }
        }
    }
}

fn size(of: &HeadsOf) -> usize {
    match of {
        HeadsOf::Dialogs(dialogs) => dialogs.len(),
        HeadsOf::Users { users, .. } => users.len(),
    }
}

/// Takes the first question, and others of its kind for as long as they make no larger query than is good.
fn take_together(waiting: &mut Vec<Question>) -> Vec<Question> {
    let mut taken: Vec<Question> = Vec::new();
    let (mut left, mut count) = (Vec::new(), 0);
    for question in waiting.drain(..) {
        let most = match question.of {
            HeadsOf::Dialogs(_) => DIALOGS_AT_ONCE,
            HeadsOf::Users { .. } => USERS_AT_ONCE,
        };
        let same_kind = taken.first().is_none_or(|first| {
            std::mem::discriminant(&first.of) == std::mem::discriminant(&question.of)
        });
        let fits = taken.is_empty() || count + size(&question.of) <= most;
        if same_kind && fits {
            count += size(&question.of);
            taken.push(question);
        } else {
            left.push(question);
        }
    }
    *waiting = left;
    taken
}

/// One question for all of them, which are of a kind.
fn together(questions: &[Question]) -> HeadsOf {
    let (mut all_dialogs, mut all_users) = (BTreeSet::new(), BTreeSet::new());
    let mut longest = Duration::ZERO;
    for question in questions {
        match &question.of {
            HeadsOf::Dialogs(dialogs) => all_dialogs.extend(dialogs.iter().copied()),
            HeadsOf::Users { users, within } => {
                all_users.extend(users.iter().copied());
                longest = longest.max(*within);
            }
        }
    }
    if all_users.is_empty() {
        HeadsOf::Dialogs(all_dialogs.into_iter().collect())
    } else {
        HeadsOf::Users {
            users: all_users.into_iter().collect(),
            within: longest,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(of: HeadsOf) -> Question {
        Question {
            of,
            answer: oneshot::channel().0,
        }
    }

    fn users(from: u64, to: u64, seconds: u64) -> Question {
        question(HeadsOf::Users {
            users: (from..to).map(|id| UserId::new(id).unwrap()).collect(),
            within: Duration::from_secs(seconds),
        })
    }

    #[test]
    fn questions_of_a_kind_go_together_up_to_a_size_and_none_is_forgotten() {
        let dialogs = || question(HeadsOf::Dialogs(vec!["7_42".parse().unwrap()]));
        let mut waiting = vec![
            users(1, 201, 5),
            dialogs(),
            users(201, 251, 9),
            users(251, 301, 1),
            dialogs(),
        ];
        let first = take_together(&mut waiting);
        let HeadsOf::Users {
            users: asked,
            within,
        } = together(&first)
        else {
            panic!("of another kind")
        };
        assert_eq!((first.len(), asked.len(), within.as_secs()), (2, 250, 9));
        let second = take_together(&mut waiting);
        assert_eq!(
            together(&second),
            HeadsOf::Dialogs(vec!["7_42".parse().unwrap()])
        );
        assert_eq!(second.len(), 2);
        // One that is too large for itself is asked alone.
        waiting.push(users(1, 2000, 1));
        assert_eq!(take_together(&mut waiting).len(), 1);
        assert_eq!(take_together(&mut waiting).len(), 1);
        assert!(waiting.is_empty());
    }
}
