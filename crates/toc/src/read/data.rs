//! From the data address space to chunks and spans.

use super::{Inode, Table, Toc, damaged, indices};
use crate::build::Compression;
use crate::format::{
    CHUNK_SIZE, ChunkIx, ContentIx, ContentRecord, DATA_ALIGN, ExtentRecord, FormatError, MAX_SPAN, NONE, SHORT_DIGEST,
    START_DEFLATE, START_FRAME, START_MEMBER, START_PLAIN, SpanIx, SpanRecord,
};
use crate::range::{BlobRange, DataRange, TarRange};

/// Largest window of deflate, in bytes.
pub(super) const MAX_WINDOW: u32 = 32 * 1024;

/// A chunk and its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Chunk {
    /// Which chunk.
    pub ix: ChunkIx,
    /// Its bytes in the data address space: 1 to [`CHUNK_SIZE`].
    pub data: DataRange,
}

/// Pages ([`DATA_ALIGN`] bytes) of a chunk, the lowest bit for the first one.
pub type PageMask = u8;

/// Every page of the largest chunk has its bit.
const _: () = assert!(CHUNK_SIZE / DATA_ALIGN <= PageMask::BITS as u64);

impl Chunk {
    /// Its pages that hold bytes of `range`.
    #[must_use]
    pub fn pages(&self, range: DataRange) -> PageMask {
        let Some(part) = self.data.intersect(&range).filter(|part| !part.is_empty()) else { return 0 };
        let below = |page: u64| if page >= u64::from(PageMask::BITS) { PageMask::MAX } else { (1 << page) - 1 };
        let first = (part.start - self.data.start) / DATA_ALIGN;
        below((part.end - self.data.start).div_ceil(DATA_ALIGN)) & !below(first)
    }
}

/// How decompression starts at a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SpanStart {
    /// In the middle of a deflate stream.
    Deflate,
    /// With the header of a gzip member.
    Member,
    /// The bytes are not compressed.
    Plain,
    /// With a zstd frame.
    Frame,
}

/// A range of the blob that can be decompressed alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Which span.
    pub ix: SpanIx,
    /// Every compressed byte that is needed; the first and the last one may be shared with the neighbours.
    pub blob: BlobRange,
    /// The output.
    pub tar: TarRange,
    /// Upper bits (0 to 7) of the first byte that belong to this span; 0 means all of it.
    pub bits: u8,
    /// How to start.
    pub start: SpanStart,
    /// Bytes of the window, at most 32768; 0 when none is needed.
    pub window_len: u32,
    /// BLAKE3 of the raw window, truncated; zero when there is none.
    pub window_digest: [u8; SHORT_DIGEST],
}

impl Span {
    /// Whether nobody enters it, because that would give too much output for a small read.
    #[must_use]
    pub const fn is_closed(&self) -> bool {
        self.tar.end - self.tar.start > MAX_SPAN
    }
}

impl Toc {
    /// The record of content `ix`, its references checked.
    ///
    /// # Errors
    ///
    /// When there is no such content, or its record is damaged.
    pub fn content(&self, ix: ContentIx) -> Result<ContentRecord, FormatError> {
        let record = *self.contents()?.get(ix as usize).ok_or(damaged("content out of range"))?;
        let (size, data_off) = (record.size.get(), record.data_off.get());
        let end = data_off.checked_add(size);
        if size == 0 || !data_off.is_multiple_of(DATA_ALIGN) || end.is_none_or(|end| end > self.data_size()) {
            return Err(damaged("content outside of the data"));
        }
        let chunks = u64::from(record.first_chunk.get()) + size.div_ceil(CHUNK_SIZE);
        if chunks > self.chunk_count().into() {
            return Err(damaged("content without chunks"));
        }
        if record.first_extent.get() == NONE {
            let end = record.tar_off.get().checked_add(size);
            if record.extents.get() != 0 || end.is_none_or(|end| end > self.tar_size()) {
                return Err(damaged("content outside of the tar"));
            }
        }
        Ok(record)
    }

    /// The stored parts of `content`, ascending; `None` when it is not sparse and stored as one piece.
    ///
    /// # Errors
    ///
    /// When the extents are out of range.
    pub fn extents(&self, content: &ContentRecord) -> Result<Option<&[ExtentRecord]>, FormatError> {
        if content.first_extent.get() == NONE {
            return Ok(None);
        }
        let all = self.table::<ExtentRecord>(Table::Extents)?;
        let range = indices(content.first_extent.get(), content.extents.get());
        Ok(Some(all.get(range).ok_or(damaged("extents out of range"))?))
    }

    /// Where the whole content of `inode` lies; empty (at 0) when it has none.
    ///
    /// # Errors
    ///
    /// When the content's record is damaged.
    pub fn file_data(&self, inode: &Inode<'_>) -> Result<DataRange, FormatError> {
        inode.content().map_or(Ok(DataRange::default()), |ix| Ok(data_range(&self.content(ix)?)))
    }

    /// First content of which a byte is stored at or after `tar_off` of the tar (or that would be there, were it not all
    /// hole); [`Toc::content_count`] when there is none.
    ///
    /// # Errors
    ///
    /// When the record before it is damaged.
    pub fn content_from(&self, tar_off: u64) -> Result<ContentIx, FormatError> {
        let after = to_ix(self.contents()?.partition_point(|record| record.tar_off.get() <= tar_off));
        let Some(before) = after.checked_sub(1) else { return Ok(after) };
        let record = self.content(before)?;
        let end = match self.extents(&record)? {
            None => record.tar_off.get().saturating_add(record.size.get()),
            Some(extents) => extents.last().map_or(0, |last| tar_range(last).end),
        };
        Ok(if end > tar_off { before } else { after })
    }

    /// Digest of chunk `ix`: BLAKE3 of its bytes, truncated.
    ///
    /// # Errors
    ///
    /// When there is no such chunk, or its digest is gone.
    pub fn chunk_digest(&self, ix: ChunkIx) -> Result<[u8; SHORT_DIGEST], FormatError> {
        let digest =
            *self.table::<[u8; SHORT_DIGEST]>(Table::Chunks)?.get(ix as usize).ok_or(damaged("chunk out of range"))?;
        // A zeroed page must not look like content that does not match.
        if digest == [0; SHORT_DIGEST] { Err(damaged("digest of a chunk is zero")) } else { Ok(digest) }
    }

    /// Whether `bytes` are those of chunk `ix`.
    ///
    /// # Errors
    ///
    /// When there is no such chunk, or its digest is gone.
    pub fn verify_chunk(&self, ix: ChunkIx, bytes: &[u8]) -> Result<bool, FormatError> {
        Ok(blake3::hash(bytes).as_bytes()[..SHORT_DIGEST] == self.chunk_digest(ix)?)
    }

    /// Digests of all chunks of `content`, in order. With the size they say exactly which bytes it has.
    ///
    /// # Errors
    ///
    /// When the digests are out of range, or one is gone.
    pub fn chunk_digests(&self, content: &ContentRecord) -> Result<&[[u8; SHORT_DIGEST]], FormatError> {
        let count =
            u32::try_from(content.size.get().div_ceil(CHUNK_SIZE)).map_err(|_| damaged("chunk out of range"))?;
        let all = self.table::<[u8; SHORT_DIGEST]>(Table::Chunks)?;
        let digests = all.get(indices(content.first_chunk.get(), count)).ok_or(damaged("chunk out of range"))?;
        if digests.contains(&[0; SHORT_DIGEST]) { Err(damaged("digest of a chunk is zero")) } else { Ok(digests) }
    }

    /// The content that chunk `ix` is part of.
    ///
    /// # Errors
    ///
    /// When there is no such chunk, or a record is damaged.
    pub fn content_of_chunk(&self, ix: ChunkIx) -> Result<ContentIx, FormatError> {
        let after = self.contents()?.partition_point(|record| record.first_chunk.get() <= ix);
        let content = to_ix(after).checked_sub(1).ok_or(damaged("chunk of no content"))?;
        let record = self.content(content)?;
        let place = ix.checked_sub(record.first_chunk.get()).ok_or(damaged("chunk of no content"))?;
        if u64::from(place) >= record.size.get().div_ceil(CHUNK_SIZE) {
            return Err(damaged("chunk of no content"));
        }
        Ok(content)
    }

    /// Chunk `ix` and its place.
    ///
    /// # Errors
    ///
    /// When there is no such chunk, or a record is damaged.
    pub fn chunk(&self, ix: ChunkIx) -> Result<Chunk, FormatError> {
        let record = self.content(self.content_of_chunk(ix)?)?;
        let place = ix.checked_sub(record.first_chunk.get()).ok_or(damaged("chunk of no content"))?;
        Ok(nth_chunk(&record, place.into()))
    }

    /// Whether no byte of chunk `ix` is stored in the tar, so that it is zeros without asking anybody.
    ///
    /// # Errors
    ///
    /// When there is no such chunk, or a record is damaged.
    pub fn is_hole(&self, ix: ChunkIx) -> Result<bool, FormatError> {
        let mut hole = true;
        self.each_stored(self.chunk(ix)?.data, |_, _| {
            hole = false;
            Ok(())
        })?;
        Ok(hole)
    }

    /// The chunks that overlap `range`, ascending; alignment gaps have none.
    ///
    /// # Errors
    ///
    /// When a record is damaged.
    pub fn chunks_in(&self, range: DataRange) -> Result<Vec<Chunk>, FormatError> {
        let mut chunks = Vec::new();
        self.each_content(range, |record| {
            let whole = data_range(record);
            let Some(part) = whole.intersect(&range) else { return Ok(()) };
            let first = (part.start - whole.start) / CHUNK_SIZE;
            let end = (part.end - whole.start).div_ceil(CHUNK_SIZE);
            chunks.extend((first..end).map(|place| nth_chunk(record, place)));
            // Each chunk once in an intact TOC; in a damaged one the claims of the contents may add up to more.
            if chunks.len() > self.chunk_count() as usize { Err(damaged("contents overlap")) } else { Ok(()) }
        })?;
        Ok(chunks)
    }

    /// The spans whose output holds a byte of `range`, ascending. Holes of sparse files and alignment gaps need none.
    ///
    /// # Errors
    ///
    /// When a record is damaged.
    pub fn spans_for(&self, range: DataRange) -> Result<Vec<SpanIx>, FormatError> {
        let spans = self.spans()?;
        let mut found: Vec<SpanIx> = Vec::new();
        self.each_stored(range, |_, tar| {
            // The span that holds the first byte starts at or before it; the first that starts at or after the end is too far.
            let first = spans.partition_point(|span| span.tar_off.get() <= tar.start).saturating_sub(1);
            let end = spans.partition_point(|span| span.tar_off.get() < tar.end);
            let next = found.last().map_or(0, |last| last + 1);
            found.extend(to_ix(first).max(next)..to_ix(end));
            Ok(())
        })?;
        Ok(found)
    }

    /// Span `ix` with all that is needed to decompress it.
    ///
    /// # Errors
    ///
    /// When there is no such span, or its record or the next one is damaged.
    pub fn span(&self, ix: SpanIx) -> Result<Span, FormatError> {
        let spans = self.spans()?;
        let record = *spans.get(ix as usize).ok_or(damaged("span out of range"))?;
        let next = ix.checked_add(1).and_then(|next| spans.get(next as usize)).copied();
        let (blob_end, tar_end) = next.map_or((self.blob_size(), self.tar_size()), |next| {
            (next.blob_off.get().saturating_add(u64::from(next.bits != 0)), next.tar_off.get())
        });
        let start = match (record.start, self.compression()?) {
            (START_DEFLATE, Compression::Gzip) if ix > 0 => SpanStart::Deflate,
            (START_MEMBER, Compression::Gzip) => SpanStart::Member,
            (START_PLAIN, Compression::Plain) => SpanStart::Plain,
            (START_FRAME, Compression::Zstd) => SpanStart::Frame,
            _ => return Err(damaged("span starts in an impossible way")),
        };
        let (blob, tar) = (record.blob_off.get(), record.tar_off.get());
        let places = blob < blob_end && blob_end <= self.blob_size() && tar < tar_end && tar_end <= self.tar_size();
        let window = record.window_len.get();
        // A window can be longer than the output before it only by mistake.
        if !places || record.bits > 7 || window > MAX_WINDOW || u64::from(window) > tar {
            return Err(damaged("span out of order"));
        }
        if start != SpanStart::Deflate && (window != 0 || record.bits != 0) {
            return Err(damaged("span has a window it does not need"));
        }
        Ok(Span {
            ix,
            blob: BlobRange::new(blob, blob_end),
            tar: TarRange::new(tar, tar_end),
            bits: record.bits,
            start,
            window_len: window,
            window_digest: record.window_digest,
        })
    }

    /// Whether a byte of `range` is stored in a closed span, so that it does not come out of spans.
    ///
    /// # Errors
    ///
    /// When a record is damaged.
    pub fn is_closed(&self, range: DataRange) -> Result<bool, FormatError> {
        for ix in self.spans_for(range)? {
            if self.span(ix)?.is_closed() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether any span is closed. Looks at all of them.
    ///
    /// # Errors
    ///
    /// When a record is damaged.
    pub fn has_closed_spans(&self) -> Result<bool, FormatError> {
        for ix in 0..self.span_count() {
            if self.span(ix)?.is_closed() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether `window` is the raw window of span `ix`: the empty one where it needs none.
    #[must_use]
    pub fn verify_window(&self, ix: SpanIx, window: &[u8]) -> bool {
        let Ok(span) = self.span(ix) else { return false };
        if window.len() != span.window_len as usize {
            return false;
        }
        window.is_empty() || blake3::hash(window).as_bytes()[..SHORT_DIGEST] == span.window_digest
    }

    pub(super) fn contents(&self) -> Result<&[ContentRecord], FormatError> {
        self.table(Table::Contents)
    }

    pub(super) fn spans(&self) -> Result<&[SpanRecord], FormatError> {
        self.table(Table::Spans)
    }

    /// Calls `each` for every content that overlaps `range`, ascending.
    fn each_content(
        &self,
        range: DataRange,
        mut each: impl FnMut(&ContentRecord) -> Result<(), FormatError>,
    ) -> Result<(), FormatError> {
        if range.is_empty() {
            return Ok(());
        }
        let contents = self.contents()?;
        let first = contents.partition_point(|record| record.data_off.get() <= range.start).saturating_sub(1);
        for ix in first..contents.len() {
            let record = self.content(to_ix(ix))?;
            if record.data_off.get() >= range.end {
                break;
            }
            each(&record)?;
        }
        Ok(())
    }

    /// Calls `each` for every stored piece of `range`, ascending: where it lies in the data address space and in the tar.
    pub(crate) fn each_stored(
        &self,
        range: DataRange,
        mut each: impl FnMut(DataRange, TarRange) -> Result<(), FormatError>,
    ) -> Result<(), FormatError> {
        self.each_content(range, |record| {
            let whole = data_range(record);
            let mut piece = |data: DataRange, tar_off: u64| match data.intersect(&range) {
                None => Ok(()),
                Some(part) => {
                    let tar = TarRange::with_len(tar_off.saturating_add(part.start - data.start), part.len());
                    each(part, tar)
                }
            };
            let Some(extents) = self.extents(record)? else { return piece(whole, record.tar_off.get()) };
            let data_of = |extent: &ExtentRecord| {
                DataRange::with_len(whole.start.saturating_add(extent.file_off.get()), extent.len.get())
            };
            let first = extents.partition_point(|extent| data_of(extent).end <= range.start);
            for extent in &extents[first..] {
                let extent = *extent;
                let data = data_of(&extent);
                if data.start >= range.end {
                    break;
                }
                if data.is_empty() || !whole.contains(&data) || tar_range(&extent).end > self.tar_size() {
                    return Err(damaged("extent out of range"));
                }
                piece(data, extent.tar_off.get())?;
            }
            Ok(())
        })
    }
}

/// Where a content lies. The record was checked by [`Toc::content`].
const fn data_range(record: &ContentRecord) -> DataRange {
    DataRange::with_len(record.data_off.get(), record.size.get())
}

/// Where an extent is stored.
pub(super) const fn tar_range(extent: &ExtentRecord) -> TarRange {
    TarRange::with_len(extent.tar_off.get(), extent.len.get())
}

/// Chunk number `place` of a content, which must have it.
fn nth_chunk(record: &ContentRecord, place: u64) -> Chunk {
    let whole = data_range(record);
    let start = whole.start.saturating_add(place.saturating_mul(CHUNK_SIZE));
    let end = start.saturating_add(CHUNK_SIZE).min(whole.end);
    let ix = u64::from(record.first_chunk.get()) + place;
    Chunk { ix: u32::try_from(ix).unwrap_or(NONE), data: DataRange::new(start, end) }
}

/// A position in a table, none of which has more than `u32::MAX` records.
fn to_ix(position: usize) -> u32 {
    u32::try_from(position).unwrap_or(u32::MAX)
}
