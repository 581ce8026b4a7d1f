//! A private CA, made by openssl, for tests of TLS.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A CA in a folder, and the certificates that it has issued.
pub struct Ca {
    folder: PathBuf,
}

/// The files of a certificate, in PEM.
#[derive(Clone, Debug)]
pub struct Certificate {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

const KEY: [&str; 5] = [
    "-newkey",
    "ec",
    "-pkeyopt",
    "ec_paramgen_curve:P-256",
    "-nodes",
];

impl Ca {
    /// Makes a CA in a folder that exists.
    pub fn new(folder: &Path) -> Self {
        let ca = Self {
            folder: folder.to_owned(),
        };
        let arguments = ["req", "-x509", "-days", "2", "-subj", "/CN=CA of a test"];
        openssl(
            Command::new("openssl")
                .args(arguments)
                .args(KEY)
                .args(["-keyout"])
                .arg(ca.key())
                .arg("-out")
                .arg(ca.file()),
        );
        ca
    }

    /// Its own certificate.
    pub fn file(&self) -> PathBuf {
        self.folder.join("ca.pem")
    }

    fn key(&self) -> PathBuf {
        self.folder.join("ca.key")
    }

    /// A certificate for this machine.
    pub fn issue(&self, name: &str) -> Certificate {
        let path = |end: &str| self.folder.join(format!("{name}.{end}"));
        let (request, extensions) = (path("csr"), path("ext"));
        let issued = Certificate {
            certificate: path("pem"),
            key: path("key"),
        };
        std::fs::write(&extensions, "subjectAltName=IP:127.0.0.1,DNS:localhost\n").unwrap();
        openssl(
            Command::new("openssl")
                .args(["req", "-subj", &format!("/CN={name}")])
                .args(KEY)
                .arg("-keyout")
                .arg(&issued.key)
                .arg("-out")
                .arg(&request),
        );
        openssl(
            Command::new("openssl")
                .args(["x509", "-req", "-days", "2", "-CAcreateserial", "-in"])
                .arg(&request)
                .arg("-CA")
                .arg(self.file())
                .arg("-CAkey")
                .arg(self.key())
                .arg("-extfile")
                .arg(&extensions)
                .arg("-out")
                .arg(&issued.certificate),
        );
        issued
    }
}

fn openssl(command: &mut Command) {
    let output = command.output().expect("openssl is not here");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
}
