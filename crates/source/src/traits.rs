//! What the rest of the program may ask of the world for bytes.

use std::ops::Range;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use millstream_oci::{Digest, ManifestDigest, TagOrDigest};
use millstream_profile::{Profile, Recording};
use millstream_toc::{BlobRange, DataRange};

use crate::SourceError;

/// A body that arrives in pieces.
pub type ByteStream = BoxStream<'static, Result<Bytes, SourceError>>;

/// How urgent a fetch is. Order matters: the smaller overtakes the larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Priority {
    /// A reader waits for it.
    Demand,
    /// No reader waits, but one is expected soon (read-around, start-up profile).
    Prefetch,
    /// Makes the layer wholly local.
    Hydrate,
}

/// Compressed bytes of one image's blobs, by range. An implementation is bound to one repository and one right to read.
#[async_trait]
pub trait BlobSource: Send + Sync + std::fmt::Debug {
    /// The bytes of `range` of `blob`, in order. The stream yields exactly `range.len()` bytes or ends with an error;
    /// nothing is verified but the length. A source that cannot serve ranges fails with [`crate::ErrorKind::NoRange`].
    async fn read(&self, blob: &Digest, range: BlobRange) -> Result<ByteStream, SourceError>;
}

/// A manifest or an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// Its bytes.
    pub bytes: Bytes,
    /// The media type that it was given with.
    pub content_type: Option<String>,
    /// Its digest, computed from the bytes.
    pub digest: ManifestDigest,
}

/// Everything that an image is made of: a registry's repository, or what another program has stored of it.
#[async_trait]
pub trait ImageSource: BlobSource {
    /// The manifest or index that `reference` names, of at most [`millstream_oci::MAX_DOCUMENT_SIZE`] bytes. What is asked
    /// for by digest has that digest, else it is [`crate::ErrorKind::DigestMismatch`].
    async fn document(&self, reference: TagOrDigest) -> Result<Fetched, SourceError>;

    /// The whole blob `digest`, such as an image's configuration: verified, and of at most `max` bytes.
    async fn whole_blob(&self, digest: &Digest, max: u64) -> Result<Bytes, SourceError>;
}

/// Decompressor windows of one image's layers.
#[async_trait]
pub trait WindowSource: Send + Sync + std::fmt::Debug {
    /// Raw (not compressed) windows of the spans `spans` of layer `layer`, in order; an empty entry for a span that needs
    /// none. Not verified: the caller compares them with the TOC.
    async fn windows(&self, layer: &Digest, spans: Range<u32>) -> Result<Vec<Bytes>, SourceError>;
}

/// A layer's skeleton on its way: all bytes of the tar that are not content of files, in order, as one zstd stream.
pub struct Skeleton {
    /// Bytes of `packed`.
    pub size: u64,
    /// The zstd stream. Ends with an error if it has another length.
    pub packed: ByteStream,
}

/// What a layer's tar consists of: plain file content, and the skeleton around it.
#[async_trait]
pub trait ContentSource: Send + Sync + std::fmt::Debug {
    /// The bytes of `range` of the layer's data address space; alignment gaps read as zeros. Not verified.
    async fn content(&self, layer: &Digest, range: DataRange) -> Result<Bytes, SourceError>;

    /// The skeleton of the layer. Not verified. Fails with [`crate::ErrorKind::NotFound`] where the source keeps none.
    async fn skeleton(&self, layer: &Digest) -> Result<Skeleton, SourceError>;
}

/// What starts of one image read, and the pages on their way.
pub struct ServedProfile {
    /// The pages in order of first touch.
    pub plan: Profile,
    /// Recordings that it was made of; 0: it was carried over from another image.
    pub recordings: u32,
    /// The pages, as one zstd stream of proofs ([`millstream_profile::proof`]), one for each chunk that a run touches, run by run,
    /// but for runs of layers that were named as local; `None` where the source has the plan only. Not verified.
    pub packed: Option<ByteStream>,
}

/// Startup profiles of one image.
#[async_trait]
pub trait ProfileSource: Send + Sync + std::fmt::Debug {
    /// What starts of the image read; with its pages, but for those of the layers `local`, if `pages`. Fails with
    /// [`crate::ErrorKind::NotFound`] where nothing is known.
    async fn profile(&self, pages: bool, local: &[Digest]) -> Result<ServedProfile, SourceError>;

    /// Tells what one start of the image read.
    async fn record(&self, recording: &Recording) -> Result<(), SourceError>;
}
