//! All state of the server, in an object store.
//!
//! | object | content |
//! |---|---|
//! | `tocs/<blob>` | TOC in wire form |
//! | `windows/<blob>` | index and compressed windows, see [`crate::items`] |
//! | `packed/<blob>` | index and compressed content, see [`crate::packed`]; only for layers with closed spans |
//! | `pieces/<blob>` | digests of the blob's pieces, see [`crate::pieces`]; only for layers with closed spans |
//! | `skeletons/<blob>` | the skeleton, see [`crate::skeleton`]; absent where it is large or was not made yet |
//! | `layers/<blob>` | JSON [`LayerRecord`]; written after those above, so that its presence vouches for theirs |
//! | `indexes/<index>` | an image index as the registry gave it |
//! | `images/<manifest>/<repository>` | JSON [`ImageRecord`]; written last |
//! | `recordings/<manifest>/<repository>` | JSON: the newest recordings of what starts of the image read |
//! | `profiles/<manifest>/<repository>` | JSON: the plan that follows from them, or was carried over |
//! | `packs/<manifest>/<repository>` | a plan and its pages, see `profiles/kept.rs`; may be of the plan before |
//! | `profiled/<repository and platform>` | JSON: which manifest was recorded last |
//!
//! `<blob>`, `<index>`, `<manifest>` are digests in hex, `<repository>` is the SHA-256 of its name. But for startup profiles, no
//! object is ever changed to other content, only written again (and the record of an image that was known in part, by its
//! import), so that any number of servers can share one store without locks. Of a startup profile the last writer wins; each of
//! its objects is whole for itself, and none vouches for another. [`Store::shrink`] removes what was not used for long; only a
//! server that has a store for itself calls it. Beside it, only a pack that was found damaged is ever removed.

use std::fs::File;
use std::path::Path as FsPath;
use std::sync::Arc;

use bytes::Bytes;
use futures::stream::{BoxStream, StreamExt};
use millstream_oci::{DiffId, Digest, ManifestDigest};
use millstream_toc::format::VERSION;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, WriteMultipart};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;

use crate::items::ItemFile;

/// Parts of one upload under way at a time.
const UPLOADS_AT_ONCE: usize = 4;
/// Bytes read from a scratch file at a time.
const COPY_SIZE: usize = 1 << 20;

/// An object as it is read.
pub type Pieces = BoxStream<'static, Result<Bytes, StoreError>>;

/// Why the store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The configured location cannot be used.
    #[error("cannot use {location:?} as object store: {reason}")]
    Location {
        /// As configured.
        location: String,
        /// Why not, and what to do.
        reason: String,
    },
    /// The object store refused or failed.
    #[error("object {path}: {source}")]
    Object {
        /// Which object.
        path: String,
        /// What the object store said.
        source: object_store::Error,
    },
    /// An object is not what this program writes.
    #[error("object {path} is damaged: {reason}")]
    Damaged {
        /// Which object.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// The scratch file could not be read or written.
    #[error("scratch file: {source}")]
    Scratch {
        /// What the system said.
        #[from]
        source: std::io::Error,
    },
}

/// A blob whose TOC and windows (and content, if it has closed spans) are in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// Version of the TOC's canonical form.
    pub format: u32,
    /// Digest of the canonical TOC.
    pub toc: Digest,
    /// Digest of the tar.
    pub diff_id: DiffId,
    /// Bytes of the blob.
    pub size: u64,
    /// Number of spans, hence of windows.
    pub spans: u32,
}

/// One platform's image in one repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Registry and repository.
    pub repository: String,
    /// Digest of the manifest.
    pub manifest: ManifestDigest,
    /// Bottom first.
    pub layers: Vec<ImageLayer>,
}

/// A layer as manifest and config describe it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageLayer {
    /// Digest of the blob.
    pub digest: Digest,
    /// Bytes of the blob.
    pub size: u64,
    /// Digest of the tar.
    pub diff_id: DiffId,
    /// What kind of layer the manifest says it is.
    pub media: String,
    /// Why it cannot be streamed; absent: it has a [`LayerRecord`].
    ///
    /// Kept here and not with the blob: it depends on the media type, which is this manifest's claim about the blob, and one
    /// repository's claim must not spoil the blob for others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ineligible: Option<String>,
    /// Whether it was not read yet: the image is known in part, and its import will write this record anew.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pending: bool,
}

impl ImageLayer {
    /// Whether it was read, or proven, for this image.
    pub(crate) const fn is_ready(&self) -> bool {
        self.ineligible.is_none() && !self.pending
    }
}

/// The server's state. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    pub(crate) objects: Arc<dyn ObjectStore>,
}

impl Store {
    /// Opens the store at `location`: a directory (made if missing) or a `file://` URL.
    ///
    /// # Errors
    ///
    /// [`StoreError::Location`] when the URL's scheme is not supported or the directory cannot be made.
    pub fn open(location: &str) -> Result<Self, StoreError> {
        let refuse = |reason: String| StoreError::Location { location: location.to_owned(), reason };
        let directory = match location.split_once("://") {
            None => location,
            Some(("file", path)) if path.starts_with('/') => path,
            Some((scheme, _)) => {
                return Err(refuse(format!("{scheme:?} URLs are not supported; hint: give a local directory")));
            }
        };
        std::fs::create_dir_all(FsPath::new(directory)).map_err(|error| refuse(error.to_string()))?;
        let files = LocalFileSystem::new_with_prefix(directory).map_err(|error| refuse(error.to_string()))?;
        Ok(Self::new(Arc::new(files.with_fsync(true))))
    }

    /// A store upon any object store, which must write objects atomically.
    #[must_use]
    pub fn new(objects: Arc<dyn ObjectStore>) -> Self {
        Self { objects }
    }

    /// Whether the store answers: looks at the names in its root, of which there are a few.
    ///
    /// # Errors
    ///
    /// When the object store fails.
    pub async fn probe(&self) -> Result<(), StoreError> {
        self.objects.list_with_delimiter(None).await.map(drop).map_err(failed(&Path::ROOT))
    }

    /// What is known of `blob`, if it was written by this format version.
    ///
    /// # Errors
    ///
    /// When the object store fails or the record is damaged.
    pub async fn layer(&self, blob: &Digest) -> Result<Option<LayerRecord>, StoreError> {
        let record: Option<LayerRecord> = self.json(&layer_path(blob)).await?;
        Ok(record.filter(|record| record.format == VERSION))
    }

    /// Records `blob`. Its TOC, its windows and, if it has closed spans, its content must be stored already.
    ///
    /// # Errors
    ///
    /// When the object store fails.
    pub async fn put_layer(&self, blob: &Digest, record: &LayerRecord) -> Result<(), StoreError> {
        self.put_json(&layer_path(blob), record).await
    }

    /// Stores the TOC of `blob` in wire form.
    ///
    /// # Errors
    ///
    /// When the object store fails.
    pub async fn put_toc(&self, blob: &Digest, packed: Vec<u8>) -> Result<(), StoreError> {
        self.put(&toc_path(blob), packed.into()).await
    }

    /// The TOC of `blob` in wire form, in pieces; `None` when there is none.
    ///
    /// # Errors
    ///
    /// When the object store fails.
    pub async fn toc(&self, blob: &Digest) -> Result<Option<Pieces>, StoreError> {
        let path = toc_path(blob);
        match self.objects.get(&path).await {
            Ok(found) => Ok(Some(found.into_stream().map(move |piece| piece.map_err(failed(&path))).boxed())),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(failed(&path)(error)),
        }
    }

    /// Stores the windows of `blob`.
    ///
    /// # Errors
    ///
    /// When the object store or the scratch file fails.
    pub async fn put_windows(&self, blob: &Digest, windows: ItemFile) -> Result<(), StoreError> {
        let (index, file) = windows.into_parts();
        self.upload(&windows_path(blob), index, file).await
    }

    /// Stores the packed content of `blob`.
    ///
    /// # Errors
    ///
    /// When the object store or the scratch file fails.
    pub async fn put_packed(&self, blob: &Digest, units: ItemFile) -> Result<(), StoreError> {
        let (index, file) = units.into_parts();
        self.upload(&packed_path(blob), index, file).await
    }

    /// Stores the skeleton of `blob`.
    ///
    /// # Errors
    ///
    /// When the object store or the scratch file fails.
    pub async fn put_skeleton(&self, blob: &Digest, skeleton: File) -> Result<(), StoreError> {
        self.upload(&skeleton_path(blob), Vec::new(), skeleton).await
    }

    /// Stores the digests of the pieces of `blob`.
    ///
    /// # Errors
    ///
    /// When the object store fails.
    pub async fn put_pieces(&self, blob: &Digest, digests: Vec<u8>) -> Result<(), StoreError> {
        self.put(&pieces_path(blob), digests.into()).await
    }

    /// The digest of piece `ix` of `blob`.
    ///
    /// # Errors
    ///
    /// When the object store fails, or there is no such piece.
    pub async fn piece(&self, blob: &Digest, ix: u64) -> Result<Bytes, StoreError> {
        let path = pieces_path(blob);
        let place = ix.saturating_mul(crate::pieces::DIGEST);
        let place = place..place.saturating_add(crate::pieces::DIGEST);
        self.objects.get_range(&path, place).await.map_err(failed(&path))
    }

    /// The skeleton of `blob` in pieces, and its size in bytes; `None` when there is none.
    ///
    /// # Errors
    ///
    /// When the object store fails.
    pub async fn skeleton(&self, blob: &Digest) -> Result<Option<(u64, Pieces)>, StoreError> {
        let path = skeleton_path(blob);
        match self.objects.get(&path).await {
            Ok(found) => {
                let size = found.meta.size;
                Ok(Some((size, found.into_stream().map(move |piece| piece.map_err(failed(&path))).boxed())))
            }
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(failed(&path)(error)),
        }
    }

    /// Writes an object of `head` and what is left of `file`.
    pub(crate) async fn upload(&self, path: &Path, head: Vec<u8>, file: File) -> Result<(), StoreError> {
        let mut file = tokio::fs::File::from_std(file);
        let upload = self.objects.put_multipart(path).await.map_err(failed(path))?;
        let mut upload = WriteMultipart::new(upload);
        upload.put(head.into());
        let mut buffer = vec![0; COPY_SIZE];
        loop {
            match file.read(&mut buffer).await {
                Ok(0) => break,
                Ok(len) => upload.write(&buffer[..len]),
                Err(error) => {
                    // Best effort: an upload that is neither finished nor aborted is no object, only waste.
                    let _ = upload.abort().await;
                    return Err(error.into());
                }
            }
            upload.wait_for_capacity(UPLOADS_AT_ONCE).await.map_err(failed(path))?;
        }
        upload.finish().await.map_err(failed(path))?;
        Ok(())
    }

    /// The compressed windows of the spans `first..end` of `blob`, which has `spans` spans in all.
    ///
    /// # Errors
    ///
    /// When the object store fails, or the index is damaged.
    pub async fn windows(&self, blob: &Digest, spans: u32, first: u32, end: u32) -> Result<Vec<Bytes>, StoreError> {
        self.items(&windows_path(blob), spans, first, end).await
    }

    /// The compressed units `first..end` of the content of `blob`, which has `units` units in all.
    ///
    /// # Errors
    ///
    /// When the object store fails, or the index is damaged.
    pub async fn packed(&self, blob: &Digest, units: u32, first: u32, end: u32) -> Result<Vec<Bytes>, StoreError> {
        self.items(&packed_path(blob), units, first, end).await
    }

    async fn items(&self, path: &Path, count: u32, first: u32, end: u32) -> Result<Vec<Bytes>, StoreError> {
        let damaged = |reason: &str| StoreError::Damaged { path: path.to_string(), reason: reason.to_owned() };
        let places = crate::items::index_range(first, end);
        let index = self.objects.get_range(path, places).await.map_err(failed(path))?;
        let offsets = crate::items::parse_index(&index).ok_or_else(|| damaged("offsets of items descend"))?;
        let (Some(&start), Some(&stop)) = (offsets.first(), offsets.last()) else {
            return Err(damaged("index of items is empty"));
        };
        if start == stop {
            return Ok(vec![Bytes::new(); (end - first) as usize]);
        }
        let base = crate::items::index_len(count);
        let data = self.objects.get_range(path, base + start..base + stop).await.map_err(failed(path))?;
        let mut items = Vec::with_capacity(offsets.len() - 1);
        for pair in offsets.windows(2) {
            let place = usize::try_from(pair[0] - start).ok().zip(usize::try_from(pair[1] - start).ok());
            let (from, to) = place.filter(|place| place.1 <= data.len()).ok_or_else(|| damaged("items are cut"))?;
            items.push(data.slice(from..to));
        }
        Ok(items)
    }

    /// The image `manifest` as imported for `repository`.
    ///
    /// # Errors
    ///
    /// When the object store fails or the record is damaged.
    pub async fn image(&self, manifest: ManifestDigest, repository: &str) -> Result<Option<ImageRecord>, StoreError> {
        self.json(&image_path(manifest, repository)).await
    }

    /// Records an image, all of whose layers must be recorded already.
    ///
    /// # Errors
    ///
    /// When the object store fails.
    pub async fn put_image(&self, record: &ImageRecord) -> Result<(), StoreError> {
        self.put_json(&image_path(record.manifest, &record.repository), record).await
    }

    /// An image index that an import went through.
    ///
    /// # Errors
    ///
    /// When the object store fails.
    pub async fn index(&self, digest: ManifestDigest) -> Result<Option<Bytes>, StoreError> {
        self.get(&index_path(digest)).await
    }

    /// Keeps an image index.
    ///
    /// # Errors
    ///
    /// When the object store fails.
    pub async fn put_index(&self, digest: ManifestDigest, bytes: Bytes) -> Result<(), StoreError> {
        self.put(&index_path(digest), bytes).await
    }

    pub(crate) async fn json<T: DeserializeOwned>(&self, path: &Path) -> Result<Option<T>, StoreError> {
        let Some(bytes) = self.get(path).await? else { return Ok(None) };
        let damaged =
            |error: serde_json::Error| StoreError::Damaged { path: path.to_string(), reason: error.to_string() };
        serde_json::from_slice(&bytes).map(Some).map_err(damaged)
    }

    async fn put_json<T: Serialize + Sync>(&self, path: &Path, value: &T) -> Result<(), StoreError> {
        let damaged =
            |error: serde_json::Error| StoreError::Damaged { path: path.to_string(), reason: error.to_string() };
        let text = serde_json::to_vec_pretty(value).map_err(damaged)?;
        self.put(path, text.into()).await
    }

    pub(crate) async fn get(&self, path: &Path) -> Result<Option<Bytes>, StoreError> {
        match self.objects.get(path).await {
            Ok(found) => found.bytes().await.map(Some).map_err(failed(path)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(failed(path)(error)),
        }
    }

    pub(crate) async fn put(&self, path: &Path, bytes: Bytes) -> Result<(), StoreError> {
        self.objects.put(path, bytes.into()).await.map_err(failed(path))?;
        Ok(())
    }
}

pub(crate) fn failed(path: &Path) -> impl Fn(object_store::Error) -> StoreError + use<> {
    let path = path.to_string();
    move |source| StoreError::Object { path: path.clone(), source }
}

fn toc_path(blob: &Digest) -> Path {
    Path::from(format!("tocs/{}", blob.hex()))
}

fn windows_path(blob: &Digest) -> Path {
    Path::from(format!("windows/{}", blob.hex()))
}

fn packed_path(blob: &Digest) -> Path {
    Path::from(format!("packed/{}", blob.hex()))
}

fn pieces_path(blob: &Digest) -> Path {
    Path::from(format!("pieces/{}", blob.hex()))
}

fn skeleton_path(blob: &Digest) -> Path {
    Path::from(format!("skeletons/{}", blob.hex()))
}

pub(crate) fn layer_path(blob: &Digest) -> Path {
    Path::from(format!("layers/{}", blob.hex()))
}

fn index_path(digest: ManifestDigest) -> Path {
    Path::from(format!("indexes/{}", digest.0.hex()))
}

pub(crate) fn image_path(manifest: ManifestDigest, repository: &str) -> Path {
    Path::from(format!("images/{}/{}", manifest.0.hex(), Digest::of(repository.as_bytes()).hex()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn windows_read_by_range() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path().to_str().unwrap()).unwrap();
        let blob = Digest::of(b"blob");
        let mut writer = crate::items::ItemWriter::new(directory.path(), 3).unwrap();
        let raw: Vec<Vec<u8>> = (0..300_u32).map(|n| n.to_le_bytes().repeat(n as usize * 20)).collect();
        for (span, window) in raw.iter().enumerate().filter(|(span, _)| span % 3 != 1) {
            writer.append(span.try_into().unwrap(), window).unwrap();
        }
        store.put_windows(&blob, writer.finish(300).unwrap()).await.unwrap();
        for (first, end) in [(0, 300), (0, 1), (1, 2), (298, 300), (100, 164)] {
            let windows = store.windows(&blob, 300, first, end).await.unwrap();
            assert_eq!(windows.len(), (end - first) as usize);
            for (span, window) in (first..).zip(windows) {
                let expected = if span % 3 == 1 { &[][..] } else { &raw[span as usize] };
                assert_eq!(crate::items::unpack(&window, 32 * 1024).unwrap(), expected, "span {span}");
            }
        }
        assert!(store.windows(&blob, 300, 290, 400).await.is_err());
    }

    #[tokio::test]
    async fn records_survive_and_are_apart() {
        let directory = tempfile::tempdir().unwrap();
        let location = format!("file://{}", directory.path().display());
        let manifest = ManifestDigest(Digest::of(b"manifest"));
        let record = ImageRecord { repository: "r.example/a".into(), manifest, layers: vec![] };
        Store::open(&location).unwrap().put_image(&record).await.unwrap();
        let store = Store::open(&location).unwrap();
        assert_eq!(store.image(manifest, "r.example/a").await.unwrap(), Some(record));
        assert_eq!(store.image(manifest, "r.example/b").await.unwrap(), None);
        let blob = Digest::of(b"blob");
        let old = LayerRecord { format: VERSION + 1, toc: blob, diff_id: DiffId(blob), size: 1, spans: 1 };
        store.put_layer(&blob, &old).await.unwrap();
        assert_eq!(store.layer(&blob).await.unwrap(), None, "another format version counts as absent");
    }

    #[test]
    fn other_schemes_are_refused() {
        let error = Store::open("s3://bucket/x").unwrap_err().to_string();
        assert!(error.contains("s3") && error.contains("hint"), "{error}");
    }
}
