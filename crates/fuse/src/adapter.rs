//! `fuser::Filesystem` over `LayerFs`.

use std::ffi::OsStr;
use std::future::Future;
use std::os::unix::ffi::OsStrExt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyOpen, ReplyStatfs, ReplyXattr, Request,
};
use millstream_layerfs::{Attr, FsError, LayerFs, NodeId};
use millstream_source::names;
use millstream_toc::DataRange;
use millstream_toc::format::Kind;
use tokio::runtime::Handle;
use tracing::{Instrument, debug, debug_span, info, warn};

use crate::errno;
use crate::journal::{Begun, Entry, Journal, Operation};

/// Images never change, so the kernel may keep what it was told. (The kernel counts in jiffies and caps what is too long.)
const FOR_EVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
/// Names in the mount's root come and go with their views.
const NOT_AT_ALL: Duration = Duration::ZERO;
/// Bytes that the kernel may ask for in one read.
pub const MAX_READ: u32 = 1024 * 1024;
/// Bytes that the kernel reads around a page fault or ahead of a reader: its own default. A mapped library is touched here
/// and there, and each touch asks for this much; the fetcher looks ahead by itself where it pays.
const MAX_READAHEAD: u32 = 128 * 1024;
/// Background requests (read-ahead) that the kernel may have under way at once.
const MAX_BACKGROUND: u16 = 64;
/// Bytes of a listing that is asked for again: what is noted of the request does not say how many the kernel has room for, and
/// it has room for a page at least.
const DIRECTORY: u32 = 4096;
/// What `stat(2)` names as the preferred size of reads, in bytes.
const BLOCK_SIZE: u32 = 4096;

/// Why bytes could not be given. The cause is logged where it is known; the kernel only learns which errno.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ContentError {
    /// The layer is no longer on this node.
    #[error("layer is no longer on this node")]
    Gone,
    /// No source gave the bytes within the bound.
    #[error("content is not available")]
    Unavailable,
}

/// Answer that arrives later.
pub type Later<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Bytes of one file as the kernel asks for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadRequest {
    /// Number of the layer.
    pub layer: u32,
    /// The file, for messages and for read-around.
    pub node: NodeId,
    /// Whole content of the file.
    pub file: DataRange,
    /// What is wanted of it; never empty, never beyond `file`.
    pub wanted: DataRange,
}

/// Gives file content.
pub trait Content: Send + Sync + 'static {
    /// The bytes, if all of them are local; `None` if something must be fetched. Does not wait for the network.
    ///
    /// # Errors
    /// [`ContentError`].
    fn read_local(&self, request: &ReadRequest) -> Result<Option<Vec<u8>>, ContentError>;

    /// The bytes, fetched as far as needed. Ends within a bound of the implementation's own.
    fn read_remote(&self, request: ReadRequest) -> Later<Result<Vec<u8>, ContentError>>;

    /// A request about `node` was in flight at two deaths running. It is answered with an error; what it is about had better
    /// not be touched again.
    fn took_workers_along(&self, node: NodeId, operation: Operation);
}

/// Kernel requests, answered from a [`LayerFs`] and a [`Content`].
pub struct Adapter<C> {
    fs: Arc<LayerFs>,
    content: Arc<C>,
    runtime: Handle,
    journal: Option<Arc<Journal>>,
}

impl<C> Clone for Adapter<C> {
    fn clone(&self) -> Self {
        Self {
            fs: Arc::clone(&self.fs),
            content: Arc::clone(&self.content),
            runtime: self.runtime.clone(),
            journal: self.journal.clone(),
        }
    }
}

impl<C> std::fmt::Debug for Adapter<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Adapter").finish_non_exhaustive()
    }
}

impl<C: Content> Adapter<C> {
    /// Answers of reads that wait for other sources run on `runtime`. What is being worked on is noted in `journal`; without
    /// one, a death on an old kernel leaves programs waiting, and a request that kills each worker goes on doing so.
    pub fn new(fs: Arc<LayerFs>, content: Arc<C>, runtime: Handle, journal: Option<Arc<Journal>>) -> Self {
        Self { fs, content, runtime, journal }
    }

    /// To be called before the work on a request begins, and kept until it is answered. `None`: it is not to be worked on.
    fn begin(&self, request: &Request, operation: Operation, about: (INodeNo, u64, u32), name: &[u8]) -> Option<Entry> {
        let Some(journal) = &self.journal else { return Some(Entry::none()) };
        let (INodeNo(node), offset, size) = about;
        match journal.begin(request.unique().0, operation as u32, (node, offset, size), name) {
            Begun::Serve(entry) => Some(entry),
            Begun::Refuse => {
                self.content.took_workers_along(NodeId::from_raw(node), operation);
                None
            }
        }
    }

    fn request(&self, node: NodeId, offset: u64, size: u32) -> Result<Option<ReadRequest>, FsError> {
        let file = self.fs.file(node)?;
        let start = file.data.start.saturating_add(offset).min(file.data.end);
        let end = start.saturating_add(u64::from(size)).min(file.data.end);
        let wanted = DataRange::new(start, end);
        Ok((!wanted.is_empty()).then_some(ReadRequest { layer: file.layer, node, file: file.data, wanted }))
    }
}

/// Features of the kernel that are used where it has them.
const WANTED: [(InitFlags, &str); 7] = [
    (InitFlags::FUSE_PARALLEL_DIROPS, "parallel directory operations"),
    (InitFlags::FUSE_CACHE_SYMLINKS, "cached symlinks"),
    (InitFlags::FUSE_DO_READDIRPLUS, "readdirplus"),
    (InitFlags::FUSE_READDIRPLUS_AUTO, "adaptive readdirplus"),
    (InitFlags::FUSE_POSIX_ACL, "POSIX ACLs"),
    (InitFlags::FUSE_ALLOW_IDMAP, "idmapped mounts"),
    (InitFlags::FUSE_HAS_RESEND, "resend of requests"),
];

impl<C: Content> Filesystem for Adapter<C> {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        for (flag, feature) in WANTED {
            let available = config.add_capabilities(flag).is_ok();
            debug!(feature, available, "kernel feature");
        }
        // Either may be more than this kernel allows; then its own limit stays.
        let _ = config.set_max_write(MAX_READ);
        let _ = config.set_max_readahead(MAX_READAHEAD);
        let _ = config.set_max_background(MAX_BACKGROUND);
        info!(abi = %config.kernel_abi(), "FUSE connection ready");
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let Some(_entry) = self.begin(request, Operation::LookUp, (parent, 0, 0), name.as_bytes()) else {
            return reply.error(Errno::EIO);
        };
        let parent = NodeId::from_raw(parent.0);
        let ttl = if parent == NodeId::ROOT { NOT_AT_ALL } else { FOR_EVER };
        match self.fs.lookup(parent, name.as_bytes()) {
            Ok(entry) => reply.entry_with_ttls(&FOR_EVER, &ttl, &file_attr(&entry.attr), Generation(0)),
            // Node id 0 is "no such name, and you may remember that".
            Err(FsError::NotFound) if ttl == FOR_EVER => reply.entry(&FOR_EVER, &absent(), Generation(0)),
            Err(error) => reply.error(refused("lookup", parent, &error)),
        }
    }

    fn forget(&self, request: &Request, _ino: INodeNo, _lookups: u64) {
        // Nothing is kept, and nobody waits. But it takes a number, of which there must not be many that the journal has not seen.
        if let Some(journal) = &self.journal {
            journal.saw(request.unique().0);
        }
    }

    fn getattr(&self, request: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let Some(_entry) = self.begin(request, Operation::GetAttr, (ino, 0, 0), b"") else {
            return reply.error(Errno::EIO);
        };
        let node = NodeId::from_raw(ino.0);
        match self.fs.attr(node) {
            Ok(attr) => reply.attr(if node == NodeId::ROOT { &NOT_AT_ALL } else { &FOR_EVER }, &file_attr(&attr)),
            Err(error) => reply.error(refused("getattr", node, &error)),
        }
    }

    fn readlink(&self, request: &Request, ino: INodeNo, reply: ReplyData) {
        let Some(_entry) = self.begin(request, Operation::ReadLink, (ino, 0, 0), b"") else {
            return reply.error(Errno::EIO);
        };
        let node = NodeId::from_raw(ino.0);
        match self.fs.read_link(node) {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(refused("readlink", node, &error)),
        }
    }

    fn open(&self, request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let Some(_entry) = self.begin(request, Operation::Open, (ino, 0, 0), b"") else {
            return reply.error(Errno::EIO);
        };
        // Nothing is kept for a file that is open. Told so, the kernel opens by itself from now on, keeps the cache, and sends no
        // release: a fifth of all requests of a program that reads many small files. The mount is read-only, so opens for writing
        // never come here.
        reply.error(Errno::ENOSYS);
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(entry) = self.begin(request, Operation::Read, (ino, offset, size), b"") else {
            return reply.error(Errno::EIO);
        };
        let node = NodeId::from_raw(ino.0);
        let request = match self.request(node, offset, size) {
            Ok(Some(request)) => request,
            Ok(None) => return reply.data(&[]),
            Err(error) => return reply.error(refused("read", node, &error)),
        };
        match self.content.read_local(&request) {
            Ok(Some(bytes)) => reply.data(&bytes),
            Ok(None) => {
                let content = Arc::clone(&self.content);
                // What is logged on the way to the bytes names the read. Reads of what is local are too many for that.
                let span = debug_span!("read", ?node, { names::OFFSET } = offset, { names::SIZE } = size);
                let answer = async move {
                    match content.read_remote(request).await {
                        Ok(bytes) => reply.data(&bytes),
                        Err(error) => reply.error(errno::of_content(&error)),
                    }
                    drop(entry);
                };
                self.runtime.spawn(answer.instrument(span));
            }
            Err(error) => reply.error(errno::of_content(&error)),
        }
    }

    /// There are none. Asked for the flags of `lsattr(1)` by overlayfs for every file that it copies up, so it is not worth a line.
    fn ioctl(
        &self,
        request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        if let Some(journal) = &self.journal {
            journal.saw(request.unique().0);
        }
        reply.error(Errno::ENOSYS);
    }

    fn opendir(&self, request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let Some(_entry) = self.begin(request, Operation::OpenDir, (ino, 0, 0), b"") else {
            return reply.error(Errno::EIO);
        };
        let cache = FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE;
        let flags = if NodeId::from_raw(ino.0) == NodeId::ROOT { FopenFlags::empty() } else { cache };
        reply.opened(FileHandle(0), flags);
    }

    fn readdir(&self, request: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let Some(_entry) = self.begin(request, Operation::ReadDir, (ino, offset, DIRECTORY), b"") else {
            return reply.error(Errno::EIO);
        };
        let node = NodeId::from_raw(ino.0);
        let result = self.fs.read_dir(node, offset, &mut |entry| {
            reply.add(
                INodeNo(entry.id.raw()),
                entry.offset_of_next,
                file_type(entry.kind),
                OsStr::from_bytes(entry.name),
            )
        });
        match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(refused("readdir", node, &error)),
        }
    }

    fn readdirplus(
        &self,
        request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let Some(_entry) = self.begin(request, Operation::ReadDirPlus, (ino, offset, DIRECTORY), b"") else {
            return reply.error(Errno::EIO);
        };
        let node = NodeId::from_raw(ino.0);
        let ttl = if node == NodeId::ROOT { NOT_AT_ALL } else { FOR_EVER };
        let mut failed = None;
        let result = self.fs.read_dir(node, offset, &mut |entry| match self.fs.attr(entry.id) {
            Ok(attr) => {
                let (attr, name) = (file_attr(&attr), OsStr::from_bytes(entry.name));
                reply.add(attr.ino, entry.offset_of_next, name, &ttl, &attr, Generation(0))
            }
            Err(error) => {
                failed = Some(error);
                true
            }
        });
        match result.and(failed.map_or(Ok(()), Err)) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(refused("readdirplus", node, &error)),
        }
    }

    fn release(
        &self,
        request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        // Of files that were opened before a version that needs no open. Noted all the same: a release that is never answered
        // holds one of the requests that the kernel may have under way in the background.
        let Some(_entry) = self.begin(request, Operation::Release, (ino, 0, 0), b"") else {
            return reply.error(Errno::EIO);
        };
        reply.ok();
    }

    fn releasedir(&self, request: &Request, ino: INodeNo, _fh: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        let Some(_entry) = self.begin(request, Operation::ReleaseDir, (ino, 0, 0), b"") else {
            return reply.error(Errno::EIO);
        };
        reply.ok();
    }

    fn statfs(&self, request: &Request, ino: INodeNo, reply: ReplyStatfs) {
        let Some(_entry) = self.begin(request, Operation::StatFs, (ino, 0, 0), b"") else {
            return reply.error(Errno::EIO);
        };
        // Read-only and full, as an image is: no free blocks, no free inodes.
        reply.statfs(0, 0, 0, 0, 0, BLOCK_SIZE, 255, BLOCK_SIZE);
    }

    fn getxattr(&self, request: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let Some(_entry) = self.begin(request, Operation::GetXattr, (ino, 0, size), name.as_bytes()) else {
            return reply.error(Errno::EIO);
        };
        let node = NodeId::from_raw(ino.0);
        match self.fs.xattr(node, name.as_bytes()) {
            Ok(Some(value)) => answer_xattr(&value, size, reply),
            Ok(None) => reply.error(Errno::NO_XATTR),
            Err(error) => reply.error(refused("getxattr", node, &error)),
        }
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let Some(_entry) = self.begin(request, Operation::ListXattr, (ino, 0, size), b"") else {
            return reply.error(Errno::EIO);
        };
        let node = NodeId::from_raw(ino.0);
        match self.fs.xattr_names(node) {
            Ok(names) => answer_xattr(&names, size, reply),
            Err(error) => reply.error(refused("listxattr", node, &error)),
        }
    }

    fn flush(&self, request: &Request, ino: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        let Some(_entry) = self.begin(request, Operation::Flush, (ino, 0, 0), b"") else {
            return reply.error(Errno::EIO);
        };
        // Nothing is ever written here. The kernel does not ask again.
        reply.error(Errno::ENOSYS);
    }
}

/// Answers a request for extended attributes: `size` 0 asks how long the answer is, else it is the caller's room.
fn answer_xattr(value: &[u8], size: u32, reply: ReplyXattr) {
    let Ok(len) = u32::try_from(value.len()) else { return reply.error(Errno::E2BIG) };
    if size == 0 {
        reply.size(len);
    } else if len > size {
        reply.error(Errno::ERANGE);
    } else {
        reply.data(value);
    }
}

fn refused(operation: &'static str, node: NodeId, error: &FsError) -> Errno {
    match error {
        FsError::DamagedLayer { .. } | FsError::DamagedView { .. } => {
            warn!({ names::CODE } = "layerfs.damaged", operation, ?node, %error, "request failed")
        }
        _ => debug!(operation, ?node, %error, "request refused"),
    }
    errno::of_fs(error)
}

const fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::Regular => FileType::RegularFile,
        Kind::Symlink => FileType::Symlink,
        Kind::CharDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
        Kind::Fifo => FileType::NamedPipe,
    }
}

fn file_attr(attr: &Attr) -> FileAttr {
    let (seconds, nanoseconds) = attr.mtime;
    let time = if seconds >= 0 {
        UNIX_EPOCH + Duration::new(seconds.unsigned_abs(), nanoseconds)
    } else {
        // Nanoseconds count forward from the second, also before 1970.
        UNIX_EPOCH - Duration::from_secs(seconds.unsigned_abs()) + Duration::from_nanos(u64::from(nanoseconds))
    };
    FileAttr {
        ino: INodeNo(attr.id.raw()),
        size: attr.size,
        blocks: attr.blocks,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: file_type(attr.kind),
        perm: attr.perm,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: device_number(attr.rdev),
        blksize: BLOCK_SIZE,
        flags: 0,
    }
}

/// The 32-bit encoding of a device number in the FUSE protocol (`new_encode_dev` of the kernel): 12 bits of major, 20 of
/// minor.
const fn device_number((major, minor): (u32, u32)) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & !0xff) << 12)
}

fn absent() -> FileAttr {
    let epoch: SystemTime = UNIX_EPOCH;
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: epoch,
        mtime: epoch,
        ctime: epoch,
        crtime: epoch,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_encoded_as_the_kernel_decodes_them() {
        // new_decode_dev: major = (dev & 0xfff00) >> 8, minor = (dev & 0xff) | ((dev >> 12) & 0xfff00)
        for (major, minor) in [(1, 3), (8, 0), (259, 1_048_575), (4095, 256), (0, 0)] {
            let dev = device_number((major, minor));
            assert_eq!(((dev & 0xf_ff00) >> 8, (dev & 0xff) | ((dev >> 12) & 0xf_ff00)), (major, minor));
        }
    }
}
