//! The process that owns what must outlive a worker: the FUSE connection and the listening socket.
//!
//! It has one thread, no runtime, and does three things: mount and bind at the start, start a worker whenever there is
//! none, clean up at the end. Everything that can fail for a reason is in the worker.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use millstream_settings::node::Settings;
use millstream_source::names;
use millstream_sys::fuse_device::{self, Mounted};
use millstream_sys::process::spawn_with;
use millstream_sys::signals::Signals;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::net::sockopt::Timeout;
use rustix::process::Signal;
use tracing::{error, info, warn};

/// First pause before a worker that died is started again; doubled with every death, reset after [`GOOD_LIFE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause.
const LAST_PAUSE: Duration = Duration::from_secs(10);
/// A worker that lived this long was not in a crash loop.
const GOOD_LIFE: Duration = Duration::from_secs(60);
/// How long a worker may take to serve the connection after its start (it checks every table in the store), and to end when
/// asked.
const WORKER_PATIENCE: Duration = Duration::from_secs(120);
/// Longest time that a worker may take to serve the connection, after several were not ready in time.
const LAST_PATIENCE: Duration = Duration::from_secs(3600);
/// How often a supervisor that waits for its worker looks at signals.
const POLL: Duration = Duration::from_millis(100);
/// How long a socket may be in use by what an earlier supervisor left.
const SOCKET_PATIENCE: Duration = Duration::from_secs(2);
/// Second message to a worker whose connection nobody has answered yet.
pub const FIRST: &[u8] = b"first";
/// What a worker says once it serves the connection.
pub const SERVES: &[u8] = b"serves";
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
    // A terminal that goes away (SIGHUP) must not take the containers with it.
    let signals = Signals::block(&[Signal::TERM, Signal::INT, Signal::CHILD, Signal::HUP].map(Signal::as_raw))?;
    make_private_dir(&settings.root)?;
    let _lock = lock(&settings.root)?;
    let mountpoint = mountpoint(settings);
    await_free(&signals, &settings.socket)?;
    let listener = bind(&settings.socket)?;
    let mut mounted = mount(&mountpoint)?;
    info!(root = %settings.root.display(), socket = %settings.socket.display(), "millstreamd is up");
    let result = loop {
        match supervise(&signals, &mounted, &listener, config) {
            Ok(Ended::Connection) => {
                error!(
                    { names::CODE } = "node.mount-lost",
                    "the connection of the mount was ended (aborted, or unmounted by force): mounting again. Containers that ran \
                     on it have lost the files of their images; new ones work. hint: `millstream status` names them"
                );
                match mount(&mountpoint) {
                    Ok(again) => mounted = again,
                    Err(error) => break Err(error),
                }
            }
            ended => break ended.map(drop),
        }
    };
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

fn supervise(
    signals: &Signals,
    mounted: &Mounted,
    listener: &UnixListener,
    config: Option<&Path>,
) -> anyhow::Result<Ended> {
    let mut answer = None;
    let mut pause = FIRST_PAUSE;
    // Grows when a worker was not ready in time: a large store on a slow disk takes long to check.
    let mut patience = WORKER_PATIENCE;
    let mut restarts = 0;
    loop {
        if is_gone(&mounted.device)? {
            return Ok(Ended::Connection);
        }
        let started = Instant::now();
        let ended = match start_worker(mounted, listener, config, answer.as_deref(), restarts) {
            Ok(mut worker) => match introduce(signals, &mut worker, mounted, &mut answer, patience)? {
                Some(ended) => ended,
                None => watch(signals, &mut worker.child)?,
            },
            // No memory, no process number: it passes. To give up would end the connection, and with it every container.
            Err(error) => {
                error!(error = format!("{error:#}"), "cannot start a worker now; trying again");
                Ended::Died
            }
        };
        if ended == Ended::Asked {
            return Ok(ended);
        }
        restarts += 1;
        if started.elapsed() >= patience {
            patience = (patience * 2).min(LAST_PATIENCE);
        }
        if started.elapsed() >= GOOD_LIFE {
            pause = FIRST_PAUSE;
        }
        if !sleep(signals, pause)? {
            return Ok(Ended::Asked);
        }
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

/// Whether the kernel has ended the connection; it then reports an error for the device.
fn is_gone(device: &OwnedFd) -> io::Result<bool> {
    let mut polled = [PollFd::new(device, PollFlags::empty())];
    rustix::io::retry_on_intr(|| poll(&mut polled, Some(&Timespec::default())))?;
    Ok(polled.iter().any(|device| device.revents().intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL)))
}

/// A worker and our end of the line to it.
struct Worker {
    child: Child,
    line: OwnedFd,
}

fn start_worker(
    mounted: &Mounted,
    listener: &UnixListener,
    config: Option<&Path>,
    answer: Option<&[u8]>,
    restarts: u64,
) -> anyhow::Result<Worker> {
    let (line, theirs) = fuse_device::message_pair()?;
    rustix::net::sockopt::set_socket_timeout(&line, Timeout::Recv, Some(POLL))?;
    let mut command = Command::new("/proc/self/exe");
    command.arg("worker").arg("--restarts").arg(restarts.to_string());
    if let Some(config) = config {
        command.arg("--config").arg(config);
    }
    let passed = [mounted.device.as_fd(), listener.as_fd(), theirs.as_fd()];
    let child = spawn_with(command, &passed).context("starting the worker")?;
    info!(pid = child.id(), "worker started");
    // They wait in the socket; to a worker that is dead already they cannot be sent, and `watch` sees its death.
    let _ = fuse_device::write_message(line.as_fd(), &mounted.init)
        .and_then(|()| fuse_device::write_message(line.as_fd(), answer.unwrap_or(FIRST)));
    Ok(Worker { child, line })
}

impl Worker {
    /// What the worker says next, waiting at most [`POLL`]. None: nothing, or it closed the line.
    fn message(&self) -> io::Result<Option<Vec<u8>>> {
        let mut buffer = vec![0; MAX_MESSAGE];
        match rustix::io::read(&self.line, &mut buffer) {
            Ok(len) => {
                buffer.truncate(len);
                Ok((len > 0).then_some(buffer))
            }
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNRESET) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

#[derive(PartialEq, Eq)]
enum Ended {
    /// We were asked to stop, and the worker has ended.
    Asked,
    /// The worker died by itself.
    Died,
    /// The kernel has ended the connection: no worker can serve it.
    Connection,
}

/// Until the worker serves the connection: passes its answer to INIT on to the kernel, if that has had none. The answer is
/// kept in the same breath, so that no later worker takes an answered connection for a new one.
fn introduce(
    signals: &Signals,
    worker: &mut Worker,
    mounted: &Mounted,
    answer: &mut Option<Vec<u8>>,
    patience: Duration,
) -> anyhow::Result<Option<Ended>> {
    let deadline = Instant::now() + patience;
    loop {
        match worker.message()? {
            Some(message) if message == SERVES => return Ok(None),
            Some(message) if answer.is_none() => {
                match fuse_device::write_message(mounted.device.as_fd(), &message) {
                    Ok(()) => *answer = Some(message),
                    // The worker ends by itself then, and a new connection is made.
                    Err(_) if is_gone(&mounted.device)? => {}
                    Err(error) => return Err(error).context("answering the kernel"),
                }
            }
            Some(_) | None => {}
        }
        if asked_to_stop(signals.wait(Duration::ZERO)?) {
            stop(signals, &mut worker.child)?;
            return Ok(Some(Ended::Asked));
        }
        if has_died(&mut worker.child)? {
            return Ok(Some(Ended::Died));
        }
        if Instant::now() >= deadline {
            error!(pid = worker.child.id(), "worker does not get ready; killing it");
            worker.child.kill()?;
            worker.child.wait()?;
            return Ok(Some(Ended::Died));
        }
    }
}

fn asked_to_stop(signal: Option<i32>) -> bool {
    signal == Some(Signal::TERM.as_raw()) || signal == Some(Signal::INT.as_raw())
}

fn has_died(worker: &mut Child) -> anyhow::Result<bool> {
    let Some(status) = worker.try_wait()? else { return Ok(false) };
    let (pid, signal, exit_code) = (worker.id(), status.signal(), status.code());
    error!(pid, signal, exit_code, "worker died; starting another one");
    Ok(true)
}

fn watch(signals: &Signals, worker: &mut Child) -> anyhow::Result<Ended> {
    loop {
        if has_died(worker)? {
            return Ok(Ended::Died);
        }
        // The time-out only guards against a lost SIGCHLD.
        if asked_to_stop(signals.wait(Duration::from_secs(5))?) {
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
        if asked_to_stop(signals.wait(left)?) {
            return Ok(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert!(!is_gone(&mounted.device).unwrap());
        fuse_device::unmount(&dir.path().join("m")).unwrap();
        assert!(is_gone(&mounted.device).unwrap());
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
