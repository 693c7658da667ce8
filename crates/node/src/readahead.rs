//! How far the kernel reads around what a program touches in our mount.
//!
//! A mapped library is touched here and there, and each touch has the kernel ask for a whole window around it. While that has to
//! come over a network the window is small, so that little is fetched that nobody needs, and a startup profile has what a start
//! needs and not its neighbourhood. Once every layer is local it is what the kernel has for a disk. A file that was opened keeps the
//! window of its time.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use millstream_chunkstore::{LayerState, Store};
use tracing::debug;

use crate::mount_keeper::device_of;

/// KiB while layers are lazy: one page. A `read(2)` of more is one request all the same, since the kernel's other bound, of what is
/// read at a time, stays as it is. Seen with 16 KiB (DokuWiki's first page, 100 Mbit/s): 13.6 MB and 1.30 s until it is there,
/// instead of 9.5 MB and 1.00 s.
const NARROW: u32 = 4;
/// KiB once none is: the kernel's own default.
const WIDE: u32 = 128;
/// How often it is looked whether layers became local.
const LOOK: Duration = Duration::from_secs(2);

/// The window of one mount. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Readahead(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Where the kernel takes it from; none where it cannot be set.
    file: Option<PathBuf>,
    narrow: AtomicBool,
}

impl Readahead {
    /// That of the file system at `mountpoint`. Where the window cannot be
    /// set (no sysfs, or a read-only one), nothing here does anything.
    #[must_use]
    pub fn of(mountpoint: &Path) -> Self {
        let file = device_of(mountpoint)
            .map(|(major, minor)| PathBuf::from(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb")));
        let file = file.and_then(|file| std::fs::OpenOptions::new().write(true).open(&file).map(|_| file));
        let file = file.inspect_err(|error| debug!(%error, "the window of reads around a touch stays as it is")).ok();
        Self(Arc::new(Inner { file, narrow: AtomicBool::new(false) }))
    }

    /// There is something lazy.
    pub fn narrow(&self) {
        self.set(true);
    }

    fn set(&self, narrow: bool) {
        let Some(file) = &self.0.file else { return };
        if self.0.narrow.swap(narrow, Ordering::AcqRel) == narrow {
            return;
        }
        let window = if narrow { NARROW } else { WIDE };
        if let Err(error) = write(file, window) {
            debug!(%error, "the window of reads around a touch is not {window} KiB");
        }
    }

    /// Widens the window whenever nothing is lazy any more, and narrows it when something is again, for as long as the process
    /// lives.
    pub async fn follow(self, store: Arc<Store>) {
        loop {
            self.set(store.layers().iter().any(|layer| layer.state() == LayerState::Lazy));
            tokio::time::sleep(LOOK).await;
        }
    }
}

fn write(file: &Path, window: u32) -> io::Result<()> {
    std::fs::write(file, window.to_string())
}
