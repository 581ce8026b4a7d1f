//! Members are removed from rooms while everybody writes, the bus loses messages, instances are
//! killed and slots move: no device receives an entry above that by which its user has left, and
//! none lacks one below.

use super::{Options, Users};
use crate::service::{Service, locked};
use anyhow::{Context, bail, ensure};
use chat_client::{Api, Client, ClientError, Event};
use chat_wire::{ChangeRoomRequest, CreateRoomRequest, ErrorCode, Message, RoomHistory};
use futures_util::future::join_all;
use futures_util::{StreamExt, TryStreamExt, stream};
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{RngExt, SeedableRng};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use testkit::lossy::Lossy;

/// Members of a room at first, beside its owner.
const MEMBERS: usize = 24;

/// Of them, how many are removed.
const REMOVED: usize = 20;

/// Rooms that are under way at once.
const AT_ONCE: usize = 16;

/// How long a device may take to have everything.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a device has received: the seqs of each dialog, in the order of their arrival.
type Received = Arc<Mutex<HashMap<String, Vec<u64>>>>;

struct Device {
    user: u64,
    client: Client,
    received: Received,
    connected: Arc<AtomicBool>,
}

impl Device {
    fn start(access: chat_client::Access, user: u64) -> Self {
        let (client, mut events) = Client::start(access, user);
        let (received, connected) = (Received::default(), Arc::new(AtomicBool::new(false)));
        let (takes, connects) = (received.clone(), connected.clone());
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                match event {
                    Event::Message(entry) | Event::Entry(entry) => {
                        let mut received = locked(&takes);
                        received.entry(entry.dialog).or_default().push(entry.seq);
                    }
                    Event::Connected => connects.store(true, Ordering::Relaxed),
                    Event::Resync(dialog) => eprintln!("user {user}: {dialog} must be read"),
                    Event::Disconnected { .. }
                    | Event::Read(_)
                    | Event::Typing { .. }
                    | Event::Presence(_)
                    | Event::Closed(_) => {}
                }
            }
        });
        Self {
            user,
            client,
            received,
            connected,
        }
    }
}

/// A room, and its owner.
struct Room {
    owner: u64,
    room: String,
}

/// What has happened.
#[derive(Default)]
struct Counts {
    removals: AtomicU64,
    sent: AtomicU64,
    refused: AtomicU64,
}

pub(super) async fn removals(
    service: &mut Service,
    options: &Options,
    users: Users,
    losing: &[Lossy],
) -> anyhow::Result<()> {
    let rooms = options.count.unwrap_or(10_000).div_ceil(REMOVED as u64);
    let access = [0, 1].map(|i| service.access_to_any(i));
    let mut devices = Vec::new();
    for n in 0..users.count {
        let first = (n % 2) as usize;
        devices.push(Device::start(access[first].clone(), users.user(n)));
        if n % 3 == 0 {
            devices.push(Device::start(access[1 - first].clone(), users.user(n)));
        }
    }
    let patience = Instant::now() + PATIENCE;
    while !devices
        .iter()
        .all(|device| device.connected.load(Ordering::Relaxed))
    {
        ensure!(Instant::now() < patience, "not all devices are connected");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // By user: any of the devices may act.
    let mut clients = BTreeMap::<u64, Vec<&Device>>::new();
    for device in &devices {
        clients.entry(device.user).or_default().push(device);
    }
    let (clients, counts) = (&clients, &Counts::default());
    let begun = Instant::now();
    let made = stream::iter(0..rooms)
        .map(|room| async move { one_room(clients, users, room, counts).await })
        .buffer_unordered(AT_ONCE)
        .try_collect::<Vec<Room>>();
    let mut kills = 0;
    let mut edits = 0;
    let made = tokio::select! {
        made = made => made?,
        broken = disturb(service, users.seed, &mut kills, &mut edits) => match broken {
            Ok(never) => never,
            Err(e) => return Err(e),
        },
    };
    let took = begun.elapsed();
    for i in 0..2 {
        if service.has_ended(i)? {
            service.start_instance(i, "").await?;
        }
    }
    let (mut compared, mut gaps) = (0, 0);
    for Room { owner, room } in &made {
        // The owner is in it from the first entry on.
        let api = Api::new(service.access(0), *owner).await?;
        let log = api.log_upwards(room.as_str()).await?;
        for device in &devices {
            let expected = seen(&log, device.user);
            compared += wait_for(device, room, &expected).await?;
            gaps += 1;
        }
    }
    let mut read = 0.0;
    for i in 0..2 {
        read += service.metric(i, "chat_messages_caught_up_total").await?;
    }
    let lost = losing.iter().map(|lossy| lossy.counts().0).sum::<u64>();
    println!(
        "  {} removals from {rooms} rooms in {:.0} s, beside {} messages; {} sends of those who were removed were refused",
        counts.removals.load(Ordering::Relaxed),
        took.as_secs_f64(),
        counts.sent.load(Ordering::Relaxed),
        counts.refused.load(Ordering::Relaxed)
    );
    println!(
        "  the bus lost {lost} messages, instances were killed {kills} times, shards.toml was edited {edits} times; {read} deliveries were read from the shards"
    );
    println!(
        "  {compared} deliveries on {} devices compared with {gaps} logs: none above a leaving, none missing below",
        devices.len()
    );
    Ok(())
}

/// Makes a room, and removes members from it while they write.
async fn one_room(
    clients: &BTreeMap<u64, Vec<&Device>>,
    users: Users,
    n: u64,
    counts: &Counts,
) -> anyhow::Result<Room> {
    let mut rng = StdRng::seed_from_u64(users.seed.wrapping_mul(1_000_003).wrapping_add(n));
    let mut chosen: Vec<u64> = clients.keys().copied().collect();
    chosen.shuffle(&mut rng);
    let owner = chosen.pop().context("no users")?;
    let late: Vec<u64> = chosen.split_off(chosen.len().saturating_sub(REMOVED / 4));
    let mut members: Vec<u64> = chosen.into_iter().take(MEMBERS).collect();
    let device = |rng: &mut StdRng, user: u64| {
        let devices = &clients[&user];
        devices.choose(rng).copied().context("no device")
    };
    let request = CreateRoomRequest {
        key: format!("room {n}"),
        members: members.clone(),
        history: RoomHistory::Since,
        title: None,
    };
    let room = device(&mut rng, owner)?.client.create_room(request).await?;
    let mut newcomers = late.into_iter();
    for step in 0..REMOVED {
        let place = rng.random_range(0..members.len());
        let out = members.swap_remove(place);
        let mut change = ChangeRoomRequest {
            key: format!("out {step}"),
            remove: vec![out],
            ..ChangeRoomRequest::default()
        };
        // Now and then somebody comes in with the same entry.
        if step % 4 == 0 {
            let newcomer = newcomers.next();
            change.add.extend(newcomer);
            members.extend(newcomer);
        }
        let mut sends = Vec::new();
        // Some write at the same moment, the one who is removed too.
        let mut authors: Vec<u64> = members.sample(&mut rng, 2).copied().collect();
        authors.push(out);
        for author in authors {
            let client = &device(&mut rng, author)?.client;
            let key = format!("{step}.{author}");
            let sent = client
                .enqueue(room.as_str(), key, format!("{n}.{step}"))
                .await?;
            sends.push(async move { (author, sent.await) });
        }
        let client = &device(&mut rng, owner)?.client;
        let (changed, sent) =
            tokio::join!(client.change_room(room.clone(), change), join_all(sends));
        changed?;
        counts.removals.fetch_add(1, Ordering::Relaxed);
        for (author, sent) in sent {
            match sent {
                Ok(_) => drop(counts.sent.fetch_add(1, Ordering::Relaxed)),
                // Who has just come in may be too early, who goes too late.
                Err(ClientError::Refused(body)) if body.code == ErrorCode::NotMember => {
                    counts.refused.fetch_add(1, Ordering::Relaxed);
                }
                Err(e) => bail!("room {n}: a send of {author}: {e}"),
            }
        }
    }
    Ok(Room { owner, room })
}

/// Kills instances, and changes the weights of shards, so that slots move all the time, until it is
/// dropped.
async fn disturb(
    service: &mut Service,
    seed: u64,
    kills: &mut u64,
    edits: &mut u64,
) -> anyhow::Result<Vec<Room>> {
    let mut rng = StdRng::seed_from_u64(seed);
    loop {
        let pause = Duration::from_millis(rng.random_range(3_000..8_000));
        tokio::time::sleep(pause).await;
        if rng.random_range(0..2) == 0 {
            let instance = rng.random_range(0..2);
            service.kill_instance(instance)?;
            tokio::time::sleep(Duration::from_millis(rng.random_range(100..2_000))).await;
            service.start_instance(instance, "").await?;
            *kills += 1;
        }
        let weights = ["weight = 1", "weight = 2", "weight = 3"];
        let mut weigh = || *weights.choose(&mut rng).unwrap_or(&"weight = 1");
        let shards: Vec<(u16, &str)> = (1..=5).map(|n| (n, weigh())).collect();
        service.save(&shards)?;
        *edits += 1;
    }
}

/// The entries of a log that a user may see: while a member, with both ends.
fn seen(log: &[Message], user: u64) -> Vec<u64> {
    let (mut inside, mut seen) = (false, Vec::new());
    for entry in log {
        let comes = entry.joined.contains(&user);
        if inside || comes {
            seen.push(entry.seq);
        }
        inside = (inside || comes) && !entry.left.contains(&user);
    }
    seen
}

/// Waits until a device has all that it should have of a room; fails if it has anything else.
async fn wait_for(device: &Device, room: &str, expected: &[u64]) -> anyhow::Result<u64> {
    let allowed: BTreeSet<u64> = expected.iter().copied().collect();
    let patience = Instant::now() + PATIENCE;
    loop {
        let there = locked(&device.received)
            .get(room)
            .cloned()
            .unwrap_or_default();
        if let Some(leak) = there.iter().find(|seq| !allowed.contains(seq)) {
            bail!(
                "user {} received entry {leak} of room {room}, which is not for it: {expected:?}",
                device.user
            );
        }
        if there == expected {
            return Ok(there.len() as u64);
        }
        ensure!(
            Instant::now() < patience,
            "user {} of room {room} has {there:?}, not {expected:?}",
            device.user
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_sees_a_room_from_joining_to_leaving() {
        let entry = |seq, joined: &[u64], left: &[u64]| Message {
            seq,
            joined: joined.to_vec(),
            left: left.to_vec(),
            ..Message::default()
        };
        let log = [
            entry(1, &[7, 8], &[]),
            entry(2, &[], &[]),
            entry(3, &[9], &[8]),
            entry(4, &[], &[]),
            entry(5, &[8], &[9]),
            entry(6, &[], &[]),
        ];
        assert_eq!(seen(&log, 7), [1, 2, 3, 4, 5, 6]);
        assert_eq!(seen(&log, 8), [1, 2, 3, 5, 6]);
        assert_eq!(seen(&log, 9), [3, 4, 5]);
        assert!(seen(&log, 10).is_empty());
    }
}
