//! Signals taken one at a time by a program that has a single thread.

use std::io;
use std::time::Duration;

/// A set of signals that are blocked and wait to be taken.
#[derive(Clone, Copy)]
pub struct Signals {
    set: libc::sigset_t,
}

impl std::fmt::Debug for Signals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signals").finish_non_exhaustive()
    }
}

impl Signals {
    /// Blocks `signals` in this thread (call it before any other thread is started); from now on they wait for [`Self::wait`].
    /// Children inherit the block, unless [`crate::process::spawn_with`] starts them.
    ///
    /// # Errors
    /// When a number is not a signal.
    pub fn block(signals: &[i32]) -> io::Result<Self> {
        // SAFETY: `set` is plain data, initialised by sigemptyset before use; the pointers are valid for each call.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in signals {
                if libc::sigaddset(&raw mut set, *signal) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            match libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) {
                0 => Ok(Self { set }),
                code => Err(io::Error::from_raw_os_error(code)),
            }
        }
    }

    /// Takes the next signal of the set, or `None` after `timeout`.
    ///
    /// # Errors
    /// Those of `sigtimedwait(2)`, without the harmless ones.
    pub fn wait(&self, timeout: Duration) -> io::Result<Option<i32>> {
        let timeout = libc::timespec {
            tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: libc::c_long::from(timeout.subsec_nanos().min(999_999_999) as i32),
        };
        // SAFETY: set and time-out are valid; no siginfo is asked for.
        let signal = unsafe { libc::sigtimedwait(&raw const self.set, std::ptr::null_mut(), &raw const timeout) };
        if signal > 0 {
            return Ok(Some(signal));
        }
        match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => Ok(None),
            error => Err(error),
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
}
