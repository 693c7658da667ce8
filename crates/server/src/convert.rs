//! From messages to our types and back.

use millstream_oci::{Digest, Platform};
use millstream_registry::{Credential, Secret};
use millstream_wire::millstream::v1::{self, credential};

use crate::import::{Imported, Progress};
use crate::store::ImageLayer;

/// The caller's credential; anonymous where there is none.
pub(crate) fn credential(message: Option<v1::Credential>) -> Credential {
    match message.and_then(|message| message.kind) {
        None => Credential::Anonymous,
        Some(credential::Kind::Basic(v1::Basic { username, password })) => {
            Credential::Basic { username, password: Secret::new(password) }
        }
        Some(credential::Kind::Bearer(token)) => Credential::Bearer(Secret::new(token)),
    }
}

/// The wanted platform; linux on the server's own architecture where none is named.
pub(crate) fn platform(message: Option<v1::Platform>) -> Platform {
    match message {
        None => Platform { os: "linux".to_owned(), ..Platform::host() },
        Some(v1::Platform { os, architecture, variant }) => {
            Platform { os, architecture, variant: Some(variant).filter(|variant| !variant.is_empty()) }
        }
    }
}

/// A layer with the digest of its TOC, or with the reason why it has none.
pub(crate) fn layer_message(layer: &ImageLayer, toc: Result<Digest, String>) -> v1::Layer {
    let (toc_digest, ineligible) = match toc {
        Ok(toc) => (toc.to_string(), String::new()),
        Err(reason) => (String::new(), reason),
    };
    let (digest, diff_id) = (layer.digest.to_string(), layer.diff_id.to_string());
    let pending = layer.pending;
    v1::Layer { digest, size: layer.size, diff_id, toc_digest, ineligible, pending }
}

/// How far an import is, and what it led to once it is `done`.
pub(crate) fn progress_message(progress: &Progress, done: Option<Imported>) -> v1::ImportProgress {
    use std::sync::atomic::Ordering::Relaxed;

    let ineligible = |(layer, reason): (Digest, String)| v1::IneligibleLayer { layer: layer.to_string(), reason };
    v1::ImportProgress {
        bytes_total: progress.bytes_total.load(Relaxed),
        bytes_done: progress.bytes_done.load(Relaxed),
        layers_total: progress.layers_total.load(Relaxed),
        layers_done: progress.layers_done.load(Relaxed),
        done: done.map(|done| v1::ImportDone {
            manifest_digest: done.manifest.to_string(),
            ineligible: done.ineligible.into_iter().map(ineligible).collect(),
        }),
    }
}
