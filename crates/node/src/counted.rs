//! Sources that count what they are asked for.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use millstream_oci::Digest;
use millstream_prefetch::ImageSources;
use millstream_profile::Recording;
use millstream_source::{
    BlobSource, ByteStream, ContentSource, ProfileSource, ServedProfile, Skeleton, SourceError, WindowSource,
};
use millstream_toc::{BlobRange, DataRange};

use crate::metrics::NodeMetrics;

/// The same sources; each request counts in `metrics` once its answer begins or it fails.
pub fn counted(sources: ImageSources, metrics: &NodeMetrics) -> ImageSources {
    ImageSources {
        blob: Arc::new(Counted { inner: sources.blob, metrics: metrics.clone() }),
        windows: Arc::new(Counted { inner: sources.windows, metrics: metrics.clone() }),
        content: sources.content.map(|inner| Arc::new(Counted { inner, metrics: metrics.clone() }) as _),
    }
}

/// The same source of profiles, counted in the same way.
pub fn counted_profiles(inner: Arc<dyn ProfileSource>, metrics: &NodeMetrics) -> Arc<dyn ProfileSource> {
    Arc::new(Counted { inner, metrics: metrics.clone() })
}

#[derive(Debug)]
struct Counted<S: ?Sized> {
    metrics: NodeMetrics,
    inner: Arc<S>,
}

impl<S: ?Sized> Counted<S> {
    fn note<T>(&self, source: &'static str, answer: Result<T, SourceError>) -> Result<T, SourceError> {
        self.metrics.requested(source, answer.as_ref().err().map_or("", |error| error.kind.code()));
        answer
    }
}

#[async_trait]
impl BlobSource for Counted<dyn BlobSource> {
    async fn read(&self, blob: &Digest, range: BlobRange) -> Result<ByteStream, SourceError> {
        self.note("blob", self.inner.read(blob, range).await)
    }
}

#[async_trait]
impl WindowSource for Counted<dyn WindowSource> {
    async fn windows(&self, layer: &Digest, spans: Range<u32>) -> Result<Vec<Bytes>, SourceError> {
        self.note("window", self.inner.windows(layer, spans).await)
    }
}

#[async_trait]
impl ContentSource for Counted<dyn ContentSource> {
    async fn content(&self, layer: &Digest, range: DataRange) -> Result<Bytes, SourceError> {
        self.note("content", self.inner.content(layer, range).await)
    }

    async fn skeleton(&self, layer: &Digest) -> Result<Skeleton, SourceError> {
        self.note("skeleton", self.inner.skeleton(layer).await)
    }
}

#[async_trait]
impl ProfileSource for Counted<dyn ProfileSource> {
    async fn profile(&self, pages: bool, local: &[Digest]) -> Result<ServedProfile, SourceError> {
        self.note("profile", self.inner.profile(pages, local).await)
    }

    async fn record(&self, recording: &Recording) -> Result<(), SourceError> {
        self.note("recording", self.inner.record(recording).await)
    }
}
