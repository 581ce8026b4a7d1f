//! The range of each setting, and settings that depend on each other. All faults are reported, one line each.

use super::Settings;
use std::fmt::Display;
use std::ops::RangeInclusive;

/// A TEXT of MySQL takes 65,535 bytes, and a character up to four.
const TEXT_CHARS: u64 = 16_383;

/// The bytes that JSON needs for a character at most: two escapes, `\ud83d\ude00`.
const JSON_BYTES_OF_CHAR: u64 = 12;

/// The bytes of a `send` frame beside its text.
const FRAME_BESIDE_TEXT: u64 = 512;

/// Rates and bursts. The upper bound means "no limit".
const RATE: RangeInclusive<u64> = 1..=1_000_000;

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const SECOND: u64 = 1000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;

/// Lines that each name a setting, its value and what it must be.
#[derive(Default)]
struct Faults(Vec<String>);

impl Faults {
    fn range<N: Copy + Display + TryInto<u64>>(
        &mut self,
        name: &str,
        value: N,
        range: RangeInclusive<u64>,
    ) {
        let fits = value.try_into().is_ok_and(|value| range.contains(&value));
        let (from, to) = range.into_inner();
        self.unless(fits, || {
            format!("{name} is {value}: it must be between {from} and {to}")
        });
    }

    fn unless(&mut self, good: bool, fault: impl FnOnce() -> String) {
        if !good {
            self.0.push(fault());
        }
    }
}

/// The faults of the settings; none if they are good.
pub fn faults(settings: &Settings) -> Vec<String> {
    let mut faults = Faults::default();
    faults.range("threads", settings.threads, 1..=256);
    faults.range("start_wait_ms", settings.start_wait_ms, 0..=HOUR);
    sizes(settings, &mut faults);
    rates(settings, &mut faults);
    times(settings, &mut faults);
    store(settings, &mut faults);
    faults.0
}

fn sizes(settings: &Settings, faults: &mut Faults) {
    let limits = &settings.limits;
    faults.range("limits.text_chars", limits.text_chars, 1..=TEXT_CHARS);
    faults.range("limits.frame_bytes", limits.frame_bytes, KIB..=16 * MIB);
    faults.range(
        "limits.message_fragments",
        limits.message_fragments,
        1..=KIB,
    );
    faults.range(
        "limits.outbound_queue_bytes",
        limits.outbound_queue_bytes,
        16 * KIB..=64 * MIB,
    );
    faults.range("limits.history_page", limits.history_page, 1..=1000);
    faults.range(
        "limits.history_page_bytes",
        limits.history_page_bytes,
        4 * KIB..=16 * MIB,
    );
    faults.range("limits.inbox_page", limits.inbox_page, 1..=1000);
    faults.range("limits.resume_dialogs", limits.resume_dialogs, 1..=10_000);
    faults.range(
        "limits.resume_messages",
        limits.resume_messages,
        1..=100_000,
    );
    faults.range("limits.resume_hours", limits.resume_hours, 1..=366 * 24);
    faults.range("limits.watched_users", limits.watched_users, 1..=10_000);
    faults.range(
        "limits.requests_in_flight",
        limits.requests_in_flight,
        1..=10_000,
    );
    faults.range(
        "limits.reads_in_flight",
        limits.reads_in_flight,
        1..=limits.requests_in_flight as u64,
    );
    faults.range(
        "limits.sessions_per_user",
        limits.sessions_per_user,
        1..=10_000,
    );
    for (name, connections) in [
        ("limits.connections_per_ip", limits.connections_per_ip),
        ("limits.connections", limits.connections),
        ("limits.spare_connections", limits.spare_connections),
    ] {
        faults.range(name, connections, 1..=10_000_000);
    }
    let (chars, bytes) = (limits.text_chars, limits.frame_bytes);
    let needed = u64::from(chars) * JSON_BYTES_OF_CHAR + FRAME_BESIDE_TEXT;
    faults.unless(u64::from(bytes) >= needed, || {
        format!(
            "limits.frame_bytes is {bytes}: a message of limits.text_chars = {chars} needs up to {needed}"
        )
    });
    let (page, queue) = (limits.history_page_bytes, limits.outbound_queue_bytes);
    faults.unless(page <= queue, || {
        format!(
            "limits.history_page_bytes is {page}: a page must fit into limits.outbound_queue_bytes = {queue}"
        )
    });
}

fn rates(settings: &Settings, faults: &mut Faults) {
    let limits = &settings.limits;
    for (name, rate) in [
        ("limits.sends_per_second", limits.sends_per_second),
        ("limits.sends_burst", limits.sends_burst),
        ("limits.frames_per_second", limits.frames_per_second),
        ("limits.requests_per_second", limits.requests_per_second),
        ("limits.requests_burst", limits.requests_burst),
        ("limits.work_per_second", limits.work_per_second),
        ("limits.work_burst", limits.work_burst),
        ("limits.connects_per_second", limits.connects_per_second),
        ("limits.connects_burst", limits.connects_burst),
    ] {
        faults.range(name, rate, RATE);
    }
}

fn times(settings: &Settings, faults: &mut Faults) {
    let limits = &settings.limits;
    faults.range(
        "limits.handshake_ms",
        limits.handshake_ms,
        100..=10 * MINUTE,
    );
    faults.range("limits.ping_every_ms", limits.ping_every_ms, 100..=HOUR);
    faults.range("limits.silence_ms", limits.silence_ms, 200..=HOUR);
    faults.range("limits.shutdown_ms", limits.shutdown_ms, 0..=10 * MINUTE);
    faults.range(
        "limits.tcp_user_timeout_ms",
        limits.tcp_user_timeout_ms,
        SECOND..=HOUR,
    );
    faults.range(
        "limits.presence_grace_ms",
        limits.presence_grace_ms,
        0..=10 * MINUTE,
    );
    let (ping, silence) = (limits.ping_every_ms, limits.silence_ms);
    faults.unless(ping < silence, || {
        format!(
            "limits.silence_ms is {silence}: a session needs the time to answer a ping, limits.ping_every_ms = {ping}"
        )
    });
}

fn store(settings: &Settings, faults: &mut Faults) {
    let (store, resharding) = (&settings.store, &settings.resharding);
    faults.range("store.lanes", store.lanes, 1..=64);
    faults.range("store.batch_rows", store.batch_rows, 1..=1000);
    faults.range("store.queue_rows", store.queue_rows, 1..=10_000_000);
    faults.range("store.read_connections", store.read_connections, 1..=256);
    faults.range("store.connect_ms", store.connect_ms, 50..=MINUTE);
    faults.range("store.answer_ms", store.answer_ms, 100..=10 * MINUTE);
    faults.range("store.send_ms", store.send_ms, 100..=10 * MINUTE);
    faults.range("resharding.slots_at_once", resharding.slots_at_once, 1..=64);
    faults.range("resharding.freeze_ms", resharding.freeze_ms, 10..=MINUTE);
    faults.range(
        "resharding.purge_after_ms",
        resharding.purge_after_ms,
        0..=7 * 24 * HOUR,
    );
    faults.range(
        "resharding.peers_wait_ms",
        resharding.peers_wait_ms,
        SECOND..=HOUR,
    );
    let (lanes, lanes_min) = (store.lanes, store.lanes_min);
    faults.unless((1..=lanes).contains(&lanes_min), || {
        format!(
            "store.lanes_min is {lanes_min}: it must be between 1 and store.lanes, which is {lanes}"
        )
    });
    let (rows, queue) = (store.batch_rows, store.queue_rows);
    faults.unless(rows <= queue, || {
        format!("store.queue_rows is {queue}: it must hold a batch, store.batch_rows = {rows}")
    });
    let (freeze, send) = (resharding.freeze_ms, store.send_ms);
    faults.unless(freeze < send, || {
        format!(
            "resharding.freeze_ms is {freeze}: sends wait so long while a slot moves, so it must be less than store.send_ms = {send}"
        )
    });
}

#[cfg(test)]
mod tests {
    use super::super::{DEFAULTS, Settings};

    fn refusal(toml: &str) -> String {
        let refused = Settings::from_toml(toml);
        refused.expect_err(toml).to_string()
    }

    /// The names of all numbers: (table, key).
    fn numbers() -> Vec<(String, String)> {
        let defaults: toml::Table = DEFAULTS.parse().unwrap();
        let mut numbers = Vec::new();
        for (key, value) in defaults {
            match value {
                toml::Value::Integer(_) => numbers.push((String::new(), key)),
                toml::Value::Table(table) => numbers.extend(
                    table
                        .into_iter()
                        .filter(|(_, value)| value.is_integer())
                        .map(|(name, _)| (key.clone(), name)),
                ),
                _ => {}
            }
        }
        numbers
    }

    #[test]
    fn every_number_has_a_range_and_is_refused_by_its_name() {
        let may_be_zero = [
            "start_wait_ms",
            "shutdown_ms",
            "presence_grace_ms",
            "purge_after_ms",
        ];
        let numbers = numbers();
        assert!(numbers.len() > 40, "{numbers:?}");
        for (table, key) in numbers {
            let (head, name) = if table.is_empty() {
                (String::new(), key.clone())
            } else {
                (format!("[{table}]\n"), format!("{table}.{key}"))
            };
            for value in ["-1", "4000000000", "9000000000000000000"] {
                let refusal = refusal(&format!("{head}{key} = {value}"));
                assert!(refusal.contains(&key), "{name} = {value}: {refusal}");
            }
            let zero = Settings::from_toml(&format!("{head}{key} = 0"));
            if may_be_zero.contains(&key.as_str()) {
                assert!(zero.is_ok(), "{name} = 0");
            } else {
                let refusal = zero.expect_err(&name).to_string();
                assert!(refusal.contains(&name), "{refusal}");
            }
        }
    }

    #[test]
    fn settings_that_contradict_each_other_are_refused() {
        for (toml, named) in [
            ("[store]\nlanes_min = 5", "store.lanes_min"),
            ("[store]\nqueue_rows = 100", "store.queue_rows"),
            ("[limits]\ntext_chars = 16383", "limits.frame_bytes"),
            ("[limits]\nsilence_ms = 20000", "limits.silence_ms"),
            ("[limits]\nreads_in_flight = 300", "limits.reads_in_flight"),
            (
                "[limits]\nhistory_page_bytes = 1000000",
                "limits.history_page_bytes",
            ),
            ("[resharding]\nfreeze_ms = 5000", "resharding.freeze_ms"),
        ] {
            let refusal = refusal(toml);
            assert!(refusal.contains(named), "{refusal}");
        }
        for good in [
            "[store]\nlanes = 8\nlanes_min = 8",
            "[limits]\ntext_chars = 16383\nframe_bytes = 200000",
        ] {
            assert!(Settings::from_toml(good).is_ok(), "{good}");
        }
    }

    #[test]
    fn all_faults_are_reported_at_once() {
        let refusal = refusal("threads = 0\n[limits]\ntext_chars = 0\nping_every_ms = 0");
        assert_eq!(refusal.lines().count(), 3, "{refusal}");
    }
}
