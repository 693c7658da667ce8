//! The form in which a TOC travels: its columns predicted from their neighbours, taken apart into bytes, compressed.
//!
//! The packed form has no identity: only the canonical bytes it unpacks to have one. A newer version may pack better.
//!
//! ```text
//! 8 bytes  "mspack\0\x01"
//! 8 bytes  length of the canonical form, little endian
//! 1 byte   0: canonical bytes follow; 1: a zstd frame of the rewritten tables follows
//! ```
//!
//! In the rewritten tables the header and the string table are as they are. Each other table is written column by column:
//! all first bytes of its records, then all second bytes, and so on. Before that, the fields that mostly follow from the
//! record before hold the difference to what follows, zigzag-coded (`FORMAT.md` lists them). Every step has
//! an inverse for any content, so that also a damaged TOC arrives as it was sent.

use std::io::Read;

use zerocopy::FromBytes;

use crate::format::{FormatError, Header, MAGIC};

mod predict;

use predict::{Direction, RECORD_SIZES, rewrite};

const PACK_MAGIC: [u8; 8] = *b"mspack\0\x01";
const PREFIX: usize = 17;
const STORED: u8 = 0;
const COLUMNS: u8 = 1;
/// Above 9 zstd takes several times longer for 2 % less.
const LEVEL: i32 = 9;
/// Largest window a decoder has to hold, as a power of two: 8 MiB.
const WINDOW_LOG_MAX: u32 = 23;

const fn damaged(what: &'static str) -> FormatError {
    FormatError::Damaged { what }
}

/// Packs a canonical TOC. Other bytes come through too, but are not made smaller.
#[must_use]
pub fn pack(canonical: &[u8]) -> Vec<u8> {
    let mut packed = Vec::with_capacity(PREFIX + canonical.len() / 2);
    packed.extend_from_slice(&PACK_MAGIC);
    packed.extend_from_slice(&(canonical.len() as u64).to_le_bytes());
    let compressed = rewritten(canonical).and_then(|columns| zstd::bulk::compress(&columns, LEVEL).ok());
    match compressed {
        Some(frame) if frame.len() < canonical.len() => {
            packed.push(COLUMNS);
            packed.extend_from_slice(&frame);
        }
        _ => {
            packed.push(STORED);
            packed.extend_from_slice(canonical);
        }
    }
    packed
}

/// Gives back what was packed, if it has at most `max_bytes`. Allocates no more than twice that plus 8 MiB, whatever the
/// input says. The result is as good as its origin: check it with [`Toc::check`](crate::Toc::check).
///
/// # Errors
/// [`FormatError::Magic`] for other bytes, [`FormatError::Damaged`] for what does not unpack or is too long.
pub fn unpack(packed: &[u8], max_bytes: u64) -> Result<Vec<u8>, FormatError> {
    let (prefix, body) = packed.split_at_checked(PREFIX).ok_or(FormatError::Magic)?;
    if prefix[..8] != PACK_MAGIC {
        return Err(FormatError::Magic);
    }
    let length = u64::read_from_bytes(&prefix[8..16]).map_err(|_| FormatError::Magic)?;
    let length = usize::try_from(u64::from_le(length)).map_err(|_| damaged("packed TOC is too long"))?;
    if length as u64 > max_bytes {
        return Err(damaged("packed TOC is too long"));
    }
    match prefix[16] {
        STORED if body.len() == length => Ok(body.to_vec()),
        COLUMNS => restored(decompress(body, length)?),
        _ => Err(damaged("packed TOC has an unknown form")),
    }
}

/// Exactly `length` bytes, allocated as they come.
fn decompress(body: &[u8], length: usize) -> Result<Vec<u8>, FormatError> {
    let unreadable = |_| damaged("packed TOC cannot be decompressed");
    let mut decoder = zstd::stream::read::Decoder::with_buffer(body).map_err(unreadable)?;
    decoder.window_log_max(WINDOW_LOG_MAX).map_err(unreadable)?;
    let mut columns = Vec::new();
    decoder.take(length as u64 + 1).read_to_end(&mut columns).map_err(unreadable)?;
    if columns.len() == length { Ok(columns) } else { Err(damaged("packed TOC has another length than it says")) }
}

/// Number of records of each table before the strings, if the bytes are a TOC by their lengths.
fn layout(header: &[u8], length: usize) -> Option<[usize; RECORD_SIZES.len()]> {
    let (header, _) = Header::read_from_prefix(header).ok()?;
    if header.magic != MAGIC {
        return None;
    }
    let mut end = size_of::<Header>();
    let mut counts = [0; RECORD_SIZES.len()];
    for ((kept, count), size) in counts.iter_mut().zip(&header.counts).zip(RECORD_SIZES) {
        *kept = count.get() as usize;
        end = kept.checked_mul(size).and_then(|bytes| end.checked_add(bytes))?;
    }
    (end <= length).then_some(counts)
}

fn rewritten(canonical: &[u8]) -> Option<Vec<u8>> {
    let counts = layout(canonical, canonical.len())?;
    let (header, mut rest) = canonical.split_at(size_of::<Header>());
    let mut output = Vec::with_capacity(canonical.len());
    output.extend_from_slice(header);
    for (table, (count, size)) in counts.into_iter().zip(RECORD_SIZES).enumerate() {
        let (records, after) = rest.split_at(count * size);
        rest = after;
        let mut records = records.to_vec();
        rewrite(table, Direction::Pack, &mut records);
        for byte in 0..size {
            output.extend(records.iter().skip(byte).step_by(size));
        }
    }
    output.extend_from_slice(rest);
    Some(output)
}

fn restored(mut columns: Vec<u8>) -> Result<Vec<u8>, FormatError> {
    let counts = layout(&columns, columns.len()).ok_or(damaged("packed TOC does not add up"))?;
    let mut rest = columns.get_mut(size_of::<Header>()..).ok_or(damaged("packed TOC does not add up"))?;
    for (table, (count, size)) in counts.into_iter().zip(RECORD_SIZES).enumerate() {
        let (place, after) = rest.split_at_mut(count * size);
        rest = after;
        let mut records = vec![0; place.len()];
        for byte in 0..size {
            let column = &place[byte * count..(byte + 1) * count];
            for (to, from) in records.iter_mut().skip(byte).step_by(size).zip(column) {
                *to = *from;
            }
        }
        rewrite(table, Direction::Unpack, &mut records);
        place.copy_from_slice(&records);
    }
    Ok(columns)
}
