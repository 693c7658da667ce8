//! All metrics of `millstream-server`; the same in words is METRICS.md.
//!
//! No label names an image, a digest, a path or a caller: their number would have no bound.

use std::time::{Duration, Instant};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use tonic::Code;

/// Until an answer begins: from a cache to a registry that is slow to say who may read.
const REQUEST_BUCKETS: [f64; 10] = [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0, 120.0];
/// Whole imports: from one whose layers are all known to the default deadline.
const IMPORT_BUCKETS: [f64; 9] = [0.5, 1.0, 5.0, 15.0, 60.0, 180.0, 600.0, 1800.0, 3600.0];

/// A call of the `Images` service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    Import,
    GetImage,
    GetWindows,
    GetSkeleton,
    ReadFile,
    ReadData,
    GetProfile,
    PutRecording,
}

impl Method {
    pub(crate) const ALL: [Self; 8] = [
        Self::Import,
        Self::GetImage,
        Self::GetWindows,
        Self::GetSkeleton,
        Self::ReadFile,
        Self::ReadData,
        Self::GetProfile,
        Self::PutRecording,
    ];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Import => "Import",
            Self::GetImage => "GetImage",
            Self::GetWindows => "GetWindows",
            Self::GetSkeleton => "GetSkeleton",
            Self::ReadFile => "ReadFile",
            Self::ReadData => "ReadData",
            Self::GetProfile => "GetProfile",
            Self::PutRecording => "PutRecording",
        }
    }
}

/// What is looked up in memory before it is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cache {
    /// Tables of contents.
    Tocs,
    /// Chunks of files.
    Chunks,
}

impl Cache {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Tocs => "tocs",
            Self::Chunks => "chunks",
        }
    }
}

/// What became of a recording.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RecordingResult {
    Taken,
    /// There are too many, or there are to be none.
    TurnedAway,
    /// It is no recording of the image.
    Refused,
}

impl RecordingResult {
    const ALL: [Self; 3] = [Self::Taken, Self::TurnedAway, Self::Refused];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Taken => "taken",
            Self::TurnedAway => "turned_away",
            Self::Refused => "refused",
        }
    }
}

/// How a question for a startup profile was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ProfileAnswer {
    /// With the pages.
    Pages,
    /// Without them.
    Plan,
    /// Nothing is known.
    None,
}

impl ProfileAnswer {
    const ALL: [Self; 3] = [Self::Pages, Self::Plan, Self::None];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Pages => "pages",
            Self::Plan => "plan",
            Self::None => "none",
        }
    }
}

type OneLabel = [(&'static str, &'static str); 1];
type TwoLabels = [(&'static str, &'static str); 2];

/// What is counted while the server works. Cheap to clone: all clones count together.
#[derive(Debug, Clone)]
pub struct ServerMetrics {
    requests: Family<TwoLabels, Counter>,
    request_seconds: Family<OneLabel, Histogram, fn() -> Histogram>,
    active: Gauge,
    imports: Family<OneLabel, Counter>,
    import_seconds: Histogram,
    layers: Family<OneLabel, Counter>,
    lookups: Family<TwoLabels, Counter>,
    recordings: Family<OneLabel, Counter>,
    profiles: Family<OneLabel, Counter>,
    profile_sent: Counter,
    packs: Family<OneLabel, Counter>,
    packs_active: Gauge,
    pack_bytes: Counter,
}

fn request_histogram() -> Histogram {
    Histogram::new(REQUEST_BUCKETS)
}

impl Default for ServerMetrics {
    fn default() -> Self {
        let metrics = Self {
            requests: Family::default(),
            request_seconds: Family::new_with_constructor(request_histogram as fn() -> Histogram),
            active: Gauge::default(),
            imports: Family::default(),
            import_seconds: Histogram::new(IMPORT_BUCKETS),
            layers: Family::default(),
            lookups: Family::default(),
            recordings: Family::default(),
            profiles: Family::default(),
            profile_sent: Counter::default(),
            packs: Family::default(),
            packs_active: Gauge::default(),
            pack_bytes: Counter::default(),
        };
        // A series that begins at zero shows its first event.
        for method in Method::ALL {
            drop(metrics.requests.get_or_create(&[("method", method.as_str()), ("code", code(Code::Ok))]));
            drop(metrics.request_seconds.get_or_create(&[("method", method.as_str())]));
        }
        for outcome in ["done", "failed"] {
            drop(metrics.imports.get_or_create(&[("outcome", outcome)]));
        }
        for result in ["read", "known", "ineligible"] {
            drop(metrics.layers.get_or_create(&[("result", result)]));
        }
        for outcome in ["done", "failed"] {
            drop(metrics.packs.get_or_create(&[("outcome", outcome)]));
        }
        for result in RecordingResult::ALL {
            drop(metrics.recordings.get_or_create(&[("result", result.as_str())]));
        }
        for answer in ProfileAnswer::ALL {
            drop(metrics.profiles.get_or_create(&[("answer", answer.as_str())]));
        }
        for cache in [Cache::Tocs, Cache::Chunks] {
            for result in ["hit", "miss"] {
                drop(metrics.lookups.get_or_create(&[("cache", cache.as_str()), ("result", result)]));
            }
        }
        metrics
    }
}

impl ServerMetrics {
    /// A request begins; say to the result how it was answered.
    pub(crate) fn begin(&self, method: Method) -> RequestWatch {
        self.active.inc();
        RequestWatch { metrics: self.clone(), method, begun: Instant::now(), code: Code::Cancelled }
    }

    /// An import has come to its end.
    pub(crate) fn imported(&self, done: bool, took: Duration) {
        self.imports.get_or_create(&[("outcome", if done { "done" } else { "failed" })]).inc();
        self.import_seconds.observe(took.as_secs_f64());
    }

    /// A layer was read whole, was known before (`known`), or cannot be streamed.
    pub(crate) fn layer(&self, result: LayerResult) {
        let result = match result {
            LayerResult::Read => "read",
            LayerResult::Known => "known",
            LayerResult::Ineligible => "ineligible",
        };
        self.layers.get_or_create(&[("result", result)]).inc();
    }

    /// Something was looked up in memory.
    pub(crate) fn looked_up(&self, cache: Cache, hits: u64, misses: u64) {
        let count = |result, number| {
            if number > 0 {
                self.lookups.get_or_create(&[("cache", cache.as_str()), ("result", result)]).inc_by(number);
            }
        };
        count("hit", hits);
        count("miss", misses);
    }

    /// A recording came.
    pub(crate) fn recording(&self, result: RecordingResult) {
        self.recordings.get_or_create(&[("result", result.as_str())]).inc();
    }

    /// Somebody asked for a startup profile.
    pub(crate) fn profile(&self, answer: ProfileAnswer) {
        self.profiles.get_or_create(&[("answer", answer.as_str())]).inc();
    }

    /// Bytes of a pack are sent.
    pub(crate) fn profile_sent(&self, bytes: u64) {
        self.profile_sent.inc_by(bytes);
    }

    /// A pack is being made; say to the result how large it became.
    pub(crate) fn making_pack(&self) -> PackWatch {
        self.packs_active.inc();
        PackWatch { metrics: self.clone(), made: None }
    }

    /// Everything that is exported.
    #[must_use]
    pub fn registry(&self) -> Registry {
        let mut registry = Registry::with_prefix("millstream_server");
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The program that is running", build);
        registry.register("requests", "Requests, by what they were answered with", self.requests.clone());
        registry.register_with_unit(
            "request",
            "Time until the answer to a request began",
            Unit::Seconds,
            self.request_seconds.clone(),
        );
        registry.register("requests_active", "Requests whose answer has not begun", self.active.clone());
        registry.register("imports", "Imports that came to their end, asked for or on demand", self.imports.clone());
        registry.register_with_unit("import", "Time of an import", Unit::Seconds, self.import_seconds.clone());
        registry.register(
            "layers",
            "Layers of imports: read whole, known before, or ineligible for streaming",
            self.layers.clone(),
        );
        registry.register(
            "cache_lookups",
            "Tables (tocs) and pieces of files (chunks) looked for in memory",
            self.lookups.clone(),
        );
        self.register_profiles(&mut registry);
        registry
    }

    fn register_profiles(&self, registry: &mut Registry) {
        registry.register(
            "recordings",
            "Recordings of what a start read: taken, turned away (too many at a time, or switched off), or refused (none of this image)",
            self.recordings.clone(),
        );
        registry.register(
            "profiles",
            "Questions for a startup profile: answered with its pages, with the plan only, or not at all",
            self.profiles.clone(),
        );
        registry.register_with_unit(
            "profile_sent",
            "Pages of startup profiles that were sent, as compressed",
            Unit::Bytes,
            self.profile_sent.clone(),
        );
        registry.register("packs", "Packs of pages that were made, or could not be", self.packs.clone());
        registry.register("packs_active", "Packs of pages that are being made", self.packs_active.clone());
        registry.register_with_unit("pack", "Bytes of the packs that were made", Unit::Bytes, self.pack_bytes.clone());
    }
}

/// How a layer of an import was dealt with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LayerResult {
    Read,
    Known,
    Ineligible,
}

/// A pack that is being made. Dropped without [`PackWatch::end`], it counts as failed.
#[derive(Debug)]
pub(crate) struct PackWatch {
    metrics: ServerMetrics,
    made: Option<u64>,
}

impl PackWatch {
    /// It has so many bytes.
    pub(crate) fn end(mut self, bytes: u64) {
        self.made = Some(bytes);
    }
}

impl Drop for PackWatch {
    fn drop(&mut self) {
        self.metrics.packs_active.dec();
        let outcome = if self.made.is_some() { "done" } else { "failed" };
        self.metrics.packs.get_or_create(&[("outcome", outcome)]).inc();
        self.metrics.pack_bytes.inc_by(self.made.unwrap_or(0));
    }
}

/// A request under way. Dropped without [`RequestWatch::end`], it counts as cancelled: the caller went away.
#[derive(Debug)]
pub(crate) struct RequestWatch {
    metrics: ServerMetrics,
    method: Method,
    begun: Instant,
    code: Code,
}

impl RequestWatch {
    /// The answer begins, or the request is refused.
    pub(crate) fn end(mut self, code: Code) {
        self.code = code;
    }
}

impl Drop for RequestWatch {
    fn drop(&mut self) {
        let Self { metrics, method, begun, code: answered } = self;
        metrics.active.dec();
        metrics.requests.get_or_create(&[("method", method.as_str()), ("code", code(*answered))]).inc();
        metrics.request_seconds.get_or_create(&[("method", method.as_str())]).observe(begun.elapsed().as_secs_f64());
    }
}

/// Names as gRPC has them.
const fn code(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use millstream_metrics::documents::{documented, exported};

    use super::*;

    #[test]
    fn the_document_names_every_metric() {
        let registry = ServerMetrics::default().registry();
        assert_eq!(exported(&registry), documented(include_str!("../METRICS.md")), "left: exported, right: METRICS.md");
    }

    #[test]
    fn a_request_that_is_dropped_counts_as_cancelled() {
        let metrics = ServerMetrics::default();
        metrics.begin(Method::Import).end(Code::Ok);
        drop(metrics.begin(Method::ReadFile));
        let count = |method, code| metrics.requests.get_or_create(&[("method", method), ("code", code)]).get();
        assert_eq!((count("Import", "OK"), count("ReadFile", "CANCELLED")), (1, 1));
        assert_eq!(metrics.active.get(), 0);
    }
}
