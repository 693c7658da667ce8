//! Files that are either wholly there after a crash or not at all.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::StoreError;

/// A step of the store on the disk, in the order in which they follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// Bytes that were found present are read.
    ReadData,
    /// Bytes of a chunk are written.
    WriteData,
    /// Written chunks are forced to the disk.
    SyncData,
    /// The new version of a file is written beside the old one.
    WriteTemporary,
    /// The new version takes the place of the old one.
    Rename,
    /// The directory is forced to the disk.
    SyncDirectory,
    /// Metadata is committed to the database.
    Commit,
    /// The space of chunks that were given up is freed.
    Punch,
}

/// Lets a test make the disk fail, or stop, before any step.
pub trait Faults: std::fmt::Debug + Send + Sync {
    /// Called before `step` is done on `path`.
    ///
    /// # Errors
    /// What the step shall fail with.
    fn before(&self, step: Step, path: &Path) -> io::Result<()>;
}

/// The disk as it is.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoFaults;

impl Faults for NoFaults {
    fn before(&self, _: Step, _: &Path) -> io::Result<()> {
        Ok(())
    }
}

/// Creates a directory that only its owner may enter; one that exists is fine.
pub(crate) fn make_dir(path: &Path) -> Result<(), StoreError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|e| StoreError::io("create", path, e))
}

/// Options for a file that only its owner may read.
pub(crate) fn private_file() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).mode(0o600);
    options
}

/// Forces names in `dir` to the disk.
pub(crate) fn sync_dir(faults: &dyn Faults, dir: &Path) -> Result<(), StoreError> {
    faults
        .before(Step::SyncDirectory, dir)
        .and_then(|()| File::open(dir)?.sync_all())
        .map_err(|e| StoreError::io("sync", dir, e))
}

/// Takes away what stands where a file of ours should be and is none: a directory, a link. A file stays.
pub(crate) fn clear_way(path: &Path) -> Result<(), StoreError> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => remove_tree(path),
        Ok(found) if !found.is_file() => remove_file(path),
        _ => Ok(()),
    }
}

/// Puts `bytes` at `path` for good: whoever opens it later, also after a power cut, finds the old bytes or the new ones.
///
/// Callers see to it that one path is replaced by one thread at a time.
pub(crate) fn replace(faults: &dyn Faults, path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    clear_way(path)?;
    let temporary = temporary_path(path);
    let written = faults.before(Step::WriteTemporary, path).and_then(|()| {
        let mut file = private_file().truncate(true).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()
    });
    if let Err(error) = written {
        // What was written of it takes space, and nobody will miss it.
        let _ = fs::remove_file(&temporary);
        return Err(StoreError::io("write", path, error));
    }
    faults
        .before(Step::Rename, path)
        .and_then(|()| fs::rename(&temporary, path))
        .map_err(|e| StoreError::io("rename", path, e))?;
    match path.parent() {
        Some(dir) => sync_dir(faults, dir),
        None => Ok(()),
    }
}

fn temporary_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    name.into()
}

/// Removes a file; one that is not there is fine.
pub(crate) fn remove_file(path: &Path) -> Result<(), StoreError> {
    ignore_absent(fs::remove_file(path)).map_err(|e| StoreError::io("remove", path, e))
}

/// Removes a directory with all that is in it; one that is not there is fine.
pub(crate) fn remove_tree(path: &Path) -> Result<(), StoreError> {
    // Whoever has had it open may put a file into it that the removal has not seen: keys of contents, a presence file.
    const TRIES: u32 = 8;
    let mut removed = fs::remove_dir_all(path);
    for _ in 1..TRIES {
        match &removed {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => removed = fs::remove_dir_all(path),
            _ => break,
        }
    }
    ignore_absent(removed).map_err(|e| StoreError::io("remove", path, e))
}

fn ignore_absent(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
