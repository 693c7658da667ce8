//! Making one image wholly local at once, on request.

use std::sync::Arc;
use std::time::Duration;

use millstream_chunkstore::{Layer, LayerState};
use millstream_oci::ImageRef;
use millstream_wire::millstream::v1 as wire;
use tonic::Status;

use crate::catalog::ImageRecord;
use crate::images::NodeImages;

/// How often progress is looked at.
const INTERVAL: Duration = Duration::from_millis(200);

/// The layers of one image that are not pulled the ordinary way.
#[derive(Debug)]
pub struct MakeLocal {
    images: Arc<NodeImages>,
    layers: Vec<Arc<Layer>>,
}

impl MakeLocal {
    /// Wants every layer of `wanted` (a reference or a manifest digest) before all others.
    ///
    /// # Errors
    /// NOT_FOUND when no layer of the image is lazy here.
    pub fn start(images: Arc<NodeImages>, wanted: &str) -> Result<Self, Status> {
        let found = find(&images, wanted).map_err(|error| Status::internal(format!("{error:#}")))?;
        let mut layers: Vec<Arc<Layer>> = Vec::new();
        for described in found.iter().flat_map(|record| &record.layers) {
            let known = layers.iter().any(|layer| layer.digest() == described.digest);
            layers.extend(images.store.layer(&described.digest).filter(|_| !known));
        }
        if layers.is_empty() {
            return Err(Status::not_found(format!(
                "image {wanted} is not lazy on this node, so there is nothing to fetch for it; hint: \
                 `millstream explain {wanted}` says how it was pulled"
            )));
        }
        for layer in layers.iter().filter(|layer| layer.state() == LayerState::Lazy) {
            images.fetcher.hydrate_first(&layer.digest());
        }
        Ok(Self { images, layers })
    }

    /// How far it is.
    ///
    /// # Errors
    /// FAILED_PRECONDITION when a layer was proven wrong, NOT_FOUND when one was removed meanwhile.
    pub fn progress(&self) -> Result<wire::PrefetchProgress, Status> {
        let mut progress = wire::PrefetchProgress::default();
        for layer in &self.layers {
            let digest = layer.digest();
            progress.layers_total += 1;
            progress.bytes_total += layer.bytes_total();
            progress.bytes_present += layer.bytes_present();
            match layer.state() {
                LayerState::Verified => progress.layers_verified += 1,
                LayerState::Quarantined { reason } => {
                    return Err(Status::failed_precondition(format!(
                        "layer {digest} is quarantined: {reason}; hint: stop its containers, remove the image and pull it again"
                    )));
                }
                LayerState::Lazy if self.images.store.layer(&digest).is_none() => {
                    return Err(Status::not_found(format!(
                        "layer {digest} was removed meanwhile, with its last image"
                    )));
                }
                LayerState::Lazy => {
                    let failed = self.images.fetcher.progress(&digest).and_then(|progress| progress.last_error);
                    progress.last_error = failed.unwrap_or(progress.last_error);
                }
            }
        }
        Ok(progress)
    }

    /// Returns when something has changed since `before`.
    ///
    /// # Errors
    /// As [`MakeLocal::progress`].
    pub async fn changed(&self, before: &wire::PrefetchProgress) -> Result<wire::PrefetchProgress, Status> {
        loop {
            tokio::time::sleep(INTERVAL).await;
            let now = self.progress()?;
            if now != *before {
                return Ok(now);
            }
        }
    }
}

/// Records of the image. People type the short form of a reference, containerd passes the long one; and of an image with
/// several tags only one is in its record, the others are in decisions.
fn find(images: &NodeImages, wanted: &str) -> anyhow::Result<Vec<ImageRecord>> {
    let long = wanted.parse::<ImageRef>().map_or_else(|_| wanted.to_owned(), |reference| reference.to_string());
    let mut manifests: Vec<String> = vec![wanted.to_owned()];
    for name in [wanted, &long] {
        manifests.extend(images.catalog.decisions(name)?.into_iter().take(1).map(|decision| decision.manifest));
    }
    let records = images.catalog.images()?.into_iter().map(|(_, record)| record);
    let is_meant = |record: &ImageRecord| {
        record.image == wanted || record.image == long || manifests.contains(&record.manifest.to_string())
    };
    Ok(records.filter(is_meant).collect())
}
