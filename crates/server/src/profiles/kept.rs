//! What is kept of startup profiles; `store` has the table of objects.

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt};
use millstream_oci::{Digest, ManifestDigest, Platform};
use millstream_profile::{Profile, ProfileLayer, Recording};
use object_store::ObjectStoreExt;
use object_store::path::Path;
use serde::{Deserialize, Serialize};
use std::fs::File;

use crate::StoreError;
use crate::store::{ImageRecord, Pieces, Store, failed};

/// Begins every pack; the digit is the version of what follows.
const MAGIC: &[u8; 8] = b"MSPACK1\n";
/// Magic, bytes of the head, BLAKE3 of the head.
const BEFORE_HEAD: usize = 8 + 4 + 32;
/// Bytes of the head of the largest profile, generously.
const MAX_HEAD: usize = 64 << 20;

/// One platform's image in one repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct ImageKey {
    pub(crate) manifest: ManifestDigest,
    pub(crate) repository: String,
}

impl ImageKey {
    pub(crate) fn of(image: &ImageRecord) -> Self {
        Self { manifest: image.manifest, repository: image.repository.clone() }
    }

    fn path(&self, kind: &str) -> Path {
        Path::from(format!("{kind}/{}/{}", self.manifest.0.hex(), Digest::of(self.repository.as_bytes()).hex()))
    }
}

/// A profile as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KeptProfile {
    pub(crate) layers: Vec<ProfileLayer>,
    /// As [`Profile::numbers`] gives them.
    pub(crate) runs: Vec<u32>,
    /// Recordings that it was made of.
    pub(crate) recordings: u32,
    /// The image that it was carried over from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) from: Option<ManifestDigest>,
}

impl KeptProfile {
    pub(crate) fn new(profile: &Profile, recordings: u32, from: Option<ManifestDigest>) -> Self {
        Self { layers: profile.layers.clone(), runs: profile.numbers(), recordings, from }
    }

    /// Whether both name the same pages in the same order.
    pub(crate) fn has_plan_of(&self, other: &Self) -> bool {
        self.layers == other.layers && self.runs == other.runs
    }

    /// `None` where it breaks a limit: somebody else wrote it.
    pub(crate) fn profile(&self) -> Option<Profile> {
        Profile::from_numbers(self.layers.clone(), &self.runs).ok()
    }
}

/// A recording as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KeptRecording {
    layers: Vec<ProfileLayer>,
    fresh: Vec<bool>,
    runs: Vec<u32>,
}

impl KeptRecording {
    pub(crate) fn new(recording: &Recording) -> Self {
        let Recording { read, fresh } = recording;
        Self { layers: read.layers.clone(), fresh: fresh.clone(), runs: read.numbers() }
    }

    /// `None` where it breaks a limit.
    pub(crate) fn recording(&self) -> Option<Recording> {
        let read = Profile::from_numbers(self.layers.clone(), &self.runs).ok()?;
        Some(Recording { read, fresh: self.fresh.clone() })
    }
}

/// Which image of a repository was recorded last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LatestProfile {
    pub(crate) repository: String,
    pub(crate) manifest: ManifestDigest,
}

/// What stands before the pages of a pack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PackHead {
    /// The very plan that the pages are of.
    pub(crate) profile: KeptProfile,
    /// Bytes of each run's pages with their proofs, not compressed.
    pub(crate) sizes: Vec<u32>,
    /// Bytes of the zstd stream.
    pub(crate) size: u64,
    /// BLAKE3 of the zstd stream, in hex.
    pub(crate) digest: String,
}

/// A pack that is being read.
pub(crate) struct OpenPack {
    pub(crate) head: PackHead,
    /// The zstd stream.
    pub(crate) packed: Pieces,
}

impl Store {
    pub(crate) async fn recordings(&self, key: &ImageKey) -> Result<Vec<KeptRecording>, StoreError> {
        Ok(self.json(&key.path("recordings")).await?.unwrap_or_default())
    }

    pub(crate) async fn put_recordings(&self, key: &ImageKey, kept: &[KeptRecording]) -> Result<(), StoreError> {
        self.put_compact(&key.path("recordings"), &kept).await
    }

    pub(crate) async fn profile(&self, key: &ImageKey) -> Result<Option<KeptProfile>, StoreError> {
        self.json(&key.path("profiles")).await
    }

    pub(crate) async fn put_profile(&self, key: &ImageKey, profile: &KeptProfile) -> Result<(), StoreError> {
        self.put_compact(&key.path("profiles"), profile).await
    }

    pub(crate) async fn latest_profile(
        &self,
        repository: &str,
        platform: &Platform,
    ) -> Result<Option<LatestProfile>, StoreError> {
        self.json(&latest_path(repository, platform)).await
    }

    pub(crate) async fn put_latest_profile(
        &self,
        platform: &Platform,
        latest: &LatestProfile,
    ) -> Result<(), StoreError> {
        self.put_compact(&latest_path(&latest.repository, platform), latest).await
    }

    /// Stores a pack: plan and pages in one object, so that they belong together whoever writes last.
    pub(crate) async fn put_pack(&self, key: &ImageKey, head: &PackHead, packed: File) -> Result<(), StoreError> {
        let path = key.path("packs");
        let json = serde_json::to_vec(head).map_err(|error| damaged(&path, &error))?;
        let len = u32::try_from(json.len()).map_err(|error| damaged(&path, &error))?;
        let head = [MAGIC, &len.to_le_bytes()[..], blake3::hash(&json).as_bytes(), &json].concat();
        self.upload(&path, head, packed).await
    }

    /// The pack of an image; `None` when there is none. Its head is whole; its pages are not looked at.
    pub(crate) async fn pack(&self, key: &ImageKey) -> Result<Option<OpenPack>, StoreError> {
        let path = key.path("packs");
        let found = match self.objects.get(&path).await {
            Ok(found) => found,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(failed(&path)(error)),
        };
        let for_pieces = path.clone();
        let mut rest = found.into_stream().map(move |piece| piece.map_err(failed(&for_pieces))).boxed();
        let mut begin = BytesMut::new();
        gather(&mut rest, &mut begin, BEFORE_HEAD).await?;
        let torn = |what: &str| StoreError::Damaged { path: path.to_string(), reason: what.to_owned() };
        let Some((before, _)) = begin.split_first_chunk::<BEFORE_HEAD>() else { return Err(torn("it is cut")) };
        let (magic, expected) = (&before[..8], &before[12..]);
        let len = before[8..12].iter().rev().fold(0_usize, |len, byte| len << 8 | usize::from(*byte));
        if magic != MAGIC || len > MAX_HEAD {
            return Err(torn("it does not begin as a pack"));
        }
        let (expected, end) = (expected.to_vec(), BEFORE_HEAD + len);
        gather(&mut rest, &mut begin, end).await?;
        if begin.len() < end {
            return Err(torn("it is cut"));
        }
        let begin = begin.freeze();
        let json = begin.slice(BEFORE_HEAD..end);
        if blake3::hash(&json).as_bytes()[..] != expected {
            return Err(torn("its head has another digest"));
        }
        let head: PackHead = serde_json::from_slice(&json).map_err(|error| damaged(&path, &error))?;
        if head.sizes.len() * 3 != head.profile.runs.len() || head.profile.profile().is_none() {
            return Err(torn("its plan is no plan"));
        }
        let first: Bytes = begin.slice(end..);
        let packed = futures::stream::once(async move { Ok(first) }).chain(rest).boxed();
        Ok(Some(OpenPack { head, packed }))
    }

    /// Removes a pack that was found damaged: it is made again.
    pub(crate) async fn remove_pack(&self, key: &ImageKey) -> Result<(), StoreError> {
        let path = key.path("packs");
        match self.objects.delete(&path).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(failed(&path)(error)),
        }
    }

    /// Writes JSON without spaces: lists of numbers are long.
    async fn put_compact<T: Serialize + Sync>(&self, path: &Path, value: &T) -> Result<(), StoreError> {
        let text = serde_json::to_vec(value).map_err(|error| damaged(path, &error))?;
        self.put(path, text.into()).await
    }
}

/// What can be read of `found`; damaged is as good as absent where it is about to be written anew.
pub(crate) fn unless_damaged<T: Default>(found: Result<T, StoreError>) -> Result<T, StoreError> {
    match found {
        Err(error @ StoreError::Damaged { .. }) => {
            tracing::warn!(%error, "kept of a startup profile, and of no use");
            Ok(T::default())
        }
        other => other,
    }
}

fn latest_path(repository: &str, platform: &Platform) -> Path {
    let Platform { os, architecture, variant, .. } = platform;
    let name = format!("{repository} {os}/{architecture}/{}", variant.as_deref().unwrap_or_default());
    Path::from(format!("profiled/{}", Digest::of(name.as_bytes()).hex()))
}

/// Takes of `rest` until `bytes` has `len` bytes or there are no more.
async fn gather(rest: &mut Pieces, bytes: &mut BytesMut, len: usize) -> Result<(), StoreError> {
    while bytes.len() < len
        && let Some(piece) = rest.try_next().await?
    {
        bytes.extend_from_slice(&piece);
    }
    Ok(())
}

fn damaged(path: &Path, error: &dyn std::error::Error) -> StoreError {
    StoreError::Damaged { path: path.to_string(), reason: error.to_string() }
}
