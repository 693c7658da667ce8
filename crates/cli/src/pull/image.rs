//! An image's documents: from the registry, into containerd.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use millstream_containerd::{BlobDescriptor, ContainerdError, Image, Namespace};
use millstream_oci::{
    ChainId, DiffId, Digest, Document, ImageRef, IndexEntry, MAX_DOCUMENT_SIZE, Manifest, ManifestDigest, Platform,
    TagOrDigest, chain_ids, parse_config, parse_document, select_platform,
};
use millstream_registry::{Fetched, Repository};
use millstream_source::{Retry, SourceError};
use serde::Deserialize;

use crate::exit::{Exit, Failure};

/// Indexes within indexes that are followed, at most.
const MAX_DEPTH: usize = 4;
/// Requests for one document, at most.
const MAX_REQUESTS: u32 = 4;
/// Pause after the first of them; each later one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// The longest pause that a registry may ask for.
const MAX_PAUSE: Duration = Duration::from_secs(20);

/// One layer of an image.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub(crate) descriptor: BlobDescriptor,
    pub(crate) diff_id: DiffId,
    pub(crate) chain: ChainId,
}

/// An image as its registry has it.
#[derive(Debug)]
pub(crate) struct Resolved {
    /// The reference in full form: what containerd calls the image.
    pub(crate) name: String,
    image: ImageRef,
    /// What the name stands for first: indexes, then the manifest.
    documents: Vec<Stored>,
    pub(crate) manifest: ManifestDigest,
    config: Stored,
    /// Bottom first.
    pub(crate) layers: Vec<Layer>,
}

/// A document with what containerd has to know of it.
#[derive(Debug)]
struct Stored {
    descriptor: BlobDescriptor,
    bytes: Bytes,
    /// What its name in the content store begins with while it is written, as with containerd's own clients.
    kind: &'static str,
    /// Blobs that are not garbage as long as it is none: end of the label, digest.
    children: Vec<(String, String)>,
}

/// Media types as the manifest writes them: whoever unpacks the layers goes by them.
#[derive(Deserialize)]
struct RawManifest {
    layers: Vec<RawDescriptor>,
}

#[derive(Deserialize)]
struct RawDescriptor {
    #[serde(rename = "mediaType", default)]
    media_type: String,
}

/// Asks the registry what the reference stands for on `platform`, or on this machine. An image for one platform is taken as it
/// is where nobody named one, as with containerd.
pub(crate) async fn resolve(
    repository: &Repository,
    image: &ImageRef,
    asked: Option<&Platform>,
) -> anyhow::Result<Resolved> {
    let platform = &asked.cloned().unwrap_or_else(Platform::host);
    let mut documents = Vec::new();
    let mut wanted = image.tag_or_digest();
    let (fetched, manifest) = loop {
        ensure!(documents.len() < MAX_DEPTH, "indexes within indexes, more than {MAX_DEPTH} deep");
        let fetched = patiently(|| repository.document(wanted.clone())).await?;
        match parse_document(fetched.content_type.as_deref(), &fetched.bytes)? {
            Document::Manifest(manifest) => break (fetched, manifest),
            Document::Index(entries) => {
                let Some(entry) = select_platform(&entries, platform) else {
                    return Err(nothing_for(platform, &offered(&entries)));
                };
                wanted = TagOrDigest::Digest(entry.digest);
                let children = entries.iter().enumerate();
                let children = children.map(|(n, entry)| (format!("m.{n}"), entry.digest.to_string())).collect();
                documents.push(stored(fetched, "application/vnd.oci.image.index.v1+json", "index", children));
            }
        }
    };
    let config_digest = manifest.config.digest;
    let config = patiently(|| repository.blob(&config_digest, MAX_DOCUMENT_SIZE as u64)).await?;
    let parsed = parse_config(&config).context("reading the image's configuration")?;
    let own = IndexEntry { digest: fetched.digest, size: 0, platform: Some(parsed.platform.clone()) };
    if asked.is_some() && select_platform(&[own], platform).is_none() {
        return Err(nothing_for(platform, &parsed.platform.to_string()));
    }
    let layers = layers(&manifest, &fetched.bytes, &parsed.diff_ids)?;
    let mut children = vec![("config".to_owned(), config_digest.to_string())];
    children
        .extend(layers.iter().enumerate().map(|(n, layer)| (format!("l.{n}"), layer.descriptor.digest.to_string())));
    let digest = fetched.digest;
    documents.push(stored(fetched, "application/vnd.oci.image.manifest.v1+json", "manifest", children));
    let descriptor =
        BlobDescriptor { media_type: manifest.config.media_type, digest: config_digest, size: config.len() as u64 };
    let config = Stored { descriptor, bytes: config, kind: "config", children: Vec::new() };
    Ok(Resolved { name: image.to_string(), image: image.clone(), documents, manifest: digest, config, layers })
}

/// Joins what manifest and configuration say of each layer.
fn layers(manifest: &Manifest, bytes: &[u8], diff_ids: &[DiffId]) -> anyhow::Result<Vec<Layer>> {
    let raw: RawManifest = serde_json::from_slice(bytes)?;
    let same = diff_ids.len() == manifest.layers.len() && raw.layers.len() == manifest.layers.len();
    ensure!(same, "{} layers and {} diff IDs: the image is malformed", manifest.layers.len(), diff_ids.len());
    let described = manifest.layers.iter().zip(raw.layers).map(|(layer, raw)| BlobDescriptor {
        media_type: raw.media_type,
        digest: layer.digest,
        size: layer.size,
    });
    let unpacked = diff_ids.iter().zip(chain_ids(diff_ids));
    Ok(described
        .zip(unpacked)
        .map(|(descriptor, (diff_id, chain))| Layer { descriptor, diff_id: *diff_id, chain })
        .collect())
}

fn nothing_for(platform: &Platform, offered: &str) -> anyhow::Error {
    let message = format!("there is nothing for {platform}, only {offered}; hint: --platform");
    Failure::new(Exit::NotFound, message).into()
}

fn offered(entries: &[IndexEntry]) -> String {
    let all: BTreeSet<String> = entries.iter().filter_map(|entry| Some(entry.platform.as_ref()?.to_string())).collect();
    all.into_iter().take(20).collect::<Vec<_>>().join(", ")
}

fn stored(fetched: Fetched, usual: &str, kind: &'static str, children: Vec<(String, String)>) -> Stored {
    /// The document's own type, which stands where it is named; registries may add parameters to theirs.
    #[derive(Deserialize)]
    struct Typed {
        #[serde(rename = "mediaType")]
        media_type: Option<String>,
    }
    let own = serde_json::from_slice::<Typed>(&fetched.bytes).ok().and_then(|typed| typed.media_type);
    let served = || Some(fetched.content_type.as_deref()?.split(';').next()?.trim().to_owned());
    let media_type = own.or_else(served).unwrap_or_else(|| usual.to_owned());
    let descriptor = BlobDescriptor { media_type, digest: fetched.digest.0, size: fetched.bytes.len() as u64 };
    Stored { descriptor, bytes: fetched.bytes, kind, children }
}

/// Asks again after a failure that may pass.
async fn patiently<T, F>(ask: impl Fn() -> F) -> Result<T, SourceError>
where
    F: Future<Output = Result<T, SourceError>>,
{
    let mut pause = FIRST_PAUSE;
    for _ in 1..MAX_REQUESTS {
        let error = match ask().await {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        match error.retry {
            Retry::Soon => tokio::time::sleep(pause).await,
            Retry::After(asked) if asked <= MAX_PAUSE => tokio::time::sleep(asked).await,
            Retry::Never | Retry::After(_) => return Err(error),
        }
        pause *= 2;
    }
    ask().await
}

/// Writes the documents into the content store, the innermost first.
pub(crate) async fn write(resolved: &Resolved, space: &Namespace) -> anyhow::Result<()> {
    for document in [&resolved.config].into_iter().chain(resolved.documents.iter().rev()) {
        let digest = &document.descriptor.digest;
        let mut labels = source_label(resolved, space, digest).await?;
        let children = document.children.iter();
        labels.extend(children.map(|(end, child)| (format!("containerd.io/gc.ref.content.{end}"), child.clone())));
        space.put(&format!("{}-{digest}", document.kind), digest, document.bytes.clone(), &labels).await?;
    }
    Ok(())
}

/// The label that says which repository a blob comes from, beside others of the same registry that it came from before.
pub(crate) async fn source_label(
    resolved: &Resolved,
    space: &Namespace,
    digest: &Digest,
) -> Result<BTreeMap<String, String>, ContainerdError> {
    // Without the port, as containerd does it.
    let registry = resolved.image.registry();
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
    let key = format!("containerd.io/distribution.source.{host}");
    let before = match space.blob_info(digest).await {
        Ok(mut info) => info.labels.remove(&key).unwrap_or_default(),
        Err(ContainerdError::NotFound { .. }) => String::new(),
        Err(error) => return Err(error),
    };
    let own = resolved.image.repository();
    let names: BTreeSet<&str> = before.split(',').filter(|name| !name.is_empty()).chain([own]).collect();
    let names = names.into_iter().collect::<Vec<_>>().join(",");
    // containerd takes no label that is longer than 4096 bytes.
    let names = if key.len() + names.len() > 4096 { own.to_owned() } else { names };
    Ok([(key, names)].into())
}

/// Ties the snapshots to the configuration, which is what keeps them from being collected.
pub(crate) async fn keep_snapshots(resolved: &Resolved, snapshotter: &str, space: &Namespace) -> anyhow::Result<()> {
    let Some(top) = resolved.layers.last() else { return Ok(()) };
    let label = (format!("containerd.io/gc.ref.snapshot.{snapshotter}"), top.chain.to_string());
    Ok(space.label_blob(&resolved.config.descriptor.digest, &[label].into()).await?)
}

/// Gives the image its name.
pub(crate) async fn record(resolved: &Resolved, space: &Namespace) -> anyhow::Result<()> {
    let Some(root) = resolved.documents.first() else { bail!("the image has no manifest") };
    let image = Image { name: resolved.name.clone(), target: root.descriptor.clone(), labels: BTreeMap::new() };
    Ok(space.put_image(&image).await?)
}
