//! What the snapshot service asks of whoever knows about lazy images.

use std::collections::BTreeMap;
use std::path::PathBuf;

use async_trait::async_trait;
use millstream_oci::{ChainId, Digest};

use crate::{Backing, PrepareOutcome, Usage};

/// A `Prepare` that offers to skip a layer: it carries the label `containerd.io/snapshot.ref`.
#[derive(Debug, Clone)]
pub struct PrepareRequest {
    /// The namespace of containerd's client; every namespace has to prove its right to read by itself.
    pub namespace: String,
    /// The chain ID of the layer that is wanted.
    pub target: ChainId,
    /// All labels of the request.
    pub labels: BTreeMap<String, String>,
    /// The snapshot below; none for the first layer of an image.
    pub parent: Option<Parent>,
}

/// The snapshot below the one that is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parent {
    /// Its name.
    pub name: String,
    /// The chain ID that it stands for, where known.
    pub target: Option<ChainId>,
    /// Where its files are.
    pub backing: Backing,
}

/// Why the files of lazy layers cannot be shown now.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{code}: {message}")]
pub struct ViewFailure {
    /// Stable code.
    pub code: &'static str,
    /// What was tried, on which layer, why it failed; with a `hint:` where one helps.
    pub message: String,
}

/// The lazy images of this node.
#[async_trait]
pub trait LazyImages: Send + Sync + 'static {
    /// Whether the layer can be shown without unpacking it.
    ///
    /// The caller drops the future at its deadline, so work that should go on belongs into a task of its own. An answer
    /// [`PrepareOutcome::Lazy`] promises that [`LazyImages::view`] works for the layer until
    /// [`LazyImages::released`] names it.
    async fn decide(&self, request: &PrepareRequest) -> PrepareOutcome;

    /// Called once per `Prepare` that offered to skip a layer, with what was answered in the end: it differs from the
    /// answer of [`LazyImages::decide`] where that came too late. For metrics and events; must not block.
    fn answered(&self, request: &PrepareRequest, outcome: &PrepareOutcome) {
        let _ = (request, outcome);
    }

    /// The directory that shows `run` (layers of consecutive snapshots, bottom first, never empty) merged into one.
    ///
    /// `below` are the lower directories under the run, top first: local snapshots and views of other runs. The
    /// directory must stay valid, under the same path, for as long as a snapshot uses all these layers; its path must
    /// have neither colon, comma nor backslash, and should share most of its leading directories with the snapshots'
    /// root: containerd shortens mount options by the common prefix.
    ///
    /// # Errors
    /// When the layers are not there or cannot be shown.
    async fn view(&self, run: &[Digest], below: &[PathBuf]) -> Result<PathBuf, ViewFailure>;

    /// No snapshot uses these layers any more. Called with a lock held that `Prepare` needs: must return at once.
    fn released(&self, layers: &[Digest]);

    /// A layer that was left to containerd is unpacked and committed. Called while containerd waits, within a transaction of its
    /// database: must return at once.
    fn committed(&self, target: ChainId) {
        let _ = target;
    }

    /// What the layer takes on disk when it is wholly local: containerd asks once and keeps the answer.
    fn usage(&self, layer: &Digest) -> Usage;
}
