//! The client against a real registry: Debian's `docker-registry`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use millstream_oci::{Digest, Document, ImageRef, ManifestDigest, TagOrDigest, parse_document};
use millstream_registry::{Credential, Registry, RegistryOptions};
use millstream_source::{BlobSource, ErrorKind};
use millstream_toc::BlobRange;

const PROGRAM: &str = "/usr/bin/docker-registry";

/// A registry process that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Writes an image of one blob where the registry keeps its files; gives the digests of blob and manifest.
fn fill(root: &Path, content: &[u8]) -> (Digest, ManifestDigest) {
    let store = root.join("docker/registry/v2");
    let put = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        let dir = store.join("blobs/sha256").join(&digest.hex()[..2]).join(digest.hex());
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("data"), bytes).unwrap();
        digest
    };
    let link = |place: String, digest: Digest| {
        let dir = store.join("repositories/team/app").join(place);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("link"), digest.to_string()).unwrap();
    };
    let (layer, config) = (put(content), put(b"{}"));
    let manifest = put(
        format!(
            r#"{{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json",
            "config":{{"mediaType":"application/vnd.docker.container.image.v1+json","size":2,"digest":"{config}"}},
            "layers":[{{"mediaType":"application/vnd.docker.image.rootfs.diff.tar.gzip","size":{},"digest":"{layer}"}}]}}"#,
            content.len()
        )
        .as_bytes(),
    );
    for digest in [layer, config] {
        link(format!("_layers/sha256/{}", digest.hex()), digest);
    }
    link(format!("_manifests/revisions/sha256/{}", manifest.hex()), manifest);
    link("_manifests/tags/1/current".to_owned(), manifest);
    link(format!("_manifests/tags/1/index/sha256/{}", manifest.hex()), manifest);
    (layer, ManifestDigest(manifest))
}

fn start(root: &Path) -> (Running, String) {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let config = root.join("config.yml");
    let text = format!(
        "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {address}\nlog:\n  level: error\n",
        root.display()
    );
    std::fs::write(&config, text).unwrap();
    let mut command = Command::new(PROGRAM);
    let child = command.arg("serve").arg(&config).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let running = Running(child);
    let deadline = Instant::now() + Duration::from_secs(20);
    while std::net::TcpStream::connect(&address).is_err() {
        assert!(Instant::now() < deadline, "docker-registry does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    (running, address)
}

#[tokio::test]
async fn a_real_registry_serves_documents_blobs_and_ranges() {
    if !Path::new(PROGRAM).exists() {
        assert_ne!(std::env::var("MILLSTREAM_REQUIRE_ALL").as_deref(), Ok("1"), "{PROGRAM} is required but missing");
        eprintln!("SKIPPED: {PROGRAM} is not installed");
        return;
    }
    let _ = rustls::crypto::ring::default_provider().install_default();
    let root = tempfile::tempdir().unwrap();
    let content: Vec<u8> = (0..300_000u32).flat_map(u32::to_le_bytes).collect();
    let (layer, manifest) = fill(root.path(), &content);
    let (_running, address) = start(root.path());
    let image = ImageRef::parse(&format!("{address}/team/app:1")).unwrap();
    let repository = Registry::new(RegistryOptions::default()).unwrap().repository(&image, Credential::Anonymous);

    let fetched = repository.document(image.tag_or_digest()).await.unwrap();
    assert_eq!(fetched.digest, manifest);
    let Document::Manifest(parsed) = parse_document(fetched.content_type.as_deref(), &fetched.bytes).unwrap() else {
        panic!("not a manifest");
    };
    assert_eq!((parsed.layers[0].digest, parsed.layers[0].size), (layer, content.len() as u64));
    repository.document(TagOrDigest::Digest(manifest)).await.unwrap();
    repository.check_access(&manifest).await.unwrap();
    repository.probe(&layer).await.unwrap();
    assert_eq!(&repository.blob(&parsed.config.digest, 100).await.unwrap()[..], b"{}");

    let last = content.len() as u64;
    for (start, end) in [(0, 1), (4096, 1_000_000), (last - 1, last)] {
        let pieces: Vec<_> =
            repository.read(&layer, BlobRange::new(start, end)).await.unwrap().try_collect().await.unwrap();
        let expected = &content[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()];
        assert!(pieces.concat() == expected, "{start}..{end}");
    }
    let beyond = repository.read(&layer, BlobRange::new(last, last + 1)).await.err().unwrap();
    assert_eq!(beyond.kind, ErrorKind::Malformed, "{beyond}");
    assert_eq!(repository.probe(&Digest::of(b"absent")).await.unwrap_err().kind, ErrorKind::NotFound);
    let absent = ManifestDigest(Digest::of(b"absent"));
    assert_eq!(repository.check_access(&absent).await.unwrap_err().kind, ErrorKind::NotFound);
}
