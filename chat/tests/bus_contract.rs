//! What every bus must do: in process and over a real NATS.

#![allow(missing_docs, clippy::wildcard_enum_match_arm)]

mod support;

use bytes::Bytes;
use chat::bus::{Bus, BusState, LocalBus, NatsBus, Sink, Topic};
use chat::dialog::UserId;
use chat::metrics::Metrics;
use std::sync::{Arc, Mutex};
use support::until;

fn user(id: u64) -> Topic {
    Topic::User(UserId::new(id).unwrap())
}

type Heard = Arc<Mutex<Vec<Bytes>>>;

fn sink() -> (Sink, Heard) {
    let heard = Heard::default();
    let writes = heard.clone();
    (
        Arc::new(move |payload| writes.lock().unwrap().push(payload)),
        heard,
    )
}

/// Two instances on one bus: each hears the other, in order, and never itself.
async fn others_hear_it_in_order_and_the_publisher_does_not(a: Arc<dyn Bus>, b: Arc<dyn Bus>) {
    let ((sink_a, heard_a), (sink_b, heard_b)) = (sink(), sink());
    let listening_a = a.listen(user(7), sink_a);
    let listening_b = b.listen(user(7), sink_b);
    // Listening takes a moment on a real bus: publish until it is heard, then count anew.
    until("b hears a", async || {
        a.publish(user(7), Bytes::from_static(b"warm-up"));
        (!heard_b.lock().unwrap().is_empty()).then_some(())
    })
    .await;
    until("a hears b", async || {
        b.publish(user(7), Bytes::from_static(b"warm-up"));
        (!heard_a.lock().unwrap().is_empty()).then_some(())
    })
    .await;
    for n in 0..100u32 {
        a.publish(user(7), Bytes::from(n.to_string()));
        a.publish(user(8), Bytes::from_static(b"for somebody else"));
    }
    let numbers = |heard: &Heard| -> Vec<String> {
        let heard = heard.lock().unwrap();
        heard
            .iter()
            .map(|payload| String::from_utf8(payload.to_vec()).unwrap())
            .filter(|text| text != "warm-up")
            .collect()
    };
    let expected: Vec<String> = (0..100).map(|n| n.to_string()).collect();
    until("b hears all", async || {
        (numbers(&heard_b).len() >= 100).then_some(())
    })
    .await;
    assert_eq!(numbers(&heard_b), expected);
    assert_eq!(numbers(&heard_a), Vec::<String>::new(), "no echo");

    // Who has left hears nothing more. Another listener says when the bus has carried what came after.
    drop(listening_b);
    let (sink_c, heard_c) = sink();
    let _listening_c = b.listen(user(9), sink_c);
    until("the bus has moved on", async || {
        a.publish(user(7), Bytes::from_static(b"too late"));
        a.publish(user(9), Bytes::from_static(b"marker"));
        (!heard_c.lock().unwrap().is_empty()).then_some(())
    })
    .await;
    let after = numbers(&heard_b).len();
    a.publish(user(7), Bytes::from_static(b"too late"));
    let markers = heard_c.lock().unwrap().len();
    until("a marker that was published behind it", async || {
        a.publish(user(9), Bytes::from_static(b"marker"));
        (heard_c.lock().unwrap().len() > markers + 1).then_some(())
    })
    .await;
    assert_eq!(numbers(&heard_b).len(), after);
    drop(listening_a);
}

#[tokio::test(flavor = "multi_thread")]
async fn in_process() {
    let a = LocalBus::alone();
    let b = a.join();
    assert_eq!(a.state(), BusState::Alone);
    others_hear_it_in_order_and_the_publisher_does_not(Arc::new(a), Arc::new(b)).await;
}

async fn connected(service: &str) -> Arc<dyn Bus> {
    let runtime = tokio::runtime::Handle::current();
    let bus = NatsBus::connect(&support::nats_url(), service, &runtime, Metrics::new())
        .await
        .unwrap();
    until("the bus is connected", async || {
        (bus.state() == BusState::Connected).then_some(())
    })
    .await;
    Arc::new(bus)
}

#[tokio::test(flavor = "multi_thread")]
async fn over_nats() {
    let service = format!("{:x}", rand::random::<u64>());
    others_hear_it_in_order_and_the_publisher_does_not(
        connected(&service).await,
        connected(&service).await,
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn services_that_share_a_nats_do_not_hear_each_other() {
    let (one, two) = (
        format!("{:x}", rand::random::<u64>()),
        format!("{:x}", rand::random::<u64>()),
    );
    let (a, b, stranger) = (
        connected(&one).await,
        connected(&one).await,
        connected(&two).await,
    );
    let (sink, heard) = sink();
    let _listening = b.listen(user(7), sink);
    until("b hears a", async || {
        stranger.publish(user(7), Bytes::from_static(b"of another service"));
        a.publish(user(7), Bytes::from_static(b"ours"));
        (!heard.lock().unwrap().is_empty()).then_some(())
    })
    .await;
    stranger.publish(user(7), Bytes::from_static(b"of another service"));
    until("what came later is heard", async || {
        a.publish(user(7), Bytes::from_static(b"ours"));
        (heard.lock().unwrap().len() > 3).then_some(())
    })
    .await;
    assert!(
        heard
            .lock()
            .unwrap()
            .iter()
            .all(|payload| payload == "ours")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nats_that_is_away_hinders_nobody() {
    let metrics = Metrics::new();
    let runtime = tokio::runtime::Handle::current();
    let bus = NatsBus::connect("nats://127.0.0.1:1", "s", &runtime, metrics.clone())
        .await
        .unwrap();
    assert_eq!(bus.state(), BusState::Away);
    let (sink, _) = sink();
    let listening = bus.listen(user(7), sink);
    (0..100_000).for_each(|_| bus.publish(user(7), Bytes::from_static(b"x")));
    assert_eq!(metrics.bus_dropped.get(), 100_000, "said, not kept");
    drop(listening);
}
