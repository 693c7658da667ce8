//! All metrics of `millstreamd`; the same in words is METRICS.md.
//!
//! No label names an image, a digest or a path: their number would have no bound. The worker counts from zero when it starts,
//! which Prometheus expects of counters.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use millstream_chunkstore::LayerState;
use millstream_snapshots::PrepareOutcome;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::images::NodeImages;

/// From a hit in the catalog to the longest deadline that can be set.
const DECISION_BUCKETS: [f64; 9] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];
/// From a span that is nearly here to the deadline of reads.
const WAIT_BUCKETS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0];

/// Labels of what is counted by outcome.
type OutcomeLabels = [(&'static str, &'static str); 2];

/// How a read of the kernel was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadResult {
    /// From the store.
    Local,
    /// After something was fetched.
    Fetched,
    /// After it was fetched and could not be stored.
    Unstored,
    /// With EIO.
    Failed,
}

/// What is counted while the node works. Cheap to clone: all clones count together.
#[derive(Debug, Clone)]
pub struct NodeMetrics {
    decisions: Family<OutcomeLabels, Counter>,
    decision_seconds: Histogram,
    /// In the order of [`ReadResult`].
    reads: [Counter; 4],
    read_wait_seconds: Histogram,
    requests: Family<OutcomeLabels, Counter>,
}

impl Default for NodeMetrics {
    fn default() -> Self {
        let metrics = Self {
            decisions: Family::default(),
            decision_seconds: Histogram::new(DECISION_BUCKETS),
            reads: Default::default(),
            read_wait_seconds: Histogram::new(WAIT_BUCKETS),
            requests: Family::default(),
        };
        // A series that begins at zero shows its first event.
        drop(metrics.decisions.get_or_create(&[("outcome", "lazy"), ("code", "")]));
        for source in ["blob", "window", "content", "skeleton", "profile", "recording"] {
            drop(metrics.requests.get_or_create(&[("source", source), ("code", "")]));
        }
        metrics
    }
}

impl NodeMetrics {
    /// One layer that containerd offered to skip was answered.
    pub fn answered(&self, outcome: &PrepareOutcome) {
        let code = match outcome {
            PrepareOutcome::Lazy { .. } | PrepareOutcome::Local { .. } => "",
            PrepareOutcome::Deferred { reason } | PrepareOutcome::Failed { reason } => reason.code,
        };
        self.decisions.get_or_create(&[("outcome", outcome.name()), ("code", code)]).inc();
    }

    /// A decision about an image was made.
    pub fn decided(&self, took: Duration) {
        self.decision_seconds.observe(took.as_secs_f64());
    }

    /// A read of the kernel was answered.
    pub fn read(&self, result: ReadResult) {
        self.reads[result as usize].inc();
    }

    /// A read of the kernel waited for this long until what it needs was fetched, or could not be.
    pub fn waited(&self, took: Duration) {
        self.read_wait_seconds.observe(took.as_secs_f64());
    }

    /// A request to a source was answered; `code` is empty when it was not refused.
    pub fn requested(&self, source: &'static str, code: &'static str) {
        self.requests.get_or_create(&[("source", source), ("code", code)]).inc();
    }

    /// Everything that is exported. `restarts` is how many workers of this `millstreamd` died before this one.
    #[must_use]
    pub fn registry(&self, images: Arc<NodeImages>, restarts: u64) -> Registry {
        let mut registry = Registry::with_prefix("millstream");
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The program that is running", build);
        registry.register(
            "layer_decisions",
            "Layers that containerd offered to skip, by what was answered and why",
            self.decisions.clone(),
        );
        registry.register_with_unit(
            "image_decision",
            "Time until it was decided how an image is pulled",
            Unit::Seconds,
            self.decision_seconds.clone(),
        );
        registry.register_with_unit(
            "read_wait",
            "Time that reads of files waited for something to be fetched",
            Unit::Seconds,
            self.read_wait_seconds.clone(),
        );
        registry.register(
            "source_requests",
            "Requests to registry (blob) and server (window, content, skeleton, profile, recording), by the code of the failure; \
             empty: none",
            self.requests.clone(),
        );
        let reads = self.reads.clone();
        registry.register_collector(Box::new(Gathered { images, reads, restarts }));
        registry
    }
}

/// What others count, or is a level: looked up at each scrape.
struct Gathered {
    images: Arc<NodeImages>,
    reads: [Counter; 4],
    restarts: u64,
}

impl fmt::Debug for Gathered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gathered").finish_non_exhaustive()
    }
}

/// Name, help, unit, kind, and a value for each value of the one label.
type Row<'r> = (&'r str, &'r str, Option<Unit>, MetricType, &'r [(&'r str, &'r str, u64)]);

impl Gathered {
    fn counters(&self, out: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let fetcher = &self.images.fetcher;
        let counters = fetcher.counters();
        let tables = self.images.origins.server.as_ref().map_or(0, |server| server.metadata_bytes());
        let [local, fetched, unstored, failed] = self.reads.each_ref().map(Counter::get);
        let space = self.images.store.space();
        let refused = space.refused().map(|(refusal, count)| ("code", refusal.code(), count));
        let found: Vec<_> =
            self.images.damages.counts().into_iter().map(|(code, _, found)| ("code", code, found)).collect();
        let failures: Vec<_> =
            fetcher.failures().into_iter().map(|(kind, count)| ("code", kind.code(), count)).collect();
        let rows: [Row<'_>; 10] = [
            (
                "fetched",
                "Bytes received, by what for: compressed bytes of layers for readers, ahead of readers and for hydration, \
                 pages of startup profiles, plain content, and tables with windows.",
                Some(Unit::Bytes),
                MetricType::Counter,
                &[
                    ("purpose", "demand", counters.demand_bytes),
                    ("purpose", "prefetch", counters.prefetch_bytes),
                    ("purpose", "hydrate", counters.hydrate_bytes),
                    ("purpose", "profile", counters.profile_bytes),
                    ("purpose", "content", counters.content_bytes),
                    ("purpose", "table", tables),
                ],
            ),
            (
                "shared",
                "Bytes of file content taken over from other layers of this node instead of being fetched.",
                Some(Unit::Bytes),
                MetricType::Counter,
                &[("", "", counters.shared_bytes)],
            ),
            (
                "reads",
                "Reads of files by the kernel, by how they were answered, also those that are made ahead of a program \
                 (`fetch.record_one_in`); unstored: fetched and not kept; failed: with EIO.",
                None,
                MetricType::Counter,
                &[
                    ("result", "local", local),
                    ("result", "fetched", fetched),
                    ("result", "unstored", unstored),
                    ("result", "failed", failed),
                ],
            ),
            (
                "store_evicted",
                "Bytes of content that were given up to make room.",
                Some(Unit::Bytes),
                MetricType::Counter,
                &[("", "", space.evicted())],
            ),
            ("store_refused", "Times that content could not be stored, by why.", None, MetricType::Counter, &refused),
            (
                "requests_hedged",
                "Requests to the registry that were sent once more for a reader because the answer was late.",
                None,
                MetricType::Counter,
                &[("", "", counters.hedged)],
            ),
            (
                "digest_mismatches",
                "Times a source gave bytes that do not match their digest.",
                None,
                MetricType::Counter,
                &[("", "", counters.digest_mismatches)],
            ),
            (
                "damage_found",
                "Times that something was found damaged at the start or by a check, by code.",
                None,
                MetricType::Counter,
                &found,
            ),
            (
                "fetch_failures",
                "Attempts to fetch bytes from a source that failed, also half-way, by code; another one may have succeeded.",
                None,
                MetricType::Counter,
                &failures,
            ),
            (
                "worker_restarts",
                "Workers of this millstreamd that died.",
                None,
                MetricType::Counter,
                &[("", "", self.restarts)],
            ),
        ];
        rows.iter().try_for_each(|row| encode(out, row))
    }

    fn levels(&self, out: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let layers = self.images.store.layers();
        let count =
            |wanted: fn(&LayerState) -> bool| layers.iter().filter(|layer| wanted(&layer.state())).count() as u64;
        let present: u64 = layers.iter().map(|layer| layer.bytes_present()).sum();
        let total: u64 = layers.iter().map(|layer| layer.bytes_total()).sum();
        let queues = self.images.fetcher.queues();
        let [demand, prefetch, hydrate] = queues.requests.map(|waiting| waiting as u64);
        let streaming = self.images.catalog.streaming().is_ok_and(|enabled| enabled);
        let space = self.images.store.space();
        let damaged: Vec<_> =
            self.images.damages.counts().into_iter().map(|(code, now, _)| ("code", code, now)).collect();
        let rows: [Row<'_>; 10] = [
            (
                "layers",
                "Layers that are not pulled the ordinary way, by state.",
                None,
                MetricType::Gauge,
                &[
                    ("state", "lazy", count(|state| *state == LayerState::Lazy)),
                    ("state", "verified", count(|state| *state == LayerState::Verified)),
                    ("state", "quarantined", count(|state| matches!(state, LayerState::Quarantined { .. }))),
                    ("state", "damaged", self.images.store.damaged().len() as u64),
                ],
            ),
            ("damaged", "What is damaged now and not mended yet, by code.", None, MetricType::Gauge, &damaged),
            (
                "store_present",
                "Bytes of file content of these layers that are local.",
                Some(Unit::Bytes),
                MetricType::Gauge,
                &[("", "", present)],
            ),
            (
                "store_missing",
                "Bytes of file content of these layers that are not local yet.",
                Some(Unit::Bytes),
                MetricType::Gauge,
                &[("", "", total.saturating_sub(present))],
            ),
            (
                "store_used",
                "Bytes of the disk that content of these layers takes.",
                Some(Unit::Bytes),
                MetricType::Gauge,
                &[("", "", space.used())],
            ),
            (
                "store_free",
                "Bytes that content may still take; 0: what is read is served without being stored.",
                Some(Unit::Bytes),
                MetricType::Gauge,
                &[("", "", space.free())],
            ),
            (
                "queue_length",
                "What waits: requests for readers, ahead of readers and for hydration, and layers to be hydrated.",
                None,
                MetricType::Gauge,
                &[
                    ("queue", "demand", demand),
                    ("queue", "prefetch", prefetch),
                    ("queue", "hydrate", hydrate),
                    ("queue", "layers", queues.layers as u64),
                ],
            ),
            (
                "requests_active",
                "Requests to registry and server under way.",
                None,
                MetricType::Gauge,
                &[("", "", self.images.fetcher.counters().active)],
            ),
            (
                "tasks",
                "Tasks of the worker's runtime: connections, calls, fetches, background work.",
                None,
                MetricType::Gauge,
                &[("", "", self.images.tasks() as u64)],
            ),
            (
                "streaming_enabled",
                "1 while new images may be lazy, 0 while they are pulled as always.",
                None,
                MetricType::Gauge,
                &[("", "", u64::from(streaming))],
            ),
        ];
        rows.iter().try_for_each(|row| encode(out, row))
    }
}

fn encode(out: &mut DescriptorEncoder<'_>, (name, help, unit, kind, samples): &Row<'_>) -> fmt::Result {
    let mut metric = out.encode_descriptor(name, help, unit.as_ref(), *kind)?;
    for (label, value, amount) in *samples {
        if label.is_empty() {
            sample(&mut metric, *kind, *amount)?;
        } else {
            sample(&mut metric.encode_family(&[(*label, *value)])?, *kind, *amount)?;
        }
    }
    Ok(())
}

fn sample(metric: &mut MetricEncoder<'_>, kind: MetricType, amount: u64) -> fmt::Result {
    match kind {
        MetricType::Counter => metric.encode_counter::<NoLabelSet, u64, u64>(&amount, None),
        // The format has no larger numbers, and one that does not fit would take the whole page away.
        _ => metric.encode_gauge(&i64::try_from(amount).unwrap_or(i64::MAX)),
    }
}

impl Collector for Gathered {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        self.counters(&mut encoder)?;
        self.levels(&mut encoder)
    }
}

#[cfg(test)]
mod tests {
    use millstream_chunkstore::{Store, StoreOptions};
    use millstream_layerfs::LayerFs;
    use millstream_metrics::documents::{documented, exported};
    use millstream_prefetch::{FetchOptions, Fetcher};
    use millstream_registry::{Registry as Registries, RegistryOptions};
    use millstream_snapshots::Reason;
    use prometheus_client::encoding::text::encode;
    use redb::Database;

    use super::*;
    use crate::catalog::Catalog;
    use crate::damage::Damages;
    use crate::images::Reporter;
    use crate::origin::Origins;
    use crate::views::Views;

    /// A node without layers, as the worker puts it together.
    fn images(root: &std::path::Path, metrics: &NodeMetrics) -> Arc<NodeImages> {
        let db = Arc::new(Database::create(root.join("db")).unwrap());
        let store = Arc::new(Store::open(root, Arc::clone(&db), StoreOptions::default()).unwrap());
        let runtime = tokio::runtime::Handle::current();
        let fetcher = Fetcher::new(Arc::clone(&store), FetchOptions::default(), Arc::new(Reporter::default()), runtime);
        let views =
            Arc::new(Views::new(Arc::clone(&store), Arc::new(LayerFs::new()), root.join("m"), Damages::default()));
        // The first test of this process that needs it installs it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let registry = Registries::new(RegistryOptions::default()).unwrap();
        let origins = Origins {
            registry,
            server: None,
            embedded: None,
            docker_config: None,
            profiles: true,
            record_one_in: 1,
            metrics: metrics.clone(),
        };
        let catalog = Catalog::open(db).unwrap();
        Arc::new(NodeImages::new(store, fetcher, views, catalog, origins, None, Duration::from_secs(1)))
    }

    #[tokio::test]
    async fn the_document_names_every_metric_and_nothing_else_is_exported() {
        let root = tempfile::tempdir().unwrap();
        let metrics = NodeMetrics::default();
        let registry = metrics.registry(images(root.path(), &metrics), 3);
        assert_eq!(exported(&registry), documented(include_str!("../METRICS.md")), "left: exported, right: METRICS.md");
        metrics.read(ReadResult::Fetched);
        metrics.answered(&PrepareOutcome::Deferred { reason: Reason::new("server.not-imported", "why".to_owned()) });
        let mut page = String::new();
        encode(&mut page, &registry).unwrap();
        for sample in [
            "millstream_reads_total{result=\"fetched\"} 1\n",
            "millstream_reads_total{result=\"local\"} 0\n",
            "millstream_layer_decisions_total{outcome=\"deferred\",code=\"server.not-imported\"} 1\n",
            "millstream_worker_restarts_total 3\n",
            "millstream_store_missing_bytes 0\n",
            "millstream_layers{state=\"lazy\"} 0\n",
        ] {
            assert!(page.contains(sample), "{sample} in\n{page}");
        }
        for label in ["image=", "digest=", "layer=", "path="] {
            assert!(!page.contains(label), "{label} has no bound");
        }
    }
}
