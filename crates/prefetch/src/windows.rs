//! Windows of decompressors: asked for a few at a time, verified, kept in a bounded cache.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use millstream_chunkstore::Layer;
use millstream_oci::Digest;
use millstream_source::{ErrorKind, SourceError, WindowSource};
use millstream_toc::format::SpanIx;

use crate::counters::Tally;
use crate::lru::Lru;

type Key = (Digest, SpanIx);

/// Verified windows, least recently used ones dropped first.
#[derive(Debug)]
pub(crate) struct Windows {
    cache: Mutex<Lru<Key, Bytes>>,
    batch: u32,
}

impl Windows {
    pub(crate) fn new(limit: usize, batch: u32) -> Self {
        Self { cache: Mutex::new(Lru::new(limit)), batch: batch.max(1) }
    }

    fn cache(&self) -> MutexGuard<'_, Lru<Key, Bytes>> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The window of span `ix`; empty when it needs none.
    pub(crate) async fn get(
        &self,
        layer: &Layer,
        ix: SpanIx,
        source: &dyn WindowSource,
        tally: &Tally,
    ) -> Result<Bytes, SourceError> {
        let toc = layer.toc();
        let span = toc.span(ix).map_err(|e| SourceError::new(ErrorKind::Local, e.to_string()))?;
        if span.window_len == 0 {
            return Ok(Bytes::new());
        }
        let digest = layer.digest();
        if let Some(window) = self.cache().get(&(digest, ix)) {
            return Ok(window.clone());
        }
        let spans = ix..ix.saturating_add(self.batch).min(toc.span_count());
        let windows = source.windows(&digest, spans.clone()).await?;
        tally.window(windows.iter().map(Bytes::len).sum());
        if windows.len() != spans.len() {
            let message = format!("asked for windows of {} spans of {digest}, got {}", spans.len(), windows.len());
            return Err(SourceError::new(ErrorKind::Malformed, message));
        }
        let mut wanted = None;
        for (span, window) in spans.zip(windows) {
            if !toc.verify_window(span, &window) {
                continue;
            }
            // The answer's buffer may be larger than the window; the cache counts only what it copies.
            let window = Bytes::copy_from_slice(&window);
            if span == ix {
                wanted = Some(window.clone());
            }
            if !window.is_empty() {
                let size = window.len();
                self.cache().insert((digest, span), window, size);
            }
        }
        wanted.ok_or_else(|| {
            SourceError::new(
                ErrorKind::DigestMismatch,
                format!("window of span {ix} of {digest} does not match its digest"),
            )
        })
    }
}
