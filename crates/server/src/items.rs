//! Many small things of one layer as one object, so that any consecutive ones take two range reads: its windows, or its packed
//! content.
//!
//! `count + 1` offsets (u64, little-endian, counted from the end of this index), then the items, each compressed with
//! zstd by itself. Item `n` lies between offset `n` and offset `n + 1`; an empty one has equal ones.

use std::fs::File;
use std::io::{self, BufWriter, Seek, Write};
use std::ops::Range;
use std::path::Path;

const OFFSET_LEN: u64 = 8;

/// Collects the items of a layer, in order, in a scratch file. Memory: 8 bytes for each, and the compressor.
pub(crate) struct ItemWriter {
    file: BufWriter<File>,
    compressor: zstd::bulk::Compressor<'static>,
    offsets: Vec<u64>,
    written: u64,
}

impl ItemWriter {
    /// Starts an unnamed file in `scratch`. `level` is zstd's.
    pub(crate) fn new(scratch: &Path, level: i32) -> io::Result<Self> {
        Ok(Self {
            file: BufWriter::new(tempfile::tempfile_in(scratch)?),
            compressor: zstd::bulk::Compressor::new(level)?,
            offsets: Vec::new(),
            written: 0,
        })
    }

    /// Adds item `ix`. Items ascend; those left out are empty.
    pub(crate) fn append(&mut self, ix: u32, raw: &[u8]) -> io::Result<()> {
        let ix = ix as usize;
        if ix < self.offsets.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "items do not ascend"));
        }
        self.offsets.resize(ix + 1, self.written);
        if !raw.is_empty() {
            let packed = self.compressor.compress(raw)?;
            self.file.write_all(&packed)?;
            self.written += packed.len() as u64;
        }
        Ok(())
    }

    /// The finished file of a layer that has `count` items.
    pub(crate) fn finish(mut self, count: u32) -> io::Result<ItemFile> {
        if self.offsets.len() > count as usize {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "more items than there are places"));
        }
        self.offsets.resize(count as usize + 1, self.written);
        let mut file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.rewind()?;
        Ok(ItemFile { index: self.offsets.iter().flat_map(|offset| offset.to_le_bytes()).collect(), file })
    }
}

/// The items of one layer, ready to be stored.
#[derive(Debug)]
pub struct ItemFile {
    index: Vec<u8>,
    file: File,
}

impl ItemFile {
    /// The index, and the file (at its start) with what follows it.
    pub(crate) fn into_parts(self) -> (Vec<u8>, File) {
        (self.index, self.file)
    }
}

/// Bytes of the index of `count` items.
pub(crate) fn index_len(count: u32) -> u64 {
    (u64::from(count) + 1) * OFFSET_LEN
}

/// Where the index holds the offsets of the items `first..end`, and the one that ends the last of them.
pub(crate) fn index_range(first: u32, end: u32) -> Range<u64> {
    u64::from(first) * OFFSET_LEN..(u64::from(end) + 1) * OFFSET_LEN
}

/// The offsets in a piece of index; `None` when they descend.
pub(crate) fn parse_index(bytes: &[u8]) -> Option<Vec<u64>> {
    let (words, []) = bytes.as_chunks::<8>() else { return None };
    let offsets: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
    offsets.is_sorted().then_some(offsets)
}

/// The raw item, which has at most `most` bytes; empty for an empty one.
pub(crate) fn unpack(packed: &[u8], most: usize) -> io::Result<Vec<u8>> {
    if packed.is_empty() {
        return Ok(Vec::new());
    }
    zstd::bulk::decompress(packed, most)
}
