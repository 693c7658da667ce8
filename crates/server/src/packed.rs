//! Packed content: the files of a layer that cannot be entered often enough, kept in pieces that can.
//!
//! Unit `n` is what is stored of the data address space from `n` MiB to `n + 1` MiB, gaps and holes as zeros. One in which
//! nothing is stored is empty.

use std::io;
use std::ops::Range;
use std::path::Path;

use millstream_toc::DataRange;

use crate::items::{ItemFile, ItemWriter};

/// Bytes of the data address space in one unit.
pub(crate) const UNIT: u64 = 1 << 20;
const UNIT_LEN: usize = 1 << 20;
const _: () = assert!(UNIT_LEN as u64 == UNIT);
/// Fast: an import waits for it.
const LEVEL: i32 = 1;

/// Collects the content of a layer, in the order of its data address space. Memory: one unit and its compressed form.
pub(crate) struct Packer {
    items: ItemWriter,
    /// Number and bytes of the unit being filled.
    unit: u32,
    bytes: Vec<u8>,
    /// Whether anything was stored in it.
    touched: bool,
    stored: u64,
    max_bytes: u64,
}

impl Packer {
    /// Starts in the directory `scratch`. More than `max_bytes` of content are refused.
    pub(crate) fn new(scratch: &Path, max_bytes: u64) -> io::Result<Self> {
        let items = ItemWriter::new(scratch, LEVEL)?;
        Ok(Self { items, unit: 0, bytes: vec![0; UNIT_LEN], touched: false, stored: 0, max_bytes })
    }

    /// Adds `bytes` at `data`; places ascend. `false`: that would be more than is kept.
    pub(crate) fn add(&mut self, data: DataRange, mut bytes: &[u8]) -> io::Result<bool> {
        self.stored = self.stored.saturating_add(bytes.len() as u64);
        if self.stored > self.max_bytes {
            return Ok(false);
        }
        let mut at = data.start;
        while !bytes.is_empty() {
            let unit = u32::try_from(at / UNIT).map_err(|_| io::Error::other("more content than units"))?;
            if unit != self.unit {
                self.flush()?;
                self.unit = unit;
            }
            // Within a unit.
            let start = usize::try_from(at % UNIT).unwrap_or(0);
            let (here, rest) = bytes.split_at(bytes.len().min(UNIT_LEN - start));
            self.bytes[start..start + here.len()].copy_from_slice(here);
            self.touched = true;
            at += here.len() as u64;
            bytes = rest;
        }
        Ok(true)
    }

    fn flush(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.touched) {
            self.items.append(self.unit, &self.bytes)?;
            self.bytes.fill(0);
        }
        Ok(())
    }

    /// The finished file of a layer whose data address space has `data_size` bytes.
    pub(crate) fn finish(mut self, data_size: u64) -> io::Result<ItemFile> {
        self.flush()?;
        self.items.finish(units(data_size))
    }
}

/// Units of a data address space. What would be too many was refused when it was packed.
pub(crate) fn units(data_size: u64) -> u32 {
    u32::try_from(data_size.div_ceil(UNIT)).unwrap_or(u32::MAX)
}

/// The units that hold `data`, which is not empty.
pub(crate) fn units_of(data: DataRange) -> Range<u32> {
    units(data.start / UNIT * UNIT)..units(data.end)
}

/// A unit's bytes. Zeros where nothing was stored.
pub(crate) fn unpack(packed: &[u8]) -> io::Result<Vec<u8>> {
    let mut bytes = crate::items::unpack(packed, UNIT_LEN)?;
    bytes.resize(UNIT_LEN, 0);
    Ok(bytes)
}

/// The bytes of `data` out of consecutive `units`, of which the first has number `first`; `None` when they do not hold it.
pub(crate) fn assemble(data: DataRange, first: u32, units: &[Vec<u8>]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(usize::try_from(data.len()).ok()?);
    let mut at = data.start;
    while at < data.end {
        let number = u32::try_from(at / UNIT).ok()?.checked_sub(first)?;
        let end = data.end.min((at / UNIT + 1) * UNIT);
        let start = usize::try_from(at % UNIT).ok()?;
        let part = units.get(number as usize)?.get(start..)?.get(..usize::try_from(end - at).ok()?)?;
        out.extend_from_slice(part);
        at = end;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_hold_what_was_added_and_zeros() {
        let scratch = tempfile::tempdir().unwrap();
        let mut packer = Packer::new(scratch.path(), 200_000).unwrap();
        let across = DataRange::with_len(UNIT - 4096, 10_000);
        let far = DataRange::with_len(5 * UNIT, 7);
        assert!(packer.add(across, &[7; 10_000]).unwrap());
        assert!(packer.add(far, b"content").unwrap());
        let (index, mut file) = packer.finish(5 * UNIT + 4096).unwrap().into_parts();
        let offsets = crate::items::parse_index(&index).unwrap();
        assert_eq!(offsets.len(), 7, "six units");
        assert_eq!(offsets[2], offsets[5], "empty units take no bytes");
        let mut all = Vec::new();
        io::Read::read_to_end(&mut file, &mut all).unwrap();
        let place = |at: u64| usize::try_from(at).unwrap();
        let units: Vec<_> =
            offsets.windows(2).map(|pair| unpack(&all[place(pair[0])..place(pair[1])]).unwrap()).collect();
        assert_eq!(assemble(across, 0, &units).unwrap(), [7; 10_000]);
        assert_eq!(assemble(far, 5, &units[5..]).unwrap(), b"content");
        assert_eq!(assemble(DataRange::new(0, 100), 0, &units).unwrap(), [0; 100]);
        assert_eq!(assemble(far, 0, &units[..5]), None);
        assert_eq!((units_of(across), units_of(far)), (0..2, 5..6));
        assert_eq!(units_of(DataRange::new(UNIT, 2 * UNIT)), 1..2);
    }

    #[test]
    fn more_than_is_kept_is_refused() {
        let scratch = tempfile::tempdir().unwrap();
        let mut packer = Packer::new(scratch.path(), 10).unwrap();
        assert!(packer.add(DataRange::new(0, 10), &[1; 10]).unwrap());
        assert!(!packer.add(DataRange::new(4096, 4097), &[1]).unwrap());
    }
}
