//! TLS: of the listener for clients, and towards databases and NATS.

use serde::Deserialize;
use std::path::PathBuf;

/// TLS of the listener for clients: off without a certificate.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerTls {
    /// PEM: the certificate of the server, and those between it and its CA. It is read again when
    /// it has changed.
    pub certificate_file: Option<PathBuf>,
    /// PEM: its private key.
    pub key_file: Option<PathBuf>,
    /// PEM: the CAs of clients; if set, each client must present a certificate of one.
    pub client_ca_file: Option<PathBuf>,
}

/// TLS towards a server.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientTls {
    /// Connections without TLS are refused.
    pub required: bool,
    /// PEM: the CAs of the server; the public ones if it is not set.
    pub ca_file: Option<PathBuf>,
    /// PEM: our certificate, for servers that ask for one.
    pub certificate_file: Option<PathBuf>,
    /// PEM: its private key.
    pub key_file: Option<PathBuf>,
}

impl ServerTls {
    pub(super) fn files(&mut self) -> [&mut Option<PathBuf>; 3] {
        [
            &mut self.certificate_file,
            &mut self.key_file,
            &mut self.client_ca_file,
        ]
    }

    /// A line for each setting that lacks another one.
    pub(super) fn faults(&self) -> Vec<String> {
        let pair = pair("tls", &self.certificate_file, &self.key_file);
        let alone = self.client_ca_file.is_some() && self.certificate_file.is_none();
        let alone = alone
            .then(|| "tls.client_ca_file is set: tls.certificate_file is needed, too".to_owned());
        let files = [
            ("tls.certificate_file", &self.certificate_file),
            ("tls.key_file", &self.key_file),
            ("tls.client_ca_file", &self.client_ca_file),
        ];
        let unreadable = files
            .into_iter()
            .filter_map(|(name, file)| unreadable(name, file));
        pair.into_iter().chain(alone).chain(unreadable).collect()
    }
}

impl ClientTls {
    pub(super) fn files(&mut self) -> [&mut Option<PathBuf>; 3] {
        [
            &mut self.ca_file,
            &mut self.certificate_file,
            &mut self.key_file,
        ]
    }

    /// A line for each setting that lacks another one. Files that would not be used are a mistake.
    pub(super) fn faults(&self, section: &str) -> Vec<String> {
        let pair = pair(section, &self.certificate_file, &self.key_file);
        let any = self.ca_file.is_some() || self.certificate_file.is_some();
        let unused = (any && !self.required).then(|| {
            format!("{section} has files, but {section}.required is false: set it to true, or leave them out")
        });
        let files = [
            ("ca_file", &self.ca_file),
            ("certificate_file", &self.certificate_file),
            ("key_file", &self.key_file),
        ];
        let unreadable = files
            .into_iter()
            .filter_map(|(name, file)| unreadable(&format!("{section}.{name}"), file));
        pair.into_iter().chain(unused).chain(unreadable).collect()
    }
}

fn pair(section: &str, certificate: &Option<PathBuf>, key: &Option<PathBuf>) -> Option<String> {
    (certificate.is_some() != key.is_some()).then(|| {
        format!("{section}.certificate_file and {section}.key_file belong together: set both")
    })
}

/// A line for a file that cannot be opened.
pub(super) fn unreadable(name: &str, file: &Option<PathBuf>) -> Option<String> {
    let file = file.as_ref()?;
    let error = std::fs::File::open(file).err()?;
    Some(format!("{name} {}: {error}", file.display()))
}
