//! One blob from the registry into containerd's content store.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::StreamExt;
use millstream_containerd::{BlobDescriptor, ContainerdError, Ingest, Namespace};
use millstream_registry::Repository;
use millstream_source::{BlobSource, ByteStream, ErrorKind, RetryOptions, RetryingBlobSource, SourceError};
use millstream_toc::BlobRange;

/// Why a blob did not come.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TransferError {
    /// The registry.
    #[error("{0}")]
    Source(#[from] SourceError),
    /// containerd.
    #[error("{0}")]
    Containerd(#[from] ContainerdError),
}

/// From one repository into one namespace.
pub(crate) struct Transfer {
    repository: Arc<Repository>,
    resuming: RetryingBlobSource,
    space: Namespace,
}

impl Transfer {
    pub(crate) fn new(repository: Repository, space: Namespace) -> Self {
        let repository = Arc::new(repository);
        let source = Arc::clone(&repository) as Arc<dyn BlobSource>;
        // One client on one machine: nobody to step aside for.
        let resuming = RetryingBlobSource::new(source, RetryOptions::default(), Arc::new(|| 0.0));
        Self { repository, resuming, space }
    }

    /// Where it goes.
    pub(crate) fn space(&self) -> &Namespace {
        &self.space
    }

    /// Fetches a blob, or what is missing of it; `progress` is told how much is there. containerd compares the digest.
    pub(crate) async fn fetch(
        &self,
        blob: &BlobDescriptor,
        labels: &BTreeMap<String, String>,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<(), TransferError> {
        // The name that containerd's own clients give: of two at one layer, one waits.
        let name = format!("layer-{}", blob.digest);
        let Some(ingest) = self.space.begin(&name, &blob.digest, blob.size).await? else {
            progress(blob.size);
            return Ok(self.space.label_blob(&blob.digest, labels).await?);
        };
        let begun_before = ingest.offset() > 0;
        match self.write(ingest, blob, labels, progress).await {
            // What lay there from an earlier attempt may have been damaged.
            Err(TransferError::Containerd(ContainerdError::Refused { .. })) if begun_before => {
                let Some(mut ingest) = self.space.begin(&name, &blob.digest, blob.size).await? else { return Ok(()) };
                ingest.restart();
                self.write(ingest, blob, labels, progress).await
            }
            written => written,
        }
    }

    async fn write(
        &self,
        mut ingest: Ingest,
        blob: &BlobDescriptor,
        labels: &BTreeMap<String, String>,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<(), TransferError> {
        progress(ingest.offset());
        if ingest.offset() < blob.size {
            let mut pieces = self.open(&mut ingest, blob).await?;
            while let Some(piece) = pieces.next().await {
                ingest.write(piece?).await?;
                progress(ingest.offset());
            }
        }
        Ok(ingest.commit(labels).await?)
    }

    /// What is missing, by range; from a registry that serves no ranges the whole.
    async fn open(&self, ingest: &mut Ingest, blob: &BlobDescriptor) -> Result<ByteStream, SourceError> {
        let missing = BlobRange::new(ingest.offset(), blob.size);
        match self.resuming.read(&blob.digest, missing).await {
            Err(error) if error.kind == ErrorKind::NoRange => {
                ingest.restart();
                self.repository.read_whole(&blob.digest, blob.size).await
            }
            pieces => pieces,
        }
    }
}
