//! Changes of the shard set while the service runs: an edit of `shards.toml` becomes a document, a document becomes moves.
//!
//! Every instance follows its file and every document. One of them at a time has the turn to carry documents out; that saves
//! work, and safety never rests on it: each step is a compare-and-set in a shard (`docs/SHARDING.md`).
//!
//! - [`mod@file`]: an edit is seen.
//! - [`install`]: it is put in force on all shards, or refused. [`rivals`]: two were proposed at once.
//! - [`judge`]: slots of shards that were declared down get new owners.
//! - [`mover`]: a slot moves, in the parts that `copy` reads. [`merge`]: what a shard that returned alone holds comes back.
//! - [`plan`]: what an edit would do. [`progress`], [`peers`]: what is told about it.

mod copy;
mod fault;
pub mod file;
pub mod install;
pub mod judge;
pub mod merge;
pub mod mover;
pub mod pace;
pub mod peers;
pub mod plan;
pub mod progress;
pub mod rivals;

pub use fault::PLACES;

use crate::bus::Bus;
use crate::chance;
use crate::cluster::{Cluster, View};
use crate::config;
use crate::metrics::Metrics;
use crate::ownership::{SlotRow, SlotState, Step};
use crate::ring::Slot;
use crate::store::{Phase, Shard, Turn};
use crate::topology::{ShardState, Topology};
use file::FileState;
use futures_util::StreamExt;
use install::NotInForce;
use judge::{Rows, owner_of};
use mover::{Move, NotMoved, take};
use pace::{Lanes, Pace};
use peers::{Peer, Peers};
use progress::Progress;
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// A handle; the work ends when the last is dropped.
#[derive(Clone)]
pub struct Change {
    inner: Arc<Inner>,
    _tasks: Arc<Vec<AbortOnDropHandle<()>>>,
}

struct Inner {
    cluster: Cluster,
    settings: config::Change,
    progress: Progress,
    peers: Peers,
    file: watch::Sender<FileState>,
    /// Something may be to do.
    wake: Notify,
    instance: String,
    at_work: AtomicBool,
}

/// How a change stands, as every instance can tell it.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// The document this instance goes by.
    pub version: u64,
    /// Its phase.
    pub phase: &'static str,
    /// Whether moves stand still by an operator's wish.
    pub paused: bool,
    /// How our file stands to it.
    pub file: FileState,
    /// This instance.
    pub instance: String,
    /// The other instances that were heard of lately, and the version each goes by.
    pub others: BTreeMap<String, u64>,
    /// Who carries the document out, if that is known.
    pub at_work: Option<String>,
    /// What has been done and what is left, as whoever is at work tells it.
    pub work: Option<serde_json::Value>,
}

/// Between two looks, when nothing happens.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Between two looks at all rows of all shards, when there was nothing to do at the last.
const QUIET_LOOK: Duration = Duration::from_secs(5);

/// Slots that are begun in one round, while the document stays; between rounds all rows are looked at anew.
const MOVES_A_ROUND: usize = 256;

/// Slots that are merged in one round.
const MERGES_A_ROUND: usize = 256;

/// How long other instances are waited for that do not go by the document yet.
const PEERS_LIMIT: Duration = Duration::from_secs(10);

/// How long purging may take in one round.
const PURGE_BUDGET: Duration = Duration::from_millis(500);

impl Change {
    /// Follows a file, of which `seen` was read, and carries documents out, on the database runtime.
    #[must_use]
    pub fn start(
        cluster: &Cluster,
        source: file::Source,
        seen: String,
        settings: &config::Change,
        bus: Arc<dyn Bus>,
        metrics: Arc<Metrics>,
        runtime: &Handle,
    ) -> Self {
        let inner = Arc::new(Inner {
            cluster: cluster.clone(),
            settings: settings.clone(),
            progress: Progress::new(metrics),
            peers: Peers::listen(bus),
            file: watch::Sender::new(FileState::InForce),
            wake: Notify::new(),
            instance: format!("{:08x}", chance::number() as u32),
            at_work: AtomicBool::new(false),
        });
        let tasks = vec![
            AbortOnDropHandle::new(runtime.spawn(inner.clone().follow_file(source, seen))),
            AbortOnDropHandle::new(runtime.spawn(inner.clone().coordinate())),
            AbortOnDropHandle::new(runtime.spawn(inner.clone().tell())),
        ];
        Self {
            inner,
            _tasks: Arc::new(tasks),
        }
    }

    /// How things stand.
    #[must_use]
    pub fn status(&self) -> Status {
        self.inner.status()
    }

    /// Tells when the file stands otherwise than before.
    #[must_use]
    pub fn file(&self) -> watch::Receiver<FileState> {
        self.inner.file.subscribe()
    }

    /// What `file` would do, were it installed now.
    ///
    /// # Errors
    /// One line that says what is wrong with it.
    pub async fn plan(&self, file: &Topology) -> Result<plan::Plan, String> {
        plan::plan(&self.inner.cluster, file).await
    }

    /// Halts or resumes all moves, for all instances.
    ///
    /// # Errors
    /// [`NotInForce`].
    pub async fn pause(&self, paused: bool) -> Result<(), NotInForce> {
        install::pause(&self.inner.cluster, paused).await?;
        self.inner.wake.notify_one();
        Ok(())
    }
}

impl Inner {
    fn status(&self) -> Status {
        let view = self.cluster.view();
        let present = self.peers.present();
        let ours = self
            .at_work
            .load(Ordering::Relaxed)
            .then(|| self.progress.report());
        let theirs = present.iter().find(|peer| peer.work.is_some());
        let work = match (ours, theirs) {
            (Some(report), _) => serde_json::to_value(report).ok(),
            (None, Some(peer)) => peer.work.clone(),
            (None, None) => None,
        };
        let at_work = if self.at_work.load(Ordering::Relaxed) {
            Some(self.instance.clone())
        } else {
            theirs.map(|peer| peer.instance.clone())
        };
        Status {
            version: view.doc.version,
            phase: view.doc.phase.as_str(),
            paused: view.document.paused,
            file: self.file.borrow().clone(),
            instance: self.instance.clone(),
            others: present
                .into_iter()
                .map(|peer| (peer.instance, peer.version))
                .collect(),
            at_work,
            work,
        }
    }

    /// Proposes what the file says, when it has changed, and again while something must come back first.
    async fn follow_file(self: Arc<Self>, source: file::Source, seen: String) {
        let env = |name: &str| std::env::var(name).ok();
        let parse = |text: &str| Topology::parse(text, &env).map_err(|e| e.to_string());
        let mut watched = file::Watched::new(source.clone(), seen.clone());
        let mut topology = parse(&seen);
        let (mut edited, mut due) = (false, true);
        loop {
            let state = match &topology {
                Err(what) => FileState::Refused(what.clone()),
                Ok(topology) if due => self.follow(topology, edited).await,
                Ok(topology) => self.compared(topology),
            };
            if due {
                self.wake.notify_one();
            }
            due = matches!(state, FileState::Waiting(_));
            self.now(&source.name, state);
            match watched.changed_within(file::EVERY).await {
                file::Seen::Same => {}
                file::Seen::Changed(text) => {
                    topology = parse(&text);
                    // One that is back as it was has not been edited.
                    (edited, due) = (edited || text != seen, true);
                }
                file::Seen::Gone => topology = Err("it cannot be read".into()),
            }
        }
    }

    fn now(&self, file: &str, state: FileState) {
        if *self.file.borrow() != state {
            file::report(file, &state);
            self.file.send_replace(state);
        }
    }

    /// How an unedited file stands: another instance may have put another document in force meanwhile, or this one back.
    fn compared(&self, topology: &Topology) -> FileState {
        match self
            .cluster
            .view()
            .document
            .difference(&topology.document())
        {
            None => FileState::InForce,
            Some(difference) => match &*self.file.borrow() {
                FileState::InForce | FileState::Older(_) => FileState::Older(difference),
                FileState::Waiting(what) => FileState::Waiting(what.clone()),
                FileState::Refused(what) => FileState::Refused(what.clone()),
            },
        }
    }

    async fn follow(&self, topology: &Topology, edited: bool) -> FileState {
        let view = self.cluster.view();
        let differs = view.document.difference(&topology.document());
        if let Some(difference) = differs
            && !edited
            && view.document.remembers(&topology.document())
        {
            // What it says was in force before: the file is old, and nobody has edited it.
            return FileState::Older(difference);
        }
        match install::propose(&self.cluster, topology).await {
            Ok(_) => FileState::InForce,
            Err(NotInForce::Refused(what)) => FileState::Refused(what),
            Err(NotInForce::Waiting(what)) => FileState::Waiting(what),
        }
    }

    async fn tell(self: Arc<Self>) {
        let mut told = None;
        loop {
            let view = self.cluster.view();
            let work = self
                .at_work
                .load(Ordering::Relaxed)
                .then(|| self.progress.report());
            self.peers.tell(&Peer {
                instance: self.instance.clone(),
                version: view.doc.version,
                phase: view.doc.phase.as_str().to_owned(),
                work: work.and_then(|report| serde_json::to_value(report).ok()),
            });
            let news = told
                .replace(view.doc.clone())
                .is_some_and(|before| before != view.doc);
            // A new document is told twice in a row: others wait for it.
            tokio::time::sleep(if news {
                LOOK_EVERY / 10
            } else {
                LOOK_EVERY / 4
            })
            .await;
        }
    }

    async fn coordinate(self: Arc<Self>) {
        let mut turn = OurTurn::default();
        let mut adopted = (self.cluster.view().doc.clone(), Instant::now());
        // Since when there has been nothing to do.
        let mut quiet = None;
        loop {
            let busy = match self.round(&mut turn, &mut adopted, &mut quiet).await {
                Ok(busy) => busy,
                Err(held_up) => {
                    tracing::debug!(held_up, "change");
                    if turn.ours() {
                        self.progress.stage(
                            self.cluster.view().doc.version,
                            "waiting",
                            Some(held_up),
                        );
                    }
                    false
                }
            };
            if !busy && self.pause().await {
                quiet = None;
            }
        }
    }

    /// Waits until it is time to look again; `true` if that is because something has happened.
    async fn pause(&self) -> bool {
        tokio::select! {
            biased;
            () = tokio::time::sleep(LOOK_EVERY) => false,
            () = self.wake.notified() => true,
            () = self.peers.news.notified() => true,
        }
    }

    /// One look at everything, and what is to be done about it. `true` if there may be more to do at once.
    async fn round(
        &self,
        turn: &mut OurTurn,
        adopted: &mut (crate::store::DocRef, Instant),
        quiet: &mut Option<Instant>,
    ) -> Result<bool, String> {
        install::catch_up(&self.cluster)
            .await
            .map_err(|e| e.to_string())?;
        let view = self.cluster.view();
        if adopted.0 != view.doc {
            *adopted = (view.doc.clone(), Instant::now());
            *quiet = None;
            self.cluster.refresh().await;
        }
        let ours = turn.take(&view).await;
        self.at_work.store(ours, Ordering::Relaxed);
        if !ours {
            *quiet = None;
            return Ok(false);
        }
        // Only whoever has the turn changes rows, and a document is what gives reason to.
        if quiet.is_some_and(|since| since.elapsed() < QUIET_LOOK) {
            return Ok(false);
        }
        let (rows, silent) = read_rows(&view).await;
        if view.doc.phase == Phase::Adjudicate {
            self.progress.stage(view.doc.version, "judging", None);
            if let Some(name) = silent.first() {
                return Err(format!(
                    "{name} must answer, or be declared down too, before slots can be judged"
                ));
            }
            let done = judge::judge(&view, &rows)
                .await
                .map_err(|e| e.to_string())?;
            if done {
                install::advance(&self.cluster, &view, Phase::Normal)
                    .await
                    .map_err(|e| e.to_string())?;
            }
            self.cluster.refresh().await;
            return Ok(true);
        }
        if view.doc.phase != Phase::Normal {
            return Ok(false);
        }
        if !self.peers.all_have(view.doc.version, view.doc.phase)
            && adopted.1.elapsed() < PEERS_LIMIT
        {
            self.progress.stage(
                view.doc.version,
                "waiting",
                Some("other instances have not seen the document yet".into()),
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
            return Ok(true);
        }
        let mut busy = self.settle(&view, &rows).await;
        if view.document.paused {
            self.progress.stage(view.doc.version, "paused", None);
            return Ok(false);
        }
        busy |= self.merge(&view, &rows).await;
        busy |= self.move_slots(&view, &rows).await;
        busy |= self.purge(&view, &rows).await;
        if !busy {
            let waiting = silent.first().map(|name| format!("{name} does not answer"));
            let report = self.progress.report();
            let to_do = report.slots_left > 0;
            let done = !to_do && report.slots_to_merge == 0 && silent.is_empty();
            *quiet = done.then(Instant::now);
            self.progress.stage(
                view.doc.version,
                if to_do { "waiting" } else { "idle" },
                waiting.filter(|_| to_do),
            );
        }
        Ok(busy)
    }

    fn pace(&self) -> Pace {
        Pace {
            freeze: Duration::from_millis(self.settings.freeze_ms),
            purge_after: Duration::from_millis(self.settings.purge_after_ms),
            throttle: self.settings.throttle,
        }
    }

    fn a_move(&self, view: &View, slot: Slot, from: &Shard, to: &Shard) -> Move {
        Move {
            doc: view.doc.clone(),
            slot,
            from: from.clone(),
            to: to.clone(),
            pace: self.pace(),
        }
    }

    /// What others left half done: sealed slots are decided by evidence, copies that nobody needs are cancelled.
    async fn settle(&self, view: &View, rows: &Rows) -> bool {
        let mut busy = false;
        for (name, of_shard) in rows {
            let Some(shard) = view.shard(name) else {
                continue;
            };
            for (slot, row) in Slot::all().zip(of_shard) {
                let peer = row.peer.as_deref().and_then(|peer| view.shard(peer));
                let settled = match (row.state, peer) {
                    (SlotState::Sealed, Some(to)) => {
                        self.progress.stage(view.doc.version, "moving", None);
                        let settled = self.a_move(view, slot, shard, to).settle(row).await;
                        tracing::info!(%slot, from = name, to = to.name(), outcome = ?settled.as_ref().ok(), "a slot was found sealed");
                        settled.map(|_| true)
                    }
                    (SlotState::Incoming, from) => {
                        // A copy that somebody began and nobody goes on with: its source may have changed hands since.
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
        view: &View,
        slot: Slot,
        shard: &Shard,
        row: &SlotRow,
        from: String,
    ) -> Result<bool, NotMoved> {
        take(
            shard,
            &view.doc,
            slot,
            &Step::Cancel {
                from,
                term: row.term,
            },
        )
        .await?;
        Ok(true)
    }

    /// Brings back what shards that returned alone hold, and notes at the owners who has nothing of theirs any more.
    async fn merge(&self, view: &View, rows: &Rows) -> bool {
        let mut fenced = Vec::new();
        for (name, of_shard) in rows {
            for (slot, row) in Slot::all().zip(of_shard) {
                if row.state == SlotState::Fenced {
                    fenced.push((name, slot, row));
                }
            }
        }
        if !fenced.is_empty() {
            self.progress.stage(view.doc.version, "merging", None);
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
                match merge::merge(&view.doc, slot, &from, &row, &owner, self.pace()).await {
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
        let merged = merged
            .fold(false, |any, merged| std::future::ready(any | merged))
            .await;

        let mut noted = Vec::new();
        for slot in Slot::all() {
            let Some((owner, row)) = owner_of(view, rows, slot) else {
                continue;
            };
            for name in row.history.missing.iter().chain(&row.history.forgotten) {
                let member = view.document.shards.get(name);
                let given_up =
                    member.is_none_or(|member| member.state == ShardState::Down && member.forget);
                let merged = rows
                    .get(name)
                    .is_some_and(|rows| rows[slot.index()].state != SlotState::Fenced);
                let shard = name.clone();
                if merged {
                    noted.push((slot, owner.clone(), Step::Heal { shard }));
                } else if given_up && row.history.missing.contains(name) {
                    noted.push((slot, owner.clone(), Step::Forget { shard }));
                }
            }
        }
        let healed = futures_util::stream::iter(noted)
            .map(|(slot, owner, step)| async move {
                let taken = take(&owner, &view.doc, slot, &step).await;
                if let Err(e) = &taken {
                    tracing::debug!(%slot, reason = %e, "not {} yet", step.name());
                }
                taken.is_ok()
            })
            .buffer_unordered(judge::AT_ONCE);
        let healed = healed
            .fold(false, |any, healed| std::future::ready(any | healed))
            .await;
        merged || healed
    }

    /// Moves slots that are owned elsewhere than wanted, a few at once.
    async fn move_slots(&self, view: &View, rows: &Rows) -> bool {
        let mut by_pair = BTreeMap::<(String, String), Vec<Slot>>::new();
        for slot in Slot::all() {
            let Some((owner, _)) = owner_of(view, rows, slot) else {
                continue;
            };
            let fenced = rows
                .values()
                .any(|rows| rows[slot.index()].state == SlotState::Fenced);
            if owner.name() != view.wanted(slot) && !fenced {
                by_pair
                    .entry((owner.name().to_owned(), view.wanted(slot).to_owned()))
                    .or_default()
                    .push(slot);
            }
        }
        let name = |(from, to): &(String, String)| format!("{from} -> {to}");
        if !by_pair.is_empty() {
            self.progress.stage(view.doc.version, "moving", None);
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
        let moved = futures_util::stream::iter(moves)
            .map(|(pair, a_move)| async move {
                let _lane = lanes.enter(&[&a_move.from, &a_move.to]).await;
                if self.cluster.view().doc != a_move.doc {
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
                    Err(NotMoved::Leftovers) => false,
                    Err(e) => {
                        self.progress.failed();
                        tracing::info!(slot = %a_move.slot, pair, reason = %e, "not moved yet");
                        // What failed at once would fail again at once.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        false
                    }
                }
            })
            .buffer_unordered(self.settings.slots_at_once.max(1));
        moved
            .fold(false, |any, moved| std::future::ready(any | moved))
            .await
    }

    /// Deletes what slots left behind when they went, after a while.
    async fn purge(&self, view: &View, rows: &Rows) -> bool {
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
                    // It does not hurry: to look at all rows again and again is felt.
                    if self.pace().strain(&[shard]) > 0.0 {
                        self.pause().await;
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

/// All rows of the shards that answer, as evidence under the view's document, and the names of those that do not.
async fn read_rows(view: &View) -> (Rows, Vec<String>) {
    let mut rows = Rows::new();
    let mut silent: Vec<String> = view.strangers().map(str::to_owned).collect();
    // One after the other: to take so many rows apart is felt by those who share the thread.
    for shard in &view.shards {
        let doc = view.doc.clone();
        let of_shard = shard
            .ask(
                move |store, identity| async move { store.rows(&identity, Some(&doc), None).await },
            )
            .await;
        match of_shard {
            Ok(of_shard) if of_shard.len() == crate::ring::SLOTS => {
                drop(rows.insert(shard.name().to_owned(), of_shard))
            }
            Ok(_) | Err(_) => silent.push(shard.name().to_owned()),
        }
    }
    (rows, silent)
}

/// The turn to carry documents out, kept at the first shard that answers.
#[derive(Default)]
struct OurTurn {
    held: Option<(String, Arc<AtomicBool>, AbortOnDropHandle<()>)>,
}

/// Between two signs of life to the shard that keeps the turn.
const KEEP_EVERY: Duration = Duration::from_secs(1);

impl OurTurn {
    fn ours(&self) -> bool {
        self.held
            .as_ref()
            .is_some_and(|(_, alive, _)| alive.load(Ordering::Relaxed))
    }

    /// Takes the turn, or goes on having it.
    async fn take(&mut self, view: &View) -> bool {
        let Some(shard) = view.shards.iter().find(|shard| !shard.is_down()) else {
            self.held = None;
            return false;
        };
        if self.ours()
            && self
                .held
                .as_ref()
                .is_some_and(|(name, ..)| name == shard.name())
        {
            return true;
        }
        self.held = None;
        if let Ok(Some(turn)) = shard
            .ask(|store, _| async move { store.take_turn().await })
            .await
        {
            let alive = Arc::new(AtomicBool::new(true));
            let keeper = tokio::spawn(keep(turn, alive.clone()));
            self.held = Some((
                shard.name().to_owned(),
                alive,
                AbortOnDropHandle::new(keeper),
            ));
        }
        self.ours()
    }
}

async fn keep(mut turn: Box<dyn Turn>, alive: Arc<AtomicBool>) {
    while turn.keep().await.is_ok() {
        tokio::time::sleep(KEEP_EVERY).await;
    }
    alive.store(false, Ordering::Relaxed);
}
