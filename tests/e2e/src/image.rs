//! Images made from code, as OCI image layouts that [`crate::registry::Registry::push`] copies to a registry.

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::layer::{Content, Entry, Kind, LayerInfo, Packing, write_layer};
use crate::need::program;

/// Whose media types the manifest uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MediaTypes {
    /// `application/vnd.oci.image.*`
    #[default]
    Oci,
    /// `application/vnd.docker.*`, schema 2.
    Docker,
}

impl MediaTypes {
    fn manifest(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.manifest.v1+json",
            Self::Docker => "application/vnd.docker.distribution.manifest.v2+json",
        }
    }

    fn config(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.config.v1+json",
            Self::Docker => "application/vnd.docker.container.image.v1+json",
        }
    }

    fn layer(self, packing: Packing) -> &'static str {
        match (self, packing) {
            (Self::Oci, Packing::Zstd | Packing::ZstdFrames(_)) => "application/vnd.oci.image.layer.v1.tar+zstd",
            (Self::Docker, Packing::Zstd | Packing::ZstdFrames(_)) => {
                "application/vnd.docker.image.rootfs.diff.tar.zstd"
            }
            (Self::Oci, Packing::Plain) => "application/vnd.oci.image.layer.v1.tar",
            (Self::Oci, _) => "application/vnd.oci.image.layer.v1.tar+gzip",
            (Self::Docker, Packing::Plain) => "application/vnd.docker.image.rootfs.diff.tar",
            (Self::Docker, _) => "application/vnd.docker.image.rootfs.diff.tar.gzip",
        }
    }
}

/// A layer whose bytes are given, whatever they are.
#[derive(Debug, Clone)]
pub struct Blob {
    /// What the registry stores.
    pub bytes: Vec<u8>,
    /// What the manifest says it is.
    pub media_type: String,
    /// SHA-256 that the config says the tar has, 64 hexadecimal digits.
    pub diff_id: String,
}

#[derive(Debug, Clone)]
enum Layer {
    Entries(Vec<Entry>, Packing),
    Blob(Blob),
}

/// An image to be written.
#[derive(Debug, Clone, Default)]
pub struct Image {
    layers: Vec<Layer>,
    media_types: MediaTypes,
    entrypoint: Vec<String>,
    command: Vec<String>,
    env: Vec<String>,
}

/// What a written image is known by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInfo {
    /// Digest of the manifest, with `sha256:`.
    pub manifest: String,
    /// Bottom first.
    pub layers: Vec<LayerInfo>,
}

impl Image {
    /// An image without layers.
    pub fn new() -> Self {
        Self::default()
    }

    /// With one more layer on top.
    #[must_use]
    pub fn layer(mut self, entries: Vec<Entry>, packing: Packing) -> Self {
        self.layers.push(Layer::Entries(entries, packing));
        self
    }

    /// With these bytes as one more layer on top.
    #[must_use]
    pub fn blob(mut self, blob: Blob) -> Self {
        self.layers.push(Layer::Blob(blob));
        self
    }

    /// With these media types.
    #[must_use]
    pub fn media_types(mut self, media_types: MediaTypes) -> Self {
        self.media_types = media_types;
        self
    }

    /// With this entry point.
    #[must_use]
    pub fn entrypoint(mut self, words: &[&str]) -> Self {
        self.entrypoint = owned(words);
        self
    }

    /// With this command.
    #[must_use]
    pub fn command(mut self, words: &[&str]) -> Self {
        self.command = owned(words);
        self
    }

    /// With one more variable in the environment.
    #[must_use]
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.env.push(format!("{key}={value}"));
        self
    }

    /// Writes the image into an OCI layout under `tag`; a layout that exists gets it in addition.
    ///
    /// # Errors
    ///
    /// If a file cannot be read or written.
    pub fn write(&self, layout: &Path, tag: &str) -> Result<ImageInfo> {
        let blobs = layout.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).with_context(|| format!("making {}", blobs.display()))?;
        std::fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        let mut layers = Vec::with_capacity(self.layers.len());
        let mut descriptors = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let (info, media_type) = match layer {
                Layer::Entries(entries, packing) => {
                    (write_blob(&blobs, entries, *packing)?, self.media_types.layer(*packing))
                }
                Layer::Blob(blob) => (write_bytes(&blobs, blob)?, blob.media_type.as_str()),
            };
            descriptors.push(descriptor(media_type, &info.digest, info.size));
            layers.push(info);
        }
        let config = write_json(&blobs, &self.config(&layers), self.media_types.config())?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": self.media_types.manifest(),
            "config": config,
            "layers": descriptors,
        });
        let manifest = write_json(&blobs, &manifest, self.media_types.manifest())?;
        let digest = manifest["digest"].as_str().unwrap_or_default().to_owned();
        add_to_index(layout, tag, manifest)?;
        Ok(ImageInfo { manifest: digest, layers })
    }

    fn config(&self, layers: &[LayerInfo]) -> Value {
        let diff_ids: Vec<String> = layers.iter().map(|layer| format!("sha256:{}", layer.diff_id)).collect();
        let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned();
        let env: Vec<&String> = [&path].into_iter().chain(&self.env).collect();
        json!({
            "created": "2024-01-01T00:00:00Z",
            "architecture": architecture(),
            "os": "linux",
            "config": { "Env": env, "Entrypoint": self.entrypoint, "Cmd": self.command },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
            "history": layers.iter().map(|_| json!({ "created_by": "millstream-e2e" })).collect::<Vec<_>>(),
        })
    }
}

/// Digest of the manifest or index that a layout has under a tag, or first where the tag is empty; with `sha256:`.
///
/// # Errors
///
/// If the layout does not have it.
pub fn manifest_of(layout: &Path, tag: &str) -> Result<String> {
    let path = layout.join("index.json");
    let text = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let index: Value = serde_json::from_slice(&text).with_context(|| format!("understanding {}", path.display()))?;
    let mut images = index["manifests"].as_array().into_iter().flatten();
    // A layout of one thing needs no tag.
    let image = images.find(|one| tag.is_empty() || one["annotations"]["org.opencontainers.image.ref.name"] == tag);
    let digest = image.and_then(|image| image["digest"].as_str());
    digest.map(str::to_owned).with_context(|| format!("{} has no image {tag}", layout.display()))
}

/// Makes a layout that has this image of another one only; the content is shared.
///
/// # Errors
///
/// If the other one does not have it, or a file cannot be made.
pub fn extract(layout: &Path, tag: &str, to: &Path) -> Result<()> {
    let manifest = manifest_of(layout, tag)?;
    let hex = |digest: &str| digest.trim_start_matches("sha256:").to_owned();
    let content = std::fs::read(layout.join("blobs/sha256").join(hex(&manifest)))?;
    let content_json: Value = serde_json::from_slice(&content)?;
    let blobs = to.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).with_context(|| format!("making {}", blobs.display()))?;
    let parts = content_json["layers"].as_array().into_iter().flatten().chain([&content_json["config"]]);
    let digests = parts.filter_map(|part| part["digest"].as_str()).chain([manifest.as_str()]);
    for name in digests.map(hex) {
        // One layer may occur more than once.
        if !blobs.join(&name).exists() {
            std::fs::hard_link(layout.join("blobs/sha256").join(&name), blobs.join(&name))?;
        }
    }
    std::fs::copy(layout.join("oci-layout"), to.join("oci-layout"))?;
    let media_type = content_json["mediaType"].as_str().context("a manifest without a media type")?;
    let only = descriptor(media_type, &hex(&manifest), content.len() as u64);
    let index = json!({ "schemaVersion": 2, "manifests": [only] });
    Ok(std::fs::write(to.join("index.json"), serde_json::to_vec(&index)?)?)
}

/// The image of a pod's own container: it sleeps.
///
/// # Errors
///
/// If there is no `busybox` on this machine.
pub fn pause() -> Result<Image> {
    let entries = vec![Entry::directory("bin"), busybox()?];
    Ok(Image::new().layer(entries, Packing::Gzip).entrypoint(&["/bin/busybox", "sleep", "2000000000"]))
}

/// A layer with a shell, the usual commands, and everything that a runtime would make for itself if it were missing.
///
/// # Errors
///
/// If there is no `busybox` on this machine.
pub fn shell() -> Result<Vec<Entry>> {
    let mut entries = vec![Entry::directory("bin"), busybox()?];
    entries.extend(APPLETS.iter().map(|name| Entry::symlink(format!("bin/{name}"), "busybox")));
    entries.extend(["dev", "etc", "proc", "root", "sys"].map(Entry::directory));
    entries.extend([
        Entry::directory("tmp").mode(0o1777),
        Entry::file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"),
        Entry::file("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
    ]);
    entries.extend(["hostname", "hosts", "resolv.conf"].map(|name| Entry::file(format!("etc/{name}"), "")));
    Ok(entries)
}

/// A small image with a shell and the usual commands in three layers, the topmost of which removes a file.
///
/// # Errors
///
/// If there is no `busybox` on this machine.
pub fn small() -> Result<Image> {
    let data = vec![
        Entry::directory("data"),
        Entry::file("data/hello", "hello from the middle layer\n").mtime(1_704_067_201, 250_000_000),
        Entry::file("data/gone", "never seen\n"),
        Entry::hard_link("data/hello-again", "data/hello").mtime(1_704_067_201, 250_000_000),
        Entry::symlink("data/link", "hello"),
    ];
    let top =
        vec![Entry::directory("data"), Entry::whiteout("data/gone"), Entry::file("data/top", "top\n").mode(0o600)];
    Ok(Image::new().layer(shell()?, Packing::Gzip).layer(data, Packing::Gzip).layer(top, Packing::Gzip).command(&[
        "/bin/sh",
        "-c",
        "cat /data/hello",
    ]))
}

const APPLETS: &[&str] = &[
    "cat",
    "chmod",
    "cp",
    "cmp",
    "dd",
    "df",
    "du",
    "echo",
    "env",
    "find",
    "grep",
    "head",
    "id",
    "ln",
    "ls",
    "md5sum",
    "mkdir",
    "mv",
    "readlink",
    "rm",
    "seq",
    "sh",
    "sha256sum",
    "sleep",
    "sort",
    "stat",
    "su",
    "tail",
    "tar",
    "test",
    "touch",
    "true",
    "wc",
    "xargs",
];

fn busybox() -> Result<Entry> {
    let path = program("busybox").context("busybox is not installed")?;
    Ok(Entry::new("bin/busybox", Kind::File(Content::File(path))).mode(0o755))
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn owned(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn descriptor(media_type: &str, digest: &str, size: u64) -> Value {
    json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": size })
}

fn write_blob(blobs: &Path, entries: &[Entry], packing: Packing) -> Result<LayerInfo> {
    let file = tempfile::NamedTempFile::new_in(blobs)?;
    let info = write_layer(entries, packing, BufWriter::new(file.as_file()))?;
    file.persist(blobs.join(&info.digest)).context("naming a blob")?;
    Ok(info)
}

/// `sha256:` and the digest of these bytes.
pub fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

fn write_bytes(blobs: &Path, blob: &Blob) -> Result<LayerInfo> {
    let digest = hex::encode(Sha256::digest(&blob.bytes));
    std::fs::write(blobs.join(&digest), &blob.bytes)?;
    Ok(LayerInfo { digest, size: blob.bytes.len() as u64, diff_id: blob.diff_id.clone() })
}

fn write_json(blobs: &Path, value: &impl Serialize, media_type: &str) -> Result<Value> {
    let bytes = serde_json::to_vec(value)?;
    let digest = hex::encode(Sha256::digest(&bytes));
    std::fs::write(blobs.join(&digest), &bytes)?;
    Ok(descriptor(media_type, &digest, bytes.len() as u64))
}

/// The layout's index with this manifest in place of an older one of the same tag.
fn add_to_index(layout: &Path, tag: &str, mut manifest: Value) -> Result<()> {
    manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
    let path: PathBuf = layout.join("index.json");
    let mut manifests: Vec<Value> = match File::open(&path) {
        Ok(file) => serde_json::from_reader::<_, Value>(file)?["manifests"].as_array().cloned().unwrap_or_default(),
        Err(_) => Vec::new(),
    };
    manifests.retain(|other| other["annotations"]["org.opencontainers.image.ref.name"] != tag);
    manifests.push(manifest);
    let index = json!({ "schemaVersion": 2, "manifests": manifests });
    std::fs::write(&path, serde_json::to_vec(&index)?).with_context(|| format!("writing {}", path.display()))
}
