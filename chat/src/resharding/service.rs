//! Resharding for operators: its state, the plan of an edit, pause and resume.

use super::coordinator::Coordinator;
use super::estimate::{self, Plan};
use super::install::{self, InstallError};
use super::watcher::{FileState, Follower, Source};
use crate::cluster::{Cluster, Peers};
use crate::config;
use crate::domain::shards_file::ShardsFile;
use crate::metrics::Metrics;
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

/// A handle; the work ends when the last is dropped.
#[derive(Clone)]
pub struct Resharding {
    cluster: Cluster,
    coordinator: Arc<Coordinator>,
    peers: Peers,
    file: watch::Receiver<FileState>,
    _tasks: Arc<Vec<AbortOnDropHandle<()>>>,
}

/// The state of resharding as this instance knows it.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// The version of the topology that this instance has adopted.
    pub version: u64,
    /// Its phase.
    pub phase: &'static str,
    /// Whether an operator has paused rebalancing.
    pub paused: bool,
    /// The state of this instance's `shards.toml` relative to it.
    pub file: FileState,
    /// The id of this instance.
    pub instance: String,
    /// The other instances, and the version that each has adopted.
    pub others: BTreeMap<String, u64>,
    /// The instance that coordinates, if that is known.
    pub coordinator: Option<String>,
    /// Its progress; see [`super::Report`].
    pub work: Option<serde_json::Value>,
}

impl Resharding {
    /// Follows a file, of which `seen` was read, and carries topologies out, on the database
    /// runtime.
    #[must_use]
    pub fn start(
        cluster: &Cluster,
        source: Source,
        seen: String,
        settings: &config::Resharding,
        peers: &Peers,
        metrics: Arc<Metrics>,
        runtime: &Handle,
    ) -> Self {
        let coordinator = Coordinator::new(cluster, settings, peers.clone(), metrics);
        let coordinator = Arc::new(coordinator);
        let (state, file) = watch::channel(FileState::InEffect);
        let follower = Follower {
            cluster: cluster.clone(),
            state,
            proposed: coordinator.wake().clone(),
        };
        let tasks = vec![
            AbortOnDropHandle::new(runtime.spawn(follower.run(source, seen))),
            AbortOnDropHandle::new(runtime.spawn(coordinator.clone().run())),
            AbortOnDropHandle::new(runtime.spawn(coordinator.clone().announce())),
        ];
        Self {
            cluster: cluster.clone(),
            coordinator,
            peers: peers.clone(),
            file,
            _tasks: Arc::new(tasks),
        }
    }

    /// The state of resharding as this instance knows it.
    #[must_use]
    pub fn status(&self) -> Status {
        let view = self.cluster.view();
        let present = self.peers.present();
        let ours = self.coordinator.report();
        let theirs = present.iter().find(|peer| peer.work.is_some());
        let (coordinator, work) = match (ours, theirs) {
            (Some(report), _) => (
                Some(self.peers.instance().to_owned()),
                serde_json::to_value(report).ok(),
            ),
            (None, Some(peer)) => (Some(peer.instance.clone()), peer.work.clone()),
            (None, None) => (None, None),
        };
        let others = present.iter();
        Status {
            version: view.topology_ref.version,
            phase: view.topology_ref.phase.as_str(),
            paused: view.topology.paused,
            file: self.file.borrow().clone(),
            instance: self.peers.instance().to_owned(),
            others: others
                .map(|peer| (peer.instance.clone(), peer.version))
                .collect(),
            coordinator,
            work,
        }
    }

    /// Receives the state of the file and its changes.
    #[must_use]
    pub fn file(&self) -> watch::Receiver<FileState> {
        self.file.clone()
    }

    /// Whether another instance uses the same shards, and there is no bus to it.
    #[must_use]
    pub fn is_unconnected(&self) -> bool {
        self.coordinator.is_unconnected()
    }

    /// What `file` would do if it were installed now.
    ///
    /// # Errors
    /// One line that says what is wrong with it.
    pub async fn plan(&self, file: &ShardsFile) -> Result<Plan, String> {
        estimate::plan(&self.cluster, file).await
    }

    /// Pauses or resumes all moves, for all instances.
    ///
    /// # Errors
    /// [`InstallError`].
    pub async fn pause(&self, paused: bool) -> Result<(), InstallError> {
        install::pause(&self.cluster, paused).await?;
        self.coordinator.wake().notify_one();
        Ok(())
    }
}
