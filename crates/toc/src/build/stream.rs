//! From the blob to the bytes of the tar, with both digests and all checkpoints on the way.

mod gzip;
mod zstd;

use std::cell::{Cell, RefCell};
use std::io::{self, Read};

use millstream_inflate::WINDOW_SIZE;
use sha2::{Digest as _, Sha256};

use super::error::{BuildError, Ineligible, counted};
use super::{BuildOptions, BuildSink, ClosedSpans, Compression};
use crate::format::{MAX_SPAN, SHORT_DIGEST, SPAN_SIZE, START_FRAME, START_MEMBER, START_PLAIN, SpanIx, SpanRecord};
use crate::frames::Frames;

/// Compressed bytes read at once.
const INPUT: usize = 128 * 1024;
/// Room for output beside the window that is kept before it.
const OUTPUT: usize = 256 * 1024;
/// Output that is free of the ratio budget: small layers of zeros are common and harmless.
const RATIO_FREE: u64 = 64 * 1024 * 1024;

/// What the stream and the tree share: the sink, and the error that lies behind an `io::Error` seen by the tar reader.
pub(super) struct Shared<'s> {
    pub(super) sink: RefCell<&'s mut dyn BuildSink>,
    fault: RefCell<Option<BuildError>>,
    /// Whether what is read now is content of a file.
    content: Cell<bool>,
}

impl<'s> Shared<'s> {
    pub(super) fn new(sink: &'s mut dyn BuildSink) -> Self {
        Self { sink: RefCell::new(sink), fault: RefCell::new(None), content: Cell::new(false) }
    }

    /// Notes that what `read` takes from the stream is content of a file.
    pub(super) fn in_content<T>(&self, read: impl FnOnce() -> T) -> T {
        self.content.set(true);
        let value = read();
        self.content.set(false);
        value
    }

    /// Hands on what was taken from the stream, unless it is content.
    fn pass(&self, bytes: &[u8]) -> Result<(), BuildError> {
        if self.content.get() {
            return Ok(());
        }
        self.sink.borrow_mut().skeleton(bytes).map_err(BuildError::Sink)
    }

    /// What a reader that knows `io::Error` only is told of `error`, which is kept for [`Shared::blame`].
    fn fail(&self, error: BuildError) -> io::Error {
        let error = self.blame(error);
        let seen = io::Error::other(error.to_string());
        *self.fault.borrow_mut() = Some(error);
        seen
    }

    /// The error of the stream if it has failed, else `other`.
    pub(super) fn blame(&self, other: impl Into<BuildError>) -> BuildError {
        self.fault.take().unwrap_or_else(|| other.into())
    }
}

/// What is known when the blob was read to its end.
pub(super) struct Ended {
    pub(super) blob_digest: [u8; 32],
    pub(super) diff_id: [u8; 32],
    pub(super) blob_size: u64,
    pub(super) tar_size: u64,
    pub(super) spans: Vec<SpanRecord>,
}

/// A checkpoint that becomes a span as soon as a byte of output follows it.
struct Pending {
    record: SpanRecord,
    window: Vec<u8>,
}

/// How the blob is decompressed, and where in it the stream stands.
enum Codec {
    Plain,
    Gzip(gzip::Members),
    Zstd(Box<Frames>),
}

/// Reads the tar. Memory is bounded by the buffers and 40 bytes per span.
pub(super) struct TarStream<'s, R> {
    blob: R,
    shared: &'s Shared<'s>,
    options: &'s BuildOptions,
    codec: Codec,
    blob_hash: Sha256,
    tar_hash: Sha256,
    input: Box<[u8]>,
    input_at: usize,
    input_end: usize,
    blob_read: u64,
    blob_ended: bool,
    /// Output; what was read stays before `output_at`, up to a window, as long as it may be needed.
    output: Box<[u8]>,
    output_at: usize,
    output_end: usize,
    tar_made: u64,
    /// Where the current (or pending) span starts in the tar.
    span_start: u64,
    /// zstd: where in the blob the current frame starts.
    frame_at: u64,
    pending: Option<Pending>,
    spans: Vec<SpanRecord>,
}

impl<'s, R: Read> TarStream<'s, R> {
    pub(super) fn new(blob: R, options: &'s BuildOptions, shared: &'s Shared<'s>) -> Result<Self, BuildError> {
        let (start, codec) = match options.compression {
            Compression::Plain => (START_PLAIN, Codec::Plain),
            Compression::Gzip => (START_MEMBER, Codec::Gzip(gzip::Members::new()?)),
            Compression::Zstd => (START_FRAME, Codec::Zstd(Box::new(Frames::new().map_err(zstd::failed)?))),
        };
        Ok(Self {
            blob,
            shared,
            options,
            codec,
            blob_hash: Sha256::new(),
            tar_hash: Sha256::new(),
            input: vec![0; INPUT].into_boxed_slice(),
            input_at: 0,
            input_end: 0,
            blob_read: 0,
            blob_ended: false,
            output: vec![0; WINDOW_SIZE + OUTPUT].into_boxed_slice(),
            output_at: 0,
            output_end: 0,
            tar_made: 0,
            span_start: 0,
            frame_at: 0,
            pending: Some(Pending { record: record(0, 0, 0, start), window: Vec::new() }),
            spans: Vec::new(),
        })
    }

    /// Reads what is left, so that both digests cover everything.
    pub(super) fn finish(mut self) -> Result<Ended, BuildError> {
        loop {
            self.shared.pass(&self.output[self.output_at..self.output_end])?;
            self.output_at = self.output_end;
            if self.fill()? == 0 {
                break;
            }
        }
        let blob_digest: [u8; 32] = self.blob_hash.finalize().into();
        let diff_id = if matches!(self.codec, Codec::Plain) { blob_digest } else { self.tar_hash.finalize().into() };
        Ok(Ended { blob_digest, diff_id, blob_size: self.blob_read, tar_size: self.tar_made, spans: self.spans })
    }

    /// Makes more output; 0 at the end of the tar.
    fn fill(&mut self) -> Result<usize, BuildError> {
        if self.output.len() - self.output_end < OUTPUT / 4 {
            // Everything was read; keep the window.
            let from = self.output_end.saturating_sub(WINDOW_SIZE);
            self.output.copy_within(from..self.output_end, 0);
            self.output_end -= from;
            self.output_at = self.output_end;
        }
        let produced = match self.codec {
            Codec::Plain => self.fill_plain()?,
            Codec::Gzip(_) => self.fill_gzip()?,
            Codec::Zstd(_) => self.fill_zstd()?,
        };
        if self.options.closed_spans == ClosedSpans::Decline && self.tar_made - self.span_start > MAX_SPAN {
            return Err(self.too_long());
        }
        let budget = &self.options.budget;
        if self.tar_made > budget.max_tar_size {
            return Err(BuildError::over(counted::TAR_BYTES, budget.max_tar_size));
        }
        let free = self.tar_made.saturating_sub(RATIO_FREE);
        if free > self.blob_at().saturating_mul(budget.max_ratio) {
            return Err(BuildError::over(counted::RATIO, budget.max_ratio));
        }
        Ok(produced)
    }

    fn too_long(&self) -> BuildError {
        let end = if matches!(self.codec, Codec::Zstd(_)) { "zstd frame" } else { "deflate block" };
        Ineligible::SpanTooLong { end, start: self.span_start, limit: MAX_SPAN }.into()
    }

    fn fill_plain(&mut self) -> Result<usize, BuildError> {
        let until_boundary = self.span_start + SPAN_SIZE - self.tar_made;
        let room = (self.output.len() - self.output_end).min(usize::try_from(until_boundary).unwrap_or(usize::MAX));
        let read = read_some(&mut self.blob, &mut self.output[self.output_end..self.output_end + room])?;
        self.blob_hash.update(&self.output[self.output_end..self.output_end + read]);
        self.blob_read += read as u64;
        self.made(read)?;
        if self.tar_made - self.span_start == SPAN_SIZE {
            self.span_start = self.tar_made;
            self.pending =
                Some(Pending { record: record(self.tar_made, self.tar_made, 0, START_PLAIN), window: Vec::new() });
        }
        Ok(read)
    }

    /// Adds input behind what is there. Nothing may be there unless it starts at 0.
    fn refill(&mut self) -> Result<(), BuildError> {
        if self.input_at == self.input_end {
            (self.input_at, self.input_end) = (0, 0);
        }
        let read = read_some(&mut self.blob, &mut self.input[self.input_end..])?;
        self.blob_hash.update(&self.input[self.input_end..self.input_end + read]);
        self.blob_read += read as u64;
        self.input_end += read;
        self.blob_ended = read == 0;
        Ok(())
    }

    /// Position in the blob up to which the decompressor has taken bytes.
    const fn blob_at(&self) -> u64 {
        self.blob_read - (self.input_end - self.input_at) as u64
    }

    const fn checkpoint_due(&self) -> bool {
        self.tar_made - self.span_start >= SPAN_SIZE
    }

    fn set_pending(&mut self, record: SpanRecord, window: Vec<u8>) {
        self.span_start = self.tar_made;
        self.pending = Some(Pending { record, window });
    }

    /// Counts output that was written behind `output_end`, and turns the pending checkpoint into a span.
    fn made(&mut self, produced: usize) -> Result<(), BuildError> {
        if produced == 0 {
            return Ok(());
        }
        self.output_end += produced;
        self.tar_made += produced as u64;
        if let Some(pending) = self.pending.take() {
            let ix = SpanIx::try_from(self.spans.len()).map_err(|_| BuildError::over("spans", u32::MAX.into()))?;
            self.shared.sink.borrow_mut().window(ix, &pending.window).map_err(BuildError::Sink)?;
            self.spans.push(pending.record);
        }
        Ok(())
    }
}

impl<R: Read> Read for TarStream<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.output_at == self.output_end && !buffer.is_empty() {
            self.fill().map_err(|error| self.shared.fail(error))?;
        }
        let length = buffer.len().min(self.output_end - self.output_at);
        buffer[..length].copy_from_slice(&self.output[self.output_at..self.output_at + length]);
        self.shared.pass(&buffer[..length]).map_err(|error| self.shared.fail(error))?;
        self.output_at += length;
        Ok(length)
    }
}

fn record(blob_off: u64, tar_off: u64, bits: u8, start: u8) -> SpanRecord {
    SpanRecord {
        blob_off: blob_off.into(),
        tar_off: tar_off.into(),
        bits,
        start,
        reserved: 0.into(),
        window_len: 0.into(),
        window_digest: [0; SHORT_DIGEST],
    }
}

/// BLAKE3, truncated.
pub(super) fn short_digest(bytes: &[u8]) -> [u8; SHORT_DIGEST] {
    let mut short = [0; SHORT_DIGEST];
    short.copy_from_slice(&blake3::hash(bytes).as_bytes()[..SHORT_DIGEST]);
    short
}

fn read_some(from: &mut impl Read, buffer: &mut [u8]) -> Result<usize, BuildError> {
    loop {
        match from.read(buffer) {
            Ok(read) => return Ok(read.min(buffer.len())),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(BuildError::Read(error)),
        }
    }
}
