use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::Compression;

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

fn sha(text: &str) -> String {
    Digest::of(text.as_bytes()).to_string()
}

fn manifest(media_type: Option<&str>) -> Value {
    let mut value = json!({
        "schemaVersion": 2,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": sha("config"), "size": 7},
        "layers": [
            {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": sha("a"), "size": 100},
            {"mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "digest": sha("b"), "size": 200,
             "urls": ["https://elsewhere.example/b"]},
        ],
    });
    if let Some(media_type) = media_type {
        value["mediaType"] = media_type.into();
    }
    value
}

fn index(media_type: Option<&str>) -> Value {
    let mut value = json!({
        "schemaVersion": 2,
        "manifests": [
            {"mediaType": OCI_MANIFEST, "digest": sha("amd64"), "size": 1,
             "platform": {"os": "linux", "architecture": "amd64"}},
            {"mediaType": DOCKER_MANIFEST, "digest": sha("arm"), "size": 2,
             "platform": {"os": "linux", "architecture": "arm", "variant": "v7"}},
            {"mediaType": "application/spdx+json", "digest": sha("sbom"), "size": 3},
            {"mediaType": OCI_INDEX, "digest": sha("nested"), "size": 4},
        ],
    });
    if let Some(media_type) = media_type {
        value["mediaType"] = media_type.into();
    }
    value
}

fn parse(content_type: Option<&str>, value: &Value) -> Result<Document, DocumentError> {
    parse_document(content_type, value.to_string().as_bytes())
}

#[test]
fn manifests_of_both_worlds_are_read() {
    for (content_type, media_type) in [
        (Some(OCI_MANIFEST), Some(OCI_MANIFEST)),
        (Some(OCI_MANIFEST), None),
        (Some("application/vnd.oci.image.manifest.v1+json; charset=utf-8"), Some(OCI_MANIFEST)),
        (Some(DOCKER_MANIFEST), Some(DOCKER_MANIFEST)),
        (None, Some(DOCKER_MANIFEST)),
        (None, None),
        (None, Some("")),
    ] {
        let Document::Manifest(read) = parse(content_type, &manifest(media_type)).unwrap() else {
            panic!("not a manifest");
        };
        assert_eq!(read.config.digest.to_string(), sha("config"));
        assert_eq!(read.config.size, 7);
        assert_eq!(read.layers.len(), 2);
        assert_eq!(
            read.layers[0],
            LayerDescriptor { digest: Digest::of(b"a"), size: 100, media: LayerMedia::Tar(Compression::Gzip) }
        );
        assert_eq!(read.layers[1].media, LayerMedia::Foreign);
    }
}

#[test]
fn indexes_of_both_worlds_are_read() {
    for (content_type, media_type) in [
        (Some(OCI_INDEX), Some(OCI_INDEX)),
        (Some(DOCKER_LIST), Some(DOCKER_LIST)),
        (Some(DOCKER_LIST), None),
        (None, None),
    ] {
        let Document::Index(entries) = parse(content_type, &index(media_type)).unwrap() else {
            panic!("not an index");
        };
        let digests: Vec<String> = entries.iter().map(|entry| entry.digest.to_string()).collect();
        assert_eq!(digests, [sha("amd64"), sha("arm"), sha("nested")], "what is no document is left out");
        assert_eq!(entries[1].platform.as_ref().unwrap().to_string(), "linux/arm/v7");
        assert_eq!(entries[2].platform, None);
    }
}

/// CVE-2021-41190 and its relatives: one shape per line.
#[test]
fn confusing_documents_are_refused() {
    let both = |mut value: Value, extra: &str, content: Value| {
        value[extra] = content;
        value
    };
    let cases = [
        (None, both(manifest(None), "manifests", json!([]))),
        (Some(OCI_MANIFEST), both(manifest(Some(OCI_MANIFEST)), "manifests", json!([]))),
        (Some(OCI_INDEX), both(index(Some(OCI_INDEX)), "layers", json!([]))),
        (Some(OCI_INDEX), both(index(Some(OCI_INDEX)), "config", json!({}))),
        (Some(OCI_INDEX), manifest(None)),
        (Some(OCI_MANIFEST), index(None)),
        (None, manifest(Some(OCI_INDEX))),
        (None, index(Some(OCI_MANIFEST))),
        (None, json!({"schemaVersion": 2})),
        (Some(OCI_INDEX), json!({"schemaVersion": 2})),
    ];
    for (content_type, value) in cases {
        let result = parse(content_type, &value);
        let refused = matches!(result, Err(DocumentError::Ambiguous(_) | DocumentError::Json(_)));
        assert!(refused, "{content_type:?} {value}: {result:?}");
    }
}

#[test]
fn properties_that_go_would_read_are_seen() {
    for extra in [r#""Manifests":[]"#, r#""manifest\u017f":[]"#, r#""layers":[]"#, r#""LAYERS":[]"#] {
        let mut text = manifest(None).to_string();
        text.insert_str(1, &format!("{extra},"));
        let result = parse_document(None, text.as_bytes());
        assert!(matches!(result, Err(DocumentError::Json(_))), "{extra}: {result:?}");
    }
}

#[test]
fn header_and_body_must_agree() {
    for (content_type, value) in [
        (DOCKER_MANIFEST, manifest(Some(OCI_MANIFEST))),
        (OCI_INDEX, manifest(Some(OCI_MANIFEST))),
        ("application/json", manifest(Some(OCI_MANIFEST))),
    ] {
        let result = parse(Some(content_type), &value);
        assert!(matches!(result, Err(DocumentError::TypeMismatch { .. })), "{content_type}: {result:?}");
    }
    let result = parse(Some("application/json"), &manifest(None));
    assert!(matches!(result, Err(DocumentError::UnknownType(_))), "{result:?}");
}

#[test]
fn schema_1_is_named() {
    let old = json!({"schemaVersion": 1, "name": "a", "tag": "b", "fsLayers": [{"blobSum": sha("a")}]});
    for content_type in [None, Some("application/vnd.docker.distribution.manifest.v1+prettyjws")] {
        assert!(matches!(parse(content_type, &old), Err(DocumentError::Schema1)));
    }
    let mut sly = manifest(None);
    sly["fsLayers"] = json!([]);
    assert!(matches!(parse(None, &sly), Err(DocumentError::Schema1)));
}

#[test]
fn size_limit_is_exact() {
    let mut text = manifest(None).to_string();
    text.push_str(&" ".repeat(MAX_DOCUMENT_SIZE - text.len()));
    assert!(parse_document(None, text.as_bytes()).is_ok());
    text.push(' ');
    assert!(matches!(parse_document(None, text.as_bytes()), Err(DocumentError::TooLarge(_))));
    assert!(matches!(parse_config(text.as_bytes()), Err(DocumentError::TooLarge(_))));
}

#[test]
fn unsupported_digests_are_named() {
    let mut value = manifest(None);
    value["layers"][0]["digest"] = format!("sha512:{}", "a".repeat(128)).into();
    let result = parse(None, &value);
    assert!(matches!(result, Err(DocumentError::Digest(DigestError::Algorithm(_)))), "{result:?}");
    value["layers"][0]["digest"] = "../../etc/passwd".into();
    assert!(parse(None, &value).is_err());
}

#[test]
fn negative_sizes_are_malformed() {
    let mut value = manifest(None);
    value["layers"][0]["size"] = json!(-1);
    assert!(matches!(parse(None, &value), Err(DocumentError::Json(_))));
}

#[test]
fn config_gives_diff_ids_and_platform() {
    let value = json!({
        "os": "linux", "architecture": "arm64", "variant": "v8", "created": 17, "config": {"Env": null},
        "rootfs": {"type": "layers", "diff_ids": [sha("a"), sha("b")]},
    });
    let config = parse_config(value.to_string().as_bytes()).unwrap();
    assert_eq!(config.diff_ids, [DiffId(Digest::of(b"a")), DiffId(Digest::of(b"b"))]);
    assert_eq!(config.platform.to_string(), "linux/arm64/v8");
    assert!(parse_config(br#"{"os":"linux","architecture":"amd64"}"#).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse_document(None, &bytes);
        let _ = parse_config(&bytes);
    }

    #[test]
    fn a_cut_document_is_refused(cut in 0usize..400) {
        let text = manifest(Some(OCI_MANIFEST)).to_string();
        if cut < text.len() {
            prop_assert!(parse_document(Some(OCI_MANIFEST), &text.as_bytes()[..cut]).is_err());
        }
    }
}
