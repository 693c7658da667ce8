//! What a view asks about the local layers under its run.

use std::io;

/// Mode, owner, time and extended attributes of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectoryAttributes {
    /// Permission bits with setuid, setgid and sticky (07777).
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time: seconds since 1970, and nanoseconds (below 10^9) after that second.
    pub mtime: (i64, u32),
    /// Extended attributes, name and value. Those in `trusted.` are ignored: containerd does not copy them.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl DirectoryAttributes {
    /// What containerd gives to a directory that nothing describes: 0755 root:root. Its time would be that of unpacking; here
    /// it is 0, so that the same run always gives the same view.
    #[must_use]
    pub const fn fresh() -> Self {
        Self { mode: 0o755, uid: 0, gid: 0, mtime: (0, 0), xattrs: Vec::new() }
    }
}

/// What is below the run at some path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BelowEntry {
    /// A directory.
    Directory(DirectoryAttributes),
    /// Anything else that has a name there: file, symbolic link, device.
    Other,
}

/// The ordinary (local) overlay layers under a run. Whoever knows their directories answers; [`build_view`] asks once and
/// keeps the answers in the view, since committed layers never change.
///
/// Paths are the plain components from the root on; never empty.
///
/// [`build_view`]: crate::build_view
pub trait Below {
    /// What overlayfs shows at `path` when the layers below the run are stacked (whiteouts and opaque marks applied, symbolic
    /// links not followed). Decides which whiteouts and opaque marks the view must show.
    ///
    /// # Errors
    ///
    /// Whatever kept the caller from looking; the view is not built then.
    fn lookup(&self, path: &[&[u8]]) -> io::Result<Option<BelowEntry>>;

    /// From what the directory `path`, implied by a layer of the run, takes its attributes. containerd looks into each lower
    /// directory by itself, from the top one down, follows symbolic links inside of it and ignores opaque marks; the first
    /// thing found decides, a directory or not. The answer of [`Below::lookup`], which is the default, differs only where a
    /// link or an opaque mark is in play.
    ///
    /// # Errors
    ///
    /// Whatever kept the caller from looking; the view is not built then.
    fn attributes_for_implied(&self, path: &[&[u8]]) -> io::Result<Option<BelowEntry>> {
        self.lookup(path)
    }
}
