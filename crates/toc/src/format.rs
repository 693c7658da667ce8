//! The bytes of a TOC: fixed little-endian records, read in place. `FORMAT.md` is the specification.

use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First eight bytes of every TOC.
pub const MAGIC: [u8; 8] = *b"mstoc\0\0\x01";
/// Version of the canonical form that this crate writes.
pub const VERSION: u32 = 1;
/// Size of a chunk in bytes; only the last chunk of a file is shorter.
pub const CHUNK_SIZE: u64 = 32 * 1024;
/// Alignment of every content in the data address space, in bytes.
pub const DATA_ALIGN: u64 = 4096;
/// A checkpoint is made at the first block boundary after this many bytes of output.
pub const SPAN_SIZE: u64 = 1024 * 1024;
/// A span with more bytes of output than this is closed: nobody enters it. Its content is read elsewhere or with the whole
/// blob.
pub const MAX_SPAN: u64 = 16 * 1024 * 1024;
/// A zstd frame may not ask for more history than this many bytes: as much as `zstd` itself decompresses without being told
/// to. containerd takes four times as much.
pub const MAX_FRAME_WINDOW: u64 = 128 * 1024 * 1024;
/// Bytes of a chunk or window digest (BLAKE3, truncated).
pub const SHORT_DIGEST: usize = 16;
/// [`SpanRecord::start`]: raw deflate follows, a window is needed.
pub const START_DEFLATE: u8 = 0;
/// [`SpanRecord::start`]: the header of a gzip member follows.
pub const START_MEMBER: u8 = 1;
/// [`SpanRecord::start`]: plain bytes follow.
pub const START_PLAIN: u8 = 2;
/// [`SpanRecord::start`]: a zstd frame follows.
pub const START_FRAME: u8 = 3;
/// "None" in every index field.
pub const NONE: u32 = u32::MAX;

/// Index of an inode record. The root directory is 0.
pub type InodeIx = u32;
/// Index of a content record.
pub type ContentIx = u32;
/// Index of a chunk digest.
pub type ChunkIx = u32;
/// Index of a span record.
pub type SpanIx = u32;

/// Why bytes are not a TOC that can be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Not a TOC at all.
    #[error("not a TOC: wrong magic")]
    Magic,
    /// Written by another version.
    #[error("TOC has format version {found}, this program reads {VERSION}")]
    Version {
        /// The version that was found.
        found: u32,
    },
    /// A table or a reference leaves the file, or a field has a value that cannot occur.
    #[error("damaged TOC: {what}")]
    Damaged {
        /// Which rule is broken.
        what: &'static str,
    },
}

/// Fixed head of a TOC.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// [`VERSION`].
    pub version: U32,
    /// [`Compression`](crate::build::Compression) of the blob: 0 plain tar, 1 gzip, 2 zstd.
    pub compression: U32,
    /// SHA-256 of the blob.
    pub blob_digest: [u8; 32],
    /// SHA-256 of the tar.
    pub diff_id: [u8; 32],
    /// Bytes of the blob.
    pub blob_size: U64,
    /// Bytes of the tar.
    pub tar_size: U64,
    /// Bytes of the data address space (aligned end of the last content).
    pub data_size: U64,
    /// Number of [`InodeRecord`]s, [`DirentRecord`]s, [`ContentRecord`]s, chunk digests, [`ExtentRecord`]s, [`XattrSetRecord`]s,
    /// [`XattrRecord`]s, [`SpanRecord`]s, and of bytes in the string table; the tables follow the header in this order.
    pub counts: [U32; 9],
    /// Zero.
    pub reserved: U32,
}

/// Kind of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs, reason = "POSIX file types")]
pub enum Kind {
    Directory = 1,
    Regular = 2,
    Symlink = 3,
    CharDevice = 4,
    BlockDevice = 5,
    Fifo = 6,
}

/// The layer has no entry of its own for this directory; it was created because something is below it.
pub const FLAG_IMPLIED: u8 = 1;
/// Nothing of lower layers shows through this directory.
pub const FLAG_OPAQUE: u8 = 2;
/// The layer describes this directory after something in it: what it had from below until then, its extended attributes, stays
/// where the layer names no other.
pub const FLAG_LATE: u8 = 4;

/// Attributes of one inode.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct InodeRecord {
    /// [`Kind`].
    pub kind: u8,
    /// [`FLAG_IMPLIED`], [`FLAG_OPAQUE`], [`FLAG_LATE`]; directories only.
    pub flags: u8,
    /// Permission bits with setuid, setgid, sticky (07777).
    pub mode: U16,
    /// Owner.
    pub uid: U32,
    /// Group.
    pub gid: U32,
    /// Nanoseconds of the modification time, below 10^9.
    pub mtime_nsec: U32,
    /// Seconds of the modification time since 1970.
    pub mtime_sec: I64,
    /// Directories: 2 + subdirectories of this layer; others: number of names in this layer.
    pub nlink: U32,
    /// Index of an [`XattrSetRecord`] or [`NONE`].
    pub xattrs: U32,
    /// Directory: index of its first [`DirentRecord`]. Regular: [`ContentIx`] or [`NONE`] if empty. Symlink: offset of the
    /// text in the string table. Device: major.
    pub a: U32,
    /// Directory: number of entries. Symlink: length of the text. Device: minor. Regular: zero.
    pub b: U32,
}

/// One name in a directory. The names of a directory are consecutive and sorted by their bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DirentRecord {
    /// Offset of the name in the string table.
    pub name_off: U32,
    /// Length of the name, 1 to 255.
    pub name_len: U16,
    /// Zero.
    pub reserved: U16,
    /// The inode, or [`NONE`] for a whiteout of this name.
    pub inode: U32,
}

/// The content of one regular file that is not empty, in the order of the tar.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ContentRecord {
    /// Bytes of the file.
    pub size: U64,
    /// Where it starts in the data address space; a multiple of [`DATA_ALIGN`], ascending.
    pub data_off: U64,
    /// Where its bytes start in the tar, ascending; for sparse files where the first extent starts.
    pub tar_off: U64,
    /// Its first chunk; it has `ceil(size / CHUNK_SIZE)`.
    pub first_chunk: U32,
    /// First [`ExtentRecord`] of a sparse file, else [`NONE`].
    pub first_extent: U32,
    /// Number of extents.
    pub extents: U32,
}

/// Stored part of a sparse file; what no extent covers is zeros.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtentRecord {
    /// Offset in the file, ascending.
    pub file_off: U64,
    /// Offset in the tar, ascending.
    pub tar_off: U64,
    /// Bytes.
    pub len: U64,
}

/// Extended attributes of an inode: consecutive [`XattrRecord`]s, sorted by name. Equal sets are stored once.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct XattrSetRecord {
    /// First record.
    pub first: U32,
    /// Number of records.
    pub count: U32,
}

/// One extended attribute.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct XattrRecord {
    /// Name in the string table.
    pub name_off: U32,
    /// Length of the name.
    pub name_len: U32,
    /// Value in the string table.
    pub value_off: U32,
    /// Length of the value.
    pub value_len: U32,
}

/// A place where decompression can start. Span `i` ends where span `i + 1` starts; the last one at the end of the blob.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SpanRecord {
    /// First compressed byte that is needed. If `bits` is not zero, only the upper `bits` bits of that byte are.
    pub blob_off: U64,
    /// First byte of output.
    pub tar_off: U64,
    /// Bits (0 to 7) of the byte at `blob_off` that belong to this span.
    pub bits: u8,
    /// [`START_DEFLATE`], [`START_MEMBER`], [`START_PLAIN`] or [`START_FRAME`]; only the first needs a window.
    pub start: u8,
    /// Zero.
    pub reserved: U16,
    /// Bytes of the window, at most 32768.
    pub window_len: U32,
    /// BLAKE3 of the raw window, truncated; zero when there is none.
    pub window_digest: [u8; SHORT_DIGEST],
}
