//! Settings: defaults, then `chat.toml`, then the environment (`CHAT__LIMITS__TEXT_CHARS=…`). Units are in the names.

use serde::Deserialize;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Everything that can be set.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Where clients connect.
    pub listen: SocketAddr,
    /// Where operators connect: metrics and admin routes.
    pub admin_listen: SocketAddr,
    /// Asked of operators as `Authorization: Bearer …`; must be set when `admin_listen` is not a loopback address.
    pub admin_token: Option<Secret>,
    /// The file that names the shards.
    pub shards_file: PathBuf,
    /// `nats://host:port`; without it this is the only instance.
    pub nats_url: Option<Secret>,
    /// One process with everything in files, and a route that mints tokens on loopback. Set by `serve --embedded`.
    #[serde(default)]
    pub embedded: bool,
    /// A demonstration on this machine: the sample secret is taken.
    pub demo: bool,
    /// Behind a proxy that appends the client's address to `X-Forwarded-For`: count connections by that.
    pub trust_forwarded_for: bool,
    /// How long to wait at the start for shards that the initialization needs, in milliseconds.
    pub start_wait_ms: u64,
    /// Threads that serve clients; the first one has the databases and the bus, too.
    pub threads: usize,
    /// Who may come in.
    pub auth: Auth,
    /// How much of everything.
    pub limits: Limits,
    /// How the shards are used.
    pub store: Store,
    /// How the set of shards is changed.
    pub resharding: Resharding,
    /// What is logged.
    pub log: Log,
}

/// How tokens are checked. One algorithm is pinned; a token that names another is refused.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Auth {
    /// `HS256`, `EdDSA`, `ES256` or `RS256`.
    pub algorithm: String,
    /// For `HS256`: at least 32 bytes.
    pub secret: Option<Secret>,
    /// For the others: a PEM file with the public key, or a JWKS file (`.json`).
    pub key_file: Option<PathBuf>,
    /// If set, a token must name it in `aud`.
    pub audience: Option<String>,
    /// If set, a token must name it in `iss`.
    pub issuer: Option<String>,
    /// Origins of pages that may open a WebSocket, compared exactly, e.g. `https://chat.example.org`. The server's own
    /// page is always allowed.
    #[serde(default)]
    pub allowed_origins: Vec<String>,
}

/// Bounds; each says in an error which one it was.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // the names say it, units included; docs/OPERATIONS.md lists them
pub struct Limits {
    pub text_chars: u32,
    pub frame_bytes: u32,
    pub message_fragments: u32,
    pub outbound_queue_bytes: usize,
    pub sessions_per_user: usize,
    pub connections_per_ip: usize,
    pub connections: usize,
    pub sends_per_second: u32,
    pub sends_burst: u32,
    pub frames_per_second: u32,
    pub requests_per_second: u32,
    pub requests_burst: u32,
    pub work_per_second: u32,
    pub work_burst: u32,
    pub resume_hours: u32,
    pub connects_per_second: u32,
    pub connects_burst: u32,
    pub history_page: u32,
    pub history_page_bytes: usize,
    pub inbox_page: u32,
    pub resume_dialogs: u32,
    pub resume_messages: u32,
    pub watched_users: u32,
    pub requests_in_flight: usize,
    pub reads_in_flight: usize,
    pub handshake_ms: u64,
    pub ping_every_ms: u64,
    pub silence_ms: u64,
    pub shutdown_ms: u64,
    pub tcp_user_timeout_ms: u64,
}

/// How a shard is used.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Store {
    /// Lanes of a shard's writer: transactions in flight at once, at most.
    pub lanes: usize,
    /// Lanes that are always there; as many as `lanes`, and nothing is measured.
    pub lanes_min: usize,
    /// Messages that one transaction takes at most.
    pub batch_rows: usize,
    /// Sends that may wait for one shard; more are refused as `overloaded`.
    pub queue_rows: usize,
    /// Connections for reading, per shard.
    pub read_connections: usize,
    /// How long a connection may take to open, in milliseconds.
    pub connect_ms: u64,
    /// How long a transaction or a read may take, in milliseconds. A shard that exceeds it is taken for dead.
    pub answer_ms: u64,
    /// How long a send may take altogether, in milliseconds.
    pub send_ms: u64,
}

/// How slots move when the set of shards changes.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resharding {
    /// Slots that move at once.
    pub slots_at_once: usize,
    /// How long a slot may take no writes, in milliseconds; an attempt that needs longer is made again.
    pub freeze_ms: u64,
    /// How long the rows of a slot stay after it has moved, in milliseconds: longer than any read may last.
    pub purge_after_ms: u64,
    /// Whether moves take one slot at a time, with rests, where users write.
    pub throttle: bool,
}

/// What is logged, and how.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    /// A filter in the notation of `tracing-subscriber`, e.g. `info,chat=debug`.
    pub filter: String,
    /// `text` or `json`.
    pub format: LogFormat,
}

/// See [`Log`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum LogFormat {
    Text,
    Json,
}

/// A setting that is never printed.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    #[must_use]
    pub fn new(secret: String) -> Self {
        Self(secret)
    }

    /// The secret itself, to be used and not to be shown.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// A TEXT of MySQL takes 65,535 bytes, and a character up to four.
const TEXT_CHARS: u32 = 16_383;

/// More threads than any machine has use for.
const THREADS: usize = 256;

const DEFAULTS: &str = include_str!("defaults.toml");

impl Settings {
    /// Reads the settings: defaults, then the file if it is there (or was named), then the environment.
    ///
    /// # Errors
    /// One line that names the setting and what is wrong with it.
    pub fn load(file: Option<&Path>) -> Result<Self, config::ConfigError> {
        let (path, required) = file.map_or((Path::new("chat.toml"), false), |file| (file, true));
        Self::from_sources(
            config::File::from(path)
                .format(config::FileFormat::Toml)
                .required(required),
            config::Environment::with_prefix("CHAT")
                .prefix_separator("__")
                .separator("__")
                .try_parsing(true)
                .list_separator(",")
                .with_list_parse_key("auth.allowed_origins"),
        )
    }

    /// The defaults with `toml` laid over them.
    ///
    /// # Errors
    /// As [`Settings::load`].
    pub fn from_toml(toml: &str) -> Result<Self, config::ConfigError> {
        Self::from_sources(
            config::File::from_str(toml, config::FileFormat::Toml),
            config::Environment::with_prefix("CHAT__NONE"),
        )
    }

    fn from_sources(
        file: impl config::Source + Send + Sync + 'static,
        environment: config::Environment,
    ) -> Result<Self, config::ConfigError> {
        let settings: Self = config::Config::builder()
            .add_source(config::File::from_str(DEFAULTS, config::FileFormat::Toml))
            .add_source(file)
            .add_source(environment)
            .build()?
            .try_deserialize()?;
        let text_chars = settings.limits.text_chars;
        if !(1..=TEXT_CHARS).contains(&text_chars) {
            return Err(config::ConfigError::Message(format!(
                "limits.text_chars is {text_chars}: it must be between 1 and {TEXT_CHARS}"
            )));
        }
        let threads = settings.threads;
        if !(1..=THREADS).contains(&threads) {
            return Err(config::ConfigError::Message(format!(
                "threads is {threads}: it must be between 1 and {THREADS}"
            )));
        }
        let Store {
            lanes, lanes_min, ..
        } = settings.store;
        if !(1..=lanes).contains(&lanes_min) {
            return Err(config::ConfigError::Message(format!(
                "store.lanes_min is {lanes_min}: it must be between 1 and store.lanes, which is {lanes}"
            )));
        }
        Ok(settings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_complete() {
        let settings = Settings::from_toml("").unwrap();
        assert_eq!(settings.limits.text_chars, 4000);
        assert_eq!(settings.admin_listen.ip(), std::net::Ipv4Addr::LOCALHOST);
    }

    #[test]
    fn an_unknown_setting_is_refused_by_name() {
        let refusal = Settings::from_toml("[limits]\ntext_characters = 5")
            .unwrap_err()
            .to_string();
        assert!(refusal.contains("text_characters"), "{refusal}");
    }

    #[test]
    fn lanes_that_contradict_each_other_are_refused() {
        for lanes in ["lanes_min = 0", "lanes_min = 5", "lanes = 0"] {
            let refusal = Settings::from_toml(&format!("[store]\n{lanes}")).unwrap_err();
            assert!(refusal.to_string().contains("store.lanes_min"), "{refusal}");
        }
        assert!(Settings::from_toml("[store]\nlanes = 8\nlanes_min = 8").is_ok());
    }

    #[test]
    fn a_text_that_no_column_takes_is_not_allowed() {
        for chars in [0, 16_384] {
            let refusal = Settings::from_toml(&format!("[limits]\ntext_chars = {chars}"));
            let refusal = refusal.unwrap_err().to_string();
            assert!(refusal.contains("limits.text_chars"), "{refusal}");
        }
        assert!(Settings::from_toml("[limits]\ntext_chars = 16383").is_ok());
    }

    #[test]
    fn there_is_at_least_one_thread_and_no_absurd_number() {
        for threads in [0, 257] {
            let refusal = Settings::from_toml(&format!("threads = {threads}")).unwrap_err();
            assert!(refusal.to_string().contains("threads is"), "{refusal}");
        }
        assert!(Settings::from_toml("threads = 256").is_ok());
    }

    #[test]
    fn a_secret_is_never_printed() {
        let settings = Settings::from_toml("admin_token = \"hunter2hunter2\"").unwrap();
        assert!(!format!("{settings:?}").contains("hunter2"));
    }
}
