//! Whatever is lost on the way, every device has every message once and in order: shown on real servers, with the bus losing
//! messages, instances killed and asked to go, readers that stop, and crowds that come back at once.

use crate::devices::{Device, Said, Talk, all_connected, answered, compare, level};
use crate::lossy::Lossy;
use crate::proxy::{Mode, Proxy};
use crate::rng::Chance;
use crate::service::{Service, locked};
use anyhow::{Context, ensure};
use chat_client::Api;
use chat_wire::{Close, Message};
use clap::{Args, ValueEnum};
use futures_util::{StreamExt, stream};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// The bus loses messages at random, and is killed and started again twice.
    Lossy,
    /// One of two instances is killed.
    Killed,
    /// A client stops reading while much is sent to it.
    Slow,
    /// Sends, read marks and reconnections at random, with a shard added on the way: inboxes must agree with the logs.
    Marks,
    /// An instance with many sessions is asked to go.
    Handover,
    /// Many clients come back at once.
    Storm,
    /// `chat-client talk` through a connection that is cut every few seconds.
    Talk,
}

#[derive(Args)]
pub struct Options {
    /// What goes wrong; all of it, one after the other, if left out.
    #[arg(long, value_enum)]
    scenario: Option<Scenario>,
    /// The server.
    #[arg(long, default_value = "target/release/chat")]
    chat: PathBuf,
    /// The client.
    #[arg(long, default_value = "target/release/chat-client")]
    chat_client: PathBuf,
    /// Where servers, logs and the shards file are put.
    #[arg(long)]
    dir: PathBuf,
    /// How long people talk, in seconds.
    #[arg(long, default_value_t = 120.0)]
    seconds: f64,
    /// Messages a second, planned.
    #[arg(long, default_value_t = 300.0)]
    rate: f64,
    /// People.
    #[arg(long, default_value_t = 200)]
    users: u64,
    /// Of a hundred messages of the bus, how many are lost.
    #[arg(long, default_value_t = 5)]
    losses: u64,
    /// Clients of the handover and of the storm, and messages for the slow reader.
    #[arg(long)]
    count: Option<u64>,
    /// Where chance begins; printed.
    #[arg(long, default_value_t = 7)]
    seed: u64,
    /// The first of some dozens of ports.
    #[arg(long, default_value_t = 8500)]
    port: u16,
}

pub async fn run(options: Options) -> anyhow::Result<()> {
    std::fs::create_dir_all(&options.dir)?;
    println!("seed {}", options.seed);
    let all = [
        Scenario::Lossy,
        Scenario::Killed,
        Scenario::Slow,
        Scenario::Marks,
        Scenario::Handover,
        Scenario::Storm,
        Scenario::Talk,
    ];
    let scenarios = options.scenario.map_or(all.to_vec(), |one| vec![one]);
    let mut service = Service::new(options.chat.clone(), options.dir.clone(), options.port);
    let mut done = prepare(&service);
    for (n, scenario) in scenarios.into_iter().enumerate() {
        if done.is_err() {
            break;
        }
        println!("\n{scenario:?}");
        done = one(&mut service, &options, scenario, n as u64)
            .await
            .with_context(|| format!("{scenario:?}"));
        for i in 0..2 {
            service.kill_instance(i)?;
        }
        service.bus = [None, None];
    }
    done
}

fn prepare(service: &Service) -> anyhow::Result<()> {
    service.start_servers()?;
    service.save(&[(1, ""), (2, ""), (3, ""), (4, "")])
}

async fn one(
    service: &mut Service,
    options: &Options,
    scenario: Scenario,
    n: u64,
) -> anyhow::Result<()> {
    let mut losing = Vec::new();
    if scenario == Scenario::Lossy {
        for i in 0..2 {
            let chance = Mutex::new(Chance(options.seed + i as u64));
            let losses = options.losses;
            let loses = move |_: &str, _: &[u8]| locked(&chance).below(100) < losses;
            let lossy = Lossy::to(&service.nats(), Arc::new(loses)).await?;
            service.bus[i] = Some(lossy.url.clone());
            losing.push(lossy);
        }
    }
    service.start_instance(0, "").await?;
    service.start_instance(1, "").await?;
    // Each scenario has people of its own, so that every dialog begins with its first message.
    let people = People {
        first: 1 + n * 1_000_000,
        count: options.users,
        seed: options.seed + n,
    };
    match scenario {
        Scenario::Lossy => lossy(service, options, people, &losing).await,
        Scenario::Killed => killed(service, options, people).await,
        Scenario::Slow => slow(service, options, people).await,
        Scenario::Marks => marks(service, options, people).await,
        Scenario::Handover => handover(service, options, people).await,
        Scenario::Storm => storm(service, options, people).await,
        Scenario::Talk => talk(service, options, people).await,
    }
}

/// Who takes part.
#[derive(Clone, Copy)]
struct People {
    first: u64,
    count: u64,
    seed: u64,
}

impl People {
    fn user(self, n: u64) -> u64 {
        self.first + n
    }

    /// Some pairs of them, each once.
    fn pairs(self, count: u64) -> Vec<(u64, u64)> {
        let mut chance = Chance(self.seed);
        let mut pairs: Vec<(u64, u64)> = (0..count)
            .map(|_| {
                let a = chance.below(self.count);
                let b = (a + 1 + chance.below(self.count - 1)) % self.count;
                (self.user(a.min(b)), self.user(a.max(b)))
            })
            .collect();
        pairs.sort_unstable();
        pairs.dedup();
        pairs
    }

    /// A device for each, and a second one on the other instance for every third.
    fn devices(self, service: &Service) -> Vec<Device> {
        let access = [0, 1].map(|i| service.access_to_any(i));
        let mut devices = Vec::new();
        for n in 0..self.count {
            let first = (n % 2) as usize;
            devices.push(Device::start(access[first].clone(), self.user(n)));
            if n % 3 == 0 {
                devices.push(Device::start(access[1 - first].clone(), self.user(n)));
            }
        }
        devices
    }
}

/// Who follows their dialogs from the start, and who just listens: every second device.
async fn follow(devices: &[Device], pairs: &[(u64, u64)]) -> anyhow::Result<()> {
    for device in devices.iter().step_by(2) {
        for (low, high) in pairs
            .iter()
            .filter(|pair| [pair.0, pair.1].contains(&device.user))
        {
            device.client.follow(format!("{low}_{high}"), 0).await?;
        }
    }
    Ok(())
}

async fn lossy(
    service: &mut Service,
    options: &Options,
    people: People,
    losing: &[Lossy],
) -> anyhow::Result<()> {
    let devices = people.devices(service);
    all_connected(&devices).await?;
    let pairs = people.pairs(people.count * 3);
    follow(&devices, &pairs).await?;
    let said = Arc::new(Said::default());
    let plan = Talk {
        pairs,
        rate: options.rate,
        seconds: options.seconds,
        seed: people.seed,
    };
    let begun = Instant::now();
    let faults = async {
        for part in [1.0, 2.0] {
            let at = begun + Duration::from_secs_f64(options.seconds * part / 3.0);
            tokio::time::sleep_until(at.into()).await;
            service.kill_nats()?;
            tokio::time::sleep(Duration::from_secs(2)).await;
            service.start_nats()?;
        }
        anyhow::Ok(())
    };
    let ((), faults) = tokio::join!(plan.run(&devices, &said), faults);
    faults?;
    answered(&said).await?;
    let took = level(&devices, &said, Instant::now(), Duration::from_secs(5)).await?;
    let compared = compare(service, 0, &devices, &said).await?;
    let mut read = 0.0;
    for i in 0..2 {
        read += service.metric(i, "chat_messages_caught_up_total").await?;
    }
    let counts = losing.iter().map(Lossy::counts);
    let (lost, passed) = counts.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    println!(
        "  {} messages; the bus lost {lost} of {} that it carried, and was killed twice; {} devices",
        locked(&said.sent).len(),
        lost + passed,
        devices.len()
    );
    println!(
        "  all level {} ms after the last acknowledgement; {read} deliveries were read from the shards",
        took.as_millis()
    );
    println!("  {compared} deliveries compared with the logs: each once, in order, whole");
    Ok(())
}

async fn killed(service: &mut Service, options: &Options, people: People) -> anyhow::Result<()> {
    let devices = people.devices(service);
    all_connected(&devices).await?;
    let pairs = people.pairs(people.count * 3);
    let said = Arc::new(Said::default());
    let seconds = (options.seconds / 3.0).max(6.0);
    let plan = Talk {
        pairs,
        rate: options.rate,
        seconds,
        seed: people.seed,
    };
    let kill = async {
        tokio::time::sleep(Duration::from_secs_f64(seconds / 3.0)).await;
        service.kill_instance(0)?;
        anyhow::Ok(Instant::now())
    };
    let ((), killed) = tokio::join!(plan.run(&devices, &said), kill);
    let killed = killed?;
    answered(&said).await?;
    let took = level(&devices, &said, Instant::now(), Duration::from_secs(5)).await?;
    let compared = compare(service, 1, &devices, &said).await?;
    let back = reconnections(&devices, killed);
    println!(
        "  {} messages; {} devices lost their instance and were back on the other after {} (half) to {} ms (all)",
        locked(&said.sent).len(),
        back.len(),
        millis(&back, 0.5),
        millis(&back, 1.0)
    );
    println!(
        "  all level {} ms after the last acknowledgement; {compared} deliveries compared with the logs",
        took.as_millis()
    );
    Ok(())
}

/// How long after `since` each device that was cut off was connected again.
fn reconnections(devices: &[Device], since: Instant) -> Vec<Duration> {
    let mut back: Vec<Duration> = devices
        .iter()
        .filter_map(|device| {
            let again = locked(&device.heard.reconnected);
            again.iter().find(|at| **at > since).map(|at| *at - since)
        })
        .collect();
    back.sort();
    back
}

fn millis(sorted: &[Duration], share: f64) -> u128 {
    let last = sorted.len().saturating_sub(1);
    sorted
        .get(((sorted.len() as f64 * share) as usize).min(last))
        .map_or(0, Duration::as_millis)
}

type Socket =
    tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>>;

async fn socket(access: &chat_client::Access, user: u64) -> anyhow::Result<Socket> {
    let mut request = access.socket_url().into_client_request()?;
    let token = access.token(user).await?;
    request
        .headers_mut()
        .insert("authorization", format!("Bearer {token}").parse()?);
    Ok(tokio_tungstenite::connect_async(request).await?.0)
}

async fn slow(service: &mut Service, options: &Options, people: People) -> anyhow::Result<()> {
    let count = options.count.unwrap_or(10_000);
    let devices = people.devices(service);
    all_connected(&devices).await?;
    let said = Arc::new(Said::default());
    let mut writers = Vec::new();
    for n in 0..20 {
        writers.push(Api::new(service.access(1), people.user(600_000 + n)).await?);
    }
    // The same for one who reads, so that the load of it can be told from what a slow reader does.
    let reads = people.user(500_001);
    let reading = Device::start(service.access(0), reads);
    let (from, until) = flood(options, people, &devices, &said, &writers, reads, count).await;
    let with_reader = said.p99(from, until, |_| true);
    answered(&said).await?;

    // The one who will not read: connects, takes the welcome, and then nothing more from the socket.
    let stuck = people.user(500_000);
    let mut socket = socket(&service.access(0), stuck).await?;
    socket.next().await.context("no welcome")??;
    let before = service.resident_mib(0)?;
    let stop = AtomicBool::new(false);
    let slow = "chat_closes_total{reason=\"slow_reader\"}";
    let watching = async {
        let (mut peak, mut closed, mut code) = (before, None, None);
        while !stop.load(Ordering::Relaxed) {
            peak = peak.max(service.resident_mib(0)?);
            if closed.is_none() && service.metric(0, slow).await? > 0.0 {
                closed = Some(Instant::now());
                // A client that reads again finds the frames in the buffers, and the close frame with its reason.
                while let Some(Ok(frame)) = socket.next().await {
                    if let tokio_tungstenite::tungstenite::Message::Close(Some(close)) = frame {
                        code = Some(u16::from(close.code));
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        anyhow::Ok((peak, closed, code))
    };
    let sending = async {
        let during = flood(options, people, &devices, &said, &writers, stuck, count).await;
        stop.store(true, Ordering::Relaxed);
        during
    };
    let ((from, until), watched) = tokio::join!(sending, watching);
    let (peak, closed, code) = watched?;
    let closed = closed.context("the slow reader was not closed")?;
    let code = code.context("no close frame")?;
    ensure!(code == Close::SlowReader.code(), "closed with {code}");
    // On return it misses nothing: it follows all of its dialogs from their beginning.
    let back = Device::start(service.access_to_any(0), stuck);
    for n in 0..writers.len() as u64 {
        back.client
            .follow(format!("{stuck}_{}", people.user(600_000 + n)), 0)
            .await?;
    }
    let returned = Instant::now();
    for (device, what) in [(&reading, "who read"), (&back, "who came back")] {
        while device.heard.count.load(Ordering::Relaxed) < count {
            let has = device.heard.count.load(Ordering::Relaxed);
            ensure!(
                returned.elapsed() < Duration::from_secs(60),
                "{what} has {has} of {count}"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    let took = returned.elapsed();
    ensure!(
        reading.heard.is_right() && back.heard.is_right(),
        "not in order"
    );
    answered(&said).await?;
    level(&devices, &said, Instant::now(), Duration::from_secs(5)).await?;
    println!(
        "  {count} messages of 4,000 characters for one who does not read, in {:.1} s",
        (until - from).as_secs_f64()
    );
    println!(
        "  closed {} ms after the first was sent, with {code}",
        (closed - from).as_millis()
    );
    println!(
        "  memory of its instance {before:.0} MiB before, {peak:.0} MiB at most, {:.0} MiB after",
        service.resident_mib(0)?
    );
    println!(
        "  p99 of the others {with_reader:.1} ms beside one who reads as much, {:.1} ms beside the slow one",
        said.p99(from, until, |_| true)
    );
    println!(
        "  back: all {count} messages, in order, after {:.1} s",
        took.as_secs_f64()
    );
    Ok(())
}

/// Much for one, while others talk; from when until when.
async fn flood(
    options: &Options,
    people: People,
    devices: &[Device],
    said: &Arc<Said>,
    writers: &[Api],
    to: u64,
    count: u64,
) -> (Instant, Instant) {
    let (begun, seconds) = (Instant::now(), count as f64 / 500.0);
    let text = "x".repeat(4000);
    let text = &text;
    let sending = stream::iter(0..count).for_each_concurrent(64, |n| {
        let writer = &writers[n as usize % writers.len()];
        async move {
            tokio::time::sleep_until((begun + Duration::from_secs_f64(n as f64 / 500.0)).into())
                .await;
            while let Err(e) = writer.send(to, &format!("s{n}"), text).await {
                println!("  {e}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    });
    let pairs = people.pairs(people.count * 3);
    let plan = Talk {
        pairs,
        rate: options.rate / 2.0,
        seconds,
        seed: people.seed ^ to,
    };
    tokio::join!(sending, plan.run(devices, said));
    (begun, Instant::now())
}

async fn handover(service: &mut Service, options: &Options, people: People) -> anyhow::Result<()> {
    let people = People {
        count: options.count.unwrap_or(1000),
        ..people
    };
    let access = service.access_to_any(0);
    let devices: Vec<Device> = (0..people.count)
        .map(|n| Device::start(access.clone(), people.user(n)))
        .collect();
    all_connected(&devices).await?;
    let said = Arc::new(Said::default());
    let plan = Talk {
        pairs: people.pairs(people.count),
        rate: options.rate,
        seconds: 20.0,
        seed: people.seed,
    };
    let (url, went) = (service.url(0), Mutex::new((None, None, None)));
    let go = async {
        tokio::time::sleep(Duration::from_secs(4)).await;
        let asked = Instant::now();
        service.terminate_instance(0)?;
        let mut not_ready = None;
        while !service.has_ended(0)? {
            if not_ready.is_none()
                && let Ok(answer) = reqwest::get(format!("{url}/readyz")).await
                && answer.status() == 503
            {
                not_ready = Some(asked.elapsed());
            }
            ensure!(asked.elapsed() < Duration::from_secs(30), "it does not go");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        *locked(&went) = (Some(asked), not_ready, Some(asked.elapsed()));
        anyhow::Ok(())
    };
    let ((), gone) = tokio::join!(plan.run(&devices, &said), go);
    gone?;
    answered(&said).await?;
    let took = level(&devices, &said, Instant::now(), Duration::from_secs(5)).await?;
    let compared = compare(service, 1, &devices, &said).await?;
    let (asked, not_ready, ended) = *locked(&went);
    let (asked, not_ready) = (
        asked.context("not asked")?,
        not_ready.context("it was never not ready")?,
    );
    let mut closed: Vec<(Option<u16>, Duration)> = devices
        .iter()
        .flat_map(|device| locked(&device.heard.closed).clone())
        .filter(|(_, at)| *at > asked)
        .map(|(code, at)| (code, at - asked))
        .collect();
    closed.sort_by_key(|(_, after)| *after);
    let with_1012 = closed
        .iter()
        .filter(|(code, _)| *code == Some(Close::Restart.code()))
        .count();
    let after: Vec<Duration> = closed.iter().map(|(_, after)| *after).collect();
    println!(
        "  {} sessions; not ready after {} ms, gone after {} ms",
        devices.len(),
        not_ready.as_millis(),
        ended.unwrap_or_default().as_millis()
    );
    println!(
        "  {} closings, {with_1012} of them 1012: the first after {} ms, half after {}, the last after {}",
        closed.len(),
        millis(&after, 0.0),
        millis(&after, 0.5),
        millis(&after, 1.0)
    );
    println!(
        "  back on the other: half after {} ms, all after {} ms",
        millis(&reconnections(&devices, asked), 0.5),
        millis(&reconnections(&devices, asked), 1.0)
    );
    println!(
        "  {} messages meanwhile; all level {} ms after the last acknowledgement; {compared} deliveries compared with the logs",
        locked(&said.sent).len(),
        took.as_millis()
    );
    println!(
        "  p99 of all sends {:.1} ms before, {:.1} ms from then on",
        said.p99(asked - Duration::from_secs(3), asked, |_| true),
        said.p99(asked, Instant::now(), |_| true)
    );
    ensure!(with_1012 >= devices.len(), "not everyone was told why");
    Ok(())
}

async fn storm(service: &mut Service, options: &Options, people: People) -> anyhow::Result<()> {
    let crowd = People {
        count: options.count.unwrap_or(5000),
        first: people.first + 100_000,
        ..people
    };
    // A crowd on one instance; and others who talk on the other one, whom it concerns only as neighbours.
    let access = [service.access_to_any(0), service.access(1)];
    let crowd_devices: Vec<Device> = (0..crowd.count)
        .map(|n| Device::start(access[0].clone(), crowd.user(n)))
        .collect();
    let others: Vec<Device> = (0..people.count)
        .map(|n| Device::start(access[1].clone(), people.user(n)))
        .collect();
    all_connected(&crowd_devices).await?;
    all_connected(&others).await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let (said, aside) = (Arc::new(Said::default()), Arc::new(Said::default()));
    let in_crowd = Talk {
        pairs: crowd.pairs(crowd.count),
        rate: options.rate / 3.0,
        seconds: 25.0,
        seed: crowd.seed,
    };
    let beside = Talk {
        pairs: people.pairs(people.count * 2),
        rate: options.rate / 3.0,
        seconds: 25.0,
        seed: people.seed + 1,
    };
    let kill = async {
        tokio::time::sleep(Duration::from_secs(8)).await;
        service.kill_instance(0)?;
        let killed = Instant::now();
        while !crowd_devices.iter().all(|device| {
            device.heard.connected.load(Ordering::Relaxed)
                && locked(&device.heard.reconnected).len() > 1
        }) {
            ensure!(
                killed.elapsed() < Duration::from_secs(60),
                "not all are back"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        anyhow::Ok((killed, Instant::now()))
    };
    let ((), (), storm) = tokio::join!(
        in_crowd.run(&crowd_devices, &said),
        beside.run(&others, &aside),
        kill
    );
    let (killed, back) = storm?;
    for (devices, said) in [(&crowd_devices, &said), (&others, &aside)] {
        answered(said).await?;
        let took = level(devices, said, Instant::now(), Duration::from_secs(5)).await?;
        let compared = compare(service, 1, devices, said).await?;
        println!(
            "  {} devices: all level {} ms after the last acknowledgement; {compared} deliveries compared with the logs",
            devices.len(),
            took.as_millis()
        );
    }
    let came = reconnections(&crowd_devices, killed);
    println!(
        "  {} clients lost their instance at once: half were back after {} ms, 99 % after {} ms, all after {} ms",
        came.len(),
        millis(&came, 0.5),
        millis(&came, 0.99),
        (back - killed).as_millis()
    );
    println!(
        "  p99 of the others {:.1} ms before, {:.1} ms until all were back, {:.1} ms afterwards",
        aside.p99(
            killed - Duration::from_secs(6),
            killed - Duration::from_secs(2),
            |_| true
        ),
        aside.p99(killed, back, |_| true),
        aside.p99(back, Instant::now(), |_| true)
    );
    Ok(())
}

async fn talk(service: &mut Service, options: &Options, people: People) -> anyhow::Result<()> {
    let (me, peer) = (people.user(0), people.user(1));
    let target = service.url(0).replace("http://", "");
    let proxy = Proxy::to(target).await;
    let token = service.access(0).token(me).await?;
    let mut child = tokio::process::Command::new(&options.chat_client)
        .args([
            "talk",
            "--user",
            &me.to_string(),
            "--with",
            &peer.to_string(),
        ])
        .args([
            "--url",
            &format!("http://127.0.0.1:{}", proxy.port),
            "--token",
            &token,
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("chat-client")?;
    let mut keyboard = child.stdin.take().context("stdin")?;
    let mut screen = tokio::io::BufReader::new(child.stdout.take().context("stdout")?).lines();
    let shown = Arc::new(Mutex::new(Vec::<String>::new()));
    let (shows, mut entered) = (shown.clone(), false);
    while !entered {
        let line = screen.next_line().await?.context("it ended")?;
        entered = line.contains("connected");
    }
    tokio::spawn(async move {
        while let Ok(Some(line)) = screen.next_line().await {
            locked(&shows).push(line);
        }
    });
    let end = Instant::now() + Duration::from_secs_f64(options.seconds.min(60.0));
    let other = Api::new(service.access(1), peer).await?;
    let mut chance = Chance(options.seed);
    let (mut cuts, mut mine, mut theirs) = (0, 0u64, 0u64);
    let mut next_flap = Instant::now() + Duration::from_secs(1);
    let mut up = true;
    while Instant::now() < end {
        other
            .send(me, &format!("o{theirs}"), &format!("theirs {theirs}"))
            .await?;
        theirs += 1;
        if chance.below(3) == 0 {
            keyboard
                .write_all(format!("mine {mine}\n").as_bytes())
                .await?;
            mine += 1;
        }
        if Instant::now() > next_flap {
            up = !up;
            cuts += u64::from(!up);
            proxy.set(if up { Mode::Pass } else { Mode::Cut });
            let lasts = if up {
                500 + chance.below(3000)
            } else {
                50 + chance.below(700)
            };
            next_flap = Instant::now() + Duration::from_millis(lasts);
        }
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
    proxy.set(Mode::Pass);
    let texts = || -> Vec<String> {
        let lines = locked(&shown);
        let of_dialog = lines
            .iter()
            .filter_map(|line| line.split_once(": ").map(|(_, text)| text.to_owned()));
        of_dialog
            .filter(|text| text.starts_with("mine ") || text.starts_with("theirs "))
            .collect()
    };
    let patience = Instant::now() + Duration::from_secs(20);
    while (texts().len() as u64) < mine + theirs {
        ensure!(
            Instant::now() < patience,
            "{} of {} are shown",
            texts().len(),
            mine + theirs
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let log: Vec<String> = other
        .log_upwards(me)
        .await?
        .into_iter()
        .map(|message| message.text)
        .collect();
    ensure!(texts() == log, "the screen does not show the log");
    drop(keyboard);
    ensure!(child.wait().await?.success(), "talk did not end well");
    println!(
        "  cut {cuts} times; {mine} lines of ours and {theirs} of the other: the screen is the log, line for line"
    );
    Ok(())
}

/// What the model knows of a user in a dialog.
type MarksOf = BTreeMap<(u64, String), u64>;

async fn marks(service: &mut Service, options: &Options, people: People) -> anyhow::Result<()> {
    let events = options.count.unwrap_or(10_000);
    let people = People {
        count: 20,
        ..people
    };
    let mut chance = Chance(people.seed);
    let pairs = people.pairs(60);
    let mut devices = Vec::new();
    for n in 0..people.count {
        for i in 0..2 {
            devices.push(Device::start(service.access_to_any(i), people.user(n)));
        }
    }
    all_connected(&devices).await?;
    let (mut said, mut read): (BTreeMap<String, Vec<Message>>, MarksOf) = Default::default();
    let (mut sends, mut marked, mut reconnections, mut reads) = (0u64, 0u64, 0u64, 0u64);
    for n in 0..events {
        if n == events / 2 {
            println!("  shard5 is added");
            service.save(&[(1, ""), (2, ""), (3, ""), (4, ""), (5, "")])?;
        }
        let (a, b) = pairs[chance.below(pairs.len() as u64) as usize];
        let (me, other) = if chance.below(2) == 0 { (a, b) } else { (b, a) };
        let dialog = format!("{a}_{b}");
        let place = ((me - people.first) * 2 + chance.below(2)) as usize;
        match chance.below(100) {
            0..60 => {
                let (key, text) = (format!("m{n}"), format!("message {n}"));
                let sent = devices[place]
                    .client
                    .send(other, key.clone(), text.clone())
                    .await?;
                said.entry(dialog.clone()).or_default().push(Message {
                    dialog,
                    seq: sent.seq,
                    from: me,
                    to: other,
                    text,
                    at: sent.at,
                    key: Some(key),
                });
                sends += 1;
            }
            60..95 => {
                // Through REST the answer says where the mark is now; through the socket it is told to everyone.
                let length = said.get(&dialog).map_or(0, Vec::len) as u64;
                if length == 0 {
                    continue;
                }
                // What goes through a socket is on its way for a while: beyond the end might not be beyond it any more.
                let asks = chance.below(2) == 0;
                let seq = 1 + chance.below(if asks { length + 3 } else { length });
                let known = read.entry((me, dialog.clone())).or_default();
                *known = (*known).max(seq.min(length));
                if asks {
                    let mark = Api::new(service.access((n % 2) as u16), me)
                        .await?
                        .mark_read(other, seq)
                        .await?;
                    ensure!(
                        mark.seq >= seq.min(length) && mark.seq <= *known,
                        "{dialog}: read up to {}, and it should be {known}",
                        mark.seq
                    );
                    reads += 1;
                } else {
                    devices[place].client.mark_read(other, seq).await?;
                }
                marked += 1;
            }
            95..99 => {
                devices[place] = Device::start(service.access_to_any((n % 2) as u16), me);
                reconnections += 1;
            }
            _ => {
                // What is owed must be owed at any moment, too. Marks through sockets are still on their way: those only lag.
                let inbox = Api::new(service.access((n % 2) as u16), me)
                    .await?
                    .inbox(100, None)
                    .await?;
                for entry in &inbox.dialogs {
                    let of_model = read.get(&(me, entry.dialog.clone())).copied().unwrap_or(0);
                    ensure!(
                        entry.read <= of_model,
                        "{}: read {} of {of_model}",
                        entry.dialog,
                        entry.read
                    );
                    let log = &said[&entry.dialog];
                    let unread = log
                        .iter()
                        .filter(|message| message.from != me && message.seq > entry.read)
                        .count();
                    ensure!(
                        entry.unread as usize == unread.min(100),
                        "{}: unread {} instead of {unread}",
                        entry.dialog,
                        entry.unread
                    );
                }
            }
        }
    }
    let mut none = Vec::new();
    service.carried_out(2, &mut none).await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut entries = 0;
    for n in 0..people.count {
        let me = people.user(n);
        for i in 0..2 {
            let inbox = Api::new(service.access(i), me)
                .await?
                .inbox(100, None)
                .await?;
            let mut expected: Vec<&Vec<Message>> = said
                .iter()
                .filter(|(dialog, _)| dialog.split('_').any(|member| member == me.to_string()))
                .map(|(_, log)| log)
                .collect();
            expected.sort_by(|a, b| b.last().map(|m| &m.at).cmp(&a.last().map(|m| &m.at)));
            ensure!(
                inbox.dialogs.len() == expected.len(),
                "{} dialogs instead of {}",
                inbox.dialogs.len(),
                expected.len()
            );
            for (entry, log) in inbox.dialogs.iter().zip(expected) {
                let last = log.last().context("an empty log")?;
                let read = read.get(&(me, entry.dialog.clone())).copied().unwrap_or(0);
                let unread = log
                    .iter()
                    .filter(|message| message.from != me && message.seq > read)
                    .count()
                    .min(100);
                ensure!(
                    entry.last == *last && entry.read == read && entry.unread as usize == unread,
                    "the inbox of {me} through instance {i}: {entry:?}, and it should be read {read}, unread {unread}, last {last:?}"
                );
                entries += 1;
            }
        }
    }
    println!(
        "  {events} events: {sends} sends, {marked} read marks ({reads} with an answer that was compared), {reconnections} reconnections, a shard added"
    );
    println!(
        "  {entries} entries of inboxes through both instances are what the logs say: order, last message, read, unread"
    );
    Ok(())
}
