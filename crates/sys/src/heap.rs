//! How much memory the allocator of the C library keeps of what was given back to it.
//!
//! glibc's has, unless told otherwise, eight arenas for each processor, and each keeps what it once needed: a daemon that is mostly
//! idle then holds several times what it uses. Elsewhere nothing here does anything.

#[cfg(target_env = "gnu")]
mod gnu {
    use libc::{M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, c_int};

    /// Arenas. Small allocations come from a cache of the thread, so few threads meet there.
    const ARENAS: c_int = 2;
    /// Bytes from which an allocation has a mapping of its own, which ends with it. More than the answer to a usual read
    /// (128 KiB), less than what is fetched at a time.
    const OWN_MAPPING: c_int = 256 << 10;
    /// Bytes at the end of an arena that it may keep: a few answers to reads.
    const KEPT: c_int = 1 << 20;

    pub(super) fn keep_little() {
        for (what, value) in [(M_ARENA_MAX, ARENAS), (M_MMAP_THRESHOLD, OWN_MAPPING), (M_TRIM_THRESHOLD, KEPT)] {
            // SAFETY: sets a number of the allocator, which takes its own lock for that.
            let _ = unsafe { libc::mallopt(what, value) };
        }
    }

    pub(super) fn give_back() {
        // SAFETY: touches only what nobody has; the allocator takes its own locks.
        let _ = unsafe { libc::malloc_trim(0) };
    }
}

/// From now on the allocator keeps little. To be called before the first thread is started, whose arenas would stay.
pub fn keep_little() {
    #[cfg(target_env = "gnu")]
    gnu::keep_little();
}

/// Gives back to the kernel what the allocator holds and nobody uses, also between what is used. Threads that allocate meanwhile may
/// wait.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    gnu::give_back();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn anonymous() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    #[test]
    #[cfg(target_env = "gnu")]
    fn what_lies_between_things_in_use_is_given_back() {
        keep_little();
        let mut pieces: Vec<Option<Vec<u8>>> = (0..4096).map(|_| Some(vec![1; 16 << 10])).collect();
        let full = anonymous();
        // One of 64 stays, so that nothing but trimming gets at the others.
        for (at, piece) in pieces.iter_mut().enumerate() {
            if at % 64 != 0 {
                *piece = None;
            }
        }
        give_back();
        assert!(anonymous() < full - (48 << 10), "{full} KiB, then {} KiB", anonymous());
        assert_eq!(pieces.iter().flatten().count(), 64);
    }
}
