//! What `stat` and `listxattr` show of a node.

use millstream_toc::format::Kind;
use millstream_toc::read::Inode;
use millstream_toc::{FormatError, Toc};

use crate::node_id::NodeId;
use crate::view_format::AttributeRecord;

/// Size that every directory shows, in bytes.
const DIRECTORY_SIZE: u64 = 4096;
/// Blocks that every directory shows. ext4 gives its own, btrfs 0: overlayfs itself is no fixed oracle here.
const DIRECTORY_BLOCKS: u64 = 8;
/// Content is kept in whole blocks of this many bytes.
const BLOCK: u64 = 4096;
/// The unit of `st_blocks`.
const SECTOR: u64 = 512;

/// Attributes of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// The node.
    pub id: NodeId,
    /// File type.
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky (07777).
    pub perm: u16,
    /// Number of links. A directory that several layers share has 1, as on overlayfs.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Major and minor number of a device, else (0, 0).
    pub rdev: (u32, u32),
    /// Bytes: the content of a regular file, the text of a symbolic link; 4096 for directories, else 0.
    pub size: u64,
    /// Units of 512 bytes: the content of a regular file rounded up to 4 KiB, 8 for directories, else 0.
    pub blocks: u64,
    /// Modification time: seconds since 1970, and nanoseconds (below 10^9) after that second.
    pub mtime: (i64, u32),
}

impl Attr {
    /// Of an inode that is not a directory.
    pub(crate) fn of_inode(id: NodeId, toc: &Toc, inode: &Inode<'_>) -> Result<Self, FormatError> {
        let size = toc.size(inode)?;
        let blocks = if inode.kind() == Kind::Regular { size.div_ceil(BLOCK) * (BLOCK / SECTOR) } else { 0 };
        Ok(Self {
            id,
            kind: inode.kind(),
            perm: inode.mode(),
            nlink: inode.nlink(),
            uid: inode.uid(),
            gid: inode.gid(),
            rdev: inode.rdev(),
            size,
            blocks,
            mtime: inode.mtime(),
        })
    }

    /// Of a directory that looks like `inode`.
    pub(crate) const fn of_directory(id: NodeId, inode: &Inode<'_>, nlink: u32) -> Self {
        let (uid, gid) = (inode.uid(), inode.gid());
        Self { perm: inode.mode(), uid, gid, mtime: inode.mtime(), ..Self::plain_directory(id, nlink) }
    }

    /// Of a directory that no inode describes.
    pub(crate) const fn of_record(id: NodeId, record: &AttributeRecord, nlink: u32) -> Self {
        Self {
            perm: record.mode.get(),
            uid: record.uid.get(),
            gid: record.gid.get(),
            mtime: (record.mtime_sec.get(), record.mtime_nsec.get()),
            ..Self::plain_directory(id, nlink)
        }
    }

    /// 0755 root:root, from 1970.
    pub(crate) const fn plain_directory(id: NodeId, nlink: u32) -> Self {
        Self {
            id,
            kind: Kind::Directory,
            perm: 0o755,
            nlink,
            uid: 0,
            gid: 0,
            rdev: (0, 0),
            size: DIRECTORY_SIZE,
            blocks: DIRECTORY_BLOCKS,
            mtime: (0, 0),
        }
    }

    /// What overlayfs takes for a whiteout: a character device 0:0, here as overlayfs makes them itself (mode 0, root:root).
    pub(crate) const fn whiteout(id: NodeId) -> Self {
        Self {
            id,
            kind: Kind::CharDevice,
            perm: 0,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: (0, 0),
            size: 0,
            blocks: 0,
            mtime: (0, 0),
        }
    }
}

/// Whether an extended attribute of a layer is shown. `trusted.` is never taken from an archive by containerd, and would let
/// an image steer overlayfs; `user.` exists on regular files and directories only (xattr(7)), so containerd leaves it out
/// elsewhere.
pub(crate) fn shows_xattr(kind: Kind, name: &[u8]) -> bool {
    if name.starts_with(b"user.") {
        return matches!(kind, Kind::Regular | Kind::Directory);
    }
    !name.starts_with(b"trusted.")
}
