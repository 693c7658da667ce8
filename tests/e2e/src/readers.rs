//! Programs that read a tree of known content without a pause and check every byte, while something is done to the daemon.
//!
//! Each reader works in a thread of its own and does one small check after the other, past the kernel's caches as far as a
//! program can, so that each needs a worker. A wrong byte or an error ends the reader and is kept; a reader that hangs is
//! seen by its count, which does not grow.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::File;
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use millstream_sys::map::GuardedMap;
use rustix::fs::{Advice, OFlags, fadvise};

use crate::layer::{Content, Entry, Kind, noise};
use crate::need::program;
use crate::process::{eventually, output};

/// Bytes of the large file.
pub const LARGE: usize = 24 << 20;
/// Bytes of the file that is mapped.
const MAPPED: usize = 8 << 20;
/// Files of the large directory.
const MANY: u32 = 3000;
/// Longest single read of a check.
const MAX_READ: usize = 256 * 1024;
/// How long a reader may take to end when asked.
const END: Duration = Duration::from_secs(30);

/// Numbers that follow from a seed.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Starts with this seed; any will do.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let word = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16;
        usize::try_from(word % bound as u64).unwrap_or_default()
    }
}

/// What the readers know: a layer with this below `data/`.
///
/// # Errors
///
/// If there is no `busybox` on this machine.
pub fn layer() -> Result<Vec<Entry>> {
    let tool = program("busybox").context("busybox is not installed")?;
    let mut entries = vec![
        Entry::directory("data"),
        Entry::file("data/large", noise(1, LARGE)),
        Entry::file("data/mapped", noise(2, MAPPED)),
        // Of its own, so that no process of the container keeps its pages in memory.
        Entry::new("data/tool", Kind::File(Content::File(tool))).mode(0o755),
        Entry::directory("data/many"),
    ];
    entries.extend((0..MANY).map(|number| Entry::file(format!("data/many/{}", name(number)), small(number))));
    Ok(entries)
}

fn name(number: u32) -> String {
    format!("file-{number:05}")
}

fn small(number: u32) -> Vec<u8> {
    noise(1000 + number, 1 + number as usize * 37 % 9000)
}

/// One check after the other; see [`Readers::start`].
type Check = Box<dyn FnMut(&mut Random) -> Result<()> + Send>;

#[derive(Debug)]
struct Reader {
    name: &'static str,
    /// Checks that it has done.
    done: AtomicU64,
    /// Microseconds that the longest one took.
    longest: AtomicU64,
    failure: Mutex<Option<String>>,
    ended: AtomicBool,
}

/// Readers at work.
#[derive(Debug)]
pub struct Readers {
    readers: Vec<Arc<Reader>>,
    stop: Arc<AtomicBool>,
    pulse: Arc<Pulse>,
}

/// Reads of 4 KiB that certainly reach the daemon: when the latest began of those that have ended.
#[derive(Debug)]
struct Pulse {
    epoch: Instant,
    latest: AtomicU64,
}

impl Readers {
    /// Starts eight of them: `root` is the root of a container with [`layer`], `view` the same without an overlay over it.
    ///
    /// # Errors
    ///
    /// If a file cannot be opened.
    pub fn start(root: &Path, view: &Path, seed: u64) -> Result<Self> {
        let pulse = Arc::new(Pulse { epoch: Instant::now(), latest: AtomicU64::new(0) });
        let large = Arc::new(noise(1, LARGE));
        let checks: [(&'static str, Check); 8] = [
            ("random reads", random_reads(root.join("data/large"), Arc::clone(&large))),
            ("direct reads of a kept handle", direct_reads(&root.join("data/large"), &large, Arc::clone(&pulse))?),
            ("reads in order of a kept handle", reads_in_order(&root.join("data/large"), Arc::clone(&large))?),
            ("mapped file", mapped(root.join("data/mapped"))),
            ("small files", small_files(root.join("data/many"))),
            ("listing", listing(view.join("data/many"))),
            ("listing of a kept handle", kept_listing(&view.join("data/many"))?),
            ("execution", execution(root.to_owned())),
        ];
        let stop = Arc::new(AtomicBool::new(false));
        let readers = checks.into_iter().zip(seed..).map(|((name, check), seed)| {
            let reader = Arc::new(Reader {
                name,
                done: AtomicU64::new(0),
                longest: AtomicU64::new(0),
                failure: Mutex::default(),
                ended: AtomicBool::new(false),
            });
            let (shared, stop) = (Arc::clone(&reader), Arc::clone(&stop));
            // Not joined: one that hangs in the kernel must not keep the test from saying so.
            std::thread::spawn(move || work(&shared, check, &stop, Random::new(seed)));
            reader
        });
        Ok(Self { readers: readers.collect(), stop: Arc::clone(&stop), pulse })
    }

    /// How many checks each has done.
    pub fn done(&self) -> Vec<u64> {
        self.readers.iter().map(|reader| reader.done.load(Ordering::Relaxed)).collect()
    }

    /// Waits until each has done a check more than `before` says.
    ///
    /// # Errors
    ///
    /// If one has failed, or one has not within `deadline`.
    pub fn await_progress(&self, before: &[u64], deadline: Duration) -> Result<()> {
        let behind = || -> Vec<&str> {
            let pairs = self.readers.iter().zip(before);
            pairs
                .filter(|(now, before)| now.done.load(Ordering::Relaxed) <= **before)
                .map(|(now, _)| now.name)
                .collect()
        };
        let progress =
            eventually("progress", deadline, || (behind().is_empty() || self.check().is_err()).then_some(()));
        self.check()?;
        progress.with_context(|| format!("of {:?}", behind()))
    }

    /// Waits until a read has ended that began after `moment` and that nothing but the daemon can answer; says when that was.
    ///
    /// # Errors
    ///
    /// If there is none within `deadline`, or a reader has failed.
    pub fn await_read(&self, moment: Instant, deadline: Duration) -> Result<Instant> {
        let moment = since(self.pulse.epoch, moment);
        let seen = || (self.pulse.latest.load(Ordering::Acquire) > moment || self.check().is_err()).then(Instant::now);
        let seen = eventually("a read", deadline, seen);
        self.check()?;
        seen
    }

    /// # Errors
    ///
    /// If a reader saw an error or a wrong byte.
    pub fn check(&self) -> Result<()> {
        for reader in &self.readers {
            let failure = reader.failure.lock().unwrap_or_else(PoisonError::into_inner);
            ensure!(failure.is_none(), "{}: {}", reader.name, failure.as_deref().unwrap_or_default());
        }
        Ok(())
    }

    /// Ends them, and says for each how many checks it has done and how long the longest took.
    ///
    /// # Errors
    ///
    /// If one failed or does not end.
    pub fn end(self) -> Result<Vec<(&'static str, u64, Duration)>> {
        self.stop.store(true, Ordering::Relaxed);
        for reader in &self.readers {
            eventually(reader.name, END, || reader.ended.load(Ordering::Acquire).then_some(()))?;
        }
        self.check()?;
        let figures = self.readers.iter().map(|reader| {
            let longest = Duration::from_micros(reader.longest.load(Ordering::Relaxed));
            (reader.name, reader.done.load(Ordering::Relaxed), longest)
        });
        Ok(figures.collect())
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// In microseconds.
fn since(epoch: Instant, moment: Instant) -> u64 {
    u64::try_from(moment.saturating_duration_since(epoch).as_micros()).unwrap_or(u64::MAX)
}

fn work(reader: &Reader, mut check: Check, stop: &AtomicBool, mut random: Random) {
    while !stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        if let Err(error) = check(&mut random) {
            *reader.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(format!("{error:#}"));
            break;
        }
        reader.longest.fetch_max(since(begun, Instant::now()), Ordering::Relaxed);
        reader.done.fetch_add(1, Ordering::Relaxed);
    }
    reader.ended.store(true, Ordering::Release);
}

/// Has the kernel forget what it keeps of a file and nobody has mapped.
fn forget(file: &File) -> Result<()> {
    Ok(fadvise(file, 0, None::<NonZeroU64>, Advice::DontNeed)?)
}

fn same(read: &[u8], expected: &[u8], offset: usize) -> Result<()> {
    if read == expected {
        return Ok(());
    }
    let at = read.iter().zip(expected).position(|(read, expected)| read != expected).unwrap_or(read.len());
    anyhow::bail!("wrong byte at {} ({} of {} bytes read)", offset + at, read.len(), expected.len())
}

/// At random places, in random sizes, opened anew each time.
fn random_reads(path: PathBuf, content: Arc<Vec<u8>>) -> Check {
    Box::new(move |random| {
        let file = File::open(&path)?;
        forget(&file)?;
        for _ in 0..4 {
            let mut buffer = vec![0; 1 + random.below(MAX_READ)];
            let offset = random.below(LARGE - buffer.len());
            file.read_exact_at(&mut buffer, offset as u64)?;
            same(&buffer, &content[offset..offset + buffer.len()], offset)?;
        }
        Ok(())
    })
}

/// Past the page cache, so that each read needs a worker.
fn direct_reads(path: &Path, content: &Arc<Vec<u8>>, pulse: Arc<Pulse>) -> Result<Check> {
    let direct = OFlags::DIRECT.bits().try_into()?;
    let (file, content) = (File::options().read(true).custom_flags(direct).open(path)?, Arc::clone(content));
    Ok(Box::new(move |random| {
        let offset = random.below(LARGE / 4096) * 4096;
        let mut buffer = vec![0; 4096];
        let begun = since(pulse.epoch, Instant::now());
        file.read_exact_at(&mut buffer, offset as u64)?;
        pulse.latest.fetch_max(begun, Ordering::AcqRel);
        same(&buffer, &content[offset..offset + 4096], offset)
    }))
}

fn reads_in_order(path: &Path, content: Arc<Vec<u8>>) -> Result<Check> {
    let file = File::open(path)?;
    let (mut offset, mut buffer) = (0, vec![0; MAX_READ]);
    Ok(Box::new(move |_| {
        if offset == 0 {
            forget(&file)?;
        }
        file.read_exact_at(&mut buffer, offset as u64)?;
        same(&buffer, &content[offset..offset + buffer.len()], offset)?;
        offset = (offset + buffer.len()) % LARGE;
        Ok(())
    }))
}

/// Pages of one mapping at random, which lives through some checks.
fn mapped(path: PathBuf) -> Check {
    let content = noise(2, MAPPED);
    let (mut map, mut uses) = (None, 0);
    Box::new(move |random| {
        if uses == 0 {
            map = None;
            let file = File::open(&path)?;
            forget(&file)?;
            map = Some(GuardedMap::new(&file)?);
            uses = 8;
        }
        uses -= 1;
        let map = map.as_ref().context("no mapping")?;
        for _ in 0..4 {
            let offset = random.below(MAPPED / 4096) * 4096;
            let page = map.as_ref().get(offset..offset + 4096).context("the mapped file is too short")?;
            same(page, &content[offset..offset + 4096], offset)?;
        }
        ensure!(!map.poisoned(), "a fault would have been SIGBUS");
        Ok(())
    })
}

fn small_files(directory: PathBuf) -> Check {
    Box::new(move |random| {
        for _ in 0..4 {
            let number = u32::try_from(random.below(MANY as usize))?;
            let path = directory.join(name(number));
            forget(&File::open(&path)?)?;
            let read = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            same(&read, &small(number), 0)?;
        }
        Ok(())
    })
}

fn expected_names() -> BTreeSet<OsString> {
    (0..MANY).map(|number| name(number).into()).collect()
}

fn listing(directory: PathBuf) -> Check {
    let expected = expected_names();
    Box::new(move |_| {
        forget(&File::open(&directory)?)?;
        let names: std::io::Result<BTreeSet<_>> =
            std::fs::read_dir(&directory)?.map(|entry| Ok(entry?.file_name())).collect();
        ensure!(names? == expected, "the listing is not that of the layer");
        Ok(())
    })
}

fn kept_listing(directory: &Path) -> Result<Check> {
    use std::os::unix::ffi::OsStringExt as _;
    let (handle, expected) = (File::open(directory)?, expected_names());
    let mut kept = rustix::fs::Dir::read_from(&handle)?;
    Ok(Box::new(move |_| {
        forget(&handle)?;
        kept.rewind();
        let mut names = BTreeSet::new();
        while let Some(entry) = kept.read() {
            names.insert(OsString::from_vec(entry?.file_name().to_bytes().to_vec()));
        }
        names.remove(&OsString::from("."));
        names.remove(&OsString::from(".."));
        ensure!(names == expected, "the listing is not that of the layer");
        Ok(())
    }))
}

fn execution(root: PathBuf) -> Check {
    Box::new(move |random| {
        let tool = root.join("data/tool");
        forget(&File::open(&tool)?)?;
        let number = random.below(MANY as usize).to_string();
        let said = output(Command::new(&tool).arg0("busybox").args(["echo", &number]))?;
        ensure!(said.trim_end() == number, "echo {number} said {said:?}");
        Ok(())
    })
}
