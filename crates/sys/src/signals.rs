//! Signals taken one at a time by a program that has a single thread.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Bytes of `struct signalfd_siginfo`; the number of the signal is its first field.
const SIGNAL_INFO: usize = 128;

/// A set of signals that are blocked and wait to be taken.
#[derive(Debug)]
pub struct Signals {
    descriptor: File,
}

impl Signals {
    /// Blocks `signals` in this thread (call it before any other thread is started); from now on they wait for [`Self::wait`].
    /// Children inherit the block, unless [`crate::process::spawn_with`] starts them.
    ///
    /// # Errors
    /// When a number is not a signal.
    pub fn block(signals: &[i32]) -> io::Result<Self> {
        // SAFETY: `set` is plain data, initialised by sigemptyset before use; the pointers are valid for each call. The
        // descriptor that signalfd returns belongs to nobody else.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in signals {
                if libc::sigaddset(&raw mut set, *signal) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            match libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) {
                0 => {}
                code => return Err(io::Error::from_raw_os_error(code)),
            }
            match libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
                -1 => Err(io::Error::last_os_error()),
                descriptor => Ok(Self { descriptor: OwnedFd::from_raw_fd(descriptor).into() }),
            }
        }
    }

    /// Takes the next signal of the set, or `None` after `timeout`.
    ///
    /// # Errors
    /// Those of `poll(2)` and of reading a `signalfd(2)`.
    pub fn wait(&self, timeout: Duration) -> io::Result<Option<i32>> {
        self.wait_or(&[], timeout)
    }

    /// Takes the next signal of the set; `None` after `timeout`, or as soon as one of `others` can be read or has ended.
    ///
    /// # Errors
    /// Those of [`Self::wait`].
    pub fn wait_or(&self, others: &[BorrowedFd<'_>], timeout: Duration) -> io::Result<Option<i32>> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(signal) = self.take()? {
                return Ok(Some(signal));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let mut polled = vec![PollFd::from_borrowed_fd(self.descriptor.as_fd(), PollFlags::IN)];
            polled.extend(others.iter().map(|other| PollFd::from_borrowed_fd(*other, PollFlags::IN)));
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            let ready = rustix::io::retry_on_intr(|| poll(&mut polled, Some(&left)))?;
            let signalled = polled.first().is_some_and(|own| !own.revents().is_empty());
            if !signalled && (ready > 0 || Instant::now() >= deadline) {
                return Ok(None);
            }
        }
    }

    fn take(&self) -> io::Result<Option<i32>> {
        let mut info = [0; SIGNAL_INFO];
        match (&self.descriptor).read(&mut info) {
            Ok(_) => Ok(info.first_chunk().map(|number| i32::from_ne_bytes(*number))),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blocked_signal_waits_to_be_taken() {
        std::thread::spawn(|| {
            let signals = Signals::block(&[libc::SIGUSR2]).unwrap();
            assert_eq!(signals.wait(Duration::from_millis(1)).unwrap(), None);
            // SAFETY: the signal is blocked in this thread, which it is sent to.
            unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGUSR2) };
            assert_eq!(signals.wait(Duration::from_secs(5)).unwrap(), Some(libc::SIGUSR2));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn what_else_is_waited_for_ends_the_wait() {
        std::thread::spawn(|| {
            let signals = Signals::block(&[libc::SIGUSR2]).unwrap();
            let (reader, writer) = std::io::pipe().unwrap();
            assert_eq!(signals.wait_or(&[reader.as_fd()], Duration::from_millis(1)).unwrap(), None);
            std::io::Write::write_all(&mut &writer, b"x").unwrap();
            let begun = Instant::now();
            assert_eq!(signals.wait_or(&[reader.as_fd()], Duration::from_secs(60)).unwrap(), None);
            assert!(begun.elapsed() < Duration::from_secs(50));
        })
        .join()
        .unwrap();
    }
}
