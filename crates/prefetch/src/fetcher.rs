//! The front door: layers come and go, readers ask for ranges.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;
use millstream_chunkstore::{Layer, LayerState};
use millstream_oci::Digest;
use millstream_source::{ErrorKind, Priority, SourceError, names};
use millstream_toc::format::FormatError;
use millstream_toc::read::Chunk;
use millstream_toc::{DataRange, Toc};
use tokio::runtime::Handle;

use crate::attached::{Attached, ImageSources};
use crate::counters::{Counters, Tally};
use crate::deliver::{ChunkSink, MemorySink, store_failed, toc_failed};
use crate::edges::{Edges, Half};
use crate::extract::{Attempt, bounded};
use crate::flight::{self, Flight};
use crate::gate::{Gate, Urgency};
use crate::hydrate::{Hydration, Progress};
use crate::options::FetchOptions;
use crate::plan::{self, Bounds, Group, Need, Way};
use crate::queue::Limits;
use crate::windows::Windows;

/// How often a read looks again for what is missing before it gives up. More than twice is only needed when a fetch that
/// was joined brought other chunks than hoped, or half of one.
const ROUNDS: u32 = 4;
/// Largest range that is fetched without storing it.
const MAX_UNSTORED: u64 = 4 * 1024 * 1024;

/// What the rest of the program hears of. Called from tasks of the runtime; must not block.
pub trait FetchEvents: Send + Sync {
    /// Every byte of the layer is local, and blob, tar and TOC are what they should be.
    fn verified(&self, layer: &Digest);
    /// The layer was proven wrong and is not used any more.
    fn quarantined(&self, layer: &Digest, reason: &str);
    /// A hydration came to nothing; it is tried again later.
    fn failed(&self, layer: &Digest, error: &SourceError);
}

/// How to fetch a chunk that lies across the border of two spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Halves {
    /// With two fetches if need be; with none for a half that is there.
    Joined,
    /// With one fetch, whose source then answers for it.
    Together,
}

/// What all fetches share.
pub(crate) struct Shared {
    pub(crate) options: FetchOptions,
    pub(crate) gate: Gate,
    pub(crate) tally: Tally,
    pub(crate) windows: Windows,
    pub(crate) edges: Arc<Edges>,
    pub(crate) events: Arc<dyn FetchEvents>,
    pub(crate) runtime: Handle,
}

/// Fetches chunks into the store. Dropping it ends everything that is under way.
pub struct Fetcher {
    shared: Arc<Shared>,
    layers: RwLock<HashMap<Digest, Arc<Attached>>>,
    hydration: Arc<Hydration>,
}

impl std::fmt::Debug for Fetcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fetcher").field("options", &self.shared.options).finish_non_exhaustive()
    }
}

impl Fetcher {
    /// A fetcher with no layers, whose tasks run on `runtime`.
    pub fn new(options: FetchOptions, events: Arc<dyn FetchEvents>, runtime: Handle) -> Arc<Self> {
        let limits = Limits {
            slots: options.slots,
            hydrate_slots: options.hydrate_slots,
            settle: options.settle,
            // Parts of a layer wait here; their number is bounded by the layers hydrated at once.
            waiting: [
                options.demand_queue,
                options.prefetch_queue,
                options.hydrations.max(1) * options.parts_in_flight.max(1) + 64,
            ],
            starvation: options.starvation,
        };
        let shared = Arc::new(Shared {
            gate: {
                let _inside = runtime.enter();
                Gate::new(limits)
            },
            tally: Tally::default(),
            windows: Windows::new(options.window_cache, options.window_batch),
            edges: Arc::new(Edges::new(options.edge_cache)),
            events,
            runtime,
            options,
        });
        let hydration = Hydration::new(shared.clone());
        Arc::new(Self { shared, layers: RwLock::default(), hydration })
    }

    /// Makes a layer known with where it comes from. Called again, it adds fresher sources, which are tried first; a few
    /// older ones are kept.
    pub fn attach(&self, layer: Arc<Layer>, sources: ImageSources) {
        let mut layers = self.layers.write().unwrap_or_else(PoisonError::into_inner);
        let attached = layers.entry(layer.digest()).or_insert_with(|| Arc::new(Attached::new(layer.clone())));
        if !Arc::ptr_eq(&attached.layer, &layer) {
            // The layer was removed and admitted again meanwhile; what runs writes to files that are gone.
            attached.cancel.cancel();
            *attached = Arc::new(Attached::new(layer));
        }
        attached.add_sources(sources, self.shared.options.sources);
    }

    /// Forgets a layer and ends everything that is under way for it; its readers get an error.
    pub fn detach(&self, layer: &Digest) {
        if let Some(attached) = self.layers.write().unwrap_or_else(PoisonError::into_inner).remove(layer) {
            attached.cancel.cancel();
        }
    }

    fn attached(&self, layer: &Digest) -> Result<Arc<Attached>, SourceError> {
        let layers = self.layers.read().unwrap_or_else(PoisonError::into_inner);
        layers
            .get(layer)
            .cloned()
            .ok_or_else(|| SourceError::new(ErrorKind::NotFound, format!("layer {layer} has no sources")))
    }

    /// Brings every chunk of `range` (data address space) into the store. Fetches that others began are shared; dropping
    /// the future does not end them.
    ///
    /// # Errors
    /// Those of the last source that was tried; [`ErrorKind::TimedOut`] after the read deadline; [`ErrorKind::Local`] when
    /// the store fails, for instance because the disk is full: see [`Fetcher::fetch_unstored`].
    pub async fn ensure(&self, layer: &Digest, range: DataRange, priority: Priority) -> Result<(), SourceError> {
        let attached = self.attached(layer)?;
        let deadline = self.shared.options.read_deadline;
        let result = bounded(deadline, "missing chunks", self.ensure_attached(&attached, range, priority)).await;
        match &result {
            Ok(()) if priority == Priority::Demand => self.read_around(&attached, range),
            Err(error) if priority == Priority::Demand => tracing::warn!(
                { names::LAYER } = %layer, { names::OFFSET } = range.start, { names::SIZE } = range.len(),
                { names::CODE } = error.kind.code(), %error, "read cannot be served",
            ),
            _ => {}
        }
        result
    }

    async fn ensure_attached(
        &self,
        attached: &Arc<Attached>,
        range: DataRange,
        priority: Priority,
    ) -> Result<(), SourceError> {
        for round in 0..ROUNDS {
            let missing = missing(&attached.layer, range)?;
            if missing.is_empty() {
                return Ok(());
            }
            // A half that was counted on may have been dropped, or may be wrong.
            let halves = if round == 0 { Halves::Joined } else { Halves::Together };
            flight::wait(&self.join(attached, &missing, priority, halves)?, range).await?;
        }
        if missing(&attached.layer, range)?.is_empty() {
            return Ok(());
        }
        Err(SourceError::new(
            ErrorKind::Local,
            format!("fetched chunks of {} do not stay in the store", attached.layer.digest()),
        ))
    }

    /// Fetches under way that bring `chunks`, after starting those that are not.
    fn join(
        &self,
        attached: &Arc<Attached>,
        chunks: &[Chunk],
        priority: Priority,
        halves: Halves,
    ) -> Result<Vec<Arc<Flight>>, SourceError> {
        let toc = attached.layer.toc();
        let mut flights = attached.flights();
        let mut joined: Vec<Arc<Flight>> = Vec::new();
        let mut rest = Vec::new();
        let missing = plan::divide(toc, chunks).map_err(toc_failed)?;
        for chunk in &missing.open {
            for need in self.needs(attached, *chunk, halves).map_err(toc_failed)? {
                match flights.iter().find(|flight| flight.covers(&need.spans)) {
                    None => rest.push(need),
                    Some(flight) if joined.iter().any(|other| Arc::ptr_eq(other, flight)) => {}
                    Some(flight) => joined.push(flight.clone()),
                }
            }
        }
        let mut closed = missing.closed;
        closed.retain(|chunk| match flights.iter().find(|flight| flight.brings(chunk)) {
            None => !attached.layer.has(chunk.ix),
            Some(flight) => {
                if !joined.iter().any(|other| Arc::ptr_eq(other, flight)) {
                    joined.push(flight.clone());
                }
                false
            }
        });
        for flight in &joined {
            flight.urgency.raise(&self.shared.gate, priority);
        }
        let mut groups = plan::plan(toc, &rest, self.bounds(priority)).map_err(toc_failed)?;
        if priority == Priority::Demand {
            for group in &mut groups {
                self.read_on(attached, group).map_err(toc_failed)?;
            }
        }
        let wanted =
            |chunk: &Chunk| !attached.layer.has(chunk.ix) && !flights.iter().any(|flight| flight.brings(chunk));
        groups.extend(plan::blocks(toc, &closed, wanted).map_err(toc_failed)?);
        for group in groups {
            let flight = self.start(attached, group, priority);
            flights.push(flight.clone());
            joined.push(flight);
        }
        Ok(joined)
    }

    /// What to fetch for a chunk that was missing: nothing if it came meanwhile. Called with the list of flights locked:
    /// one that is not on it any more has delivered everything.
    fn needs(&self, attached: &Attached, chunk: Chunk, halves: Halves) -> Result<Vec<Need>, FormatError> {
        let toc = attached.layer.toc();
        let Some(spans) = plan::spans_of(toc, chunk)? else { return Ok(Vec::new()) };
        let together = halves == Halves::Together || !plan::has_halves(toc, chunk, &spans)?;
        let half = if together { None } else { self.shared.edges.half(&attached.layer.digest(), chunk.ix) };
        if attached.layer.has(chunk.ix) {
            return Ok(Vec::new());
        }
        if together {
            return Ok(vec![Need { chunk, spans }]);
        }
        let missing = match half {
            None => spans,
            Some(Half::Head) => spans.start + 1..spans.end,
            Some(Half::Tail) => spans.start..spans.start + 1,
        };
        Ok(missing.map(|span| Need { chunk, spans: span..span + 1 }).collect())
    }

    /// Lets a reader's request go on over the next spans where others nearby were read. They cost no round trip, and
    /// nothing of them comes before what the reader waits for.
    fn read_on(&self, attached: &Attached, group: &mut Group) -> Result<(), FormatError> {
        let options = &self.shared.options;
        let toc = attached.layer.toc();
        let Way::Spans { spans, blob } = &mut group.way else { return Ok(()) };
        let end = attached.fetched().read_on(spans, options.near, options.near_fetched, options.read_on);
        for next in spans.end..end.min(toc.span_count()) {
            let span = toc.span(next)?;
            if span.is_closed() || span.blob.start < attached.hydration.blob_bytes() {
                break;
            }
            spans.end = next + 1;
            blob.end = span.blob.end;
        }
        Ok(())
    }

    fn start(&self, attached: &Arc<Attached>, group: Group, priority: Priority) -> Arc<Flight> {
        if let Way::Spans { spans, .. } = &group.way {
            attached.fetched().note(spans);
        }
        tracing::debug!(
            { names::LAYER } = %attached.layer.digest(), way = ?group.way, chunks = group.chunks.len(), ?priority,
            "fetching",
        );
        let flight = Arc::new(Flight::new(attached.layer.clone(), self.shared.edges.clone(), &group, priority));
        let task = flight::fly(self.shared.clone(), attached.clone(), flight.clone(), group);
        self.shared.runtime.spawn(task);
        flight
    }

    fn bounds(&self, priority: Priority) -> Bounds {
        let options = &self.shared.options;
        let spans = match priority {
            Priority::Demand => options.demand_spans,
            Priority::Prefetch | Priority::Hydrate => options.prefetch_spans,
        };
        Bounds { spans, gap: options.gap }
    }

    /// Starts fetching what will probably be read after `range`. Nobody waits for it, and a full queue drops it.
    fn read_around(&self, attached: &Arc<Attached>, range: DataRange) {
        let options = &self.shared.options;
        let toc = attached.layer.toc();
        let content = toc.chunks_in(range).ok().and_then(|chunks| toc.content_of_chunk(chunks.first()?.ix).ok());
        let Some((ix, record)) = content.and_then(|ix| Some((ix, toc.content(ix).ok()?))) else { return };
        let content = DataRange::with_len(record.data_off.get(), record.size.get());
        let ahead = attached.recent().after(ix, content, range, options.small_file, options.read_ahead);
        let Some(ahead) = ahead else { return };
        let started = missing(&attached.layer, ahead)
            .and_then(|chunks| self.join(attached, &chunks, Priority::Prefetch, Halves::Joined));
        if let Err(error) = started {
            tracing::debug!({ names::LAYER } = %attached.layer.digest(), %error, "nothing is read around");
        }
    }

    /// The bytes of `range`, fetched as needed but not stored: for reads while the disk is full. Not shared between
    /// readers. At most 4 MiB.
    ///
    /// # Errors
    /// As [`Fetcher::ensure`].
    pub async fn fetch_unstored(&self, layer: &Digest, range: DataRange) -> Result<Bytes, SourceError> {
        let attached = self.attached(layer)?;
        let too_long = || {
            SourceError::new(ErrorKind::Local, format!("range {range} is too long to be fetched without storing it"))
        };
        let len = usize::try_from(range.len()).ok().filter(|_| range.len() <= MAX_UNSTORED).ok_or_else(too_long)?;
        let missing = missing(&attached.layer, range)?;
        let source = attached.layer.clone();
        let there = self.shared.runtime.spawn_blocking(move || {
            let mut bytes = vec![0; len];
            source.read(range, &mut bytes).map(|()| bytes)
        });
        let there =
            there.await.map_err(|e| SourceError::new(ErrorKind::Local, e.to_string()))?.map_err(store_failed)?;
        let memory = Arc::new(MemorySink::new(range, there, &missing));
        let sink: Arc<dyn ChunkSink> = memory.clone();
        let urgency = Urgency::new(Priority::Demand);
        let toc = attached.layer.toc();
        let groups = self.unstored_groups(toc, &missing).map_err(toc_failed)?;
        let all = async {
            for group in &groups {
                let attempt =
                    Attempt { shared: &self.shared, layer: &attached.layer, group, urgency: &urgency, sink: &sink };
                flight::fetch(&attached, attempt).await?;
            }
            Ok(())
        };
        let ended = || SourceError::new(ErrorKind::Unavailable, format!("layer {layer} was detached"));
        let work = bounded(self.shared.options.read_deadline, "missing chunks", all);
        attached.cancel.run_until_cancelled(work).await.ok_or_else(ended)??;
        Ok(Bytes::from(memory.take()))
    }

    /// Groups that bring just these chunks.
    fn unstored_groups(&self, toc: &Toc, missing: &[Chunk]) -> Result<Vec<Group>, FormatError> {
        let missing = plan::divide(toc, missing)?;
        let mut groups = plan::plan(toc, &plan::whole(toc, &missing.open)?, self.bounds(Priority::Demand))?;
        if !missing.closed.is_empty() {
            groups.push(Group { way: Way::Content, chunks: missing.closed });
        }
        Ok(groups)
    }

    /// Queues a layer to be made wholly local. Layers are done in the order of these calls; a call for one that is queued,
    /// under way or verified changes nothing.
    pub fn hydrate(&self, layer: &Digest) {
        match self.attached(layer) {
            Ok(attached) => self.hydration.submit(&attached),
            Err(error) => tracing::warn!({ names::LAYER } = %layer, %error, "layer cannot be hydrated"),
        }
    }

    /// Holds hydration back (`false`), what is under way included, or lets it go on.
    pub fn set_hydration(&self, enabled: bool) {
        self.hydration.set_enabled(enabled);
    }

    /// Totals since the start.
    pub fn counters(&self) -> Counters {
        self.shared.tally.snapshot(self.shared.gate.running())
    }

    /// How far a layer is; `None` when it is not attached.
    pub fn progress(&self, layer: &Digest) -> Option<Progress> {
        self.attached(layer).ok().map(|attached| attached.hydration.progress(&attached.layer))
    }
}

impl Drop for Fetcher {
    fn drop(&mut self) {
        let mut layers = self.layers.write().unwrap_or_else(PoisonError::into_inner);
        for (_, attached) in layers.drain() {
            attached.cancel.cancel();
        }
    }
}

fn missing(layer: &Layer, range: DataRange) -> Result<Vec<Chunk>, SourceError> {
    if let LayerState::Quarantined { reason } = layer.state() {
        return Err(SourceError::new(ErrorKind::Local, format!("layer {} is quarantined: {reason}", layer.digest())));
    }
    layer.missing(range).map_err(store_failed)
}
