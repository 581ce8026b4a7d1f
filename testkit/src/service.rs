//! A service whose shards are changed while users write, and the check that nothing went wrong.

use crate::instance::{Instance, Settings};
use crate::{Databases, Kind, until};
use chat_client::checker::{self, Acknowledged};
use chat_client::{Client, ClientError};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

/// Settings for changes in tests: no limits that protect against single users, and rows of slots
/// that left go at once.
pub const QUICK: [(&str, &str); 6] = [
    ("LIMITS__SENDS_PER_SECOND", "100000"),
    ("LIMITS__SENDS_BURST", "100000"),
    ("LIMITS__FRAMES_PER_SECOND", "100000"),
    ("LIMITS__CONNECTIONS_PER_IP", "10000"),
    ("RESHARDING__PURGE_AFTER_MS", "200"),
    ("RESHARDING__THROTTLE", "false"),
];

/// One `[[shard]]` of the file.
#[derive(Clone)]
pub struct Entry {
    pub name: String,
    pub url: String,
    pub more: String,
}

/// Databases, and the file that names some of them.
pub struct Service {
    pub databases: Databases,
    pub file: PathBuf,
    pub entries: Vec<Entry>,
    /// The text after the shards in the file: pins.
    pub pins: String,
}

impl Service {
    /// `count` shards in the file, and `spare` databases beside.
    pub async fn new(kind: Kind, count: usize, spare: usize) -> Self {
        let databases = Databases::new(kind, count + spare).await;
        let entries = (0..count).map(|i| Self::entry_of(&databases, i)).collect();
        let file = databases.directory().join("shards.toml");
        let service = Self {
            databases,
            file,
            entries,
            pins: String::new(),
        };
        service.save();
        service
    }

    fn entry_of(databases: &Databases, i: usize) -> Entry {
        Entry {
            name: format!("shard{}", i + 1),
            url: databases.url(i),
            more: String::new(),
        }
    }

    /// The entry of the database with index `i`, in the file or not.
    pub fn entry(&self, i: usize) -> Entry {
        Self::entry_of(&self.databases, i)
    }

    pub fn text(&self) -> String {
        let entry = |entry: &Entry| {
            format!(
                "[[shard]]\nname = \"{}\"\nurl = \"{}\"\n{}\n",
                entry.name, entry.url, entry.more
            )
        };
        self.entries.iter().map(entry).collect::<String>() + &self.pins
    }

    /// Pins the dialogs of these pairs of users to a shard, from the next save on.
    pub fn pin(&mut self, dialogs: &[(u64, u64)], shard: &str) {
        self.pins = dialogs
            .iter()
            .map(|(low, high)| format!("[[pin]]\ndialog = \"{low}_{high}\"\nshard = \"{shard}\"\n"))
            .collect();
    }

    /// Saves as an editor does: a new file, renamed over the old one.
    pub fn save(&self) {
        let new = self.file.with_extension("new");
        std::fs::write(&new, self.text()).unwrap();
        std::fs::rename(&new, &self.file).unwrap();
    }

    pub fn set(&mut self, name: &str, more: &str) {
        let entry = self
            .entries
            .iter_mut()
            .find(|entry| entry.name == name)
            .unwrap();
        more.clone_into(&mut entry.more);
        self.save();
    }

    pub fn add(&mut self, i: usize) {
        self.entries.push(self.entry(i));
        self.save();
    }

    pub fn remove(&mut self, name: &str) {
        self.entries.retain(|entry| entry.name != name);
        self.save();
    }

    pub async fn start(&self, settings: Settings<'_>) -> Instance {
        let settings: Vec<(&str, &str)> = QUICK.iter().chain(settings).copied().collect();
        Instance::start(&self.file, &settings).await
    }

    /// Waits until `version` is in effect at an instance, every slot is on its target, and no rows
    /// are left behind.
    pub async fn settled(&self, instance: &Instance, version: u64) {
        self.idle(
            instance,
            version,
            ["sealed", "incoming", "fenced", "to_purge"],
        )
        .await;
    }

    /// As [`Service::settled`], but for a shard that is declared down: it has fenced slots.
    pub async fn settled_but_fenced(&self, instance: &Instance, version: u64) {
        self.idle(instance, version, ["sealed", "incoming"]).await;
    }

    async fn idle<const N: usize>(&self, instance: &Instance, version: u64, none: [&str; N]) {
        let limit = Duration::from_secs(180);
        let begun = Instant::now();
        loop {
            let (_, change) = instance
                .get(&format!("{}/admin/resharding", instance.admin))
                .await;
            let (_, slots) = instance
                .get(&format!("{}/admin/slots", instance.admin))
                .await;
            let number = |field: &str| -> u64 {
                let shards = slots["shards"].as_array().unwrap();
                shards
                    .iter()
                    .map(|shard| shard[field].as_u64().unwrap_or(0))
                    .sum()
            };
            let in_effect =
                change["version"].as_u64() >= Some(version) && change["phase"] == "normal";
            let work = &change["work"];
            let is_idle = work["stage"] == "idle"
                && work["version"] == change["version"]
                && work["slots_left"] == 0;
            let left = none.map(number);
            if in_effect && is_idle && number("owner") == 4096 && left == [0; N] {
                return;
            }
            assert!(
                begun.elapsed() < limit,
                "not settled at version {version}: {change}\n{slots}"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until a version is in effect at an instance.
    pub async fn in_effect(&self, instance: &Instance, version: u64) {
        until("the topology is in effect", async || {
            let (_, change) = instance
                .get(&format!("{}/admin/resharding", instance.admin))
                .await;
            (change["version"].as_u64() >= Some(version)).then_some(())
        })
        .await;
    }

    /// The state and reason of an instance's file, once it is not in effect.
    pub async fn file_problem(&self, instance: &Instance) -> String {
        until("the file is not in effect", async || {
            let (_, change) = instance
                .get(&format!("{}/admin/resharding", instance.admin))
                .await;
            let file = &change["file"];
            (file["state"] != "in_effect").then(|| {
                format!(
                    "{} {}",
                    file["state"].as_str().unwrap(),
                    file["reason"].as_str().unwrap()
                )
            })
        })
        .await
    }
}

/// Users who write all the time, through several instances.
pub struct Talk {
    stop: Arc<AtomicBool>,
    writers: Vec<JoinHandle<()>>,
    pub log: Arc<Mutex<Vec<Acknowledged>>>,
}

impl Talk {
    /// `pairs` users, each writing to others in turn, up to `burst` messages at once.
    pub fn begin(instances: &[&Instance], pairs: u64, burst: u32, seed: u64) -> Self {
        let talk = Self {
            stop: Arc::default(),
            writers: Vec::new(),
            log: Arc::default(),
        };
        let writers = (0..pairs).map(|n| {
            let (client, mut events) =
                Client::start(instances[n as usize % instances.len()].access(), 1 + n);
            tokio::spawn(async move { while events.recv().await.is_some() {} });
            let (stop, log) = (talk.stop.clone(), talk.log.clone());
            let mut rng = StdRng::seed_from_u64(seed + n);
            tokio::spawn(async move {
                let mut number = 0;
                while !stop.load(Ordering::Relaxed) {
                    // Several at once into one dialog: their order must be kept.
                    let to = 1 + (n + rng.random_range(1..4)) % (pairs + 3);
                    let burst: Vec<(String, String)> = (0..rng.random_range(1..=burst))
                        .map(|_| {
                            number += 1;
                            (format!("{seed:x}.{number}"), format!("{n} says {number}"))
                        })
                        .collect();
                    let sends = burst
                        .iter()
                        .map(|(key, text)| client.send(to, key.clone(), text.clone()));
                    let answers = futures_util::future::join_all(sends).await;
                    for ((key, text), answer) in burst.into_iter().zip(answers) {
                        match answer {
                            Ok(sent) => log.lock().unwrap().push(Acknowledged {
                                from: 1 + n,
                                to,
                                key,
                                text,
                                seq: sent.seq,
                            }),
                            Err(ClientError::Closed) => return,
                            Err(e) => panic!("{e}"),
                        }
                    }
                    // Talk, not load: the machine has other work.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            })
        });
        let writers: Vec<_> = writers.collect();
        Self { writers, ..talk }
    }

    /// How many were acknowledged so far.
    pub fn count(&self) -> usize {
        self.log.lock().unwrap().len()
    }

    /// Waits until `more` were acknowledged.
    pub async fn goes_on(&self, more: usize) {
        let before = self.count();
        until("users go on writing", async || {
            (self.count() >= before + more).then_some(())
        })
        .await;
    }

    /// Lets everyone end their sentence.
    pub async fn end(self) -> Vec<Acknowledged> {
        self.stop.store(true, Ordering::Relaxed);
        for writer in self.writers {
            writer.await.unwrap();
        }
        Arc::try_unwrap(self.log).unwrap().into_inner().unwrap()
    }
}

/// Checks all invariants: every acknowledged key is stored once, at its seq; logs are complete and
/// in order, the same through every instance for both users; every slot is owned once; no row is
/// where it does not belong; each key that is repeated, through any instance, gets the same answer.
pub async fn check(
    service: &Service,
    instances: &[&Instance],
    acknowledged: &[Acknowledged],
    live: &[usize],
) {
    let accesses: Vec<_> = instances.iter().map(|instance| instance.access()).collect();
    for ((low, high), expected) in checker::by_dialog(acknowledged) {
        let mut owner = None;
        for instance in instances {
            let url = format!("{}/admin/where/{low}/{high}", instance.admin);
            let found = instance.get(&url).await.1["owner"].clone();
            assert_eq!(*owner.get_or_insert(found.clone()), found, "{low}_{high}");
        }
        let reading = checker::read_everywhere(&accesses, (low, high))
            .await
            .unwrap();
        assert_eq!(reading.faults, [], "{low}_{high}");
        assert_eq!(checker::faults(&reading.log, &expected), [], "{low}_{high}");
        // The messages of an author are in the order of their sends, also of pipelined ones.
        let mut order = HashMap::<u64, u64>::new();
        for one in expected {
            let last = order.insert(one.from, one.seq).unwrap_or(0);
            assert!(
                one.seq > last,
                "{low}_{high}: {} wrote {} after {last}",
                one.from,
                one.seq
            );
        }
    }
    // Stratified: some of every dialog, through each instance in turn.
    for (n, one) in acknowledged.iter().enumerate().filter(|(n, _)| n % 7 == 0) {
        let instance = instances[n % instances.len()];
        let again = instance
            .api(one.from)
            .await
            .send(one.to, &one.key, &one.text)
            .await
            .unwrap();
        assert_eq!(again.seq, one.seq, "a repeat of {one:?}");
    }
    let mut owned = 0;
    for i in live {
        owned += service
            .databases
            .number(*i, "SELECT COUNT(*) FROM slots WHERE state = 'owner'")
            .await;
        assert_eq!(
            service
                .databases
                .number(
                    *i,
                    "SELECT COUNT(*) FROM slots WHERE state NOT IN ('owner', 'none')"
                )
                .await,
            0
        );
        for table in ["messages", "dialogs", "members"] {
            let orphans = format!(
                "FROM {table} JOIN slots ON slots.slot = {table}.slot WHERE state <> 'owner'"
            );
            let number = service
                .databases
                .number(*i, &format!("SELECT COUNT(*) {orphans}"))
                .await;
            if number > 0 {
                let slot =
                    format!("SELECT CAST(COALESCE(MIN(slots.slot), -1) AS SIGNED) {orphans}");
                let slot = service.databases.number(*i, &slot).await;
                panic!(
                    "{number} {table} where they do not belong, at database {i}, some of slot {slot} (-1: not any more)"
                );
            }
        }
    }
    assert_eq!(owned, 4096, "every slot is owned once");
}
