//! Writing blobs into the content store.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use millstream_oci::Digest;
use millstream_wire::containerd::services::content::v1 as wire;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;

use crate::{ContainerdError, Namespace};

/// The largest piece that is sent at once, in bytes: a message with it is below what containerd takes.
const MAX_PIECE: usize = 1 << 20;
/// How long is waited for another client that writes the same blob.
const BUSY_LIMIT: Duration = Duration::from_secs(300);
/// How often is looked whether it is through.
const BUSY_PAUSE: Duration = Duration::from_millis(200);

/// A blob that is being written. What was written stays with containerd when this is dropped: the next one to begin goes on
/// from there. Garbage collection takes it with its lease.
#[derive(Debug)]
pub struct Ingest {
    namespace: Namespace,
    action: String,
    digest: Digest,
    size: u64,
    offset: u64,
    requests: mpsc::Sender<wire::WriteContentRequest>,
    answers: tonic::Streaming<wire::WriteContentResponse>,
}

impl Namespace {
    /// Begins to write a blob, or goes on with what was begun under the same `name`. Waits some minutes for another client
    /// that writes it. `None`: containerd has the blob.
    ///
    /// # Errors
    /// [`ContainerdError::Busy`] when that client does not get through; those of every call.
    pub async fn begin(&self, name: &str, digest: &Digest, size: u64) -> Result<Option<Ingest>, ContainerdError> {
        let until = Instant::now() + BUSY_LIMIT;
        loop {
            match self.try_begin(name, digest, size).await {
                Err(ContainerdError::AlreadyExists { .. }) => return Ok(None),
                Err(ContainerdError::Busy { .. }) if Instant::now() < until => tokio::time::sleep(BUSY_PAUSE).await,
                begun => return begun.map(Some),
            }
        }
    }

    async fn try_begin(&self, name: &str, digest: &Digest, size: u64) -> Result<Ingest, ContainerdError> {
        let action = format!("writing blob {digest}");
        let (requests, queue) = mpsc::channel(1);
        let first = wire::WriteContentRequest {
            action: wire::WriteAction::Stat.into(),
            r#ref: name.to_owned(),
            total: length(&action, size)?,
            expected: digest.to_string(),
            ..wire::WriteContentRequest::default()
        };
        // There is room for it, and containerd says nothing before it came.
        let closed = |_| ContainerdError::malformed(&action, "the call ended before it began");
        requests.try_send(first).map_err(closed)?;
        let mut client = self.content();
        let begun = client.write(self.request(ReceiverStream::new(queue)));
        let limit = self.options().call_limit;
        let answers = match tokio::time::timeout(limit, begun).await {
            Ok(answers) => answers.map_err(|status| self.refused(&action, &status))?.into_inner(),
            Err(_) => return Err(ContainerdError::TimedOut { action, limit }),
        };
        let namespace = self.clone();
        let mut ingest = Ingest { namespace, action, digest: *digest, size, offset: 0, requests, answers };
        ingest.offset = ingest.answer().await?;
        Ok(ingest)
    }

    /// Writes a small blob with its labels, or sets the labels where it is there already.
    ///
    /// # Errors
    /// As [`Namespace::begin`] and [`Ingest::commit`].
    pub async fn put(
        &self,
        name: &str,
        digest: &Digest,
        bytes: Bytes,
        labels: &BTreeMap<String, String>,
    ) -> Result<(), ContainerdError> {
        match self.begin(name, digest, bytes.len() as u64).await? {
            None => self.label_blob(digest, labels).await,
            Some(mut ingest) => {
                ingest.restart();
                ingest.write(bytes).await?;
                ingest.commit(labels).await
            }
        }
    }
}

impl Ingest {
    /// How many bytes containerd has.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Throws away what was written, with the next write: to be done when a commit failed of what had been begun earlier.
    pub fn restart(&mut self) {
        self.offset = 0;
    }

    /// Appends `bytes`.
    ///
    /// # Errors
    /// Those of every call; also when more comes than the blob has.
    pub async fn write(&mut self, mut bytes: Bytes) -> Result<(), ContainerdError> {
        if self.offset.saturating_add(bytes.len() as u64) > self.size {
            let message = format!("more bytes than the {} of the blob", self.size);
            return Err(ContainerdError::malformed(&self.action, message));
        }
        while !bytes.is_empty() {
            let data = bytes.split_to(bytes.len().min(MAX_PIECE));
            let end = self.offset + data.len() as u64;
            self.send(wire::WriteAction::Write, data, BTreeMap::new()).await?;
            self.offset = self.answer().await?;
            if self.offset != end {
                let message = format!("containerd is at byte {}, not at {end}", self.offset);
                return Err(ContainerdError::malformed(&self.action, message));
            }
        }
        Ok(())
    }

    /// Has containerd verify size and digest, and makes a blob of what was written.
    ///
    /// # Errors
    /// Those of every call; when the digest is another one, the ingest stays as it is, and is of no use but to
    /// [`Ingest::restart`].
    pub async fn commit(mut self, labels: &BTreeMap<String, String>) -> Result<(), ContainerdError> {
        let done = match self.send(wire::WriteAction::Commit, Bytes::new(), labels.clone()).await {
            Ok(()) => self.answer().await.map(drop),
            Err(error) => Err(error),
        };
        match done {
            // Somebody else was faster.
            Err(ContainerdError::AlreadyExists { .. }) => self.namespace.label_blob(&self.digest, labels).await,
            done => done,
        }
    }

    async fn send(
        &mut self,
        action: wire::WriteAction,
        data: Bytes,
        labels: BTreeMap<String, String>,
    ) -> Result<(), ContainerdError> {
        let committed = action == wire::WriteAction::Commit;
        let request = wire::WriteContentRequest {
            action: action.into(),
            offset: length(&self.action, self.offset)?,
            data,
            total: if committed { length(&self.action, self.size)? } else { 0 },
            expected: if committed { self.digest.to_string() } else { String::new() },
            labels: labels.into_iter().collect(),
            ..wire::WriteContentRequest::default()
        };
        if self.requests.send(request).await.is_ok() {
            return Ok(());
        }
        // containerd ended the call; its answer says why.
        match self.answer().await {
            Err(error) => Err(error),
            Ok(_) => Err(ContainerdError::malformed(&self.action, "containerd ended the call")),
        }
    }

    /// Where the ingest ends, as containerd says.
    async fn answer(&mut self) -> Result<u64, ContainerdError> {
        let answer = self.namespace.next(&self.action, &mut self.answers).await?;
        let answer = answer.ok_or_else(|| ContainerdError::malformed(&self.action, "containerd ended the call"))?;
        u64::try_from(answer.offset).map_err(|_| ContainerdError::malformed(&self.action, "a negative offset"))
    }
}

fn length(action: &str, number: u64) -> Result<i64, ContainerdError> {
    i64::try_from(number).map_err(|_| ContainerdError::malformed(action, "a size beyond every blob"))
}
