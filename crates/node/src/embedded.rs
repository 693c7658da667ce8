//! The server in this process, for a node that is told of no other: the same service that `millstream-server` runs, on a store
//! below the node's own root, fed from containerd's content store instead of the network.
//!
//! Who may read an image is settled before: every decision rests on a probe at the registry with the caller's credential, and
//! nothing that this server says is used unless the probe succeeds. A remote server has no part in that probe and has to ask by
//! itself; this one would only ask the same registry the same thing twice.

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use millstream_chunkstore::LayerState;
use millstream_containerd::Containerd;
use millstream_oci::{Digest, ImageRef, chain_ids};
use millstream_registry::Registry;
use millstream_server::{ContentOptions, ImagesService, ImportOptions, Outline, ServeError, ServiceOptions, Store};
use millstream_source::{ErrorKind, SourceError};
use millstream_wire::millstream::v1::ImportProgress;
use tokio_stream::{Stream, StreamExt};
use tracing::{info, warn};

use crate::content_store::ContentStore;
use crate::index::{Expected, Indexer};
use crate::origin::Origin;

/// Images that are indexed at a time: one in the background, one because somebody asked for it.
const IMAGES: usize = 2;
/// An import that takes longer fails.
const DEADLINE: Duration = Duration::from_secs(3 * 3600);
/// Bytes of memory for tables that were used lately.
const TOC_CACHE: u64 = 4 << 20;
/// The largest table that is read, in bytes: the node takes none that is larger.
const MAX_TOC: u64 = 256 << 20;

/// One layer that cannot be entered (most of those with zstd) may take one part in so many of the limit for its content.
const PACKED_SHARE: u64 = 4;

/// What happens next with an image that was not indexed.
const NEXT: &str = "once it is pulled it is indexed from this node's own copy, and streams from the next pull on";

/// How the embedded server is set up.
#[derive(Debug, Clone)]
pub struct EmbeddedOptions {
    /// Where tables and windows are kept.
    pub directory: PathBuf,
    /// Bytes of them, beyond which what was used least recently goes.
    pub limit: u64,
}

/// Progress of an import; the last message has `done`.
pub type Indexing = Pin<Box<dyn Stream<Item = Result<ImportProgress, tonic::Status>> + Send>>;

/// The embedded server. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Embedded {
    service: ImagesService,
    store: Store,
    limit: u64,
    containerd: Option<Containerd>,
    /// The node's own layers: those that still need windows are kept here.
    layers: Arc<millstream_chunkstore::Store>,
    indexer: Arc<Indexer>,
    indexed: Arc<AtomicU64>,
}

impl Embedded {
    /// Opens the store. Without `containerd` nothing is ever indexed, what is here is served.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn open(
        options: EmbeddedOptions,
        registry: Registry,
        containerd: Option<Containerd>,
        layers: Arc<millstream_chunkstore::Store>,
        indexer: Arc<Indexer>,
    ) -> anyhow::Result<Self> {
        let EmbeddedOptions { directory, limit } = options;
        let scratch = directory.join("scratch");
        // Files there have no names; what is left has none to need it.
        std::fs::create_dir_all(&scratch).with_context(|| format!("making {}", scratch.display()))?;
        let store = directory.join("store");
        let store = Store::open(store.to_str().context("the path of the root is no text")?)?;
        let import = ImportOptions {
            images: IMAGES,
            builders: 1,
            deadline: DEADLINE,
            scratch,
            packed_max: limit / PACKED_SHARE,
            idle: true,
            ..ImportOptions::default()
        };
        let content = ContentOptions { toc_cache: TOC_CACHE, chunk_cache: 0, max_toc: MAX_TOC };
        let options = ServiceOptions { import, content, embedded: true, ..ServiceOptions::default() };
        let service = ImagesService::new(store.clone(), registry, options);
        Ok(Self { service, store, limit, containerd, layers, indexer, indexed: Arc::default() })
    }

    /// The service, for the client in this process.
    #[must_use]
    pub fn service(&self) -> ImagesService {
        self.service.clone()
    }

    /// What waits to be indexed.
    #[must_use]
    pub fn indexer(&self) -> &Arc<Indexer> {
        &self.indexer
    }

    /// Images that were indexed since the start. A decision from before may say less than can be said now.
    #[must_use]
    pub fn indexed(&self) -> u64 {
        self.indexed.load(Ordering::Acquire)
    }

    /// Learns as much of an image as can be known before it was indexed here, and expects it to be pulled the ordinary way.
    ///
    /// # Errors
    /// When no layer can be lazy, which is so unless other images have brought its lower layers.
    pub async fn prepare(&self, origin: &Origin) -> Result<(), SourceError> {
        let image = image_of(origin)?;
        let outline = self.outline(origin, &image).await.map_err(|error| not_indexed(&image, &error))?;
        if outline.ready < outline.diff_ids.len()
            && let Some(top) = chain_ids(&outline.diff_ids).last()
        {
            let expected = Expected { image: origin.image.clone(), name: image.to_string(), top: *top };
            self.indexer.expect(expected).await;
        }
        if outline.ready == 0 {
            return Err(SourceError::new(ErrorKind::NotImported, format!("the image is not indexed yet: {NEXT}")));
        }
        Ok(())
    }

    async fn outline(&self, origin: &Origin, image: &ImageRef) -> Result<Outline, SourceError> {
        let source = ContentStore::open(self.containerd()?, None, image.to_string()).await?;
        let outline = self.service.outline(&source, &*origin.repository, image).await;
        outline.map_err(|error| match error {
            ServeError::Source(error) => error,
            error => SourceError::new(ErrorKind::Local, error.to_string()),
        })
    }

    /// Indexes an image that containerd has, in `namespace` or in any. What comes is progress, the last message has `done`.
    ///
    /// # Errors
    /// When containerd cannot be asked, or too many images are being indexed.
    pub async fn import(&self, image: &ImageRef, namespace: Option<&str>) -> Result<Indexing, SourceError> {
        let source = ContentStore::open(self.containerd()?, namespace, image.to_string()).await?;
        self.shrink().await;
        let stream = self.service.import_from(Arc::new(source), image);
        let stream = stream.map_err(|error| SourceError::new(ErrorKind::Exhausted, error.to_string()))?;
        let indexed = Arc::clone(&self.indexed);
        let counted = stream.map(move |message| {
            if message.as_ref().is_ok_and(|progress| progress.done.is_some()) {
                indexed.fetch_add(1, Ordering::AcqRel);
            }
            message
        });
        Ok(Box::pin(counted))
    }

    /// As [`Embedded::import`], to the end.
    ///
    /// # Errors
    /// As there, and whatever ends the import.
    pub async fn import_whole(&self, image: &ImageRef) -> Result<(), SourceError> {
        let mut progress = self.import(image, None).await?;
        while let Some(message) = progress.next().await {
            message.map_err(|status| crate::server_client::failed("indexing", &status))?;
        }
        Ok(())
    }

    /// Removes what was used least recently, if there is too much.
    async fn shrink(&self) {
        let needed = |layer: &Digest| self.layers.layer(layer).is_some_and(|layer| layer.state() == LayerState::Lazy);
        match self.store.shrink(self.limit, SystemTime::now(), &needed).await {
            Ok(shrunk) if shrunk.layers > 0 => {
                info!(layers = shrunk.layers, bytes = shrunk.bytes, "tables that were not used for long are removed");
            }
            Ok(_) => {}
            Err(error) => warn!(%error, "the store of tables is not kept within its limit now"),
        }
    }

    fn containerd(&self) -> Result<&Containerd, SourceError> {
        self.containerd.as_ref().ok_or_else(|| {
            let text = "this node does not ask containerd; hint: set containerd.address in millstreamd.toml";
            SourceError::new(ErrorKind::Unavailable, text)
        })
    }
}

/// The image by digest, as it is called in the store.
fn image_of(origin: &Origin) -> Result<ImageRef, SourceError> {
    let image = ImageRef::parse(&origin.scope.repository);
    let image = image.map_err(|error| SourceError::new(ErrorKind::Malformed, error.to_string()))?;
    Ok(image.with_digest(origin.scope.manifest))
}

fn not_indexed(image: &ImageRef, error: &SourceError) -> SourceError {
    let text = format!("the image is not indexed yet, and cannot be: {error}; hint: millstream import {image}");
    SourceError::new(ErrorKind::NotImported, text)
}

/// Why a layer is not lazy that other images did not bring.
#[must_use]
pub fn pending_reason() -> String {
    format!("it is not indexed yet: {NEXT}")
}
