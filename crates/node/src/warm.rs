//! Pages of a startup profile go into the kernel's page cache as they come, ahead of the program that is about to read them.
//!
//! A program that starts reads one thing after the other, and each page that the kernel does not have costs it a request to FUSE;
//! while it waits for the network the processors have little to do. So a process of its own reads the same pages through the mount
//! by the same names, as they come: what the program finds then are names, attributes and pages that the kernel knows.
//!
//! It is neither the worker, which could not die while a request of its own waits for an answer that only the next worker gives,
//! nor the supervisor, which must never wait for one. It ends with the worker, or with the profile.
//!
//! What a start reads from the page cache nobody sees, so such a start is not recorded. Of some the pages stay where they are
//! (`fetch.record_one_in`), and their recordings count.

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

use anyhow::Context;
use millstream_chunkstore::Layer;
use millstream_oci::Digest;
use millstream_prefetch::PageSink;
use millstream_source::names;
use millstream_toc::format::{ContentIx, FormatError, InodeIx};
use millstream_toc::read::{Chunk, PageMask};
use millstream_toc::{DATA_ALIGN, Toc};
use rustix::fs::{Advice, Mode, OFlags, ResolveFlags};
use tracing::{debug, warn};

use crate::images::NodeImages;
use crate::program::Program;

/// Files with the same content that are read for a page of it: which of them the program reads is not known.
const SAME: usize = 2;
/// Bytes of one read.
const READ: usize = 128 * 1024;
/// Bytes of a path, as the kernel has it.
const MAX_PATH: usize = 4096;

/// Pages of a layer that came.
type Came = (Arc<Layer>, Chunk, PageMask);

/// Reads pages of one image through the mount. Begins with the first that comes.
pub(crate) struct Warmer {
    images: Arc<NodeImages>,
    image: String,
    /// All of its layers.
    run: Vec<Digest>,
    /// As many pages wait here as the profile has at most.
    came: OnceLock<Sender<Came>>,
}

impl std::fmt::Debug for Warmer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Warmer").field("image", &self.image).finish_non_exhaustive()
    }
}

impl PageSink for Warmer {
    fn came(&self, layer: &Arc<Layer>, chunk: Chunk, pages: PageMask) {
        // It fails when there is no process: then the program reads what it needs by itself.
        let _ = self.came.get_or_init(|| self.begin()).send((Arc::clone(layer), chunk, pages));
    }
}

impl Warmer {
    /// For an image whose layers are all lazy; `None` where it is this start's turn to be recorded.
    pub(crate) fn new(images: &Arc<NodeImages>, image: &str, run: Vec<Digest>) -> Option<Arc<Self>> {
        // A fresh state gives a fresh number each time.
        let turn = RandomState::new().hash_one(image).is_multiple_of(images.origins.record_one_in.max(1).into());
        (!turn)
            .then(|| Arc::new(Self { images: Arc::clone(images), image: image.to_owned(), run, came: OnceLock::new() }))
    }

    fn begin(&self) -> Sender<Came> {
        let layers = self.run.iter().filter_map(|digest| self.images.store.layer(digest));
        self.images.recorder.not_fresh(layers.map(|layer| layer.number()));
        let (sender, came) = channel();
        let (images, image, run) = (Arc::clone(&self.images), self.image.clone(), self.run.clone());
        let work = move || {
            match warm(&images, &run, &came) {
                Ok(()) => debug!({ names::IMAGE } = image, "what starts of the image read is in the page cache"),
                // Nothing is lost by it but time.
                Err(error) => {
                    warn!(
                        { names::IMAGE } = image,
                        error = format!("{error:#}"),
                        "nothing more is read ahead of the program"
                    );
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("warm".to_owned()).spawn(work) {
            warn!(%error, "nothing is read ahead of the program");
        }
        sender
    }
}

/// Has a process read what comes, until nothing does. Blocks.
fn warm(images: &Arc<NodeImages>, run: &[Digest], came: &Receiver<Came>) -> anyhow::Result<()> {
    // The container that is about to be created needs it, too.
    let view = images.runtime().block_on(images.views.path(run, &[])).context("showing the image")?;
    let program = Program::own()?;
    // This thread waits for it: when it is gone, so is the worker.
    let mut reader =
        program.command().arg("warm").arg(view).stdin(Stdio::piped()).spawn().context("starting a process")?;
    let told = tell(came, BufWriter::new(reader.stdin.take().context("a process without input")?));
    let ended = reader.wait().context("waiting for a process")?;
    anyhow::ensure!(ended.success(), "the process ended with {ended}");
    told
}

fn tell(came: &Receiver<Came>, mut out: impl Write) -> anyhow::Result<()> {
    let mut layers: Vec<(Digest, Files)> = Vec::new();
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
                layers.push((digest, Files::of(layer.toc())?));
                layers.len() - 1
            }
        };
        layers[at].1.each(chunk, pages, |path, start, len| Ask { path, start, len }.write(&mut out))?;
    }
    out.flush()?;
    Ok(())
}

/// Where the content of a layer is by name.
#[derive(Debug)]
struct Files {
    toc: Arc<Toc>,
    /// Sorted.
    by_content: Vec<(ContentIx, InodeIx)>,
    /// Of each inode a directory that has it, and its place there.
    parents: Vec<Option<(InodeIx, u32)>>,
}

impl Files {
    fn of(toc: &Arc<Toc>) -> Result<Self, FormatError> {
        let mut by_content = Vec::new();
        let mut parents = vec![None; toc.inode_count() as usize];
        for ix in 0..toc.inode_count() {
            let inode = toc.inode(ix)?;
            if let Some(content) = inode.content() {
                by_content.push((content, ix));
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
        by_content.sort_unstable();
        Ok(Self { toc: Arc::clone(toc), by_content, parents })
    }

    /// Calls `with` with path, place in the file and length of each run of these pages.
    fn each(
        &self,
        chunk: Chunk,
        pages: PageMask,
        mut with: impl FnMut(&[u8], u64, u64) -> io::Result<()>,
    ) -> anyhow::Result<()> {
        let content = self.toc.content_of_chunk(chunk.ix)?;
        let within = chunk.data.start - self.toc.content(content)?.data_off.get();
        let from = self.by_content.partition_point(|(known, _)| *known < content);
        let same = self.by_content[from..].iter().take_while(|(known, _)| *known == content).take(SAME);
        for (_, inode) in same {
            let Some(path) = self.path(*inode)? else { continue };
            for (first, count) in runs(pages) {
                let start = u64::from(first) * DATA_ALIGN;
                let len = (u64::from(count) * DATA_ALIGN).min(chunk.data.len().saturating_sub(start));
                with(&path, within + start, len)?;
            }
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
        let run = PageMask::MAX.checked_shr(PageMask::BITS - count).unwrap_or_default();
        pages &= !(run << first);
        Some((first, count))
    })
}

/// What the process is to read, as it comes to it: the lengths of path and read, the place, the path.
struct Ask<P> {
    path: P,
    start: u64,
    len: u64,
}

impl Ask<&[u8]> {
    fn write(&self, out: &mut impl Write) -> io::Result<()> {
        out.write_all(&(self.path.len() as u64).to_le_bytes())?;
        out.write_all(&self.start.to_le_bytes())?;
        out.write_all(&self.len.to_le_bytes())?;
        out.write_all(self.path)
    }
}

impl Ask<Vec<u8>> {
    /// `None` at the end.
    fn read(input: &mut impl Read) -> io::Result<Option<Self>> {
        let mut numbers = [0; 24];
        match input.read_exact(&mut numbers) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            other => other?,
        }
        let (numbers, _) = numbers.as_chunks();
        let [path, start, len] = [0, 1, 2].map(|at| u64::from_le_bytes(numbers[at]));
        let long = usize::try_from(path).ok().filter(|path| *path <= MAX_PATH);
        let mut path = vec![0; long.ok_or(io::ErrorKind::InvalidData)?];
        input.read_exact(&mut path)?;
        Ok(Some(Self { path, start, len }))
    }
}

/// The process: reads what it is told from files below `view`. It must not be anybody else that does, see above.
///
/// # Errors
/// When `view` cannot be opened, or what it is told makes no sense. A file that cannot be read is left alone.
pub fn read_ahead(view: &Path) -> anyhow::Result<()> {
    let _ = rustix::thread::set_name(c"millstream-warm");
    // Whoever started this process is there: it holds the other end of the input, or that ends.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let view = rustix::fs::open(view, flags, Mode::empty()).with_context(|| format!("opening {}", view.display()))?;
    let mut input = BufReader::new(io::stdin().lock());
    let mut open: Option<(Vec<u8>, File)> = None;
    let mut buffer = vec![0; READ];
    while let Some(Ask { path, start, len }) = Ask::read(&mut input)? {
        if open.as_ref().is_none_or(|(known, _)| *known != path) {
            open = regular(&view, &path).ok().map(|file| (path, file));
        }
        let Some((_, file)) = &open else { continue };
        let end = start.saturating_add(len);
        let mut at = start;
        while at < end {
            let most = usize::try_from(end - at).unwrap_or(READ).min(READ);
            match file.read_at(&mut buffer[..most], at) {
                Ok(0) | Err(_) => break,
                Ok(read) => at += read as u64,
            }
        }
    }
    Ok(())
}

/// The regular file of this name, if it is one by itself: a name of one layer may be a link of another one, and lead anywhere.
fn regular(view: &OwnedFd, path: &[u8]) -> io::Result<File> {
    let within =
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    let path = std::ffi::OsStr::from_bytes(path);
    let found = rustix::fs::openat2(view, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), within)?;
    // Before it is opened, which of a pipe or a device would be more than a look.
    let kind = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode);
    if !kind.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let file = File::open(format!("/proc/self/fd/{}", found.as_fd().as_raw_fd()))?;
    // Just these pages, whatever lies around them.
    rustix::fs::fadvise(&file, 0, None, Advice::Random)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_lead_nowhere_and_only_files_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("dir")).unwrap();
        std::fs::write(at("dir/file"), "content").unwrap();
        std::os::unix::fs::symlink("dir", at("link")).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", at("out")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, at("pipe"), Mode::RUSR).unwrap();
        let view = OwnedFd::from(File::open(dir.path()).unwrap());
        let read = |path: &str| regular(&view, path.as_bytes()).and_then(io::read_to_string);
        assert_eq!(read("dir/file").unwrap(), "content");
        for path in ["dir", "link/file", "out", "pipe", "none", "../etc/hostname", "/etc/hostname", ""] {
            assert!(read(path).is_err(), "{path}");
        }
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
        let asks = [(&b"usr/bin/env"[..], 0, 4096), (b"a\nb", 1 << 40, 1), (b"\xff", u64::MAX, u64::MAX)];
        let mut told = Vec::new();
        for (path, start, len) in asks {
            Ask { path, start, len }.write(&mut told).unwrap();
        }
        let mut input = &told[..];
        for (path, start, len) in asks {
            let ask = Ask::read(&mut input).unwrap().unwrap();
            assert_eq!((&ask.path[..], ask.start, ask.len), (path, start, len));
        }
        assert!(Ask::read(&mut input).unwrap().is_none());
        let long = [(MAX_PATH as u64 + 1).to_le_bytes(), [0; 8], [0; 8]].concat();
        assert!(Ask::read(&mut &long[..]).is_err());
    }
}
