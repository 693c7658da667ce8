//! Pages of a startup profile go into the kernel's page cache as they come, ahead of the program that is about to read them.
//!
//! A program that starts reads one thing after the other, and each page that the kernel does not have costs it a request to FUSE;
//! while it waits for the network the processors have little to do. So a process of its own reads the same pages through the mount
//! by the same names, as they come: what the program finds then are names, attributes and pages that the kernel knows.
//!
//! It is neither the worker, which could not die while a request of its own waits for an answer that only the next worker gives,
//! nor the supervisor, which must never wait for one. It ends with the worker, or with the profile.
//!
//! What a start reads from the page cache nobody sees, so such a start is not recorded. Some are left alone for that
//! (`fetch.record_one_in`), and all whose profile is made of few recordings.

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use millstream_chunkstore::Layer;
use millstream_layerfs::NodeId;
use millstream_oci::Digest;
use millstream_prefetch::{ChooseSink, PageSink};
use millstream_source::names;
use millstream_toc::format::{FormatError, InodeIx};
use millstream_toc::read::{Chunk, PageMask};
use millstream_toc::{DATA_ALIGN, Toc};
use rustix::fs::{Advice, Mode, OFlags, ResolveFlags};
use tokio::sync::OwnedSemaphorePermit;
use tracing::{debug, info};

use crate::images::NodeImages;
use crate::program::Program;

/// A profile of fewer recordings than this is not certain yet: one that was carried over, or that one odd start made.
const CERTAIN: u32 = 3;
/// Processes at once; starts beyond that read by themselves.
pub(crate) const PROCESSES: usize = 4;
/// A process ends after this long, whatever there is to read: by then a start is over.
const LONGEST: Duration = Duration::from_secs(60);
/// Layers with more inodes are left alone: a few bytes of memory are needed for each.
const MAX_INODES: u32 = 1 << 20;
/// Bytes of one read.
const READ: usize = 128 * 1024;
/// Files that are held open: programs read several in turns.
const OPEN: usize = 8;
/// Bytes of a path, as the kernel has it.
const MAX_PATH: usize = 4096;
/// Bytes that are kept of what a process says when it fails.
const MAX_MESSAGE: u64 = 1000;

/// Pages of a layer that came.
type Came = (Arc<Layer>, Chunk, PageMask);

/// Reads pages of one image through the mount. Begins with the first that comes.
struct Warmer {
    images: Arc<NodeImages>,
    image: String,
    /// All of its layers.
    run: Vec<Digest>,
    /// As many pages wait here as the profile has at most.
    came: OnceLock<Option<Sender<Came>>>,
}

impl std::fmt::Debug for Warmer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Warmer").field("image", &self.image).finish_non_exhaustive()
    }
}

impl PageSink for Warmer {
    fn came(&self, layer: &Arc<Layer>, chunk: Chunk, pages: PageMask) {
        if let Some(came) = self.came.get_or_init(|| self.begin()) {
            // It fails when there is no process any more: then the program reads what it needs by itself.
            let _ = came.send((Arc::clone(layer), chunk, pages));
        }
    }
}

/// Of a start of an image whose layers are all lazy: whether its pages are read ahead.
pub(crate) fn choose(images: &Arc<NodeImages>, image: &str, run: Vec<Digest>) -> ChooseSink {
    let (images, image) = (Arc::clone(images), image.to_owned());
    Box::new(move |recordings| {
        // A fresh state gives a fresh number each time.
        let lot = RandomState::new().hash_one(&image);
        let left_alone = is_recorded(recordings, images.origins.record_one_in, lot);
        (!left_alone).then(|| Arc::new(Warmer { images, image, run, came: OnceLock::new() }) as _)
    })
}

const fn is_recorded(recordings: u32, one_in: u32, lot: u64) -> bool {
    recordings < CERTAIN || one_in <= 1 || lot.is_multiple_of(one_in as u64)
}

impl Warmer {
    /// `None` if there are enough already.
    fn begin(&self) -> Option<Sender<Came>> {
        let permit = Arc::clone(self.images.warming()).try_acquire_owned().ok()?;
        let (sender, came) = channel();
        let (images, image, run) = (Arc::clone(&self.images), self.image.clone(), self.run.clone());
        let work = move || match warm(&images, &run, &came, &permit) {
            Ok(()) => debug!({ names::IMAGE } = image, "what starts of the image read is in the page cache"),
            // Nothing is lost by it but time; and the image may just have been removed.
            Err(error) => info!(
                { names::IMAGE } = image,
                error = format!("{error:#}"),
                "nothing more is read ahead of the program"
            ),
        };
        std::thread::Builder::new().name("warm".to_owned()).spawn(work).ok()?;
        Some(sender)
    }
}

/// Has a process read what comes, until nothing does. Blocks.
fn warm(
    images: &Arc<NodeImages>,
    run: &[Digest],
    came: &Receiver<Came>,
    _permit: &OwnedSemaphorePermit,
) -> anyhow::Result<()> {
    // The container that is about to be created needs it, too.
    let view = images.runtime().block_on(images.views.path(run, &[])).context("showing the image")?;
    let program = Program::own()?;
    let mut command = program.command();
    command.arg("warm").arg(view).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    // This thread waits for it: when it is gone, so is the worker.
    let mut reader = command.spawn().context("starting a process")?;
    let layers = run.iter().filter_map(|digest| images.store.layer(digest));
    images.recorder.not_fresh(layers.map(|layer| layer.number()));
    let told = tell(came, BufWriter::new(reader.stdin.take().context("a process without input")?));
    let mut said = String::new();
    if let Some(errors) = reader.stderr.take() {
        // Its last words; then it ends.
        let _ = errors.take(MAX_MESSAGE).read_to_string(&mut said);
    }
    let ended = reader.wait().context("waiting for a process")?;
    ensure!(ended.success(), "{ended}: {}", said.trim_end());
    told
}

fn tell(came: &Receiver<Came>, mut out: impl Write) -> anyhow::Result<()> {
    let mut layers: Vec<(Digest, Option<Files>)> = Vec::new();
    loop {
        let (layer, chunk, pages) = match came.try_recv() {
            Ok(came) => came,
            Err(TryRecvError::Disconnected) => break,
            Err(TryRecvError::Empty) => {
                out.flush()?;
                let Ok(came) = came.recv() else { break };
                came
            }
        };
        let digest = layer.digest();
        let at = match layers.iter().position(|(known, _)| *known == digest) {
            Some(at) => at,
            None => {
                let small = layer.toc().inode_count() <= MAX_INODES;
                layers.push((digest, small.then(|| Files::of(layer.toc())).transpose()?));
                layers.len() - 1
            }
        };
        if let Some(files) = &layers[at].1 {
            files.each(chunk, pages, |inode, path, start, len| {
                let node = NodeId::file(layer.number(), inode).map_or(0, NodeId::raw);
                Ask { node, path, start, len }.write(&mut out)
            })?;
        }
    }
    out.flush()?;
    Ok(())
}

/// Where the content of a layer is by name.
#[derive(Debug)]
struct Files {
    toc: Arc<Toc>,
    /// Of each content the file that it is of.
    owners: Vec<Option<InodeIx>>,
    /// Of each inode a directory that has it, and its place there.
    parents: Vec<Option<(InodeIx, u32)>>,
}

impl Files {
    fn of(toc: &Arc<Toc>) -> Result<Self, FormatError> {
        let mut owners = vec![None; toc.content_count() as usize];
        let mut parents = vec![None; toc.inode_count() as usize];
        for ix in 0..toc.inode_count() {
            let inode = toc.inode(ix)?;
            if let Some(owner) = inode.content().and_then(|content| owners.get_mut(content as usize)) {
                *owner = Some(ix);
            }
            if !inode.is_dir() {
                continue;
            }
            for (place, entry) in (0..).zip(toc.children(&inode)?) {
                let child = entry?.inode.and_then(|child| parents.get_mut(child as usize));
                if let Some(parent) = child {
                    parent.get_or_insert((ix, place));
                }
            }
        }
        Ok(Self { toc: Arc::clone(toc), owners, parents })
    }

    /// Calls `with` with inode, path, place in the file and length of each run of these pages.
    fn each(
        &self,
        chunk: Chunk,
        pages: PageMask,
        mut with: impl FnMut(InodeIx, &[u8], u64, u64) -> io::Result<()>,
    ) -> anyhow::Result<()> {
        let content = self.toc.content_of_chunk(chunk.ix)?;
        let Some(inode) = self.owners.get(content as usize).copied().flatten() else { return Ok(()) };
        let Some(path) = self.path(inode)? else { return Ok(()) };
        let within = chunk.data.start - self.toc.content(content)?.data_off.get();
        for (first, count) in runs(pages) {
            let start = u64::from(first) * DATA_ALIGN;
            let len = (u64::from(count) * DATA_ALIGN).min(chunk.data.len().saturating_sub(start));
            with(inode, &path, within + start, len)?;
        }
        Ok(())
    }

    fn path(&self, inode: InodeIx) -> Result<Option<Vec<u8>>, FormatError> {
        let (mut names, mut at, mut len) = (Vec::new(), inode, 0);
        while at != 0 {
            let Some((parent, place)) = self.parents[at as usize] else { return Ok(None) };
            let name = self.toc.children(&self.toc.inode(parent)?)?.get(place as usize)?.name;
            len += name.len() + 1;
            // Also where a damaged table has a directory within itself.
            if len > MAX_PATH {
                return Ok(None);
            }
            names.push(name);
            at = parent;
        }
        names.reverse();
        Ok(Some(names.join(&b'/')))
    }
}

/// First and number of the bits that are set one after the other.
fn runs(mut pages: PageMask) -> impl Iterator<Item = (u32, u32)> {
    std::iter::from_fn(move || {
        let first = (pages != 0).then(|| pages.trailing_zeros())?;
        let count = (pages >> first).trailing_ones();
        pages &= !((PageMask::MAX >> (PageMask::BITS - count)) << first);
        Some((first, count))
    })
}

/// What the process is to read.
struct Ask<P> {
    /// Number of the file; another one may stand at its path in the merged view.
    node: u64,
    path: P,
    start: u64,
    len: u64,
}

impl Ask<&[u8]> {
    fn write(&self, out: &mut impl Write) -> io::Result<()> {
        for number in [self.path.len() as u64, self.node, self.start, self.len] {
            out.write_all(&number.to_le_bytes())?;
        }
        out.write_all(self.path)
    }
}

impl Ask<Vec<u8>> {
    /// `None` at the end.
    fn read(input: &mut impl Read) -> io::Result<Option<Self>> {
        let mut numbers = [0; 32];
        match input.read_exact(&mut numbers) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            other => other?,
        }
        let (numbers, _) = numbers.as_chunks();
        let [path, node, start, len] = [0, 1, 2, 3].map(|at| u64::from_le_bytes(numbers[at]));
        let long = usize::try_from(path).ok().filter(|path| *path <= MAX_PATH);
        let mut path = vec![0; long.ok_or(io::ErrorKind::InvalidData)?];
        input.read_exact(&mut path)?;
        Ok(Some(Self { node, path, start, len }))
    }
}

/// The process: reads what it is told from files below `view`. It must not be anybody else that does, see above.
///
/// # Errors
/// When `view` cannot be opened, what it is told makes no sense, a file cannot be read, or none could be opened.
pub fn read_ahead(view: &Path) -> anyhow::Result<()> {
    // Whoever started this process is there: it holds the other end of the input, or that ends.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    let _ = rustix::thread::set_name(c"millstream-warm");
    let begun = Instant::now();
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let view = rustix::fs::open(view, flags, Mode::empty()).with_context(|| format!("opening {}", view.display()))?;
    let mut input = BufReader::new(io::stdin().lock());
    // The one that was opened last comes first. A file that cannot be had is remembered as well.
    let mut open: Vec<(u64, io::Result<File>)> = Vec::new();
    let mut buffer = vec![0; READ];
    let (mut any, mut refused) = (false, None);
    while let Some(Ask { node, path, start, len }) = Ask::read(&mut input)? {
        ensure!(begun.elapsed() < LONGEST, "there is more to read than {LONGEST:?} allow for");
        if !open.iter().any(|(known, _)| *known == node) {
            open.truncate(OPEN - 1);
            open.insert(0, (node, regular(&view, &path, node)));
        }
        match open.iter().find(|(known, _)| *known == node) {
            Some((_, Ok(file))) => {
                any = true;
                read(file, start, len, &mut buffer)
                    .with_context(|| format!("reading {}", String::from_utf8_lossy(&path)))?;
            }
            Some((_, Err(error))) => refused = Some(error.kind()),
            None => {}
        }
    }
    match refused {
        Some(kind) if !any => Err(io::Error::from(kind)).context("no file could be opened"),
        _ => Ok(()),
    }
}

fn read(file: &File, start: u64, len: u64, buffer: &mut [u8]) -> io::Result<()> {
    let end = start.saturating_add(len);
    let mut at = start;
    while at < end {
        let most = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
        match file.read_at(&mut buffer[..most], at)? {
            0 => break,
            read => at += read as u64,
        }
    }
    Ok(())
}

/// The regular file of this name, if it is the one of this number: a name of one layer may be a link of another one, and lead
/// anywhere.
fn regular(view: &OwnedFd, path: &[u8], node: u64) -> io::Result<File> {
    let within =
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    let path = std::ffi::OsStr::from_bytes(path);
    let found = rustix::fs::openat2(view, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), within)?;
    // Before it is opened, which of a pipe or a device would be more than a look.
    let stat = rustix::fs::fstat(&found)?;
    if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() || stat.st_ino != node {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let file = File::open(format!("/proc/self/fd/{}", found.as_fd().as_raw_fd()))?;
    // Just these pages, whatever lies around them.
    rustix::fs::fadvise(&file, 0, None, Advice::Random)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use millstream_toc::build::{BuildOptions, Compression, build};

    use super::*;

    #[test]
    fn few_recordings_are_added_to_and_of_many_starts_some_are_left_alone() {
        for recordings in 0..CERTAIN {
            assert!(is_recorded(recordings, u32::MAX, 7), "{recordings}");
        }
        assert!(is_recorded(CERTAIN, 1, 7) && is_recorded(CERTAIN, 0, 7), "all");
        let left_alone = (0..800).filter(|lot| is_recorded(CERTAIN, 8, *lot)).count();
        assert_eq!(left_alone, 100);
    }

    #[test]
    fn links_lead_nowhere_and_only_the_file_itself_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("dir")).unwrap();
        std::fs::write(at("dir/file"), "content").unwrap();
        std::fs::write(at("dir/other"), "another").unwrap();
        std::os::unix::fs::symlink("dir", at("link")).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", at("out")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, at("pipe"), Mode::RUSR).unwrap();
        let view = OwnedFd::from(File::open(dir.path()).unwrap());
        let number = |path: &str| std::fs::metadata(at(path)).unwrap().ino();
        let read = |path: &str, node| regular(&view, path.as_bytes(), node).and_then(io::read_to_string);
        assert_eq!(read("dir/file", number("dir/file")).unwrap(), "content");
        assert!(read("dir/other", number("dir/file")).is_err(), "something else stands at the path");
        for path in ["dir", "link/file", "out", "pipe", "../etc/hostname", "/etc/hostname"] {
            let node = std::fs::metadata(dir.path().join(path)).map_or(0, |found| found.ino());
            assert!(read(path, node).is_err(), "{path}");
        }
        assert!(read("none", 0).is_err() && read("", 0).is_err());
    }

    /// A member of a tar: name, kind, name that it links to, content.
    fn member(tar: &mut Vec<u8>, name: &str, kind: u8, link: &str, content: &[u8]) {
        let mut header = [0u8; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..107].copy_from_slice(b"0000644");
        header[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
        header[148..156].copy_from_slice(b"        ");
        header[156] = kind;
        header[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        tar.extend(header);
        tar.extend(content);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }

    #[test]
    fn pages_are_found_again_by_name() {
        let long: Vec<u8> = (0..70_000_u32).map(|at| at.to_le_bytes()[0]).collect();
        let mut tar = Vec::new();
        member(&mut tar, "a/long", b'0', "", &long);
        for name in ["a/same", "b/same"] {
            member(&mut tar, name, b'0', "", b"same");
        }
        member(&mut tar, "b/link", b'1', "a/long", b"");
        tar.resize(tar.len() + 1024, 0);
        let toc = build(&tar[..], &BuildOptions::new(Compression::Plain), &mut ()).unwrap().toc;
        let toc = Arc::new(Toc::open(toc).unwrap());
        let files = Files::of(&toc).unwrap();
        let found = |path: &str, from: u64, pages| {
            let inode = toc.inode(toc.lookup_path(path.as_bytes()).unwrap().unwrap()).unwrap();
            let start = toc.file_data(&inode).unwrap().start + from;
            let range = millstream_toc::DataRange::new(start, start + 1);
            let mut found = Vec::new();
            let each = |inode, path: &[u8], start, len| {
                assert_eq!(toc.lookup_path(path).unwrap(), Some(inode));
                found.push((String::from_utf8(path.to_vec()).unwrap(), start, len));
                Ok(())
            };
            files.each(toc.chunks_in(range).unwrap()[0], pages, each).unwrap();
            found
        };
        let name = |name: &str, start, len| (name.to_owned(), start, len);
        // The first name of two, the second chunk of three, two runs of pages.
        assert_eq!(found("b/link", 40_000, 0b110_0001), [name("a/long", 32768, 4096), name("a/long", 53248, 8192)]);
        assert_eq!(found("a/long", 69_999, 0b11), [name("a/long", 65536, 4464)], "not beyond the end");
        assert_eq!(found("b/same", 0, 1), [name("b/same", 0, 4)], "and not the other file of this content");
    }

    #[test]
    fn runs_are_the_pages() {
        for pages in 0..=PageMask::MAX {
            let all: Vec<u32> = runs(pages).flat_map(|(first, count)| first..first + count).collect();
            assert_eq!(all, (0..PageMask::BITS).filter(|page| pages & (1 << page) != 0).collect::<Vec<_>>());
            assert!(runs(pages).count() <= 4, "{pages}");
        }
    }

    #[test]
    fn what_is_told_arrives() {
        let asks =
            [(1, &b"usr/bin/env"[..], 0, 4096), (2, b"a\nb", 1 << 40, 1), (u64::MAX, b"\xff", u64::MAX, u64::MAX)];
        let mut told = Vec::new();
        for (node, path, start, len) in asks {
            Ask { node, path, start, len }.write(&mut told).unwrap();
        }
        let mut input = &told[..];
        for (node, path, start, len) in asks {
            let ask = Ask::read(&mut input).unwrap().unwrap();
            assert_eq!((ask.node, &ask.path[..], ask.start, ask.len), (node, path, start, len));
        }
        assert!(Ask::read(&mut input).unwrap().is_none());
        let long = [(MAX_PATH as u64 + 1).to_le_bytes(), [0; 8], [0; 8], [0; 8]].concat();
        assert!(Ask::read(&mut &long[..]).is_err());
    }
}
