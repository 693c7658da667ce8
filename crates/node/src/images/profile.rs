//! What starts of this node's images read: brought before it is read, and written down for the next node.

use std::sync::Arc;

use millstream_chunkstore::LayerState;
use millstream_oci::Digest;
use millstream_prefetch::AskedProfile;
use millstream_profile::{PAGE_SIZE, ProfileLayer, Recording};
use millstream_source::{ErrorKind, SourceError, names};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, warn};

use super::{MAX_KNOWN_LAYERS, NodeImages};
use crate::catalog::ImageRecord;
use crate::origin::Origin;
use crate::recorder::Recorded;
use crate::warm;

/// Images with the same layers that are told of one start, at most: other tags, other repositories.
const TOLD: usize = 4;

impl NodeImages {
    /// Asks the server, if there is one, what starts of the image read. Returns at once; dropping what it gives takes the request
    /// back.
    pub(super) fn ask_for_profile(&self, origin: &Origin) -> Option<AskedProfile> {
        let profiles = origin.profiles()?;
        let verified = self.store.layers().into_iter().filter(|layer| layer.state() == LayerState::Verified);
        let local: Vec<Digest> = verified.map(|layer| layer.digest()).take(MAX_KNOWN_LAYERS).collect();
        let of = local.clone();
        let asked = AbortOnDropHandle::new(self.runtime.spawn(async move { profiles.profile(true, &of).await }));
        let answer = async move {
            asked.await.unwrap_or_else(|error| Err(SourceError::new(ErrorKind::Local, format!("asking: {error}"))))
        };
        Some(AskedProfile { local, answer: Box::pin(answer), sink: None })
    }

    /// Has the fetcher bring it. `whole` says that all layers are lazy.
    pub(super) fn replay(self: &Arc<Self>, record: &ImageRecord, asked: Option<AskedProfile>, whole: bool) {
        if let Some(mut asked) = asked {
            let layers: Vec<Digest> = record.layers.iter().map(|layer| layer.digest).collect();
            if whole {
                asked.sink = Some(warm::choose(self, &record.image, layers.clone()));
            }
            self.fetcher.replay(record.image.clone(), &layers, asked);
        }
    }

    /// A container is about to start on `run`, the lazy layers of an image from its bottom: writes down what it reads.
    pub(super) fn record_start(self: &Arc<Self>, run: &[Digest]) {
        if !self.origins.profiles || self.origins.server.is_none() {
            return;
        }
        let recorded = |digest| {
            let layer = self.store.layer(digest)?;
            Some(Recorded {
                number: layer.number(),
                layer: ProfileLayer { digest: layer.digest(), toc: layer.toc_digest() },
            })
        };
        let Some(layers) = run.iter().map(recorded).collect::<Option<Vec<_>>>() else { return };
        let Some(running) = self.recorder.begin(layers) else { return };
        let (images, run) = (Arc::clone(self), run.to_vec());
        self.runtime.spawn(async move {
            if let Some(recording) = running.over().await {
                images.tell(&run, recording).await;
            }
        });
    }

    async fn tell(self: &Arc<Self>, run: &[Digest], recording: Recording) {
        let (images, of) = (Arc::clone(self), run.to_vec());
        let origins = tokio::task::spawn_blocking(move || images.origins_of_run(&of)).await;
        let origins = match origins {
            Ok(Ok(origins)) => origins,
            Ok(Err(error)) => return warn!(error = format!("{error:#}"), "nobody is told what a start read"),
            Err(_) => return,
        };
        for origin in origins {
            let Some(profiles) = origin.profiles() else { continue };
            let bytes = recording.read.pages() * PAGE_SIZE;
            match profiles.record(&recording).await {
                Ok(()) => debug!({ names::IMAGE } = origin.image, bytes, "the server was told what a start read"),
                // It was never told of the image, or is of an earlier release.
                Err(error) if matches!(error.kind, ErrorKind::NotImported | ErrorKind::NotFound) => {
                    debug!({ names::IMAGE } = origin.image, %error, "the server does not want to know what a start read");
                }
                Err(error) => warn!(
                    { names::IMAGE } = origin.image, { names::CODE } = error.kind.code(), %error,
                    "the server was not told what a start read"
                ),
            }
        }
    }

    /// Images whose lazy layers are just these. Blocks.
    fn origins_of_run(&self, run: &[Digest]) -> anyhow::Result<Vec<Origin>> {
        let mut origins = Vec::new();
        for (_, record) in self.catalog.images()? {
            let lazy = record.layers.iter().take_while(|layer| layer.ineligible.is_none());
            if origins.len() < TOLD && lazy.map(|layer| layer.digest).eq(run.iter().copied()) {
                origins.push(self.origins.of(&record.image.parse()?, record.manifest)?);
            }
        }
        Ok(origins)
    }
}
