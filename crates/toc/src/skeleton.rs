//! A tar from its two halves: the content of its files, and all other bytes, which are its skeleton.

use std::io::{self, Read};

use crate::format::FormatError;
use crate::range::{DataRange, TarRange};
use crate::read::Toc;

/// Reads a tar that is made of a skeleton, as [`BuildSink::skeleton`](crate::BuildSink::skeleton) was given it, and of the
/// content that a TOC describes.
///
/// Nothing is proven by what comes out: whoever wants to know hashes it. Its length is that of the tar, or it ends with an
/// error.
pub struct Reassembled<'t, S, C> {
    toc: &'t Toc,
    skeleton: S,
    content: C,
    /// Bytes of the tar given so far.
    at: u64,
    /// The next stored piece of content: where it lies in the tar and in the data address space.
    piece: Option<(TarRange, DataRange)>,
    /// The content and the extent of it to look at after that.
    next: (u32, usize),
}

impl<'t, S, C> Reassembled<'t, S, C>
where
    S: Read,
    C: FnMut(DataRange, &mut [u8]) -> io::Result<()>,
{
    /// The tar of `toc`. `content` fills its buffer, which is never empty, with the bytes of a range of the data address
    /// space.
    ///
    /// # Errors
    /// When the TOC is damaged.
    pub fn new(toc: &'t Toc, skeleton: S, content: C) -> Result<Self, FormatError> {
        let mut tar = Self { toc, skeleton, content, at: 0, piece: None, next: (0, 0) };
        tar.advance()?;
        Ok(tar)
    }

    /// Finds the next stored piece.
    fn advance(&mut self) -> Result<(), FormatError> {
        self.piece = None;
        while self.next.0 < self.toc.content_count() {
            let record = self.toc.content(self.next.0)?;
            let (place, size) = (record.data_off.get(), record.size.get());
            let Some(extents) = self.toc.extents(&record)? else {
                self.next.0 += 1;
                self.piece = Some((TarRange::with_len(record.tar_off.get(), size), DataRange::with_len(place, size)));
                break;
            };
            if let Some(extent) = extents.get(self.next.1) {
                self.next.1 += 1;
                let data = DataRange::with_len(place.saturating_add(extent.file_off.get()), extent.len.get());
                self.piece = Some((TarRange::with_len(extent.tar_off.get(), extent.len.get()), data));
                break;
            }
            self.next = (self.next.0 + 1, 0);
        }
        match &self.piece {
            Some((tar, _)) if tar.start < self.at || tar.is_empty() || tar.end > self.toc.tar_size() => {
                Err(FormatError::Damaged { what: "content out of order" })
            }
            _ => Ok(()),
        }
    }

    fn read_skeleton(&mut self, until: u64, out: &mut [u8]) -> io::Result<usize> {
        let len = usize::try_from(until - self.at).map_or(out.len(), |left| left.min(out.len()));
        let read = self.skeleton.read(&mut out[..len])?.min(len);
        if read == 0 && len > 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the skeleton is too short"));
        }
        self.at += read as u64;
        Ok(read)
    }
}

impl<S, C> Read for Reassembled<'_, S, C>
where
    S: Read,
    C: FnMut(DataRange, &mut [u8]) -> io::Result<()>,
{
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let Some((tar, data)) = self.piece else { return self.read_skeleton(self.toc.tar_size(), out) };
        if self.at < tar.start || out.is_empty() {
            return self.read_skeleton(tar.start, out);
        }
        let len = usize::try_from(tar.end - self.at).map_or(out.len(), |left| left.min(out.len()));
        (self.content)(DataRange::with_len(data.start + (self.at - tar.start), len as u64), &mut out[..len])?;
        self.at += len as u64;
        if self.at == tar.end {
            self.advance().map_err(io::Error::other)?;
        }
        Ok(len)
    }
}
