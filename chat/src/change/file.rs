//! Edits of `shards.toml`: seen by content, a few times a second. A watch on the file itself goes deaf when an editor saves by
//! renaming, or when a mounted configuration is swapped. An edit counts once two reads in a row give the same.

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde::Serialize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// How the file stands to the document in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "state", content = "what")]
pub enum FileState {
    /// It says the same.
    InForce,
    /// It says what was in force before, and a later document came from elsewhere: it is old.
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

/// Where edits come from.
#[derive(Clone)]
pub struct Source {
    /// For messages.
    pub name: String,
    /// Reads the whole of it; `None` if that cannot be done.
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

/// A file and its content as it was last seen; `None` while there is none.
pub struct Watched {
    source: Source,
    seen: Option<String>,
}

impl Watched {
    /// Watches a file of which `seen` was read: an edit between that reading and the first look counts like any other.
    #[must_use]
    pub fn new(source: Source, seen: String) -> Self {
        Self {
            source,
            seen: Some(seen),
        }
    }

    /// Waits, then looks.
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

/// Says in one line how the file stands now.
pub fn report(file: &str, state: &FileState) {
    match state {
        FileState::InForce => tracing::info!(file, "shards file: in force"),
        FileState::Older(what) => {
            tracing::warn!(
                file,
                what,
                "shards file: it is an old one; the document stays in force"
            )
        }
        FileState::Waiting(what) => tracing::warn!(file, what, "shards file: not in force yet"),
        FileState::Refused(what) => {
            tracing::warn!(
                file,
                what,
                "shards file: refused; the document stays in force"
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
