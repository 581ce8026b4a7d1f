//! The start: databases that are empty become the shards of a new service, all others are checked
//! to be the shards of this one.

use crate::config;
use crate::domain::ring::ALGORITHM;
use crate::domain::shards_file::{DeclaredState, ShardsFile, StoreUrl};
use crate::domain::slot::{SLOTS, Slot, SlotSet};
use crate::domain::topology::{Phase, Topology, TopologyRef};
use crate::rng;
use crate::store::{Database, Meta, MysqlStore, SqliteStore, StoreError};
use futures_util::future::join_all;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;

/// Why the shards could not be taken into service. Each is one line: what is wrong, where, and how
/// to fix it.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// It may pass by itself.
    #[error("{0}")]
    Wait(String),
    /// An operator must act first.
    #[error("{0}")]
    Fatal(String),
}

fn fatal<T>(reason: String) -> Result<T, StartError> {
    Err(StartError::Fatal(reason))
}

/// What happens if all databases are empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfEmpty {
    /// They become the shards of a new service.
    Initialize,
    /// It is an error; for commands that only read.
    Fail,
}

/// Makes a store for a shard's name and URL; opens no connection yet.
pub type StoreFactory =
    Arc<dyn Fn(&str, &StoreUrl) -> Result<Arc<dyn Database>, StartError> + Send + Sync>;

/// The factory of real stores, with connections on `runtime`.
#[must_use]
pub fn stores(settings: &config::Store, runtime: &Handle) -> StoreFactory {
    let (settings, runtime) = (settings.clone(), runtime.clone());
    Arc::new(move |name, url| {
        Ok(match url {
            StoreUrl::Mysql(url) => Arc::new(
                MysqlStore::new(url, &settings, runtime.clone())
                    .map_err(|e| StartError::Fatal(format!("{name}: {e}")))?,
            ),
            StoreUrl::Sqlite(path) => Arc::new(SqliteStore::new(path, &settings, runtime.clone())),
        })
    })
}

/// How often the databases are read at least before an error is believed, and the pause after the
/// first time. Another instance may be initializing them meanwhile.
const LOOKS: u32 = 4;
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The stores of the shards, by name.
pub(super) type Stores = BTreeMap<String, Arc<dyn Database>>;

/// A service whose shards are known, and the stores of those in the file.
pub(super) struct Started {
    pub topology_ref: TopologyRef,
    pub topology: Topology,
    pub cluster_id: String,
    pub stores: BTreeMap<String, Opened>,
}

/// The store of a shard in the file.
pub(super) struct Opened {
    pub store: Arc<dyn Database>,
    /// Warnings about the server's settings, or why it does not answer.
    pub answer: Result<Vec<String>, StoreError>,
}

/// Initializes the shards of a file, or checks that they are what they are expected to be.
///
/// # Errors
/// `Wait` while a database that is needed does not answer, `Fatal` for what must be fixed first.
pub(super) async fn start(
    file: &ShardsFile,
    open: &StoreFactory,
    if_empty: IfEmpty,
    runtime: &Handle,
) -> Result<Started, StartError> {
    let mut stores = Stores::new();
    for (name, shard) in &file.shards {
        stores.insert(name.clone(), open(name, &shard.url)?);
    }
    let (mut error, mut looks) = (None, 0);
    let (seen, service) = loop {
        let seen = look_at_all(&stores, if_empty, runtime).await;
        let service = identify(file, &seen);
        let now = service.as_ref().err().map(ToString::to_string);
        looks += 1;
        if now.is_none() || (looks >= LOOKS && now == error) || looks == 3 * LOOKS {
            break (seen, service?);
        }
        error = now;
        tokio::time::sleep(LOOK_AGAIN * looks.min(LOOKS)).await;
    };
    let answers = seen.into_values();
    let answers: Vec<_> = answers.map(|seen| seen.map(|seen| seen.warnings)).collect();
    let (topology_ref, topology, cluster_id) = match service {
        Service::Existing {
            topology_ref,
            topology,
            cluster_id,
        } => (topology_ref, topology, cluster_id),
        Service::New { .. } if if_empty == IfEmpty::Fail => {
            return fatal(
                "these databases are empty; start the server once to initialize them".into(),
            );
        }
        Service::New {
            topology,
            cluster_id,
        } => {
            let cluster_id = initialize_all(&stores, &topology, cluster_id, runtime).await?;
            let topology_ref = TopologyRef {
                version: 1,
                phase: Phase::Normal,
                hash: topology.hash(),
            };
            (topology_ref, topology, cluster_id)
        }
    };
    let stores = stores.into_iter().zip(answers);
    Ok(Started {
        topology_ref,
        topology,
        cluster_id,
        stores: stores
            .map(|((name, store), answer)| (name, Opened { store, answer }))
            .collect(),
    })
}

/// The answer of one database at the start.
struct Seen {
    meta: Option<Meta>,
    warnings: Vec<String>,
}

async fn look_at_all(
    stores: &Stores,
    if_empty: IfEmpty,
    runtime: &Handle,
) -> BTreeMap<String, Result<Seen, StoreError>> {
    let looks = stores.iter().map(|(name, store)| {
        let store = store.clone();
        let look = on(runtime, async move { look(&*store, if_empty).await });
        async move { (name.clone(), look.await) }
    });
    join_all(looks).await.into_iter().collect()
}

async fn look(store: &dyn Database, if_empty: IfEmpty) -> Result<Seen, StoreError> {
    store.ping().await?;
    if if_empty == IfEmpty::Initialize {
        store.migrate().await?;
    }
    Ok(Seen {
        meta: store.meta().await?,
        warnings: store.warnings().await?,
    })
}

/// Runs a call on the database runtime.
pub(super) async fn on<T: Send + 'static>(
    runtime: &Handle,
    call: impl Future<Output = Result<T, StoreError>> + Send + 'static,
) -> Result<T, StoreError> {
    let result = runtime.spawn(call).await;
    result.unwrap_or_else(|e| Err(StoreError::Refused(format!("the call failed: {e}"))))
}

/// The service that the databases belong to.
enum Service {
    /// It was initialized before.
    Existing {
        topology_ref: TopologyRef,
        topology: Topology,
        cluster_id: String,
    },
    /// The databases are empty, or an initialization was not finished.
    New {
        topology: Topology,
        cluster_id: String,
    },
}

fn identify(
    file: &ShardsFile,
    seen: &BTreeMap<String, Result<Seen, StoreError>>,
) -> Result<Service, StartError> {
    let mut metas = Vec::<(&str, &Meta)>::new();
    let (mut empty, mut unreachable) = (Vec::new(), Vec::new());
    for (name, seen) in seen {
        match seen {
            Ok(Seen {
                meta: Some(meta), ..
            }) => metas.push((name, meta)),
            Ok(Seen { meta: None, .. }) => empty.push(name.as_str()),
            Err(StoreError::Refused(reason)) => return fatal(format!("{name}: {reason}")),
            Err(e) => unreachable.push(format!("{name} did not answer ({e})")),
        }
    }
    check_identities(&metas)?;
    let all = metas.iter().map(|(_, meta)| *meta);
    let newest = all.max_by_key(|meta| (meta.topology_version, meta.topology_phase));
    match newest {
        Some(meta) if meta.topology_phase > Phase::Initializing => existing(meta, &empty),
        // A shard that does not answer may belong to an existing service: only all of them together
        // are a new one.
        _ if !unreachable.is_empty() => Err(StartError::Wait(format!(
            "cannot start: {}, and the identity of every shard must be checked first",
            unreachable.join(", ")
        ))),
        Some(meta) => {
            let topology = read_topology(meta)?;
            if let Some(difference) = topology.difference(&file.topology()) {
                return fatal(format!(
                    "initialization was started with a different shards.toml: now {difference}"
                ));
            }
            Ok(Service::New {
                topology,
                cluster_id: meta.cluster_id.clone(),
            })
        }
        None => {
            let mut shards = file.shards.iter();
            if let Some((name, _)) = shards.find(|(_, shard)| shard.state == DeclaredState::Down) {
                return fatal(format!(
                    "{name} is down in shards.toml, but a new service needs all its shards"
                ));
            }
            Ok(Service::New {
                topology: file.topology(),
                cluster_id: format!("{:032x}", rng::number()),
            })
        }
    }
}

/// Every database must be the shard that the file names, of one service, placed by this algorithm.
fn check_identities(metas: &[(&str, &Meta)]) -> Result<(), StartError> {
    for (name, meta) in metas {
        if meta.shard_name != *name {
            return fatal(format!(
                "the url of {name} leads to the database of {}; every shard needs its own",
                meta.shard_name
            ));
        }
        if meta.slot_algorithm != ALGORITHM {
            return fatal(format!(
                "{name} places dialogs by '{}', this version by '{ALGORITHM}'",
                meta.slot_algorithm
            ));
        }
        let (first, of_first) = metas[0];
        if meta.cluster_id != of_first.cluster_id {
            return fatal(format!(
                "{name} belongs to another service than {first}; its url leads to a foreign database"
            ));
        }
    }
    Ok(())
}

fn existing(newest: &Meta, empty: &[&str]) -> Result<Service, StartError> {
    let topology = read_topology(newest)?;
    let wiped = empty.iter();
    if let Some(name) = wiped
        .copied()
        .find(|name| topology.shards.contains_key(*name))
    {
        return fatal(format!(
            "the database of {name} is empty, but it is a shard of this service: it was wiped, or its url leads to another"
        ));
    }
    Ok(Service::Existing {
        topology_ref: newest.topology_ref(),
        topology,
        cluster_id: newest.cluster_id.clone(),
    })
}

fn read_topology(meta: &Meta) -> Result<Topology, StartError> {
    let topology = meta.topology();
    topology.map_err(|e| StartError::Fatal(format!("{}: {e}", meta.shard_name)))
}

/// Initializes every shard in name order, then advances all of them to the normal phase. If
/// instances do so at the same time, the first shard decides between them. If one dies halfway, the
/// next to start finishes it. Returns the id of the service.
async fn initialize_all(
    stores: &Stores,
    topology: &Topology,
    mut cluster_id: String,
    runtime: &Handle,
) -> Result<String, StartError> {
    let placement = topology
        .placement()
        .ok_or_else(|| StartError::Fatal("no active shard".into()))?;
    for (name, store) in stores {
        let mut owned = SlotSet::empty();
        for slot in Slot::all().filter(|slot| placement.target(*slot) == name) {
            owned.insert(slot);
        }
        let meta = Meta {
            cluster_id: cluster_id.clone(),
            shard_name: name.clone(),
            slot_algorithm: ALGORITHM.to_owned(),
            topology_version: 1,
            topology_phase: Phase::Initializing,
            topology_hash: topology.hash(),
            topology: topology.to_json(),
        };
        let (store, ours) = (store.clone(), meta.clone());
        let there = on(
            runtime,
            async move { store.initialize(&ours, &owned).await },
        );
        let there = there.await.map_err(|e| wait(name, &e))?;
        if there.shard_name != *name {
            return fatal(format!(
                "the urls of {name} and {} lead to one database; every shard needs its own",
                there.shard_name
            ));
        }
        if there.topology_version != 1 || there.topology_hash != meta.topology_hash {
            return fatal(
                "another instance initializes this service with a different shards.toml; give both the same"
                    .into(),
            );
        }
        if there.cluster_id != cluster_id {
            if stores.keys().next() != Some(name) {
                return fatal(format!(
                    "{name} belongs to another service; its url leads to a foreign database"
                ));
            }
            cluster_id = there.cluster_id;
        }
    }
    for (name, store) in stores {
        let (store, hash) = (store.clone(), topology.hash());
        let advanced = on(runtime, async move {
            store.advance(1, &hash, Phase::Normal).await
        });
        advanced.await.map_err(|e| wait(name, &e))?;
    }
    tracing::info!(
        shards = stores.len(),
        slots = SLOTS,
        "initialized a new service"
    );
    Ok(cluster_id)
}

fn wait(name: &str, e: &StoreError) -> StartError {
    StartError::Wait(format!("{name}: {e}"))
}
