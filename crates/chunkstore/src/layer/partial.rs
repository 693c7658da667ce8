//! Chunks of which some pages are here.
//!
//! They came ahead of a reader, each proven by itself. Known in memory only: after a restart such a chunk is missing, and so it is
//! for all who want the whole of it (hydration, other layers, the presence file). The bytes lie at their place in the data
//! file, which nobody touches while the chunk is not present: an eviction makes holes only where chunks are.

use std::collections::HashMap;
use std::os::unix::fs::FileExt;

use millstream_toc::DataRange;
use millstream_toc::format::{ChunkIx, DATA_ALIGN};
use millstream_toc::read::{Chunk, PageMask};

use super::super::sync::atomic::{AtomicUsize, Ordering};
use super::super::sync::{Mutex, PoisonError};
use super::{Layer, Step, StoreError};

/// Which pages are here of chunks that are not whole.
#[derive(Debug, Default)]
pub(super) struct Partial {
    pages: Mutex<HashMap<ChunkIx, PageMask>>,
    /// Entries, so that who reads what is whole takes no lock.
    count: AtomicUsize,
}

impl Partial {
    /// Takes those chunks out that can be read as far as `range` goes.
    pub(super) fn retain_unreadable(&self, chunks: &mut Vec<Chunk>, range: DataRange) {
        if chunks.is_empty() || self.count.load(Ordering::Acquire) == 0 {
            return;
        }
        let pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        chunks.retain(|chunk| {
            let wanted = chunk.pages(range);
            pages.get(&chunk.ix).is_none_or(|have| have & wanted != wanted)
        });
    }

    /// The chunk is whole now, or nothing of it counts any more.
    pub(super) fn forget(&self, chunk: ChunkIx) {
        if self.count.load(Ordering::Acquire) > 0 {
            let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
            pages.remove(&chunk);
            self.count.store(pages.len(), Ordering::Release);
        }
    }

    pub(super) fn clear(&self) {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        pages.clear();
        self.count.store(0, Ordering::Release);
    }

    /// Adds pages; whether the chunk is whole with them.
    fn add(&self, chunk: &Chunk, new: PageMask) -> bool {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let have = pages.entry(chunk.ix).or_default();
        *have |= new;
        let whole = *have == chunk.pages(chunk.data);
        self.count.store(pages.len(), Ordering::Release);
        whole
    }
}

impl Layer {
    /// Puts whole pages of a chunk in their place; the caller has proven them. Each is given with its offset in the chunk, a
    /// multiple of [`DATA_ALIGN`], and is as long as that or reaches the end of the chunk. With the last of them the chunk is
    /// present. Nothing happens when it is already, when the layer was removed, or while content is being given up.
    ///
    /// # Errors
    /// [`StoreError::NoSpace`] when the disk is full, [`StoreError::OutOfRange`] when it is no chunk of this layer or these are
    /// no pages of it, [`StoreError::Quarantined`].
    pub fn write_pages(&self, chunk: Chunk, pages: &[(u64, &[u8])]) -> Result<(), StoreError> {
        self.check_trusted()?;
        let fits = self.toc().chunk(chunk.ix)?.data == chunk.data
            && pages.iter().all(|(start, bytes)| is_pages(&chunk, *start, bytes.len() as u64));
        if !fits {
            return Err(StoreError::OutOfRange { range: chunk.data });
        }
        if self.is_removed() || self.has(chunk.ix) {
            return Ok(());
        }
        let content = self.content.read().unwrap_or_else(PoisonError::into_inner);
        if *content {
            return Ok(());
        }
        let needed: u64 = pages.iter().map(|(_, bytes)| (bytes.len() as u64).next_multiple_of(DATA_ALIGN)).sum();
        if needed > self.space.free() {
            return Err(StoreError::NoSpace { action: "store pages in", path: self.data_path.clone() });
        }
        let mut new = 0;
        for (start, bytes) in pages {
            let at = chunk.data.start + start;
            self.faults
                .before(Step::WriteData, &self.data_path)
                .and_then(|()| self.data.write_all_at(bytes, at))
                .map_err(|e| StoreError::io("write", &self.data_path, e))?;
            new |= chunk.pages(DataRange::with_len(at, bytes.len() as u64));
        }
        self.check_map()?;
        if self.partial.add(&chunk, new) {
            // Every page was proven by the chunk's own digest.
            self.put_with(chunk.ix..chunk.ix + 1, |_| Ok(()), false)?;
        }
        Ok(())
    }

    fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Acquire)
    }
}

fn is_pages(chunk: &Chunk, start: u64, len: u64) -> bool {
    let end = start.checked_add(len);
    len > 0
        && start.is_multiple_of(DATA_ALIGN)
        && end.is_some_and(|end| end == chunk.data.len() || (end < chunk.data.len() && end.is_multiple_of(DATA_ALIGN)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(len: u64) -> Chunk {
        Chunk { ix: 3, data: DataRange::with_len(8192, len) }
    }

    #[test]
    fn only_whole_pages_are_pages() {
        let short = chunk(5000);
        assert!(is_pages(&short, 4096, 904) && is_pages(&short, 0, 4096) && is_pages(&short, 0, 5000));
        assert!(!is_pages(&short, 4096, 903) && !is_pages(&short, 1, 4096) && !is_pages(&short, 0, 8192));
        assert!(!is_pages(&short, 0, 0));
    }
}
