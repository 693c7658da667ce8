//! Where verified chunks go.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use millstream_chunkstore::StoreError;
use millstream_source::{ErrorKind, SourceError};
use millstream_toc::DataRange;
use millstream_toc::format::{ChunkIx, FormatError};
use millstream_toc::read::Chunk;
use millstream_toc::span::Edge;

/// Takes chunks whose digests were compared with the TOC. Called on threads that may block.
pub(crate) trait ChunkSink: Send + Sync {
    /// Whether it has no use for a chunk unless it gets it now.
    fn wants(&self, chunk: ChunkIx) -> bool;

    /// Takes a chunk.
    ///
    /// # Errors
    /// [`ErrorKind::Local`] when it cannot be kept; the fetch then ends.
    fn put(&self, chunk: Chunk, bytes: &[u8]) -> Result<(), SourceError>;

    /// Is offered what could not be verified yet: one half of a chunk.
    ///
    /// # Errors
    /// As [`ChunkSink::put`].
    fn edge(&self, edge: Edge) -> Result<(), SourceError> {
        drop(edge);
        Ok(())
    }
}

/// Keeps the chunks of a range in memory, for a store that is full.
#[derive(Debug)]
pub(crate) struct MemorySink {
    range: DataRange,
    state: Mutex<(Vec<u8>, HashSet<ChunkIx>)>,
}

impl MemorySink {
    /// `bytes` is what is there already of `range`, and `missing` what is not.
    pub(crate) fn new(range: DataRange, bytes: Vec<u8>, missing: &[Chunk]) -> Self {
        let missing = missing.iter().map(|chunk| chunk.ix).collect();
        Self { range, state: Mutex::new((bytes, missing)) }
    }

    /// The bytes of the range.
    pub(crate) fn take(&self) -> Vec<u8> {
        std::mem::take(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner).0)
    }
}

impl ChunkSink for MemorySink {
    fn wants(&self, chunk: ChunkIx) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1.contains(&chunk)
    }

    fn put(&self, chunk: Chunk, bytes: &[u8]) -> Result<(), SourceError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (buffer, missing) = &mut *state;
        if let Some(part) = chunk.data.intersect(&self.range) {
            let to = within(part, self.range.start).and_then(|range| buffer.get_mut(range));
            let from = within(part, chunk.data.start).and_then(|range| bytes.get(range));
            let (Some(to), Some(from)) = (to, from) else {
                return Err(SourceError::new(ErrorKind::Local, format!("chunk {} does not fit its place", chunk.ix)));
            };
            to.copy_from_slice(from);
        }
        missing.remove(&chunk.ix);
        Ok(())
    }
}

/// `part` counted from `origin`.
fn within(part: DataRange, origin: u64) -> Option<std::ops::Range<usize>> {
    let start = usize::try_from(part.start.checked_sub(origin)?).ok()?;
    let end = usize::try_from(part.end.checked_sub(origin)?).ok()?;
    Some(start..end)
}

/// A failure of the store as the end of a fetch.
pub(crate) fn store_failed(error: StoreError) -> SourceError {
    SourceError::new(ErrorKind::Local, error.to_string())
}

/// A TOC that cannot be read as the end of a fetch.
pub(crate) fn toc_failed(error: FormatError) -> SourceError {
    SourceError::new(ErrorKind::Local, error.to_string())
}
