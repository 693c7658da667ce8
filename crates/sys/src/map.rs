//! Read-only file mappings that survive a file which got shorter.
//!
//! Touching a page of a mapping that lies behind the end of its file raises `SIGBUS`, which would end the whole worker
//! because of one damaged file. Here a handler puts a page of zeros in place of the missing one and marks the mapping as
//! [poisoned](GuardedMap::poisoned); whoever reads it must check what it reads anyway, and finds zeros.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, Once, PoisonError};

/// One registered range. Slots are never freed, only reused, so that the signal handler may walk them at any time.
struct Slot {
    start: AtomicUsize,
    len: AtomicUsize,
    poisoned: AtomicBool,
    used: AtomicBool,
    next: AtomicPtr<Slot>,
}

static SLOTS: AtomicPtr<Slot> = AtomicPtr::new(ptr::null_mut());
static SLOT_CHANGES: Mutex<()> = Mutex::new(());
static INSTALL: Once = Once::new();
static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());

/// A whole file, mapped read-only and shared with the page cache.
#[derive(Debug)]
pub struct GuardedMap {
    address: *const u8,
    len: usize,
    slot: &'static Slot,
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Slot").field("poisoned", &self.poisoned).finish_non_exhaustive()
    }
}

// SAFETY: the mapping is read-only for its whole life and not tied to a thread; the slot is made of atomics.
unsafe impl Send for GuardedMap {}
// SAFETY: as above.
unsafe impl Sync for GuardedMap {}

impl GuardedMap {
    /// Maps all of `file`. An empty file gives an empty map.
    ///
    /// Whoever can write to the file can change what readers see, as with any mapping: map only files that this program
    /// wrote completely and never changes afterwards, in a directory that only it can enter.
    ///
    /// # Errors
    /// Those of `fstat(2)` and `mmap(2)`.
    pub fn new(file: &File) -> io::Result<Self> {
        INSTALL.call_once(install_handler);
        let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        let slot = take_slot();
        if len == 0 {
            return Ok(Self { address: ptr::null(), len: 0, slot });
        }
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing object.
        let address =
            unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if address == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            slot.used.store(false, Ordering::Release);
            return Err(error);
        }
        slot.len.store(len, Ordering::Release);
        slot.start.store(address as usize, Ordering::Release);
        Ok(Self { address: address.cast(), len, slot })
    }

    /// Whether a page was found missing since the file was mapped: what is read from now on may be zeros.
    #[must_use]
    pub fn poisoned(&self) -> bool {
        self.slot.poisoned.load(Ordering::Acquire)
    }
}

impl AsRef<[u8]> for GuardedMap {
    fn as_ref(&self) -> &[u8] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: `address` maps `len` readable bytes until drop. Pages that vanish are replaced by the handler before the
        // access completes; the file is not written to after it was mapped (see `new`).
        unsafe { std::slice::from_raw_parts(self.address, self.len) }
    }
}

impl Drop for GuardedMap {
    fn drop(&mut self) {
        self.slot.start.store(0, Ordering::Release);
        if self.len != 0 {
            // SAFETY: the range was mapped by `new` and no slice of it outlives `self`.
            unsafe { libc::munmap(self.address.cast_mut().cast(), self.len) };
        }
        self.slot.used.store(false, Ordering::Release);
    }
}

fn take_slot() -> &'static Slot {
    let _guard = SLOT_CHANGES.lock().unwrap_or_else(PoisonError::into_inner);
    let mut cursor = SLOTS.load(Ordering::Acquire);
    while !cursor.is_null() {
        // SAFETY: slots are leaked boxes and never freed.
        let slot = unsafe { &*cursor };
        if !slot.used.swap(true, Ordering::AcqRel) {
            slot.poisoned.store(false, Ordering::Release);
            return slot;
        }
        cursor = slot.next.load(Ordering::Acquire);
    }
    let slot: &'static Slot = Box::leak(Box::new(Slot {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        poisoned: AtomicBool::new(false),
        used: AtomicBool::new(true),
        next: AtomicPtr::new(SLOTS.load(Ordering::Acquire)),
    }));
    SLOTS.store(ptr::from_ref(slot).cast_mut(), Ordering::Release);
    slot
}

fn install_handler() {
    // SAFETY: `sigaction` structs are plain data; the handler below only uses atomics, mmap(2) and sigaction(2), which are
    // async-signal-safe.
    unsafe {
        let previous: &'static mut libc::sigaction = Box::leak(Box::new(std::mem::zeroed()));
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_bus_error as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, &raw const action, previous);
        PREVIOUS.store(previous, Ordering::Release);
    }
}

extern "C" fn on_bus_error(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo for SIGBUS.
    let address = unsafe { (*info).si_addr() } as usize;
    let mut cursor = SLOTS.load(Ordering::Acquire);
    while !cursor.is_null() {
        // SAFETY: slots are leaked boxes and never freed.
        let slot = unsafe { &*cursor };
        let start = slot.start.load(Ordering::Acquire);
        if start != 0 && address >= start && address - start < slot.len.load(Ordering::Acquire) {
            slot.poisoned.store(true, Ordering::Release);
            if put_zero_page(address) {
                return;
            }
        }
        cursor = slot.next.load(Ordering::Acquire);
    }
    hand_on(signal, info, context);
}

fn put_zero_page(address: usize) -> bool {
    // SAFETY: sysconf has no preconditions.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    let base = address & !(page - 1);
    // SAFETY: the page lies in a mapping that this module owns (found in a slot), and it is missing: nothing that was
    // readable is replaced.
    let placed = unsafe {
        libc::mmap(
            base as *mut libc::c_void,
            page,
            libc::PROT_READ,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    placed != libc::MAP_FAILED
}

/// Not our mapping: do what would have been done without us.
fn hand_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = PREVIOUS.load(Ordering::Acquire);
    // SAFETY: `previous` is null or a leaked, fully written `sigaction`; its handler has the signature that its flags say.
    unsafe {
        if !previous.is_null() && (*previous).sa_flags & libc::SA_SIGINFO != 0 {
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                std::mem::transmute((*previous).sa_sigaction);
            handler(signal, info, context);
            return;
        }
        let mut default: libc::sigaction = std::mem::zeroed();
        default.sa_sigaction = libc::SIG_DFL;
        libc::sigaction(signal, &raw const default, ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_shortened_file_reads_as_zeros_and_is_poisoned() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7u8; 3 * 4096]).unwrap();
        let map = GuardedMap::new(&file).unwrap();
        assert!(map.as_ref().iter().all(|byte| *byte == 7));
        file.set_len(4096).unwrap();
        assert_eq!(map.as_ref()[4095], 7);
        assert!(!map.poisoned());
        assert_eq!(map.as_ref()[2 * 4096], 0);
        assert!(map.poisoned());
    }

    #[test]
    fn slots_are_reused_and_start_clean() {
        for _ in 0..100 {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(b"abc").unwrap();
            let map = GuardedMap::new(&file).unwrap();
            assert_eq!(map.as_ref(), b"abc");
            assert!(!map.poisoned());
        }
        let empty = GuardedMap::new(&tempfile::tempfile().unwrap()).unwrap();
        assert!(empty.as_ref().is_empty());
    }
}
