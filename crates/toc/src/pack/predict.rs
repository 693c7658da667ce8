//! What a field of a record follows from. In a TOC as it is built nearly every prediction of a position is right, so that
//! the column becomes zeros.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use crate::format::{
    CHUNK_SIZE, ContentRecord, DATA_ALIGN, DirentRecord, ExtentRecord, InodeRecord, Kind, NONE, SHORT_DIGEST,
    SPAN_SIZE, SpanRecord, XattrRecord, XattrSetRecord,
};

/// Bytes of one record of each table before the string table, in the order of the file.
pub(super) const RECORD_SIZES: [usize; 8] = [
    size_of::<InodeRecord>(),
    size_of::<DirentRecord>(),
    size_of::<ContentRecord>(),
    SHORT_DIGEST,
    size_of::<ExtentRecord>(),
    size_of::<XattrSetRecord>(),
    size_of::<XattrRecord>(),
    size_of::<SpanRecord>(),
];

/// A tar header and the unit to which content is padded.
const TAR_BLOCK: u64 = 512;

/// Which way a table is rewritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Pack,
    Unpack,
}

impl Direction {
    /// Exchanges the value in `field` and its difference to `predicted`; gives the value.
    fn u32(self, field: &mut U32, predicted: u32) -> u32 {
        let given = field.get();
        let (value, stored) = match self {
            Self::Pack => {
                let difference = given.wrapping_sub(predicted);
                (given, (difference << 1) ^ 0u32.wrapping_sub(difference >> 31))
            }
            Self::Unpack => {
                let value = ((given >> 1) ^ 0u32.wrapping_sub(given & 1)).wrapping_add(predicted);
                (value, value)
            }
        };
        *field = stored.into();
        value
    }

    /// The same for wide fields.
    fn u64(self, field: &mut U64, predicted: u64) -> u64 {
        let given = field.get();
        let (value, stored) = match self {
            Self::Pack => {
                let difference = given.wrapping_sub(predicted);
                (given, (difference << 1) ^ 0u64.wrapping_sub(difference >> 63))
            }
            Self::Unpack => {
                let value = ((given >> 1) ^ 0u64.wrapping_sub(given & 1)).wrapping_add(predicted);
                (value, value)
            }
        };
        *field = stored.into();
        value
    }
}

/// Rewrites the records of table number `table` in place.
pub(super) fn rewrite(table: usize, direction: Direction, bytes: &mut [u8]) {
    match table {
        0 => inodes(direction, bytes),
        1 => dirents(direction, bytes),
        2 => contents(direction, bytes),
        4 => extents(direction, bytes),
        5 => xattr_sets(direction, bytes),
        6 => xattrs(direction, bytes),
        7 => spans(direction, bytes),
        // Digests follow from nothing.
        _ => {}
    }
}

/// The bytes as records; none if they are not whole records, which the caller has made sure of.
fn records<T: FromBytes + IntoBytes + zerocopy::Immutable + zerocopy::KnownLayout>(bytes: &mut [u8]) -> &mut [T] {
    <[T]>::mut_from_bytes(bytes).unwrap_or_default()
}

fn inodes(direction: Direction, bytes: &mut [u8]) {
    let (mut seconds, mut entry, mut content, mut text) = (0, 0u32, 0u32, 0u32);
    for record in records::<InodeRecord>(bytes) {
        let mut time = U64::from_bytes(record.mtime_sec.to_bytes());
        seconds = direction.u64(&mut time, seconds);
        record.mtime_sec = zerocopy::little_endian::I64::from_bytes(time.to_bytes());
        let length = record.b.get();
        match record.kind {
            kind if kind == Kind::Directory as u8 => entry = direction.u32(&mut record.a, entry).wrapping_add(length),
            kind if kind == Kind::Symlink as u8 => text = direction.u32(&mut record.a, text).wrapping_add(length),
            kind if kind == Kind::Regular as u8 => {
                let value = direction.u32(&mut record.a, content);
                if value != NONE {
                    content = value.wrapping_add(1);
                }
            }
            _ => {}
        }
    }
}

fn dirents(direction: Direction, bytes: &mut [u8]) {
    let (mut name, mut inode) = (0u32, 1u32);
    for record in records::<DirentRecord>(bytes) {
        name = direction.u32(&mut record.name_off, name).wrapping_add(record.name_len.get().into());
        let value = direction.u32(&mut record.inode, inode);
        if value != NONE {
            inode = inode.max(value.wrapping_add(1));
        }
    }
}

fn contents(direction: Direction, bytes: &mut [u8]) {
    let (mut data, mut tar, mut chunk) = (0u64, TAR_BLOCK, 0u32);
    for record in records::<ContentRecord>(bytes) {
        let size = record.size.get();
        let padded = |to: u64| size.wrapping_add(to - 1) / to * to;
        data = direction.u64(&mut record.data_off, data).wrapping_add(padded(DATA_ALIGN));
        tar = direction.u64(&mut record.tar_off, tar).wrapping_add(padded(TAR_BLOCK)).wrapping_add(TAR_BLOCK);
        let chunks = size.div_ceil(CHUNK_SIZE);
        // More chunks than can be counted: any prediction will do, if it is the same on both sides.
        chunk = direction.u32(&mut record.first_chunk, chunk).wrapping_add(u32::try_from(chunks).unwrap_or(0));
    }
}

fn extents(direction: Direction, bytes: &mut [u8]) {
    let (mut file, mut tar) = (0u64, 0u64);
    for record in records::<ExtentRecord>(bytes) {
        let length = record.len.get();
        file = direction.u64(&mut record.file_off, file).wrapping_add(length);
        tar = direction.u64(&mut record.tar_off, tar).wrapping_add(length);
    }
}

fn xattr_sets(direction: Direction, bytes: &mut [u8]) {
    let mut first = 0u32;
    for record in records::<XattrSetRecord>(bytes) {
        first = direction.u32(&mut record.first, first).wrapping_add(record.count.get());
    }
}

fn xattrs(direction: Direction, bytes: &mut [u8]) {
    let mut end = 0u32;
    for record in records::<XattrRecord>(bytes) {
        end = direction.u32(&mut record.name_off, end).wrapping_add(record.name_len.get());
        end = direction.u32(&mut record.value_off, end).wrapping_add(record.value_len.get());
    }
}

fn spans(direction: Direction, bytes: &mut [u8]) {
    let (mut blob, mut tar) = (0u64, 0u64);
    for record in records::<SpanRecord>(bytes) {
        blob = direction.u64(&mut record.blob_off, blob);
        tar = direction.u64(&mut record.tar_off, tar).wrapping_add(SPAN_SIZE);
    }
}
