//! Origins of pages: `scheme://host[:port]`, in one form.

use serde::{Deserialize, Deserializer};
use url::Url;

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

/// A list, or in an environment variable a text with commas.
pub(super) fn list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Origins {
        List(Vec<String>),
        Text(String),
    }
    let origins = match Origins::deserialize(deserializer)? {
        Origins::List(list) => list,
        Origins::Text(text) => text.split(',').map(str::to_owned).collect(),
    };
    let given = origins.iter().filter(|origin| !origin.trim().is_empty());
    given
        .map(|origin| {
            normalized(origin).ok_or_else(|| {
                serde::de::Error::custom(format!(
                    "auth.allowed_origins has '{}': an origin is scheme://host[:port], such as https://chat.example.org",
                    origin.trim()
                ))
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::Settings;
    use super::normalized;

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
