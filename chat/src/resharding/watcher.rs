//! Edits of `shards.toml`: seen by content, a few times a second. A watch on the file itself goes
//! deaf when an editor saves by renaming, or when a mounted configuration is swapped. An edit
//! counts once two reads in a row give the same.

use super::install::{self, InstallError};
use crate::cluster::Cluster;
use crate::domain::shards_file::ShardsFile;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde::Serialize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};

/// The state of the file relative to the topology in effect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "state", content = "reason")]
pub enum FileState {
    /// It has the same content.
    InEffect,
    /// Its content was in effect before, and a later edit came from another file.
    Outdated(String),
    /// It takes effect once the reason is gone; it is tried again.
    Waiting(String),
    /// It is invalid, or must not take effect; the topology stays as it is.
    Rejected(String),
}

/// The pause between two reads of the file.
pub const EVERY: Duration = Duration::from_millis(500);

/// The pause between the two reads that must agree: an editor may be in the middle of writing.
const SETTLE: Duration = Duration::from_millis(200);

/// The result of a read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Nothing new.
    Same,
    /// New content.
    Changed(String),
    /// The file is gone.
    Gone,
}

/// The source of edits.
#[derive(Clone)]
pub struct Source {
    /// For messages.
    pub name: String,
    /// Reads the whole file; `None` on failure.
    pub read: Arc<dyn Fn() -> BoxFuture<'static, Option<String>> + Send + Sync>,
}

impl Source {
    /// A file.
    #[must_use]
    pub fn file(path: PathBuf) -> Self {
        Self {
            name: path.display().to_string(),
            read: Arc::new(move || {
                let path = path.clone();
                async move { tokio::fs::read_to_string(path).await.ok() }.boxed()
            }),
        }
    }
}

/// A file and its last content; `None` while it is missing.
pub struct Watched {
    source: Source,
    seen: Option<String>,
}

impl Watched {
    /// Watches a file whose content was `seen`: an edit between that read and the first one here
    /// counts like any other.
    #[must_use]
    pub fn new(source: Source, seen: String) -> Self {
        Self {
            source,
            seen: Some(seen),
        }
    }

    /// Waits, then reads.
    pub async fn changed_within(&mut self, wait: Duration) -> Seen {
        tokio::time::sleep(wait).await;
        let first = (self.source.read)().await;
        if first == self.seen {
            return Seen::Same;
        }
        tokio::time::sleep(SETTLE).await;
        let second = (self.source.read)().await;
        if first != second {
            return Seen::Same;
        }
        self.seen.clone_from(&second);
        second.map_or(Seen::Gone, Seen::Changed)
    }
}

/// Follows the file: proposes edits, and reports the state of the file.
pub(super) struct Follower {
    pub cluster: Cluster,
    /// The state of the file.
    pub state: watch::Sender<FileState>,
    /// Notified when a file was proposed.
    pub proposed: Arc<Notify>,
}

impl Follower {
    /// Proposes the content of the file when it has changed, and again while it waits. Runs for
    /// ever.
    pub async fn run(self, source: Source, seen: String) {
        let env = |name: &str| std::env::var(name).ok();
        let parse = |text: &str| ShardsFile::parse(text, &env).map_err(|e| e.to_string());
        let mut watched = Watched::new(source.clone(), seen.clone());
        let mut file = parse(&seen);
        let (mut edited, mut due) = (false, true);
        loop {
            let state = match &file {
                Err(what) => FileState::Rejected(what.clone()),
                Ok(file) if due => self.follow(file, edited).await,
                Ok(file) => self.compared(file),
            };
            if due {
                self.proposed.notify_one();
            }
            due = matches!(state, FileState::Waiting(_));
            self.now(&source.name, state);
            match watched.changed_within(EVERY).await {
                Seen::Same => {}
                Seen::Changed(text) => {
                    file = parse(&text);
                    // One that is back as it was has not been edited.
                    (edited, due) = (edited || text != seen, true);
                }
                Seen::Gone => file = Err("it cannot be read".into()),
            }
        }
    }

    fn now(&self, file: &str, state: FileState) {
        if *self.state.borrow() != state {
            report(file, &state);
            self.state.send_replace(state);
        }
    }

    /// The state of a file without an edit: another instance may have installed another topology
    /// meanwhile, or this one again.
    fn compared(&self, file: &ShardsFile) -> FileState {
        match self.cluster.view().topology.difference(&file.topology()) {
            None => FileState::InEffect,
            Some(difference) => match &*self.state.borrow() {
                FileState::InEffect | FileState::Outdated(_) => FileState::Outdated(difference),
                FileState::Waiting(what) => FileState::Waiting(what.clone()),
                FileState::Rejected(what) => FileState::Rejected(what.clone()),
            },
        }
    }

    async fn follow(&self, file: &ShardsFile, edited: bool) -> FileState {
        let view = self.cluster.view();
        let differs = view.topology.difference(&file.topology());
        if let Some(difference) = differs
            && !edited
            && view.topology.remembers(&file.topology())
        {
            // Its content was in effect before, and it was not edited since.
            return FileState::Outdated(difference);
        }
        match install::propose(&self.cluster, file).await {
            Ok(_) => FileState::InEffect,
            Err(InstallError::Rejected(reason)) => FileState::Rejected(reason),
            Err(InstallError::Waiting(reason)) => FileState::Waiting(reason),
        }
    }
}

/// Logs the state of the file.
pub fn report(file: &str, state: &FileState) {
    match state {
        FileState::InEffect => tracing::info!(file, "shards file is in effect"),
        FileState::Outdated(what) => {
            tracing::warn!(
                file,
                what,
                "shards file is outdated; the topology in effect stays"
            )
        }
        FileState::Waiting(what) => tracing::warn!(file, what, "shards file is waiting"),
        FileState::Rejected(what) => {
            tracing::warn!(
                file,
                what,
                "shards file rejected; the topology in effect stays"
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_edit_in_place_by_rename_and_through_a_swapped_link_is_seen_and_a_touch_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let (file, other) = (folder.path().join("shards.toml"), folder.path().join("new"));
        std::fs::write(&file, "0").unwrap();
        let mut watched = Watched::new(Source::file(file.clone()), "0".into());
        let wait = Duration::from_millis(1);
        assert_eq!(watched.changed_within(wait).await, Seen::Same);
        std::fs::write(&file, "1").unwrap();
        assert_eq!(
            watched.changed_within(wait).await,
            Seen::Changed("1".into())
        );
        std::fs::write(&other, "2").unwrap();
        std::fs::rename(&other, &file).unwrap();
        assert_eq!(
            watched.changed_within(wait).await,
            Seen::Changed("2".into())
        );
        std::fs::write(&other, "3").unwrap();
        std::fs::remove_file(&file).unwrap();
        assert_eq!(watched.changed_within(wait).await, Seen::Gone);
        assert_eq!(
            watched.changed_within(wait).await,
            Seen::Same,
            "it is still gone"
        );
        std::fs::write(&file, "2").unwrap();
        assert_eq!(
            watched.changed_within(wait).await,
            Seen::Changed("2".into()),
            "it is back"
        );
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink(&other, &file).unwrap();
        assert_eq!(
            watched.changed_within(wait).await,
            Seen::Changed("3".into())
        );
        std::fs::write(&other, "3").unwrap();
        assert_eq!(
            watched.changed_within(wait).await,
            Seen::Same,
            "a touch changes nothing"
        );
    }
}
