//! What registries and clients say: manifests, indexes, configurations, references, digests.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use millstream_fuzz::{choice, plant};
use millstream_oci::document::{DOCUMENT_MEDIA_TYPES, Document, parse_config, parse_document};
use millstream_oci::platform::{Platform, select_platform};
use millstream_oci::{Digest, ImageRef};

#[path = "../../../crates/node/src/labels.rs"]
#[allow(unreachable_pub, reason = "at home it is public")]
mod labels;

const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

fn seeds() -> Vec<Vec<u8>> {
    let descriptor = |media: &str| format!(r#"{{"mediaType":"{media}","digest":"{DIGEST}","size":7}}"#);
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{}","config":{},"layers":[{}]}}"#,
        DOCUMENT_MEDIA_TYPES[0],
        descriptor("application/vnd.oci.image.config.v1+json"),
        descriptor("application/vnd.oci.image.layer.v1.tar+gzip")
    );
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"{}","digest":"{DIGEST}","size":9,"platform":{{"os":"linux","architecture":"arm64","variant":"v8"}}}}]}}"#,
        DOCUMENT_MEDIA_TYPES[0]
    );
    let config =
        format!(r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":["{DIGEST}"]}}}}"#);
    let texts = [manifest, index, config, format!("registry.example.com:5000/team/app:1@{DIGEST}"), DIGEST.to_owned()];
    let types = [0, 1, 4, 5, 5];
    types.into_iter().zip(texts).map(|(kind, text)| [vec![kind], text.into_bytes()].concat()).collect()
}

/// A reference that is understood is written so that it is understood again, as the same.
fn reference(text: &str) {
    if let Ok(image) = ImageRef::parse(text) {
        let written = image.to_string();
        assert_eq!(ImageRef::parse(&written).ok(), Some(image), "{text:?} as {written:?}");
    }
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string(), text);
    }
    let names = ["cri.image-ref", "cri.manifest-digest", "cri.layer-digest"];
    let keys = names.iter().map(|name| format!("containerd.io/snapshot/{name}"));
    let given: BTreeMap<String, String> = keys.zip(text.split('\n').map(str::to_owned)).collect();
    let _ = labels::Wanted::from_labels(&given);
    let _ = labels::image_name(&given);
}

fuzz_target!(init: plant(seeds()), |data: &[u8]| {
    let (kind, bytes) = choice(data);
    let media_type = DOCUMENT_MEDIA_TYPES.get(usize::from(kind)).copied();
    if let Ok(Document::Index(entries)) = parse_document(media_type, bytes) {
        let _ = select_platform(&entries, &Platform::host());
    }
    let _ = parse_config(bytes);
    if let Ok(text) = std::str::from_utf8(bytes) {
        reference(text);
    }
});
