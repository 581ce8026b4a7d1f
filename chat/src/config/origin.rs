//! Origins of pages: `scheme://host[:port]`, in one form.

use serde::{Deserialize, Deserializer};
use url::{Host, Url};

/// The origin in the form in which browsers send it: lower case, without a default port, slash or
/// blanks. `None` if the text is no origin of `http` or `https`.
#[must_use]
pub fn normalized(text: &str) -> Option<String> {
    let url = Url::parse(text.trim()).ok()?;
    let only_origin = url.path() == "/"
        && url.query().is_none()
        && url.fragment().is_none()
        && url.username().is_empty()
        && url.password().is_none();
    let web = matches!(url.scheme(), "http" | "https");
    (web && only_origin).then(|| url.origin().ascii_serialization())
}

/// A list, or in an environment variable a text with commas; without what is empty.
fn texts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Texts {
        List(Vec<String>),
        Text(String),
    }
    let texts = match Texts::deserialize(deserializer)? {
        Texts::List(list) => list,
        Texts::Text(text) => text.split(',').map(str::to_owned).collect(),
    };
    let trimmed = texts.iter().map(|text| text.trim().to_owned());
    Ok(trimmed.filter(|text| !text.is_empty()).collect())
}

/// Host names, in lower case, without a port.
pub(super) fn hosts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let hosts = texts(deserializer)?;
    let only_host = |text: &String| {
        let host = host_of(text)?.to_string();
        let is_name = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        (host == text.to_lowercase() && host.chars().all(is_name)).then_some(host)
    };
    hosts
        .iter()
        .map(|text| {
            only_host(text).ok_or_else(|| {
                serde::de::Error::custom(format!(
                    "allowed_hosts has '{text}': a host is a name without scheme and port, such as chat.example.org"
                ))
            })
        })
        .collect()
}

/// The host of `host[:port]`.
fn host_of(authority: &str) -> Option<Host> {
    let url = Url::parse(&format!("http://{authority}")).ok()?;
    let only_host = url.path() == "/" && url.query().is_none() && url.username().is_empty();
    only_host.then(|| url.host().map(|host| host.to_owned()))?
}

/// Whether a `Host` header names this service: an address, `localhost`, or one of `allowed`. A page
/// of another site that has its own name point here (DNS rebinding) sends its own name.
#[must_use]
pub fn is_allowed_host(header: &str, allowed: &[String]) -> bool {
    match host_of(header) {
        Some(Host::Ipv4(_) | Host::Ipv6(_)) => true,
        Some(Host::Domain(name)) => {
            name == "localhost" || name.ends_with(".localhost") || allowed.contains(&name)
        }
        None => false,
    }
}

/// Origins, each in one form.
pub(super) fn list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let origins = texts(deserializer)?;
    origins
        .iter()
        .map(|origin| {
            normalized(origin).ok_or_else(|| {
                serde::de::Error::custom(format!(
                    "auth.allowed_origins has '{origin}': an origin is scheme://host[:port], such as https://chat.example.org"
                ))
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::Settings;
    use super::{is_allowed_host, normalized};

    #[test]
    fn an_origin_has_one_form() {
        for (text, expected) in [
            ("https://a.example", Some("https://a.example")),
            (" https://A.Example/ ", Some("https://a.example")),
            ("https://a.example:443", Some("https://a.example")),
            ("http://a.example:80/", Some("http://a.example")),
            ("http://a.example:8080", Some("http://a.example:8080")),
            (
                "https://b\u{fc}cher.example",
                Some("https://xn--bcher-kva.example"),
            ),
            ("a.example", None),
            ("https://a.example/chat", None),
            ("https://user@a.example", None),
            ("ftp://a.example", None),
            ("*", None),
            ("null", None),
            ("", None),
        ] {
            assert_eq!(normalized(text).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn a_host_is_an_address_localhost_or_one_that_is_allowed() {
        let settings = |value: &str| Settings::from_toml(&format!("allowed_hosts = {value}"));
        let allowed = settings(r#"["Chat.example.org"]"#).unwrap().allowed_hosts;
        for (header, expected) in [
            ("127.0.0.1:8080", true),
            ("203.0.113.5", true),
            ("[::1]:8080", true),
            ("localhost:8080", true),
            ("LOCALHOST", true),
            ("app.localhost", true),
            ("chat.example.org", true),
            ("CHAT.example.org:443", true),
            ("evil.example", false),
            ("chat.example.org.evil.example", false),
            ("localhost.evil.example", false),
            ("chat.example.org@evil.example", false),
            ("", false),
            ("a b", false),
        ] {
            assert_eq!(is_allowed_host(header, &allowed), expected, "{header}");
        }
        for wrong in ["https://a.example", "a.example:443", "a.example/x", "*"] {
            let refusal = settings(&format!(r#"["{wrong}"]"#))
                .unwrap_err()
                .to_string();
            assert!(
                refusal.contains(&format!("allowed_hosts has '{wrong}'")),
                "{refusal}"
            );
        }
    }

    #[test]
    fn a_list_and_a_text_with_commas_are_read_and_what_is_no_origin_is_refused() {
        let origins = |value: &str| {
            let settings = Settings::from_toml(&format!("[auth]\nallowed_origins = {value}"));
            settings.map(|settings| settings.auth.allowed_origins)
        };
        let both = ["https://a.example", "https://b.example:8443"];
        let list = r#"["https://a.example/", "https://B.example:8443"]"#;
        let text = r#""https://a.example:443, https://b.example:8443 ,""#;
        assert_eq!(origins(list).unwrap(), both);
        assert_eq!(origins(text).unwrap(), both);
        let refusal = origins(r#"["a.example"]"#).unwrap_err().to_string();
        assert!(
            refusal.contains("allowed_origins has 'a.example'"),
            "{refusal}"
        );
    }
}
