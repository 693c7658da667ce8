//! The one table from errors to errno.

use fuser::Errno;
use millstream_layerfs::FsError;

use crate::adapter::ContentError;

/// What a process sees when the file system refuses.
#[must_use]
pub fn of_fs(error: &FsError) -> Errno {
    match error {
        FsError::NotFound => Errno::ENOENT,
        FsError::NotADirectory => Errno::ENOTDIR,
        FsError::IsADirectory => Errno::EISDIR,
        FsError::NameTooLong => Errno::ENAMETOOLONG,
        FsError::WrongKind => Errno::EINVAL,
        FsError::Stale => Errno::ESTALE,
        FsError::DamagedLayer { .. } | FsError::DamagedView { .. } => Errno::EIO,
    }
}

/// What a process sees when a file's bytes cannot be had.
#[must_use]
pub fn of_content(error: &ContentError) -> Errno {
    match error {
        ContentError::Gone => Errno::ESTALE,
        ContentError::Unavailable => Errno::EIO,
    }
}
