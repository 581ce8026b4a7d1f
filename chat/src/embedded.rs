//! Embedded mode: one process on four SQLite files in a folder, with a secret of its own.

use anyhow::{Context, bail, ensure};
use chat::config::{Secret, Settings};
use std::fs::{DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The options of embedded mode.
#[derive(clap::Args)]
pub struct Embedded {
    /// Everything in one process and in files: four SQLite shards, no NATS, tokens for everyone on
    /// this machine.
    #[arg(long)]
    embedded: bool,
    /// Where embedded mode keeps its files.
    #[arg(long, default_value = "data", requires = "embedded")]
    data: PathBuf,
}

impl Embedded {
    /// No embedded mode.
    pub fn off() -> Self {
        Self {
            embedded: false,
            data: PathBuf::new(),
        }
    }

    /// For `serve`: makes the files on the first run, and locks the folder until the returned file
    /// is dropped.
    ///
    /// # Errors
    /// One line, if a setting contradicts embedded mode or another process uses the folder.
    pub fn serve(&self, settings: &mut Settings) -> anyhow::Result<Option<File>> {
        if !self.embedded {
            return Ok(None);
        }
        let data = self.data.display();
        private_folder(&self.data).with_context(|| data.to_string())?;
        let lock = private(OpenOptions::new().create(true).truncate(false).write(true))
            .open(self.data.join("lock"))
            .with_context(|| data.to_string())?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                bail!(
                    "another chat serve --embedded uses {data}; end it, or choose another folder with --data"
                )
            }
            Err(TryLockError::Error(e)) => return Err(e).with_context(|| data.to_string()),
        }
        make_files(&self.data).with_context(|| data.to_string())?;
        self.apply(settings)?;
        Ok(Some(lock))
    }

    /// For commands that read: makes nothing.
    ///
    /// # Errors
    /// One line, if a setting contradicts embedded mode or the folder does not exist.
    pub fn read(&self, settings: &mut Settings) -> anyhow::Result<()> {
        if !self.embedded {
            return Ok(());
        }
        let file = self.data.join("shards.toml");
        ensure!(
            file.exists(),
            "{} does not exist: start the server once with --embedded, or correct --data",
            file.display()
        );
        self.apply(settings)
    }

    fn apply(&self, settings: &mut Settings) -> anyhow::Result<()> {
        ensure!(
            settings.nats.url.is_none(),
            "nats.url is set, but embedded mode is a single instance; unset it, or leave out --embedded"
        );
        ensure!(
            settings.auth.secret.is_none() && settings.auth.key_file.is_none(),
            "auth.secret or auth.key_file is set, but embedded mode has a secret of its own and gives tokens to everyone on this machine; unset it, or leave out --embedded"
        );
        let read = |name: &str| {
            let path = self.data.join(name);
            let text = std::fs::read_to_string(&path);
            text.with_context(|| path.display().to_string())
        };
        settings.embedded = true;
        settings.shards_file = self.data.join("shards.toml");
        settings.auth.secret = Some(Secret::new(read("secret")?));
        if settings.admin_token.is_none() {
            settings.admin_token = Some(Secret::new(read("admin-token")?.trim().to_owned()));
        }
        Ok(())
    }
}

/// Only the owner reads or writes the file.
fn private(options: &mut OpenOptions) -> &mut OpenOptions {
    options.mode(0o600)
}

/// A folder that only the owner enters.
fn private_folder(folder: &Path) -> std::io::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)?;
    std::fs::set_permissions(folder, Permissions::from_mode(0o700))
}

/// The file of the shards, the secret of tokens, which outlive a restart, and the token of the
/// operator; those that exist stay.
fn make_files(folder: &Path) -> std::io::Result<()> {
    let shards = folder.join("shards.toml");
    if !shards.exists() {
        write_new(&shards, &embedded_shards(&std::fs::canonicalize(folder)?))?;
    }
    for name in ["secret", "admin-token"] {
        let secret = folder.join(name);
        if !secret.exists() {
            let random = [rand::random::<u128>(), rand::random::<u128>()];
            write_new(&secret, &random.map(|part| format!("{part:032x}")).concat())?;
        }
    }
    Ok(())
}

fn write_new(path: &Path, text: &str) -> std::io::Result<()> {
    private(OpenOptions::new().create_new(true).write(true))
        .open(path)?
        .write_all(text.as_bytes())
}

fn embedded_shards(data: &Path) -> String {
    let mut text = String::from("# The shards of this service: four SQLite files.\n");
    for n in 1..=4 {
        text += &format!(
            "\n[[shard]]\nname = \"shard{n}\"\nurl = \"sqlite:{}\"\n",
            data.join(format!("shard{n}.db")).display()
        );
    }
    text
}
