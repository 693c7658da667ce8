//! Two files that hold the same database: what is written to one is written to the other.
//!
//! The database never overwrites what it still needs, and names a new state only after all of it is on the disk. So each of the
//! two files is by itself whole at any moment, whatever the other became. Reads and locks are the first one's.

use std::fs::File;
use std::io;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use redb::backends::FileBackend;
use redb::{BackendError, StorageBackend};
use tracing::error;

/// See the module.
#[derive(Debug)]
pub(super) struct Mirror {
    first: FileBackend,
    /// None when it failed: the node works without it until the next start.
    second: Mutex<Option<FileBackend>>,
    second_path: PathBuf,
}

impl Mirror {
    /// `second` may be missing; else its bytes must be those of `first`.
    pub(super) fn open(first: &Path, second: &Path) -> anyhow::Result<Self> {
        let open = |path| File::options().read(true).write(true).open(path);
        let copy = match open(second) {
            Ok(file) => Some(FileBackend::new(file)?),
            Err(_) => None,
        };
        Ok(Self { first: FileBackend::new(open(first)?)?, second: Mutex::new(copy), second_path: second.to_owned() })
    }

    #[cfg(test)]
    pub(super) fn break_second(&self, file: File) {
        *self.second() = FileBackend::new(file).ok();
    }

    fn second(&self) -> MutexGuard<'_, Option<FileBackend>> {
        // Every change is one assignment.
        self.second.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does to the copy what was done to the first file; `false` if that failed. A copy that missed a change is none any more.
    fn follow(&self, change: impl FnOnce(&FileBackend) -> io::Result<()>) -> bool {
        let mut second = self.second();
        let Some(copy) = second.as_ref() else { return true };
        let changed = change(copy);
        if let Err(error) = &changed {
            *second = None;
            let removed = std::fs::remove_file(&self.second_path);
            error!(%error, file = %self.second_path.display(), "the copy of the database cannot be written; it goes on without");
            if let Err(error) = removed {
                error!(%error, file = %self.second_path.display(), "the old copy of the database stays");
            }
        }
        changed.is_ok()
    }
}

impl StorageBackend for Mirror {
    fn len(&self) -> io::Result<u64> {
        self.first.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.first.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.first.set_len(len)?;
        self.follow(|copy| copy.set_len(len));
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.first.write(offset, data)?;
        self.follow(|copy| copy.write(offset, data));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        // Side by side: on most file systems both wait for the same commit of the journal.
        thread::scope(|scope| {
            let first = thread::Builder::new().spawn_scoped(scope, || self.first.sync_data());
            let followed = self.follow(FileBackend::sync_data);
            match first {
                Ok(first) => first.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?,
                Err(_) => self.first.sync_data()?,
            }
            // A file system that is being shut down may have said of one file that it is synced, and the truth of the other.
            if followed { Ok(()) } else { self.first.sync_data() }
        })
    }

    fn close(&self) -> io::Result<()> {
        self.follow(FileBackend::close);
        self.first.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.first.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.first.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.first.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.first.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.first.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.first.query_lock_range(start, end)
    }
}
