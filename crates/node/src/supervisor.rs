//! The process that owns what must outlive a worker: the FUSE connection and the listening socket.
//!
//! It has one thread, no runtime, and does three things: mount and bind at the start, see to a worker
//! ([`crate::workers`]), clean up at the end. Everything that can fail for a reason is in the worker.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use millstream_fuse::Journal;
use millstream_settings::node::Settings;
use millstream_sys::fuse_device::{self, Mounted};
use millstream_sys::signals::Signals;
use rustix::fs::FlockOperation;
use rustix::process::Signal;
use tracing::{info, warn};

use crate::program::{Program, Version};
use crate::service;
use crate::upgrade::Requests;
use crate::workers::{Kept, Workers, asked_to_stop};

/// How often a socket that is in use is tried again.
const POLL: Duration = Duration::from_millis(100);
/// How long a socket may be in use by what an earlier supervisor left.
const SOCKET_PATIENCE: Duration = Duration::from_secs(2);

/// Where the merged views are mounted: kept short, since overlay mount options must fit into one page.
#[must_use]
pub fn mountpoint(settings: &Settings) -> PathBuf {
    settings.root.join("m")
}

/// Runs until SIGTERM or SIGINT. `text` is that of the settings, which workers are told; an upgrade reads `config` anew.
///
/// # Errors
/// When another instance owns the root directory, mounting or binding fails, or no worker can work with these settings.
pub fn run(settings: &Settings, text: &str, config: Option<&Path>) -> anyhow::Result<()> {
    let signals = Signals::block(&[Signal::TERM, Signal::INT, Signal::CHILD, Signal::HUP].map(Signal::as_raw))?;
    service::spare_supervisor();
    make_private_dir(&settings.root)?;
    let _lock = lock(&settings.root)?;
    let mountpoint = mountpoint(settings);
    await_free(&signals, &settings.socket)?;
    let listener = bind(&settings.socket)?;
    let requests = Requests::listen(settings)
        .inspect_err(|error| warn!(error = format!("{error:#}"), "`millstreamd upgrade` will not work; SIGHUP does"));
    let mounting = Mounting::new(&mountpoint)?;
    info!(root = %settings.root.display(), socket = %settings.socket.display(), "millstreamd is up");
    let current = Version { program: Rc::new(Program::own()?), settings: text.into() };
    let kept = Kept { signals: &signals, listener: &listener, requests: requests.as_ref().ok(), settings, config };
    let result = Workers::new(kept, mounting, current).run();
    if let Err(error) = fuse_device::unmount(&mountpoint) {
        warn!(%error, "cannot unmount {}", mountpoint.display());
    }
    let _ = fs::remove_file(&settings.socket);
    result
}

fn make_private_dir(path: &Path) -> anyhow::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("making {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o700))
        .with_context(|| format!("closing {} to others", path.display()))
}

fn lock(root: &Path) -> anyhow::Result<File> {
    let path = root.join("lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => bail!(
            "another millstreamd uses {}; hint: stop it, or give this one another root and socket",
            root.display()
        ),
        Err(error) => Err(error).with_context(|| format!("locking {}", path.display())),
    }
}

/// The mount, and what its workers are working on.
#[derive(Debug)]
pub(crate) struct Mounting {
    pub(crate) mounted: Mounted,
    pub(crate) journal: Journal,
    /// The memory of the journal, for the workers.
    pub(crate) shared: OwnedFd,
}

impl Mounting {
    pub(crate) fn new(mountpoint: &Path) -> anyhow::Result<Self> {
        let mounted = mount(mountpoint)?;
        let (shared, journal) = Journal::create().context("making the journal of requests")?;
        Ok(Self { mounted, journal, shared })
    }
}

fn mount(mountpoint: &Path) -> anyhow::Result<Mounted> {
    // What a predecessor left mounted answers nobody; several deaths may have left several.
    while fuse_device::unmount(mountpoint).is_ok() {
        info!("detached a mount that an earlier millstreamd left at {}", mountpoint.display());
    }
    make_private_dir(mountpoint)?;
    fuse_device::mount("millstream", mountpoint, millstream_fuse::adapter::MAX_READ)
        .with_context(|| format!("mounting {} (hint: needs root and the fuse kernel module)", mountpoint.display()))
}

/// Gives the worker of a supervisor that was killed the time to die, too: until then it has the socket.
fn await_free(signals: &Signals, socket: &Path) -> anyhow::Result<()> {
    let deadline = Instant::now() + SOCKET_PATIENCE;
    while UnixStream::connect(socket).is_ok() && Instant::now() < deadline {
        if asked_to_stop(signals.wait(POLL)?) {
            bail!("asked to stop while the socket was in use");
        }
    }
    Ok(())
}

fn bind(socket: &Path) -> anyhow::Result<UnixListener> {
    let dir = socket.parent().context("socket has no parent directory")?;
    if !dir.exists() {
        make_private_dir(dir)?;
    }
    if UnixStream::connect(socket).is_ok() {
        bail!("another program listens at {}; hint: stop it, or choose another socket", socket.display());
    }
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("removing the old socket {}", socket.display()));
        }
        _ => {}
    }
    let listener = UnixListener::bind(socket).with_context(|| format!("listening at {}", socket.display()))?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::event::PollFlags;

    use super::*;
    use crate::workers::has_event;

    #[test]
    fn an_unmounted_connection_is_gone() {
        if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
            // Past the capture of the test runner, so that it is seen and counted.
            std::io::Write::write_all(&mut std::io::stderr(), b"skipped: needs root and /dev/fuse\n").ok();
            assert!(std::env::var_os("MILLSTREAM_REQUIRE_ALL").is_none(), "a required tier was skipped");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let mounted = mount(&dir.path().join("m")).unwrap();
        assert!(!has_event(mounted.device.as_fd(), PollFlags::empty()).unwrap());
        fuse_device::unmount(&dir.path().join("m")).unwrap();
        assert!(has_event(mounted.device.as_fd(), PollFlags::empty()).unwrap());
    }

    #[test]
    fn a_socket_in_use_is_left_alone_and_an_old_one_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s/m.sock");
        let listener = bind(&socket).unwrap();
        assert!(format!("{:#}", bind(&socket).unwrap_err()).contains("another program listens"));
        drop(listener);
        bind(&socket).unwrap();
        assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
