//! Devices that record what they receive, and users who write through them.

use crate::service::{Service, locked};
use anyhow::ensure;
use chat_client::{Access, Api, Client, Event};
use futures_util::{StreamExt, TryStreamExt, stream};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A message as a device received it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    pub seq: u64,
    pub key: String,
}

/// One device of a user.
pub struct Device {
    pub user: u64,
    pub client: Client,
    pub record: Arc<Record>,
}

/// What it has received.
#[derive(Default)]
pub struct Record {
    pub logs: Mutex<BTreeMap<String, Vec<Received>>>,
    pub count: AtomicU64,
    pub connected: AtomicBool,
    /// With which code, and when.
    pub closed: Mutex<Vec<(Option<u16>, Instant)>>,
    pub reconnected: Mutex<Vec<Instant>>,
    wrong: Mutex<Vec<String>>,
}

impl Device {
    pub fn start(access: Access, user: u64) -> Self {
        let (client, mut events) = Client::start(access, user);
        let record = Arc::new(Record::default());
        let device = Device {
            user,
            client,
            record: record.clone(),
        };
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                record.take(event);
            }
        });
        device
    }
}

impl Record {
    /// Whether everything arrived once and in order.
    pub fn is_right(&self) -> bool {
        locked(&self.wrong).is_empty()
    }

    fn take(&self, event: Event) {
        match event {
            Event::Message(message) | Event::Entry(message) => {
                let mut logs = locked(&self.logs);
                let log = logs.entry(message.dialog.clone()).or_default();
                let before = log.last().map_or(0, |received| received.seq);
                if message.seq != before + 1 {
                    locked(&self.wrong).push(format!(
                        "{}: {} after {before}",
                        message.dialog, message.seq
                    ));
                }
                log.push(Received {
                    seq: message.seq,
                    key: message.key.unwrap_or_default(),
                });
                self.count.fetch_add(1, Ordering::Relaxed);
            }
            Event::Connected => {
                self.connected.store(true, Ordering::Relaxed);
                locked(&self.reconnected).push(Instant::now());
            }
            Event::Disconnected { code, .. } => {
                self.connected.store(false, Ordering::Relaxed);
                locked(&self.closed).push((code, Instant::now()));
            }
            Event::Resync(dialog) => locked(&self.wrong).push(format!("{dialog} must be read")),
            Event::Closed(e) => locked(&self.wrong).push(format!("closed for good: {e}")),
            Event::Read(_) | Event::Typing { .. } | Event::Presence(_) => {}
        }
    }
}

/// Until all of them are connected.
pub async fn all_connected(devices: &[Device]) -> anyhow::Result<()> {
    let patience = Instant::now() + Duration::from_secs(60);
    while !devices
        .iter()
        .all(|device| device.record.connected.load(Ordering::Relaxed))
    {
        ensure!(Instant::now() < patience, "not all are connected");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// A message that was acknowledged.
#[derive(Clone)]
pub struct Sent {
    pub from: u64,
    pub to: u64,
    pub planned: Instant,
    pub took: Duration,
}

/// What users have sent.
#[derive(Default)]
pub struct Traffic {
    pub sent: Mutex<Vec<Sent>>,
    pub under_way: AtomicU64,
    pub wrong: Mutex<Vec<String>>,
}

impl Traffic {
    /// The 99th percentile of the sends that were planned in that time by users that `of` accepts,
    /// in milliseconds.
    pub fn p99(&self, from: Instant, until: Instant, of: impl Fn(u64) -> bool) -> f64 {
        let mut took: Vec<f64> = locked(&self.sent)
            .iter()
            .filter(|one| one.planned >= from && one.planned < until && of(one.from))
            .map(|one| one.took.as_secs_f64() * 1000.0)
            .collect();
        took.sort_by(f64::total_cmp);
        let last = took.len().saturating_sub(1);
        took.get((took.len() * 99 / 100).min(last))
            .copied()
            .unwrap_or(0.0)
    }
}

/// Pairs of users, each with a number of devices in `devices` from `first` on.
pub struct Talk {
    pub pairs: Vec<(u64, u64)>,
    pub rate: f64,
    pub seconds: f64,
    pub seed: u64,
}

impl Talk {
    /// Sends at a steady rate; every message through one of its author's devices, by rng.
    pub async fn run(&self, devices: &[Device], traffic: &Arc<Traffic>) {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let mut by_user = BTreeMap::<u64, Vec<&Device>>::new();
        for device in devices {
            by_user.entry(device.user).or_default().push(device);
        }
        let begun = Instant::now();
        for n in 0..(self.rate * self.seconds) as u64 {
            let planned = begun + Duration::from_secs_f64(n as f64 / self.rate);
            tokio::time::sleep_until(planned.into()).await;
            let (a, b) = self.pairs[rng.random_range(0..self.pairs.len() as u64) as usize];
            let (from, to) = if rng.random_range(0..2) == 0 {
                (a, b)
            } else {
                (b, a)
            };
            let Some(own) = by_user.get(&from) else {
                continue;
            };
            let client = own[rng.random_range(0..own.len() as u64) as usize]
                .client
                .clone();
            let traffic = traffic.clone();
            traffic.under_way.fetch_add(1, Ordering::Relaxed);
            let key = format!("{}.{n}", self.seed);
            tokio::spawn(async move {
                match client.send(to, key.clone(), format!("text {key}")).await {
                    Ok(_) => locked(&traffic.sent).push(Sent {
                        from,
                        to,
                        planned,
                        took: planned.elapsed(),
                    }),
                    Err(e) => locked(&traffic.wrong).push(format!("{key} was refused: {e}")),
                }
                traffic.under_way.fetch_sub(1, Ordering::Relaxed);
            });
        }
    }
}

/// Waits until everything is acknowledged.
pub async fn answered(traffic: &Traffic) -> anyhow::Result<()> {
    let patience = Instant::now() + Duration::from_secs(60);
    while traffic.under_way.load(Ordering::Relaxed) > 0 {
        ensure!(Instant::now() < patience, "sends without an answer");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let wrong = locked(&traffic.wrong).clone();
    ensure!(wrong.is_empty(), "{wrong:?}");
    Ok(())
}

/// How many messages each device must receive: those of its user's dialogs.
fn expected(devices: &[Device], traffic: &Traffic) -> BTreeMap<u64, u64> {
    let mut expected: BTreeMap<u64, u64> = devices.iter().map(|device| (device.user, 0)).collect();
    for one in locked(&traffic.sent).iter() {
        for user in [one.from, one.to] {
            if let Some(expected) = expected.get_mut(&user) {
                *expected += 1;
            }
        }
    }
    expected
}

/// How long it takes from `since` until every device has everything.
pub async fn caught_up(
    devices: &[Device],
    traffic: &Traffic,
    since: Instant,
    limit: Duration,
) -> anyhow::Result<Duration> {
    let expected = expected(devices, traffic);
    loop {
        let behind: Vec<&Device> = devices
            .iter()
            .filter(|device| device.record.count.load(Ordering::Relaxed) < expected[&device.user])
            .collect();
        if behind.is_empty() {
            return Ok(since.elapsed());
        }
        let first = &behind[0];
        ensure!(
            since.elapsed() < limit,
            "{} devices are behind after {limit:?}; one of user {} has {} of {}",
            behind.len(),
            first.user,
            first.record.count.load(Ordering::Relaxed),
            expected[&first.user]
        );
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Compares what every device has received, message for message, with the logs of the dialogs. How
/// many were compared.
pub async fn compare(
    service: &Service,
    i: u16,
    devices: &[Device],
    traffic: &Traffic,
) -> anyhow::Result<u64> {
    let mut dialogs: Vec<(u64, u64)> = locked(&traffic.sent)
        .iter()
        .map(|one| (one.from.min(one.to), one.from.max(one.to)))
        .collect();
    dialogs.sort_unstable();
    dialogs.dedup();
    let logs: BTreeMap<String, Vec<Received>> = stream::iter(dialogs)
        .map(|(low, high)| async move {
            let log = Api::new(service.access(i), low)
                .await?
                .log_upwards(high)
                .await?;
            let received = log.into_iter().map(|message| Received {
                seq: message.seq,
                key: message.key.unwrap_or_default(),
            });
            anyhow::Ok((format!("{low}_{high}"), received.collect()))
        })
        .buffer_unordered(16)
        .try_collect()
        .await?;
    let stored: usize = logs.values().map(Vec::len).sum();
    ensure!(
        stored == locked(&traffic.sent).len(),
        "{stored} are stored, {} were acknowledged",
        locked(&traffic.sent).len()
    );
    let mut compared = 0;
    for device in devices {
        let wrong = locked(&device.record.wrong).clone();
        ensure!(
            wrong.is_empty(),
            "a device of user {}: {wrong:?}",
            device.user
        );
        let record = locked(&device.record.logs);
        let user = device.user.to_string();
        for (dialog, log) in &logs {
            if dialog.split('_').any(|member| member == user) {
                ensure!(
                    record.get(dialog) == Some(log),
                    "a device of user {user} received something else in {dialog}"
                );
                compared += log.len() as u64;
            }
        }
    }
    Ok(compared)
}
