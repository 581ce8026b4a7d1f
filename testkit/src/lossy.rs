//! A proxy in front of a NATS server that loses chosen messages: the bus promises nothing.
//!
//! With TLS, a connection begins in plain text, with the greeting of the server; both sides of the
//! proxy make TLS of it then.

use crate::ca::Ca;
use crate::ca::Certificate;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Whether a message of this subject with this payload is lost on its way to the client.
pub type Loses = Arc<dyn Fn(&str, &[u8]) -> bool + Send + Sync>;

/// The certificates of the proxy.
#[derive(Clone)]
pub struct Tls {
    to_client: TlsAcceptor,
    to_server: TlsConnector,
    name: ServerName<'static>,
}

impl Tls {
    /// With a certificate of the CA for both sides.
    pub fn new(ca: &Ca, own: &Certificate) -> Self {
        let chain = || -> Vec<CertificateDer<'static>> {
            let chain = CertificateDer::pem_file_iter(&own.certificate).unwrap();
            chain.map(Result::unwrap).collect()
        };
        let key = || PrivateKeyDer::from_pem_file(&own.key).unwrap();
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(ca.file()).unwrap() {
            roots.add(certificate.unwrap()).unwrap();
        }
        let server = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(chain(), key());
        let client = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_client_auth_cert(chain(), key());
        Self {
            to_client: TlsAcceptor::from(Arc::new(server.unwrap())),
            to_server: TlsConnector::from(Arc::new(client.unwrap())),
            name: ServerName::try_from("localhost").unwrap(),
        }
    }
}

/// The proxy; it ends with the runtime.
#[derive(Clone)]
pub struct Lossy {
    pub url: String,
    lost: Arc<AtomicU64>,
    passed: Arc<AtomicU64>,
}

impl Lossy {
    /// In front of `nats://host:port`, with TLS on both sides if there are certificates.
    pub async fn to(nats: &str, loses: Loses, tls: Option<Tls>) -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let lossy = Self {
            url: format!("nats://{}", listener.local_addr()?),
            lost: Arc::default(),
            passed: Arc::default(),
        };
        let (counts, target) = (lossy.clone(), nats.trim_start_matches("nats://").to_owned());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (counts, target, loses) = (counts.clone(), target.clone(), loses.clone());
                let tls = tls.clone();
                // A connection that breaks ends its carrier, and nothing else is needed.
                tokio::spawn(async move { counts.open(client, &target, loses, tls).await.err() });
            }
        });
        Ok(lossy)
    }

    /// How many messages were lost, and how many were not.
    pub fn counts(&self) -> (u64, u64) {
        let [lost, passed] = [&self.lost, &self.passed].map(|count| count.load(Ordering::Relaxed));
        (lost, passed)
    }

    async fn open(
        &self,
        mut client: TcpStream,
        target: &str,
        loses: Loses,
        tls: Option<Tls>,
    ) -> std::io::Result<()> {
        let mut server = TcpStream::connect(target).await?;
        let Some(tls) = tls else {
            return self.carry(client, server, loses).await;
        };
        let mut greeting = Vec::new();
        while !greeting.ends_with(b"\r\n") {
            greeting.push(server.read_u8().await?);
        }
        client.write_all(&greeting).await?;
        let server = tls.to_server.connect(tls.name, server).await?;
        let client = tls.to_client.accept(client).await?;
        self.carry(client, server, loses).await
    }

    async fn carry(
        &self,
        client: impl AsyncRead + AsyncWrite,
        server: impl AsyncRead + AsyncWrite,
        loses: Loses,
    ) -> std::io::Result<()> {
        let (mut client_in, mut client_out) = tokio::io::split(client);
        let (server_in, mut server_out) = tokio::io::split(server);
        let up = async move {
            tokio::io::copy(&mut client_in, &mut server_out).await?;
            Ok(())
        };
        let down = async move {
            let mut server_in = BufReader::new(server_in);
            let mut line = Vec::new();
            loop {
                line.clear();
                if server_in.read_until(b'\n', &mut line).await? == 0 {
                    return Ok(());
                }
                let text = String::from_utf8_lossy(&line).into_owned();
                let words: Vec<&str> = text.split_whitespace().collect();
                // MSG subject sid [reply] bytes, and HMSG, whose payload begins with headers.
                let Some(&"MSG" | &"HMSG") = words.first() else {
                    client_out.write_all(&line).await?;
                    continue;
                };
                let bytes = words.last().and_then(|bytes| bytes.parse::<usize>().ok());
                let bytes = bytes.ok_or_else(|| std::io::Error::other("not NATS"))?;
                let mut payload = vec![0; bytes + 2];
                server_in.read_exact(&mut payload).await?;
                if loses(words[1], &payload[..bytes]) {
                    self.lost.fetch_add(1, Ordering::Relaxed);
                } else {
                    self.passed.fetch_add(1, Ordering::Relaxed);
                    client_out.write_all(&line).await?;
                    client_out.write_all(&payload).await?;
                }
            }
        };
        tokio::select! {
            ended = up => ended,
            ended = down => ended,
        }
    }
}
