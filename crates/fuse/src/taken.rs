//! What each thread has taken from the kernel last, in the journal's memory.
//!
//! A thread that waits for a request when its process is killed takes one along, if one has just come: the kernel looks for a
//! request before it looks whether the thread is to die. Nothing that the process does can note that one. So the threads read
//! into the journal's memory to begin with: fuser allocates a buffer for each, and [`millstream_sys::lent`] puts it there. The next
//! worker finds in it a request that is noted nowhere, or one that was answered and that the kernel does not know any more.
//!
//! Only on kernels before 6.9; later ones send again what was taken.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use millstream_sys::lent::lend;

use crate::journal::{Journal, Noted, Operation, RESENT};
use crate::session::THREADS;

/// Bytes of the buffer that fuser 0.18 allocates for a thread.
pub const BUFFER: usize = 16 * 1024 * 1024 + 4096;
/// One for each thread, and one for the session that answers what was left.
const PLACES: usize = THREADS + 1;
/// What the first place is aligned to, in words.
const PAGE: usize = 4096 / 8;
/// Words of a place.
const PLACE: usize = BUFFER / 8;
/// Words of the longest request that is looked at: a header and the longest name.
const LONGEST: usize = 64;
/// Bytes of `struct fuse_in_header`.
const HEADER: usize = 40;

/// Words of a journal that ends with places, of which `words` come before.
pub(crate) const fn with_places(words: usize) -> usize {
    first(words) + PLACES * PLACE
}

/// The first word of the first place.
const fn first(words: usize) -> usize {
    words.next_multiple_of(PAGE)
}

impl Journal {
    /// From now on what this process allocates in the size of [`BUFFER`] lies in the journal. A journal of a supervisor that
    /// knows nothing of that has no room; then there is nothing to be found in it, either.
    ///
    /// # Errors
    /// Those of mapping memory.
    pub fn keep_what_is_taken(&self) -> io::Result<()> {
        if self.words.words().len() < with_places(Self::WORDS) {
            return Ok(());
        }
        lend(self.descriptor.as_fd(), (first(Self::WORDS) * 8) as u64, BUFFER, PLACES)
    }

    /// The last request that each thread of the last worker has taken, answered or not; without what needs no answer.
    pub fn taken(&self) -> Vec<Noted> {
        let words = self.words.words();
        let place = |number| words.get(first(Self::WORDS) + number * PLACE..)?.get(..LONGEST);
        let bytes = (0..PLACES)
            .filter_map(place)
            .map(|place| place.iter().flat_map(|word| word.load(Ordering::Acquire).to_le_bytes()).collect::<Vec<u8>>());
        bytes.filter_map(|request| noted(&request)).collect()
    }
}

/// A request as the kernel sends it: the other way round than in [`crate::replay`].
fn noted(request: &[u8]) -> Option<Noted> {
    let word = |at: usize| Some(u32::from_le_bytes(request.get(at..at + 4)?.try_into().ok()?));
    let long = |at: usize| Some(u64::from_le_bytes(request.get(at..at + 8)?.try_into().ok()?));
    let text = |at: usize| {
        let name = request.get(at..).unwrap_or_default();
        name.iter().position(|byte| *byte == 0).and_then(|end| name.get(..end)).unwrap_or_default().to_vec()
    };
    let (len, opcode, unique, node) = (word(0)?, word(4)?, long(8)?, long(16)?);
    let operation = Operation::of(opcode)?;
    // One that was sent by `replay` is noted.
    if (len as usize) < HEADER || unique == 0 || unique & RESENT != 0 {
        return None;
    }
    let (offset, size, name) = match operation {
        // struct fuse_read_in
        Operation::Read | Operation::ReadDir | Operation::ReadDirPlus => (long(48)?, word(56)?, Vec::new()),
        // struct fuse_getxattr_in
        Operation::GetXattr => (0, word(40)?, text(48)),
        Operation::ListXattr => (0, word(40)?, Vec::new()),
        Operation::LookUp => (0, 0, text(40)),
        Operation::GetAttr
        | Operation::ReadLink
        | Operation::Open
        | Operation::StatFs
        | Operation::Release
        | Operation::Flush
        | Operation::OpenDir
        | Operation::ReleaseDir => (0, 0, Vec::new()),
    };
    Some(Noted { unique, opcode, node, offset, size, name })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_as_it_is_made_again() {
        for operation in Operation::ALL {
            let reads = matches!(operation, Operation::Read | Operation::ReadDir | Operation::ReadDirPlus);
            let sized = reads || matches!(operation, Operation::GetXattr | Operation::ListXattr);
            let named = matches!(operation, Operation::GetXattr | Operation::LookUp);
            let request = Noted {
                unique: 6,
                opcode: operation as u32,
                node: 7,
                offset: if reads { 8 } else { 0 },
                size: if sized { 9 } else { 0 },
                name: if named { vec![b'n'; 255] } else { Vec::new() },
            };
            let mut bytes = crate::replay::request(&request);
            assert!(bytes.len() <= LONGEST * 8);
            assert_eq!(noted(&bytes), None, "it is marked as sent again");
            bytes[15] = 0;
            bytes.resize(LONGEST * 8, 0);
            assert_eq!(noted(&bytes), Some(request));
        }
        assert_eq!(noted(&[0; LONGEST * 8]), None);
    }
}
