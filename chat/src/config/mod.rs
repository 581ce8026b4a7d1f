//! Settings: defaults, then `chat.toml`, then the environment (`CHAT__LIMITS__TEXT_CHARS=…`). Units
//! are in the names.

mod tls;
mod check;
mod origin;

pub use check::RANGES;
pub use origin::{is_allowed_host, normalized as normalized_origin};
pub use tls::{ClientTls, ServerTls};

use serde::Deserialize;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// All settings.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Where clients connect.
    pub listen: SocketAddr,
    /// Where operators connect: metrics and admin routes.
    pub admin_listen: SocketAddr,
    /// The token of operators, in `Authorization: Bearer …`; must be set when `admin_listen` is not
    /// a loopback address.
    pub admin_token: Option<Secret>,
    /// The file that names the shards.
    pub shards_file: PathBuf,
    /// One process with everything in files, and a route that mints tokens on loopback. Set by
    /// `serve --embedded`.
    #[serde(skip)]
    pub embedded: bool,
    /// A demonstration on this machine: the sample secret is accepted.
    pub demo: bool,
    /// Host names under which clients and operators reach the service, beside addresses and
    /// `localhost`. A request for another host is refused.
    #[serde(default, deserialize_with = "origin::hosts")]
    pub allowed_hosts: Vec<String>,
    /// Behind a proxy that appends the client's address to `X-Forwarded-For`: count connections by
    /// that.
    pub trust_forwarded_for: bool,
    /// How long to wait at the start for shards that the initialization needs, in milliseconds.
    pub start_wait_ms: u64,
    /// Threads that serve clients; the first one has the databases and the bus, too.
    pub threads: usize,
    /// TLS of the listener for clients.
    pub tls: ServerTls,
    /// The bus between instances.
    pub nats: Nats,
    /// How clients authenticate.
    pub auth: Auth,
    /// Limits of clients, requests and answers.
    pub limits: Limits,
    /// How the shards are used.
    pub store: Store,
    /// How the set of shards is changed.
    pub resharding: Resharding,
    /// What is logged.
    pub log: Log,
}

/// The bus between instances: a server, and how this service authenticates there.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nats {
    /// `nats://host:port`; without it this is the only instance. It may have a user and a password,
    /// or a token.
    pub url: Option<Secret>,
    /// A user.
    pub user: Option<String>,
    /// The password of the user.
    pub password: Option<Secret>,
    /// A token, instead of a user.
    pub token: Option<Secret>,
    /// A credentials file of NATS (JWT and seed), instead of a user.
    pub credentials_file: Option<PathBuf>,
    /// TLS towards the server.
    pub tls: ClientTls,
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
    /// The clock skew that `exp` and `nbf` of a token allow, in seconds.
    pub leeway_seconds: u64,
    /// Origins of pages that may open a WebSocket, in one form, e.g.
    /// `https://chat.example.org`. The server's own page is always allowed.
    #[serde(default, deserialize_with = "origin::list")]
    pub allowed_origins: Vec<String>,
}

/// Limits. An error names the one that it is about.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // docs/REFERENCE.md lists them with their meaning, unit and range
pub struct Limits {
    pub text_chars: u32,
    pub frame_bytes: u32,
    pub message_fragments: u32,
    pub outbound_queue_bytes: usize,
    pub sessions_per_user: usize,
    pub connections_per_ip: usize,
    pub connections: usize,
    pub spare_connections: usize,
    pub spare_connections_per_ip: usize,
    pub upgraded_refusals: usize,
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
    /// Members of a room.
    pub room_members: u32,
    pub resume_dialogs: u32,
    pub resume_messages: u32,
    pub watched_users: u32,
    pub requests_in_flight: usize,
    pub reads_in_flight: usize,
    pub handshake_ms: u64,
    pub request_ms: u64,
    pub ping_every_ms: u64,
    pub silence_ms: u64,
    pub shutdown_ms: u64,
    pub tcp_user_timeout_ms: u64,
    pub presence_grace_ms: u64,
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
    /// How long a transaction or a read may take, in milliseconds. A shard that exceeds it counts
    /// as unreachable.
    pub answer_ms: u64,
    /// How long a send may take altogether, in milliseconds.
    pub send_ms: u64,
    /// TLS towards MySQL.
    pub tls: ClientTls,
}

/// How slots move when the set of shards changes.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resharding {
    /// Slots that move at once.
    pub slots_at_once: usize,
    /// How long a slot may take no writes, in milliseconds; an attempt that needs longer is made
    /// again.
    pub freeze_ms: u64,
    /// How long the rows of a slot stay after it has moved, in milliseconds: longer than any read
    /// may last.
    pub purge_after_ms: u64,
    /// How long the other instances may take to adopt a topology, in milliseconds. Slots move
    /// without those that need longer.
    pub peers_wait_ms: u64,
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

/// The settings with their defaults, units and meanings: TOML.
pub const DEFAULTS: &str = include_str!("defaults.toml");

impl Settings {
    /// Reads the settings: defaults, then the file if it is there (or was named), then the
    /// environment.
    ///
    /// # Errors
    /// A line for each setting that is wrong: its name, its value and what it must be.
    pub fn load(file: Option<&Path>) -> Result<Self, config::ConfigError> {
        let (path, required) = file.map_or((Path::new("chat.toml"), false), |file| (file, true));
        Self::from_sources(
            config::File::from(path)
                .format(config::FileFormat::Toml)
                .required(required),
            config::Environment::with_prefix("CHAT")
                .prefix_separator("__")
                .separator("__")
                // A text stays as it is; numbers are parsed by the type of their field.
                .ignore_empty(true),
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
        let merged = config::Config::builder()
            .add_source(config::File::from_str(DEFAULTS, config::FileFormat::Toml))
            .add_source(file)
            .add_source(environment)
            .build()?;
        refuse(&check::out_of_range(&merged))?;
        let mut settings: Self = merged.try_deserialize()?;
        settings.unset_empty();
        let contradictions = check::contradictions(&settings);
        let of_tls = [
            settings.tls.faults(),
            settings.nats.tls.faults("nats.tls"),
            settings.store.tls.faults("store.tls"),
        ];
        let others = [
            contradictions,
            check::weak_secrets(&settings),
            check::ways_to_nats(&settings),
        ];
        refuse(&[others.concat(), of_tls.concat()].concat())?;
        Ok(settings)
    }
}

impl Settings {
    /// An empty value of an optional setting is as good as none.
    fn unset_empty(&mut self) {
        let secrets = [
            &mut self.admin_token,
            &mut self.nats.url,
            &mut self.nats.password,
            &mut self.nats.token,
            &mut self.auth.secret,
        ];
        for secret in secrets {
            secret.take_if(|secret| secret.expose().trim().is_empty());
        }
        for text in [
            &mut self.auth.audience,
            &mut self.auth.issuer,
            &mut self.nats.user,
        ] {
            text.take_if(|text| text.trim().is_empty());
        }
        let files = [&mut self.auth.key_file, &mut self.nats.credentials_file];
        let of_tls = [
            self.nats.tls.files(),
            self.store.tls.files(),
            self.tls.files(),
        ];
        for file in files.into_iter().chain(of_tls.into_iter().flatten()) {
            file.take_if(|path| path.as_os_str().is_empty());
        }
    }
}

/// One line a fault; `Ok` if there is none.
fn refuse(faults: &[String]) -> Result<(), config::ConfigError> {
    if faults.is_empty() {
        return Ok(());
    }
    Err(config::ConfigError::Message(faults.join("\n")))
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
    fn a_secret_is_never_printed() {
        let settings = Settings::from_toml("admin_token = \"hunter2hunter2hunter2\"").unwrap();
        assert!(!format!("{settings:?}").contains("hunter2"));
    }
}
