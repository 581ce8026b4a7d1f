//! What is measured, under the names that Prometheus reads. Every gauge and counter is made here and handed to its owner.

use crate::store::Unlike;
use chat_wire::{Close, ErrorCode};
use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::{MetricType, TypedMetric};
use prometheus_client::registry::Registry;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The label of what is counted per shard.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ShardLabel {
    shard: String,
}

/// The labels of batches that were not as they were remembered.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct UnlikeLabel {
    shard: String,
    unlike: &'static str,
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

/// A histogram of durations that every message passes: counters only, where the library's holds a lock.
#[derive(Clone, Debug)]
pub struct Latency {
    inner: Arc<LatencyInner>,
}

#[derive(Debug)]
struct LatencyInner {
    /// One for each bound of [`Latency::bounds`], and one for what lies above.
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

/// Everything that is measured; one for each server in a process.
pub struct Metrics {
    registry: Registry,
    /// Open sessions.
    pub sessions: Gauge,
    /// Frames from clients.
    pub frames_in: Counter,
    /// Bytes of those.
    pub bytes_in: Counter,
    /// Frames to clients.
    pub frames_out: Counter,
    /// Bytes of those.
    pub bytes_out: Counter,
    /// Seconds from a send's arrival to its answer.
    pub send_seconds: Latency,
    /// Errors told to clients.
    errors: Family<CodeLabel, Counter>,
    /// Sessions closed by the server.
    closes: Family<ReasonLabel, Counter>,
    /// Messages that were stored.
    stored: Family<ShardLabel, Counter>,
    /// Sends that turned out to be repeats.
    repeats: Family<ShardLabel, Counter>,
    batch_rows: Family<ShardLabel, Histogram>,
    batch_seconds: Family<ShardLabel, Histogram>,
    queue_rows: Family<ShardLabel, Gauge>,
    in_flight: Family<ShardLabel, Gauge>,
    drafts_unlike: Family<UnlikeLabel, Counter>,
    slots: Family<ShardLabel, Gauge>,
    circuit_open: Family<ShardLabel, Gauge>,
    circuit_opened: Family<ShardLabel, Counter>,
    /// Requests that were refused because their user had nothing left of the budget.
    pub over_budget: Counter,
    /// Pages that were read from a shard.
    pub history_reads: Counter,
    /// Pages that shared the read of another.
    pub history_shared: Counter,
    /// Pages that did not add up and were read again.
    pub history_torn: Counter,
    /// 1 while the bus is connected.
    pub bus_connected: Gauge,
    /// Publications that the bus had no room or no connection for.
    pub bus_dropped: Counter,
    /// Publications that were handed to the bus.
    pub bus_published: Counter,
    /// What came from the bus.
    pub bus_received: Counter,
    /// Messages that sessions were sent from the shards, because they were lost on the way or while away.
    pub caught_up: Counter,
    /// Dialogs whose session was told to read the history: too much was missed, or the position was none.
    pub resyncs: Counter,
    /// Dialogs whose heads were compared with what sessions were sent.
    pub heads_compared: Counter,
    /// The version of the document in force.
    pub document_version: Gauge,
    /// Slots that are not where they are wanted.
    pub slots_to_move: Gauge,
    /// Slots that were moved.
    pub slots_moved: Counter,
    /// Messages that were copied on the way.
    pub messages_moved: Counter,
    /// Attempts to move a slot that were given up.
    pub moves_failed: Counter,
    /// Seconds for which a slot that moved took no writes.
    pub freeze_seconds: Latency,
    /// Slots whose sends wait for their new owner.
    pub slots_parked: Gauge,
    /// 1 while slots of shards that were declared down are being judged.
    pub adjudicating: Gauge,
}

/// What the writer of one shard reports.
#[derive(Clone)]
pub struct WriterMetrics {
    /// Messages stored.
    pub stored: Counter,
    /// Repeats answered.
    pub repeats: Counter,
    /// Messages a transaction.
    pub batch_rows: Histogram,
    /// Sends that are not settled yet.
    pub queue_rows: Gauge,
    /// Transactions that may be in flight.
    pub in_flight: Gauge,
    /// Batches that had to be worked out anew, because something was not as it was remembered.
    drafts_unlike: Family<UnlikeLabel, Counter>,
    shard: String,
}

impl WriterMetrics {
    /// Counts a batch that has to be worked out anew.
    pub fn drafts_unlike(&self, unlike: Unlike) {
        let label = UnlikeLabel {
            shard: self.shard.clone(),
            unlike: match unlike {
                Unlike::Term => "term",
                Unlike::Head => "head",
                Unlike::Key => "key",
            },
        };
        self.drafts_unlike.get_or_create(&label).inc();
    }
}

impl Metrics {
    /// All at zero.
    #[must_use]
    pub fn new() -> Arc<Self> {
        let metrics = Self {
            registry: Registry::with_prefix("chat"),
            sessions: Gauge::default(),
            frames_in: Counter::default(),
            bytes_in: Counter::default(),
            frames_out: Counter::default(),
            bytes_out: Counter::default(),
            send_seconds: Latency::default(),
            errors: Family::default(),
            closes: Family::default(),
            stored: Family::default(),
            repeats: Family::default(),
            batch_rows: Family::new_with_constructor(|| {
                Histogram::new(exponential_buckets(1.0, 2.0, 10))
            }),
            batch_seconds: Family::new_with_constructor(|| {
                Histogram::new(exponential_buckets(0.0005, 2.0, 16))
            }),
            queue_rows: Family::default(),
            in_flight: Family::default(),
            drafts_unlike: Family::default(),
            slots: Family::default(),
            circuit_open: Family::default(),
            circuit_opened: Family::default(),
            over_budget: Counter::default(),
            history_reads: Counter::default(),
            history_shared: Counter::default(),
            history_torn: Counter::default(),
            bus_connected: Gauge::default(),
            bus_dropped: Counter::default(),
            bus_published: Counter::default(),
            bus_received: Counter::default(),
            caught_up: Counter::default(),
            resyncs: Counter::default(),
            heads_compared: Counter::default(),
            document_version: Gauge::default(),
            adjudicating: Gauge::default(),
            slots_parked: Gauge::default(),
            slots_to_move: Gauge::default(),
            slots_moved: Counter::default(),
            messages_moved: Counter::default(),
            moves_failed: Counter::default(),
            freeze_seconds: Latency::default(),
        };
        let mut registry = Registry::with_prefix("chat");
        let r = &mut registry;
        r.register(
            "sessions",
            "Open WebSocket sessions",
            metrics.sessions.clone(),
        );
        r.register(
            "frames_in",
            "Frames received from clients",
            metrics.frames_in.clone(),
        );
        r.register(
            "bytes_in",
            "Bytes of frames received from clients",
            metrics.bytes_in.clone(),
        );
        r.register(
            "frames_out",
            "Frames sent to clients",
            metrics.frames_out.clone(),
        );
        r.register(
            "bytes_out",
            "Bytes of frames sent to clients",
            metrics.bytes_out.clone(),
        );
        r.register(
            "send_seconds",
            "Seconds from the arrival of a send to its answer",
            metrics.send_seconds.clone(),
        );
        r.register("errors", "Errors told to clients", metrics.errors.clone());
        r.register(
            "closes",
            "Sessions closed by the server",
            metrics.closes.clone(),
        );
        r.register(
            "messages_stored",
            "Messages committed",
            metrics.stored.clone(),
        );
        r.register(
            "messages_repeated",
            "Sends that were stored before",
            metrics.repeats.clone(),
        );
        r.register(
            "batch_rows",
            "Messages of one transaction",
            metrics.batch_rows.clone(),
        );
        r.register(
            "batch_seconds",
            "Seconds of one transaction",
            metrics.batch_seconds.clone(),
        );
        r.register(
            "queue_rows",
            "Sends that are not settled yet",
            metrics.queue_rows.clone(),
        );
        r.register(
            "transactions_in_flight_limit",
            "Transactions of a shard that this instance may have in flight, as it has found to be best",
            metrics.in_flight.clone(),
        );
        r.register(
            "batches_redone",
            "Batches that were not as remembered (term, head, key) and took another round trip",
            metrics.drafts_unlike.clone(),
        );
        r.register(
            "slots",
            "Slots a shard owns, as this instance knows it",
            metrics.slots.clone(),
        );
        r.register(
            "circuit_open",
            "1 while a shard does not answer",
            metrics.circuit_open.clone(),
        );
        r.register(
            "circuit_opened",
            "Times a shard stopped answering",
            metrics.circuit_opened.clone(),
        );
        r.register(
            "requests_over_budget",
            "Requests refused because their user had nothing left of the budget",
            metrics.over_budget.clone(),
        );
        r.register(
            "history_reads",
            "Pages read from a shard",
            metrics.history_reads.clone(),
        );
        r.register(
            "history_shared",
            "Pages that shared the read of another request",
            metrics.history_shared.clone(),
        );
        r.register(
            "history_torn",
            "Pages that did not add up and were read again",
            metrics.history_torn.clone(),
        );
        r.register(
            "bus_connected",
            "1 while the bus between instances is connected",
            metrics.bus_connected.clone(),
        );
        r.register(
            "bus_dropped",
            "Publications the bus had no room or connection for",
            metrics.bus_dropped.clone(),
        );
        r.register(
            "bus_published",
            "Publications handed to the bus",
            metrics.bus_published.clone(),
        );
        r.register(
            "bus_received",
            "Deliveries received from the bus",
            metrics.bus_received.clone(),
        );
        r.register(
            "messages_caught_up",
            "Messages sent to sessions from the shards: lost on the way, or missed while away",
            metrics.caught_up.clone(),
        );
        r.register(
            "resyncs",
            "Dialogs whose session was told to read the history",
            metrics.resyncs.clone(),
        );
        r.register(
            "heads_compared",
            "Dialogs compared with the shards after something may have been lost",
            metrics.heads_compared.clone(),
        );
        r.register(
            "document_version",
            "Version of the shard document in force",
            metrics.document_version.clone(),
        );
        r.register(
            "slots_parked",
            "Slots whose sends wait for their new owner",
            metrics.slots_parked.clone(),
        );
        r.register(
            "slots_to_move",
            "Slots that are not where they are wanted, as whoever moves them sees it",
            metrics.slots_to_move.clone(),
        );
        r.register(
            "slots_moved",
            "Slots moved by this instance",
            metrics.slots_moved.clone(),
        );
        r.register(
            "messages_moved",
            "Messages copied by this instance while moving slots",
            metrics.messages_moved.clone(),
        );
        r.register(
            "moves_failed",
            "Attempts to move a slot that were given up",
            metrics.moves_failed.clone(),
        );
        r.register(
            "freeze_seconds",
            "Seconds for which a slot that moved took no writes",
            metrics.freeze_seconds.clone(),
        );
        r.register(
            "document_adjudicating",
            "1 while slots of shards that were declared down are being judged",
            metrics.adjudicating.clone(),
        );
        Arc::new(Self {
            registry,
            ..metrics
        })
    }

    /// Counts an error that a client was told.
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

    /// What the circuit of a shard reports to.
    #[must_use]
    pub fn shard(&self, name: &str) -> crate::store::ShardMetrics {
        let label = ShardLabel {
            shard: name.to_owned(),
        };
        crate::store::ShardMetrics {
            circuit_open: self.circuit_open.get_or_create_owned(&label),
            opened: self.circuit_opened.get_or_create_owned(&label),
            batch_seconds: Some(self.batch_seconds.get_or_create_owned(&label)),
        }
    }

    /// What the writer of a shard reports to.
    #[must_use]
    pub fn writer(&self, name: &str) -> WriterMetrics {
        let label = ShardLabel {
            shard: name.to_owned(),
        };
        WriterMetrics {
            stored: self.stored.get_or_create_owned(&label),
            repeats: self.repeats.get_or_create_owned(&label),
            batch_rows: self.batch_rows.get_or_create_owned(&label),
            queue_rows: self.queue_rows.get_or_create_owned(&label),
            in_flight: self.in_flight.get_or_create_owned(&label),
            drafts_unlike: self.drafts_unlike.clone(),
            shard: name.to_owned(),
        }
    }

    /// Where the number of slots of a shard is shown.
    #[must_use]
    pub fn slots(&self, name: &str) -> Gauge {
        self.slots.get_or_create_owned(&ShardLabel {
            shard: name.to_owned(),
        })
    }

    /// The text that Prometheus reads.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry);
        text
    }
}
