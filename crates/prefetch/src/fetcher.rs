//! The front door: layers come and go, readers ask for ranges.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;
use millstream_chunkstore::{Layer, Refusal, Store};
use millstream_oci::Digest;
use millstream_source::{ErrorKind, Priority, SourceError, names};
use millstream_toc::DataRange;
use millstream_toc::read::Chunk;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use crate::attached::{Attached, ImageSources};
use crate::counters::{Counters, Queues, Tally};
use crate::deliver::{ChunkSink, MemorySink, store_failed, toc_failed};
use crate::edges::Edges;
use crate::ensure::{Halves, missing};
use crate::extract::{Attempt, bounded};
use crate::flight;
use crate::gate::{Gate, Urgency};
use crate::hedge::Hedge;
use crate::hydrate::{Hydration, Progress};
use crate::options::FetchOptions;
use crate::parts::PartSize;
use crate::queue::Limits;
use crate::replay::{self, AskedProfile};
use crate::share::Turns;
use crate::windows::Windows;

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

/// What all fetches share.
pub(crate) struct Shared {
    pub(crate) store: Arc<Store>,
    pub(crate) options: FetchOptions,
    pub(crate) gate: Gate,
    pub(crate) tally: Tally,
    /// Of requests ahead of hydration.
    pub(crate) hedge: Hedge,
    pub(crate) windows: Windows,
    pub(crate) edges: Arc<Edges>,
    pub(crate) turns: Turns,
    pub(crate) replays: Semaphore,
    /// Of hydration.
    pub(crate) part_size: PartSize,
    /// Streams of pages under way.
    pub(crate) replaying: AtomicUsize,
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
    /// A fetcher with no layers, whose tasks run on `runtime`. What a layer of `store` holds is not fetched for another one.
    pub fn new(store: Arc<Store>, options: FetchOptions, events: Arc<dyn FetchEvents>, runtime: Handle) -> Arc<Self> {
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
            store,
            gate: {
                let _inside = runtime.enter();
                Gate::new(limits)
            },
            tally: Tally::default(),
            hedge: Hedge::default(),
            windows: Windows::new(options.window_cache, options.window_batch),
            edges: Arc::new(Edges::new(options.edge_cache)),
            turns: Turns::default(),
            replays: Semaphore::new(options.replays.max(1)),
            part_size: PartSize::new(options.part_size, options.part_size_fast, options.part_time),
            replaying: AtomicUsize::new(0),
            events,
            runtime,
            options,
        });
        let hydration = Hydration::new(shared.clone());
        Arc::new(Self { shared, layers: RwLock::default(), hydration })
    }

    /// Makes a layer known with where it comes from, and begins to take over what other layers hold of it. Called again, it
    /// adds fresher sources, which are tried first; a few older ones are kept.
    pub fn attach(&self, layer: Arc<Layer>, sources: ImageSources) {
        let mut layers = self.layers.write().unwrap_or_else(PoisonError::into_inner);
        let known = layers.get(&layer.digest()).filter(|known| Arc::ptr_eq(&known.layer, &layer)).cloned();
        let attached = known.unwrap_or_else(|| {
            let attached = Arc::new(Attached::new(layer.clone()));
            // If there is one: the layer was removed and admitted again meanwhile; what runs writes to files that are gone.
            if let Some(before) = layers.insert(layer.digest(), attached.clone()) {
                before.cancel.cancel();
            }
            let (shared, sharing) = (self.shared.clone(), attached.clone());
            self.shared.runtime.spawn(async move {
                sharing.cancel.run_until_cancelled(shared.share_all(&sharing)).await;
            });
            attached
        });
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
        let result = bounded(deadline, "missing chunks", self.shared.ensure(&attached, range, priority)).await;
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

    /// Starts fetching what will probably be read after `range`. Nobody waits for it, and a full queue drops it. While a startup
    /// profile is replayed, what is read next is known better, and the line has enough to carry.
    fn read_around(&self, attached: &Arc<Attached>, range: DataRange) {
        if !attached.replays().is_empty() {
            return;
        }
        let options = &self.shared.options;
        let toc = attached.layer.toc();
        let content = toc.chunks_in(range).ok().and_then(|chunks| toc.content_of_chunk(chunks.first()?.ix).ok());
        let Some((ix, record)) = content.and_then(|ix| Some((ix, toc.content(ix).ok()?))) else { return };
        let content = DataRange::with_len(record.data_off.get(), record.size.get());
        let ahead = attached.recent().after(ix, content, range, options.small_file, options.read_ahead);
        let Some(ahead) = ahead else { return };
        let started = missing(&attached.layer, ahead).and_then(|mut chunks| {
            chunks.retain(|chunk| !attached.will_be_shared(chunk.data));
            self.shared.join(attached, &chunks, Priority::Prefetch, Halves::Joined)
        });
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
        let source = attached.layer.clone();
        let there = self.shared.runtime.spawn_blocking(move || there(&source, range, len));
        let (there, missing) = there.await.map_err(|e| SourceError::new(ErrorKind::Local, e.to_string()))??;
        let memory = Arc::new(MemorySink::new(range, there, &missing));
        let sink: Arc<dyn ChunkSink> = memory.clone();
        let urgency = Urgency::new(Priority::Demand, attached.layer.number());
        let toc = attached.layer.toc();
        let groups = self.shared.unstored_groups(toc, &missing).map_err(toc_failed)?;
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

    /// Brings what starts of an image read, ahead of its readers and before all hydration. `image` names it in the log, `layers`
    /// are all of its layers. Returns at once.
    pub fn replay(&self, image: String, layers: &[Digest], asked: AskedProfile) {
        let layers: Vec<_> = layers.iter().map(|digest| (*digest, self.attached(digest).ok())).collect();
        let shared = self.shared.clone();
        self.shared.runtime.spawn(async move {
            let Ok(_turn) = shared.replays.acquire().await else { return };
            // Whoever gave the layers up in the meantime wants nothing of them.
            if layers.iter().all(|(_, known)| known.as_ref().is_none_or(|attached| attached.cancel.is_cancelled())) {
                return;
            }
            replay::report(&image, shared.replay(&layers, asked).await);
        });
    }

    /// Whether sources of the layer are known.
    pub fn is_attached(&self, layer: &Digest) -> bool {
        self.attached(layer).is_ok()
    }

    /// Queues a layer to be made wholly local. Layers are done in the order of these calls; a call for one that is queued,
    /// under way or verified changes nothing.
    pub fn hydrate(&self, layer: &Digest) {
        match self.attached(layer) {
            Ok(attached) => self.hydration.submit(&attached),
            Err(error) => tracing::warn!({ names::LAYER } = %layer, %error, "layer cannot be hydrated"),
        }
    }

    /// As [`Fetcher::hydrate`], but before all layers that only wait, and also while hydration is held back.
    pub fn hydrate_first(&self, layer: &Digest) {
        match self.attached(layer) {
            Ok(attached) => self.hydration.submit_first(&attached),
            Err(error) => tracing::warn!({ names::LAYER } = %layer, %error, "layer cannot be hydrated"),
        }
    }

    /// Holds hydration back (`false`), what is under way included (but for layers that are wanted first), or lets it go on.
    pub fn set_hydration(&self, enabled: bool) {
        self.hydration.set_enabled(enabled);
    }

    /// Totals since the start.
    pub fn counters(&self) -> Counters {
        self.shared.tally.snapshot(self.shared.gate.running())
    }

    /// Attempts to fetch bytes from a source that failed since the start, by what went wrong.
    pub fn failures(&self) -> BTreeMap<ErrorKind, u64> {
        self.shared.tally.failures()
    }

    /// What waits now.
    pub fn queues(&self) -> Queues {
        Queues {
            requests: self.shared.gate.waiting(),
            layers: self.hydration.waiting(),
            replays: self.shared.replaying.load(Ordering::Relaxed),
        }
    }

    /// How far a layer is; `None` when it is not attached.
    pub fn progress(&self, layer: &Digest) -> Option<Progress> {
        self.attached(layer).ok().map(|attached| attached.hydration.progress(&attached.layer))
    }
}

/// The bytes of `range` as far as the store has them, and the chunks that are missing. A disk that cannot be read has none.
fn there(layer: &Layer, range: DataRange, len: usize) -> Result<(Vec<u8>, Vec<Chunk>), SourceError> {
    let mut bytes = vec![0; len];
    match layer.read(range, &mut bytes) {
        Ok(missing) => Ok((bytes, missing)),
        Err(error) if Refusal::of(&error).is_some() => {
            let toc = layer.toc();
            let mut missing = Vec::new();
            for chunk in toc.chunks_in(range).map_err(toc_failed)? {
                if !toc.is_hole(chunk.ix).map_err(toc_failed)? {
                    missing.push(chunk);
                }
            }
            bytes.fill(0);
            Ok((bytes, missing))
        }
        Err(error) => Err(store_failed(error)),
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
