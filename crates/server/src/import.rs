//! Importing images: each layer that has no TOC yet is read once, whole.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use millstream_oci::{Digest, ImageRef, ManifestDigest, Platform};
use millstream_source::ImageSource;
use millstream_toc::Budget;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use crate::ServeError;
use crate::content::Content;
use crate::describe::{Described, describe};
use crate::layer::{Means, Outcome, WantedLayer, import_layer};
use crate::metrics::{LayerResult, ServerMetrics};
use crate::store::{ImageRecord, Store};

/// Layers of one image that wait for or use a builder at a time.
const LAYERS_AT_ONCE: usize = 4;

/// Bounds of imports.
#[derive(Debug, Clone)]
pub struct ImportOptions {
    /// Images at a time; more are refused.
    pub images: usize,
    /// Layers that are decompressed at a time, over all images; more wait.
    pub builders: usize,
    /// An import that takes longer fails. What it finished is kept.
    pub deadline: Duration,
    /// Directory for files that live as long as one layer's import.
    pub scratch: PathBuf,
    /// Layers that cannot be entered every 16 MiB of output are kept as packed content, if they have at most this many bytes
    /// of it; zero: none are, and such layers cannot be streamed.
    pub packed_max: u64,
    /// Whether layers are built at the lowest priority, on threads of their own: on a machine that has other work.
    pub idle: bool,
    /// What one layer may cost; one that costs more is not streamed.
    pub budget: Budget,
}

impl Default for ImportOptions {
    fn default() -> Self {
        Self {
            images: 8,
            builders: std::thread::available_parallelism().map_or(1, usize::from),
            deadline: Duration::from_secs(3600),
            scratch: std::env::temp_dir(),
            packed_max: 16 << 30,
            idle: false,
            budget: Budget::default(),
        }
    }
}

/// How far an import is.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    pub(crate) bytes_total: AtomicU64,
    pub(crate) bytes_done: AtomicU64,
    pub(crate) layers_total: AtomicU32,
    pub(crate) layers_done: AtomicU32,
}

/// What an import led to.
#[derive(Debug)]
pub(crate) struct Imported {
    pub(crate) manifest: ManifestDigest,
    /// Layers that cannot be streamed, with the reason.
    pub(crate) ineligible: Vec<(Digest, String)>,
}

/// One import under way.
struct Job {
    source: Arc<dyn ImageSource>,
    /// Layers that were proven for this very image before.
    proven: HashSet<Digest>,
    progress: Arc<Progress>,
}

/// The right to import one image.
pub(crate) struct ImportPermit(#[expect(dead_code, reason = "held for its drop")] OwnedSemaphorePermit);

/// Imports images.
pub(crate) struct Importer {
    pub(crate) store: Store,
    pub(crate) content: Arc<Content>,
    options: ImportOptions,
    metrics: ServerMetrics,
    images: Arc<Semaphore>,
    builders: Semaphore,
    /// One lock for each layer under way: who comes second finds it done.
    layers: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
}

impl Importer {
    pub(crate) fn new(store: Store, content: Arc<Content>, options: ImportOptions, metrics: ServerMetrics) -> Self {
        let images = Arc::new(Semaphore::new(options.images.min(Semaphore::MAX_PERMITS)));
        let builders = Semaphore::new(options.builders.clamp(1, Semaphore::MAX_PERMITS));
        Self { store, content, options, metrics, images, builders, layers: Mutex::default() }
    }

    /// Admits one more import, or refuses it.
    pub(crate) fn admit(&self) -> Result<ImportPermit, ServeError> {
        let exhausted = |_| ServeError::Exhausted { what: "imports", limit: self.options.images };
        Arc::clone(&self.images).try_acquire_owned().map(ImportPermit).map_err(exhausted)
    }

    /// Imports what `image` names in `source`, for `platform` where it is an image index. Idempotent.
    pub(crate) async fn import(
        self: &Arc<Self>,
        _permit: ImportPermit,
        source: &Arc<dyn ImageSource>,
        image: &ImageRef,
        platform: &Platform,
        progress: &Arc<Progress>,
    ) -> Result<Imported, ServeError> {
        let begun = Instant::now();
        let work = self.import_unbounded(source, image, platform, progress);
        let imported = tokio::time::timeout(self.options.deadline, work).await;
        let imported = imported.unwrap_or(Err(ServeError::TimedOut { what: "the import" }));
        self.metrics.imported(imported.is_ok(), begun.elapsed());
        imported
    }

    async fn import_unbounded(
        self: &Arc<Self>,
        source: &Arc<dyn ImageSource>,
        image: &ImageRef,
        platform: &Platform,
        progress: &Arc<Progress>,
    ) -> Result<Imported, ServeError> {
        let Described { manifest, layers, index } = describe(&**source, image, platform).await?;
        let known = self.store.image(manifest, &image.name()).await?;
        let proven = known.iter().flat_map(|known| &known.layers).filter(|layer| layer.is_ready());
        let job = Job {
            source: Arc::clone(source),
            proven: proven.map(|layer| layer.digest).collect(),
            progress: Arc::clone(progress),
        };
        let mut reasons = self.import_layers(&Arc::new(job), &layers).await?;
        if let Some((digest, bytes)) = index {
            self.store.put_index(digest, bytes).await?;
        }
        let layers = layers.into_iter().map(|layer| {
            let ineligible = reasons.get(&layer.digest).cloned();
            layer.into_record(ineligible, false)
        });
        let record = ImageRecord { repository: image.name(), manifest, layers: layers.collect() };
        self.store.put_image(&record).await?;
        let ineligible = record.layers.iter().filter_map(|layer| Some((layer.digest, reasons.remove(&layer.digest)?)));
        Ok(Imported { manifest, ineligible: ineligible.collect() })
    }

    /// Imports every distinct layer; gives the reasons of those that cannot be streamed.
    async fn import_layers(
        self: &Arc<Self>,
        job: &Arc<Job>,
        layers: &[WantedLayer],
    ) -> Result<HashMap<Digest, String>, ServeError> {
        let distinct = distinct(layers)?;
        let total = distinct.iter().map(|layer| layer.size).fold(0, u64::saturating_add);
        job.progress.bytes_total.store(total, Ordering::Relaxed);
        job.progress.layers_total.store(u32::try_from(distinct.len()).unwrap_or(u32::MAX), Ordering::Relaxed);
        let mut waiting = distinct.into_iter();
        let mut running = JoinSet::new();
        let mut reasons = HashMap::new();
        loop {
            while running.len() < LAYERS_AT_ONCE {
                let Some(layer) = waiting.next().cloned() else { break };
                let (this, job) = (Arc::clone(self), Arc::clone(job));
                running.spawn(async move {
                    let outcome = this.import_layer(&job, &layer).await;
                    outcome.map(|outcome| (layer.digest, outcome))
                });
            }
            // An error drops the set, which ends the other layers' tasks.
            let Some(done) = running.join_next().await else { return Ok(reasons) };
            let (digest, outcome) = done.map_err(|error| ServeError::Internal { what: error.to_string() })??;
            job.progress.layers_done.fetch_add(1, Ordering::Relaxed);
            if let Outcome::Ineligible(reason) = outcome {
                reasons.insert(digest, reason);
            }
        }
    }

    async fn import_layer(&self, job: &Job, layer: &WantedLayer) -> Result<Outcome, ServeError> {
        let read = AtomicU64::new(0);
        let count = |bytes| {
            read.fetch_add(bytes, Ordering::Relaxed);
            job.progress.bytes_done.fetch_add(bytes, Ordering::Relaxed);
        };
        let mut known = false;
        let outcome = match layer.compression() {
            Err(reason) => Outcome::Ineligible(reason),
            Ok(compression) => {
                let lock = self.layer_lock(&layer.digest);
                let _one_at_a_time = lock.lock().await;
                known = self.adopt(job, layer).await?;
                if known {
                    Outcome::Ready
                } else {
                    let _builder = self.builders.acquire().await;
                    let ImportOptions { scratch, budget, packed_max, idle, .. } = &self.options;
                    let (scratch, budget) = (scratch.clone(), *budget);
                    let means = Means { scratch, budget, packed_max: *packed_max, idle: *idle };
                    import_layer(&self.store, &means, &*job.source, layer, compression, &count).await?
                }
            }
        };
        self.metrics.layer(match &outcome {
            Outcome::Ready if known => LayerResult::Known,
            Outcome::Ready => LayerResult::Read,
            Outcome::Ineligible(_) => LayerResult::Ineligible,
        });
        // What needed no reading is done as well.
        let rest = layer.size.saturating_sub(read.load(Ordering::Relaxed));
        job.progress.bytes_done.fetch_add(rest, Ordering::Relaxed);
        Ok(outcome)
    }

    /// Uses the TOC that is there, if the source proves that it has the blob, or did so for this image before.
    async fn adopt(&self, job: &Job, layer: &WantedLayer) -> Result<bool, ServeError> {
        let Some(record) = self.store.layer(&layer.digest).await? else { return Ok(false) };
        let proven = match self.content.toc(&layer.digest).await {
            Ok(_) if job.proven.contains(&layer.digest) => true,
            Ok(toc) => self.content.prove(&toc, &*job.source).await?,
            // Made anew: the source has all that is needed.
            Err(ServeError::Toc { .. } | ServeError::NotImported { .. }) => false,
            Err(error) => return Err(error),
        };
        if proven {
            // Only now: the error tells size and diff ID of the blob.
            layer.compare(record.diff_id, record.size)?;
        }
        Ok(proven)
    }

    fn layer_lock(&self, digest: &Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lock) = layers.get(digest).and_then(Weak::upgrade) {
            return lock;
        }
        layers.retain(|_, lock| lock.strong_count() > 0);
        let lock = Arc::default();
        layers.insert(*digest, Arc::downgrade(&lock));
        lock
    }
}

/// Every blob once. One blob has one size and one diff ID, however often it occurs.
pub(crate) fn distinct(layers: &[WantedLayer]) -> Result<Vec<&WantedLayer>, ServeError> {
    let mut distinct: Vec<&WantedLayer> = Vec::new();
    for layer in layers {
        match distinct.iter().find(|known| known.digest == layer.digest) {
            Some(known) => layer.compare(known.diff_id, known.size)?,
            None => distinct.push(layer),
        }
    }
    Ok(distinct)
}
