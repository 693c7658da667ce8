//! Where the layers of this node's images come from: after a start, and for what has to be fetched again.

use std::sync::Arc;
use std::time::SystemTime;

use anyhow::Context;
use millstream_chunkstore::{Layer, LayerState};
use millstream_oci::Digest;
use millstream_source::{ErrorKind, SourceError, names};
use tracing::warn;

use super::NodeImages;
use crate::catalog::ImageRecord;
use crate::origin::Origin;
use crate::server_client::ServedLayer;

impl NodeImages {
    /// Has the server describe an image again, and takes in the tables of those of its layers whose own are damaged. Gives what
    /// it said.
    ///
    /// # Errors
    /// Those of the server, of disk and database, and when a table is not that of the layer.
    pub async fn bring_back(self: &Arc<Self>, repository: &str, origin: &Origin) -> anyhow::Result<ImageRecord> {
        let (record, layers) = self.ask(origin).await?;
        let wanted = |layer: &ServedLayer| self.store.is_damaged(&layer.digest);
        let tocs = layers.into_iter().filter(wanted).filter_map(|layer| layer.bytes).collect();
        // Those above the first that cannot be lazy are containerd's.
        let lazy = record.layers.iter().take_while(|layer| layer.ineligible.is_none()).count();
        self.take_tables(repository.to_owned(), record.clone(), lazy, tocs, origin)
            .await?
            .map_err(|mismatch| anyhow::anyhow!("{}", mismatch.message))?;
        let images = Arc::clone(self);
        tokio::task::spawn_blocking(move || images.views.restore()).await??;
        Ok(record)
    }

    /// Lets the fetcher go on with every layer that is not wholly local; the network is not needed for that. Blocks, and must
    /// not be called on a thread of the runtime: a credential helper may take seconds.
    ///
    /// # Errors
    /// Those of the database.
    pub fn resume(&self) -> anyhow::Result<()> {
        for (_, record) in self.catalog.images()? {
            let origin = record
                .image
                .parse()
                .map_err(anyhow::Error::from)
                .and_then(|image| Ok(self.origins.of(&image, record.manifest)?));
            let origin = match origin {
                Ok(origin) => origin,
                Err(error) => {
                    warn!(
                        { names::IMAGE } = record.image,
                        error = format!("{error:#}"),
                        "cannot go on fetching this image"
                    );
                    continue;
                }
            };
            // As in `take_in`: no layer may be removed between the look at the store and the fetcher.
            let _turn = self.admission.blocking_turn();
            let sources = origin.sources();
            for layer in record.layers.iter().filter_map(|layer| self.usable(&layer.digest)) {
                if layer.state() == LayerState::Lazy {
                    let digest = layer.digest();
                    self.fetcher.attach(layer, sources.clone());
                    self.fetcher.hydrate(&digest);
                }
            }
        }
        Ok(())
    }

    /// Sees to it that the fetcher has sources of a layer, also of one that was wholly local. Blocks, and must not be called on
    /// a thread of the runtime: a credential helper may take seconds.
    ///
    /// # Errors
    /// When no image is known that has the layer, or its credential cannot be had.
    pub fn supply(&self, layer: &Arc<Layer>) -> Result<(), SourceError> {
        let digest = layer.digest();
        if self.fetcher.is_attached(&digest) {
            return Ok(());
        }
        // One image that has it will do.
        if let Some(origin) = self.origins_of(&digest)?.first() {
            self.fetcher.attach(Arc::clone(layer), origin.sources());
        }
        Ok(())
    }

    /// Somebody is about to use these layers. What was given up of them comes back, as far as there is room.
    pub(super) fn note_use(&self, layers: &[Digest]) {
        // The same for all: layers of one image do not make room for each other.
        let now = SystemTime::now();
        for layer in layers.iter().filter_map(|digest| self.store.layer(digest)) {
            layer.note_use(now);
            if layer.state() == LayerState::Lazy && self.fetcher.is_attached(&layer.digest()) {
                self.fetcher.hydrate(&layer.digest());
            }
        }
    }

    /// Gives a layer to the fetcher anew, with the sources of all images that have it: it is to be fetched again.
    ///
    /// # Errors
    /// Those of the database, and when no image has the layer or none has a credential that can be read.
    pub async fn attach_anew(self: &Arc<Self>, digest: Digest) -> anyhow::Result<()> {
        let images = Arc::clone(self);
        let origins = tokio::task::spawn_blocking(move || images.origins_of(&digest)).await??;
        let _turn = self.admission.turn().await;
        let layer = self.usable(&digest).with_context(|| format!("layer {digest} was removed"))?;
        self.fetcher.detach(&digest);
        for origin in origins {
            self.fetcher.attach(Arc::clone(&layer), origin.sources());
        }
        Ok(())
    }

    /// Where a layer comes from: one origin for each image that has it, at least one. Blocks.
    fn origins_of(&self, digest: &Digest) -> Result<Vec<Origin>, SourceError> {
        let local = |error: anyhow::Error| SourceError::new(ErrorKind::Local, format!("{error:#}"));
        let mut failed = SourceError::new(ErrorKind::NotFound, format!("no image is known that has layer {digest}"));
        let mut origins = Vec::new();
        for (_, record) in self.catalog.images().map_err(local)? {
            if record.layers.iter().any(|layer| layer.digest == *digest) {
                let image = record.image.parse().map_err(|error: millstream_oci::ReferenceError| local(error.into()));
                match image.and_then(|image| self.origins.of(&image, record.manifest)) {
                    Ok(origin) => origins.push(origin),
                    Err(error) => failed = error,
                }
            }
        }
        if origins.is_empty() { Err(failed) } else { Ok(origins) }
    }

    /// Lazy layers that the fetcher does not know: the credential of their image could not be read when they were taken up.
    #[must_use]
    pub fn without_source(&self) -> Vec<Digest> {
        let layers = self.store.layers().into_iter().filter(|layer| layer.state() == LayerState::Lazy);
        let digests = layers.map(|layer| layer.digest()).filter(|digest| !self.admission.is_dying(digest));
        digests.filter(|digest| self.fetcher.progress(digest).is_none()).collect()
    }
}
