//! Edits of `shards.toml`: seen by content, a few times a second. A watch on the file itself goes deaf when an editor saves by
//! renaming, or when a mounted configuration is swapped. An edit counts once two reads in a row give the same.

use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How the file stands to the document in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "state", content = "what")]
pub enum FileState {
    /// It says the same.
    InForce,
    /// It says what was in force before, and nobody has edited it since we started: it is old.
    Older(String),
    /// It is to be put in force; something must come back first.
    Waiting(String),
    /// It makes no sense, or must not be put in force; the document stays as it is.
    Refused(String),
}

/// Between two looks.
pub const EVERY: Duration = Duration::from_millis(500);

/// Between the two reads that must agree: an editor may be in the middle of writing.
const SETTLE: Duration = Duration::from_millis(200);

/// What a look has shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Nothing new.
    Same,
    /// Another content.
    Changed(String),
    /// There is no such file any more.
    Gone,
}

/// A file and its content as it was last seen.
pub struct Watched {
    path: PathBuf,
    seen: String,
}

impl Watched {
    /// Watches a file of which `seen` was read: an edit between that reading and the first look counts like any other.
    #[must_use]
    pub fn new(path: PathBuf, seen: String) -> Self {
        Self { path, seen }
    }

    /// The content that was last seen.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.seen
    }

    /// Waits, then looks.
    pub async fn changed_within(&mut self, wait: Duration) -> Seen {
        tokio::time::sleep(wait).await;
        let first = tokio::fs::read_to_string(&self.path).await.ok();
        if first.as_ref() == Some(&self.seen) {
            return Seen::Same;
        }
        tokio::time::sleep(SETTLE).await;
        let second = tokio::fs::read_to_string(&self.path).await.ok();
        match second {
            None if first.is_none() => Seen::Gone,
            Some(text) if first.as_ref() == Some(&text) => {
                text.clone_into(&mut self.seen);
                Seen::Changed(text)
            }
            None | Some(_) => Seen::Same,
        }
    }
}

/// Says in one line how the file stands now.
pub fn report(path: &Path, state: &FileState) {
    let file = path.display();
    match state {
        FileState::InForce => tracing::info!(%file, "shards file: in force"),
        FileState::Older(what) => {
            tracing::warn!(%file, what, "shards file: it is an old one; the document stays in force")
        }
        FileState::Waiting(what) => tracing::warn!(%file, what, "shards file: not in force yet"),
        FileState::Refused(what) => {
            tracing::warn!(%file, what, "shards file: refused; the document stays in force")
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
        let mut watched = Watched::new(file.clone(), "0".into());
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
