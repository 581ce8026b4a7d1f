//! What every bus must do: in process and over a real NATS.

#![allow(missing_docs, clippy::wildcard_enum_match_arm)]

use bytes::Bytes;
use chat::bus::{Bus, BusState, LocalBus, Loss, NatsBus, Sink, Topic};
use chat::config::{Nats, Secret};
use chat::domain::dialog::UserId;
use chat::metrics::Metrics;
use std::sync::{Arc, Mutex};
use testkit::proxy::{Mode, Proxy};
use testkit::until;

fn user(id: u64) -> Topic {
    Topic::User(UserId::new(id).unwrap())
}

type Received = Arc<Mutex<Vec<Bytes>>>;

fn sink() -> (Sink, Received) {
    let received = Received::default();
    let writes = received.clone();
    (
        Arc::new(move |payload| writes.lock().unwrap().push(payload)),
        received,
    )
}

/// A NATS server without credentials.
fn at(url: &str) -> Nats {
    Nats {
        url: Some(Secret::new(url.to_owned())),
        ..Nats::default()
    }
}

/// Two instances on one bus: each receives the other, in order, and never itself.
async fn others_hear_it_in_order_and_the_publisher_does_not(a: Arc<dyn Bus>, b: Arc<dyn Bus>) {
    let ((sink_a, heard_a), (sink_b, heard_b)) = (sink(), sink());
    let listening_a = a.listen(user(7), sink_a);
    let listening_b = b.listen(user(7), sink_b);
    // Listening takes a moment on a real bus: publish until it is received, then count anew.
    until("b receives a", async || {
        a.publish(user(7), Bytes::from_static(b"warm-up"));
        (!heard_b.lock().unwrap().is_empty()).then_some(())
    })
    .await;
    until("a receives b", async || {
        b.publish(user(7), Bytes::from_static(b"warm-up"));
        (!heard_a.lock().unwrap().is_empty()).then_some(())
    })
    .await;
    for n in 0..100u32 {
        a.publish(user(7), Bytes::from(n.to_string()));
        a.publish(user(8), Bytes::from_static(b"for another user"));
    }
    let numbers = |received: &Received| -> Vec<String> {
        let received = received.lock().unwrap();
        received
            .iter()
            .map(|payload| String::from_utf8(payload.to_vec()).unwrap())
            .filter(|text| text != "warm-up")
            .collect()
    };
    let expected: Vec<String> = (0..100).map(|n| n.to_string()).collect();
    until("b receives all", async || {
        (numbers(&heard_b).len() >= 100).then_some(())
    })
    .await;
    assert_eq!(numbers(&heard_b), expected);
    assert_eq!(numbers(&heard_a), Vec::<String>::new(), "no echo");

    // Who has left receives nothing more. Another listener says when the bus has carried what came
    // after.
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

/// An instance can ask whether another one subscribes; once a subscription is confirmed, it
/// receives.
async fn who_listens_is_found_and_who_has_left_is_not(a: Arc<dyn Bus>, b: Arc<dyn Bus>) {
    assert_eq!(a.ask(user(7)).await, Some(false));
    let (sink_b, heard_b) = sink();
    let listening = b.listen(user(7), sink_b);
    listening
        .effective()
        .wait_for(|effective| *effective)
        .await
        .unwrap();
    assert_eq!(a.ask(user(7)).await, Some(true));
    assert_eq!(b.ask(user(7)).await, Some(false), "no other instance");
    a.publish(user(7), Bytes::from_static(b"x"));
    until("b receives what is published from then on", async || {
        (heard_b.lock().unwrap().len() == 1).then_some(())
    })
    .await;
    drop(listening);
    until("b is gone", async || {
        (a.ask(user(7)).await == Some(false)).then_some(())
    })
    .await;
    assert_eq!(heard_b.lock().unwrap().len(), 1, "questions are no event");
}

#[tokio::test(flavor = "multi_thread")]
async fn in_process() {
    let a = LocalBus::alone();
    let b = a.join();
    assert_eq!(a.state(), BusState::Standalone);
    let (a, b): (Arc<dyn Bus>, Arc<dyn Bus>) = (Arc::new(a), Arc::new(b));
    others_hear_it_in_order_and_the_publisher_does_not(a.clone(), b.clone()).await;
    who_listens_is_found_and_who_has_left_is_not(a, b).await;
}

async fn connected(service: &str) -> Arc<dyn Bus> {
    let runtime = tokio::runtime::Handle::current();
    let bus = NatsBus::connect(&at(&testkit::nats_url()), service, &runtime, Metrics::new())
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
    let (a, b) = (connected(&service).await, connected(&service).await);
    others_hear_it_in_order_and_the_publisher_does_not(a.clone(), b.clone()).await;
    who_listens_is_found_and_who_has_left_is_not(a, b).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bus_that_comes_back_says_that_something_may_be_lost() {
    let target = testkit::nats_url().replace("nats://", "");
    let proxy = Proxy::to(target).await;
    let (url, runtime) = (
        format!("nats://127.0.0.1:{}", proxy.port),
        tokio::runtime::Handle::current(),
    );
    let bus = NatsBus::connect(&at(&url), "s", &runtime, Metrics::new())
        .await
        .unwrap();
    let mut losses = bus.losses();
    let state = async |expected| {
        until("the bus notices", async || {
            (bus.state() == expected).then_some(())
        })
        .await
    };
    state(BusState::Connected).await;
    proxy.set(Mode::Cut);
    state(BusState::Disconnected).await;
    assert_eq!(bus.ask(user(7)).await, None, "unknown while disconnected");
    proxy.set(Mode::Pass);
    state(BusState::Connected).await;
    assert!(matches!(losses.recv().await, Ok(Loss::Disconnected(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn services_that_share_a_nats_do_not_hear_each_other() {
    let (one, two) = (
        format!("{:x}", rand::random::<u64>()),
        format!("{:x}", rand::random::<u64>()),
    );
    let (a, b, other_service) = (
        connected(&one).await,
        connected(&one).await,
        connected(&two).await,
    );
    let (sink, received) = sink();
    let _listening = b.listen(user(7), sink);
    until("b receives a", async || {
        other_service.publish(user(7), Bytes::from_static(b"of another service"));
        a.publish(user(7), Bytes::from_static(b"ours"));
        (!received.lock().unwrap().is_empty()).then_some(())
    })
    .await;
    other_service.publish(user(7), Bytes::from_static(b"of another service"));
    until("what came later is received", async || {
        a.publish(user(7), Bytes::from_static(b"ours"));
        (received.lock().unwrap().len() > 3).then_some(())
    })
    .await;
    assert!(
        received
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
    let bus = NatsBus::connect(&at("nats://127.0.0.1:1"), "s", &runtime, metrics.clone())
        .await
        .unwrap();
    assert_eq!(bus.state(), BusState::Disconnected);
    let (sink, _) = sink();
    let listening = bus.listen(user(7), sink);
    (0..100_000).for_each(|_| bus.publish(user(7), Bytes::from_static(b"x")));
    assert_eq!(metrics.bus_dropped.get(), 100_000, "counted, not kept");
    drop(listening);
}
