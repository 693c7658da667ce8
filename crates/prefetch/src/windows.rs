//! Windows of decompressors: asked for a few at a time, verified, kept in a bounded cache.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use millstream_chunkstore::Layer;
use millstream_oci::Digest;
use millstream_source::{ErrorKind, SourceError, WindowSource};
use millstream_toc::format::SpanIx;

use crate::counters::Tally;

type Key = (Digest, SpanIx);

/// Verified windows, least recently used ones dropped first.
#[derive(Debug)]
pub(crate) struct Windows {
    cache: Mutex<Cache>,
    batch: u32,
}

#[derive(Debug, Default)]
struct Cache {
    limit: usize,
    size: usize,
    clock: u64,
    windows: HashMap<Key, (Bytes, u64)>,
    by_use: BTreeMap<u64, Key>,
}

impl Cache {
    fn get(&mut self, key: &Key) -> Option<Bytes> {
        let (window, used) = self.windows.get_mut(key)?;
        self.by_use.remove(used);
        self.clock += 1;
        *used = self.clock;
        self.by_use.insert(self.clock, *key);
        Some(window.clone())
    }

    fn insert(&mut self, key: Key, window: Bytes) {
        self.remove(&key);
        self.clock += 1;
        self.size += window.len();
        self.windows.insert(key, (window, self.clock));
        self.by_use.insert(self.clock, key);
        while self.size > self.limit {
            let Some((_, oldest)) = self.by_use.pop_first() else { break };
            self.remove(&oldest);
        }
    }

    fn remove(&mut self, key: &Key) {
        if let Some((window, used)) = self.windows.remove(key) {
            self.size -= window.len();
            self.by_use.remove(&used);
        }
    }
}

impl Windows {
    pub(crate) fn new(limit: usize, batch: u32) -> Self {
        Self { cache: Mutex::new(Cache { limit, ..Cache::default() }), batch: batch.max(1) }
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
        if let Some(window) = self.cache.lock().unwrap_or_else(PoisonError::into_inner).get(&(digest, ix)) {
            return Ok(window);
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
                self.cache.lock().unwrap_or_else(PoisonError::into_inner).insert((digest, span), window);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_forgets_what_was_not_used_and_never_grows_beyond_its_limit() {
        let mut cache = Cache { limit: 100, ..Cache::default() };
        let key = |ix| (Digest::of(b"layer"), ix);
        let window = || Bytes::from(vec![1; 40]);
        cache.insert(key(1), window());
        cache.insert(key(2), window());
        assert!(cache.get(&key(1)).is_some());
        cache.insert(key(3), window());
        assert!(cache.get(&key(2)).is_none());
        assert!(cache.get(&key(1)).is_some() && cache.get(&key(3)).is_some());
        cache.insert(key(3), window());
        assert_eq!((cache.size, cache.windows.len(), cache.by_use.len()), (80, 2, 2));
        cache.insert(key(4), Bytes::from(vec![1; 101]));
        assert_eq!((cache.size, cache.by_use.len()), (0, 0));
    }
}
