//! What was fetched, for metrics.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use millstream_source::{ErrorKind, Priority};

/// Totals since the start; `active` is a level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Compressed bytes received for readers.
    pub demand_bytes: u64,
    /// Compressed bytes received ahead of readers.
    pub prefetch_bytes: u64,
    /// Compressed bytes received by hydration.
    pub hydrate_bytes: u64,
    /// Bytes of windows received.
    pub window_bytes: u64,
    /// Compressed bytes of startup profiles received: pages ahead of readers.
    pub profile_bytes: u64,
    /// Bytes of plain content received.
    pub content_bytes: u64,
    /// Bytes of plain content taken over from other layers of the store.
    pub shared_bytes: u64,
    /// Requests for compressed bytes and for content.
    pub requests: u64,
    /// Requests that were sent once more for a reader because the answer was late.
    pub hedged: u64,
    /// Times a source gave bytes that do not match their digest.
    pub digest_mismatches: u64,
    /// Requests under way now.
    pub active: u64,
}

/// What waits now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Queues {
    /// Requests without a slot: demand, prefetch, hydration.
    pub requests: [usize; 3],
    /// Layers to be hydrated whose turn has not come.
    pub layers: usize,
    /// Startup profiles whose pages are on their way.
    pub replays: usize,
}

#[derive(Debug, Default)]
pub(crate) struct Tally {
    received: [AtomicU64; 3],
    windows: AtomicU64,
    profile: AtomicU64,
    content: AtomicU64,
    shared: AtomicU64,
    requests: AtomicU64,
    hedged: AtomicU64,
    mismatches: AtomicU64,
    failures: Mutex<BTreeMap<ErrorKind, u64>>,
}

impl Tally {
    pub(crate) fn received(&self, priority: Priority, bytes: usize) {
        self.received[crate::queue::class(priority)].fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn window(&self, bytes: usize) {
        self.windows.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn profile(&self, bytes: usize) {
        self.profile.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn content(&self, bytes: usize) {
        self.content.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn shared(&self, bytes: u64) {
        self.shared.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn hedge(&self) {
        self.hedged.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn mismatch(&self) {
        self.mismatches.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn failed(&self, kind: ErrorKind) {
        *self.failures.lock().unwrap_or_else(PoisonError::into_inner).entry(kind).or_default() += 1;
    }

    pub(crate) fn failures(&self) -> BTreeMap<ErrorKind, u64> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn snapshot(&self, active: usize) -> Counters {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let [demand, prefetch, hydrate] = &self.received;
        Counters {
            demand_bytes: load(demand),
            prefetch_bytes: load(prefetch),
            hydrate_bytes: load(hydrate),
            window_bytes: load(&self.windows),
            profile_bytes: load(&self.profile),
            content_bytes: load(&self.content),
            shared_bytes: load(&self.shared),
            requests: load(&self.requests),
            hedged: load(&self.hedged),
            digest_mismatches: load(&self.mismatches),
            active: active as u64,
        }
    }
}
