//! The address of the server, and the credentials of a user.

use crate::ClientError;
use chat_wire::{ErrorBody, ErrorCode};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use serde::Serialize;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The source of tokens.
#[derive(Clone)]
pub enum TokenSource {
    /// A token that the caller has.
    Given(String),
    /// Minted here with the server's HS256 secret: for tests and load, where the secret is at hand.
    Secret(String),
    /// Requested from a server in embedded mode.
    Dev,
}

/// A server's address and the credentials of a user. A clone is cheap.
#[derive(Clone)]
pub struct Access {
    base: String,
    /// Other instances of the same service.
    others: Vec<String>,
    tokens: TokenSource,
    http: reqwest::Client,
    /// TLS of WebSockets, if the CA is not a public one.
    tls: Option<Arc<ClientConfig>>,
}

/// When a token expires, in seconds since 1970; `None` if it has no readable `exp`.
#[must_use]
pub fn expiry(token: &str) -> Option<u64> {
    // The server checks the token; here only the time to renew it matters.
    let claims: Result<Expiry, _> = jsonwebtoken::dangerous::insecure_decode_claims(token);
    claims.ok().map(|claims| claims.exp)
}

#[derive(serde::Deserialize)]
struct Expiry {
    exp: u64,
}

/// How long a token minted here lasts.
const LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

#[derive(Serialize)]
struct Claims {
    sub: String,
    iat: u64,
    exp: u64,
}

impl Access {
    /// `url` is `http://…` or `https://…`, without a path.
    #[must_use]
    pub fn new(url: &str, tokens: TokenSource) -> Self {
        // TLS needs one provider in a process; that it is there already is fine.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Self {
            base: url.trim_end_matches('/').to_owned(),
            others: Vec::new(),
            tokens,
            http: reqwest::Client::new(),
            tls: None,
        }
    }

    /// Trusts the CAs of a PEM text instead of the public ones.
    ///
    /// # Errors
    /// [`ClientError::Connection`], if it has no certificate.
    pub fn with_ca(mut self, pem: &[u8]) -> Result<Self, ClientError> {
        let wrong = |e: &dyn fmt::Display| ClientError::Connection(format!("the CA: {e}"));
        let mut roots = RootCertStore::empty();
        let mut of_http = Vec::new();
        for certificate in CertificateDer::pem_slice_iter(pem) {
            let certificate = certificate.map_err(|e| wrong(&e))?;
            let http = reqwest::Certificate::from_der(&certificate).map_err(|e| wrong(&e))?;
            of_http.push(http);
            roots.add(certificate).map_err(|e| wrong(&e))?;
        }
        if of_http.is_empty() {
            return Err(wrong(&"no certificate in PEM"));
        }
        let http = reqwest::Client::builder().tls_certs_only(of_http).build();
        self.http = http.map_err(|e| wrong(&e))?;
        let config = ClientConfig::builder().with_root_certificates(roots);
        self.tls = Some(Arc::new(config.with_no_client_auth()));
        Ok(self)
    }

    /// TLS of WebSockets, if the CA is not a public one.
    pub(crate) fn tls(&self) -> Option<Arc<ClientConfig>> {
        self.tls.clone()
    }

    /// Where to go when that instance is away.
    #[must_use]
    pub fn with_others<'a>(mut self, urls: impl IntoIterator<Item = &'a str>) -> Self {
        let urls = urls.into_iter().map(|url| url.trim_end_matches('/'));
        self.others = urls
            .filter(|url| *url != self.base)
            .map(str::to_owned)
            .collect();
        self
    }

    /// The URL of a path on the server.
    #[must_use]
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// The URL of the WebSocket.
    #[must_use]
    pub fn socket_url(&self) -> String {
        self.socket_url_of_attempt(0)
    }

    /// The URL of the WebSocket, of another instance at each attempt if there are several.
    #[must_use]
    pub fn socket_url_of_attempt(&self, attempt: usize) -> String {
        let instance = match attempt % (self.others.len() + 1) {
            0 => &self.base,
            other => &self.others[other - 1],
        };
        let url = format!("{instance}/v1/ws");
        match url.strip_prefix("https") {
            Some(rest) => format!("wss{rest}"),
            None => format!("ws{}", url.trim_start_matches("http")),
        }
    }

    /// The HTTP client, with its connections.
    #[must_use]
    pub fn http(&self) -> &reqwest::Client {
        &self.http
    }

    /// Whether there will be another token when one expires.
    #[must_use]
    pub fn renews(&self) -> bool {
        !matches!(self.tokens, TokenSource::Given(_))
    }

    /// A token of `user`.
    ///
    /// # Errors
    /// If the server is asked and does not give one.
    pub async fn token(&self, user: u64) -> Result<String, ClientError> {
        match &self.tokens {
            TokenSource::Given(token) => given(token, user),
            TokenSource::Secret(secret) => {
                mint(secret, user).map_err(|e| ClientError::Connection(e.to_string()))
            }
            TokenSource::Dev => {
                let request = self
                    .http
                    .post(self.url("/v1/dev/token"))
                    .json(&chat_wire::DevTokenRequest { user });
                let token: chat_wire::Token = crate::request::answer(request).await?;
                Ok(token.token)
            }
        }
    }
}

/// A given token, if it is one of `user`. One that cannot be read here is for the server to judge.
fn given(token: &str, user: u64) -> Result<String, ClientError> {
    let claims: Result<Owner, _> = jsonwebtoken::dangerous::insecure_decode_claims(token);
    let text = |sub: serde_json::Value| sub.as_str().map_or_else(|| sub.to_string(), str::to_owned);
    let owner = claims.ok().map(|claims| text(claims.sub));
    match owner {
        Some(owner) if owner != user.to_string() => {
            Err(ClientError::Refused(Box::new(ErrorBody {
                code: ErrorCode::Forbidden,
                message: format!("the token is of user {owner}, not of {user}"),
                retryable: false,
                retry_after_ms: None,
                key: None,
                dialog: None,
                id: None,
            })))
        }
        _ => Ok(token.to_owned()),
    }
}

#[derive(serde::Deserialize)]
struct Owner {
    sub: serde_json::Value,
}

fn mint(secret: &str, user: u64) -> Result<String, Box<dyn std::error::Error>> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let claims = Claims {
        sub: user.to_string(),
        iat: now.as_secs(),
        exp: (now + LIFETIME).as_secs(),
    };
    let key = jsonwebtoken::EncodingKey::from_secret(secret.as_bytes());
    Ok(jsonwebtoken::encode(
        &jsonwebtoken::Header::default(),
        &claims,
        &key,
    )?)
}
