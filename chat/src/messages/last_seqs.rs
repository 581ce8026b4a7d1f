//! Reads the last seqs of dialogs: of a list of dialogs, or of the dialogs of users with recent
//! messages.
//!
//! While a shard answers a query, further queries for it gather and are combined: thousands of
//! clients that reconnect at once cause a few large queries.

use crate::cluster::{Cluster, OwnerRetry};
use crate::domain::dialog::{DialogId, Seq, UserId};
use crate::domain::slot::Slot;
use crate::domain::slot::SlotSet;
use crate::store::{self, DialogLastSeq, LastSeqsOf, Shard, ShardError};
use futures_util::future::join_all;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

/// A handle; a clone is one more reference.
#[derive(Clone)]
pub struct LastSeqReader {
    inner: Arc<Inner>,
}

struct Inner {
    cluster: Cluster,
    runtime: Handle,
    /// By the number of the shard.
    gathering: Mutex<HashMap<u16, Gathering>>,
}

/// The queries that wait for a shard. Removed when none waits.
#[derive(Default)]
struct Gathering {
    questions: Vec<Question>,
}

struct Question {
    of: LastSeqsOf,
    answer: oneshot::Sender<Answer>,
}

type Answer = Result<Arc<store::LastSeqs>, ShardError>;

/// The last seqs that are known.
#[derive(Debug, Default)]
pub struct KnownLastSeqs {
    /// By dialog.
    pub of: HashMap<DialogId, DialogLastSeq>,
    /// Shards that did not answer.
    pub incomplete: BTreeSet<String>,
}

/// Dialogs of one query.
const DIALOGS_AT_ONCE: usize = 1000;

/// Users of one query.
const USERS_AT_ONCE: usize = 256;

impl LastSeqReader {
    /// A reader for the shards of a cluster.
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

    /// The last seqs of these dialogs, for `user`. Those on shards that do not answer are missing,
    /// and the shards named.
    pub async fn of_dialogs(&self, dialogs: &[DialogId], user: UserId) -> KnownLastSeqs {
        let cluster = &self.inner.cluster;
        let mut left: BTreeSet<DialogId> = dialogs.iter().copied().collect();
        let mut known = KnownLastSeqs::default();
        let mut retry = OwnerRetry::default();
        while retry.next().await {
            if retry.is_repeat() {
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
            let asked = by_shard.values().map(|(shard, part)| {
                let (dialogs, users) = (part.clone(), vec![user]);
                self.ask(shard, LastSeqsOf::Dialogs { dialogs, users })
            });
            for ((shard, part), answer) in by_shard.values().zip(join_all(asked).await) {
                let Ok(answer) = answer else {
                    known.incomplete.insert(shard.name().to_owned());
                    continue;
                };
                let entries: HashMap<DialogId, &DialogLastSeq> = answer
                    .dialogs
                    .iter()
                    .map(|entry| (entry.dialog, entry))
                    .collect();
                for dialog in part {
                    let slot = Slot::of(*dialog);
                    // The target of a sealed slot may own it already. If no shard answers as its
                    // owner, the source is right.
                    let counts = answer.slots.owned.contains(slot)
                        || (retry.is_last() && answer.slots.sealed.contains(slot));
                    if counts {
                        let nothing = || DialogLastSeq::nothing(*dialog);
                        let entry = entries
                            .get(dialog)
                            .map_or_else(nothing, |entry| (*entry).clone());
                        known.of.insert(*dialog, entry);
                    } else {
                        left.insert(*dialog);
                    }
                }
            }
            if left.is_empty() {
                break;
            }
        }
        known
    }

    /// The dialogs of these users with messages that are younger than `within`. Shards that do not
    /// answer are named.
    pub async fn of_users(&self, users: &[UserId], within: Duration) -> KnownLastSeqs {
        let mut known = KnownLastSeqs::default();
        let mut retry = OwnerRetry::default();
        while retry.next().await {
            let view = self.inner.cluster.view();
            let of = LastSeqsOf::Users {
                users: users.to_vec(),
                within,
            };
            let answers = join_all(view.shards.iter().map(|shard| self.ask(shard, of.clone())));
            known.incomplete = view.unconfigured().map(str::to_owned).collect();
            let mut covered = SlotSet::empty();
            for (shard, answer) in view.shards.iter().zip(answers.await) {
                let Ok(answer) = answer else {
                    known.incomplete.insert(shard.name().to_owned());
                    continue;
                };
                covered.add(&answer.slots.owned);
                covered.add(&answer.slots.sealed);
                // The query was combined with others, for other users and perhaps older messages.
                let ours = |entry: &&DialogLastSeq| {
                    let of_ours = users.iter().any(|user| entry.has(*user));
                    let micros = answer.now.micros().saturating_sub(entry.last_at.micros());
                    of_ours && u128::try_from(micros).unwrap_or(0) <= within.as_micros()
                };
                for entry in answer.dialogs.iter().filter(ours) {
                    // Two shards may answer for a slot that is changing hands: the higher seq is
                    // right.
                    let before = known.of.get(&entry.dialog).map(|known| known.last_seq);
                    if before.is_none_or(|before: Seq| before < entry.last_seq) {
                        known.of.insert(entry.dialog, entry.clone());
                    }
                }
            }
            if covered.is_full() || !known.incomplete.is_empty() {
                break;
            }
        }
        known
    }

    /// Asks one shard, combined with the other queries that wait for it.
    async fn ask(&self, shard: &Shard, of: LastSeqsOf) -> Answer {
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
        let gone = || ShardError::Unreachable(shard.name().to_owned());
        answered.await.unwrap_or_else(|_| Err(gone()))
    }
}

impl Inner {
    fn gathering(&self) -> MutexGuard<'_, HashMap<u16, Gathering>> {
        self.gathering
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks until no query waits for this shard.
    async fn ask_all(&self, shard: &Shard) {
        loop {
            let questions = {
                let mut gathering = self.gathering();
                let waiting = gathering.entry(shard.number()).or_default();
                if waiting.questions.is_empty() {
                    gathering.remove(&shard.number());
                    return;
                }
                // Queries whose caller is gone are dropped.
                waiting
                    .questions
                    .retain(|question| !question.answer.is_closed());
                take_together(&mut waiting.questions)
            };
            if questions.is_empty() {
                continue;
            }
            let answer = shard.last_seqs(together(&questions)).await.map(Arc::new);
            for question in questions {
                // The caller may be gone.
                let _ = question.answer.send(answer.clone());
            }
        }
    }
}

fn size(of: &LastSeqsOf) -> usize {
    match of {
        LastSeqsOf::Dialogs { dialogs, .. } => dialogs.len(),
        LastSeqsOf::Users { users, .. } => users.len(),
    }
}

/// Takes the first query, and others of its kind up to the size of one query.
fn take_together(waiting: &mut Vec<Question>) -> Vec<Question> {
    let mut taken: Vec<Question> = Vec::new();
    let (mut left, mut count) = (Vec::new(), 0);
    for question in waiting.drain(..) {
        let most = match question.of {
            LastSeqsOf::Dialogs { .. } => DIALOGS_AT_ONCE,
            LastSeqsOf::Users { .. } => USERS_AT_ONCE,
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

/// One query for all of them, which are of one kind.
fn together(questions: &[Question]) -> LastSeqsOf {
    let (mut all_dialogs, mut all_users) = (BTreeSet::new(), BTreeSet::new());
    let mut longest = Duration::ZERO;
    for question in questions {
        match &question.of {
            LastSeqsOf::Dialogs { dialogs, users } => {
                all_dialogs.extend(dialogs.iter().copied());
                all_users.extend(users.iter().copied());
            }
            LastSeqsOf::Users { users, within } => {
                all_users.extend(users.iter().copied());
                longest = longest.max(*within);
            }
        }
    }
    let users = all_users.into_iter().collect();
    if all_dialogs.is_empty() {
        LastSeqsOf::Users {
            users,
            within: longest,
        }
    } else {
        LastSeqsOf::Dialogs {
            dialogs: all_dialogs.into_iter().collect(),
            users,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(of: LastSeqsOf) -> Question {
        Question {
            of,
            answer: oneshot::channel().0,
        }
    }

    fn users(from: u64, to: u64, seconds: u64) -> Question {
        question(LastSeqsOf::Users {
            users: (from..to).map(|id| UserId::new(id).unwrap()).collect(),
            within: Duration::from_secs(seconds),
        })
    }

    #[test]
    fn questions_of_a_kind_go_together_up_to_a_size_and_none_is_forgotten() {
        let of_dialogs = || LastSeqsOf::Dialogs {
            dialogs: vec!["7_42".parse().unwrap()],
            users: vec![UserId::new(7).unwrap()],
        };
        let dialogs = || question(of_dialogs());
        let mut waiting = vec![
            users(1, 201, 5),
            dialogs(),
            users(201, 251, 9),
            users(251, 301, 1),
            dialogs(),
        ];
        let first = take_together(&mut waiting);
        let LastSeqsOf::Users {
            users: asked,
            within,
        } = together(&first)
        else {
            panic!("of another kind")
        };
        assert_eq!((first.len(), asked.len(), within.as_secs()), (2, 250, 9));
        let second = take_together(&mut waiting);
        assert_eq!(together(&second), of_dialogs());
        assert_eq!(second.len(), 2);
        // One that is too large for itself is asked alone.
        waiting.push(users(1, 2000, 1));
        assert_eq!(take_together(&mut waiting).len(), 1);
        assert_eq!(take_together(&mut waiting).len(), 1);
        assert!(waiting.is_empty());
    }
}
