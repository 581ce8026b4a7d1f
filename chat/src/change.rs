//! Edits of `shards.toml` while the service runs: seen, read, compared with the document in force, and reported.
//!
//! The file is watched by its content, every two seconds: a watch on the file itself goes deaf when an editor saves by
//! renaming, or when a mounted configuration is swapped. An edit counts once two reads in a row give the same.

use crate::cluster::Cluster;
use crate::topology::Topology;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::watch;

/// How the file stands to the document in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "state", content = "what")]
pub enum FileState {
    /// It says the same.
    InForce,
    /// It says something else, which is not in force.
    Differs(String),
    /// It cannot be read or makes no sense; the document stays in force.
    Invalid(String),
}

/// Between two looks.
const EVERY: Duration = Duration::from_secs(2);

/// Between the two reads that must agree: an editor may be in the middle of writing.
const SETTLE: Duration = Duration::from_millis(200);

/// Looks at a file's text and says how it stands.
pub type Read = dyn Fn(&str) -> FileState + Send + Sync;

/// Compares a text with the document in force; `env` answers for `${VAR}`.
#[must_use]
pub fn compare(text: &str, cluster: &Cluster, env: &dyn Fn(&str) -> Option<String>) -> FileState {
    match Topology::parse(text, env) {
        Err(e) => FileState::Invalid(e.to_string()),
        Ok(topology) => match cluster.document().1.difference(&topology.document()) {
            Some(difference) => FileState::Differs(difference),
            None => FileState::InForce,
        },
    }
}

/// Watches `path` until nobody listens any more, and logs each change of its content in one line. `seen` is the content
/// that `state` already speaks of: an edit between that reading and the first look here counts like any other.
pub async fn watch_file(
    path: PathBuf,
    mut seen: Option<String>,
    read: Box<Read>,
    state: watch::Sender<FileState>,
) {
    while !state.is_closed() {
        tokio::time::sleep(EVERY).await;
        let Some(text) = settled(&path).await else {
            continue;
        };
        if text != seen {
            let found = match &text {
                Some(text) => read(text),
                None => FileState::Invalid("it cannot be read".into()),
            };
            report(&path, &found);
            state.send_replace(found);
            seen = text;
        }
    }
}

/// The content, if it is the same twice; the inner `None` if there is no such file.
async fn settled(path: &Path) -> Option<Option<String>> {
    let first = tokio::fs::read_to_string(path).await.ok();
    tokio::time::sleep(SETTLE).await;
    let second = tokio::fs::read_to_string(path).await.ok();
    (first == second).then_some(first)
}

fn report(path: &Path, state: &FileState) {
    let file = path.display();
    match state {
        FileState::InForce => tracing::info!(%file, "edit seen: it says what is in force"),
        FileState::Differs(what) => {
            tracing::warn!(%file, what, "edit seen: it differs from the document in force, which stays in force")
        }
        FileState::Invalid(what) => {
            tracing::warn!(%file, what, "edit seen: refused, the document stays in force")
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
        let (sender, mut state) = watch::channel(FileState::InForce);
        let read = Box::new(|text: &str| FileState::Differs(text.to_owned()));
        tokio::spawn(watch_file(file.clone(), Some("0".into()), read, sender));
        let edit = async |state: &mut watch::Receiver<FileState>, text: &str, how: &dyn Fn()| {
            how();
            let found = FileState::Differs(text.to_owned());
            tokio::time::timeout(
                Duration::from_secs(30),
                state.wait_for(|state| *state == found),
            )
            .await
            .expect("the edit is seen")
            .unwrap();
        };
        edit(&mut state, "1", &|| std::fs::write(&file, "1").unwrap()).await;
        edit(&mut state, "2", &|| {
            std::fs::write(&other, "2").unwrap();
            std::fs::rename(&other, &file).unwrap();
        })
        .await;
        edit(&mut state, "3", &|| {
            std::fs::write(&other, "3").unwrap();
            std::fs::remove_file(&file).unwrap();
            std::os::unix::fs::symlink(&other, &file).unwrap();
        })
        .await;
        // A touch changes nothing: the state that was last marked as seen stays the last.
        state.mark_unchanged();
        std::fs::write(&other, "3").unwrap();
        assert!(
            tokio::time::timeout(EVERY * 2, state.changed())
                .await
                .is_err()
        );
    }
}
