//! Sparse maps in their four forms: the list of the parts of a file that are stored.

use super::header::{BLOCK, Block, number};
use super::pax::decimal;
use super::{Fault, TarLimits};

/// Bytes of one entry of an old GNU map: two numbers of 12 bytes.
const ENTRY: usize = 24;

const TOO_LONG: Fault = Fault::Limit("sparse map is too long");

/// A stored part of a sparse file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Offset in the file.
    pub file_off: u64,
    /// Offset in the tar.
    pub tar_off: u64,
    /// Bytes, not 0.
    pub len: u64,
}

/// The entries of a map as written: offset in the file and length.
#[derive(Debug)]
pub(super) struct Map {
    entries: Vec<(i64, i64)>,
    max_entries: usize,
    max_bytes: u64,
    /// Bytes read of an old GNU map.
    bytes: u64,
}

/// The beginning of a member's content, in which form 1.0 has its map: one number on each line, first that of entries.
#[derive(Debug, Default)]
pub(super) struct MapText {
    text: Vec<u8>,
    lines: usize,
}

impl MapText {
    pub(super) fn push(&mut self, block: &Block) {
        self.lines += block.iter().filter(|byte| **byte == b'\n').count();
        self.text.extend_from_slice(block);
    }
}

impl Map {
    pub(super) const fn new(limits: &TarLimits) -> Self {
        Self { entries: Vec::new(), max_entries: limits.max_extents, max_bytes: limits.max_pax_bytes, bytes: 0 }
    }

    fn add(&mut self, offset: i64, len: i64) -> Result<(), Fault> {
        if self.entries.len() >= self.max_entries {
            return Err(TOO_LONG);
        }
        self.entries.push((offset, len));
        Ok(())
    }

    /// Old GNU form: the entries in the header. Gives whether blocks with more follow.
    pub(super) fn old_gnu_header(&mut self, block: &Block) -> Result<bool, Fault> {
        self.old_gnu(&block[386..386 + 4 * ENTRY + 1])
    }

    /// Old GNU form: the entries of a block after the header. Gives whether another one follows.
    pub(super) fn old_gnu_block(&mut self, block: &Block) -> Result<bool, Fault> {
        self.old_gnu(block)
    }

    fn old_gnu(&mut self, area: &[u8]) -> Result<bool, Fault> {
        self.bytes += area.len() as u64;
        let count = area.len() / ENTRY;
        // An entry that begins with NUL ends the map, though not the chain of blocks.
        for entry in area.chunks_exact(ENTRY).take_while(|entry| entry[0] != 0) {
            let (offset, len) = entry.split_at(ENTRY / 2);
            self.add(number(offset)?, number(len)?)?;
        }
        let more = area.get(count * ENTRY).is_some_and(|byte| *byte != 0);
        if more && self.bytes.saturating_add(BLOCK as u64) >= self.max_bytes { Err(TOO_LONG) } else { Ok(more) }
    }

    /// Forms 0.0 and 0.1.
    pub(super) fn list(&mut self, count: &[u8], list: &[u8]) -> Result<(), Fault> {
        const BAD: Fault = Fault::Invalid("sparse map does not have the number of entries it announces");
        let numbers = usize::try_from(decimal(count)?).ok().and_then(|count| count.checked_mul(2)).ok_or(BAD)?;
        let commas = list.iter().filter(|byte| **byte == b',').count();
        if numbers != if list.is_empty() { 0 } else { commas + 1 } {
            return Err(BAD);
        }
        let mut fields = list.split(|byte| *byte == b',');
        while let (Some(offset), Some(len)) = (fields.next(), fields.next()) {
            self.add(decimal(offset)?, decimal(len)?)?;
        }
        Ok(())
    }

    /// Form 1.0, once `text` holds all of it; `false` while it does not.
    pub(super) fn text(&mut self, text: &mut MapText) -> Result<bool, Fault> {
        let more = if text.text.len() as u64 + BLOCK as u64 > self.max_bytes { Err(TOO_LONG) } else { Ok(false) };
        if text.lines == 0 {
            return more;
        }
        let mut lines = text.text.split(|byte| *byte == b'\n');
        let count =
            usize::try_from(decimal(lines.next().unwrap_or_default())?).ok().and_then(|count| count.checked_mul(2));
        let count = count.ok_or(Fault::Invalid("sparse map announces an impossible number of entries"))?;
        if text.lines - 1 < count {
            return more;
        }
        for _ in 0..count / 2 {
            let (Some(offset), Some(len)) = (lines.next(), lines.next()) else { return more };
            self.add(decimal(offset)?, decimal(len)?)?;
        }
        Ok(true)
    }
}

/// The extents of a file of `size` bytes whose `stored` bytes start at `tar_off`; `None` when they are all of it.
pub(super) fn extents(map: &Map, size: u64, stored: u64, tar_off: u64) -> Result<Option<Vec<Extent>>, Fault> {
    let mut extents: Vec<Extent> = Vec::new();
    let (mut file_end, mut total) = (0_u64, 0_u64);
    for (offset, len) in &map.entries {
        let entry = u64::try_from(*offset).ok().zip(u64::try_from(*len).ok());
        let (file_off, len) = entry.ok_or(Fault::Invalid("negative number in a sparse map"))?;
        // Two numbers below 2^63 cannot overflow.
        let end = file_off + len;
        if file_off < file_end || end > size {
            return Err(Fault::Invalid("sparse map is out of order or exceeds its file"));
        }
        match extents.last_mut() {
            _ if len == 0 => {}
            Some(last) if last.file_off + last.len == file_off => last.len += len,
            _ => extents.push(Extent { file_off, tar_off: tar_off.saturating_add(total), len }),
        }
        file_end = end;
        total += len;
    }
    if total != stored {
        return Err(Fault::Invalid("sparse map does not account for all stored bytes"));
    }
    Ok(if total == size { None } else { Some(extents) })
}
