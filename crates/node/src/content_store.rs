//! containerd's content store as a source of images: what an ordinary pull has left on this node.

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use millstream_containerd::{Containerd, ContainerdError, Namespace};
use millstream_oci::{Digest, MAX_DOCUMENT_SIZE, ManifestDigest, TagOrDigest};
use millstream_source::{BlobSource, ByteStream, ErrorKind, Fetched, ImageSource, SourceError};
use millstream_toc::BlobRange;

/// Namespaces that are searched, at most.
const MAX_NAMESPACES: usize = 32;

/// What helps where documents of an image are there and its layers are not.
const KEEP_LAYERS: &str = "hint: does containerd keep what it has unpacked (discard_unpacked_layers = false)?";

/// What containerd has of one image, in whichever of its namespaces. Content is found by its digest, so it does not matter
/// which of them has it.
#[derive(Debug)]
pub struct ContentStore {
    spaces: Vec<Namespace>,
    /// Name of the image in full form, for what is not asked for by digest.
    image: String,
}

impl ContentStore {
    /// The content of the namespace `only`, or of all.
    ///
    /// # Errors
    /// When containerd does not answer, or could have no such namespace.
    pub async fn open(containerd: &Containerd, only: Option<&str>, image: String) -> Result<Self, SourceError> {
        let names = match only {
            Some(name) => vec![name.to_owned()],
            None => containerd.namespaces().await.map_err(|error| failed(&error))?,
        };
        let spaces = names.iter().take(MAX_NAMESPACES).map(|name| containerd.namespace(name));
        let spaces = spaces.collect::<Result<Vec<_>, _>>().map_err(|error| failed(&error))?;
        Ok(Self { spaces, image })
    }

    /// The answer of the first namespace that has `what` is asked for.
    async fn first<T, F>(&self, what: &str, ask: impl Fn(Namespace) -> F + Send + Sync) -> Result<T, SourceError>
    where
        F: Future<Output = Result<T, ContainerdError>> + Send,
    {
        for space in &self.spaces {
            match ask(space.clone()).await {
                Err(ContainerdError::NotFound { .. }) => {}
                answer => return answer.map_err(|error| failed(&error)),
            }
        }
        Err(SourceError::new(ErrorKind::NotFound, format!("{what} is not in containerd's content store")))
    }
}

#[async_trait]
impl BlobSource for ContentStore {
    async fn read(&self, blob: &Digest, range: BlobRange) -> Result<ByteStream, SourceError> {
        // Asked first: a stream that begins does not say yet that there is such a blob.
        let what = format!("layer {blob}");
        let found = self.first(&what, |space| async move { space.blob_info(blob).await.map(|_| space) });
        let space = found.await.map_err(|error| match error.kind {
            ErrorKind::NotFound => SourceError::new(error.kind, format!("{error}; {KEEP_LAYERS}")),
            _ => error,
        })?;
        let stream = space.read(blob, range.start, range.len()).await.map_err(|error| failed(&error))?;
        Ok(stream.map_err(|error| failed(&error)).boxed())
    }
}

#[async_trait]
impl ImageSource for ContentStore {
    async fn document(&self, reference: TagOrDigest) -> Result<Fetched, SourceError> {
        let (digest, content_type) = match reference {
            TagOrDigest::Digest(digest) => (digest, None),
            TagOrDigest::Tag(_) => {
                let (name, what) = (&self.image, format!("image {}", self.image));
                let target = self.first(&what, |space| async move { space.image(name).await }).await?.target;
                (ManifestDigest(target.digest), Some(target.media_type))
            }
        };
        let bytes = self.whole_blob(&digest.0, MAX_DOCUMENT_SIZE as u64).await?;
        Ok(Fetched { bytes, content_type, digest })
    }

    async fn whole_blob(&self, digest: &Digest, max: u64) -> Result<Bytes, SourceError> {
        let what = format!("blob {digest}");
        let bytes = self.first(&what, |space| async move { space.read_all(digest, max).await }).await?;
        Ok(bytes.into())
    }
}

/// The one table from containerd's errors to our kinds.
fn failed(error: &ContainerdError) -> SourceError {
    let kind = match error {
        ContainerdError::NotFound { .. } | ContainerdError::Name(_) => ErrorKind::NotFound,
        ContainerdError::TimedOut { .. } => ErrorKind::TimedOut,
        ContainerdError::Damaged { .. } => ErrorKind::DigestMismatch,
        ContainerdError::Malformed { .. } | ContainerdError::TooLarge { .. } => ErrorKind::Malformed,
        ContainerdError::Unreachable { .. }
        | ContainerdError::AlreadyExists { .. }
        | ContainerdError::Busy { .. }
        | ContainerdError::Refused { .. } => ErrorKind::Unavailable,
    };
    SourceError::new(kind, error.to_string())
}
