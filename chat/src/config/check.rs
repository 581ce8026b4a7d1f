//! The range of each setting, and settings that depend on each other. All faults are reported, one
//! line each.

use super::tls::unreadable;
use super::{Secret, Settings};
use config::Config;
use std::ops::RangeInclusive;

/// The bytes that JSON needs for a character at most: two escapes, `\ud83d\ude00`.
const JSON_BYTES_OF_CHAR: u64 = 12;

/// The bytes of a `send` frame beside its text.
const FRAME_BESIDE_TEXT: u64 = 512;

/// A TEXT of MySQL takes 65,535 bytes, and a character up to four.
const TEXT_CHARS: i64 = 16_383;

/// Rates and bursts. The upper bound means "no limit".
const RATE: RangeInclusive<i64> = 1..=1_000_000;

const KIB: i64 = 1024;
const MIB: i64 = 1024 * KIB;
const SECOND: i64 = 1000;
const MINUTE: i64 = 60 * SECOND;
const HOUR: i64 = 60 * MINUTE;

/// Every number among the settings. A test demands that none is missing.
pub const RANGES: [(&str, RangeInclusive<i64>); 51] = [
    ("threads", 1..=256),
    ("start_wait_ms", 0..=HOUR),
    ("auth.leeway_seconds", 0..=300),
    ("limits.text_chars", 1..=TEXT_CHARS),
    ("limits.frame_bytes", KIB..=16 * MIB),
    ("limits.message_fragments", 1..=KIB),
    ("limits.outbound_queue_bytes", 16 * KIB..=64 * MIB),
    ("limits.sessions_per_user", 1..=10_000),
    ("limits.connections_per_ip", 1..=10_000_000),
    ("limits.connections", 1..=10_000_000),
    ("limits.spare_connections", 1..=1_000_000),
    ("limits.spare_connections_per_ip", 1..=1_000_000),
    ("limits.upgraded_refusals", 0..=100_000),
    ("limits.sends_per_second", RATE),
    ("limits.sends_burst", RATE),
    ("limits.frames_per_second", RATE),
    ("limits.requests_per_second", RATE),
    ("limits.requests_burst", RATE),
    ("limits.work_per_second", RATE),
    ("limits.work_burst", RATE),
    ("limits.connects_per_second", RATE),
    ("limits.connects_burst", RATE),
    ("limits.history_page", 1..=1000),
    ("limits.history_page_bytes", 4 * KIB..=16 * MIB),
    ("limits.inbox_page", 1..=1000),
    ("limits.room_members", 2..=100),
    ("limits.resume_dialogs", 1..=10_000),
    ("limits.resume_messages", 1..=100_000),
    ("limits.resume_hours", 1..=366 * 24),
    ("limits.watched_users", 1..=10_000),
    ("limits.requests_in_flight", 1..=10_000),
    ("limits.reads_in_flight", 1..=1000),
    ("limits.handshake_ms", 100..=10 * MINUTE),
    ("limits.request_ms", SECOND..=10 * MINUTE),
    ("limits.ping_every_ms", 100..=HOUR),
    ("limits.silence_ms", 200..=HOUR),
    ("limits.shutdown_ms", 0..=10 * MINUTE),
    ("limits.tcp_user_timeout_ms", SECOND..=HOUR),
    ("limits.presence_grace_ms", 0..=10 * MINUTE),
    ("store.lanes", 1..=64),
    ("store.lanes_min", 1..=64),
    ("store.batch_rows", 1..=1000),
    ("store.queue_rows", 1..=10_000_000),
    ("store.read_connections", 1..=256),
    ("store.connect_ms", 50..=MINUTE),
    ("store.answer_ms", 100..=10 * MINUTE),
    ("store.send_ms", 100..=10 * MINUTE),
    ("resharding.slots_at_once", 1..=64),
    ("resharding.freeze_ms", 10..=MINUTE),
    ("resharding.purge_after_ms", 0..=7 * 24 * HOUR),
    ("resharding.peers_wait_ms", SECOND..=HOUR),
];

/// A line for each number that is out of its range.
pub fn out_of_range(settings: &Config) -> Vec<String> {
    let fault = |(name, range): &(&str, RangeInclusive<i64>)| {
        // A value of another type is reported when the settings are read.
        let value = settings.get_int(name).ok()?;
        let (from, to) = (range.start(), range.end());
        (!range.contains(&value))
            .then(|| format!("{name} is {value}: it must be between {from} and {to}"))
    };
    RANGES.iter().filter_map(fault).collect()
}

/// The shortest admin token, in bytes.
const MIN_ADMIN_TOKEN: usize = 16;

/// The admin token of `.env.sample`: public, and refused outside a demonstration.
const SAMPLE_ADMIN_TOKEN: &str = "sample-admin-token";

/// A line for each secret that is too weak. [`crate::http`] checks `auth.secret`, which depends on
/// the algorithm.
pub fn weak_secrets(settings: &Settings) -> Vec<String> {
    let token = settings.admin_token.as_ref().map(Secret::expose);
    let sample = token == Some(SAMPLE_ADMIN_TOKEN) && !settings.demo;
    let short = token.filter(|token| token.len() < MIN_ADMIN_TOKEN);
    let sample = sample.then(|| "admin_token is the sample token, which is public; set CHAT__ADMIN_TOKEN to a random one".to_owned());
    let short = short.map(|token| {
        format!(
            "admin_token has {} bytes; at least {MIN_ADMIN_TOKEN} are needed",
            token.len()
        )
    });
    sample.into_iter().chain(short).collect()
}

/// A line for each way to authenticate at NATS that has no server, or stands beside another.
pub fn ways_to_nats(settings: &Settings) -> Vec<String> {
    let nats = &settings.nats;
    let ways = [
        ("nats.user", nats.user.is_some()),
        ("nats.token", nats.token.is_some()),
        ("nats.credentials_file", nats.credentials_file.is_some()),
    ];
    let set: Vec<&str> = ways
        .iter()
        .filter(|(_, set)| *set)
        .map(|(name, _)| *name)
        .collect();
    let mut faults = Vec::new();
    if set.len() > 1 {
        faults.push(format!(
            "{} are set: one way to authenticate is needed",
            set.join(" and ")
        ));
    }
    if nats.user.is_some() != nats.password.is_some() {
        faults.push("nats.user and nats.password belong together: set both".to_owned());
    }
    let file = unreadable("nats.credentials_file", &nats.credentials_file);
    faults.extend(file);
    let unused = !set.is_empty() || nats.tls.required;
    if unused && nats.url.is_none() {
        faults.push(
            "settings of nats are set, but nats.url is not: set it, or leave them out".to_owned(),
        );
    }
    faults
}

/// A line for each setting that contradicts another one.
pub fn contradictions(settings: &Settings) -> Vec<String> {
    let (limits, store) = (&settings.limits, &settings.store);
    let needed = u64::from(limits.text_chars) * JSON_BYTES_OF_CHAR + FRAME_BESIDE_TEXT;
    // A setting, its value, the least value that another setting allows, and the reason.
    let at_least = [
        (
            "limits.frame_bytes",
            u64::from(limits.frame_bytes),
            needed,
            "a message of limits.text_chars characters",
        ),
        (
            "limits.outbound_queue_bytes",
            limits.outbound_queue_bytes as u64,
            limits.history_page_bytes as u64,
            "a page of limits.history_page_bytes",
        ),
        (
            "limits.requests_in_flight",
            limits.requests_in_flight as u64,
            limits.reads_in_flight as u64,
            "limits.reads_in_flight, which are among them",
        ),
        (
            "limits.silence_ms",
            limits.silence_ms,
            limits.ping_every_ms + 1,
            "a ping each limits.ping_every_ms, which must be answered before",
        ),
        (
            "store.lanes",
            store.lanes as u64,
            store.lanes_min as u64,
            "store.lanes_min",
        ),
        (
            "store.queue_rows",
            store.queue_rows as u64,
            store.batch_rows as u64,
            "a batch of store.batch_rows",
        ),
        (
            "limits.request_ms",
            limits.request_ms,
            store.send_ms + 1,
            "a send over REST, which may take store.send_ms",
        ),
        (
            "store.send_ms",
            store.send_ms,
            settings.resharding.freeze_ms + 1,
            "resharding.freeze_ms, for which sends wait while a slot moves",
        ),
    ];
    let fault = |(name, value, least, reason): (&str, u64, u64, &str)| {
        (value < least)
            .then(|| format!("{name} is {value}: it must be at least {least}, for {reason}"))
    };
    at_least.into_iter().filter_map(fault).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{DEFAULTS, Settings};
    use super::RANGES;
    use std::collections::BTreeSet;

    fn dotted(table: &str, key: &str) -> String {
        if table.is_empty() {
            key.into()
        } else {
            format!("{table}.{key}")
        }
    }

    fn refusal(toml: &str) -> String {
        let refused = Settings::from_toml(toml);
        refused.expect_err(toml).to_string()
    }

    /// The names of all numbers: (table, key).
    fn numbers() -> Vec<(String, String)> {
        let defaults: toml::Table = DEFAULTS.parse().unwrap();
        let mut numbers = Vec::new();
        for (key, value) in defaults {
            if value.is_integer() {
                numbers.push((String::new(), key));
            } else if let toml::Value::Table(table) = value {
                let of_table = table.into_iter().filter(|(_, value)| value.is_integer());
                numbers.extend(of_table.map(|(name, _)| (key.clone(), name)));
            }
        }
        numbers
    }

    #[test]
    fn every_number_has_a_range_and_is_refused_by_its_name() {
        let numbers = numbers();
        let names = numbers.iter().map(|(table, key)| dotted(table, key));
        let ranges: BTreeSet<String> = RANGES.iter().map(|(name, _)| (*name).into()).collect();
        assert_eq!(names.collect::<BTreeSet<_>>(), ranges);
        for (table, key) in numbers {
            let name = dotted(&table, &key);
            let range = &RANGES.iter().find(|(of, _)| *of == name).unwrap().1;
            let head = if table.is_empty() {
                String::new()
            } else {
                format!("[{table}]\n")
            };
            for value in [range.start() - 1, range.end() + 1, i64::MAX] {
                let refusal = refusal(&format!("{head}{key} = {value}"));
                assert!(refusal.contains(&format!("{name} is {value}")), "{refusal}");
            }
        }
    }

    #[test]
    fn ways_to_authenticate_and_files_belong_together() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        for (toml, expected) in [
            (
                "[nats]\nurl = 'nats://a'\nuser = 'u'",
                "nats.user and nats.password",
            ),
            (
                "[nats]\nurl = 'nats://a'\nuser = 'u'\npassword = 'p'\ntoken = 't'",
                "one way",
            ),
            ("[nats]\ntoken = 't'", "nats.url is not"),
            (
                "[nats]\nurl = 'nats://a'\ncredentials_file = '/nowhere'",
                "nats.credentials_file /nowhere",
            ),
            (
                &format!("[nats.tls]\nca_file = '{file}'"),
                "nats.tls.required is false",
            ),
            (
                &format!("[store.tls]\nrequired = true\nkey_file = '{file}'"),
                "store.tls.certificate_file and store.tls.key_file",
            ),
            (
                "[store.tls]\nrequired = true\nca_file = '/nowhere'",
                "store.tls.ca_file /nowhere",
            ),
            (
                &format!("[tls]\ncertificate_file = '{file}'"),
                "tls.certificate_file and tls.key_file",
            ),
            (
                &format!("[tls]\nclient_ca_file = '{file}'"),
                "tls.certificate_file is needed",
            ),
        ] {
            let refusal = refusal(toml);
            assert!(refusal.contains(expected), "{toml}: {refusal}");
        }
    }

    #[test]
    fn settings_that_contradict_each_other_are_refused() {
        for (toml, named) in [
            ("[store]\nlanes_min = 5", "store.lanes is 4"),
            ("[store]\nqueue_rows = 100", "store.queue_rows"),
            ("[limits]\ntext_chars = 16383", "limits.frame_bytes"),
            ("[limits]\nsilence_ms = 20000", "limits.silence_ms"),
            (
                "[limits]\nreads_in_flight = 300",
                "limits.requests_in_flight",
            ),
            (
                "[limits]\nhistory_page_bytes = 1000000",
                "limits.outbound_queue_bytes",
            ),
            ("[resharding]\nfreeze_ms = 5000", "store.send_ms"),
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
