//! What an edit would do, worked out before anything moves.

use crate::cluster::{Cluster, TopologyView};
use crate::domain::shards_file::ShardsFile;
use crate::domain::slot::{SLOTS, Slot};
use crate::domain::topology::Remaining;
use crate::store::SlotSize;
use futures_util::future::join_all;
use serde::Serialize;
use std::collections::BTreeMap;

/// What goes from one shard to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Amount {
    /// Slots.
    pub slots: u64,
    /// Dialogs in them.
    pub dialogs: u64,
    /// Messages in those.
    pub messages: u64,
    /// Bytes of their texts.
    pub bytes: u64,
}

impl Amount {
    fn add(&mut self, size: SlotSize) {
        self.slots += 1;
        self.dialogs += size.dialogs;
        self.messages += size.messages;
        self.bytes += size.bytes;
    }
}

/// What an edit would do.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// In one line, what is different; `None` if nothing is.
    pub difference: Option<String>,
    /// What would have to move, by `from` and `to`.
    pub moves: Vec<(String, String, Amount)>,
    /// Messages by shard, before and after.
    pub shares: BTreeMap<String, (u64, u64)>,
    /// Slots of shards that are declared down by it, which others would claim without their
    /// history.
    pub claimed: u64,
    /// Shards that do not answer: its rows are not counted.
    pub silent: Vec<String>,
    /// Seconds it may take, at [`RATE`] messages and [`SLOT_RATE`] slots a second.
    pub seconds: f64,
}

/// Messages a second that a move copies, as an estimate.
pub const RATE: f64 = 5_000.0;

/// Slots a second that move, as an estimate.
pub const SLOT_RATE: f64 = 40.0;

/// Works out what `file` would do.
///
/// # Errors
/// One line that says what is wrong with it.
pub async fn plan(cluster: &Cluster, file: &ShardsFile) -> Result<Plan, String> {
    let view = cluster.view();
    let difference = view.topology.difference(&file.topology());
    let (sizes, silent) = slot_sizes(&view).await;
    cluster.refresh().await;
    let slots_of = |name: &str| {
        let owned = |slot: &Slot| cluster.known_owner(*slot).is_some_and(|o| o.name() == name);
        Slot::all().filter(owned).count()
    };
    let remaining = |name: &str| match sizes.get(name) {
        Some(sizes) => Remaining::Slots {
            slots: slots_of(name),
            with_rows: sizes.len(),
        },
        None => Remaining::Unknown("it does not answer".into()),
    };
    let (next, _) = view
        .topology
        .next(file, view.topology_ref.phase, &remaining)
        .map_err(|e| e.to_string())?;
    let placement = next.placement().ok_or("no active shard")?;
    let mut moves = BTreeMap::<(String, String), Amount>::new();
    let mut shares: BTreeMap<String, (u64, u64)> = next
        .shards
        .keys()
        .map(|name| (name.clone(), (0, 0)))
        .collect();
    let mut claimed = 0;
    for slot in Slot::all() {
        let Some(owner) = cluster.known_owner(slot) else {
            claimed += 1;
            continue;
        };
        let (owner, target) = (owner.name(), placement.target(slot));
        let size = sizes.get(owner).and_then(|sizes| sizes.get(&slot));
        let size = size.copied().unwrap_or_default();
        shares.entry(owner.to_owned()).or_default().0 += size.messages;
        if next.down().any(|name| name == owner) {
            claimed += 1;
            continue;
        }
        shares.entry(target.to_owned()).or_default().1 += size.messages;
        if owner != target {
            let pair = (owner.to_owned(), target.to_owned());
            moves.entry(pair).or_default().add(size);
        }
    }
    Ok(Plan {
        difference,
        seconds: seconds(moves.values()),
        moves: moves
            .into_iter()
            .map(|((from, to), amount)| (from, to, amount))
            .collect(),
        shares,
        claimed,
        silent,
    })
}

/// The sizes of the slots of each shard that answers, and the names of the others.
async fn slot_sizes(
    view: &TopologyView,
) -> (BTreeMap<String, BTreeMap<Slot, SlotSize>>, Vec<String>) {
    let reads = view.shards.iter();
    let reads = reads.map(|shard| async move { (shard.name(), shard.sizes().await.ok()) });
    let mut silent: Vec<String> = view.unconfigured().map(str::to_owned).collect();
    let mut sizes = BTreeMap::new();
    for (name, of_shard) in join_all(reads).await {
        match of_shard {
            Some(of_shard) => drop(sizes.insert(name.to_owned(), of_shard)),
            None => silent.push(name.to_owned()),
        }
    }
    (sizes, silent)
}

/// The estimated duration of these moves, in seconds: by slots or by messages, whichever takes
/// longer.
fn seconds<'a>(moves: impl Iterator<Item = &'a Amount>) -> f64 {
    let (slots, messages) = moves.fold((0, 0), |(slots, messages), amount| {
        (slots + amount.slots, messages + amount.messages)
    });
    debug_assert!(slots <= SLOTS as u64);
    (slots as f64 / SLOT_RATE).max(messages as f64 / RATE)
}
