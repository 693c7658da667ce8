//! Words of memory that processes share, and that outlive each of them as long as one holds the descriptor.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, ftruncate, memfd_create};

/// A mapping of all words of such a descriptor.
#[derive(Debug)]
pub struct SharedWords {
    address: NonNull<AtomicU64>,
    len: usize,
}

// SAFETY: what is mapped is only reached as atomics, and the mapping is not tied to a thread.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

/// Makes `words` words, all zero, whose number can never change. `name` is what `/proc` shows.
///
/// # Errors
/// Those of `memfd_create(2)`, `ftruncate(2)` and `fcntl(2)`.
pub fn create(name: &str, words: usize) -> io::Result<OwnedFd> {
    let descriptor = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&descriptor, words.saturating_mul(size_of::<AtomicU64>()) as u64)?;
    // So that no process can make another one fault.
    fcntl_add_seals(&descriptor, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(descriptor)
}

impl SharedWords {
    /// Maps all of a descriptor that [`create`] made, in this process or another.
    ///
    /// # Errors
    /// Those of `fstat(2)` and `mmap(2)`; when the descriptor is none of [`create`].
    pub fn map(descriptor: impl AsFd) -> io::Result<Self> {
        let descriptor = descriptor.as_fd();
        let seals = rustix::fs::fcntl_get_seals(descriptor)?;
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "shared memory that could change its size"));
        }
        let bytes = usize::try_from(fstat(descriptor)?.st_size).map_err(io::Error::other)?;
        let (read_write, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing object.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, read_write, shared, descriptor.as_raw_fd(), 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = NonNull::new(address.cast()).ok_or_else(|| io::Error::other("mapped at nothing"))?;
        Ok(Self { address, len: bytes / size_of::<AtomicU64>() })
    }

    /// All of them.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping holds `len` words, aligned to a page, for as long as `self` lives; the seals keep the file from
        // getting shorter; every bit pattern is a valid word, and other processes reach them as atomics, too.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.len) }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `map`, and no slice of it outlives `self`.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.len * size_of::<AtomicU64>()) };
    }
}

/// Nanoseconds of the clock that all processes of the machine share and nobody sets (`CLOCK_MONOTONIC`).
#[must_use]
pub fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` has room for what the call writes; the clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    u64::try_from(time.tv_sec).unwrap_or_default() * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn mappings_show_the_same_words() {
        let descriptor = create("test", 1000).unwrap();
        let (one, other) = (SharedWords::map(&descriptor).unwrap(), SharedWords::map(&descriptor).unwrap());
        assert_eq!(one.words().len(), 1000);
        one.words()[999].store(7, Ordering::Relaxed);
        drop(one);
        assert_eq!(other.words()[999].load(Ordering::Relaxed), 7);
        assert!(ftruncate(&descriptor, 8).is_err());
        assert!(SharedWords::map(tempfile::tempfile().unwrap()).is_err());
    }
}
