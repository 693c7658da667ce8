//! A file system of a test's own, which can be cut off as by a power failure.
//!
//! It lies in a file of the workdir, behind a loop device that the kernel frees with the last mount. After
//! [`Disk::cut`] nothing more reaches it, neither data nor the journal; what [`Disk::power_on`] finds is what a machine finds
//! after its power comes back, as far as the file system is concerned. A drive that loses what it said was written is beyond
//! this: the loop device keeps all that it was given.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::mount::{UnmountFlags, unmount};

use crate::need::{Need, program};
use crate::process::{eventually, output};
use crate::workdir::Workdir;

/// How long the last users of a file system may take to let go of it.
const BUSY: Duration = Duration::from_secs(60);

/// What a test with a disk of its own needs.
pub const DISK: &[Need] = &[
    Need::Root,
    Need::Program("losetup"),
    Need::Program("mkfs.ext4"),
    Need::Program("mkfs.xfs"),
    Need::Program("xfs_io"),
];

/// Which file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystem {
    /// With a journal, as Debian makes it.
    Ext4,
    /// As Debian makes it, with shared blocks.
    Xfs,
}

impl FileSystem {
    /// Its name for `mount`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }
}

/// A mounted file system in a file. Dropping it unmounts it.
#[derive(Debug)]
pub struct Disk {
    kind: FileSystem,
    image: PathBuf,
    at: PathBuf,
}

impl Disk {
    /// Makes one of `size` bytes (XFS: 300 MiB at least) and mounts it at `at`, which is made if missing. It takes space as it
    /// is filled.
    ///
    /// # Errors
    ///
    /// If it cannot be made or mounted.
    pub fn make(work: &Workdir, name: &str, kind: FileSystem, size: u64, at: &Path) -> Result<Self> {
        let image = work.path().join(format!("{name}.img"));
        std::fs::File::create(&image)?.set_len(size)?;
        let mkfs = format!("mkfs.{}", kind.name());
        output(Command::new(find(&mkfs)?).arg("-q").arg(&image))?;
        std::fs::create_dir_all(at)?;
        let disk = Self { kind, image, at: at.to_owned() };
        disk.power_on()?;
        Ok(disk)
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.at
    }

    /// The file that it lies in.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// Mounts it, which replays the journal.
    ///
    /// # Errors
    ///
    /// If it cannot be mounted.
    pub fn power_on(&self) -> Result<()> {
        let mut mount = Command::new("mount");
        mount.args(["-t", self.kind.name(), "-o", "loop"]).arg(&self.image).arg(&self.at);
        output(&mut mount).map(drop)
    }

    /// Has ext4 find an error, after which it is mounted read-only, whoever writes to it.
    ///
    /// # Errors
    ///
    /// If it is not ext4, or does not become so.
    pub fn find_error(&self) -> Result<()> {
        output(Command::new("mount").args(["-o", "remount,errors=remount-ro"]).arg(&self.at))?;
        let device = output(Command::new("findmnt").args(["-n", "-o", "SOURCE"]).arg(&self.at))?;
        let name = device.trim().trim_start_matches("/dev/");
        std::fs::write(format!("/sys/fs/ext4/{name}/trigger_fs_error"), "for a test")?;
        // Newer kernels do not say so in the flags of the mount.
        let read_only = || {
            let error = std::fs::File::create(self.at.join("probe")).err()?;
            (error.kind() == std::io::ErrorKind::ReadOnlyFilesystem).then_some(())
        };
        eventually("the read-only mount", BUSY, read_only)
    }

    /// Takes all its space but `left` bytes; it comes back when the file that is named is removed.
    ///
    /// # Errors
    ///
    /// If the space cannot be taken.
    pub fn fill(&self, left: u64) -> Result<PathBuf> {
        let path = self.at.join("filler");
        let file = std::fs::File::create(&path)?;
        let mut taken = 0;
        // Blocks of metadata come on top: whatever still fits is taken in ever smaller pieces.
        for piece in [1 << 20, 64 << 10, 4 << 10] {
            loop {
                let disk = rustix::fs::statvfs(&self.at)?;
                let free = disk.f_bfree.saturating_mul(disk.f_frsize);
                let fits = free >= left.saturating_add(piece)
                    && rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), taken, piece).is_ok();
                if !fits {
                    break;
                }
                taken += piece;
            }
        }
        file.sync_all()?;
        Ok(path)
    }

    /// From now on nothing reaches the disk, and all that was not synced is lost.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn cut(&self) -> Result<()> {
        // Without `-f` the journal is not written either.
        output(Command::new(find("xfs_io")?).args(["-x", "-c", "shutdown"]).arg(&self.at)).map(drop)
    }

    /// Unmounts it, and whatever is mounted below it, once nobody uses it any more.
    ///
    /// # Errors
    ///
    /// If somebody uses it for too long.
    pub fn power_off(&self) -> Result<()> {
        eventually("the end of all use of the disk", BUSY, || {
            // The daemon's own mount stands on it, and is dead with the daemon.
            unmount(self.at.join("m"), UnmountFlags::DETACH).ok();
            unmount(&self.at, UnmountFlags::empty()).ok()
        })
        .with_context(|| format!("unmounting {}", self.at.display()))?;
        // A mount namespace that was made meanwhile, by whomever, has the file system as well: it would be found again as it is,
        // cut off.
        eventually("the end of the loop device", BUSY, || {
            output(Command::new(find("losetup").ok()?).arg("-j").arg(&self.image))
                .is_ok_and(|all| all.is_empty())
                .then_some(())
        })
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        unmount(self.at.join("m"), UnmountFlags::DETACH).ok();
        unmount(&self.at, UnmountFlags::DETACH).ok();
    }
}

fn find(name: &str) -> Result<PathBuf> {
    program(name).with_context(|| format!("{name} is not installed"))
}
