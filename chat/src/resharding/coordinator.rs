//! The coordinator carries a topology out: failover, then moves, merges and purges, in rounds. Each
//! round begins with a read of all rows of all shards. Steps that an instance leaves unfinished are
//! continued by the next round of any instance.

use super::failover::{self, Rows, owner_of};
use super::install;
use super::lock::CoordinatorLease;
use super::merge;
use super::mover::{self, Move};
use super::pace::{Lanes, Pace};
use super::progress::{Progress, Report};
use super::step::{MoveError, take};
use crate::cluster::{Cluster, HEARTBEAT, PeerEvent, Peers, TopologyView};
use crate::config;
use crate::domain::ownership::{SlotRow, SlotState, Step};
use crate::domain::shards_file::DeclaredState;
use crate::domain::slot::{SLOTS, Slot};
use crate::domain::topology::{Phase, TopologyRef};
use crate::metrics::Metrics;
use crate::store::Shard;
use futures_util::StreamExt;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::sync::broadcast::Receiver;
use tokio::time::Instant;

/// The pause between two rounds without an event.
const ROUND_EVERY: Duration = Duration::from_secs(1);

/// The pause between two reads of all rows of all shards, when the last round had nothing to do.
const QUIET_LOOK: Duration = Duration::from_secs(5);

/// The number of slots that one round moves, while the topology stays the same.
const MOVES_A_ROUND: usize = 256;

/// The number of slots that one round merges.
const MERGES_A_ROUND: usize = 256;

/// The time that one round spends on purging.
const PURGE_BUDGET: Duration = Duration::from_millis(500);

/// The work of this instance, while it holds the coordinator lock.
pub(super) struct Coordinator {
    cluster: Cluster,
    settings: config::Resharding,
    progress: Progress,
    peers: Peers,
    /// Notified when a round may have something to do.
    wake: Arc<Notify>,
    is_coordinator: AtomicBool,
    /// See [`Coordinator::is_unconnected`].
    unconnected: AtomicBool,
}

impl Coordinator {
    pub fn new(
        cluster: &Cluster,
        settings: &config::Resharding,
        peers: Peers,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            cluster: cluster.clone(),
            settings: settings.clone(),
            progress: Progress::new(metrics),
            peers,
            wake: Arc::default(),
            is_coordinator: AtomicBool::new(false),
            unconnected: AtomicBool::new(false),
        }
    }

    /// Notify it when a round may have something to do.
    pub fn wake(&self) -> &Arc<Notify> {
        &self.wake
    }

    /// The progress, while this instance holds the lock.
    pub fn report(&self) -> Option<Report> {
        let coordinates = self.is_coordinator.load(Ordering::Relaxed);
        coordinates.then(|| self.progress.report())
    }

    /// Announces the progress to the other instances.
    pub async fn announce(self: Arc<Self>) {
        loop {
            let report = self.report();
            self.peers
                .set_work(report.and_then(|report| serde_json::to_value(report).ok()));
            tokio::time::sleep(HEARTBEAT).await;
        }
    }

    /// Runs one round after the other; never returns.
    pub async fn run(self: Arc<Self>) {
        let mut lease = CoordinatorLease::default();
        let mut adopted = (self.cluster.view().topology_ref.clone(), Instant::now());
        // The time since which there has been nothing to do.
        let mut quiet = None;
        let mut events = self.peers.events();
        loop {
            let busy = match self.round(&mut lease, &mut adopted, &mut quiet).await {
                Ok(busy) => busy,
                Err(reason) => {
                    tracing::debug!(reason, "resharding blocked");
                    if lease.is_held() {
                        self.progress.stage(
                            self.cluster.view().topology_ref.version,
                            "waiting",
                            Some(reason),
                        );
                    }
                    false
                }
            };
            self.look_for_strangers(&lease);
            if !busy && self.wait(&mut events).await {
                quiet = None;
            }
        }
    }

    /// Notices an instance that uses the same shards while this one has no bus to it.
    fn look_for_strangers(&self, lease: &CoordinatorLease) {
        let unconnected = self.peers.is_standalone() && lease.is_of_another();
        let before = self.unconnected.swap(unconnected, Ordering::Relaxed);
        if unconnected && !before {
            tracing::warn!(
                "another instance uses these shards, but nats.url is not set here: sessions on one do not receive at once what is sent on the other"
            );
        }
    }

    /// Whether another instance uses the same shards, and there is no bus to it.
    pub fn is_unconnected(&self) -> bool {
        self.unconnected.load(Ordering::Relaxed)
    }

    /// Waits until the next round is due; `true` if an event has triggered it.
    async fn wait(&self, events: &mut Receiver<PeerEvent>) -> bool {
        tokio::select! {
            biased;
            () = tokio::time::sleep(ROUND_EVERY) => false,
            () = self.wake.notified() => true,
            _ = events.recv() => true,
        }
    }

    /// Reads the state of all shards and performs the next steps. `true` if the next round should
    /// follow at once.
    async fn round(
        &self,
        lease: &mut CoordinatorLease,
        adopted: &mut (TopologyRef, Instant),
        quiet: &mut Option<Instant>,
    ) -> Result<bool, String> {
        install::catch_up(&self.cluster)
            .await
            .map_err(|e| e.to_string())?;
        let view = self.cluster.view();
        if adopted.0 != view.topology_ref {
            *adopted = (view.topology_ref.clone(), Instant::now());
            *quiet = None;
            self.cluster.refresh().await;
        }
        let ours = lease.take(&view).await;
        self.is_coordinator.store(ours, Ordering::Relaxed);
        if !ours {
            *quiet = None;
            return Ok(false);
        }
        // Only the coordinator changes rows, and only for a new topology.
        if quiet.is_some_and(|since| since.elapsed() < QUIET_LOOK) {
            return Ok(false);
        }
        let (rows, silent) = read_rows(&view).await;
        match view.topology_ref.phase {
            Phase::Normal => {}
            Phase::Failover => return self.failover(&view, &rows, silent.first()).await,
            Phase::Initializing => return Ok(false),
        }
        let (version, phase) = (view.topology_ref.version, view.topology_ref.phase);
        let peers_wait = Duration::from_millis(self.settings.peers_wait_ms);
        if !self.peers.all_have(version, phase) && adopted.1.elapsed() < peers_wait {
            let reason = "other instances have not adopted the topology yet";
            self.progress.stage(version, "waiting", Some(reason.into()));
            tokio::time::sleep(Duration::from_millis(50)).await;
            return Ok(true);
        }
        let mut busy = self.settle(&view, &rows).await;
        if view.topology.paused {
            self.progress.stage(version, "paused", None);
            return Ok(false);
        }
        busy |= self.merge(&view, &rows).await;
        busy |= self.record_merged(&view, &rows).await;
        busy |= self.move_slots(&view, &rows).await;
        busy |= self.purge(&view, &rows).await;
        if !busy {
            let report = self.progress.report();
            // The slots of a shard that does not answer are not known, so they are not counted as
            // left.
            let done = report.slots_left == 0 && report.slots_to_merge == 0 && silent.is_empty();
            *quiet = done.then(Instant::now);
            self.progress.stage(
                version,
                if done { "idle" } else { "waiting" },
                silent
                    .first()
                    .map(|name| format!("{name} does not answer"))
                    .or_else(|| self.purge_to_wait_for(report.slots_to_purge_first)),
            );
        }
        Ok(busy)
    }

    /// Claims the slots of shards that are declared down; once every slot has an owner, ends the
    /// phase.
    async fn failover(
        &self,
        view: &TopologyView,
        rows: &Rows,
        silent: Option<&String>,
    ) -> Result<bool, String> {
        self.progress
            .stage(view.topology_ref.version, "failover", None);
        if let Some(name) = silent {
            return Err(format!(
                "{name} must answer, or be declared down too, before slots can be claimed"
            ));
        }
        let done = failover::run(view, rows).await.map_err(|e| e.to_string())?;
        if done {
            install::advance(&self.cluster, view, Phase::Normal)
                .await
                .map_err(|e| e.to_string())?;
        }
        self.cluster.refresh().await;
        Ok(true)
    }

    /// The reason that slots are not moved, if their targets have rows of an earlier time.
    fn purge_to_wait_for(&self, slots: u64) -> Option<String> {
        let seconds = self.settings.purge_after_ms as f64 / 1000.0;
        (slots > 0).then(|| {
            format!(
                "{slots} slots have left their target less than {seconds} s ago: their rows there are purged first"
            )
        })
    }

    fn pace(&self) -> Pace {
        Pace {
            freeze: Duration::from_millis(self.settings.freeze_ms),
            purge_after: Duration::from_millis(self.settings.purge_after_ms),
            throttle: self.settings.throttle,
        }
    }

    fn a_move(&self, view: &TopologyView, slot: Slot, from: &Shard, to: &Shard) -> Move {
        Move {
            topology_ref: view.topology_ref.clone(),
            slot,
            from: from.clone(),
            to: to.clone(),
            pace: self.pace(),
        }
    }

    /// Finishes steps that another instance left unfinished: sealed slots are resolved by evidence,
    /// abandoned copies are cancelled.
    async fn settle(&self, view: &TopologyView, rows: &Rows) -> bool {
        let mut busy = false;
        for (name, of_shard) in rows {
            let Some(shard) = view.shard(name) else {
                continue;
            };
            for (slot, row) in Slot::all().zip(of_shard) {
                let peer = row.peer.as_deref().and_then(|peer| view.shard(peer));
                let settled = match (row.state, peer) {
                    (SlotState::Sealed, Some(to)) => {
                        self.progress
                            .stage(view.topology_ref.version, "moving", None);
                        let settled = self.a_move(view, slot, shard, to).settle(row).await;
                        tracing::info!(%slot, from = name, to = to.name(), outcome = ?settled.as_ref().ok(), "a slot was found sealed");
                        settled.map(|_| true)
                    }
                    (SlotState::Incoming, from) => {
                        // A copy that no instance continues: its source may have changed hands
                        // since.
                        let sealed_for_it = from
                            .and_then(|from| rows.get(from.name()))
                            .is_none_or(|source| source[slot.index()].is_sealed(name, row.term));
                        let from = row.peer.clone().unwrap_or_default();
                        if sealed_for_it {
                            Ok(false)
                        } else {
                            self.cancel(view, slot, shard, row, from).await
                        }
                    }
                    (
                        SlotState::None | SlotState::Owner | SlotState::Sealed | SlotState::Fenced,
                        _,
                    ) => Ok(false),
                };
                match settled {
                    Ok(did) => busy |= did,
                    Err(e) => tracing::debug!(%slot, reason = %e, "not settled yet"),
                }
            }
        }
        busy
    }

    async fn cancel(
        &self,
        view: &TopologyView,
        slot: Slot,
        shard: &Shard,
        row: &SlotRow,
        from: String,
    ) -> Result<bool, MoveError> {
        take(
            shard,
            &view.topology_ref,
            slot,
            &Step::Cancel {
                from,
                term: row.term,
            },
        )
        .await?;
        Ok(true)
    }

    /// Merges the messages of returned shards into the logs of the slots' owners.
    async fn merge(&self, view: &TopologyView, rows: &Rows) -> bool {
        let mut fenced = Vec::new();
        for (name, of_shard) in rows {
            for (slot, row) in Slot::all().zip(of_shard) {
                if row.state == SlotState::Fenced {
                    fenced.push((name, slot, row));
                }
            }
        }
        if !fenced.is_empty() {
            self.progress
                .stage(view.topology_ref.version, "merging", None);
        }
        self.progress.to_merge(fenced.len() as u64);
        let to_merge: Vec<_> = fenced
            .into_iter()
            .filter_map(|(name, slot, row)| {
                let (from, (owner, _)) = view.shard(name).zip(owner_of(view, rows, slot))?;
                Some((slot, row.clone(), from.clone(), owner.clone()))
            })
            .take(MERGES_A_ROUND)
            .collect();
        let lanes = &Lanes::new(self.settings.slots_at_once, self.pace());
        let merged = futures_util::stream::iter(to_merge)
            .map(|(slot, row, from, owner)| async move {
                let _lane = lanes.enter(&[&from, &owner]).await;
                match merge::merge(&view.topology_ref, slot, &from, &row, &owner, self.pace()).await
                {
                    Ok(messages) => {
                        self.progress.merged(messages);
                        true
                    }
                    Err(e) => {
                        self.progress.failed();
                        tracing::info!(%slot, reason = %e, "not merged yet");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        false
                    }
                }
            })
            .buffer_unordered(self.settings.slots_at_once.max(1));
        merged
            .fold(false, |any, merged| std::future::ready(any | merged))
            .await
    }

    /// Records at the owners which shards have no messages of their own any more: merged ones and
    /// forgotten ones.
    async fn record_merged(&self, view: &TopologyView, rows: &Rows) -> bool {
        let mut steps = Vec::new();
        for slot in Slot::all() {
            let Some((owner, row)) = owner_of(view, rows, slot) else {
                continue;
            };
            for name in row.history.missing.iter().chain(&row.history.forgotten) {
                let member = view.topology.shards.get(name);
                let forgotten = member
                    .is_none_or(|member| member.state == DeclaredState::Down && member.forget);
                let merged = rows
                    .get(name)
                    .is_some_and(|rows| rows[slot.index()].state != SlotState::Fenced);
                let shard = name.clone();
                if merged {
                    steps.push((slot, owner.clone(), Step::Heal { shard }));
                } else if forgotten && row.history.missing.contains(name) {
                    steps.push((slot, owner.clone(), Step::Forget { shard }));
                }
            }
        }
        let recorded = futures_util::stream::iter(steps)
            .map(|(slot, owner, step)| async move {
                let taken = take(&owner, &view.topology_ref, slot, &step).await;
                if let Err(e) = &taken {
                    tracing::debug!(%slot, reason = %e, "not {} yet", step.name());
                }
                taken.is_ok()
            })
            .buffer_unordered(failover::AT_ONCE);
        recorded
            .fold(false, |any, recorded| std::future::ready(any | recorded))
            .await
    }

    /// Moves slots whose owner is not their target, a few at once.
    async fn move_slots(&self, view: &TopologyView, rows: &Rows) -> bool {
        let by_pair = slots_to_move(view, rows);
        let name = |(from, to): &(String, String)| format!("{from} -> {to}");
        if !by_pair.is_empty() {
            self.progress
                .stage(view.topology_ref.version, "moving", None);
        }
        self.progress.left(
            by_pair
                .iter()
                .map(|(pair, slots)| (name(pair), slots.len() as u64))
                .collect(),
        );
        // One of each pair in turn, so that the load is spread over all shards.
        let longest = by_pair.values().map(Vec::len).max().unwrap_or(0);
        let turns = (0..longest).flat_map(|n| {
            by_pair
                .iter()
                .filter_map(move |(pair, slots)| Some((pair, *slots.get(n)?)))
        });
        let moves: Vec<_> = turns
            .filter_map(|(pair, slot)| {
                let (from, to) = (view.shard(&pair.0)?, view.shard(&pair.1)?);
                let can = !from.is_down() && !to.is_down();
                can.then(|| (name(pair), self.a_move(view, slot, from, to)))
            })
            .take(MOVES_A_ROUND)
            .collect();
        let lanes = &Lanes::new(self.settings.slots_at_once, self.pace());
        let to_purge_first = &AtomicU64::new(0);
        let moved = futures_util::stream::iter(moves)
            .map(|(pair, a_move)| async move {
                let _lane = lanes.enter(&[&a_move.from, &a_move.to]).await;
                if self.cluster.view().topology_ref != a_move.topology_ref {
                    return false;
                }
                match a_move.run().await {
                    Ok(moved) => {
                        self.cluster.note_owner(a_move.slot, &a_move.to);
                        self.progress.moved(&pair, moved);
                        let shards = [&a_move.from, &a_move.to];
                        a_move.pace.rest(&shards, moved.frozen).await;
                        true
                    }
                    Err(MoveError::Leftovers) => {
                        to_purge_first.fetch_add(1, Ordering::Relaxed);
                        false
                    }
                    Err(e) => {
                        self.progress.failed();
                        tracing::info!(slot = %a_move.slot, pair, reason = %e, "not moved yet");
                        // A move that failed at once would fail again at once.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        false
                    }
                }
            })
            .buffer_unordered(self.settings.slots_at_once.max(1));
        let any = moved
            .fold(false, |any, moved| std::future::ready(any | moved))
            .await;
        let to_purge_first = to_purge_first.load(Ordering::Relaxed);
        self.progress.to_purge_first(to_purge_first);
        any
    }

    /// Deletes the rows of slots that have left a shard, after a grace period.
    async fn purge(&self, view: &TopologyView, rows: &Rows) -> bool {
        let begun = Instant::now();
        let mut busy = false;
        for shard in view
            .shards
            .iter()
            .filter(|shard| rows.contains_key(shard.name()))
        {
            let grace = self.pace().purge_after;
            let Ok(slots) = shard
                .ask(move |store, identity| async move { store.leftovers(&identity, grace).await })
                .await
            else {
                continue;
            };
            for slot in slots {
                if begun.elapsed() > PURGE_BUDGET {
                    // Purging is not urgent, and each read of all rows slows live traffic down.
                    if self.pace().strain(&[shard]) > 0.0 {
                        tokio::select! {
                            biased;
                            () = tokio::time::sleep(ROUND_EVERY) => {}
                            () = self.wake.notified() => {}
                        }
                    }
                    return true;
                }
                match mover::purge(shard, slot, self.pace()).await {
                    Ok(gone) => busy |= gone > 0,
                    Err(_) => break,
                }
            }
        }
        busy
    }
}

/// The slots whose owner is not their target, by owner and target. A slot whose messages are to be
/// merged waits.
fn slots_to_move(view: &TopologyView, rows: &Rows) -> BTreeMap<(String, String), Vec<Slot>> {
    let mut by_pair = BTreeMap::<(String, String), Vec<Slot>>::new();
    for slot in Slot::all() {
        let Some((owner, _)) = owner_of(view, rows, slot) else {
            continue;
        };
        let fenced = rows
            .values()
            .any(|rows| rows[slot.index()].state == SlotState::Fenced);
        if owner.name() != view.target(slot) && !fenced {
            by_pair
                .entry((owner.name().to_owned(), view.target(slot).to_owned()))
                .or_default()
                .push(slot);
        }
    }
    by_pair
}

/// All rows of the shards that answer, as evidence under the view's topology, and the names of the
/// shards that do not answer.
async fn read_rows(view: &TopologyView) -> (Rows, Vec<String>) {
    let mut rows = Rows::new();
    let mut silent: Vec<String> = view.unconfigured().map(str::to_owned).collect();
    // One after the other: decoding so many rows delays other tasks of the thread.
    for shard in &view.shards {
        let topology_ref = view.topology_ref.clone();
        let of_shard = shard
            .ask(move |store, identity| async move {
                store.rows(&identity, Some(&topology_ref), None).await
            })
            .await;
        match of_shard {
            Ok(of_shard) if of_shard.len() == SLOTS => {
                drop(rows.insert(shard.name().to_owned(), of_shard))
            }
            Ok(_) | Err(_) => silent.push(shard.name().to_owned()),
        }
    }
    (rows, silent)
}
