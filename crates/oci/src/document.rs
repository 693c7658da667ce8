//! Manifests, indexes and image configurations, read without being fooled.
//!
//! A document whose type two readers could see differently is refused: what we show must be what containerd unpacks.

use std::fmt;

use oci_spec::image::{Descriptor as RawDescriptor, ImageIndex, ImageManifest, MediaType, RootFs, ToDockerV2S2};
use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, Visitor};

use crate::{DiffId, Digest, DigestError, LayerMedia, ManifestDigest, Platform};

/// The largest document that is read, in bytes.
pub const MAX_DOCUMENT_SIZE: usize = 4 << 20;

/// Media types of the documents that [`parse_document`] reads, for an `Accept` header.
pub const DOCUMENT_MEDIA_TYPES: [&str; 4] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

/// Why a document is refused.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// It is larger than [`MAX_DOCUMENT_SIZE`].
    #[error("document of {0} bytes is larger than the limit of {MAX_DOCUMENT_SIZE}")]
    TooLarge(usize),
    /// It is not JSON, or a property is missing or of the wrong type.
    #[error("document is malformed: {0}")]
    Json(#[from] serde_json::Error),
    /// An image of Docker's schema 1.
    #[error("docker schema 1 manifests are not supported; push the image again with a current tool")]
    Schema1,
    /// The registry says one type, the document another.
    #[error("document says it is {media_type:?} but was served as {content_type:?}")]
    TypeMismatch {
        /// `mediaType` within the document.
        media_type: String,
        /// `Content-Type` it came with, without parameters.
        content_type: String,
    },
    /// It has properties of both a manifest and an index, or of another type than it says.
    #[error("document is ambiguous: {0}")]
    Ambiguous(String),
    /// Of a type that is neither manifest nor index.
    #[error("media type {0:?} is neither an image manifest nor an image index")]
    UnknownType(String),
    /// Something in it is named by a digest that is not supported.
    #[error("document names a digest that cannot be used")]
    Digest(#[from] DigestError),
}

/// Name, size and type of a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Digest of the blob.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Its media type.
    pub media_type: String,
}

/// One layer of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerDescriptor {
    /// Digest of the blob as the registry stores it.
    pub digest: Digest,
    /// Size of that blob in bytes.
    pub size: u64,
    /// How it is packed.
    pub media: LayerMedia,
}

/// An image for one platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The image configuration.
    pub config: Descriptor,
    /// The layers, base first.
    pub layers: Vec<LayerDescriptor>,
}

/// One manifest (or nested index) of an image index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexEntry {
    /// Its digest.
    pub digest: ManifestDigest,
    /// Its size in bytes.
    pub size: u64,
    /// What it runs on, if the index says so.
    pub platform: Option<Platform>,
}

/// What a reference resolves to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// An image for one platform.
    Manifest(Manifest),
    /// Images for several platforms. Entries that are no manifests or indexes are left out.
    Index(Vec<IndexEntry>),
}

/// The part of an image configuration that matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageConfig {
    /// Digests of the uncompressed layers, base first.
    pub diff_ids: Vec<DiffId>,
    /// What the image runs on.
    pub platform: Platform,
}

/// Reads an image manifest or an image index, of OCI or of Docker's schema 2.
///
/// `content_type` is the type that the document came with: the `Content-Type` header or the descriptor that named it.
/// Parameters (`; charset=…`) are ignored. Without it the document's own `mediaType` decides, without both its shape.
///
/// # Errors
///
/// [`DocumentError`]; in particular every document that is larger than [`MAX_DOCUMENT_SIZE`], of schema 1, whose two
/// types differ, or that another reader could take for another type (`layers` beside `manifests`, a property twice
/// or in another case).
pub fn parse_document(content_type: Option<&str>, bytes: &[u8]) -> Result<Document, DocumentError> {
    let outline = Outline::read(bytes)?;
    let content_type = content_type.map(without_parameters);
    if let (Some(content_type), Some(media_type)) = (&content_type, &outline.media_type)
        && content_type != media_type
    {
        return Err(DocumentError::TypeMismatch { media_type: media_type.clone(), content_type: content_type.clone() });
    }
    let said = content_type.or_else(|| outline.media_type.clone());
    if outline.fs_layers || outline.schema_version == Some(1) || said.as_deref().is_some_and(is_schema1) {
        return Err(DocumentError::Schema1);
    }
    if outline.manifests && (outline.layers || outline.config) {
        return Err(DocumentError::Ambiguous("it has the properties of a manifest and of an index".to_owned()));
    }
    let is_index = match &said {
        Some(said) if is_manifest_type(said) => false,
        Some(said) if is_index_type(said) => true,
        Some(said) => return Err(DocumentError::UnknownType(said.chars().take(200).collect())),
        None => outline.manifests,
    };
    if is_index == outline.layers || (!is_index && outline.manifests) {
        let (said, shape) = if is_index { ("an index", "a manifest") } else { ("a manifest", "an index") };
        return Err(DocumentError::Ambiguous(format!("it should be {said} but has the properties of {shape}")));
    }
    if is_index {
        let index: ImageIndex = serde_json::from_slice(bytes)?;
        index_entries(index.manifests()).map(Document::Index)
    } else {
        let manifest: ImageManifest = serde_json::from_slice(bytes)?;
        let config = descriptor(manifest.config())?;
        let layers = manifest.layers().iter().map(layer).collect::<Result<_, _>>()?;
        Ok(Document::Manifest(Manifest { config, layers }))
    }
}

/// Reads an image configuration.
///
/// # Errors
///
/// [`DocumentError`] when it is larger than [`MAX_DOCUMENT_SIZE`], malformed, or names unsupported digests.
pub fn parse_config(bytes: &[u8]) -> Result<ImageConfig, DocumentError> {
    /// Less than `oci_spec`'s own type on purpose: builders disagree about the rest, which does not concern us.
    #[derive(Deserialize)]
    struct Config {
        #[serde(default)]
        os: String,
        #[serde(default)]
        architecture: String,
        #[serde(default)]
        variant: Option<String>,
        rootfs: RootFs,
    }

    check_size(bytes)?;
    let config: Config = serde_json::from_slice(bytes)?;
    let diff_ids = config.rootfs.diff_ids().iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
    let variant = config.variant.filter(|variant| !variant.is_empty());
    Ok(ImageConfig { diff_ids, platform: Platform { os: config.os, architecture: config.architecture, variant } })
}

fn check_size(bytes: &[u8]) -> Result<(), DocumentError> {
    if bytes.len() > MAX_DOCUMENT_SIZE { Err(DocumentError::TooLarge(bytes.len())) } else { Ok(()) }
}

/// Media types are compared without regard to case and without parameters.
fn without_parameters(content_type: &str) -> String {
    content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

fn is_type(said: &str, oci: &MediaType) -> bool {
    said == oci.as_ref() || oci.to_docker_v2s2().is_ok_and(|docker| said == docker)
}

fn is_manifest_type(said: &str) -> bool {
    is_type(said, &MediaType::ImageManifest)
}

fn is_index_type(said: &str) -> bool {
    is_type(said, &MediaType::ImageIndex)
}

fn is_schema1(said: &str) -> bool {
    said.starts_with("application/vnd.docker.distribution.manifest.v1+")
}

fn digest(raw: &RawDescriptor) -> Result<Digest, DigestError> {
    raw.digest().to_string().parse()
}

fn descriptor(raw: &RawDescriptor) -> Result<Descriptor, DocumentError> {
    Ok(Descriptor { digest: digest(raw)?, size: raw.size(), media_type: raw.media_type().to_string() })
}

fn layer(raw: &RawDescriptor) -> Result<LayerDescriptor, DocumentError> {
    Ok(LayerDescriptor {
        digest: digest(raw)?,
        size: raw.size(),
        media: LayerMedia::from_media_type(raw.media_type().as_ref()),
    })
}

fn index_entries(manifests: &[RawDescriptor]) -> Result<Vec<IndexEntry>, DocumentError> {
    let documents = manifests.iter().filter(|raw| {
        let media_type = raw.media_type().as_ref();
        is_manifest_type(media_type) || is_index_type(media_type)
    });
    documents
        .map(|raw| {
            let platform = raw.platform().as_ref().map(|platform| Platform {
                os: platform.os().to_string(),
                architecture: platform.architecture().to_string(),
                variant: platform.variant().clone().filter(|variant| !variant.is_empty()),
            });
            Ok(IndexEntry { digest: ManifestDigest(digest(raw)?), size: raw.size(), platform })
        })
        .collect()
}

/// Which of the properties that decide a document's type are there.
#[derive(Default)]
struct Outline {
    schema_version: Option<u64>,
    media_type: Option<String>,
    config: bool,
    layers: bool,
    manifests: bool,
    fs_layers: bool,
}

impl Outline {
    fn read(bytes: &[u8]) -> Result<Self, DocumentError> {
        check_size(bytes)?;
        Ok(serde_json::from_slice(bytes)?)
    }
}

impl<'de> Deserialize<'de> for Outline {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(OutlineVisitor)
    }
}

struct OutlineVisitor;

impl OutlineVisitor {
    const PROPERTIES: [&str; 6] = ["schemaVersion", "mediaType", "config", "layers", "manifests", "fsLayers"];

    /// The property that Go's JSON reader (containerd's) takes `key` for: it ignores case, with Unicode's rules, so
    /// that `LAYERS` and `layerſ` are `layers` to it.
    fn folded(key: &str) -> Option<&'static str> {
        let fold = |text: &str| text.to_lowercase().to_uppercase();
        let key = fold(key);
        Self::PROPERTIES.into_iter().find(|property| fold(property) == key)
    }
}

impl<'de> Visitor<'de> for OutlineVisitor {
    type Value = Outline;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Outline, A::Error> {
        let mut outline = Outline::default();
        let mut seen = [false; Self::PROPERTIES.len()];
        while let Some(key) = map.next_key::<String>()? {
            let Some(property) = Self::folded(&key) else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            if property != key {
                return Err(serde::de::Error::custom(format_args!("property {property:?} in another case")));
            }
            for (seen, name) in seen.iter_mut().zip(Self::PROPERTIES) {
                if name == property && std::mem::replace(seen, true) {
                    return Err(serde::de::Error::custom(format_args!("property {property:?} twice")));
                }
            }
            match property {
                "schemaVersion" => outline.schema_version = Some(map.next_value()?),
                // Some tools write an empty type where they mean none.
                "mediaType" => outline.media_type = Some(map.next_value::<String>()?).filter(|said| !said.is_empty()),
                "config" => outline.config = map.next_value::<Option<IgnoredAny>>()?.is_some(),
                "layers" => outline.layers = map.next_value::<Option<IgnoredAny>>()?.is_some(),
                "manifests" => outline.manifests = map.next_value::<Option<IgnoredAny>>()?.is_some(),
                _ => outline.fs_layers = map.next_value::<Option<IgnoredAny>>()?.is_some(),
            }
        }
        Ok(outline)
    }
}

#[cfg(test)]
#[path = "document_tests.rs"]
mod tests;
