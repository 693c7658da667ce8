//! Puts our mount back when somebody takes it away while containers run.
//!
//! After `umount -l`, or `umount` by somebody who found nobody using it, nothing new can be mounted on our views, although the
//! connection lives as long as anything holds it. A detached copy of the mount, which nobody else sees, holds it; it is moved
//! to the old place, and a new copy is taken. Containers that run do not notice. (An *aborted* connection is gone for good: the
//! supervisor mounts a new one.)

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use millstream_source::names;
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use tracing::{debug, error, warn};

/// How often it is looked whether the mount is there.
const LOOK: Duration = Duration::from_secs(2);

/// Watches one mount.
#[derive(Debug)]
pub struct MountKeeper {
    mountpoint: PathBuf,
    /// Device number of our file system.
    device: (u32, u32),
    copy: OwnedFd,
}

impl MountKeeper {
    /// For the mount that is at `mountpoint` now.
    ///
    /// # Errors
    /// When the kernel has no such copies (before 5.2), or nothing is there.
    pub fn new(mountpoint: PathBuf) -> io::Result<Self> {
        let copy = copy_of(&mountpoint)?;
        let device = device_of(&mountpoint)?;
        Ok(Self { mountpoint, device, copy })
    }

    /// Watches the mount at `mountpoint` for as long as the process lives.
    pub async fn work(mountpoint: PathBuf) {
        let keeper = tokio::task::spawn_blocking(|| Self::new(mountpoint)).await;
        let mut keeper = match keeper {
            Ok(Ok(keeper)) => keeper,
            Ok(Err(error)) => return debug!(%error, "the mount cannot be put back if somebody takes it away"),
            Err(_) => return,
        };
        loop {
            tokio::time::sleep(LOOK).await;
            let looked = tokio::task::spawn_blocking(move || {
                if let Err(error) = keeper.look() {
                    error!({ names::CODE } = "node.unmounted", %error, "our mount was taken away and cannot be put back now");
                }
                keeper
            });
            let Ok(again) = looked.await else { return };
            keeper = again;
        }
    }

    /// Puts the mount back if it is not there; true if so.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn look(&mut self) -> io::Result<bool> {
        if device_of(&self.mountpoint).is_ok_and(|found| found == self.device) {
            return Ok(false);
        }
        move_mount(&self.copy, "", CWD, &self.mountpoint, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        warn!(
            { names::CODE } = "node.unmounted",
            "our mount was taken away and is back in its place; containers that run did not lose it"
        );
        self.copy = copy_of(&self.mountpoint)?;
        Ok(true)
    }
}

fn copy_of(mountpoint: &PathBuf) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    Ok(open_tree(CWD, mountpoint, flags)?)
}

/// Does not ask the file system, which may be ourselves.
/// Device number of the file system at `mountpoint`, without asking it.
pub(crate) fn device_of(mountpoint: &Path) -> io::Result<(u32, u32)> {
    let found = statx(CWD, mountpoint, AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT, StatxFlags::empty())?;
    Ok((found.stx_dev_major, found.stx_dev_minor))
}

#[cfg(test)]
mod tests {
    use super::*;
    use millstream_sys::fuse_device;

    #[test]
    fn a_mount_that_is_taken_away_comes_back_with_its_connection() {
        if !rustix::process::geteuid().is_root() || !std::path::Path::new("/dev/fuse").exists() {
            // Past the capture of the test runner, so that it is seen and counted.
            std::io::Write::write_all(&mut std::io::stderr(), b"skipped: needs root and /dev/fuse\n").ok();
            assert!(std::env::var_os("MILLSTREAM_REQUIRE_ALL").is_none(), "a required tier was skipped");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().to_owned();
        // Its INIT is never answered: nothing of this asks the file system.
        let _mounted = fuse_device::mount("millstream", &place, 4096).unwrap();
        let mut keeper = MountKeeper::new(place.clone()).unwrap();
        let device = device_of(&place).unwrap();
        assert!(!keeper.look().unwrap());
        for _ in 0..2 {
            fuse_device::unmount(&place).unwrap();
            assert_ne!(device_of(&place).unwrap(), device);
            assert!(keeper.look().unwrap());
            assert_eq!(device_of(&place).unwrap(), device);
        }
        drop(keeper);
        fuse_device::unmount(&place).unwrap();
    }
}
