//! From the compressed bytes of spans to verified chunks.

use millstream_inflate::{InflateError, Inflater, Stop};

use crate::format::{CHUNK_SIZE, ContentIx, ContentRecord, ExtentRecord, FormatError, NONE, SHORT_DIGEST, SpanIx};
use crate::frames::{FrameError, Frames};
use crate::range::{DataRange, FileRange};
use crate::read::{Chunk, SpanStart, Toc};

/// Output decompressed at once.
const OUTPUT: usize = 64 * 1024;
/// Bytes after the deflate stream of a gzip member: checksum and length.
const GZIP_TRAILER: u64 = 8;

/// Why compressed bytes gave no chunks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpanError {
    /// The TOC is damaged.
    #[error(transparent)]
    Toc(#[from] FormatError),
    /// The window has another length than the TOC says.
    #[error("window of span {span} has {found} bytes instead of {expected}")]
    Window {
        /// The span.
        span: SpanIx,
        /// Length according to the TOC.
        expected: u32,
        /// Length that was given.
        found: usize,
    },
    /// The span is closed.
    #[error("span {span} is too long to be entered")]
    Closed {
        /// The span.
        span: SpanIx,
    },
    /// The bytes cannot be decompressed: they are not those of the blob, or the window is not that of the span.
    #[error("cannot decompress at byte {tar_off} of the tar")]
    Inflate {
        /// Output reached.
        tar_off: u64,
        /// What the decompressor says.
        #[source]
        error: InflateError,
    },
    /// The bytes are not zstd frames of the blob.
    #[error("cannot decompress at byte {tar_off} of the tar")]
    Frame {
        /// Output reached.
        tar_off: u64,
        /// What is wrong with them.
        #[source]
        error: FrameError,
    },
    /// There is more output than the TOC says.
    #[error("more than {tar_size} bytes of tar")]
    TooLong {
        /// Bytes of the tar according to the TOC.
        tar_size: u64,
    },
    /// The bytes of a chunk do not have its digest.
    #[error("chunk {} does not have its digest", .chunk.ix)]
    Digest {
        /// The chunk.
        chunk: Chunk,
    },
    /// The extractor has failed before.
    #[error("extractor was used after an error")]
    Failed,
}

/// A part of a chunk that lies across the border of two spans. Nothing of it is verified: only whole chunks have digests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edge {
    /// The chunk.
    pub chunk: Chunk,
    /// Where in the chunk `bytes` begin, in bytes: 0 for its head; else they are its tail and go up to its end.
    pub offset: usize,
    /// At least one byte, but not all of the chunk.
    pub bytes: Vec<u8>,
}

/// Where the decompressor stands in the blob.
enum State {
    Plain,
    /// Before the first byte of a span; some of its bits belong to it.
    Resume {
        bits: u8,
        window: Vec<u8>,
    },
    /// In a deflate stream; if it was entered in the middle, its trailer is ours to skip.
    Deflate {
        inflater: Inflater,
        resumed: bool,
    },
    /// In the trailer of a member, or right after it.
    Trailer {
        inflater: Inflater,
        left: u64,
    },
    Frames(Box<Frames>),
    Failed,
}

/// Turns the compressed bytes of consecutive spans into chunks, each verified before it is given out. Holds one chunk, 64
/// KiB of output and the decompressor, however much passes through: 45 KiB for gzip; for zstd the history that a frame asks
/// for, touched as far as there is output.
pub struct SpanExtractor<'t> {
    toc: &'t Toc,
    state: State,
    output: Box<[u8]>,
    chunks: Assembler<'t>,
}

impl std::fmt::Debug for SpanExtractor<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SpanExtractor").field("position", &self.position()).finish_non_exhaustive()
    }
}

impl<'t> SpanExtractor<'t> {
    /// Starts at span `first`. `window` is its window (empty where it needs none), already verified with
    /// [`Toc::verify_window`].
    ///
    /// # Errors
    /// [`SpanError::Window`] for a wrong length, [`SpanError::Closed`], [`SpanError::Toc`] when there is no such span.
    pub fn new(toc: &'t Toc, first: SpanIx, window: &[u8]) -> Result<Self, SpanError> {
        let span = toc.span(first)?;
        if window.len() != span.window_len as usize {
            return Err(SpanError::Window { span: first, expected: span.window_len, found: window.len() });
        }
        if span.is_closed() {
            return Err(SpanError::Closed { span: first });
        }
        let inflate = |error| SpanError::Inflate { tar_off: span.tar.start, error };
        let state = match span.start {
            SpanStart::Plain => State::Plain,
            SpanStart::Member => State::Deflate { inflater: Inflater::gzip().map_err(inflate)?, resumed: false },
            SpanStart::Frame => State::Frames(Box::new(
                Frames::new().map_err(|error| SpanError::Frame { tar_off: span.tar.start, error })?,
            )),
            SpanStart::Deflate => State::Resume { bits: span.bits, window: window.to_vec() },
        };
        Ok(Self {
            toc,
            state,
            output: vec![0; OUTPUT].into_boxed_slice(),
            chunks: Assembler::new(toc, span.tar.start)?,
        })
    }

    /// Takes the next compressed bytes, the first ones from `span.blob.start` on. Calls `each` for every chunk that
    /// becomes complete, ascending. Chunks that began before the first span are left out ([`SpanExtractor::take_front`]
    /// has the rest of the one), and so are those that lie in holes altogether. Where the last span ends makes no difference: bytes may be given up to the end of the blob.
    ///
    /// # Errors
    /// [`SpanError`]; chunks given out before are good, further calls fail.
    pub fn push(&mut self, compressed: &[u8], each: &mut dyn FnMut(Chunk, &[u8])) -> Result<(), SpanError> {
        let mut rest = compressed;
        loop {
            let state = std::mem::replace(&mut self.state, State::Failed);
            match self.advance(state, &mut rest, each)? {
                Advance::More(state) => self.state = state,
                Advance::NeedsInput(state) => {
                    self.state = state;
                    return Ok(());
                }
            }
        }
    }

    /// The tail of the chunk that began before the first span, once, as soon as it is complete. There is none when the first
    /// span begins with a chunk or between two, when not even the end of the chunk has come, and for sparse files.
    pub fn take_front(&mut self) -> Option<Edge> {
        self.chunks.front.take()
    }

    /// The head of the chunk that is not complete yet; `None` for one that also began before the first span, for sparse
    /// files, and after an error.
    ///
    /// # Errors
    /// [`SpanError::Toc`].
    pub fn back(&self) -> Result<Option<Edge>, SpanError> {
        if matches!(self.state, State::Failed) { Ok(None) } else { Ok(self.chunks.back()?) }
    }

    /// How far the output has come in the tar.
    #[must_use]
    pub const fn position(&self) -> u64 {
        self.chunks.position
    }

    fn advance(
        &mut self,
        state: State,
        rest: &mut &[u8],
        each: &mut dyn FnMut(Chunk, &[u8]),
    ) -> Result<Advance, SpanError> {
        match state {
            State::Failed => Err(SpanError::Failed),
            State::Plain => {
                self.chunks.push(std::mem::take(rest), each)?;
                Ok(Advance::NeedsInput(State::Plain))
            }
            State::Frames(mut frames) => {
                let stepped = frames.step(rest, &mut self.output);
                let progress = stepped.map_err(|error| SpanError::Frame { tar_off: self.position(), error })?;
                *rest = &rest[progress.consumed..];
                self.chunks.push(&self.output[..progress.produced], each)?;
                let idle = progress.consumed == 0 && progress.produced == 0;
                let state = State::Frames(frames);
                Ok(if idle { Advance::NeedsInput(state) } else { Advance::More(state) })
            }
            State::Resume { bits, window } => {
                let first = match (bits, rest.split_first()) {
                    (0, _) => 0,
                    (_, None) => return Ok(Advance::NeedsInput(State::Resume { bits, window })),
                    (_, Some((first, after))) => {
                        *rest = after;
                        *first
                    }
                };
                let inflater = Inflater::resume(bits, first, &window).map_err(|error| self.inflate_error(error))?;
                Ok(Advance::More(State::Deflate { inflater, resumed: true }))
            }
            State::Deflate { mut inflater, resumed } => {
                let progress =
                    inflater.step(rest, &mut self.output, Stop::Never).map_err(|error| self.inflate_error(error))?;
                *rest = &rest[progress.consumed..];
                self.chunks.push(&self.output[..progress.produced], each)?;
                Ok(if progress.stream_end {
                    Advance::More(State::Trailer { inflater, left: if resumed { GZIP_TRAILER } else { 0 } })
                } else if progress.consumed == 0 && progress.produced == 0 {
                    Advance::NeedsInput(State::Deflate { inflater, resumed })
                } else {
                    Advance::More(State::Deflate { inflater, resumed })
                })
            }
            State::Trailer { mut inflater, left } => {
                let skipped = rest.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                *rest = &rest[skipped..];
                let left = left - skipped as u64;
                if rest.is_empty() {
                    return Ok(Advance::NeedsInput(State::Trailer { inflater, left }));
                }
                inflater.restart_gzip().map_err(|error| self.inflate_error(error))?;
                Ok(Advance::More(State::Deflate { inflater, resumed: false }))
            }
        }
    }

    const fn inflate_error(&self, error: InflateError) -> SpanError {
        SpanError::Inflate { tar_off: self.position(), error }
    }

    /// The table of contents that chunks are compared with.
    #[must_use]
    pub const fn toc(&self) -> &'t Toc {
        self.toc
    }
}

enum Advance {
    More(State),
    NeedsInput(State),
}

/// One stored piece of a file.
#[derive(Debug, Clone, Copy)]
struct Piece {
    file: FileRange,
    tar_off: u64,
    /// End of the stored piece before this one in the file; 0 for the first.
    stored_before: u64,
    /// Start of the next one; `u64::MAX` for the last.
    stored_after: u64,
}

/// Cuts a stream of tar bytes into chunks.
struct Assembler<'t> {
    toc: &'t Toc,
    position: u64,
    content: Option<(ContentIx, ContentRecord)>,
    /// Number of the current piece in the content.
    piece: usize,
    chunk: Box<[u8]>,
    /// What of `chunk` is filled; `None` between chunks, and in one of a sparse file that began too early.
    filling: Option<Filling>,
    /// The tail of the chunk that began too early.
    front: Option<Edge>,
}

/// How much is there of a chunk.
#[derive(Debug, Clone, Copy)]
struct Filling {
    /// The chunk, counted in its file.
    number: u64,
    /// Offset of the first byte in the chunk; not 0 when the chunk began before the first span.
    from: usize,
    /// Offset of the end.
    filled: usize,
}

impl<'t> Assembler<'t> {
    fn new(toc: &'t Toc, position: u64) -> Result<Self, FormatError> {
        let ix = toc.content_from(position)?;
        let mut assembler = Self {
            toc,
            position,
            content: None,
            piece: 0,
            chunk: vec![0; usize::try_from(CHUNK_SIZE).unwrap_or(usize::MAX)].into_boxed_slice(),
            filling: None,
            front: None,
        };
        assembler.enter(ix)?;
        Ok(assembler)
    }

    /// Makes `ix` the current content; there is none after the last one.
    fn enter(&mut self, ix: ContentIx) -> Result<(), FormatError> {
        self.content = if ix < self.toc.content_count() { Some((ix, self.toc.content(ix)?)) } else { None };
        self.piece = 0;
        self.filling = None;
        if let Some((_, record)) = &self.content
            && let Some(extents) = self.toc.extents(record)?
        {
            self.piece = extents.partition_point(|extent| tar_end(extent) <= self.position);
        }
        Ok(())
    }

    /// The piece that holds the current position or comes next; `None` behind the last file.
    fn current(&mut self) -> Result<Option<(ContentRecord, Piece)>, FormatError> {
        while let Some((ix, record)) = self.content {
            if let Some(piece) = self.nth_piece(&record)?
                && piece.tar_off.saturating_add(piece.file.len()) > self.position
            {
                return Ok(Some((record, piece)));
            }
            self.enter(ix + 1)?;
        }
        Ok(None)
    }

    fn nth_piece(&self, record: &ContentRecord) -> Result<Option<Piece>, FormatError> {
        let Some(extents) = self.toc.extents(record)? else {
            let file = FileRange::new(0, record.size.get());
            let piece = Piece { file, tar_off: record.tar_off.get(), stored_before: 0, stored_after: u64::MAX };
            return Ok((self.piece == 0).then_some(piece));
        };
        let Some(extent) = extents.get(self.piece) else { return Ok(None) };
        let file_of = |extent: &ExtentRecord| FileRange::with_len(extent.file_off.get(), extent.len.get());
        let before = self.piece.checked_sub(1).and_then(|before| extents.get(before));
        let after = extents.get(self.piece + 1);
        let piece = Piece {
            file: file_of(extent),
            tar_off: extent.tar_off.get(),
            stored_before: before.map_or(0, |before| file_of(before).end),
            stored_after: after.map_or(u64::MAX, |after| file_of(after).start),
        };
        let fits = piece.stored_before <= piece.file.start
            && !piece.file.is_empty()
            && piece.file.end <= piece.stored_after.min(record.size.get());
        if fits { Ok(Some(piece)) } else { Err(FormatError::Damaged { what: "extent out of range" }) }
    }

    fn push(&mut self, mut bytes: &[u8], each: &mut dyn FnMut(Chunk, &[u8])) -> Result<(), SpanError> {
        let tar_size = self.toc.tar_size();
        if bytes.len() as u64 > tar_size.saturating_sub(self.position) {
            return Err(SpanError::TooLong { tar_size });
        }
        while !bytes.is_empty() {
            let Some((record, piece)) = self.current()? else {
                self.position += bytes.len() as u64;
                return Ok(());
            };
            // Headers and padding before the piece.
            let skipped = take(&mut bytes, piece.tar_off.saturating_sub(self.position));
            self.position += skipped.len() as u64;
            if bytes.is_empty() {
                return Ok(());
            }
            self.fill(&record, &piece, &mut bytes, each)?;
        }
        Ok(())
    }

    /// Takes bytes of `piece` up to the end of a chunk or of the piece.
    fn fill(
        &mut self,
        record: &ContentRecord,
        piece: &Piece,
        bytes: &mut &[u8],
        each: &mut dyn FnMut(Chunk, &[u8]),
    ) -> Result<(), SpanError> {
        let file_off = piece.file.start + (self.position - piece.tar_off);
        let number = file_off / CHUNK_SIZE;
        let start = number * CHUNK_SIZE;
        let end = (start + CHUNK_SIZE).min(record.size.get());
        // Both are offsets in a chunk.
        let offset = usize::try_from(file_off - start).unwrap_or(0);
        let length = usize::try_from(end - start).unwrap_or(0);
        let is_first = file_off == piece.file.start && piece.stored_before <= start || file_off == start;
        if is_first {
            self.filling = Some(Filling { number, from: 0, filled: 0 });
        } else if self.filling.is_none() && !is_sparse(record) {
            self.filling = Some(Filling { number, from: offset, filled: offset });
        }
        let taken = take(bytes, piece.file.end.min(end) - file_off);
        self.position += taken.len() as u64;
        let file_end = file_off + taken.len() as u64;
        if let Some(filling) = &mut self.filling
            && filling.number == number
        {
            self.chunk[filling.filled..offset].fill(0);
            self.chunk[offset..offset + taken.len()].copy_from_slice(taken);
            filling.filled = offset + taken.len();
        }
        let chunk_done = file_end == end || (file_end == piece.file.end && piece.stored_after >= end);
        if chunk_done
            && let Some(filling) = self.filling.take()
            && filling.number == number
        {
            self.chunk[filling.filled..length].fill(0);
            let chunk = nth_chunk(record, number)?;
            if filling.from == 0 {
                self.finish(chunk, length, each)?;
            } else {
                self.front =
                    Some(Edge { chunk, offset: filling.from, bytes: self.chunk[filling.from..length].to_vec() });
            }
        }
        if file_end == piece.file.end {
            self.piece += 1;
        }
        Ok(())
    }

    fn finish(&self, chunk: Chunk, length: usize, each: &mut dyn FnMut(Chunk, &[u8])) -> Result<(), SpanError> {
        let bytes = &self.chunk[..length];
        if blake3::hash(bytes).as_bytes()[..SHORT_DIGEST] != self.toc.chunk_digest(chunk.ix)? {
            return Err(SpanError::Digest { chunk });
        }
        each(chunk, bytes);
        Ok(())
    }

    fn back(&self) -> Result<Option<Edge>, FormatError> {
        match (&self.content, self.filling) {
            (Some((_, record)), Some(Filling { number, from: 0, filled })) if filled > 0 && !is_sparse(record) => {
                let chunk = nth_chunk(record, number)?;
                Ok(Some(Edge { chunk, offset: 0, bytes: self.chunk[..filled].to_vec() }))
            }
            _ => Ok(None),
        }
    }
}

const fn is_sparse(record: &ContentRecord) -> bool {
    record.first_extent.get() != NONE
}

/// Chunk `number` of a file, which must have it.
fn nth_chunk(record: &ContentRecord, number: u64) -> Result<Chunk, FormatError> {
    let ix = u32::try_from(u64::from(record.first_chunk.get()) + number)
        .map_err(|_| FormatError::Damaged { what: "chunk out of range" })?;
    let start = number * CHUNK_SIZE;
    let end = (start + CHUNK_SIZE).min(record.size.get());
    let data_off = record.data_off.get();
    Ok(Chunk { ix, data: DataRange::new(data_off + start, data_off + end) })
}

const fn tar_end(extent: &ExtentRecord) -> u64 {
    extent.tar_off.get().saturating_add(extent.len.get())
}

/// The first `most` of `bytes`, or all of them; the rest stays.
fn take<'b>(bytes: &mut &'b [u8], most: u64) -> &'b [u8] {
    let length = usize::try_from(most).map_or(bytes.len(), |most| most.min(bytes.len()));
    let (taken, rest) = bytes.split_at(length);
    *bytes = rest;
    taken
}
