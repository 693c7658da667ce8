//! Images made from nothing: tars, their compression, manifests.

use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use millstream_oci::Digest;

use crate::registry::Registry;

pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

/// One tar being written.
#[derive(Default)]
pub struct Tar(Vec<u8>);

impl Tar {
    pub fn directory(self, name: &str) -> Self {
        self.member(name, b'5', "", b"")
    }

    pub fn file(self, name: &str, content: &[u8]) -> Self {
        self.member(name, b'0', "", content)
    }

    pub fn symlink(self, name: &str, target: &str) -> Self {
        self.member(name, b'2', target, b"")
    }

    fn member(mut self, name: &str, kind: u8, link: &str, content: &[u8]) -> Self {
        let mut header = [0; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..107].copy_from_slice(b"0000644");
        header[108..115].copy_from_slice(b"0000000");
        header[116..123].copy_from_slice(b"0000000");
        header[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
        header[136..147].copy_from_slice(b"14000000000");
        header[148..156].copy_from_slice(b"        ");
        header[156] = kind;
        header[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = header.iter().copied().map(u32::from).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend_from_slice(&header);
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Bytes that compress a little and look alike nowhere; the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        b'a' + u8::try_from(state % 23).unwrap()
    };
    (0..len).map(|_| step()).collect()
}

/// A layer as it lies in a registry.
pub struct Layer {
    pub media_type: &'static str,
    pub blob: Vec<u8>,
    pub diff_id: Digest,
}

impl Layer {
    pub fn gzip(tar: &[u8]) -> Self {
        Self { media_type: GZIP, blob: gzip(tar), diff_id: Digest::of(tar) }
    }

    /// One frame, as docker and BuildKit write it.
    pub fn zstd(tar: &[u8]) -> Self {
        Self { media_type: ZSTD, blob: zstd::bulk::compress(tar, 3).unwrap(), diff_id: Digest::of(tar) }
    }

    pub fn digest(&self) -> Digest {
        Digest::of(&self.blob)
    }
}

/// Pushes all parts; gives the manifest's digest.
pub fn push(registry: &Registry, repository: &str, tag: &str, layers: &[Layer]) -> Digest {
    let diff_ids: Vec<String> = layers.iter().map(|layer| format!("\"{}\"", layer.diff_id)).collect();
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":[{}]}},"config":{{}}}}"#,
        diff_ids.join(",")
    );
    let config_digest = registry.push_blob(repository, config.as_bytes());
    let descriptors: Vec<String> = layers
        .iter()
        .map(|layer| {
            let digest = registry.push_blob(repository, &layer.blob);
            descriptor(layer.media_type, digest, layer.blob.len())
        })
        .collect();
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{},"layers":[{}]}}"#,
        descriptor(CONFIG, config_digest, config.len()),
        descriptors.join(",")
    );
    registry.push_manifest(repository, tag, MANIFEST, &manifest)
}

/// Pushes an index whose only entry, for linux/amd64, is `manifest`.
pub fn push_index(registry: &Registry, repository: &str, tag: &str, manifest: Digest, size: usize) -> Digest {
    let entry = descriptor(MANIFEST, manifest, size);
    let platform = r#","platform":{"os":"linux","architecture":"amd64"}}"#;
    let entry = format!("{}{platform}", entry.trim_end_matches('}'));
    let index = format!(r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{entry}]}}"#);
    registry.push_manifest(repository, tag, INDEX, &index)
}

fn descriptor(media_type: &str, digest: Digest, size: usize) -> String {
    format!(r#"{{"mediaType":"{media_type}","digest":"{digest}","size":{size}}}"#)
}
