//! Importing images: each layer that has no TOC yet is read once, whole.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use millstream_oci::{
    Digest, Document, ImageRef, Manifest, ManifestDigest, Platform, TagOrDigest, parse_config, parse_document,
    select_platform,
};
use millstream_registry::Repository;
use millstream_toc::Budget;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use crate::ServeError;
use crate::content::Content;
use crate::layer::{Means, Outcome, WantedLayer, import_layer};
use crate::metrics::{LayerResult, ServerMetrics};
use crate::store::{ImageLayer, ImageRecord, Store};

/// Configs of real images have tens of kilobytes.
const MAX_CONFIG: u64 = 8 << 20;
/// Layers that containerd and its relatives still mount number 127 and less; this only bounds the work.
const MAX_LAYERS: usize = 1000;
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

/// The right to import one image.
pub(crate) struct ImportPermit(#[expect(dead_code, reason = "held for its drop")] OwnedSemaphorePermit);

/// Imports images.
pub(crate) struct Importer {
    store: Store,
    content: Arc<Content>,
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

    /// Imports what `image` names in `repository`, for `platform` where it is an image index. Idempotent.
    pub(crate) async fn import(
        self: &Arc<Self>,
        _permit: ImportPermit,
        repository: &Arc<Repository>,
        image: &ImageRef,
        platform: &Platform,
        progress: &Arc<Progress>,
    ) -> Result<Imported, ServeError> {
        let begun = Instant::now();
        let work = self.import_unbounded(repository, image, platform, progress);
        let imported = tokio::time::timeout(self.options.deadline, work).await;
        let imported = imported.unwrap_or(Err(ServeError::TimedOut { what: "the import" }));
        self.metrics.imported(imported.is_ok(), begun.elapsed());
        imported
    }

    async fn import_unbounded(
        self: &Arc<Self>,
        repository: &Arc<Repository>,
        image: &ImageRef,
        platform: &Platform,
        progress: &Arc<Progress>,
    ) -> Result<Imported, ServeError> {
        let resolved = resolve(repository, image, platform).await?;
        let layers = describe_layers(repository, image, &resolved.manifest).await?;
        let mut reasons = self.import_layers(repository, &layers, progress).await?;
        if let Some((digest, bytes)) = resolved.index {
            self.store.put_index(digest, bytes).await?;
        }
        let layers = layers.into_iter().map(|layer| ImageLayer {
            digest: layer.digest,
            size: layer.size,
            diff_id: layer.diff_id,
            media: layer.media.to_string(),
            ineligible: reasons.get(&layer.digest).cloned(),
        });
        let record = ImageRecord { repository: image.name(), manifest: resolved.digest, layers: layers.collect() };
        self.store.put_image(&record).await?;
        let ineligible = record.layers.iter().filter_map(|layer| Some((layer.digest, reasons.remove(&layer.digest)?)));
        Ok(Imported { manifest: resolved.digest, ineligible: ineligible.collect() })
    }

    /// Imports every distinct layer; gives the reasons of those that cannot be streamed.
    async fn import_layers(
        self: &Arc<Self>,
        repository: &Arc<Repository>,
        layers: &[WantedLayer],
        progress: &Arc<Progress>,
    ) -> Result<HashMap<Digest, String>, ServeError> {
        let mut distinct: Vec<&WantedLayer> = Vec::new();
        for layer in layers {
            match distinct.iter().find(|known| known.digest == layer.digest) {
                // One blob has one size and one diff ID, however often it occurs.
                Some(known) => layer.compare(known.diff_id, known.size)?,
                None => distinct.push(layer),
            }
        }
        let total = distinct.iter().map(|layer| layer.size).fold(0, u64::saturating_add);
        progress.bytes_total.store(total, Ordering::Relaxed);
        progress.layers_total.store(u32::try_from(distinct.len()).unwrap_or(u32::MAX), Ordering::Relaxed);
        let mut waiting = distinct.into_iter();
        let mut running = JoinSet::new();
        let mut reasons = HashMap::new();
        loop {
            while running.len() < LAYERS_AT_ONCE {
                let Some(layer) = waiting.next().cloned() else { break };
                let (this, repository, progress) = (Arc::clone(self), Arc::clone(repository), Arc::clone(progress));
                running.spawn(async move {
                    let outcome = this.import_layer(&repository, &layer, &progress).await;
                    outcome.map(|outcome| (layer.digest, outcome))
                });
            }
            // An error drops the set, which ends the other layers' tasks.
            let Some(done) = running.join_next().await else { return Ok(reasons) };
            let (digest, outcome) = done.map_err(|error| ServeError::Internal { what: error.to_string() })??;
            progress.layers_done.fetch_add(1, Ordering::Relaxed);
            if let Outcome::Ineligible(reason) = outcome {
                reasons.insert(digest, reason);
            }
        }
    }

    async fn import_layer(
        &self,
        repository: &Arc<Repository>,
        layer: &WantedLayer,
        progress: &Progress,
    ) -> Result<Outcome, ServeError> {
        let read = AtomicU64::new(0);
        let count = |bytes| {
            read.fetch_add(bytes, Ordering::Relaxed);
            progress.bytes_done.fetch_add(bytes, Ordering::Relaxed);
        };
        let mut known = false;
        let outcome = match layer.compression() {
            Err(reason) => Outcome::Ineligible(reason),
            Ok(compression) => {
                let lock = self.layer_lock(&layer.digest);
                let _one_at_a_time = lock.lock().await;
                known = self.adopt(repository, layer).await?;
                if known {
                    Outcome::Ready
                } else {
                    let _builder = self.builders.acquire().await;
                    let ImportOptions { scratch, budget, packed_max, .. } = &self.options;
                    let means = Means { scratch: scratch.clone(), budget: *budget, packed_max: *packed_max };
                    import_layer(&self.store, &means, repository, layer, compression, &count).await?
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
        progress.bytes_done.fetch_add(rest, Ordering::Relaxed);
        Ok(outcome)
    }

    /// Uses the TOC that is there, if this repository proves that it has the blob.
    async fn adopt(&self, repository: &Arc<Repository>, layer: &WantedLayer) -> Result<bool, ServeError> {
        let Some(record) = self.store.layer(&layer.digest).await? else { return Ok(false) };
        let proven = match self.content.toc(&layer.digest).await {
            Ok(toc) => self.content.prove(&toc, &**repository).await?,
            // Made anew: the registry has all that is needed.
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

/// One platform's manifest, and the index it was chosen from.
struct Resolved {
    digest: ManifestDigest,
    manifest: Manifest,
    index: Option<(ManifestDigest, Bytes)>,
}

async fn resolve(repository: &Repository, image: &ImageRef, platform: &Platform) -> Result<Resolved, ServeError> {
    let document_error = |source| ServeError::Document { what: format!("manifest of {image}"), source };
    let fetched = repository.document(image.tag_or_digest()).await?;
    let entries = match parse_document(fetched.content_type.as_deref(), &fetched.bytes).map_err(document_error)? {
        Document::Manifest(manifest) => return Ok(Resolved { digest: fetched.digest, manifest, index: None }),
        Document::Index(entries) => entries,
    };
    let entry = select_platform(&entries, platform).ok_or_else(|| no_platform(&image.to_string(), platform))?;
    let chosen = repository.document(TagOrDigest::Digest(entry.digest)).await?;
    match parse_document(chosen.content_type.as_deref(), &chosen.bytes).map_err(document_error)? {
        Document::Manifest(manifest) => {
            Ok(Resolved { digest: chosen.digest, manifest, index: Some((fetched.digest, fetched.bytes)) })
        }
        Document::Index(_) => Err(ServeError::Invalid { what: format!("{image}: an index within an index") }),
    }
}

/// The error for an image that has nothing for `platform`.
pub(crate) fn no_platform(image: &str, platform: &Platform) -> ServeError {
    let variant = platform.variant.as_ref().map(|variant| format!("/{variant}")).unwrap_or_default();
    ServeError::NotFound {
        what: format!("{image} has no image for {}/{}{variant}", platform.os, platform.architecture),
    }
}

/// The layers as manifest and config describe them together.
async fn describe_layers(
    repository: &Repository,
    image: &ImageRef,
    manifest: &Manifest,
) -> Result<Vec<WantedLayer>, ServeError> {
    let invalid = |what: String| ServeError::Invalid { what: format!("{image}: {what}") };
    if manifest.config.size > MAX_CONFIG {
        return Err(invalid(format!("the config has {} bytes, more than {MAX_CONFIG}", manifest.config.size)));
    }
    let config = repository.blob(&manifest.config.digest, MAX_CONFIG).await?;
    let config =
        parse_config(&config).map_err(|source| ServeError::Document { what: format!("config of {image}"), source })?;
    let (layers, diff_ids) = (&manifest.layers, &config.diff_ids);
    if layers.len() != diff_ids.len() || layers.len() > MAX_LAYERS {
        return Err(invalid(format!(
            "the manifest has {} layers (at most {MAX_LAYERS} are read), the config {} diff IDs",
            layers.len(),
            diff_ids.len()
        )));
    }
    let pairs = layers.iter().zip(diff_ids);
    Ok(pairs
        .map(|(layer, diff_id)| WantedLayer {
            digest: layer.digest,
            size: layer.size,
            media: layer.media.clone(),
            diff_id: *diff_id,
        })
        .collect())
}
