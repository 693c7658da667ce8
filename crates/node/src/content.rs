//! File bytes for the FUSE adapter: from the store, fetched first where they are missing.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use millstream_chunkstore::{Layer, LayerState, Refusal, Store};
use millstream_fuse::adapter::{Later, ReadRequest};
use millstream_fuse::{Content, ContentError, Operation};
use millstream_layerfs::{Decoded, NodeId};
use millstream_prefetch::Fetcher;
use millstream_source::{ErrorKind, Priority, SourceError, names};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tracing::{debug, error, warn};

use crate::images::NodeImages;
use crate::metrics::{NodeMetrics, ReadResult};

/// How long a read waits, after a start, for the fetcher to learn where its layer comes from.
const RESUME_PATIENCE: Duration = Duration::from_secs(60);
/// How often it looks: layers become known one image after the other.
const RESUME_POLL: Duration = Duration::from_millis(100);

/// Content of all layers on this node.
#[derive(Debug)]
pub struct NodeContent {
    store: Arc<Store>,
    images: Arc<NodeImages>,
    /// Whether the fetcher knows the sources of all layers that were here before the start.
    resumed: watch::Receiver<bool>,
    metrics: NodeMetrics,
}

impl NodeContent {
    /// Reads from the store of `images`, lets its fetcher fill it. Until `resumed` is true (or its sender is gone), a layer
    /// without sources is waited for: a container that read while the worker died sees a pause, not an error.
    #[must_use]
    pub fn new(images: Arc<NodeImages>, resumed: watch::Receiver<bool>, metrics: NodeMetrics) -> Self {
        Self { store: Arc::clone(&images.store), images, resumed, metrics }
    }
}

fn layer(store: &Store, request: &ReadRequest) -> Result<Arc<Layer>, ContentError> {
    store.layer_by_number(request.layer).ok_or(ContentError::Gone)
}

/// One line that names everything a person needs: which file of which layer, where in it, and why.
fn report(layer: &Layer, request: &ReadRequest, code: &str, failure: &dyn std::fmt::Display) {
    error!(
        { names::CODE } = code,
        { names::LAYER } = %layer.digest(),
        { names::PATH } = path(layer, request.node),
        { names::OFFSET } = request.wanted.start - request.file.start,
        { names::SIZE } = request.wanted.len(),
        error = %failure,
        "a read failed with EIO"
    );
}

fn path(layer: &Layer, node: NodeId) -> String {
    let inode = match node.decode() {
        Some(Decoded::File { inode, .. }) => Some(inode),
        _ => None,
    };
    inode
        .and_then(|inode| layer.toc().path_of(inode))
        .map_or_else(|| "?".into(), |path| String::from_utf8_lossy(&path).into_owned())
}

async fn ensure(
    fetcher: &Fetcher,
    layer: &Layer,
    request: &ReadRequest,
    mut resumed: watch::Receiver<bool>,
) -> Result<(), SourceError> {
    let deadline = Instant::now() + RESUME_PATIENCE;
    loop {
        // Looked at first: if it becomes true afterwards, there is one more round.
        let last = *resumed.borrow() || resumed.has_changed().is_err() || Instant::now() >= deadline;
        match fetcher.ensure(&layer.digest(), request.wanted, Priority::Demand).await {
            Err(failure) if failure.kind == ErrorKind::NotFound && !last => {
                // Whichever way this ends, it is looked again.
                let _ = timeout(RESUME_POLL, resumed.wait_for(|resumed| *resumed)).await;
            }
            result => return result,
        }
    }
}

/// What `request` wants, if it is in the store and the disk can be read. Blocks.
fn read_present(layer: &Layer, request: &ReadRequest) -> Result<Option<Vec<u8>>, ContentError> {
    layer.note_use(SystemTime::now());
    let len = usize::try_from(request.wanted.len()).map_err(|_| ContentError::Unavailable)?;
    let mut bytes = vec![0; len];
    match layer.read(request.wanted, &mut bytes) {
        Ok(missing) => Ok(missing.is_empty().then_some(bytes)),
        // As if nothing were here.
        Err(failure) if Refusal::of(&failure).is_some() => {
            warn!({ names::CODE } = "store.read", { names::LAYER } = %layer.digest(), error = %failure, "the disk cannot be read");
            Ok(None)
        }
        Err(failure) => {
            report(layer, request, "store.read", &failure);
            Err(ContentError::Unavailable)
        }
    }
}

impl Content for NodeContent {
    fn read_local(&self, request: &ReadRequest) -> Result<Option<Vec<u8>>, ContentError> {
        // Whatever comes of it: the profile is about what is asked for.
        self.images.recorder.touch(request.layer, request.wanted);
        let read = layer(&self.store, request).and_then(|layer| read_present(&layer, request));
        match &read {
            Ok(Some(_)) => self.metrics.read(ReadResult::Local),
            // Counted when it has come.
            Ok(None) => {}
            Err(_) => self.metrics.read(ReadResult::Failed),
        }
        read
    }

    fn read_remote(&self, request: ReadRequest) -> Later<Result<Vec<u8>, ContentError>> {
        let (images, resumed, metrics) = (Arc::clone(&self.images), self.resumed.clone(), self.metrics.clone());
        Box::pin(async move {
            let begun = Instant::now();
            let read = fetch(images, request, resumed).await;
            metrics.waited(begun.elapsed());
            metrics.read(read.as_ref().map_or(ReadResult::Failed, |(_, result)| *result));
            read.map(|(bytes, _)| bytes)
        })
    }

    fn took_workers_along(&self, node: NodeId, operation: Operation) {
        self.metrics.read(ReadResult::Failed);
        set_aside(&self.store, node, operation);
    }
}

/// A layer that may have ended two workers is not to end a third one: it is out of use until it was removed and pulled again.
fn set_aside(store: &Store, node: NodeId, operation: Operation) {
    let reason = "a request was in flight when two workers in a row died";
    let Some(Decoded::File { layer, .. }) = node.decode() else {
        error!({ names::CODE } = "node.poisoned", ?node, ?operation, "{reason}; answered with EIO");
        return;
    };
    let Some(layer) = store.layer_by_number(layer) else { return };
    let path = path(&layer, node);
    let reason = format!("{reason}: {operation:?} of {path}");
    error!(
        { names::CODE } = "node.poisoned",
        { names::LAYER } = %layer.digest(),
        { names::PATH } = path,
        ?operation,
        "a request was in flight when two workers in a row died; answered with EIO, and its layer is set aside"
    );
    if let Err(failure) = layer.quarantine(&reason) {
        warn!({ names::LAYER } = %layer.digest(), error = %failure, "set aside until the next start only");
    }
}

/// What `request` wants, fetched as far as it is missing.
async fn fetch(
    images: Arc<NodeImages>,
    request: ReadRequest,
    resumed: watch::Receiver<bool>,
) -> Result<(Vec<u8>, ReadResult), ContentError> {
    let (store, fetcher) = (&images.store, &images.fetcher);
    let layer = layer(store, &request)?;
    if layer.state() == LayerState::Verified {
        // All of it is here, but the disk cannot be read. So far it had no need of sources.
        let (supplied, wanting) = (Arc::clone(&images), Arc::clone(&layer));
        if let Ok(Err(failure)) = tokio::task::spawn_blocking(move || supplied.supply(&wanting)).await {
            report(&layer, &request, failure.kind.code(), &failure);
            return Err(ContentError::Unavailable);
        }
    }
    match ensure(fetcher, &layer, &request, resumed).await {
        Ok(()) => {
            let stored = Arc::clone(&layer);
            let read = tokio::task::spawn_blocking(move || read_present(&stored, &request));
            let read = read.await.map_err(|failure| {
                warn!(error = %failure, "reading from the store was cut off");
                ContentError::Unavailable
            })?;
            if let Some(bytes) = read? {
                return Ok((bytes, ReadResult::Fetched));
            }
            // It came for a successor of this layer, which was removed and admitted again meanwhile; or it was given up again;
            // or the disk cannot be read.
            if store.layer_by_number(request.layer).is_none() {
                return Err(ContentError::Gone);
            }
        }
        // The disk is full or fails: the reader gets its bytes all the same, they are only not kept. Said once, by the store.
        Err(failure) if failure.kind == ErrorKind::Local => {
            debug!({ names::LAYER } = %layer.digest(), error = %failure, "serving without storing");
        }
        Err(failure) => {
            report(&layer, &request, failure.kind.code(), &failure);
            return Err(ContentError::Unavailable);
        }
    }
    let fetched = fetcher.fetch_unstored(&layer.digest(), request.wanted).await;
    fetched.map(|bytes| (bytes.into(), ReadResult::Unstored)).map_err(|failure| {
        report(&layer, &request, failure.kind.code(), &failure);
        ContentError::Unavailable
    })
}
