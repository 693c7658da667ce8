//! The bytes of a view: fixed little-endian records, read in place. The crate's README is the specification.

use std::io;

use millstream_toc::FormatError;
use zerocopy::little_endian::{I64, U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First eight bytes of every view.
pub(crate) const MAGIC: [u8; 8] = *b"msview\0\x01";
/// Version of the bytes that this crate reads and writes. It also stands for the merge rules: whoever changes what a view shows
/// raises it, so that stored views are built again.
pub const VERSION: u32 = 2;
/// "None" in index fields.
pub(crate) const NONE: u32 = u32::MAX;
/// [`DirectoryRecord::layer`] of a directory whose attributes are an [`AttributeRecord`].
pub(crate) const NO_LAYER: u16 = u16::MAX;

/// Why there is no view.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// Not a view at all.
    #[error("not a view: wrong magic")]
    Magic,
    /// Written by another version; build it again.
    #[error("view has format version {found}, this program reads {VERSION}")]
    Version {
        /// The version that was found.
        found: u32,
    },
    /// A table or a reference leaves the file, or a field has a value that cannot occur; build it again.
    #[error("damaged view: {what}")]
    Damaged {
        /// Which rule is broken.
        what: &'static str,
    },
    /// The view was built from other layers than the given ones.
    #[error("view was built from other layers: {what}")]
    OtherLayers {
        /// What differs.
        what: &'static str,
    },
    /// A layer's TOC cannot be read.
    #[error("cannot read the TOC of layer {layer}")]
    Layer {
        /// Number of the layer.
        layer: u32,
        /// What is wrong with it.
        #[source]
        source: FormatError,
    },
    /// What is below the run cannot be looked at.
    #[error("cannot look at the local layers below the run")]
    Below(#[source] io::Error),
    /// A run, or the number of a layer or view, is outside the limits of this crate.
    #[error("no view possible: {what}")]
    Limit {
        /// Which limit.
        what: &'static str,
    },
}

/// [`ViewError::Damaged`] with the rule that is broken.
pub(crate) const fn damaged(what: &'static str) -> ViewError {
    ViewError::Damaged { what }
}

/// Fixed head of a view; the tables follow in the order of the counts.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Header {
    /// [`MAGIC`].
    pub(crate) magic: [u8; 8],
    /// [`VERSION`].
    pub(crate) version: U32,
    /// Number of [`LayerRecord`]s, [`DirectoryRecord`]s, [`EntryRecord`]s, [`AttributeRecord`]s, and bytes of attribute text.
    pub(crate) counts: [U32; 5],
}

/// A layer of the run, bottom first: what the view was built from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct LayerRecord {
    /// Number of the layer.
    pub(crate) number: U32,
    /// Number of inodes of its TOC.
    pub(crate) inodes: U32,
    /// SHA-256 of its blob.
    pub(crate) blob_digest: [u8; 32],
}

/// The directory shows `trusted.overlay.opaque`.
pub(crate) const FLAG_OPAQUE: u16 = 1;

/// One directory of the view; directory 0 is its root.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct DirectoryRecord {
    /// The directory it is in; [`NONE`] for the root.
    pub(crate) parent: U32,
    /// Its first [`EntryRecord`].
    pub(crate) first: U32,
    /// Number of its entries, which are consecutive and sorted by name.
    pub(crate) count: U32,
    /// Links, as overlayfs counts them; never 0.
    pub(crate) nlink: U32,
    /// Where its attributes are: an inode of `layer`'s TOC, or an [`AttributeRecord`] if `layer` is [`NO_LAYER`].
    pub(crate) attributes: U32,
    /// Position in the table of layers, or [`NO_LAYER`].
    pub(crate) layer: U16,
    /// [`FLAG_OPAQUE`].
    pub(crate) flags: U16,
}

/// [`EntryRecord::kind`]: an inode of the layer that has the name; `target` is its index.
pub(crate) const ENTRY_INODE: u16 = 1;
/// [`EntryRecord::kind`]: a directory; `target` is its [`DirectoryRecord`].
pub(crate) const ENTRY_DIRECTORY: u16 = 2;
/// [`EntryRecord::kind`]: a whiteout that is shown; `target` is [`NONE`].
pub(crate) const ENTRY_WHITEOUT: u16 = 3;

/// One name in a directory of the view. The text of the name stays in the TOC of the topmost layer that has it.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct EntryRecord {
    /// Position of the layer in the table of layers.
    pub(crate) layer: U16,
    /// One of the `ENTRY_` constants; never 0, so that a page that turned to zeros is noticed.
    pub(crate) kind: U16,
    /// Inode of the directory, in that layer's TOC, that has the name.
    pub(crate) directory: U32,
    /// Position of the name among the children of that directory.
    pub(crate) position: U32,
    /// See the `ENTRY_` constants.
    pub(crate) target: U32,
}

/// Attributes of a directory that no inode of the run has.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct AttributeRecord {
    /// Permission bits (07777).
    pub(crate) mode: U16,
    /// 1, so that a page that turned to zeros is noticed.
    pub(crate) present: U16,
    /// Owner.
    pub(crate) uid: U32,
    /// Group.
    pub(crate) gid: U32,
    /// Nanoseconds of the modification time, below 10^9.
    pub(crate) mtime_nsec: U32,
    /// Seconds of the modification time since 1970.
    pub(crate) mtime_sec: I64,
    /// Its extended attributes in the attribute text: offset.
    pub(crate) xattrs_off: U32,
    /// Number of bytes.
    pub(crate) xattrs_len: U32,
}

/// Head of one extended attribute in the attribute text; name and value follow.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct XattrHead {
    /// Bytes of the name.
    pub(crate) name_len: U32,
    /// Bytes of the value.
    pub(crate) value_len: U32,
}
