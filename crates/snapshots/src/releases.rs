//! Orders "no snapshot uses this layer any more" against decisions that are under way.
//!
//! A decision says "lazy" for a layer; before its snapshot is recorded, the last other snapshot of that layer is removed
//! and the layer is given back. Recording the snapshot now would point at nothing. Nobody waits for anybody here: who is
//! about to record asks whether the layer was given back since the decision began, and defers the layer then. The tests of
//! `millstream-node` run this file under a scheduler that tries orders out; `super::sync` is where its lock comes from.

use std::collections::VecDeque;

use millstream_oci::Digest;

use super::sync::{Mutex, MutexGuard, PoisonError};

/// Releases that are remembered. Older ones count as "perhaps your layer", which costs a deferral.
pub(crate) const REMEMBERED: usize = 1024;

/// A point in the order of releases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark(u64);

/// The latest releases, in order.
#[derive(Debug, Default)]
pub(crate) struct Releases(Mutex<Log>);

/// The log itself; holding its guard excludes releases and records of lazy snapshots.
#[derive(Debug, Default)]
pub(crate) struct Log {
    count: u64,
    recent: VecDeque<Digest>,
}

impl Releases {
    /// The point to compare with later. Taken before a decision begins. Blocks while a release or a record is written.
    pub(crate) fn mark(&self) -> Mark {
        Mark(self.lock().count)
    }

    /// Takes the snapshot of `layer` that is there already (`existing`), else makes one, unless the layer was given back since
    /// `mark`: then there is none.
    ///
    /// # Errors
    /// Those of the two.
    pub(crate) fn record<T, E>(
        &self,
        mark: Mark,
        layer: &Digest,
        existing: impl FnOnce() -> Result<Option<T>, E>,
        make: impl FnOnce() -> Result<T, E>,
    ) -> Result<Option<T>, E> {
        let log = self.lock();
        if let Some(found) = existing()? {
            return Ok(Some(found));
        }
        if log.released_since(mark, layer) { Ok(None) } else { make().map(Some) }
    }

    /// Gives `layer` back by `release`, unless a snapshot shows it, also one that was recorded just now.
    ///
    /// # Errors
    /// That of `shown`.
    pub(crate) fn release_unless<E>(
        &self,
        layer: &Digest,
        shown: impl FnOnce() -> Result<bool, E>,
        release: impl FnOnce(),
    ) -> Result<(), E> {
        let mut log = self.lock();
        if !shown()? {
            log.push(*layer);
            release();
        }
        Ok(())
    }

    /// Excludes releases and records of lazy snapshots while the guard lives.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Log> {
        // The log is only ever appended to, so it is whole even if a holder panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Log {
    /// Remembers a release.
    pub(crate) fn push(&mut self, layer: Digest) {
        self.count += 1;
        self.recent.push_back(layer);
        if self.recent.len() > REMEMBERED {
            self.recent.pop_front();
        }
    }

    /// Whether `layer` was released after `mark`, or perhaps was.
    pub(crate) fn released_since(&self, mark: Mark, layer: &Digest) -> bool {
        let Ok(since) = usize::try_from(self.count.saturating_sub(mark.0)) else { return true };
        since > self.recent.len() || self.recent.iter().rev().take(since).any(|released| released == layer)
    }
}
