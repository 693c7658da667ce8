//! The process that owns what must outlive a worker: the FUSE connection and the listening socket.
//!
//! It has one thread, no runtime, and does three things: mount and bind at the start, start a worker whenever there is
//! none, clean up at the end. Everything that can fail for a reason is in the worker.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use millstream_sys::fuse_device::{self, Mounted};
use millstream_sys::process::spawn_with;
use millstream_sys::signals::Signals;
use rustix::fs::FlockOperation;
use rustix::process::Signal;
use tracing::{error, info, warn};

use crate::settings::Settings;

/// First pause before a worker that died is started again; doubled with every death, reset after [`GOOD_LIFE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause.
const LAST_PAUSE: Duration = Duration::from_secs(10);
/// A worker that lived this long was not in a crash loop.
const GOOD_LIFE: Duration = Duration::from_secs(60);
/// How long a worker may take to serve the connection after its start, and to end when asked.
const WORKER_PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of the longest message between supervisor and worker.
pub const MAX_MESSAGE: usize = 64 * 1024;

/// Where the merged views are mounted: kept short, since overlay mount options must fit into one page.
#[must_use]
pub fn mountpoint(settings: &Settings) -> PathBuf {
    settings.root.join("m")
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// When another instance owns the root directory, or mounting or binding fails.
pub fn run(settings: &Settings, config: Option<&Path>) -> anyhow::Result<()> {
    let signals = Signals::block(&[Signal::TERM.as_raw(), Signal::INT.as_raw(), Signal::CHILD.as_raw()])?;
    make_private_dir(&settings.root)?;
    let _lock = lock(&settings.root)?;
    let mountpoint = mountpoint(settings);
    let mounted = mount(&mountpoint)?;
    let listener = bind(&settings.socket)?;
    info!(root = %settings.root.display(), socket = %settings.socket.display(), "millstreamd is up");
    let result = supervise(&signals, &mounted, &listener, config);
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

fn mount(mountpoint: &Path) -> anyhow::Result<Mounted> {
    // What a predecessor left mounted answers nobody; several deaths may have left several.
    while fuse_device::unmount(mountpoint).is_ok() {
        info!("detached a mount that an earlier millstreamd left at {}", mountpoint.display());
    }
    make_private_dir(mountpoint)?;
    fuse_device::mount("millstream", mountpoint, millstream_fuse::adapter::MAX_READ)
        .with_context(|| format!("mounting {} (hint: needs root and the fuse kernel module)", mountpoint.display()))
}

fn bind(socket: &Path) -> anyhow::Result<UnixListener> {
    let dir = socket.parent().context("socket has no parent directory")?;
    if !dir.exists() {
        make_private_dir(dir)?;
    }
    // The lock on the root directory is ours, so nobody listens there any more.
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

fn supervise(
    signals: &Signals,
    mounted: &Mounted,
    listener: &UnixListener,
    config: Option<&Path>,
) -> anyhow::Result<()> {
    let mut answer = None;
    let mut pause = FIRST_PAUSE;
    loop {
        let started = Instant::now();
        let mut worker = start_worker(mounted, listener, config, &mut answer)?;
        if watch(signals, &mut worker)? == Ended::Asked {
            return Ok(());
        }
        if started.elapsed() >= GOOD_LIFE {
            pause = FIRST_PAUSE;
        }
        if !sleep(signals, pause)? {
            return Ok(());
        }
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

/// Starts a worker and waits until it serves the connection (or is dead, which [`watch`] will see).
fn start_worker(
    mounted: &Mounted,
    listener: &UnixListener,
    config: Option<&Path>,
    answer: &mut Option<Vec<u8>>,
) -> anyhow::Result<Child> {
    let (ours, theirs) = fuse_device::message_pair()?;
    let mut command = Command::new("/proc/self/exe");
    command.arg("worker");
    if let Some(config) = config {
        command.arg("--config").arg(config);
    }
    let worker = spawn_with(command, &[mounted.device.as_fd(), listener.as_fd(), theirs.as_fd()])
        .context("starting the worker")?;
    drop(theirs);
    info!(pid = worker.id(), "worker started");
    let first = answer.is_none();
    // A worker that is dead already makes these fail; `watch` reports its death.
    let told = fuse_device::write_message(ours.as_fd(), &mounted.init)
        .and_then(|()| fuse_device::write_message(ours.as_fd(), answer.as_deref().unwrap_or(b"first")))
        .and_then(|()| receive(&ours));
    match told {
        Ok(reply) if !reply.is_empty() => {
            if first {
                *answer = Some(reply);
            }
        }
        Ok(_) => warn!(pid = worker.id(), "worker ended before it served the FUSE connection"),
        Err(error) => warn!(pid = worker.id(), %error, "worker does not serve the FUSE connection"),
    }
    Ok(worker)
}

fn receive(socket: &OwnedFd) -> io::Result<Vec<u8>> {
    rustix::net::sockopt::set_socket_timeout(socket, rustix::net::sockopt::Timeout::Recv, Some(WORKER_PATIENCE))?;
    let mut buffer = vec![0; MAX_MESSAGE];
    let len = rustix::io::retry_on_intr(|| rustix::io::read(socket, &mut buffer))?;
    buffer.truncate(len);
    Ok(buffer)
}

#[derive(PartialEq, Eq)]
enum Ended {
    /// We were asked to stop, and the worker has ended.
    Asked,
    /// The worker died by itself.
    Died,
}

fn watch(signals: &Signals, worker: &mut Child) -> anyhow::Result<Ended> {
    loop {
        if let Some(status) = worker.try_wait()? {
            error!(
                pid = worker.id(),
                signal = status.signal(),
                code = status.code(),
                "worker died; starting another one"
            );
            return Ok(Ended::Died);
        }
        // The time-out only guards against a lost SIGCHLD.
        let signal = signals.wait(Duration::from_secs(5))?;
        if signal == Some(Signal::TERM.as_raw()) || signal == Some(Signal::INT.as_raw()) {
            stop(signals, worker)?;
            return Ok(Ended::Asked);
        }
    }
}

fn stop(signals: &Signals, worker: &mut Child) -> anyhow::Result<()> {
    info!("stopping");
    let pid = rustix::process::Pid::from_child(worker);
    rustix::process::kill_process(pid, Signal::TERM)?;
    let deadline = Instant::now() + WORKER_PATIENCE;
    while worker.try_wait()?.is_none() {
        if Instant::now() >= deadline {
            warn!("the worker does not end; killing it");
            worker.kill()?;
            worker.wait()?;
            break;
        }
        signals.wait(Duration::from_millis(500))?;
    }
    Ok(())
}

/// Sleeps for `pause`; `false` when a signal asked us to stop meanwhile.
fn sleep(signals: &Signals, pause: Duration) -> anyhow::Result<bool> {
    let deadline = Instant::now() + pause;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(true);
        }
        let signal = signals.wait(left)?;
        if signal == Some(Signal::TERM.as_raw()) || signal == Some(Signal::INT.as_raw()) {
            return Ok(false);
        }
    }
}
