//! Which requests are being worked on, in memory that outlives the worker.
//!
//! Each request has a slot from before the work on it begins until after it is answered. The next worker learns from it what
//! the kernel still waits for, which kernels before 6.9 do not send again, and whether a request was there at two deaths
//! running: then it is taken for their cause, and not worked on a third time.
//!
//! A slot is written by one thread and read after its process has died. Its first word is written last, and marked while the
//! others are not all there yet; so a death at any moment leaves a whole request or none.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use millstream_sys::shared::{SharedWords, create, now};

use crate::taken::with_places;

/// Requests that can be in it; what is beyond is served all the same. The kernel sends [`crate::adapter`]'s 64 at once in the
/// background, and one for each thread that waits.
const SLOTS: usize = 1024;
/// Slots in which a request may lie, counted from the one that its number gives.
const PROBES: usize = 16;
/// First word of the memory: what it is, and the version of its form.
const FORM: u64 = u64::from_le_bytes(*b"msjourn1");
/// Words before the first slot.
const HEAD: usize = 8;
/// Word of the head with the highest number that was seen. A program that does not know it leaves it alone, so it may be too low.
const LATEST: usize = 1;
/// Words of a slot.
const SLOT: usize = 40;
/// Bytes of the longest name, which the kernel limits.
const MAX_NAME: usize = 255;
/// Bit of a request's number that the kernel sets when it sends it again (`FUSE_UNIQUE_RESEND`).
pub(crate) const RESENT: u64 = 1 << 63;
/// Bit of a slot's first word while the others are being written.
const UNFINISHED: u64 = 1 << 62;
/// Deaths running after which a request is not worked on any more.
const LAST_DEATH: u64 = 2;
/// A worker that was killed from outside says little about what it had begun just then; what it had been at for this long
/// may be what it was killed for. Longer than a read that is fetched on a busy node usually takes: such reads are no suspects.
const SUSPICIOUS: Duration = Duration::from_secs(3);
/// Hand-overs after which a slot that nobody has taken up is free: the request was answered just before a death.
const FORGOTTEN: u64 = 3;

/// What the kernel asks for, of what is answered here: `FUSE_*` in linux/fuse.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Operation {
    LookUp = 1,
    GetAttr = 3,
    ReadLink = 5,
    Open = 14,
    Read = 15,
    StatFs = 17,
    Release = 18,
    GetXattr = 22,
    ListXattr = 23,
    Flush = 25,
    OpenDir = 27,
    ReadDir = 28,
    ReleaseDir = 29,
    ReadDirPlus = 44,
}

impl Operation {
    pub(crate) const ALL: [Self; 14] = [
        Self::LookUp,
        Self::GetAttr,
        Self::ReadLink,
        Self::Open,
        Self::Read,
        Self::StatFs,
        Self::Release,
        Self::GetXattr,
        Self::ListXattr,
        Self::Flush,
        Self::OpenDir,
        Self::ReadDir,
        Self::ReleaseDir,
        Self::ReadDirPlus,
    ];

    pub(crate) fn of(opcode: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|operation| *operation as u32 == opcode)
    }
}

/// One request, as far as it takes to work on it again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Noted {
    /// The kernel's number of it, without [`RESENT`].
    pub unique: u64,
    /// `FUSE_*` in linux/fuse.h.
    pub opcode: u32,
    /// Node that it is about.
    pub node: u64,
    /// Where to begin in a file or a directory.
    pub offset: u64,
    /// Bytes that are wanted.
    pub size: u32,
    /// Name below `node`, or of an attribute; may be empty.
    pub name: Vec<u8>,
}

/// The memory, as one process sees it.
#[derive(Debug)]
pub struct Journal {
    pub(crate) words: SharedWords,
    pub(crate) descriptor: OwnedFd,
    /// Who writes.
    process: u64,
}

/// What is to become of a request.
#[derive(Debug)]
pub(crate) enum Begun {
    /// It is worked on; the slot is free again when this is dropped.
    Serve(Entry),
    /// It was there at two deaths running.
    Refuse,
}

/// A request that is being worked on.
#[derive(Debug)]
pub(crate) struct Entry(Option<(Arc<Journal>, usize)>);

impl Entry {
    /// Of a request that is not in a journal.
    pub(crate) const fn none() -> Self {
        Self(None)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if let Some((journal, slot)) = self.0.take()
            && let Some(slot) = journal.slot(slot)
        {
            slot.unique.store(0, Ordering::Release);
        }
    }
}

/// The words of a slot by name.
struct Slot<'a> {
    /// Number of the request, with [`UNFINISHED`]; 0: free.
    unique: &'a AtomicU64,
    /// Opcode in the upper half, size in the lower.
    what: &'a AtomicU64,
    node: &'a AtomicU64,
    offset: &'a AtomicU64,
    /// Process in the upper half, then hand-overs since it took the request up, deaths in the lowest byte.
    history: &'a AtomicU64,
    /// When the process took it up, in nanoseconds of the monotonic clock.
    since: &'a AtomicU64,
    name_len: &'a AtomicU64,
    name: &'a [AtomicU64],
}

impl Journal {
    /// Words of the head and the slots. What comes after them is [`crate::taken`]'s, and not there in older journals.
    pub(crate) const WORDS: usize = HEAD + SLOTS * SLOT;

    /// Makes an empty one; the descriptor is for the processes that are to share it.
    ///
    /// # Errors
    /// Those of making and mapping the memory.
    pub fn create() -> io::Result<(OwnedFd, Self)> {
        let descriptor = create("millstream-journal", with_places(Self::WORDS))?;
        let words = SharedWords::map(&descriptor)?;
        if let Some(form) = words.words().first() {
            form.store(FORM, Ordering::Release);
        }
        let journal = Self { words, descriptor: descriptor.try_clone()?, process: u64::from(std::process::id()) };
        Ok((descriptor, journal))
    }

    /// The journal behind a descriptor of [`Journal::create`].
    ///
    /// # Errors
    /// When it cannot be mapped, or has the form of another version.
    pub fn open(descriptor: impl AsFd) -> io::Result<Self> {
        let descriptor = descriptor.as_fd().try_clone_to_owned()?;
        let words = SharedWords::map(&descriptor)?;
        let form = words.words().first().map(|form| form.load(Ordering::Acquire));
        if form != Some(FORM) || words.words().len() < Self::WORDS {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a journal of another form"));
        }
        Ok(Self { words, descriptor, process: u64::from(std::process::id()) })
    }

    fn slot(&self, number: usize) -> Option<Slot<'_>> {
        let start = HEAD + number * SLOT;
        match self.words.words().get(start..start + SLOT)? {
            [unique, what, node, offset, history, since, name_len, name @ ..] => {
                Some(Slot { unique, what, node, offset, history, since, name_len, name })
            }
            _ => None,
        }
    }

    fn slots(&self) -> impl Iterator<Item = Slot<'_>> {
        (0..SLOTS).filter_map(|number| self.slot(number))
    }

    /// Slots in which the request may lie.
    fn places(unique: u64) -> impl Iterator<Item = usize> {
        // The kernel counts in steps of two.
        let first = usize::try_from(unique / 2 % SLOTS as u64).unwrap_or_default();
        (0..PROBES).map(move |step| (first + step) % SLOTS)
    }

    /// Notes a request before the work on it begins. `request.unique` may have [`RESENT`].
    pub(crate) fn begin(self: &Arc<Self>, unique: u64, opcode: u32, about: (u64, u64, u32), name: &[u8]) -> Begun {
        let (resent, unique) = (unique & RESENT != 0, unique & !RESENT);
        self.saw(unique);
        if resent && let Some((number, slot)) = self.find(unique) {
            let deaths = slot.history.load(Ordering::Acquire) & 0xff;
            let entry = Entry(Some((Arc::clone(self), number)));
            if deaths >= LAST_DEATH {
                return Begun::Refuse;
            }
            slot.since.store(now(), Ordering::Relaxed);
            slot.history.store(self.process << 32 | deaths, Ordering::Release);
            return Begun::Serve(entry);
        }
        let request = (opcode, about, name);
        Begun::Serve(Entry(self.note(self.process, unique, request).map(|number| (Arc::clone(self), number))))
    }

    /// Writes a request into a free slot, as one that `process` works on; 0: nobody yet.
    fn note(&self, process: u64, unique: u64, request: (u32, (u64, u64, u32), &[u8])) -> Option<usize> {
        let (opcode, (node, offset, size), name) = request;
        let unfinished = unique | UNFINISHED;
        for number in Self::places(unique) {
            let Some(slot) = self.slot(number) else { continue };
            if slot.unique.compare_exchange(0, unfinished, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                continue;
            }
            slot.what.store(u64::from(opcode) << 32 | u64::from(size), Ordering::Relaxed);
            slot.node.store(node, Ordering::Relaxed);
            slot.offset.store(offset, Ordering::Relaxed);
            slot.history.store(process << 32, Ordering::Relaxed);
            slot.since.store(now(), Ordering::Relaxed);
            let name = name.get(..MAX_NAME).unwrap_or(name);
            slot.name_len.store(name.len() as u64, Ordering::Relaxed);
            for (word, bytes) in slot.name.iter().zip(name.chunks(8)) {
                let mut whole = [0; 8];
                whole.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
                word.store(u64::from_le_bytes(whole), Ordering::Relaxed);
            }
            slot.unique.store(unique, Ordering::Release);
            return Some(number);
        }
        None
    }

    /// Keeps the number of a request that has come, for [`Journal::latest`].
    pub(crate) fn saw(&self, unique: u64) {
        if let Some(latest) = self.words.words().get(LATEST)
            && latest.load(Ordering::Relaxed) < unique
        {
            latest.fetch_max(unique, Ordering::Relaxed);
        }
    }

    /// The highest number of a request that a worker has begun with; 0: none.
    pub(crate) fn latest(&self) -> u64 {
        self.words.words().get(LATEST).map_or(0, |latest| latest.load(Ordering::Relaxed))
    }

    fn find(&self, unique: u64) -> Option<(usize, Slot<'_>)> {
        let slots = Self::places(unique).filter_map(|number| Some((number, self.slot(number)?)));
        slots.into_iter().find(|(_, slot)| slot.unique.load(Ordering::Acquire) == unique)
    }

    /// The supervisor's: `process` has died, `by_itself` unless somebody killed it (who takes too much memory is killed by the kernel, and counts as
    /// one that died by itself). What it was working on may be the cause.
    pub fn died(&self, process: u32, by_itself: bool) {
        let now = now();
        for slot in self.slots() {
            let history = slot.history.load(Ordering::Acquire);
            if slot.unique.load(Ordering::Acquire) == 0 || history >> 32 != u64::from(process) {
                continue;
            }
            let for_long = now.saturating_sub(slot.since.load(Ordering::Relaxed)) >= nanoseconds(SUSPICIOUS);
            if by_itself || for_long {
                slot.history.store(history.saturating_add(1), Ordering::Release);
            }
        }
    }

    /// What predecessors have left unanswered. To be called before the first request is taken; slots that were not finished,
    /// or that nobody has taken up for long, are free then.
    pub(crate) fn left(&self) -> Vec<Noted> {
        let mut left = Vec::new();
        for slot in self.slots() {
            let unique = slot.unique.load(Ordering::Acquire);
            let history = slot.history.load(Ordering::Acquire);
            let hand_overs = history >> 8 & 0xff_ffff;
            if unique & UNFINISHED != 0 || (unique != 0 && hand_overs >= FORGOTTEN) {
                slot.unique.store(0, Ordering::Release);
            } else if unique != 0 {
                slot.history.store(history + (1 << 8), Ordering::Release);
                left.push(slot.noted(unique));
            }
        }
        // They are noted like the others, so that what becomes of them outlives this process, too.
        let mut taken = self.taken();
        taken.retain(|request| left.iter().all(|noted| noted.unique != request.unique));
        for request in &taken {
            let about = (request.node, request.offset, request.size);
            self.note(0, request.unique, (request.opcode, about, &request.name));
        }
        left.append(&mut taken);
        left
    }
}

impl Slot<'_> {
    fn noted(&self, unique: u64) -> Noted {
        let what = self.what.load(Ordering::Acquire);
        let len = usize::try_from(self.name_len.load(Ordering::Relaxed)).unwrap_or_default().min(MAX_NAME);
        let mut name: Vec<u8> = self.name.iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect();
        name.truncate(len);
        Noted {
            unique,
            opcode: u32::try_from(what >> 32).unwrap_or_default(),
            node: self.node.load(Ordering::Relaxed),
            offset: self.offset.load(Ordering::Relaxed),
            size: u32::try_from(what & u64::from(u32::MAX)).unwrap_or_default(),
            name,
        }
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal() -> Arc<Journal> {
        Arc::new(Journal::create().unwrap().1)
    }

    fn serve(journal: &Arc<Journal>, unique: u64) -> Entry {
        match journal.begin(unique, 15, (7, 4096, 100), b"name") {
            Begun::Serve(entry) => entry,
            Begun::Refuse => panic!("refused"),
        }
    }

    #[test]
    fn what_is_not_answered_is_left_and_can_be_read_in_another_mapping() {
        let (descriptor, journal) = Journal::create().unwrap();
        let journal = Arc::new(journal);
        let name = vec![b'n'; MAX_NAME];
        let entry = journal.begin(2, 1, (3, 4, 5), &name);
        drop(serve(&journal, 4));
        let noted = Noted { unique: 2, opcode: 1, node: 3, offset: 4, size: 5, name };
        assert_eq!(Journal::open(&descriptor).unwrap().left(), [noted]);
        drop(entry);
        assert_eq!(journal.left(), []);
    }

    #[test]
    fn a_request_is_refused_after_it_was_there_at_two_deaths() {
        let journal = journal();
        let me = std::process::id();
        std::mem::forget(serve(&journal, 2));
        journal.died(me + 1, true);
        journal.died(me, true);
        std::mem::forget(serve(&journal, 2 | RESENT));
        // It had it for less than a moment.
        journal.died(me, false);
        std::mem::forget(serve(&journal, 2 | RESENT));
        std::mem::forget(serve(&journal, 4));
        journal.died(me, true);
        assert!(matches!(journal.begin(2 | RESENT, 15, (7, 0, 1), b""), Begun::Refuse));
        drop(serve(&journal, 4 | RESENT));
        assert_eq!(journal.left(), []);
    }

    #[test]
    fn a_request_that_was_answered_at_the_last_moment_is_forgotten_in_time() {
        let journal = journal();
        std::mem::forget(serve(&journal, 2));
        for _ in 0..FORGOTTEN {
            assert_eq!(journal.left().len(), 1);
        }
        assert_eq!(journal.left(), []);
    }

    #[test]
    fn a_full_journal_refuses_nobody() {
        let journal = journal();
        let entries: Vec<Entry> = (1..4 * SLOTS as u64).map(|number| serve(&journal, number * 2)).collect();
        assert!(journal.left().len() <= SLOTS);
        drop(entries);
        assert_eq!(journal.left(), []);
    }

    /// Not a bound, since machines differ: `cargo test -p millstream-fuse --release journal -- --nocapture` prints it.
    #[test]
    fn the_cost_of_a_request_is_printed() {
        let journal = journal();
        let rounds = 200_000;
        let begun = std::time::Instant::now();
        for unique in 1..=rounds {
            drop(std::hint::black_box(serve(&journal, unique * 2)));
        }
        println!("{} ns for each request", begun.elapsed().as_nanos() / u128::from(rounds));
    }
}
