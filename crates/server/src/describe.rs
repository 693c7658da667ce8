//! What an image consists of, as its manifest and its configuration say together.

use bytes::Bytes;
use millstream_oci::{
    Document, ImageRef, Manifest, ManifestDigest, Platform, TagOrDigest, parse_config, parse_document, select_platform,
};
use millstream_source::ImageSource;

use crate::ServeError;
use crate::layer::WantedLayer;

/// Configs of real images have tens of kilobytes.
const MAX_CONFIG: u64 = 8 << 20;
/// Layers that containerd and its relatives still mount number 127 and less; this only bounds the work.
const MAX_LAYERS: usize = 1000;

/// One platform's image.
pub(crate) struct Described {
    pub(crate) manifest: ManifestDigest,
    /// Bottom first.
    pub(crate) layers: Vec<WantedLayer>,
    /// The index it was chosen from.
    pub(crate) index: Option<(ManifestDigest, Bytes)>,
}

/// Reads what `image` names, for `platform` where that is an image index.
pub(crate) async fn describe(
    source: &dyn ImageSource,
    image: &ImageRef,
    platform: &Platform,
) -> Result<Described, ServeError> {
    let resolved = resolve(source, image, platform).await?;
    let layers = describe_layers(source, image, &resolved.manifest).await?;
    Ok(Described { manifest: resolved.digest, layers, index: resolved.index })
}

/// One platform's manifest, and the index it was chosen from.
struct Resolved {
    digest: ManifestDigest,
    manifest: Manifest,
    index: Option<(ManifestDigest, Bytes)>,
}

async fn resolve(source: &dyn ImageSource, image: &ImageRef, platform: &Platform) -> Result<Resolved, ServeError> {
    let document_error = |source| ServeError::Document { what: format!("manifest of {image}"), source };
    let fetched = source.document(image.tag_or_digest()).await?;
    let entries = match parse_document(fetched.content_type.as_deref(), &fetched.bytes).map_err(document_error)? {
        Document::Manifest(manifest) => return Ok(Resolved { digest: fetched.digest, manifest, index: None }),
        Document::Index(entries) => entries,
    };
    let entry = select_platform(&entries, platform).ok_or_else(|| no_platform(&image.to_string(), platform))?;
    let chosen = source.document(TagOrDigest::Digest(entry.digest)).await?;
    match parse_document(chosen.content_type.as_deref(), &chosen.bytes).map_err(document_error)? {
        Document::Manifest(manifest) => {
            Ok(Resolved { digest: chosen.digest, manifest, index: Some((fetched.digest, fetched.bytes)) })
        }
        Document::Index(_) => Err(ServeError::Invalid { what: format!("{image}: an index within an index") }),
    }
}

/// The error for an image that has nothing for `platform`.
pub(crate) fn no_platform(image: &str, platform: &Platform) -> ServeError {
    let variant = platform.variant.as_ref().map(|variant| format!("/{variant}")).unwrap_or_default();
    ServeError::NotFound {
        what: format!("{image} has no image for {}/{}{variant}", platform.os, platform.architecture),
    }
}

/// The layers as manifest and config describe them together.
async fn describe_layers(
    source: &dyn ImageSource,
    image: &ImageRef,
    manifest: &Manifest,
) -> Result<Vec<WantedLayer>, ServeError> {
    let invalid = |what: String| ServeError::Invalid { what: format!("{image}: {what}") };
    if manifest.config.size > MAX_CONFIG {
        return Err(invalid(format!("the config has {} bytes, more than {MAX_CONFIG}", manifest.config.size)));
    }
    let config = source.whole_blob(&manifest.config.digest, MAX_CONFIG).await?;
    let config =
        parse_config(&config).map_err(|source| ServeError::Document { what: format!("config of {image}"), source })?;
    let (layers, diff_ids) = (&manifest.layers, &config.diff_ids);
    if layers.len() != diff_ids.len() || layers.len() > MAX_LAYERS {
        return Err(invalid(format!(
            "the manifest has {} layers (at most {MAX_LAYERS} are read), the config {} diff IDs",
            layers.len(),
            diff_ids.len()
        )));
    }
    let pairs = layers.iter().zip(diff_ids);
    Ok(pairs
        .map(|(layer, diff_id)| WantedLayer {
            digest: layer.digest,
            size: layer.size,
            media: layer.media.clone(),
            diff_id: *diff_id,
        })
        .collect())
}
