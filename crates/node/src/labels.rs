//! Which image and layer a `Prepare` is about, from the labels that containerd passes.

use std::collections::BTreeMap;

use millstream_oci::{Digest, ImageRef, ManifestDigest};

/// Reference of the image as the client gave it.
const IMAGE_REF: &str = "containerd.io/snapshot/cri.image-ref";
/// Digest of the platform's manifest.
const MANIFEST: &str = "containerd.io/snapshot/cri.manifest-digest";
/// Digest of the layer's blob.
const LAYER: &str = "containerd.io/snapshot/cri.layer-digest";

/// What the labels of a `Prepare` ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The image.
    pub image: ImageRef,
    /// Its manifest.
    pub manifest: ManifestDigest,
    /// The layer.
    pub layer: Digest,
}

impl Wanted {
    /// Reads the labels.
    ///
    /// # Errors
    /// What is missing or malformed, in words.
    pub fn from_labels(labels: &BTreeMap<String, String>) -> Result<Self, String> {
        Ok(Self { image: label(labels, IMAGE_REF)?, manifest: label(labels, MANIFEST)?, layer: label(labels, LAYER)? })
    }
}

/// The image as far as the labels name it; empty where they do not.
#[must_use]
pub fn image_name(labels: &BTreeMap<String, String>) -> String {
    let Some(text) = labels.get(IMAGE_REF) else { return String::new() };
    text.parse::<ImageRef>().map_or_else(|_| text.clone(), |image| image.to_string())
}

fn label<T: std::str::FromStr>(labels: &BTreeMap<String, String>, key: &str) -> Result<T, String>
where
    T::Err: std::fmt::Display,
{
    let text = labels.get(key).ok_or_else(|| format!("containerd passed no label {key}"))?;
    text.parse().map_err(|error| format!("label {key} = {text:?}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_label_that_is_missing_or_malformed() {
        let digest = Digest::of(b"x").to_string();
        let mut labels: BTreeMap<String, String> = BTreeMap::new();
        labels.insert(IMAGE_REF.into(), "registry.example.com/team/app:1".into());
        labels.insert(MANIFEST.into(), digest.clone());
        assert!(Wanted::from_labels(&labels).unwrap_err().contains("cri.layer-digest"));
        labels.insert(LAYER.into(), "sha256:short".into());
        assert!(Wanted::from_labels(&labels).unwrap_err().contains("sha256:short"));
        labels.insert(LAYER.into(), digest.clone());
        let wanted = Wanted::from_labels(&labels).unwrap();
        assert_eq!((wanted.image.repository(), wanted.layer.to_string()), ("team/app", digest));
    }
}
