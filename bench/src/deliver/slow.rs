//! A client that does not read is closed, without an effect on others.

use super::{Options, Users};
use crate::devices::{Device, Talk, Traffic, all_connected, answered, caught_up};
use crate::service::Service;
use anyhow::{Context, ensure};
use chat_client::Api;
use chat_wire::Close;
use futures_util::{StreamExt, stream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

pub(super) type Socket =
    tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>>;

async fn socket(access: &chat_client::Access, user: u64) -> anyhow::Result<Socket> {
    let mut request = access.socket_url().into_client_request()?;
    let token = access.token(user).await?;
    request
        .headers_mut()
        .insert("authorization", format!("Bearer {token}").parse()?);
    Ok(tokio_tungstenite::connect_async(request).await?.0)
}

pub(super) async fn slow(
    service: &mut Service,
    options: &Options,
    users: Users,
) -> anyhow::Result<()> {
    let count = options.count.unwrap_or(10_000);
    let devices = users.devices(service);
    all_connected(&devices).await?;
    let traffic = Arc::new(Traffic::default());
    let mut writers = Vec::new();
    for n in 0..20 {
        writers.push(Api::new(service.access(1), users.user(600_000 + n)).await?);
    }
    // The same for a user who reads, to separate the load itself from the effect of a slow reader.
    let reads = users.user(500_001);
    let reading = Device::start(service.access(0), reads);
    let (from, until) = flood(options, users, &devices, &traffic, &writers, reads, count).await;
    let with_reader = traffic.p99(from, until, |_| true);
    answered(&traffic).await?;

    // The user who does not read: connects, takes the welcome, and then nothing more from the
    // socket.
    let stuck = users.user(500_000);
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
                // A client that reads again finds the frames in the buffers, and the close frame
                // with its reason.
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
        let during = flood(options, users, &devices, &traffic, &writers, stuck, count).await;
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
            .follow(format!("{stuck}_{}", users.user(600_000 + n)), 0)
            .await?;
    }
    let returned = Instant::now();
    for (device, what) in [
        (&reading, "the user who reads"),
        (&back, "the user who came back"),
    ] {
        while device.record.count.load(Ordering::Relaxed) < count {
            let has = device.record.count.load(Ordering::Relaxed);
            ensure!(
                returned.elapsed() < Duration::from_secs(60),
                "{what} has {has} of {count}"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    let took = returned.elapsed();
    ensure!(
        reading.record.is_right() && back.record.is_right(),
        "not in order"
    );
    answered(&traffic).await?;
    caught_up(&devices, &traffic, Instant::now(), Duration::from_secs(5)).await?;
    println!(
        "  {count} messages of 4,000 characters for a user who does not read, in {:.1} s",
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
        "  p99 of the others {with_reader:.1} ms beside a user who reads as much, {:.1} ms beside the slow one",
        traffic.p99(from, until, |_| true)
    );
    println!(
        "  back: all {count} messages, in order, after {:.1} s",
        took.as_secs_f64()
    );
    Ok(())
}

/// Much for one, while others talk; from when until when.
pub(super) async fn flood(
    options: &Options,
    users: Users,
    devices: &[Device],
    traffic: &Arc<Traffic>,
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
    let pairs = users.pairs(users.count * 3);
    let plan = Talk {
        pairs,
        rate: options.rate / 2.0,
        seconds,
        seed: users.seed ^ to,
    };
    tokio::join!(sending, plan.run(devices, traffic));
    (begun, Instant::now())
}
