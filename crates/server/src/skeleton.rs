//! The skeleton of one layer: all bytes of its tar that are not content of files, compressed with zstd as one stream.
//!
//! With it a node that has the content can put the tar together and prove a layer by its diff ID, without the blob.

use std::fs::File;
use std::io::{self, BufWriter, Seek, Write};
use std::path::Path;

/// Headers are alike: a little more effort than usual halves them once more.
const LEVEL: i32 = 6;

/// Collects the skeleton of a layer in a scratch file.
pub(crate) struct SkeletonWriter(zstd::stream::write::Encoder<'static, BufWriter<File>>);

impl SkeletonWriter {
    /// Starts an unnamed file in `scratch`.
    pub(crate) fn new(scratch: &Path) -> io::Result<Self> {
        let file = BufWriter::new(tempfile::tempfile_in(scratch)?);
        Ok(Self(zstd::stream::write::Encoder::new(file, LEVEL)?))
    }

    /// Adds the next bytes.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    /// The finished file, at its start, and its length.
    pub(crate) fn finish(self) -> io::Result<(File, u64)> {
        let mut file = self.0.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?;
        let len = file.stream_position()?;
        file.rewind()?;
        Ok((file, len))
    }
}
