//! Directories of snapshots.
//!
//! ```text
//! <root>/s/<number>/fs     files of a local snapshot
//! <root>/s/<number>/work   what overlayfs needs beside the files of an active one
//! <root>/trash/<n>         waits to be deleted
//! ```
//!
//! Paths are short because a hundred of them share one page of mount options. Nothing but root can pass `<root>`; `fs`
//! itself is 0755 because it becomes the root directory of a container.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::mounts::option_path;
use crate::{Error, Usage};

/// The directories below one root.
#[derive(Debug)]
pub(crate) struct Disk {
    snapshots: PathBuf,
    trash: PathBuf,
    next_trash: AtomicU64,
}

impl Disk {
    /// Makes the directories where they are missing, and closes them to everybody but their owner.
    pub(crate) fn open(root: &Path) -> Result<Self, Error> {
        option_path(root)?;
        if !root.is_absolute() {
            return Err(Error::Invalid(format!("the directory for snapshots must be absolute: {}", root.display())));
        }
        let disk = Self { snapshots: root.join("s"), trash: root.join("trash"), next_trash: AtomicU64::new(0) };
        for path in [root, &disk.snapshots, &disk.trash] {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(Error::disk("create", path))?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(Error::disk("chmod", path))?;
        }
        Ok(disk)
    }

    fn directory(&self, id: u64) -> PathBuf {
        self.snapshots.join(id.to_string())
    }

    /// Where the files of a local snapshot are.
    pub(crate) fn fs(&self, id: u64) -> PathBuf {
        self.directory(id).join("fs")
    }

    /// The work directory of an active snapshot.
    pub(crate) fn work(&self, id: u64) -> PathBuf {
        self.directory(id).join("work")
    }

    /// Makes the directories of a snapshot; `owner` (user, group) gets its root directory.
    pub(crate) fn create(&self, id: u64, work: bool, owner: Option<(u32, u32)>) -> Result<(), Error> {
        let directory = self.directory(id);
        // A transaction that never happened may have left one behind.
        self.discard(id)?;
        let result = self.create_in(&directory, id, work, owner);
        if result.is_err() {
            // The number will be drawn again, and finds what is left.
            let _ = self.discard(id);
        }
        result
    }

    fn create_in(&self, directory: &Path, id: u64, work: bool, owner: Option<(u32, u32)>) -> Result<(), Error> {
        let make = |path: &Path| fs::DirBuilder::new().mode(0o700).create(path).map_err(Error::disk("create", path));
        make(directory)?;
        let fs = self.fs(id);
        make(&fs)?;
        if let Some((user, group)) = owner {
            lchown(&fs, Some(user), Some(group)).map_err(Error::disk("chown", &fs))?;
        }
        fs::set_permissions(&fs, fs::Permissions::from_mode(0o755)).map_err(Error::disk("chmod", &fs))?;
        if work {
            make(&self.work(id))?;
        }
        // The record is on the disk when it is committed; without this, a power cut may leave it without its directory.
        [directory, &self.snapshots].into_iter().try_for_each(|path| {
            fs::File::open(path).and_then(|directory| directory.sync_all()).map_err(Error::disk("sync", path))
        })
    }

    /// Moves the directory of a snapshot, if there is one, to where [`Disk::empty_trash`] finds it.
    pub(crate) fn discard(&self, id: u64) -> Result<(), Error> {
        self.discard_path(&self.directory(id))
    }

    fn discard_path(&self, path: &Path) -> Result<(), Error> {
        match self.to_trash(path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(Error::disk("move to the trash", path)(error)),
        }
    }

    /// Renames `path` to a free name in the trash.
    fn to_trash(&self, path: &Path) -> io::Result<()> {
        loop {
            let free = self.trash.join(self.next_trash.fetch_add(1, Ordering::Relaxed).to_string());
            // A rename onto an empty directory would succeed: it replaces that, which is trash as well.
            match fs::rename(path, free) {
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists | ErrorKind::IsADirectory
                    ) => {}
                // A directory cannot replace a file either.
                Err(error) if error.kind() == ErrorKind::NotADirectory && path.is_dir() => {}
                result => return result,
            }
        }
    }

    /// Moves everything that belongs to none of `known` into the trash. Gives the numbers of those without directory.
    pub(crate) fn reconcile(&self, known: &BTreeMap<u64, String>) -> Result<Vec<u64>, Error> {
        let mut present = HashSet::new();
        for entry in fs::read_dir(&self.snapshots).map_err(Error::disk("list", &self.snapshots))? {
            let entry = entry.map_err(Error::disk("list", &self.snapshots))?;
            let name = entry.file_name();
            // Only the form that `directory` gives: "07" is not snapshot 7.
            let id = name.to_str().and_then(|name| name.parse::<u64>().ok().filter(|id| id.to_string() == name));
            match id.filter(|id| known.contains_key(id)) {
                Some(id) => {
                    present.insert(id);
                }
                None => self.discard_path(&entry.path())?,
            }
        }
        let lost = |id: &u64| !present.contains(id) || !self.fs(*id).is_dir();
        Ok(known.keys().copied().filter(lost).collect())
    }

    /// Deletes what is in the trash, and gives how many entries could not be deleted.
    ///
    /// A directory inside the trash is not walked down but lifted to the top of the trash first: a container can nest
    /// directories deeper than any path or stack may be. What is a mount point cannot be renamed and so is left alone,
    /// with everything in it.
    pub(crate) fn empty_trash(&self) -> Result<usize, Error> {
        loop {
            let (mut deleted, mut left) = (false, 0);
            for entry in fs::read_dir(&self.trash).map_err(Error::disk("list", &self.trash))? {
                let path = entry.map_err(Error::disk("list", &self.trash))?.path();
                match self.delete_one(&path) {
                    Ok(()) => deleted = true,
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    Err(error) => {
                        left += 1;
                        tracing::debug!(file = %path.display(), %error, "cannot delete");
                    }
                }
            }
            if !deleted {
                return Ok(left);
            }
        }
    }

    /// Deletes one entry of the trash; directories in it become entries of the trash.
    fn delete_one(&self, path: &Path) -> io::Result<()> {
        if !fs::symlink_metadata(path)?.is_dir() {
            return fs::remove_file(path);
        }
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                self.to_trash(&entry.path())?;
            } else {
                fs::remove_file(entry.path())?;
            }
        }
        fs::remove_dir(path)
    }
}

/// User and group that own `directory`.
pub(crate) fn owner(directory: &Path) -> Result<(u32, u32), Error> {
    let metadata = fs::symlink_metadata(directory).map_err(Error::disk("read", directory))?;
    Ok((metadata.uid(), metadata.gid()))
}

/// Disk space below `root`: allocated blocks, hard links once, staying on one file system. What vanishes meanwhile, or is
/// nested deeper than a path can be, is not counted.
///
/// # Errors
/// When `root` itself cannot be read.
pub(crate) fn usage(root: &Path) -> io::Result<Usage> {
    let top = fs::symlink_metadata(root)?;
    let mut usage = Usage { bytes: top.blocks() * 512, inodes: 1 };
    let mut linked = HashSet::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        for entry in entries.flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.dev() != top.dev() {
                continue;
            }
            if metadata.is_dir() {
                directories.push(entry.path());
            } else if metadata.nlink() > 1 && !linked.insert(metadata.ino()) {
                continue;
            }
            usage.bytes += metadata.blocks() * 512;
            usage.inodes += 1;
        }
    }
    Ok(usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_counts_hard_links_once_and_holes_not_at_all() {
        let temp = tempfile::tempdir().unwrap();
        fs::create_dir(temp.path().join("d")).unwrap();
        fs::write(temp.path().join("d/file"), vec![1; 1 << 20]).unwrap();
        let before = usage(temp.path()).unwrap();
        assert!((1 << 20..2 << 20).contains(&before.bytes), "{before:?}");
        assert_eq!(before.inodes, 3);
        fs::hard_link(temp.path().join("d/file"), temp.path().join("link")).unwrap();
        fs::File::create(temp.path().join("hole")).unwrap().set_len(1 << 30).unwrap();
        let after = usage(temp.path()).unwrap();
        assert_eq!(after.inodes, 4);
        assert!(after.bytes < before.bytes + (64 << 10), "{after:?}");
    }

    #[test]
    fn trash_of_any_depth_is_deleted() {
        let temp = tempfile::tempdir().unwrap();
        let disk = Disk::open(temp.path()).unwrap();
        disk.create(1, true, None).unwrap();
        // Longer than PATH_MAX: built from the inside out, by renames.
        let (inner, outer) = (temp.path().join("inner"), temp.path().join("outer"));
        fs::create_dir(&inner).unwrap();
        for _ in 0..3000 {
            fs::create_dir(&outer).unwrap();
            fs::rename(&inner, outer.join("deep")).unwrap();
            fs::rename(&outer, &inner).unwrap();
        }
        fs::rename(&inner, disk.fs(1).join("inner")).unwrap();
        fs::write(disk.fs(1).join("file"), "x").unwrap();
        disk.discard(1).unwrap();
        assert_eq!(disk.empty_trash().unwrap(), 0);
        assert_eq!(fs::read_dir(temp.path().join("trash")).unwrap().count(), 0);
    }

    #[test]
    fn a_leftover_directory_is_replaced() {
        let temp = tempfile::tempdir().unwrap();
        let disk = Disk::open(temp.path()).unwrap();
        disk.create(1, true, None).unwrap();
        fs::write(disk.fs(1).join("old"), "x").unwrap();
        disk.create(1, true, None).unwrap();
        assert!(!disk.fs(1).join("old").exists());
    }

    #[test]
    fn permissions() {
        let temp = tempfile::tempdir().unwrap();
        let disk = Disk::open(&temp.path().join("root")).unwrap();
        disk.create(1, true, None).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        assert_eq!(mode(&temp.path().join("root")), 0o700);
        assert_eq!(mode(&disk.directory(1)), 0o700);
        assert_eq!(mode(&disk.fs(1)), 0o755);
        assert_eq!(mode(&disk.work(1)), 0o700);
    }
}
