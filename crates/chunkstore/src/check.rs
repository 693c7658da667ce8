//! What lies on the disk, compared with what should lie there. Nothing is repaired here.

use millstream_toc::Toc;
use millstream_toc::format::{ChunkIx, ContentIx};
use rustix::fs::Advice;

use crate::{Layer, LayerState, StoreError};

/// Bytes after whose check the kernel is told that it need not keep them.
const FORGET: u64 = 8 << 20;

/// Chunks of one content whose bytes are wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrongContent {
    /// The content.
    pub content: ContentIx,
    /// Its wrong chunks, ascending.
    pub chunks: Vec<ChunkIx>,
}

impl Layer {
    /// Whether the file of the TOC is still the one that was admitted.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn check_toc(&self) -> Result<bool, StoreError> {
        let path = self.dir().join("toc");
        let bytes = std::fs::read(&path).map_err(|e| StoreError::io("read", &path, e))?;
        Ok(Toc::open(bytes).is_ok_and(|toc| toc.digest() == self.toc_digest() && toc.blob_digest() == self.digest()))
    }

    /// Reads every chunk that is present and compares it with its digest; `progress` is told of bytes as they are done, and
    /// ends the check by returning false. What is wrong comes by content. Reads past the page cache as far as the kernel lets
    /// it, and needs the memory of one chunk.
    ///
    /// # Errors
    /// When the TOC is damaged. Chunks that the disk does not give count as wrong.
    pub fn check_chunks(&self, mut progress: impl FnMut(u64) -> bool) -> Result<Vec<WrongContent>, StoreError> {
        let toc = self.toc();
        // Pages that are kept would be compared in place of what lies on the disk.
        self.forget_pages(0, 0);
        let (mut wrong, mut bytes, mut forgotten) = (Vec::<WrongContent>::new(), Vec::new(), 0);
        for content in 0..toc.content_count() {
            let record = toc.content(content)?;
            let sparse = toc.extents(&record)?.is_some();
            let first = record.first_chunk.get();
            let chunks = u32::try_from(toc.chunk_digests(&record)?.len()).unwrap_or(u32::MAX);
            for ix in first..first.saturating_add(chunks) {
                if !self.has(ix) || (sparse && toc.is_hole(ix)?) {
                    continue;
                }
                let range = toc.chunk(ix)?.data;
                bytes.resize(usize::try_from(range.len()).unwrap_or_default(), 0);
                let read = self.read(range, &mut bytes);
                if matches!(read, Err(StoreError::Quarantined { .. })) {
                    read?;
                    continue;
                }
                // Looked at again: it may have been taken back meanwhile.
                if (read.is_err() || !toc.verify_chunk(ix, &bytes)?) && self.has(ix) {
                    match wrong.last_mut().filter(|last| last.content == content) {
                        Some(last) => last.chunks.push(ix),
                        None => wrong.push(WrongContent { content, chunks: vec![ix] }),
                    }
                }
                if range.end > forgotten + FORGET {
                    self.forget_pages(forgotten, range.end - forgotten);
                    forgotten = range.end;
                }
                if !progress(range.len()) {
                    return Ok(wrong);
                }
            }
        }
        self.forget_pages(forgotten, 0);
        Ok(wrong)
    }

    /// Lets the kernel drop clean pages of the data file; `len` 0 is to its end. Advice only.
    fn forget_pages(&self, offset: u64, len: u64) {
        let _ = rustix::fs::fadvise(self.data_file(), offset, std::num::NonZeroU64::new(len), Advice::DontNeed);
    }

    /// Whether the record of present chunks is whole on the disk; if not, it is written anew. A verified layer needs none.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn check_presence(&self) -> Result<bool, StoreError> {
        if self.state() != LayerState::Lazy {
            return Ok(true);
        }
        self.persist_if_damaged()
    }
}
