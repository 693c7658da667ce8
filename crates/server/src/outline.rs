//! An image that was never imported, but shares layers with one that was: known in part.

use std::collections::HashSet;

use futures::TryStreamExt;
use futures::stream::FuturesUnordered;
use millstream_oci::{DiffId, Digest, ImageRef, ManifestDigest, Platform};
use millstream_source::{BlobSource, ImageSource, names};

use crate::ServeError;
use crate::describe::{Described, describe};
use crate::import::{Importer, distinct};
use crate::layer::WantedLayer;
use crate::store::ImageRecord;

/// Layers that are proven at a time.
const PROOFS_AT_ONCE: usize = 4;

/// What is known of an image before it is imported.
#[derive(Debug, Clone)]
pub struct Outline {
    /// Digest of the platform's manifest.
    pub manifest: ManifestDigest,
    /// Diff IDs of all layers, bottom first.
    pub diff_ids: Vec<DiffId>,
    /// Layers that can be served already; 0: the image is as unknown as before.
    pub ready: usize,
}

impl Importer {
    /// Records which layers of `image` can be served already: those that have a TOC, and whose blob `proof` shows to have.
    /// `source` is asked for manifest and configuration only.
    pub(crate) async fn outline(
        &self,
        source: &dyn ImageSource,
        proof: &dyn BlobSource,
        image: &ImageRef,
        platform: &Platform,
    ) -> Result<Outline, ServeError> {
        let Described { manifest, layers, index } = describe(source, image, platform).await?;
        let mut outline =
            Outline { manifest, diff_ids: layers.iter().map(|layer| layer.diff_id).collect(), ready: layers.len() };
        let known = self.store.image(manifest, &image.name()).await?.map(|known| known.layers).unwrap_or_default();
        let is_known = |digest: &Digest| known.iter().any(|layer| layer.digest == *digest && layer.is_ready());
        let mut ready = HashSet::new();
        for group in distinct(&layers)?.chunks(PROOFS_AT_ONCE) {
            let mut proofs = FuturesUnordered::new();
            for layer in group {
                proofs.push(self.ready_layer(layer, is_known(&layer.digest), proof));
            }
            while let Some(proven) = proofs.try_next().await? {
                ready.extend(proven);
            }
        }
        let is_ready = |digest: &Digest| ready.contains(digest);
        outline.ready = layers.iter().filter(|layer| is_ready(&layer.digest)).count();
        if outline.ready == 0 {
            return Ok(outline);
        }
        if let Some((digest, bytes)) = index {
            self.store.put_index(digest, bytes).await?;
        }
        let layers = layers.into_iter().map(|layer| {
            let (ready, ineligible) = (is_ready(&layer.digest), layer.compression().err());
            let pending = !ready && ineligible.is_none();
            layer.into_record(ineligible, pending)
        });
        let record = ImageRecord { repository: image.name(), manifest, layers: layers.collect() };
        self.store.put_image(&record).await?;
        Ok(outline)
    }

    /// The layer, if it can be served.
    async fn ready_layer(
        &self,
        layer: &WantedLayer,
        is_known: bool,
        proof: &dyn BlobSource,
    ) -> Result<Option<Digest>, ServeError> {
        if layer.compression().is_err() {
            return Ok(None);
        }
        let Some(record) = self.store.layer(&layer.digest).await? else { return Ok(None) };
        let proven = is_known
            || {
                let toc = match self.content.toc(&layer.digest).await {
                    Ok(toc) => toc,
                    // Its import makes it anew.
                    Err(ServeError::Toc { .. } | ServeError::NotImported { .. }) => return Ok(None),
                    Err(error) => return Err(error),
                };
                match self.content.prove(&toc, proof).await {
                    Ok(proven) => proven,
                    // Said here; the layer is as unknown to this caller as if nobody had imported it.
                    Err(error) => {
                        tracing::info!({ names::CODE } = error.name(), { names::LAYER } = %layer.digest, %error, "layer is not shown");
                        false
                    }
                }
            };
        if proven {
            layer.compare(record.diff_id, record.size)?;
        }
        Ok(proven.then_some(layer.digest))
    }
}
