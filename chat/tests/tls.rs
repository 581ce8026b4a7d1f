//! TLS everywhere, against real servers with a private CA: MySQL, MariaDB, NATS, and the listener.

#![allow(missing_docs, clippy::wildcard_enum_match_arm)]

use async_nats::ConnectOptions;
use chat_client::{Access, Client, Event, TokenSource};
use chat_wire::{ClientFrame, ServerFrame};
use futures_util::{SinkExt, StreamExt};
use mysql_async::prelude::Queryable;
use mysql_async::{ClientIdentity, OptsBuilder, SslOpts};
use std::path::{Path, PathBuf};
use std::process::Command;
use testkit::ca::{Ca, Certificate};
use testkit::instance::{Instance, refusal};
use testkit::{SECRET, free_port, until};

/// Servers with TLS; they end with it.
struct Servers {
    folder: tempfile::TempDir,
    ca: Ca,
    own: Certificate,
    ports: [u16; 3],
}

const NAMES: [&str; 3] = ["mysql", "mariadb", "nats"];

fn dev_servers(arguments: &[&str], options: &str) {
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/../dev/servers");
    let status = Command::new(program)
        .args(arguments)
        .env("SERVER_OPTIONS", options)
        .status();
    assert!(status.unwrap().success(), "{arguments:?}");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

impl Servers {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ca = Ca::new(folder.path());
        let (own, server) = (ca.issue("instance"), ca.issue("server"));
        let servers = Self {
            ports: [free_port(), free_port(), free_port()],
            folder,
            ca,
            own,
        };
        let certificate = text(&server.certificate);
        let (key, ca) = (text(&server.key), servers.ca.file());
        let database = format!(
            "--ssl-ca={} --ssl-cert={certificate} --ssl-key={key} --require-secure-transport=ON",
            ca.display()
        );
        let config = servers.folder.path().join("nats.conf");
        let nats = format!(
            r#"tls {{ cert_file: "{certificate}", key_file: "{key}", ca_file: "{}", verify: true }}
            authorization {{ users: [
              {{ user: chat, password: "of the service" }},
              {{ user: other, password: "of another service", permissions: {{ publish: "other.>", subscribe: "other.>" }} }}
            ] }}"#,
            ca.display()
        );
        std::fs::write(&config, nats).unwrap();
        for (n, name) in NAMES.iter().enumerate() {
            let options = match *name {
                "nats" => format!("-c {}", config.display()),
                "mariadb" => format!("{database} --max-connections=200"),
                _ => database.clone(),
            };
            dev_servers(
                &[name, &servers.place(name), &servers.ports[n].to_string()],
                &options,
            );
        }
        for (n, name) in NAMES[..2].iter().enumerate() {
            // Who connects must have a certificate, too.
            let sql = "ALTER USER root@'127.0.0.1' REQUIRE X509";
            let mut connection = mysql_async::Conn::new(servers.options(n)).await.unwrap();
            if *name == "mariadb" {
                let sql = "CREATE USER IF NOT EXISTS root@'127.0.0.1'; GRANT ALL ON *.* TO root@'127.0.0.1'; CREATE DATABASE IF NOT EXISTS chat";
                connection.query_drop(sql).await.unwrap();
            }
            connection.query_drop(sql).await.unwrap();
        }
        servers
    }

    fn place(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn options(&self, n: usize) -> OptsBuilder {
        let own = ClientIdentity::new(
            self.own.certificate.clone().into(),
            self.own.key.clone().into(),
        );
        let ssl = SslOpts::default()
            .with_disable_built_in_roots(true)
            .with_root_certs(vec![self.ca.file().into()])
            .with_client_identity(Some(own));
        OptsBuilder::default()
            .ip_or_hostname("127.0.0.1")
            .tcp_port(self.ports[n])
            .user(Some("root"))
            .prefer_socket(false)
            .ssl_opts(ssl)
    }

    fn shards_file(&self) -> PathBuf {
        let path = self.folder.path().join("shards.toml");
        let shard = |n: usize| {
            format!(
                "[[shard]]\nname = \"{}\"\nurl = \"mysql://root@127.0.0.1:{}/chat\"\n",
                NAMES[n], self.ports[n]
            )
        };
        std::fs::write(&path, shard(0) + &shard(1)).unwrap();
        path
    }

    /// The settings of an instance: certificates for all three.
    fn settings(&self, listener: &Certificate) -> Vec<(&'static str, String)> {
        let file = |path: &Path| path.display().to_string();
        let (ca, own) = (file(&self.ca.file()), &self.own);
        vec![
            ("TLS__CERTIFICATE_FILE", file(&listener.certificate)),
            ("TLS__KEY_FILE", file(&listener.key)),
            ("NATS__URL", format!("nats://127.0.0.1:{}", self.ports[2])),
            ("NATS__USER", "chat".into()),
            ("NATS__PASSWORD", "of the service".into()),
            ("NATS__TLS__REQUIRED", "true".into()),
            ("NATS__TLS__CA_FILE", ca.clone()),
            ("NATS__TLS__CERTIFICATE_FILE", file(&own.certificate)),
            ("NATS__TLS__KEY_FILE", file(&own.key)),
            ("STORE__TLS__REQUIRED", "true".into()),
            ("STORE__TLS__CA_FILE", ca),
            ("STORE__TLS__CERTIFICATE_FILE", file(&own.certificate)),
            ("STORE__TLS__KEY_FILE", file(&own.key)),
        ]
    }

    async fn instance(&self, settings: &[(&'static str, String)]) -> Instance {
        Instance::start(&self.shards_file(), &borrowed(settings)).await
    }

    /// Access to an instance over TLS.
    fn access(&self, instance: &Instance) -> Access {
        let url = instance.url.replace("http:", "https:");
        let access = Access::new(&url, TokenSource::Secret(SECRET.to_owned()));
        access
            .with_ca(&std::fs::read(self.ca.file()).unwrap())
            .unwrap()
    }

    async fn nats(&self, user: &str, password: &str) -> async_nats::Client {
        ConnectOptions::new()
            .user_and_password(user.into(), password.into())
            .require_tls(true)
            .add_root_certificates(self.ca.file())
            .add_client_certificate(self.own.certificate.clone(), self.own.key.clone())
            .connect(format!("nats://127.0.0.1:{}", self.ports[2]))
            .await
            .unwrap()
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for name in NAMES {
            dev_servers(&["kill", &self.place(name)], "");
        }
    }
}

fn borrowed<'a>(settings: &'a [(&'static str, String)]) -> Vec<(&'a str, &'a str)> {
    settings
        .iter()
        .map(|(name, value)| (*name, value.as_str()))
        .collect()
}

/// The settings with others in their place.
fn with(
    settings: &[(&'static str, String)],
    changes: &[(&'static str, &str)],
) -> Vec<(&'static str, String)> {
    let kept = settings
        .iter()
        .filter(|(name, _)| changes.iter().all(|(other, _)| other != name));
    let changed = changes
        .iter()
        .map(|(name, value)| (*name, (*value).to_owned()));
    kept.cloned().chain(changed).collect()
}

/// The serial number of the certificate that a listener presents.
fn serial(address: &str) -> String {
    let script = format!(
        "openssl s_client -connect {address} </dev/null 2>/dev/null | openssl x509 -noout -serial"
    );
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_people_talk_over_tls_all_the_way() {
    let servers = Servers::start().await;
    let listener = servers.ca.issue("listener");
    let settings = servers.settings(&listener);
    let one = servers.instance(&settings).await;
    // The other one has its credentials for NATS in the URL.
    let url = format!(
        "nats://chat:of%20the%20service@127.0.0.1:{}",
        servers.ports[2]
    );
    let mut in_url = with(&settings, &[("NATS__URL", &url)]);
    in_url.retain(|(name, _)| !["NATS__USER", "NATS__PASSWORD"].contains(name));
    let two = servers.instance(&in_url).await;
    for instance in [&one, &two] {
        let ready = format!("{}/readyz", instance.admin);
        until("the bus is connected", async || {
            (instance.get(&ready).await.1["status"] == "ok").then_some(())
        })
        .await;
    }

    let (seven, mut of_seven) = Client::start(servers.access(&one), 7);
    let (_forty_two, mut of_forty_two) = Client::start(servers.access(&two), 42);
    for events in [&mut of_seven, &mut of_forty_two] {
        let first = events.recv().await.unwrap();
        assert!(matches!(first, Event::Connected), "{first:?}");
    }
    // The session of 42 is announced by now: the first message may come over the bus or be read.
    seven
        .send(42, "k1".into(), "over TLS".into())
        .await
        .unwrap();
    let message = loop {
        if let Some(Event::Message(message)) = of_forty_two.recv().await {
            break message;
        }
    };
    assert_eq!((message.seq, message.text.as_str()), (1, "over TLS"));

    assert!(!two.log().contains("of%20the%20service") && !two.log().contains("of the service"));
    forged(&servers, &one, &two).await;
    renewed(&servers, &listener, &one).await;

    // Without the CA, and without TLS, nobody comes in.
    let strangers = Access::new(
        &one.url.replace("http:", "https:"),
        TokenSource::Secret(SECRET.into()),
    );
    assert!(
        chat_client::Api::new(strangers, 7)
            .await
            .unwrap()
            .inbox(1, None)
            .await
            .is_err()
    );
    assert!(reqwest::get(format!("{}/livez", one.url)).await.is_err());

    refused(&servers, &settings);
    clients_with_certificates(&servers, &settings).await;
}

/// What somebody else who reaches NATS can do: nothing without rights; with the rights of the
/// service, only what an instance could have published.
async fn forged(servers: &Servers, one: &Instance, two: &Instance) {
    let (_, topology) = one.get(&format!("{}/admin/topology", one.admin)).await;
    assert_eq!(topology["phase"], "normal");
    let mut session = socket(servers, two, 77).await;
    let service = {
        let mut connection = mysql_async::Conn::new(servers.options(0)).await.unwrap();
        let id: Option<String> = connection
            .query_first("SELECT cluster_id FROM chat.meta")
            .await
            .unwrap();
        id.unwrap()
    };
    let subject = format!("chat.{service}.u.77");
    let frame = |from: u64, text: &str| {
        format!(
            r#"{{"type":"message","dialog":"7_77","seq":1,"from":{from},"to":77,"text":"{text}","at":"2026-11-21T05:00:00.123456Z"}}"#
        )
    };
    let other = servers.nats("other", "of another service").await;
    let payload = format!("message 7_77 1\n{}", frame(7, "without rights"));
    other
        .publish(subject.clone(), payload.into())
        .await
        .unwrap();
    other.flush().await.unwrap();
    let chat = servers.nats("chat", "of the service").await;
    for payload in [
        // By somebody who is not in the dialog; of another dialog; what is no event.
        format!("message 7_77 1\n{}", frame(8, "by a stranger")),
        format!(
            "message 7_78 1\n{}",
            frame(7, "of others").replace("77", "78")
        ),
        r#"ephemeral
{"type":"error","code":"internal","message":"x","retryable":false,"retry_after_ms":null}"#
            .to_owned(),
        "nonsense".to_owned(),
    ] {
        chat.publish(subject.clone(), payload.into()).await.unwrap();
    }
    // A revocation is believed to the shards only.
    let revocations = format!("chat.{service}.revocations");
    for payload in ["revoked 77 99999999999", "digest 0000000000000000"] {
        chat.publish(revocations.clone(), payload.into())
            .await
            .unwrap();
    }
    // This one an instance could have published: the session shows it. NATS must be closed off.
    let payload = format!("message 7_77 1\n{}", frame(7, "with rights"));
    chat.publish(subject, payload.into()).await.unwrap();
    chat.flush().await.unwrap();
    let ServerFrame::Message(message) = session.next().await else {
        panic!("no message");
    };
    let api = chat_client::Api::new(servers.access(two), 77)
        .await
        .unwrap();
    api.inbox(1, None).await.unwrap();
    assert_eq!(
        message.text, "with rights",
        "nothing of the others came before"
    );
}

/// A WebSocket over TLS, after its welcome.
async fn socket(servers: &Servers, instance: &Instance, user: u64) -> TlsSocket {
    let access = servers.access(instance);
    let token = access.token(user).await.unwrap();
    let address = instance.url.trim_start_matches("http://").to_owned();
    let mut roots = rustls::RootCertStore::empty();
    let pem = std::fs::read(servers.ca.file()).unwrap();
    use rustls::pki_types::pem::PemObject;
    for certificate in rustls::pki_types::CertificateDer::pem_slice_iter(&pem) {
        roots.add(certificate.unwrap()).unwrap();
    }
    let config = rustls::ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    use tokio_tungstenite::tungstenite::client::IntoClientRequest;
    let mut request = format!("wss://{address}/v1/ws")
        .into_client_request()
        .unwrap();
    let bearer = format!("Bearer {token}").parse().unwrap();
    request.headers_mut().insert("authorization", bearer);
    request
        .headers_mut()
        .insert("sec-websocket-protocol", "chat.v1".parse().unwrap());
    let connector = tokio_tungstenite::Connector::Rustls(std::sync::Arc::new(config));
    let (socket, _) =
        tokio_tungstenite::connect_async_tls_with_config(request, None, true, Some(connector))
            .await
            .unwrap();
    let mut socket = TlsSocket(socket);
    assert!(matches!(socket.next().await, ServerFrame::Welcome { .. }));
    // Once this is answered, the bus is listened to.
    let inbox = ClientFrame::Inbox {
        id: None,
        limit: None,
        cursor: None,
    };
    socket.send(&inbox).await;
    assert!(matches!(socket.next().await, ServerFrame::Inbox { .. }));
    socket
}

struct TlsSocket(
    tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>>,
);

impl TlsSocket {
    async fn send(&mut self, frame: &ClientFrame) {
        let text = serde_json::to_string(frame).unwrap();
        self.0.send(text.into()).await.unwrap();
    }

    async fn next(&mut self) -> ServerFrame {
        loop {
            let next = tokio::time::timeout(testkit::PATIENCE, self.0.next()).await;
            let next = next.expect("a frame in time").unwrap().unwrap();
            if let tokio_tungstenite::tungstenite::Message::Text(text) = next {
                return serde_json::from_str(&text).unwrap();
            }
        }
    }
}

/// A certificate is replaced while the server runs; one that does not fit its key is not used.
async fn renewed(servers: &Servers, listener: &Certificate, instance: &Instance) {
    let address = instance.url.trim_start_matches("http://");
    let before = serial(address);
    assert!(before.starts_with("serial="), "{before}");
    std::fs::copy(&servers.own.certificate, &listener.certificate).unwrap();
    until("the wrong pair is named", async || {
        instance
            .log()
            .contains("the new certificate cannot be used")
            .then_some(())
    })
    .await;
    assert_eq!(serial(address), before);
    servers.ca.issue("listener");
    until("the new certificate is presented", async || {
        let now = serial(address);
        (now.starts_with("serial=") && now != before).then_some(())
    })
    .await;
}

/// An instance that cannot verify a server, or is not known to it, says so and ends.
fn refused(servers: &Servers, settings: &[(&'static str, String)]) {
    let elsewhere = tempfile::tempdir().unwrap();
    let another = Ca::new(elsewhere.path()).file();
    let at_once = ("START_WAIT_MS", "0");
    let file = servers.shards_file();
    for (changes, expected) in [
        (
            [("STORE__TLS__CA_FILE", text(&another)), at_once],
            "invalid peer certificate",
        ),
        (
            [("STORE__TLS__CA_FILE", "/nowhere/ca.pem"), at_once],
            "nowhere",
        ),
        (
            [("NATS__TLS__CA_FILE", "/nowhere/ca.pem"), at_once],
            "nowhere",
        ),
        ([("TLS__KEY_FILE", text(&another)), at_once], "tls.key_file"),
        (
            [("TLS__CERTIFICATE_FILE", text(&file)), at_once],
            "has no certificate",
        ),
    ] {
        let refusal = refusal(&file, &borrowed(&with(settings, &changes)));
        assert!(refusal.contains(expected), "{expected}: {refusal}");
    }
    // Without TLS, and without a certificate of ours, the databases refuse.
    for without in [
        &[
            "STORE__TLS__REQUIRED",
            "STORE__TLS__CA_FILE",
            "STORE__TLS__CERTIFICATE_FILE",
            "STORE__TLS__KEY_FILE",
        ][..],
        &["STORE__TLS__CERTIFICATE_FILE", "STORE__TLS__KEY_FILE"],
    ] {
        let empty: Vec<_> = without
            .iter()
            .map(|name| {
                (
                    *name,
                    if *name == "STORE__TLS__REQUIRED" {
                        "false"
                    } else {
                        ""
                    },
                )
            })
            .collect();
        let refusal = refusal(&file, &borrowed(&with(&with(settings, &empty), &[at_once])));
        assert!(refusal.contains("shards"), "{refusal}");
    }
}

/// A listener that asks for certificates of clients.
async fn clients_with_certificates(servers: &Servers, settings: &[(&'static str, String)]) {
    let ca = servers.ca.file();
    let settings = with(settings, &[("TLS__CLIENT_CA_FILE", text(&ca))]);
    let instance = servers.instance(&settings).await;
    let url = format!("{}/livez", instance.url.replace("http:", "https:"));
    let http = |identity: Option<reqwest::Identity>| {
        let pem = std::fs::read(&ca).unwrap();
        let http = reqwest::Client::builder()
            .tls_certs_only([reqwest::Certificate::from_pem(&pem).unwrap()]);
        match identity {
            Some(identity) => http.identity(identity),
            None => http,
        }
        .build()
        .unwrap()
    };
    assert!(http(None).get(&url).send().await.is_err());
    let read = |path: &Path| std::fs::read(path).unwrap();
    let pem = [read(&servers.own.certificate), read(&servers.own.key)].concat();
    let identity = reqwest::Identity::from_pem(&pem).unwrap();
    assert_eq!(
        http(Some(identity))
            .get(&url)
            .send()
            .await
            .unwrap()
            .status(),
        200
    );
}
