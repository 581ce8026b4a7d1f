//! TLS of the listener. The certificate is read again when its file has changed, so that it can be
//! renewed without a restart.

use crate::config::ServerTls;
use anyhow::{Context, ensure};
use arc_swap::ArcSwap;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, ServerConfig};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio_rustls::TlsAcceptor;
use tokio_util::task::AbortOnDropHandle;

/// Between two looks at the files.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// TLS for a listener. A clone is one more reference.
#[derive(Clone)]
pub struct Tls {
    acceptor: TlsAcceptor,
    _reloads: Arc<AbortOnDropHandle<()>>,
}

impl Tls {
    /// By the settings; `None` without a certificate. The files are looked at on `runtime`.
    ///
    /// # Errors
    /// One line that names the file and what is wrong with it.
    pub fn new(settings: &ServerTls, runtime: &Handle) -> anyhow::Result<Option<Self>> {
        let (Some(certificate), Some(key)) = (&settings.certificate_file, &settings.key_file)
        else {
            return Ok(None);
        };
        let files = Files {
            certificate: certificate.clone(),
            key: key.clone(),
        };
        let seen = files.read()?;
        let current = Arc::new(Current(ArcSwap::from(files.parse(&seen)?)));
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .context("tls")?;
        let config = match &settings.client_ca_file {
            None => config.with_no_client_auth(),
            Some(file) => config.with_client_cert_verifier(
                WebPkiClientVerifier::builder_with_provider(
                    Arc::new(roots(file).context("tls.client_ca_file")?),
                    Arc::new(ring::default_provider()),
                )
                .build()
                .context("tls.client_ca_file")?,
            ),
        };
        let mut config = config.with_cert_resolver(current.clone());
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let reloads = runtime.spawn(reload(files, seen, current));
        Ok(Some(Self {
            acceptor: TlsAcceptor::from(Arc::new(config)),
            _reloads: Arc::new(AbortOnDropHandle::new(reloads)),
        }))
    }

    /// Makes TLS of a connection.
    pub fn acceptor(&self) -> &TlsAcceptor {
        &self.acceptor
    }
}

/// The CAs of a file.
fn roots(file: &Path) -> anyhow::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    let name = || file.display().to_string();
    for certificate in CertificateDer::pem_file_iter(file).with_context(name)? {
        roots
            .add(certificate.with_context(name)?)
            .with_context(name)?;
    }
    ensure!(!roots.is_empty(), "{} has no certificate", name());
    Ok(roots)
}

/// The certificate that is presented now.
#[derive(Debug)]
struct Current(ArcSwap<CertifiedKey>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

struct Files {
    certificate: PathBuf,
    key: PathBuf,
}

/// The content of both files.
type Content = (Vec<u8>, Vec<u8>);

impl Files {
    fn read(&self) -> anyhow::Result<Content> {
        let read = |path: &Path| std::fs::read(path).with_context(|| path.display().to_string());
        Ok((
            read(&self.certificate).context("tls.certificate_file")?,
            read(&self.key).context("tls.key_file")?,
        ))
    }

    fn parse(&self, (certificate, key): &Content) -> anyhow::Result<Arc<CertifiedKey>> {
        let certificate_name = || format!("tls.certificate_file {}", self.certificate.display());
        let key_name = || format!("tls.key_file {}", self.key.display());
        let chain: Vec<_> = CertificateDer::pem_slice_iter(certificate)
            .collect::<Result<_, _>>()
            .with_context(certificate_name)?;
        ensure!(
            !chain.is_empty(),
            "{} has no certificate",
            certificate_name()
        );
        let key = PrivateKeyDer::from_pem_slice(key).with_context(key_name)?;
        // Also compares the two.
        let both = CertifiedKey::from_der(chain, key, &ring::default_provider());
        Ok(Arc::new(both.with_context(key_name)?))
    }
}

/// Presents a new certificate when the files have changed and belong together.
async fn reload(files: Files, mut seen: Content, current: Arc<Current>) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        // Small local files, once in a while.
        let Ok(content) = files.read() else { continue };
        if content == seen {
            continue;
        }
        match files.parse(&content) {
            Ok(certificate) => {
                current.0.store(certificate);
                tracing::info!("the new certificate is in use");
            }
            Err(e) => tracing::warn!(
                error = format!("{e:#}"),
                "the new certificate cannot be used; the one before stays"
            ),
        }
        seen = content;
    }
}
