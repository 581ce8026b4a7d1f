//! A service to prove things on: five MySQL servers, NATS, and two instances as processes of their
//! own.

use anyhow::{Context, bail, ensure};
use chat_client::{Access, TokenSource};
use mysql_async::prelude::Queryable;
use mysql_async::{Opts, OptsBuilder, SslOpts};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use testkit::SECRET;
use testkit::ca::{Ca, Certificate};
use testkit::lossy;
use testkit::process::{self, Process};

pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A private CA, and certificates for the instances as clients, and for every server.
struct Tls {
    ca: Ca,
    own: Certificate,
    server: Certificate,
}

/// Five databases, a bus, two instances.
pub struct Service {
    chat: PathBuf,
    dir: PathBuf,
    port: u16,
    instances: Vec<Option<Process>>,
    /// Instances keep to the limits that are set by default.
    pub at_default_limits: bool,
    /// Where the instances find the bus, if not where it is.
    pub bus: [Option<String>; 2],
    tls: Option<Tls>,
    /// Of dialogs that were asked for; no slot moves meanwhile.
    owners: BTreeMap<(u64, u64), String>,
    /// While these lasted, something was dead: (what, from, until).
    pub outages: Vec<(String, Instant, Instant)>,
}

impl Service {
    /// Nothing of it runs yet. `chat` is the server's program, `port` is the first of some dozens.
    pub fn new(chat: PathBuf, dir: PathBuf, port: u16) -> Self {
        let service = Self {
            chat,
            dir,
            port,
            instances: vec![None, None],
            at_default_limits: false,
            bus: [None, None],
            tls: None,
            owners: BTreeMap::new(),
            outages: Vec::new(),
        };
        // The first one installs the crypto provider of this process.
        drop(service.access(0));
        service
    }

    /// From now on everything is over TLS. Before the servers are started.
    pub fn use_tls(&mut self) -> anyhow::Result<()> {
        let folder = self.dir.canonicalize()?;
        let ca = Ca::new(&folder);
        let (own, server) = (ca.issue("instance"), ca.issue("server"));
        let nats = format!(
            r#"tls {{ cert_file: "{}", key_file: "{}", ca_file: "{}", verify: true }}
            authorization {{ user: chat, password: secret }}"#,
            server.certificate.display(),
            server.key.display(),
            ca.file().display()
        );
        std::fs::write(folder.join("nats.conf"), nats)?;
        self.tls = Some(Tls { ca, own, server });
        Ok(())
    }

    /// Certificates for a proxy before NATS.
    pub fn lossy_tls(&self) -> Option<lossy::Tls> {
        let tls = self.tls.as_ref()?;
        Some(lossy::Tls::new(&tls.ca, &tls.server))
    }

    /// Five databases and the bus.
    pub fn start_servers(&self) -> anyhow::Result<()> {
        for n in 1..=5 {
            self.start_shard(n)?;
        }
        self.start_nats()
    }

    pub fn servers(command: &[&str]) -> anyhow::Result<()> {
        Self::servers_with(command, "")
    }

    fn servers_with(command: &[&str], options: &str) -> anyhow::Result<()> {
        let mut program = Command::new("dev/servers");
        if !options.is_empty() {
            program.env("SERVER_OPTIONS", options);
        }
        let status = program.args(command).status().context("dev/servers")?;
        ensure!(status.success(), "dev/servers {command:?} failed");
        Ok(())
    }

    /// The folder of everything.
    pub fn folder(&self) -> &Path {
        &self.dir
    }

    pub fn dir(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    pub fn nats(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port + 9)
    }

    pub fn start_nats(&self) -> anyhow::Result<()> {
        let options = self.tls.as_ref().map_or(String::new(), |_| {
            format!("-c {}", self.dir.join("nats.conf").display())
        });
        let port = (self.port + 9).to_string();
        Self::servers_with(&["nats", &self.dir("nats"), &port], &options)
    }

    pub fn kill_nats(&self) -> anyhow::Result<()> {
        Self::servers(&["kill", &self.dir("nats")])
    }

    /// kill -9.
    pub fn kill_instance(&mut self, i: u16) -> anyhow::Result<()> {
        drop(self.instances[usize::from(i)].take());
        Ok(())
    }

    /// SIGTERM.
    pub fn terminate_instance(&self, i: u16) -> anyhow::Result<()> {
        Ok(self.instance(i)?.signal("TERM")?)
    }

    fn instance(&self, i: u16) -> anyhow::Result<&Process> {
        let instance = self.instances[usize::from(i)].as_ref();
        instance.with_context(|| format!("instance {i} does not run"))
    }

    /// Whether an instance that was asked to has ended.
    pub fn has_ended(&mut self, i: u16) -> anyhow::Result<bool> {
        match &mut self.instances[usize::from(i)] {
            Some(child) => Ok(child.ended()?.is_some()),
            None => Ok(true),
        }
    }

    /// Memory that an instance holds, in MiB.
    pub fn resident_mib(&self, i: u16) -> anyhow::Result<f64> {
        Ok(self.instance(i)?.resident()? as f64 / f64::from(1 << 20))
    }

    /// Processor time of the four database servers so far, in hundredths of a second.
    pub fn shard_ticks(&self) -> anyhow::Result<u64> {
        let mut ticks = 0;
        for n in 1..=4 {
            ticks += process::ticks(self.shard_pid(n)?)?;
        }
        Ok(ticks)
    }

    fn shard_pid(&self, n: u16) -> anyhow::Result<u32> {
        let pid = std::fs::read_to_string(self.dir.join(format!("shard{n}/pid")))?;
        Ok(pid.trim().parse()?)
    }

    /// A counter of an instance.
    pub async fn metric(&self, i: u16, name: &str) -> anyhow::Result<f64> {
        let text = reqwest::get(format!("{}/metrics", self.admin(i)))
            .await?
            .text()
            .await?;
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map_or(Ok(0.0), |value| Ok(value.parse()?))
    }

    pub fn shard_port(&self, n: u16) -> u16 {
        self.port + 10 + n
    }

    pub fn database(&self, n: u16) -> String {
        format!("mysql://root@127.0.0.1:{}/chat", self.shard_port(n))
    }

    pub fn url(&self, i: u16) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{}", self.port + i)
    }

    /// The settings of an instance for TLS.
    fn tls_settings(&self) -> Vec<(&'static str, String)> {
        let Some(Tls { ca, own, server }) = &self.tls else {
            return Vec::new();
        };
        let file = |path: &Path| path.display().to_string();
        vec![
            ("CHAT__TLS__CERTIFICATE_FILE", file(&server.certificate)),
            ("CHAT__TLS__KEY_FILE", file(&server.key)),
            ("CHAT__NATS__USER", "chat".into()),
            ("CHAT__NATS__PASSWORD", "secret".into()),
            ("CHAT__NATS__TLS__REQUIRED", "true".into()),
            ("CHAT__NATS__TLS__CA_FILE", file(&ca.file())),
            ("CHAT__NATS__TLS__CERTIFICATE_FILE", file(&own.certificate)),
            ("CHAT__NATS__TLS__KEY_FILE", file(&own.key)),
            ("CHAT__STORE__TLS__REQUIRED", "true".into()),
            ("CHAT__STORE__TLS__CA_FILE", file(&ca.file())),
            ("CHAT__STORE__TLS__CERTIFICATE_FILE", file(&own.certificate)),
            ("CHAT__STORE__TLS__KEY_FILE", file(&own.key)),
        ]
    }

    /// A connection to a database server.
    async fn connection(&self, shard: u16) -> anyhow::Result<mysql_async::Conn> {
        let options = OptsBuilder::from_opts(Opts::from_url(&self.database(shard))?);
        let ssl = self.tls.as_ref().map(|tls| {
            SslOpts::default()
                .with_disable_built_in_roots(true)
                .with_root_certs(vec![tls.ca.file().into()])
        });
        Ok(mysql_async::Conn::new(options.ssl_opts(ssl)).await?)
    }

    pub fn admin(&self, i: u16) -> String {
        format!("http://127.0.0.1:{}", self.port + 5 + i)
    }

    pub fn access(&self, i: u16) -> Access {
        let access = Access::new(&self.url(i), TokenSource::Secret(SECRET.to_owned()));
        let Some(tls) = &self.tls else {
            return access;
        };
        let ca = std::fs::read(tls.ca.file()).expect("the CA of this run");
        access.with_ca(&ca).expect("the CA of this run")
    }

    /// Saves the file as an editor does, by renaming. `shards` are numbers and further lines of
    /// their entries.
    pub fn save(&self, shards: &[(u16, &str)]) -> anyhow::Result<()> {
        self.save_with(shards, "")
    }

    /// As [`Service::save`], with `more` behind the shards.
    pub fn save_with(&self, shards: &[(u16, &str)], more: &str) -> anyhow::Result<()> {
        let entry = |(n, more): &(u16, &str)| {
            format!(
                "[[shard]]\nname = \"shard{n}\"\nurl = \"{}\"\n{more}\n",
                self.database(*n)
            )
        };
        let text: String = shards.iter().map(entry).collect::<String>() + more;
        let file = self.dir.join("shards.toml");
        std::fs::write(file.with_extension("new"), text)?;
        Ok(std::fs::rename(file.with_extension("new"), file)?)
    }

    pub async fn start_instance(&mut self, i: u16, fault: &str) -> anyhow::Result<()> {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.join(format!("instance{i}.log")))?;
        let child = Command::new(&self.chat)
            .arg("serve")
            .env("CHAT__LISTEN", format!("127.0.0.1:{}", self.port + i))
            .envs(self.tls_settings())
            .env(
                "CHAT__ADMIN_LISTEN",
                self.admin(i).trim_start_matches("http://"),
            )
            .env("CHAT__SHARDS_FILE", self.dir.join("shards.toml"))
            .env(
                "CHAT__NATS__URL",
                self.bus[usize::from(i)]
                    .clone()
                    .unwrap_or_else(|| self.nats()),
            )
            .env("CHAT__AUTH__SECRET", SECRET)
            .envs(self.limits())
            .env("CHAT__RESHARDING__PURGE_AFTER_MS", "3000")
            .env("CHAT_FAILPOINTS", fault)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        self.instances[usize::from(i)] = Some(Process(child));
        for _ in 0..600 {
            if reqwest::get(format!("{}/readyz", self.admin(i)))
                .await
                .is_ok_and(|answer| answer.status().is_success())
            {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        bail!("instance {i} does not get ready; see its log")
    }

    /// All clients have one address here; and few users do the work of many.
    fn limits(&self) -> Vec<(String, &'static str)> {
        let names = [
            "CONNECTIONS_PER_IP",
            "CONNECTS_PER_SECOND",
            "CONNECTS_BURST",
            "SENDS_PER_SECOND",
            "SENDS_BURST",
            "FRAMES_PER_SECOND",
            "REQUESTS_PER_SECOND",
            "REQUESTS_BURST",
            "WORK_PER_SECOND",
            "WORK_BURST",
        ];
        let names = names.iter().filter(|_| !self.at_default_limits);
        names
            .map(|name| (format!("CHAT__LIMITS__{name}"), "100000"))
            .collect()
    }

    /// Looks whether an instance has died; starts it again with the next fault.
    pub async fn revive(&mut self, faults: &mut Vec<&'static str>) -> anyhow::Result<()> {
        for i in 0..2u16 {
            let died = match &mut self.instances[usize::from(i)] {
                Some(child) => child.ended()?.is_some(),
                None => false,
            };
            if died {
                let at = Instant::now();
                let fault = faults.pop().unwrap_or("");
                tokio::time::sleep(Duration::from_secs(1)).await;
                self.start_instance(i, fault).await?;
                self.outage(&format!("instance {i}"), at);
            }
        }
        Ok(())
    }

    pub async fn status(&self) -> anyhow::Result<Value> {
        for i in 0..2 {
            if let Ok(answer) = reqwest::get(format!("{}/admin/resharding", self.admin(i))).await {
                return Ok(answer.json().await?);
            }
        }
        Ok(Value::Null)
    }

    pub async fn slots(&self) -> anyhow::Result<BTreeMap<String, (u64, u64)>> {
        for i in 0..2 {
            if let Ok(answer) = reqwest::get(format!("{}/admin/slots", self.admin(i))).await {
                let answer: Value = answer.json().await?;
                let shards = answer["shards"].as_array().context("no shards")?;
                let number =
                    |shard: &Value, field: &str| shard[field].as_u64().unwrap_or(u64::MAX / 8);
                return Ok(shards
                    .iter()
                    .filter(|shard| shard["reason"] != "declared down")
                    .map(|shard| {
                        let name = shard["name"].as_str().unwrap_or_default().to_owned();
                        let unfinished = number(shard, "sealed")
                            + number(shard, "incoming")
                            + number(shard, "fenced")
                            + number(shard, "to_purge");
                        (name, (number(shard, "owner"), unfinished))
                    })
                    .collect());
            }
        }
        bail!("no instance answers")
    }

    /// Waits until the topology of `version` is carried out, and restarts instances that die
    /// meanwhile.
    pub async fn carried_out(
        &mut self,
        version: u64,
        faults: &mut Vec<&'static str>,
    ) -> anyhow::Result<()> {
        let begun = Instant::now();
        loop {
            self.revive(faults).await?;
            let status = self.status().await?;
            if status["version"] == version
                && status["work"]["stage"] == "idle"
                && status["work"]["version"] == version
            {
                // Seldom: all rows of all slots are read for it, which the users would feel.
                tokio::time::sleep(Duration::from_secs(1)).await;
                let slots = self.slots().await?;
                let (owned, unfinished) = slots
                    .values()
                    .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
                if owned == 4096 && unfinished == 0 {
                    let freeze = &status["work"]["freeze_ms"];
                    let ms = |name: &str| freeze[name].as_f64().unwrap_or_default();
                    println!(
                        "{:>6.1} s  version {version} is complete; slots took no writes for p50 {:.1}, p99 {:.1}, at most {:.1} ms",
                        begun.elapsed().as_secs_f64(),
                        ms("p50"),
                        ms("p99"),
                        ms("max")
                    );
                    return Ok(());
                }
            }
            ensure!(
                begun.elapsed() < Duration::from_secs(120),
                "version {version} is not complete: {status}"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    pub fn start_shard(&self, n: u16) -> anyhow::Result<()> {
        let port = self.shard_port(n).to_string();
        let options = self.tls.as_ref().map_or(String::new(), |tls| {
            format!(
                "--ssl-ca={} --ssl-cert={} --ssl-key={} --require-secure-transport=ON",
                tls.ca.file().display(),
                tls.server.certificate.display(),
                tls.server.key.display()
            )
        });
        Self::servers_with(&["mysql", &self.dir(&format!("shard{n}")), &port], &options)
    }

    /// Something was dead from `since` until now; clients that noticed come back with a pause that
    /// grows to eight seconds.
    pub fn outage(&mut self, what: &str, since: Instant) {
        let since = since - Duration::from_millis(300);
        let until = Instant::now() + Duration::from_secs(9);
        self.outages.push((what.to_owned(), since, until));
    }

    /// Sends a signal to a database server.
    pub fn signal_shard(&self, n: u16, signal: &str) -> anyhow::Result<()> {
        Ok(process::signal(self.shard_pid(n)?, signal)?)
    }

    /// Runs statements on a database server.
    pub async fn execute(&self, shard: u16, sql: &str) -> anyhow::Result<()> {
        let mut conn = self.connection(shard).await?;
        conn.query_drop(sql).await?;
        Ok(conn.disconnect().await?)
    }

    /// Closes all connections to a database server.
    pub async fn close_connections(&self, shard: u16) -> anyhow::Result<()> {
        let mut conn = self.connection(shard).await?;
        let others = "SELECT id FROM information_schema.processlist WHERE id <> CONNECTION_ID() AND user = 'root'";
        for id in conn.query::<u64, _>(others).await? {
            // It may have gone by itself.
            let _ = conn.query_drop(format!("KILL {id}")).await;
        }
        Ok(conn.disconnect().await?)
    }

    /// Access for a client that goes to the other instance when one is away.
    pub fn access_to_any(&self, first: u16) -> Access {
        let urls = [self.url(0), self.url(1)];
        self.access(first)
            .with_others(urls.iter().map(String::as_str))
    }

    /// The name of the shard that owns a dialog.
    pub async fn owner_of(&mut self, dialog: (u64, u64)) -> anyhow::Result<String> {
        if let Some(owner) = self.owners.get(&dialog) {
            return Ok(owner.clone());
        }
        let url = format!("{}/admin/where/{}/{}", self.admin(0), dialog.0, dialog.1);
        let place: Value = reqwest::get(url).await?.json().await?;
        let owner = place["owner"]
            .as_str()
            .context("the slot has no owner")?
            .to_owned();
        self.owners.insert(dialog, owner.clone());
        Ok(owner)
    }

    pub async fn number(&self, shard: u16, sql: &str) -> anyhow::Result<u64> {
        let mut conn = self.connection(shard).await?;
        let number: Option<u64> = conn.query_first(sql).await?;
        conn.disconnect().await?;
        number.context("no number")
    }
}

impl Drop for Service {
    /// Ends everything that was started.
    fn drop(&mut self) {
        self.instances.clear();
        for name in ["shard1", "shard2", "shard3", "shard4", "shard5", "nats"] {
            let _ = Self::servers(&["kill", &self.dir(name)]);
        }
    }
}
