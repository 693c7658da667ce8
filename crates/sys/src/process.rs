//! A child process that starts with chosen descriptors at chosen numbers.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};

/// First number that [`spawn_with`] gives to a passed descriptor (0 to 2 are the standard streams).
pub const FIRST_PASSED: RawFd = 3;

/// Starts `command` with `passed[i]` as its descriptor number `FIRST_PASSED + i` and no signal blocked. The child is killed when the thread that
/// started it ends, so that no worker outlives its supervisor.
///
/// # Errors
/// Those of starting a process.
pub fn spawn_with(mut command: Command, passed: &[BorrowedFd<'_>]) -> io::Result<Child> {
    // Duplicates far above every target number, so that putting one in place cannot overwrite another one's source.
    let base = FIRST_PASSED + RawFd::try_from(passed.len()).map_err(io::Error::other)?;
    let mut sources = Vec::with_capacity(passed.len());
    for fd in passed {
        sources.push(rustix::io::fcntl_dupfd_cloexec(fd, base)?);
    }
    // What `spawn` opens for itself (the pipe over which the child reports why it could not start) must not get one of the
    // numbers that the child then overwrites: each that is free now is taken until the child runs.
    let mut placeholders = Vec::new();
    if let Some(any) = passed.first() {
        loop {
            let placeholder = rustix::io::fcntl_dupfd_cloexec(any, FIRST_PASSED)?;
            let above = placeholder.as_raw_fd() >= base;
            placeholders.push(placeholder);
            if above {
                break;
            }
        }
    }
    let numbers: Vec<RawFd> = sources.iter().map(AsRawFd::as_raw_fd).collect();
    let supervisor = std::process::id();
    // SAFETY: between fork and exec only dup2(2), sigprocmask(2), prctl(2), getppid(2) and _exit(2) are called, all async-signal-safe; the
    // vector was allocated before the fork and is only read.
    unsafe {
        command.pre_exec(move || {
            for (target, source) in (FIRST_PASSED..).zip(&numbers) {
                // dup2 clears close-on-exec on the new number.
                if libc::dup2(*source, target) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            // Signals that the supervisor takes one by one (`signals`) are blocked in it, and that would be inherited.
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            if libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) < 0 {
                return Err(io::Error::last_os_error());
            }
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0 {
                return Err(io::Error::last_os_error());
            }
            // The supervisor may have died before prctl took effect.
            if u32::try_from(libc::getppid()) != Ok(supervisor) {
                libc::_exit(1);
            }
            Ok(())
        });
    }
    let child = command.spawn();
    drop((sources, placeholders));
    child
}

static TAKEN: AtomicBool = AtomicBool::new(false);

/// Takes over `count` descriptors that [`spawn_with`] passed to this process. Works once.
///
/// # Errors
/// When they were taken before, or one of the numbers is not open.
pub fn take_passed(count: usize) -> io::Result<Vec<OwnedFd>> {
    if TAKEN.swap(true, Ordering::AcqRel) {
        return Err(io::Error::other("passed descriptors were taken before"));
    }
    let count = RawFd::try_from(count).map_err(io::Error::other)?;
    let mut taken = Vec::new();
    for number in FIRST_PASSED..FIRST_PASSED + count {
        // SAFETY: fcntl with F_SETFD only fails when the number is not open, which is what we ask.
        if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(io::Error::other(format!("descriptor {number} was not passed")));
        }
        // SAFETY: the number is open, was passed to this process for this purpose, and TAKEN makes sure that nobody else
        // becomes its owner.
        taken.push(unsafe { OwnedFd::from_raw_fd(number) });
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsFd;

    #[test]
    fn the_child_can_be_asked_to_end() {
        std::thread::spawn(|| {
            crate::signals::Signals::block(&[libc::SIGTERM]).unwrap();
            let mut command = Command::new("sleep");
            command.arg("60");
            let mut child = spawn_with(command, &[]).unwrap();
            let pid = rustix::process::Pid::from_child(&child);
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
            let status = child.wait().unwrap();
            assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGTERM));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_program_that_cannot_be_started_is_an_error_whatever_numbers_are_free() {
        let (a, _b) = std::io::pipe().unwrap();
        // More than are open here, so that some number that the child overwrites would be free.
        let passed = vec![a.as_fd(); 200];
        let error = spawn_with(Command::new("/nonexistent/program"), &passed).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn the_child_finds_each_descriptor_at_its_number() {
        let (a, b) = std::io::pipe().unwrap();
        let (mut c, d) = std::io::pipe().unwrap();
        let mut command = Command::new("sh");
        // In the child: 3 is d, 4 is b.
        command.args(["-c", "echo three >&3; echo four >&4"]);
        let mut child = spawn_with(command, &[d.as_fd(), b.as_fd()]).unwrap();
        drop((b, d));
        let (mut a, mut three, mut four) = (a, String::new(), String::new());
        c.read_to_string(&mut three).unwrap();
        a.read_to_string(&mut four).unwrap();
        assert!(child.wait().unwrap().success());
        assert_eq!((three.as_str(), four.as_str()), ("three\n", "four\n"));
    }
}
