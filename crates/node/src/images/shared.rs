//! What others call: the snapshotter and the fetcher.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use millstream_oci::{ChainId, Digest};
use millstream_prefetch::FetchEvents;
use millstream_snapshots::{LazyImages, PrepareOutcome, PrepareRequest, Usage, ViewFailure};
use millstream_source::{SourceError, names};
use tokio::sync::Notify;
use tracing::{error, info, warn};

use super::{NodeImages, failed};

/// [`NodeImages`] behind a pointer that its own tasks can share.
#[derive(Debug, Clone)]
pub struct SharedImages(pub Arc<NodeImages>);

#[async_trait]
impl LazyImages for SharedImages {
    async fn decide(&self, request: &PrepareRequest) -> PrepareOutcome {
        // In a task of its own: what was begun is finished even if this caller stops waiting.
        let task = tokio::spawn(Arc::clone(&self.0).decide_wanted(request.clone()));
        task.await.unwrap_or_else(|error| failed(&anyhow::Error::from(error)))
    }

    fn answered(&self, request: &PrepareRequest, outcome: &PrepareOutcome) {
        self.0.metrics.answered(outcome);
        self.0.record_decision(request, outcome);
    }

    async fn view(&self, run: &[Digest], below: &[PathBuf]) -> Result<PathBuf, ViewFailure> {
        self.0.note_use(run);
        if below.is_empty() {
            self.0.record_start(run);
        }
        self.0.views.path(run, below).await.map_err(|error| {
            let message = format!("{error:#}");
            error!({ names::CODE } = "view.failed", error = message, "layers cannot be shown");
            ViewFailure { code: "view.failed", message }
        })
    }

    fn released(&self, layers: &[Digest]) {
        self.0.admission.give_back(layers.iter().copied());
        let this = Arc::clone(&self.0);
        self.0.runtime.spawn(async move {
            if let Err(error) = this.removed().await {
                warn!(error = format!("{error:#}"), "layers are not removed now; the next start removes them");
            }
        });
    }

    fn committed(&self, target: ChainId) {
        if let Some(embedded) = &self.0.origins.embedded {
            embedded.indexer().committed(target);
        }
    }

    fn usage(&self, layer: &Digest) -> Usage {
        self.0.store.layer(layer).map_or_else(Usage::default, |layer| Usage {
            bytes: layer.disk_size(),
            inodes: u64::from(layer.toc().inode_count()),
        })
    }
}

/// Tells people what the fetcher found out.
#[derive(Debug, Default)]
pub struct Reporter {
    /// Whom to tell that something large is done.
    pub done: Arc<Notify>,
}

impl FetchEvents for Reporter {
    fn verified(&self, layer: &Digest) {
        info!({ names::LAYER } = %layer, "layer is wholly local: diff ID and TOC are proven");
        self.done.notify_one();
    }

    fn quarantined(&self, layer: &Digest, reason: &str) {
        error!(
            { names::CODE } = "layer.quarantined",
            { names::LAYER } = %layer,
            reason,
            "LAYER QUARANTINED: what was served for it is not what its digest says; nothing more is served from it. \
             hint: stop its containers, remove the image and pull it again"
        );
    }

    fn failed(&self, layer: &Digest, error: &SourceError) {
        warn!({ names::CODE } = error.kind.code(), { names::LAYER } = %layer, %error, "hydration failed; it will be tried again");
    }
}
