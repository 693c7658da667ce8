//! Packing: from the bytes of a tar to those of a blob, with the digests of both.

use std::io::{self, Write};

use anyhow::{Context as _, Result};
use flate2::{Compression, write::GzEncoder};
use sha2::{Digest as _, Sha256};
use zstd::stream::write::Encoder as ZstdEncoder;

/// The usual one of image builders.
const LEVEL: Compression = Compression::new(6);

/// The fastest that ends a block from time to time: at level 1 the whole layer is one, which nobody can enter.
const FAST: Compression = Compression::new(2);

/// How a layer's tar becomes a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// As it is.
    Plain,
    /// One gzip member.
    Gzip,
    /// The same, compressed fast, for what does not compress.
    GzipFast,
    /// A new gzip member after so many bytes of tar.
    GzipMembers(u64),
    /// One zstd frame, as docker and BuildKit write it.
    Zstd,
    /// A new zstd frame after so many bytes of tar, and before each of them one to be skipped.
    ZstdFrames(u64),
}

/// Passes bytes on and remembers their digest and number.
pub(crate) struct Hashing<W> {
    inner: W,
    sha256: Sha256,
    size: u64,
}

impl<W: Write> Hashing<W> {
    pub(crate) fn new(inner: W) -> Self {
        Self { inner, sha256: Sha256::new(), size: 0 }
    }

    /// The writer, the digest as 64 hexadecimal digits, and the number of bytes.
    pub(crate) fn finish(self) -> (W, String, u64) {
        (self.inner, hex::encode(self.sha256.finalize()), self.size)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.sha256.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Turns a tar into a blob.
pub(crate) enum Packer<W: Write> {
    Plain(W),
    /// The encoder is absent only while one member gives way to the next.
    Gzip {
        encoder: Option<Box<GzEncoder<W>>>,
        member: u64,
        left: u64,
    },
    /// The encoder is absent only while one frame gives way to the next.
    Zstd {
        encoder: Option<Box<ZstdEncoder<'static, W>>>,
        frame: u64,
        left: u64,
    },
}

impl<W: Write> Packer<W> {
    pub(crate) fn new(packing: Packing, out: W) -> Result<Self> {
        let member = match packing {
            Packing::Plain => return Ok(Self::Plain(out)),
            Packing::Zstd => return Ok(Self::Zstd { encoder: Some(zstd(out)?), frame: u64::MAX, left: u64::MAX }),
            Packing::ZstdFrames(size) => {
                let frame = size.max(1);
                return Ok(Self::Zstd { encoder: Some(zstd(skippable(out)?)?), frame, left: frame });
            }
            Packing::Gzip | Packing::GzipFast => u64::MAX,
            Packing::GzipMembers(size) => size.max(1),
        };
        let level = if packing == Packing::GzipFast { FAST } else { LEVEL };
        Ok(Self::Gzip { encoder: Some(Box::new(GzEncoder::new(out, level))), member, left: member })
    }

    /// Ends the last member and gives the writer back.
    pub(crate) fn finish(self) -> Result<W> {
        match self {
            Self::Plain(out) => Ok(out),
            Self::Gzip { encoder, .. } => Ok(encoder.context("the encoder failed before")?.finish()?),
            Self::Zstd { encoder, .. } => Ok(encoder.context("the encoder failed before")?.finish()?),
        }
    }
}

impl<W: Write> Write for Packer<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(out) => out.write(bytes),
            Self::Zstd { encoder, frame, left } => {
                if *left == 0 {
                    let out = encoder.take().ok_or(io::ErrorKind::BrokenPipe)?.finish()?;
                    *encoder = Some(zstd(skippable(out)?)?);
                    *left = *frame;
                }
                let take = bytes.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                let written = encoder.as_mut().ok_or(io::ErrorKind::BrokenPipe)?.write(&bytes[..take])?;
                *left -= written as u64;
                Ok(written)
            }
            Self::Gzip { encoder, member, left } => {
                if *left == 0 {
                    let out = encoder.take().ok_or(io::ErrorKind::BrokenPipe)?.finish()?;
                    *encoder = Some(Box::new(GzEncoder::new(out, LEVEL)));
                    *left = *member;
                }
                let take = bytes.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                let written = encoder.as_mut().ok_or(io::ErrorKind::BrokenPipe)?.write(&bytes[..take])?;
                *left -= written as u64;
                Ok(written)
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(out) => out.flush(),
            Self::Zstd { encoder, .. } => encoder.as_mut().map_or(Ok(()), Write::flush),
            Self::Gzip { encoder, .. } => encoder.as_mut().map_or(Ok(()), Write::flush),
        }
    }
}

fn zstd<W: Write>(out: W) -> io::Result<Box<ZstdEncoder<'static, W>>> {
    let mut encoder = ZstdEncoder::new(out, 0)?;
    encoder.include_checksum(true)?;
    Ok(Box::new(encoder))
}

/// Writes a frame to be skipped, of 12 bytes as those of pzstd are.
fn skippable<W: Write>(mut out: W) -> io::Result<W> {
    out.write_all(&[0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4])?;
    Ok(out)
}
