//! The content store: blobs by digest, with labels.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use millstream_oci::Digest;
use millstream_wire::containerd::services::content::v1 as wire;
use millstream_wire::containerd::services::content::v1::content_client::ContentClient;
use prost_types::FieldMask;
use tonic::transport::Channel;

use crate::{ContainerdError, Namespace, label_paths};

/// What containerd says of a blob that it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobInfo {
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// When it was written or its labels last changed; the epoch where containerd does not say.
    pub updated_at: SystemTime,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// A blob's bytes in order; ends after the first error.
pub type BlobStream = BoxStream<'static, Result<Bytes, ContainerdError>>;

impl Namespace {
    pub(crate) fn content(&self) -> ContentClient<Channel> {
        ContentClient::new(self.channel()).max_decoding_message_size(self.options().max_message)
    }

    /// Whether containerd has the blob, and what it says of it.
    ///
    /// # Errors
    /// [`ContainerdError::NotFound`] when this namespace does not have it; those of every call.
    pub async fn blob_info(&self, digest: &Digest) -> Result<BlobInfo, ContainerdError> {
        let action = format!("looking for blob {digest}");
        let request = wire::InfoRequest { digest: digest.to_string() };
        let mut client = self.content();
        let answer = self.short(&action, request, |request| client.info(request)).await?;
        let info = answer.info.and_then(blob_info);
        info.ok_or_else(|| ContainerdError::malformed(&action, "containerd answered without digest and size"))
    }

    /// The blobs that `filter` (containerd's language; empty: all) selects, `max` of them at most, in no particular order.
    /// Those with digests that this project does not know are left out.
    ///
    /// # Errors
    /// Those of every call.
    pub async fn blobs(&self, filter: &str, max: usize) -> Result<Vec<BlobInfo>, ContainerdError> {
        let action = "listing blobs";
        let filters = if filter.is_empty() { Vec::new() } else { vec![filter.to_owned()] };
        let mut client = self.content();
        let mut answers =
            self.short(action, wire::ListContentRequest { filters }, |request| client.list(request)).await?;
        let mut found = Vec::new();
        while found.len() < max {
            let Some(answer) = self.next(action, &mut answers).await? else { break };
            found.extend(answer.info.into_iter().filter_map(blob_info).take(max - found.len()));
        }
        Ok(found)
    }

    /// Bytes of a blob from `offset` on, `len` of them or as many as there are. Not verified.
    ///
    /// # Errors
    /// [`ContainerdError::NotFound`] when this namespace does not have it; those of every call. The stream fails when
    /// nothing comes for the idle limit.
    pub async fn read(&self, digest: &Digest, offset: u64, len: u64) -> Result<BlobStream, ContainerdError> {
        let action = format!("reading blob {digest}");
        let number = |number: u64| {
            i64::try_from(number).map_err(|_| ContainerdError::malformed(&action, "a range beyond every blob"))
        };
        if len == 0 {
            // To containerd that would mean all there is.
            return Ok(stream::empty().boxed());
        }
        let request = wire::ReadContentRequest {
            digest: digest.to_string(),
            offset: number(offset)?,
            size: number(len.min(i64::MAX.unsigned_abs() - offset))?,
        };
        let mut client = self.content();
        // No deadline for the whole: the stream may be long, and its reader slow.
        let begun = tokio::time::timeout(self.options().call_limit, client.read(self.request(request)));
        let answers = match begun.await {
            Ok(answers) => answers.map_err(|status| self.refused(&action, &status))?.into_inner(),
            Err(_) => return Err(ContainerdError::TimedOut { action, limit: self.options().call_limit }),
        };
        let this = self.clone();
        Ok(stream::try_unfold((this, action, answers), |(this, action, mut answers)| async move {
            let answer = this.next(&action, &mut answers).await?;
            Ok(answer.map(|answer| (answer.data, (this, action, answers))))
        })
        .boxed())
    }

    /// A whole blob of at most `max` bytes, verified.
    ///
    /// # Errors
    /// [`ContainerdError::NotFound`], [`ContainerdError::TooLarge`], [`ContainerdError::Damaged`]; those of every call.
    pub async fn read_all(&self, digest: &Digest, max: u64) -> Result<Vec<u8>, ContainerdError> {
        let mut pieces = self.read(digest, 0, max.saturating_add(1)).await?;
        let mut bytes = Vec::new();
        while let Some(piece) = pieces.next().await {
            bytes.extend_from_slice(&piece?);
            if bytes.len() as u64 > max {
                return Err(ContainerdError::TooLarge { action: format!("reading blob {digest}"), limit: max });
            }
        }
        let found = Digest::of(&bytes);
        if found == *digest { Ok(bytes) } else { Err(ContainerdError::Damaged { wanted: *digest, found }) }
    }

    /// Sets labels of a blob; others stay. An empty value takes a label away.
    ///
    /// # Errors
    /// [`ContainerdError::NotFound`]; those of every call.
    pub async fn label_blob(&self, digest: &Digest, labels: &BTreeMap<String, String>) -> Result<(), ContainerdError> {
        let info = wire::Info {
            digest: digest.to_string(),
            labels: labels.clone().into_iter().collect(),
            ..wire::Info::default()
        };
        let update_mask = Some(FieldMask { paths: label_paths(labels.keys()) });
        let request = wire::UpdateRequest { info: Some(info), update_mask };
        let mut client = self.content();
        self.short(&format!("labelling blob {digest}"), request, |request| client.update(request)).await.map(drop)
    }

    /// The next message of a stream; `None` at its end.
    pub(crate) async fn next<T>(
        &self,
        action: &str,
        answers: &mut tonic::Streaming<T>,
    ) -> Result<Option<T>, ContainerdError> {
        let limit = self.options().idle_limit;
        match tokio::time::timeout(limit, answers.message()).await {
            Ok(answer) => answer.map_err(|status| self.refused(action, &status)),
            Err(_) => Err(ContainerdError::TimedOut { action: action.to_owned(), limit }),
        }
    }

    pub(crate) fn refused(&self, action: &str, status: &tonic::Status) -> ContainerdError {
        ContainerdError::refused(action, self.containerd().address(), status)
    }
}

fn blob_info(info: wire::Info) -> Option<BlobInfo> {
    let updated_at = info.updated_at.or(info.created_at).map_or(SystemTime::UNIX_EPOCH, |time| {
        let seconds = u64::try_from(time.seconds).unwrap_or(0);
        SystemTime::UNIX_EPOCH + Duration::new(seconds, u32::try_from(time.nanos).unwrap_or(0).min(999_999_999))
    });
    Some(BlobInfo {
        digest: info.digest.parse().ok()?,
        size: u64::try_from(info.size).ok()?,
        updated_at,
        labels: info.labels.into_iter().collect(),
    })
}
