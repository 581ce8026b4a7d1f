//! Tokens: JWTs of one pinned algorithm, in the `Authorization` header or, from a browser, as a
//! subprotocol.

use crate::cluster::Revocations;
use crate::config;
use crate::domain::dialog::UserId;
use crate::error::ApiError;
use crate::session::{Authenticate, Identity};
use actix_web::HttpRequest;
use actix_web::http::header::{AUTHORIZATION, SEC_WEBSOCKET_PROTOCOL};
use anyhow::{Context, bail};
use chat_wire::ErrorCode;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, JwkSet, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The secret of `.env.sample`: public, and refused outside a demonstration.
pub const SAMPLE_SECRET: &str = "sample-secret-for-the-demonstration-only";

/// The shortest secret, in bytes: as long as the hash of HS256.
const MIN_SECRET_BYTES: usize = 32;

/// Checks tokens, and mints them where the key allows it.
pub struct Tokens {
    keys: Keys,
    validation: Validation,
    minting: Option<EncodingKey>,
    settings: config::Auth,
}

enum Keys {
    One(DecodingKey),
    /// Chosen by the `kid` of the token.
    Set(Vec<(Option<String>, DecodingKey)>),
}

/// The claims of a token that this server mints.
#[derive(Serialize)]
struct Minted<'a> {
    sub: String,
    iat: u64,
    exp: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    aud: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    iss: Option<&'a str>,
}

/// The claims of a token that are used here. [`Validation`] has checked their values, and names the
/// one that is missing or malformed.
#[derive(Deserialize)]
struct Claims {
    sub: Option<Value>,
    exp: Option<Value>,
    iat: Option<Value>,
    aud: Option<IgnoredAny>,
}

impl Claims {
    /// A string by RFC 7519; a number is accepted too.
    fn user(&self) -> Option<UserId> {
        let sub = self.sub.as_ref()?;
        let of_text = sub.as_str().and_then(|text| text.parse().ok());
        of_text.or_else(|| UserId::new(sub.as_u64()?).ok())
    }
}

/// Seconds since 1970. RFC 7519 allows fractions.
fn seconds(time: Option<&Value>) -> Option<u64> {
    let time = time?;
    // The conversion ends at the bounds of u64.
    time.as_u64()
        .or_else(|| time.as_f64().map(|time| time as u64))
}

impl Tokens {
    /// By the settings; `demo` allows the sample secret.
    ///
    /// # Errors
    /// One line that says what is missing or too weak.
    pub fn new(settings: &config::Auth, demo: bool) -> anyhow::Result<Self> {
        let algorithm = match settings.algorithm.as_str() {
            "HS256" => Algorithm::HS256,
            "EdDSA" => Algorithm::EdDSA,
            "ES256" => Algorithm::ES256,
            "RS256" => Algorithm::RS256,
            other => bail!("auth.algorithm '{other}' is none of HS256, EdDSA, ES256, RS256"),
        };
        let (keys, minting) = if algorithm == Algorithm::HS256 {
            let secret = shared_secret(settings, demo)?.as_bytes();
            let minting = EncodingKey::from_secret(secret);
            (Keys::One(DecodingKey::from_secret(secret)), Some(minting))
        } else {
            (public_keys(settings, algorithm)?, None)
        };
        Ok(Self {
            keys,
            validation: validation(settings, algorithm),
            minting,
            settings: settings.clone(),
        })
    }

    /// A token for `user` that lasts for `lifetime`.
    ///
    /// # Errors
    /// If only a public key is configured.
    pub fn mint(&self, user: UserId, lifetime: Duration) -> anyhow::Result<String> {
        let key = self
            .minting
            .as_ref()
            .context("only the public key is set here: tokens are signed with the private key")?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let claims = Minted {
            sub: user.to_string(),
            iat: now.as_secs(),
            exp: now.as_secs().saturating_add(lifetime.as_secs()),
            aud: self.settings.audience.as_deref(),
            iss: self.settings.issuer.as_deref(),
        };
        Ok(jsonwebtoken::encode(
            &Header::new(Algorithm::HS256),
            &claims,
            key,
        )?)
    }

    fn key(&self, header: &Header) -> Option<&DecodingKey> {
        match (&self.keys, &header.kid) {
            (Keys::One(key), _) => Some(key),
            (Keys::Set(keys), Some(kid)) => {
                let named = keys.iter().find(|(id, _)| id.as_ref() == Some(kid));
                named.map(|(_, key)| key)
            }
            (Keys::Set(keys), None) => match &keys[..] {
                [(_, only)] => Some(only),
                [] | [_, _, ..] => None,
            },
        }
    }
}

/// The secret of HS256, if it is strong enough.
fn shared_secret(settings: &config::Auth, demo: bool) -> anyhow::Result<&str> {
    let secret = settings.secret.as_ref().map(config::Secret::expose);
    let secret = secret.filter(|secret| !secret.is_empty()).context(
        "auth.secret is not set; set CHAT__AUTH__SECRET to at least 32 random bytes, e.g. from: openssl rand -base64 48",
    )?;
    if secret == SAMPLE_SECRET && !demo {
        bail!(
            "auth.secret is the sample secret, which is public; set CHAT__AUTH__SECRET to a random one"
        );
    }
    if secret.len() < MIN_SECRET_BYTES {
        bail!(
            "auth.secret has {} bytes; at least {MIN_SECRET_BYTES} are needed",
            secret.len()
        );
    }
    Ok(secret)
}

/// The public key, or the key set, of `auth.key_file`.
fn public_keys(settings: &config::Auth, algorithm: Algorithm) -> anyhow::Result<Keys> {
    let path = settings.key_file.as_ref();
    let path =
        path.with_context(|| format!("auth.key_file is needed for {}", settings.algorithm))?;
    let file = path.display();
    let text = std::fs::read(path).with_context(|| format!("auth.key_file {file}"))?;
    let invalid = || format!("auth.key_file {file} holds no {} key", settings.algorithm);
    if path.extension().is_some_and(|end| end == "json") {
        let set: JwkSet = serde_json::from_slice(&text).with_context(invalid)?;
        let keys: Vec<_> = set
            .keys
            .iter()
            .filter(|key| is_for(key, &settings.algorithm))
            .filter_map(|key| {
                let decoding = DecodingKey::from_jwk(key).ok()?;
                Some((key.common.key_id.clone(), decoding))
            })
            .collect();
        if keys.is_empty() {
            bail!(invalid());
        }
        return Ok(Keys::Set(keys));
    }
    let key = if algorithm == Algorithm::EdDSA {
        DecodingKey::from_ed_pem(&text)
    } else if algorithm == Algorithm::ES256 {
        DecodingKey::from_ec_pem(&text)
    } else {
        DecodingKey::from_rsa_pem(&text)
    };
    Ok(Keys::One(key.with_context(invalid)?))
}

/// Whether a key of a set verifies signatures of this algorithm: by its type, and by its use and
/// algorithm if it has them.
fn is_for(key: &Jwk, algorithm: &str) -> bool {
    let signs = matches!(
        key.common.public_key_use,
        None | Some(PublicKeyUse::Signature)
    );
    let named = key.common.key_algorithm.map(serde_json::to_value);
    let named = named.is_none_or(|named| named.is_ok_and(|named| named == algorithm));
    #[allow(clippy::wildcard_enum_match_arm)] // the enum is non-exhaustive
    let fits = match &key.algorithm {
        AlgorithmParameters::OctetKeyPair(key) => {
            algorithm == "EdDSA" && key.curve == EllipticCurve::Ed25519
        }
        AlgorithmParameters::EllipticCurve(key) => {
            algorithm == "ES256" && key.curve == EllipticCurve::P256
        }
        AlgorithmParameters::RSA(_) => algorithm == "RS256",
        _ => false,
    };
    signs && named && fits
}

/// The claims that a token must have.
fn validation(settings: &config::Auth, algorithm: Algorithm) -> Validation {
    let mut validation = Validation::new(algorithm);
    validation.leeway = settings.leeway_seconds;
    // `sub` is checked here, because a number is no `sub` for the crate.
    validation.set_required_spec_claims(&["exp"]);
    validation.validate_nbf = true;
    match &settings.audience {
        Some(audience) => {
            validation.set_audience(&[audience]);
            validation.required_spec_claims.insert("aud".into());
        }
        None => validation.validate_aud = false,
    }
    if let Some(issuer) = &settings.issuer {
        validation.set_issuer(&[issuer]);
        validation.required_spec_claims.insert("iss".into());
    }
    validation
}

/// Checks tokens, and whether they were revoked.
pub struct Admission {
    /// Checks signatures and claims.
    pub tokens: Arc<Tokens>,
    /// What is revoked.
    pub revocations: Revocations,
}

impl Authenticate for Admission {
    fn authenticate(&self, token: &str) -> Result<Identity, ApiError> {
        let identity = self.tokens.authenticate(token)?;
        if self.is_revoked(&identity) {
            return Err(ApiError::new(
                ErrorCode::Unauthenticated,
                "the token was revoked (iat)",
            ));
        }
        Ok(identity)
    }

    fn is_revoked(&self, identity: &Identity) -> bool {
        let before = self.revocations.issued_before(identity.user);
        before.is_some_and(|before| identity.issued < before)
    }
}

impl Tokens {
    /// The identity of a token, by its signature and its claims.
    ///
    /// # Errors
    /// A refusal with `unauthenticated`, and the reason.
    pub fn authenticate(&self, token: &str) -> Result<Identity, ApiError> {
        let refuse = |message: String| ApiError::new(ErrorCode::Unauthenticated, message);
        let header = jsonwebtoken::decode_header(token).map_err(|e| refuse(reason(&e)))?;
        if let Some(extension) = header.crit.iter().flatten().next() {
            return Err(refuse(format!(
                "the token demands the extension '{extension}' in crit, which is not known here"
            )));
        }
        let key = self
            .key(&header)
            .ok_or_else(|| refuse("the kid of the token names no key that is known here".into()))?;
        let claims = jsonwebtoken::decode::<Claims>(token, key, &self.validation)
            .map_err(|e| refuse(reason(&e)))?
            .claims;
        if claims.aud.is_some() && self.settings.audience.is_none() {
            return Err(refuse(
                "the token has an aud, but auth.audience is not set here".into(),
            ));
        }
        if claims.sub.is_none() {
            return Err(refuse("the token lacks the claim sub".into()));
        }
        let user = claims.user();
        let user = user.ok_or_else(|| refuse("the sub of the token is not a user id".into()))?;
        let expires = seconds(claims.exp.as_ref());
        let expires = expires.ok_or_else(|| refuse("the exp of the token is no time".into()))?;
        let leeway = self.settings.leeway_seconds;
        Ok(Identity {
            user,
            expires: expires.saturating_add(leeway),
            issued: seconds(claims.iat.as_ref()).unwrap_or(0),
        })
    }
}

/// The reason to refuse a token, with the claim that it is about.
fn reason(error: &jsonwebtoken::errors::Error) -> String {
    use jsonwebtoken::errors::ErrorKind;
    #[allow(clippy::wildcard_enum_match_arm)] // the rest has one message
    match error.kind() {
        ErrorKind::ExpiredSignature => "the token has expired (exp)".into(),
        ErrorKind::ImmatureSignature => "the token is not valid yet (nbf)".into(),
        ErrorKind::InvalidAlgorithm | ErrorKind::InvalidAlgorithmName => {
            "the token is signed with another algorithm (alg)".into()
        }
        ErrorKind::InvalidSignature => "the signature of the token is wrong".into(),
        ErrorKind::InvalidAudience => "the token is for another audience (aud)".into(),
        ErrorKind::InvalidIssuer => "the token is from another issuer (iss)".into(),
        ErrorKind::MissingRequiredClaim(claim) => format!("the token lacks the claim {claim}"),
        ErrorKind::InvalidClaimFormat(claim) => {
            format!("the claim {claim} of the token is malformed")
        }
        ErrorKind::Json(_) => "the claims of the token are malformed".into(),
        _ => "this is not a token".into(),
    }
}

/// The token of a request: from its header, or from the subprotocols a browser offers. Never from
/// the URL.
#[must_use]
pub fn token(request: &HttpRequest) -> Option<&str> {
    let header = request
        .headers()
        .get(AUTHORIZATION)
        .and_then(|value| value.to_str().ok());
    let bearer = header
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    bearer.map(|(_, token)| token.trim()).or_else(|| {
        request
            .headers()
            .get_all(SEC_WEBSOCKET_PROTOCOL)
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .find_map(|offered| {
                offered
                    .trim()
                    .strip_prefix(chat_wire::BEARER_PROTOCOL_PREFIX)
            })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(secret: &str) -> config::Auth {
        config::Settings::from_toml(&format!("[auth]\nsecret = \"{secret}\""))
            .unwrap()
            .auth
    }

    const GOOD: &str = "0123456789abcdef0123456789abcdef";

    #[test]
    fn a_weak_missing_or_sample_secret_is_refused() {
        for (secret, expected) in [
            ("", "is not set"),
            ("short", "has 5 bytes"),
            (SAMPLE_SECRET, "the sample secret"),
        ] {
            let refusal = Tokens::new(&settings(secret), false)
                .err()
                .unwrap()
                .to_string();
            assert!(refusal.contains(expected), "{refusal}");
        }
        assert!(Tokens::new(&settings(SAMPLE_SECRET), true).is_ok());
        assert!(include_str!("../../../.env.sample").contains(SAMPLE_SECRET));
    }

    #[test]
    fn a_token_is_worth_what_it_says_and_not_longer() {
        let tokens = Tokens::new(&settings(GOOD), false).unwrap();
        let user = UserId::new(7).unwrap();
        let token = tokens.mint(user, Duration::from_secs(60)).unwrap();
        assert_eq!(tokens.authenticate(&token).unwrap().user, user);
        let old = jsonwebtoken::encode(
            &Header::new(Algorithm::HS256),
            &serde_json::json!({"sub": "7", "exp": 1_000_000_000}),
            &EncodingKey::from_secret(GOOD.as_bytes()),
        );
        assert!(
            tokens
                .authenticate(&old.unwrap())
                .unwrap_err()
                .message
                .contains("expired")
        );
    }

    #[test]
    fn another_algorithm_none_at_all_or_a_missing_claim_is_refused() {
        let tokens = Tokens::new(&settings(GOOD), false).unwrap();
        let key = EncodingKey::from_secret(GOOD.as_bytes());
        let far = 4_000_000_000u64;
        let hs512 = jsonwebtoken::encode(
            &Header::new(Algorithm::HS512),
            &serde_json::json!({"sub": "7", "exp": far}),
            &key,
        );
        let no_exp = jsonwebtoken::encode(
            &Header::new(Algorithm::HS256),
            &serde_json::json!({"sub": "7"}),
            &key,
        );
        let bad_sub = jsonwebtoken::encode(
            &Header::new(Algorithm::HS256),
            &serde_json::json!({"sub": "0", "exp": far}),
            &key,
        );
        // {"alg":"none","typ":"JWT"} . {"sub":"7","exp":4000000000} . (nothing)
        let none = "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.eyJzdWIiOiI3IiwiZXhwIjo0MDAwMDAwMDAwfQ.";
        for (token, expected) in [
            (hs512.unwrap().as_str(), "another algorithm"),
            (no_exp.unwrap().as_str(), "lacks the claim exp"),
            (bad_sub.unwrap().as_str(), "not a user id"),
            (none, ""),
            ("", ""),
            ("a.b.c", ""),
        ] {
            let refusal = tokens.authenticate(token).unwrap_err();
            assert_eq!(refusal.code, ErrorCode::Unauthenticated);
            assert!(refusal.message.contains(expected), "{refusal}");
        }
    }

    /// A token with these claims, by HS256.
    fn signed(claims: &serde_json::Value) -> String {
        let key = EncodingKey::from_secret(GOOD.as_bytes());
        jsonwebtoken::encode(&Header::new(Algorithm::HS256), claims, &key).unwrap()
    }

    fn seconds_from_now(seconds: i64) -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        now.as_secs().saturating_add_signed(seconds)
    }

    #[test]
    fn claims_may_have_every_form_of_rfc_7519() {
        use serde_json::json;
        let mut with_audience = settings(GOOD);
        with_audience.audience = Some("chat".into());
        let with_audience = Tokens::new(&with_audience, false).unwrap();
        let tokens = Tokens::new(&settings(GOOD), false).unwrap();
        let exp = seconds_from_now(60);
        for claims in [
            json!({"sub": "7", "exp": exp}),
            json!({"sub": 7, "exp": exp}),
            json!({"sub": "7", "exp": exp as f64 + 0.5}),
            json!({"sub": "7", "exp": exp, "nbf": seconds_from_now(2), "iat": 1.5, "jti": "x"}),
            json!({"sub": "7", "exp": exp, "nbf": seconds_from_now(2) as f64 + 0.25}),
            json!({"sub": "7", "exp": seconds_from_now(-2)}),
            json!({"sub": "7", "exp": u64::MAX}),
            json!({"sub": "7", "exp": 1e300}),
        ] {
            let identity = tokens.authenticate(&signed(&claims));
            if claims["exp"] == json!(1e300) {
                // No time at all, but no panic either.
                continue;
            }
            assert_eq!(identity.map(|i| i.user.get()), Ok(7), "{claims}");
        }
        for aud in [json!("chat"), json!(["other", "chat"])] {
            let token = signed(&json!({"sub": "7", "exp": exp, "aud": aud}));
            assert!(with_audience.authenticate(&token).is_ok(), "{aud}");
        }
    }

    #[test]
    fn a_refusal_names_the_claim() {
        use serde_json::json;
        let mut strict = settings(GOOD);
        strict.issuer = Some("us".into());
        let strict = Tokens::new(&strict, false).unwrap();
        let tokens = Tokens::new(&settings(GOOD), false).unwrap();
        let exp = seconds_from_now(60);
        for (tokens, claims, expected) in [
            (
                &tokens,
                json!({"sub": "7", "exp": seconds_from_now(-10)}),
                "(exp)",
            ),
            (
                &tokens,
                json!({"sub": "7", "exp": exp, "nbf": exp}),
                "(nbf)",
            ),
            (&tokens, json!({"sub": "7", "exp": "soon"}), "exp"),
            (&tokens, json!({"exp": exp}), "claim sub"),
            (
                &tokens,
                json!({"sub": "7", "exp": exp, "aud": "other"}),
                "has an aud",
            ),
            (&strict, json!({"sub": "7", "exp": exp}), "claim iss"),
            (
                &strict,
                json!({"sub": "7", "exp": exp, "iss": "them"}),
                "(iss)",
            ),
        ] {
            let refusal = tokens.authenticate(&signed(&claims)).unwrap_err();
            assert!(refusal.message.contains(expected), "{claims}: {refusal}");
        }
        let mut header = Header::new(Algorithm::HS256);
        header.crit = Some(vec!["b64".into()]);
        let key = EncodingKey::from_secret(GOOD.as_bytes());
        let token = jsonwebtoken::encode(&header, &json!({"sub": "7", "exp": exp}), &key).unwrap();
        let refusal = tokens.authenticate(&token).unwrap_err();
        assert!(refusal.message.contains("'b64' in crit"), "{refusal}");
    }

    #[test]
    fn audience_and_issuer_are_demanded_once_configured() {
        let mut strict = settings(GOOD);
        strict.audience = Some("chat".into());
        strict.issuer = Some("us".into());
        let user = UserId::new(7).unwrap();
        let plain = Tokens::new(&settings(GOOD), false)
            .unwrap()
            .mint(user, Duration::from_secs(60))
            .unwrap();
        let strict = Tokens::new(&strict, false).unwrap();
        assert!(strict.authenticate(&plain).is_err());
        assert!(
            strict
                .authenticate(&strict.mint(user, Duration::from_secs(60)).unwrap())
                .is_ok()
        );
    }
}
