//! The windows of one layer as one object, so that any consecutive ones take two range reads.
//!
//! `spans + 1` offsets (u64, little-endian, counted from the end of this index), then the windows, each compressed with
//! zstd by itself. The window of span `n` lies between offset `n` and offset `n + 1`; a span that needs none has equal ones.

use std::fs::File;
use std::io::{self, BufWriter, Seek, Write};
use std::ops::Range;
use std::path::Path;

/// Decompressors look back at most this far.
const MAX_WINDOW: usize = 32 * 1024;
/// Windows are short: more effort buys little.
const LEVEL: i32 = 3;
const OFFSET_LEN: u64 = 8;

/// Collects the windows of a layer, in order, in a scratch file.
pub(crate) struct WindowWriter {
    file: BufWriter<File>,
    compressor: zstd::bulk::Compressor<'static>,
    offsets: Vec<u64>,
    written: u64,
}

impl WindowWriter {
    /// Starts an unnamed file in `scratch`.
    pub(crate) fn new(scratch: &Path) -> io::Result<Self> {
        Ok(Self {
            file: BufWriter::new(tempfile::tempfile_in(scratch)?),
            compressor: zstd::bulk::Compressor::new(LEVEL)?,
            offsets: Vec::new(),
            written: 0,
        })
    }

    /// Adds the window of `span`. Spans ascend; those left out need none.
    pub(crate) fn append(&mut self, span: u32, raw: &[u8]) -> io::Result<()> {
        let span = span as usize;
        if span < self.offsets.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "windows do not ascend"));
        }
        self.offsets.resize(span + 1, self.written);
        if !raw.is_empty() {
            let packed = self.compressor.compress(raw)?;
            self.file.write_all(&packed)?;
            self.written += packed.len() as u64;
        }
        Ok(())
    }

    /// The finished file of a layer with `spans` spans.
    pub(crate) fn finish(mut self, spans: u32) -> io::Result<WindowFile> {
        if self.offsets.len() > spans as usize {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "more windows than spans"));
        }
        self.offsets.resize(spans as usize + 1, self.written);
        let mut file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.rewind()?;
        Ok(WindowFile { index: self.offsets.iter().flat_map(|offset| offset.to_le_bytes()).collect(), file })
    }
}

/// The windows of one layer, ready to be stored.
#[derive(Debug)]
pub struct WindowFile {
    index: Vec<u8>,
    file: File,
}

impl WindowFile {
    /// The index, and the file (at its start) with what follows it.
    pub(crate) fn into_parts(self) -> (Vec<u8>, File) {
        (self.index, self.file)
    }
}

/// Bytes of the index of a layer with `spans` spans.
pub(crate) fn index_len(spans: u32) -> u64 {
    (u64::from(spans) + 1) * OFFSET_LEN
}

/// Where the index holds the offsets of the spans `first..end`, and the one that ends the last of them.
pub(crate) fn index_range(first: u32, end: u32) -> Range<u64> {
    u64::from(first) * OFFSET_LEN..(u64::from(end) + 1) * OFFSET_LEN
}

/// The offsets in a piece of index; `None` when they descend.
pub(crate) fn parse_index(bytes: &[u8]) -> Option<Vec<u64>> {
    let (words, []) = bytes.as_chunks::<8>() else { return None };
    let offsets: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
    offsets.is_sorted().then_some(offsets)
}

/// The raw window; empty for an empty one.
pub(crate) fn unpack(packed: &[u8]) -> io::Result<Vec<u8>> {
    if packed.is_empty() {
        return Ok(Vec::new());
    }
    zstd::bulk::decompress(packed, MAX_WINDOW)
}
