//! Which image a `Prepare` is about that does not say so: containerd's content store knows.
//!
//! A client has manifest and configuration before it unpacks the first layer. Manifests carry the label that keeps their
//! configuration from being collected, the configuration has the diff IDs and so the chain IDs, and the label
//! `containerd.io/distribution.source.HOST` names the repository, but not the port of its registry: that is looked for in the
//! names of other images and in the settings of hosts. A layer can be in several images: then the one that was
//! touched last is likely to be the one that is being pulled.
//!
//! That containerd may be asked while it waits for us is shown in `crates/containerd/README.md`.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use millstream_containerd::{BlobInfo, Containerd, ContainerdError, Namespace};
use millstream_oci::{
    ChainId, Digest, Document, ImageRef, ManifestDigest, Platform, chain_ids, parse_config, parse_document,
    select_platform,
};
use millstream_registry::registries_at;
use millstream_snapshots::PrepareRequest;
use tracing::debug;

use crate::labels::Wanted;

/// Label of manifests, and of nothing else, in every version and with every client.
const CONFIG: &str = "containerd.io/gc.ref.content.config";
/// What stands before the host in the labels that say where a blob came from.
const SOURCE: &str = "containerd.io/distribution.source.";
/// Manifests of a namespace that are listed, at most.
const MAX_LISTED: usize = 4096;
/// Manifests that are read for one look-up, at most; those that were read before are remembered.
const MAX_READ: usize = 64;
/// The largest manifest and the largest configuration that are read, in bytes.
const MAX_DOCUMENT: u64 = 1 << 20;
/// Images that one layer is tried as, at most.
const MAX_CANDIDATES: usize = 4;
/// Manifests that are remembered, and choices; beyond that all are forgotten.
const MAX_REMEMBERED: usize = 1024;
/// Namespaces that an image is looked for in, at most.
const MAX_NAMESPACES: usize = 32;
/// How long a person waits for the names of an image.
const NAMES_LIMIT: Duration = Duration::from_secs(2);

/// One layer of an image: the chain up to it, and its blob.
type Layers = Vec<(ChainId, Digest)>;

/// Looks into containerd for images.
#[derive(Debug)]
pub struct Lookup {
    containerd: Containerd,
    hosts_dir: PathBuf,
    /// What was read; `None` of what is no image that we can read. Content has the digest that names it, so none of this can
    /// grow old.
    manifests: Mutex<HashMap<Digest, Option<Arc<Layers>>>>,
    /// What the latest `Prepare` of a layer was taken for.
    chosen: Mutex<HashMap<(String, ChainId), Wanted>>,
}

impl Lookup {
    /// Asks nothing yet. `hosts_dir` has a directory for each registry with settings of its own.
    #[must_use]
    pub fn new(containerd: Containerd, hosts_dir: PathBuf) -> Self {
        Self { containerd, hosts_dir, manifests: Mutex::default(), chosen: Mutex::default() }
    }

    /// The images of the request's namespace that have its layer at its place, the one that was touched last first; those that
    /// were found when `patience` is over.
    ///
    /// # Errors
    /// In words, why there is none.
    pub async fn candidates(&self, request: &PrepareRequest, patience: Duration) -> Result<Vec<Wanted>, String> {
        let mut found = Vec::new();
        let looked = tokio::time::timeout(patience, self.look(request, &mut found)).await;
        match looked {
            _ if !found.is_empty() => Ok(found),
            Ok(Ok(())) => Err(format!("no image in containerd's content store has the layer {}", request.target)),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("containerd's content store was not searched within {patience:?}")),
        }
    }

    async fn look(&self, request: &PrepareRequest, found: &mut Vec<Wanted>) -> Result<(), ContainerdError> {
        let space = self.containerd.namespace(&request.namespace)?;
        let mut manifests = space.blobs(&format!("labels.\"{CONFIG}\""), MAX_LISTED).await?;
        manifests.sort_by_key(|info| std::cmp::Reverse(info.updated_at));
        let mut reads = 0;
        for info in &manifests {
            let Some(layers) = self.layers(&space, info, &mut reads).await? else { continue };
            let Some((_, layer)) = layers.iter().find(|(chain, _)| *chain == request.target) else { continue };
            let manifest = ManifestDigest(info.digest);
            for (host, repository) in sources(&info.labels) {
                let registries = self.registries(&space, host, repository).await?;
                let names = registries.iter().map(|registry| format!("{registry}/{repository}@{manifest}"));
                let images = names.filter_map(|name| ImageRef::parse(&name).ok());
                found.extend(images.map(|image| Wanted { image, manifest, layer: *layer }));
            }
            if found.len() >= MAX_CANDIDATES {
                found.truncate(MAX_CANDIDATES);
                break;
            }
        }
        Ok(())
    }

    /// The registries of a host, the likeliest first: where an image of this name came from, those with settings, those of other
    /// images, and the usual port.
    async fn registries(
        &self,
        space: &Namespace,
        host: &str,
        repository: &str,
    ) -> Result<Vec<String>, ContainerdError> {
        let (dir, name) = (self.hosts_dir.clone(), host.to_owned());
        let configured = tokio::task::spawn_blocking(move || registries_at(&dir, &name)).await.unwrap_or_default();
        let of_host = |image: &ImageRef| {
            let registry = image.registry();
            registry.rsplit_once(':').map_or(registry, |(host, _)| host) == host
        };
        // The pattern lets through a little more than it should.
        let plain = host.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-'));
        let images = if plain { space.images(&format!("name~=\"^{host}(:[0-9]+)?/\"")).await? } else { Vec::new() };
        let images = images.iter().filter_map(|image| ImageRef::parse(&image.name).ok());
        let images: Vec<ImageRef> = images.filter(of_host).collect();
        let same = images.iter().filter(|image| image.repository() == repository).map(ImageRef::registry);
        let others = images.iter().map(ImageRef::registry);
        let mut found: Vec<String> = Vec::new();
        for registry in same.chain(configured.iter().map(String::as_str)).chain(others).chain([host]) {
            if !found.iter().any(|known| known == registry) {
                found.push(registry.to_owned());
            }
        }
        Ok(found)
    }

    /// The layers of a manifest, remembered or read; `None` if it is no image, or if enough was read.
    async fn layers(
        &self,
        space: &Namespace,
        info: &BlobInfo,
        reads: &mut usize,
    ) -> Result<Option<Arc<Layers>>, ContainerdError> {
        if let Some(known) = self.remembered().get(&info.digest) {
            return Ok(known.clone());
        }
        if *reads >= MAX_READ {
            return Ok(None);
        }
        *reads += 1;
        let layers = match read_layers(space, info).await {
            Ok(layers) => Some(Arc::new(layers)),
            Err(Unfit::Image(why)) => {
                debug!(manifest = %info.digest, reason = why, "a manifest in containerd's content store is passed over");
                None
            }
            // Collected meanwhile, or its configuration has not come yet: another look may find it.
            Err(Unfit::Now(ContainerdError::NotFound { .. })) => return Ok(None),
            Err(Unfit::Now(error)) => return Err(error),
        };
        let mut remembered = self.remembered();
        if remembered.len() >= MAX_REMEMBERED {
            remembered.clear();
        }
        remembered.insert(info.digest, layers.clone());
        Ok(layers)
    }

    fn remembered(&self) -> MutexGuard<'_, HashMap<Digest, Option<Arc<Layers>>>> {
        self.manifests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers what a request was taken for, so that the decision about it can be named.
    pub fn choose(&self, request: &PrepareRequest, wanted: &Wanted) {
        let mut chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        if chosen.len() >= MAX_REMEMBERED {
            chosen.clear();
        }
        chosen.insert((request.namespace.clone(), request.target), wanted.clone());
    }

    /// What a request was taken for.
    pub fn chosen(&self, request: &PrepareRequest) -> Option<Wanted> {
        let chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        chosen.get(&(request.namespace.clone(), request.target)).cloned()
    }

    /// The manifests that containerd's images of this name stand for, in whatever namespace. Empty if there is none, or
    /// containerd does not answer.
    pub async fn manifests(&self, image: &ImageRef) -> Vec<ManifestDigest> {
        let mut found = Vec::new();
        let looked = tokio::time::timeout(NAMES_LIMIT, self.look_for_name(&image.to_string(), &mut found)).await;
        if let Ok(Err(error)) = looked {
            debug!(%error, "containerd does not say what an image stands for");
        }
        found
    }

    async fn look_for_name(&self, name: &str, found: &mut Vec<ManifestDigest>) -> Result<(), ContainerdError> {
        for space in self.containerd.namespaces().await?.into_iter().take(MAX_NAMESPACES) {
            let space = self.containerd.namespace(&space)?;
            let target = match space.image(name).await {
                Ok(image) => image.target,
                Err(ContainerdError::NotFound { .. }) => continue,
                Err(error) => return Err(error),
            };
            let document = match space.read_all(&target.digest, MAX_DOCUMENT).await {
                Ok(bytes) => parse_document(Some(&target.media_type), &bytes).ok(),
                Err(_) => None,
            };
            let manifest = match document {
                Some(Document::Index(entries)) => match select_platform(&entries, &Platform::host()) {
                    Some(entry) => entry.digest,
                    None => continue,
                },
                _ => ManifestDigest(target.digest),
            };
            if !found.contains(&manifest) {
                found.push(manifest);
            }
        }
        Ok(())
    }
}

/// Why a manifest gives no layers.
enum Unfit {
    /// It never will.
    Image(String),
    /// containerd did not give it.
    Now(ContainerdError),
}

impl From<ContainerdError> for Unfit {
    fn from(error: ContainerdError) -> Self {
        match error {
            ContainerdError::TooLarge { .. } | ContainerdError::Damaged { .. } => Self::Image(error.to_string()),
            error => Self::Now(error),
        }
    }
}

async fn read_layers(space: &Namespace, info: &BlobInfo) -> Result<Layers, Unfit> {
    let unfit = |error: &dyn std::fmt::Display| Unfit::Image(error.to_string());
    let bytes = space.read_all(&info.digest, MAX_DOCUMENT).await?;
    let Document::Manifest(manifest) = parse_document(None, &bytes).map_err(|error| unfit(&error))? else {
        return Err(unfit(&"it is an index"));
    };
    let bytes = space.read_all(&manifest.config.digest, MAX_DOCUMENT).await?;
    let config = parse_config(&bytes).map_err(|error| unfit(&error))?;
    if config.diff_ids.len() != manifest.layers.len() {
        return Err(unfit(&"manifest and configuration differ in the number of layers"));
    }
    let layers = manifest.layers.iter().map(|layer| layer.digest);
    Ok(chain_ids(&config.diff_ids).into_iter().zip(layers).collect())
}

/// Host and repository of each place that a blob came from.
fn sources(labels: &BTreeMap<String, String>) -> impl Iterator<Item = (&str, &str)> {
    let named = labels.iter().filter_map(|(key, value)| Some((key.strip_prefix(SOURCE)?, value)));
    named.flat_map(|(host, names)| names.split(',').map(move |name| (host, name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_are_those_of_the_labels() {
        let labels: BTreeMap<String, String> = [
            (format!("{SOURCE}docker.io"), "library/nginx".to_owned()),
            (format!("{SOURCE}127.0.0.1"), "a,team/b".to_owned()),
            (CONFIG.to_owned(), "sha256:00".to_owned()),
        ]
        .into();
        let found: Vec<_> = sources(&labels).collect();
        assert_eq!(found, [("127.0.0.1", "a"), ("127.0.0.1", "team/b"), ("docker.io", "library/nginx")]);
    }
}
