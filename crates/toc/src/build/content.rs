//! Content of regular files: chunks, digests, and places in the data address space.

use std::io::Read;

use super::Budget;
use super::error::{BuildError, counted};
use super::stream::{Shared, TarStream, short_digest};
use crate::format::{CHUNK_SIZE, ChunkIx, ContentIx, ContentRecord, DATA_ALIGN, ExtentRecord, NONE, SHORT_DIGEST};
use crate::range::{DataRange, FileRange};
use crate::tar::{Member, TarReader};

const CHUNK: usize = 32 * 1024;
const _: () = assert!(CHUNK as u64 == CHUNK_SIZE);

/// The tables that grow with the content of the layer.
pub(super) struct Contents<'s> {
    shared: &'s Shared<'s>,
    budget: &'s Budget,
    pub(super) records: Vec<ContentRecord>,
    pub(super) chunks: Vec<[u8; SHORT_DIGEST]>,
    pub(super) extents: Vec<ExtentRecord>,
    /// End of the data address space so far; aligned.
    pub(super) data_size: u64,
    chunk: Box<[u8]>,
    /// Digest of a whole chunk of zeros, known in advance: holes can be long.
    zeros: [u8; SHORT_DIGEST],
}

impl<'s> Contents<'s> {
    pub(super) fn new(budget: &'s Budget, shared: &'s Shared<'s>) -> Self {
        Self {
            shared,
            budget,
            records: Vec::new(),
            chunks: Vec::new(),
            extents: Vec::new(),
            data_size: 0,
            chunk: vec![0; CHUNK].into_boxed_slice(),
            zeros: short_digest(&[0; CHUNK]),
        }
    }

    /// Takes the content of `member`, which the reader has just given. `None` for an empty file.
    pub(super) fn add<R: Read>(
        &mut self,
        tar: &mut TarReader<TarStream<'_, R>>,
        member: &Member,
    ) -> Result<Option<ContentIx>, BuildError> {
        if member.size == 0 {
            return Ok(None);
        }
        let budget = self.budget;
        if member.size > budget.max_file_size {
            return Err(BuildError::over(counted::FILE_BYTES, budget.max_file_size));
        }
        let count = member.size.div_ceil(CHUNK_SIZE);
        let digests = (self.chunks.len() as u64 + count) * SHORT_DIGEST as u64;
        if digests > budget.max_toc_bytes {
            return Err(BuildError::over(counted::TOC_BYTES, budget.max_toc_bytes));
        }
        let many = || BuildError::over("chunks", u32::MAX.into());
        let ix = ContentIx::try_from(self.records.len()).map_err(|_| many())?;
        let first_chunk = u32::try_from(self.chunks.len()).map_err(|_| many())?;
        let first_extent = self.add_extents(member)?;
        let data_off = self.data_size;
        self.records.push(ContentRecord {
            size: member.size.into(),
            data_off: data_off.into(),
            tar_off: member.data_off.into(),
            first_chunk: first_chunk.into(),
            first_extent: first_extent.into(),
            extents: if first_extent == NONE {
                0
            } else {
                u32::try_from(self.extents.len()).map_err(|_| many())? - first_extent
            }
            .into(),
        });
        self.data_size = data_off
            .checked_add(member.size)
            .and_then(|end| end.checked_next_multiple_of(DATA_ALIGN))
            .ok_or_else(|| BuildError::over("bytes of content", u64::MAX))?;
        let mut extent = first_extent as usize;
        for place in 0..count {
            let start = place * CHUNK_SIZE;
            let range = FileRange::new(start, (start + CHUNK_SIZE).min(member.size));
            let ix = ChunkIx::try_from(self.chunks.len()).map_err(|_| many())?;
            let stored = if first_extent == NONE {
                self.read_part(tar, 0..chunk_len(&range))?;
                true
            } else {
                self.read_sparse(tar, &range, &mut extent)?
            };
            let bytes = &self.chunk[..chunk_len(&range)];
            let digest = if !stored && bytes.len() == CHUNK { self.zeros } else { short_digest(bytes) };
            self.chunks.push(digest);
            if stored {
                let data = DataRange::new(data_off + range.start, data_off + range.end);
                self.shared.sink.borrow_mut().chunk(ix, data, &digest, bytes).map_err(BuildError::Sink)?;
            }
        }
        Ok(Some(ix))
    }

    /// Notes the extents of a sparse member; gives the first, or [`NONE`] when it is not sparse.
    fn add_extents(&mut self, member: &Member) -> Result<u32, BuildError> {
        let Some(extents) = &member.extents else { return Ok(NONE) };
        let first = self.extents.len();
        self.extents.extend(extents.iter().map(|extent| ExtentRecord {
            file_off: extent.file_off.into(),
            tar_off: extent.tar_off.into(),
            len: extent.len.into(),
        }));
        if (self.extents.len() * size_of::<ExtentRecord>()) as u64 > self.budget.max_toc_bytes {
            return Err(BuildError::over(counted::TOC_BYTES, self.budget.max_toc_bytes));
        }
        u32::try_from(first).map_err(|_| BuildError::over("extents", u32::MAX.into()))
    }

    /// Fills the chunk buffer with a part of a sparse file; says whether any of it is stored. `extent` is where to begin.
    fn read_sparse<R: Read>(
        &mut self,
        tar: &mut TarReader<TarStream<'_, R>>,
        range: &FileRange,
        extent: &mut usize,
    ) -> Result<bool, BuildError> {
        self.chunk.fill(0);
        let mut stored = false;
        while let Some(record) = self.extents.get(*extent) {
            let here = FileRange::with_len(record.file_off.get(), record.len.get());
            if let Some(part) = here.intersect(range) {
                let offset = |at: u64| usize::try_from(at - range.start).unwrap_or(CHUNK);
                self.read_part(tar, offset(part.start)..offset(part.end))?;
                stored = true;
            }
            if here.end > range.end {
                break;
            }
            *extent += 1;
        }
        Ok(stored)
    }

    fn read_part<R: Read>(
        &mut self,
        tar: &mut TarReader<TarStream<'_, R>>,
        part: std::ops::Range<usize>,
    ) -> Result<(), BuildError> {
        let mut buffer = &mut self.chunk[part];
        while !buffer.is_empty() {
            let read = self.shared.in_content(|| tar.read(buffer)).map_err(|error| self.shared.blame(error))?;
            if read == 0 {
                return Err(BuildError::invalid("a file is shorter than its header says"));
            }
            buffer = &mut buffer[read..];
        }
        Ok(())
    }
}

/// Length of a chunk, which is never more than [`CHUNK`].
fn chunk_len(range: &FileRange) -> usize {
    usize::try_from(range.len()).unwrap_or(CHUNK)
}
