//! Shared memory in place of what a library allocates, so that what it holds outlives the process.
//!
//! A library that reads from a descriptor into a buffer of its own takes along what it has read when the process dies. Here its
//! buffer is recognised by its size when it is allocated, and lies in memory that another process can look into afterwards.
//! For that a program has [`Lender`] as its allocator; where it has not, nothing is lent and nothing breaks.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustix::fs::{FallocateFlags, fallocate};

/// Bytes of a page; more on some machines, where the places are then not aligned to one and cannot be mapped.
const PAGE: usize = 4096;

/// Whether something was lent already; later calls change nothing.
static BEGUN: AtomicBool = AtomicBool::new(false);
/// Bytes of an allocation that is meant; 0: none is.
static SIZE: AtomicUsize = AtomicUsize::new(0);
/// Address of the first place.
static FIRST: AtomicUsize = AtomicUsize::new(0);
/// Address of the next one that is free.
static NEXT: AtomicUsize = AtomicUsize::new(0);
/// Address after the last one.
static END: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, which gives zeroed memory of one size from what [`lend`] was given, as long as that lasts.
#[derive(Debug)]
pub struct Lender;

/// Lends `count` places of `size` bytes, one after the other from byte `start` of a descriptor of [`crate::shared::create`], to the
/// next zeroed allocations of exactly that size. Their bytes become zero. Works once in a process; `start` and `size` are
/// multiples of 4096.
///
/// # Errors
/// Those of `fallocate(2)` and `mmap(2)`; when the descriptor is shorter.
pub fn lend(descriptor: impl AsFd, start: u64, size: usize, count: usize) -> io::Result<()> {
    let descriptor = descriptor.as_fd();
    let bytes = size.checked_mul(count).filter(|bytes| *bytes > 0 && size.is_multiple_of(PAGE));
    let bytes = bytes.ok_or(io::ErrorKind::InvalidInput)?;
    let end = u64::try_from(rustix::fs::fstat(descriptor)?.st_size).map_err(io::Error::other)?;
    if start.saturating_add(bytes as u64) > end {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "shared memory that is shorter than what is lent of it",
        ));
    }
    if BEGUN.swap(true, Ordering::AcqRel) {
        return Ok(());
    }
    fallocate(descriptor, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, start, bytes as u64)?;
    let offset = libc::off_t::try_from(start).map_err(io::Error::other)?;
    let (read_write, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
    // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing object.
    let address =
        unsafe { libc::mmap(std::ptr::null_mut(), bytes, read_write, shared, descriptor.as_raw_fd(), offset) };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    for place in (0..bytes).step_by(size) {
        // A thread that is being killed cannot be given a page any more, only write to one that it has.
        // SAFETY: the byte is in the mapping, and nobody else has got the address yet.
        unsafe { address.cast::<u8>().add(place).write_volatile(0) };
    }
    let address = address as usize;
    FIRST.store(address, Ordering::Relaxed);
    NEXT.store(address, Ordering::Relaxed);
    END.store(address + bytes, Ordering::Relaxed);
    SIZE.store(size, Ordering::Release);
    Ok(())
}

/// Whether an allocation of this layout may be one of ours.
fn is_meant(layout: Layout) -> bool {
    layout.size() == SIZE.load(Ordering::Acquire) && layout.size() != 0 && layout.align() <= PAGE
}

/// The next place, which nobody has had.
fn take(size: usize) -> Option<*mut u8> {
    let end = END.load(Ordering::Relaxed);
    let next = |next: usize| (next < end).then_some(next + size);
    let place = NEXT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).ok()?;
    Some(std::ptr::with_exposed_provenance_mut(place))
}

fn is_lent(pointer: *mut u8) -> bool {
    (FIRST.load(Ordering::Relaxed)..END.load(Ordering::Relaxed)).contains(&pointer.addr())
}

// SAFETY: all is passed on to the system's allocator but what `lend` has mapped: each place of that is given out once, is zero,
// as large as asked for and aligned to a page, stays mapped as long as the process lives, and is never passed to the system's
// allocator.
unsafe impl GlobalAlloc for Lender {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_meant(layout)
            && let Some(place) = take(layout.size())
        {
            return place;
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if is_meant(layout) && is_lent(pointer) {
            return;
        }
        // SAFETY: the caller's promise; it is none of ours, so it came from there.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        if !(is_meant(layout) && is_lent(pointer)) {
            // SAFETY: the caller's promise; it is none of ours, so it came from there.
            return unsafe { System.realloc(pointer, layout, new_size) };
        }
        // SAFETY: the caller promises that the size is not 0 and fits with this alignment.
        let new = unsafe { System.alloc(Layout::from_size_align_unchecked(new_size, layout.align())) };
        if !new.is_null() {
            // SAFETY: both are at least as long as the shorter one, and the new one is nobody else's.
            unsafe { std::ptr::copy_nonoverlapping(pointer, new, layout.size().min(new_size)) };
        }
        new
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::shared::{SharedWords, create};

    #[global_allocator]
    static ALLOCATOR: Lender = Lender;

    #[test]
    fn what_is_allocated_in_this_size_can_be_read_elsewhere_and_the_rest_cannot() {
        let size = 16 * PAGE;
        let descriptor = create("test", 64 * PAGE / 8).unwrap();
        let words = SharedWords::map(&descriptor).unwrap();
        let word = |place: usize| words.words()[(PAGE + place * size) / 8].load(Ordering::Relaxed);
        words.words()[PAGE / 8].store(7, Ordering::Relaxed);
        assert!(lend(&descriptor, PAGE as u64, size, 4).is_err(), "it is too short for that");
        lend(&descriptor, PAGE as u64, size, 2).unwrap();
        assert_eq!(word(0), 0);
        let mut buffers = [vec![0u8; size], vec![0u8; size], vec![0u8; size]];
        buffers.iter_mut().zip(1..).for_each(|(buffer, value)| buffer[0] = value);
        assert_eq!([word(0), word(1)], [1, 2]);
        let [mut first, second, third] = buffers;
        first.reserve_exact(size);
        assert_eq!(first[0], 1);
        drop((first, second));
        assert_eq!(third[0], 3);
        assert_eq!([word(0), word(1)], [1, 2], "nobody gets them again");
        assert_eq!(vec![0u8; size][0], 0);
        lend(&descriptor, PAGE as u64, size, 2).unwrap();
        assert_eq!([word(0), word(1)], [1, 2]);
    }
}
