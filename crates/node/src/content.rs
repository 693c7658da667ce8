//! File bytes for the FUSE adapter: from the store, fetched first where they are missing.

use std::sync::Arc;

use millstream_chunkstore::{Layer, Store};
use millstream_fuse::adapter::{Later, ReadRequest};
use millstream_fuse::{Content, ContentError};
use millstream_layerfs::{Decoded, NodeId};
use millstream_prefetch::Fetcher;
use millstream_source::{ErrorKind, Priority, names};
use tracing::{error, warn};

/// Content of all layers on this node.
#[derive(Debug)]
pub struct NodeContent {
    store: Arc<Store>,
    fetcher: Arc<Fetcher>,
}

impl NodeContent {
    /// Reads from `store`, lets `fetcher` fill it.
    #[must_use]
    pub fn new(store: Arc<Store>, fetcher: Arc<Fetcher>) -> Self {
        Self { store, fetcher }
    }
}

fn layer(store: &Store, request: &ReadRequest) -> Result<Arc<Layer>, ContentError> {
    store.layer_by_number(request.layer).ok_or(ContentError::Gone)
}

fn read(layer: &Layer, request: &ReadRequest) -> Result<Vec<u8>, ContentError> {
    let len = usize::try_from(request.wanted.len()).map_err(|_| ContentError::Unavailable)?;
    let mut bytes = vec![0; len];
    layer.read(request.wanted, &mut bytes).map_err(|failure| {
        report(layer, request, "store.read", &failure);
        ContentError::Unavailable
    })?;
    Ok(bytes)
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

impl Content for NodeContent {
    fn read_local(&self, request: &ReadRequest) -> Result<Option<Vec<u8>>, ContentError> {
        let layer = layer(&self.store, request)?;
        let missing = layer.missing(request.wanted).map_err(|failure| {
            report(&layer, request, "store.read", &failure);
            ContentError::Unavailable
        })?;
        if missing.is_empty() { read(&layer, request).map(Some) } else { Ok(None) }
    }

    fn read_remote(&self, request: ReadRequest) -> Later<Result<Vec<u8>, ContentError>> {
        let (store, fetcher) = (Arc::clone(&self.store), Arc::clone(&self.fetcher));
        Box::pin(async move {
            let layer = layer(&store, &request)?;
            let fetched = match fetcher.ensure(&layer.digest(), request.wanted, Priority::Demand).await {
                Ok(()) => None,
                // The disk is full or fails: the reader gets its bytes all the same, they are only not kept.
                Err(failure) if failure.kind == ErrorKind::Local => {
                    warn!({ names::LAYER } = %layer.digest(), %failure, "serving without storing");
                    Some(fetcher.fetch_unstored(&layer.digest(), request.wanted).await)
                }
                Err(failure) => Some(Err(failure)),
            };
            match fetched {
                None => {}
                Some(Ok(bytes)) => return Ok(bytes.into()),
                Some(Err(failure)) => {
                    report(&layer, &request, failure.kind.code(), &failure);
                    return Err(ContentError::Unavailable);
                }
            }
            tokio::task::spawn_blocking(move || read(&layer, &request)).await.map_err(|failure| {
                warn!(%failure, "reading from the store was cut off");
                ContentError::Unavailable
            })?
        })
    }
}
