//! One part of a blob for hydration: resumed where it broke, aside when readers come, held back on request.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use millstream_source::{ErrorKind, Priority, SourceError, names};
use millstream_toc::BlobRange;
use tokio::time::Instant;

use crate::attached::{Attached, Source};
use crate::extract::bounded;
use crate::fetcher::Shared;
use crate::gate::Urgency;
use crate::hydrate::Permission;
use crate::pace::Paced;

/// What the parts of one pass share.
pub(crate) struct Pass<'a> {
    pub(crate) shared: &'a Arc<Shared>,
    pub(crate) attached: &'a Arc<Attached>,
    pub(crate) permission: Permission,
    /// Every source that gave bytes: if the sum of all is wrong, any of them may be to blame.
    pub(crate) used: Mutex<Vec<Arc<Source>>>,
}

impl Pass<'_> {
    /// Waits until hydration is not held back.
    ///
    /// # Errors
    /// When there will be none any more.
    pub(crate) async fn permitted(&self) -> Result<(), SourceError> {
        if self.permission.clone().given().await {
            return Ok(());
        }
        Err(SourceError::new(ErrorKind::Unavailable, "hydration was ended"))
    }

    /// All bytes of `range`, which fits in memory.
    ///
    /// # Errors
    /// The last one, after as many failures in a row as a fetch has rounds for each source.
    pub(crate) async fn part(&self, range: BlobRange) -> Result<Bytes, SourceError> {
        let options = &self.shared.options;
        let len = usize::try_from(range.len()).map_err(|e| SourceError::new(ErrorKind::Local, e.to_string()))?;
        let mut bytes = BytesMut::with_capacity(len);
        let mut failures = 0u32;
        while bytes.len() < len {
            // Held back between requests too, without a slot and without a connection.
            self.permitted().await?;
            let before = bytes.len();
            let sources = self.attached.sources();
            let Some(source) = sources.get(failures as usize % sources.len().max(1)) else {
                return Err(SourceError::new(ErrorKind::Unavailable, "the layer has no source"));
            };
            let Err(error) = self.read(source, range, &mut bytes).await else { continue };
            self.shared.tally.failed(error.kind);
            failures = if bytes.len() > before { 1 } else { failures + 1 };
            tracing::debug!(
                { names::LAYER } = %self.attached.layer.digest(), { names::CODE } = error.kind.code(), %error,
                "hydration goes on at byte {}", range.start + bytes.len() as u64,
            );
            if failures as usize >= options.attempts.max(1) as usize * sources.len() {
                return Err(error);
            }
            tokio::time::sleep(options.pause(failures, error.retry)).await;
        }
        Ok(bytes.freeze())
    }

    /// Appends what one request gives of the rest of `range`; ends early without an error when hydration is held back.
    async fn read(&self, source: &Arc<Source>, range: BlobRange, bytes: &mut BytesMut) -> Result<(), SourceError> {
        let Self { shared, attached, .. } = self;
        let urgency = Urgency::new(Priority::Hydrate, attached.layer.number());
        let _permit = shared.gate.acquire(&urgency).await?;
        let rest = BlobRange::new(range.start + bytes.len() as u64, range.end);
        let (digest, idle) = (attached.layer.digest(), shared.options.idle_timeout);
        shared.tally.request();
        let begun = Instant::now();
        let body = bounded(idle, "first byte of a blob", source.image.blob.read(&digest, rest)).await?;
        let mut body = Paced::new(body, idle);
        self.note(source);
        let mut patience = shared.options.starvation;
        let mut left = rest.len();
        let mut permission = self.permission.clone();
        loop {
            patience = shared.gate.yield_to_demand(patience).await;
            let piece = tokio::select! {
                biased;
                () = permission.withdrawn() => return Ok(()),
                piece = body.next() => piece?,
            };
            let Some(piece) = piece else { break };
            shared.tally.received(Priority::Hydrate, piece.len());
            let wrong = || SourceError::new(ErrorKind::Malformed, format!("body of blob {digest} is too long"));
            left = left.checked_sub(piece.len() as u64).ok_or_else(wrong)?;
            bytes.extend_from_slice(&piece);
        }
        if left == 0 {
            shared.part_size.took(rest.len(), begun.elapsed());
            return Ok(());
        }
        Err(SourceError::new(ErrorKind::Malformed, format!("body of blob {digest} is too short by {left} bytes")))
    }

    fn note(&self, source: &Arc<Source>) {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        if !used.iter().any(|other| Arc::ptr_eq(other, source)) {
            used.push(source.clone());
        }
    }
}
