//! What a service manager and the kernel's killer of processes are told.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use tracing::{debug, warn};

/// Where a process says whom to kill first when memory is short: -1000 (never) to 1000.
const OOM_SCORE: &str = "/proc/self/oom_score_adj";
/// Of the supervisor: without it every lazy container is lost.
const SUPERVISOR_SCORE: i32 = -999;
/// How much sooner than the supervisor a worker goes, which comes back.
const WORKER_STEP: i32 = 100;

/// Tells systemd that containerd can be served, if it has started us (`Type=notify`).
pub fn is_ready() {
    let Some(address) = std::env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(error) = tell(&address, "READY=1\nSTATUS=Serves") {
        warn!(%error, "cannot tell the service manager that we are ready");
    }
}

/// `address` is a path, or `@` and a name without one.
fn tell(address: &OsStr, state: &str) -> io::Result<()> {
    let address = match address.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(address)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address).map(drop)
}

/// Makes the supervisor the last to be killed when memory is short, unless somebody has decided about that already.
pub fn spare_supervisor() {
    set_score(|score| if score == 0 { SUPERVISOR_SCORE } else { score });
}

/// Makes this worker go sooner than its supervisor.
pub fn offer_worker() {
    set_score(|score| (score + WORKER_STEP).min(1000));
}

fn set_score(new: impl FnOnce(i32) -> i32) {
    let set = || -> io::Result<()> {
        let score = fs::read_to_string(OOM_SCORE)?.trim().parse().map_err(io::Error::other)?;
        fs::write(OOM_SCORE, new(score).to_string())
    };
    if let Err(error) = set() {
        debug!(%error, "cannot say whom to kill first when memory is short");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_arrives_at_a_path_and_at_a_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("millstream-test-{}", std::process::id());
        let by_path = UnixDatagram::bind(&path).unwrap();
        let by_name = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        tell(path.as_os_str(), "READY=1").unwrap();
        tell(OsStr::new(&format!("@{name}")), "READY=1").unwrap();
        for socket in [by_path, by_name] {
            let mut buffer = [0; 64];
            let len = socket.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..len], b"READY=1");
        }
    }
}
