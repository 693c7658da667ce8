//! Requests that a predecessor had taken from the kernel and not yet noted when it died, on kernels that do not send them again.
//!
//! Nobody knows what they ask for, and whoever asked would wait for ever. But what number they can have is known: the kernel
//! numbers requests as it queues them and hands them out in that order, so each is near the last one that was noted. All numbers
//! there are answered with an error, but those that the journal has. An answer that nobody waits for does no harm; nor does one
//! to a request that is still queued, since the kernel looks for it among those that were handed out. So this is right as long as
//! nobody reads from the device meanwhile.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;

use millstream_sys::fuse_device::answer_with_error;
use rustix::io::Errno;
use tracing::warn;

use crate::journal::{Journal, Noted};

/// How much of a number one request takes (`FUSE_REQ_ID_STEP` of the kernel).
const STEP: u64 = 2;
/// Requests before the last one that was noted among which an orphan may be: what the other threads can do while one is held up
/// between taking a request and noting it. To answer all of them takes some ten milliseconds.
const BEFORE: u64 = 8 * 1024;
/// Requests after it: one for each thread, and those of which no note is made.
const AFTER: u64 = 1024;
/// The kernel tries a look-up again that ends with it, and all that begins with one (open, stat, execute), and a program does not
/// see it. Reads past the page cache and of directories end with it.
const GIVEN_UP: Errno = Errno::STALE;

/// Ends the wait for requests that were taken from `device` and are not among those `left` in the journal. To be called before
/// the first request is taken.
///
/// # Errors
/// Those of the device.
pub(crate) fn give_up(device: impl AsFd, journal: &Journal, left: &[Noted]) -> io::Result<()> {
    let mut given_up = 0;
    for unique in candidates(journal.latest(), left) {
        given_up += u64::from(answer_with_error(device.as_fd(), unique, GIVEN_UP)?);
    }
    if given_up > 0 {
        warn!(
            requests = given_up,
            "the last worker died with requests that it had not noted yet; they are answered with ESTALE, which programs see \
             where they read past the page cache or list a directory"
        );
    }
    Ok(())
}

/// Numbers that an orphan can have.
fn candidates(latest: u64, left: &[Noted]) -> impl Iterator<Item = u64> {
    let left: BTreeSet<u64> = left.iter().map(|noted| noted.unique).collect();
    // A program that keeps no latest number may have served meanwhile.
    let latest = left.last().map_or(latest, |last| latest.max(*last)) / STEP;
    let first = latest.saturating_sub(BEFORE).max(1);
    // 0 is no request, and what is odd an interrupt of one.
    (first..=latest + AFTER).map(|number| number * STEP).filter(move |unique| !left.contains(unique))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noted(unique: u64) -> Noted {
        Noted { unique, opcode: 15, node: 1, offset: 0, size: 0, name: Vec::new() }
    }

    #[test]
    fn what_is_noted_is_no_orphan() {
        let found: Vec<u64> = candidates(10, &[noted(4), noted(8)]).take(5).collect();
        assert_eq!(found, [2, 6, 10, 12, 14]);
        assert_eq!(candidates(0, &[]).count() as u64, AFTER);
        assert_eq!(candidates(0, &[noted(1 << 40)]).last(), Some((1 << 40) + AFTER * STEP));
    }

    #[test]
    fn there_is_a_bound_on_both_sides() {
        let latest = 1 << 40;
        let found: Vec<u64> = candidates(latest, &[noted(latest)]).collect();
        assert_eq!(found.len() as u64, BEFORE + AFTER);
        assert_eq!(found.first(), Some(&(latest - BEFORE * STEP)));
        assert!(found.iter().all(|unique| unique % STEP == 0));
    }
}
