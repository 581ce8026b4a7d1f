//! Parsers of what comes from outside, with random inputs: nothing panics, and what is accepted
//! means what it says. `bench/fuzz` has many more of them.

#![allow(missing_docs, clippy::wildcard_enum_match_arm)]

use bytes::Bytes;
use chat::bus::event::BusEvent;
use chat::config::{Settings, is_allowed_host, normalized_origin};
use chat::domain::dialog::{DialogId, Timestamp, UserId};
use chat::domain::shards_file::ShardsFile;
use chat_wire::{ClientFrame, ServerFrame};
use rand::RngExt;
use testkit::fuzz::{each, mutated};

const FRAMES: [&str; 14] = [
    r#"{"type":"send","id":"x","key":"c1","to":42,"text":"hi"}"#,
    r#"{"type":"history","id":"h1","with":42,"before":120,"limit":50}"#,
    r#"{"type":"inbox","id":"i1","limit":50,"cursor":"1795237200123456.7_42"}"#,
    r#"{"type":"resume","id":"r1","positions":{"7_42":118,"7_9":3},"since":"2026-11-21T05:00:00.123456Z"}"#,
    r#"{"type":"read","id":"m1","with":42,"seq":118}"#,
    r#"{"type":"watch","users":[42,43]}"#,
    r#"{"type":"auth","token":"eyJ"}"#,
    r#"{"type":"ping","id":"p1"}"#,
    r#"{"type":"sent","key":"c1","dialog":"7_42","seq":119,"at":"2026-11-21T05:00:00.123456Z"}"#,
    r#"{"type":"message","dialog":"7_42","seq":119,"from":7,"to":42,"text":"hi","at":"2026-11-21T05:00:00.123456Z","key":"c1"}"#,
    r#"{"type":"resumed","id":"r1","positions":{"7_42":119},"resync":["7_9"],"reads":[{"dialog":"7_42","user":42,"seq":118}],"incomplete":[],"now":"x"}"#,
    r#"{"type":"read","dialog":"7_42","user":42,"seq":118}"#,
    r#"{"type":"typing","dialog":"7_42","user":42}"#,
    r#"{"type":"error","code":"text_too_long","message":"x","retryable":false,"retry_after_ms":null,"key":"c1"}"#,
];

#[test]
fn frames_mean_the_same_when_they_are_written_again() {
    each(20_000, |rng| {
        let bytes = mutated(rng, &FRAMES);
        if let Ok(frame) = serde_json::from_slice::<ClientFrame>(&bytes) {
            let again = serde_json::to_string(&frame).unwrap();
            assert_eq!(serde_json::from_str::<ClientFrame>(&again).unwrap(), frame);
        }
        if let Ok(frame) = serde_json::from_slice::<ServerFrame>(&bytes) {
            let again = serde_json::to_string(&frame).unwrap();
            assert_eq!(serde_json::from_str::<ServerFrame>(&again).unwrap(), frame);
        }
    });
}

#[test]
fn events_of_the_bus_are_what_an_instance_publishes_or_nothing() {
    const MESSAGE: &str = "message 7_42 9\n{\"type\":\"message\",\"dialog\":\"7_42\",\"seq\":9,\"from\":7,\"to\":42,\"text\":\"a\",\"at\":\"2026-11-21T05:00:00.123456Z\",\"key\":\"k\"}";
    const EVENTS: [&str; 4] = [
        MESSAGE,
        "read 7_42 42 9\n{\"type\":\"read\",\"dialog\":\"7_42\",\"user\":42,\"seq\":9}",
        "last_seq 7_42 9\n",
        "ephemeral\n{\"type\":\"typing\",\"dialog\":\"7_42\",\"user\":42}",
    ];
    let seven = UserId::new(7).unwrap();
    each(20_000, |rng| {
        let payload = Bytes::from(mutated(rng, &EVENTS));
        let Some(event) = BusEvent::decode(&payload, Some(seven)) else {
            return;
        };
        assert_eq!(
            BusEvent::decode(&event.encode(), Some(seven)),
            Some(event.clone())
        );
        let frame = match &event {
            BusEvent::Message { frame, .. }
            | BusEvent::Read { frame, .. }
            | BusEvent::Ephemeral { frame } => frame.to_string(),
            BusEvent::LastSeq { .. } => return,
        };
        let frame: ServerFrame = serde_json::from_str(&frame).unwrap();
        match (&event, frame) {
            (BusEvent::Message { dialog, seq, .. }, ServerFrame::Message(message)) => {
                assert_eq!(
                    (message.dialog, message.seq),
                    (dialog.to_string(), seq.get())
                );
                let members: Vec<u64> = dialog.users().map(UserId::get).collect();
                let named = |user: u64| members.contains(&user);
                assert!(named(message.from) && message.to.is_some_and(named));
            }
            (
                BusEvent::Read {
                    dialog, user, seq, ..
                },
                ServerFrame::Read(mark),
            ) => {
                assert_eq!(
                    (mark.dialog, mark.user, mark.seq),
                    (dialog.to_string(), user.get(), seq.get())
                );
            }
            (BusEvent::Ephemeral { .. }, ServerFrame::Typing { .. }) => {}
            (event, frame) => panic!("{event:?}: {frame:?}"),
        }
    });
}

#[test]
fn names_and_times_are_read_as_they_are_written() {
    const WORDS: [&str; 8] = [
        "7_42",
        "42",
        "2026-11-21T05:00:00.123456Z",
        "9007199254740991_9007199254740991",
        "https://a.example:8443",
        "localhost:8080",
        "[::1]:80",
        "203.0.113.5",
    ];
    each(50_000, |rng| {
        let bytes = mutated(rng, &WORDS);
        let Ok(text) = std::str::from_utf8(&bytes) else {
            return;
        };
        if let Ok(dialog) = text.parse::<DialogId>() {
            assert_eq!(dialog.to_string(), text);
        }
        if let Ok(time) = text.parse::<Timestamp>() {
            assert_eq!(time.to_string().parse::<Timestamp>().unwrap(), time);
        }
        if let Some(origin) = normalized_origin(text) {
            assert_eq!(
                normalized_origin(&origin).as_deref(),
                Some(origin.as_str()),
                "{text:?}"
            );
        }
        let _ = is_allowed_host(text, &[]);
    });
}

#[test]
fn a_shards_file_is_a_topology_or_a_refusal_with_a_reason() {
    const FILES: [&str; 2] = [
        include_str!("../../shards.toml"),
        "version = 7\nforce = true\n[[shard]]\nname = \"a\"\nurl = \"mysql://u:p@h:1/d\"\nweight = 3\nstate = \"draining\"\n[[shard]]\nname = \"b\"\nurl = \"sqlite:x\"\nstate = \"down\"\nforget = true\n[[pin]]\ndialog = \"7_42\"\nshard = \"a\"\n",
    ];
    let env = |_: &str| Some("secret".to_owned());
    each(20_000, |rng| {
        let bytes = mutated(rng, &FILES);
        let Ok(text) = std::str::from_utf8(&bytes) else {
            return;
        };
        match ShardsFile::parse(text, &env) {
            Ok(file) => {
                let topology = file.topology();
                assert!(!topology.shards.is_empty());
                assert_eq!(topology.difference(&file.topology()), None);
                // What is decided by it is the same every time.
                assert_eq!(topology.hash(), file.topology().hash());
            }
            Err(e) => {
                let reason = e.to_string();
                assert!(!reason.is_empty() && !reason.contains("secret"), "{reason}");
            }
        }
    });
}

#[test]
fn settings_are_taken_or_refused_with_a_reason() {
    each(3000, |rng| {
        let bytes = mutated(rng, &[chat::config::DEFAULTS]);
        let Ok(mut text) = String::from_utf8(bytes) else {
            return;
        };
        if rng.random_ratio(1, 4) {
            text = text.replacen(" = ", " = -", rng.random_range(0..9));
        }
        if let Err(e) = Settings::from_toml(&text) {
            assert!(!e.to_string().is_empty());
        }
    });
}
