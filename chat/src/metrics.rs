//! The metrics, under their names in Prometheus. Every gauge and counter is created here and handed
//! to the module that sets it.

use chat_wire::{Close, ErrorCode};
use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::{MetricType, TypedMetric};
use prometheus_client::registry::{Metric, Registry};
use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::runtime::RuntimeMetrics;

/// The label of metrics per shard.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ShardLabel {
    shard: String,
}

impl ShardLabel {
    fn of(name: &str) -> Self {
        Self {
            shard: name.to_owned(),
        }
    }
}

/// The labels of batches that needed another round trip.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct MismatchLabel {
    shard: String,
    mismatch: &'static str,
}

/// The label of errors.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CodeLabel {
    code: &'static str,
}

/// The label of closed sessions.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabel {
    reason: &'static str,
}

/// A histogram of durations on the path of every message: it has only counters, where that of the
/// library holds a lock.
#[derive(Clone, Debug)]
pub struct Latency {
    inner: Arc<LatencyInner>,
}

#[derive(Debug)]
struct LatencyInner {
    /// One for each bound of [`Latency::bounds`], and one for all above.
    buckets: [AtomicU64; Latency::BUCKETS + 1],
    sum_micros: AtomicU64,
}

impl Latency {
    const BUCKETS: usize = 16;

    /// Upper bounds in microseconds, from 0.5 ms on, each twice the one before.
    fn bounds() -> impl Iterator<Item = u64> {
        (0..Self::BUCKETS).map(|n| 500 << n)
    }

    /// Counts one.
    pub fn observe(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = Self::bounds().position(|bound| micros <= bound);
        self.inner.buckets[bucket.unwrap_or(Self::BUCKETS)].fetch_add(1, Ordering::Relaxed);
        self.inner.sum_micros.fetch_add(micros, Ordering::Relaxed);
    }
}

impl Default for Latency {
    fn default() -> Self {
        let inner = LatencyInner {
            buckets: [const { AtomicU64::new(0) }; Latency::BUCKETS + 1],
            sum_micros: AtomicU64::new(0),
        };
        Self {
            inner: Arc::new(inner),
        }
    }
}

impl TypedMetric for Latency {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for Latency {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> std::fmt::Result {
        let bounds = Self::bounds()
            .map(|micros| micros as f64 / 1e6)
            .chain([f64::MAX]);
        let counts = self
            .inner
            .buckets
            .iter()
            .map(|count| count.load(Ordering::Relaxed));
        let buckets: Vec<(f64, u64)> = bounds.zip(counts).collect();
        let sum = self.inner.sum_micros.load(Ordering::Relaxed) as f64 / 1e6;
        let count = buckets.iter().map(|(_, count)| count).sum();
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

/// The time that each thread was busy, as its event loop counts it.
#[derive(Clone, Debug, Default)]
pub struct ThreadTimes(Arc<OnceLock<Vec<RuntimeMetrics>>>);

/// The label of metrics per thread.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ThreadLabel {
    thread: usize,
}

impl ThreadTimes {
    /// Counts these threads from now on; called once.
    pub fn of(&self, threads: Vec<RuntimeMetrics>) {
        let _ = self.0.set(threads);
    }
}

impl TypedMetric for ThreadTimes {
    const TYPE: MetricType = MetricType::Counter;
}

impl EncodeMetric for ThreadTimes {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> std::fmt::Result {
        for (thread, metrics) in self.0.get().into_iter().flatten().enumerate() {
            let busy = metrics.worker_total_busy_duration(0).as_secs_f64();
            encoder
                .encode_family(&ThreadLabel { thread })?
                .encode_counter::<NoLabelSet, _, f64>(&busy, None)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

/// All metrics; one for each server in a process.
pub struct Metrics {
    registry: Registry,
    /// Seconds for which each thread was busy.
    pub thread_busy_seconds: ThreadTimes,
    /// Open sessions.
    pub sessions: Gauge,
    /// Frames from clients.
    pub received_frames: Counter,
    /// Bytes of frames from clients.
    pub received_bytes: Counter,
    /// Frames to clients.
    pub sent_frames: Counter,
    /// Bytes of frames to clients.
    pub sent_bytes: Counter,
    /// Seconds from the arrival of a send to its answer.
    pub send_seconds: Latency,
    errors: Family<CodeLabel, Counter>,
    closes: Family<ReasonLabel, Counter>,
    messages_stored: Family<ShardLabel, Counter>,
    messages_repeated: Family<ShardLabel, Counter>,
    write_batch_size: Family<ShardLabel, Histogram>,
    transaction_seconds: Family<ShardLabel, Histogram>,
    write_queue_length: Family<ShardLabel, Gauge>,
    transactions_in_flight_limit: Family<ShardLabel, Gauge>,
    batches_redone: Family<MismatchLabel, Counter>,
    slots: Family<ShardLabel, Gauge>,
    circuit_open: Family<ShardLabel, Gauge>,
    circuit_opened: Family<ShardLabel, Counter>,
    /// Requests that were refused because the budget of their user was used up.
    pub requests_over_budget: Counter,
    /// Pages that were read from a shard.
    pub history_reads: Counter,
    /// Pages that shared the read of another request.
    pub history_shared: Counter,
    /// Pages that had a gap and were read again.
    pub history_gap_retries: Counter,
    /// 1 while NATS is connected.
    pub bus_connected: Gauge,
    /// Publications that were dropped: the bus had no room, or was disconnected.
    pub bus_dropped: Counter,
    /// Publications that were handed to the bus.
    pub bus_published: Counter,
    /// Publications that were received from the bus.
    pub bus_received: Counter,
    /// Messages that sessions were sent from the shards: lost on the bus, or missed while
    /// disconnected.
    pub messages_caught_up: Counter,
    /// Dialogs that a session must reload: it missed too much, or its position was wrong.
    pub resyncs: Counter,
    /// Dialogs whose last seq was compared with what sessions were sent.
    pub reconciled_dialogs: Counter,
    /// The version of the topology in effect.
    pub topology_version: Gauge,
    /// 1 while slots of shards that were declared down are being claimed.
    pub failover_in_progress: Gauge,
    /// Slots whose sends wait for their new owner.
    pub slots_buffering: Gauge,
    /// Slots that are not on their target shard.
    pub slots_to_move: Gauge,
    /// Slots that were moved.
    pub slots_moved: Counter,
    /// Messages that were copied with them.
    pub messages_moved: Counter,
    /// Attempts to move a slot that failed.
    pub moves_failed: Counter,
    /// Seconds for which a slot that moved took no writes.
    pub slot_write_pause_seconds: Latency,
}

/// The metrics of one shard.
#[derive(Clone, Default)]
pub struct ShardMetrics {
    /// 1 while the circuit breaker is open.
    pub circuit_open: Gauge,
    /// How often it opened.
    pub opened: Counter,
    /// Seconds of a transaction, from its first round trip to COMMIT. `None` where nothing is
    /// measured.
    pub transaction_seconds: Option<Histogram>,
}

/// The metrics of the writer of one shard.
#[derive(Clone)]
pub struct WriterMetrics {
    /// Messages stored.
    pub stored: Counter,
    /// Repeats answered.
    pub repeats: Counter,
    /// Messages of a transaction.
    pub batch_size: Histogram,
    /// Sends that are not settled yet.
    pub queue_length: Gauge,
    /// Transactions that may be in flight.
    pub in_flight_limit: Gauge,
    redone: Family<MismatchLabel, Counter>,
    shard: String,
}

impl WriterMetrics {
    /// Counts a batch that needs another round trip, because something was not as remembered.
    pub fn redone(&self, mismatch: &'static str) {
        let label = MismatchLabel {
            shard: self.shard.clone(),
            mismatch,
        };
        self.redone.get_or_create(&label).inc();
    }
}

/// Creates a metric and registers it.
fn metric<M: Metric + Clone + Default>(registry: &mut Registry, name: &str, help: &str) -> M {
    register(registry, name, help, M::default())
}

fn register<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}

fn batch_sizes() -> Histogram {
    Histogram::new(exponential_buckets(1.0, 2.0, 10))
}

fn transaction_times() -> Histogram {
    Histogram::new(exponential_buckets(0.0005, 2.0, 16))
}

impl Metrics {
    /// All at zero.
    #[must_use]
    #[rustfmt::skip] // one line a metric
    pub fn new() -> Arc<Self> {
        let mut registry = Registry::with_prefix("chat");
        let r = &mut registry;
        Arc::new(Self {
            thread_busy_seconds: metric(r, "thread_busy_seconds", "Busy time of each thread in seconds; thread 0 also handles the connections to databases and NATS"),
            sessions: metric(r, "sessions", "Open WebSocket sessions"),
            received_frames: metric(r, "received_frames", "Frames received from clients"),
            received_bytes: metric(r, "received_bytes", "Bytes of frames received from clients"),
            sent_frames: metric(r, "sent_frames", "Frames sent to clients"),
            sent_bytes: metric(r, "sent_bytes", "Bytes of frames sent to clients"),
            send_seconds: metric(r, "send_seconds", "Seconds from the arrival of a send to its answer"),
            errors: metric(r, "errors", "Errors sent to clients"),
            closes: metric(r, "closes", "Sessions closed by the server"),
            messages_stored: metric(r, "messages_stored", "Messages committed"),
            messages_repeated: metric(r, "messages_repeated", "Sends whose message was already stored: repeats of a key"),
            write_batch_size: register(r, "write_batch_size", "Messages of one transaction", Family::new_with_constructor(batch_sizes as fn() -> Histogram)),
            transaction_seconds: register(r, "transaction_seconds", "Seconds of one transaction", Family::new_with_constructor(transaction_times as fn() -> Histogram)),
            write_queue_length: metric(r, "write_queue_length", "Sends that are queued or in progress"),
            transactions_in_flight_limit: metric(r, "transactions_in_flight_limit", "Current adaptive limit of concurrent write transactions of this instance on a shard"),
            batches_redone: metric(r, "batches_redone", "Batches that were repeated because a cached term, last seq or key was outdated"),
            slots: metric(r, "slots", "Slots that a shard owns, as this instance knows it"),
            circuit_open: metric(r, "circuit_open", "1 while the circuit breaker of a shard is open"),
            circuit_opened: metric(r, "circuit_opened", "Times the circuit breaker of a shard opened"),
            requests_over_budget: metric(r, "requests_over_budget", "Requests refused because the budget of their user was used up"),
            history_reads: metric(r, "history_reads", "Pages read from a shard"),
            history_shared: metric(r, "history_shared", "Pages that shared the read of another request"),
            history_gap_retries: metric(r, "history_gap_retries", "Pages that were read again because seqs were missing unexpectedly; pages with `gap` do not count"),
            bus_connected: metric(r, "bus_connected", "1 while NATS is connected; 0 without NATS"),
            bus_dropped: metric(r, "bus_dropped", "Publications dropped because the bus had no room or was disconnected"),
            bus_published: metric(r, "bus_published", "Publications handed to the bus"),
            bus_received: metric(r, "bus_received", "Publications received from the bus"),
            messages_caught_up: metric(r, "messages_caught_up", "Messages that sessions were sent from the shards, because their events were lost or missed"),
            resyncs: metric(r, "resyncs", "Dialogs that were reported to clients in `resync`"),
            reconciled_dialogs: metric(r, "reconciled_dialogs", "Dialogs that were compared with the shards after events may have been lost"),
            topology_version: metric(r, "topology_version", "Version of the topology in effect"),
            failover_in_progress: metric(r, "failover_in_progress", "1 while slots of shards that were declared down are being claimed"),
            slots_buffering: metric(r, "slots_buffering", "Slots that are handed over and whose sends are queued on this instance"),
            slots_to_move: metric(r, "slots_to_move", "Slots that are not on their target shard, as the coordinator sees it"),
            slots_moved: metric(r, "slots_moved", "Slots moved by this instance"),
            messages_moved: metric(r, "messages_moved", "Messages copied by this instance while moving slots"),
            moves_failed: metric(r, "moves_failed", "Attempts to move a slot that failed"),
            slot_write_pause_seconds: metric(r, "slot_write_pause_seconds", "Seconds for which a slot that moved took no writes"),
            registry,
        })
    }

    /// Counts an error that a client was sent.
    pub fn error(&self, code: ErrorCode) {
        self.errors
            .get_or_create(&CodeLabel {
                code: code.as_str(),
            })
            .inc();
    }

    /// Counts a session that the server closed.
    pub fn close(&self, close: Close) {
        self.closes
            .get_or_create(&ReasonLabel {
                reason: close.reason(),
            })
            .inc();
    }

    /// The metrics of a shard.
    #[must_use]
    pub fn shard(&self, name: &str) -> ShardMetrics {
        let label = ShardLabel::of(name);
        ShardMetrics {
            circuit_open: self.circuit_open.get_or_create_owned(&label),
            opened: self.circuit_opened.get_or_create_owned(&label),
            transaction_seconds: Some(self.transaction_seconds.get_or_create_owned(&label)),
        }
    }

    /// The metrics of the writer of a shard.
    #[must_use]
    pub fn writer(&self, name: &str) -> WriterMetrics {
        let label = ShardLabel::of(name);
        WriterMetrics {
            stored: self.messages_stored.get_or_create_owned(&label),
            repeats: self.messages_repeated.get_or_create_owned(&label),
            batch_size: self.write_batch_size.get_or_create_owned(&label),
            queue_length: self.write_queue_length.get_or_create_owned(&label),
            in_flight_limit: self
                .transactions_in_flight_limit
                .get_or_create_owned(&label),
            redone: self.batches_redone.clone(),
            shard: name.to_owned(),
        }
    }

    /// The number of slots of a shard.
    #[must_use]
    pub fn slots(&self, name: &str) -> Gauge {
        self.slots.get_or_create_owned(&ShardLabel::of(name))
    }

    /// All metrics in the format OpenMetrics.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry);
        text
    }

    /// All metrics in the older text format of Prometheus (0.0.4). It differs in the names of
    /// counters, and has neither units nor a mark at the end.
    #[must_use]
    pub fn encode_prometheus(&self) -> String {
        let openmetrics = self.encode();
        let counters: HashSet<&str> = openmetrics
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"))
            .collect();
        let mut text = String::with_capacity(openmetrics.len());
        for line in openmetrics.lines() {
            match line.splitn(4, ' ').collect::<Vec<_>>()[..] {
                ["#", "UNIT", ..] | ["#", "EOF"] => continue,
                ["#", kind, name, rest] if counters.contains(name) => {
                    text.extend(["# ", kind, " ", name, "_total ", rest]);
                }
                _ => text.push_str(line),
            }
            text.push('\n');
        }
        text
    }
}
