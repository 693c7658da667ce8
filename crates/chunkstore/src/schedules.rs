//! Content that is given up while others read, write, sync, prove and remove the layer, run under a scheduler that tries orders
//! out: the very files of the layer, with its locks in place of the usual ones and real files below. Others may come before every
//! step on the disk but a commit, which the database's own lock surrounds. Each test says which change of the code it was seen to
//! fail on.

mod sync {
    pub(crate) use std::sync::PoisonError;

    pub(crate) use shuttle::sync::{Mutex, RwLock, atomic};
}

use crate::{Space, StoreError, durable, index};

#[allow(dead_code, unreachable_pub)]
#[path = "layer.rs"]
mod layer;
#[path = "presence.rs"]
mod presence;
#[path = "../tests/fixture/tar.rs"]
mod tar;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use millstream_oci::Digest;
use millstream_toc::read::Chunk;
use millstream_toc::{BuildOptions, Compression, DataRange, Toc, build};
use redb::Database;
use redb::backends::InMemoryBackend;
use shuttle::rand::{Rng as _, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, Runner, thread};

use self::durable::{Faults, Step};
use self::index::{Index, LayerState};
use self::layer::Layer;
use self::sync::atomic::{AtomicBool, Ordering};

/// Orders that a test tries in each of two ways: `MILLSTREAM_SCHEDULES`, else few enough for every day.
fn schedules() -> usize {
    std::env::var("MILLSTREAM_SCHEDULES").ok().and_then(|number| number.parse().ok()).unwrap_or(700)
}

/// Tries orders at random, and such as change seldom at the worst moments.
fn explore(test: fn()) {
    let config = || {
        let mut config = Config::new();
        // Of atomics it tries all orders of operations, not those in which a processor may show them; there are locks for these.
        config.silence_warnings = true;
        // Enough for a database.
        config.stack_size = 1 << 20;
        config
    };
    Runner::new(RandomScheduler::new(schedules()), config()).run(test);
    Runner::new(PctScheduler::new(3, schedules()), config()).run(test);
}

/// Any time may pass before a step on the disk. The operation on an atomic is where others may come in between; a call of
/// `yield_now` would make them come rather often, and never long enough.
#[derive(Debug, Default)]
struct Slow(AtomicBool);

impl Faults for Slow {
    fn before(&self, step: Step, _: &Path) -> io::Result<()> {
        if step != Step::Commit {
            self.0.load(Ordering::SeqCst);
        }
        Ok(())
    }
}

/// A disk in memory with a layer of two chunks, both of which are there and synced.
#[derive(Debug)]
struct Node {
    directory: tempfile::TempDir,
    index: Arc<Index>,
    space: Arc<Space>,
    layer: Layer,
}

impl Node {
    fn new(verified: bool) -> Arc<Self> {
        let (digest, toc) = table();
        let memory = Path::new("/dev/shm");
        let directory = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
        let db = Database::builder().create_with_backend(InMemoryBackend::new()).unwrap();
        let index = Arc::new(Index::open(Arc::new(db), Arc::new(Slow::default()), 0).unwrap());
        let record = index.put_layer(&digest, Digest::of(&toc), None).unwrap();
        let files = directory.path().join("layer");
        fs::create_dir(&files).unwrap();
        fs::write(files.join("toc"), toc).unwrap();
        let space = Arc::new(Space::default());
        let layer =
            Layer::open(&files, digest, record, index.clone(), Arc::new(Slow::default()), space.clone()).unwrap();
        let node = Self { directory, index, space, layer };
        node.write_all();
        node.layer.sync().unwrap();
        if verified {
            node.layer.set_verified().unwrap();
        }
        Arc::new(node)
    }

    fn files(&self) -> PathBuf {
        self.directory.path().join("layer")
    }

    /// What is given back counts as it should.
    fn read(&self, chunk: Chunk) {
        let mut out = vec![0; bytes_of(chunk).len()];
        if self.layer.read(chunk.data, &mut out).unwrap().is_empty() {
            assert!(out == bytes_of(chunk), "chunk {} reads as something else", chunk.ix);
        }
    }

    fn write_all(&self) {
        for chunk in chunks(self.layer.toc()) {
            match self.layer.write(chunk, &bytes_of(chunk)) {
                Ok(()) | Err(StoreError::NoSpace { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// What a process would find that started now, after this one was killed.
    fn found(&self) {
        let copy = tempfile::tempdir_in(self.directory.path()).unwrap();
        for file in fs::read_dir(self.files()).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
        }
        let record = self.index.layer(&self.layer.digest()).unwrap().unwrap();
        let digest = self.layer.digest();
        let again =
            Layer::open(copy.path(), digest, record, self.index.clone(), Arc::new(Slow::default()), Arc::default())
                .unwrap();
        for chunk in chunks(again.toc()) {
            let mut out = vec![0; bytes_of(chunk).len()];
            let missing = again.read(chunk.data, &mut out).unwrap();
            assert!(!missing.is_empty() || out == bytes_of(chunk), "a hole counts as chunk {}", chunk.ix);
        }
    }
}

/// A layer of two files, each of one chunk.
fn table() -> (Digest, Vec<u8>) {
    thread_local! {
        static TABLE: (Digest, Vec<u8>) = {
            let tar = tar::tar(&[("a", tar::noise(1, 100)), ("b", tar::noise(2, 5000))]);
            let built = build(&tar[..], &BuildOptions::new(Compression::Plain), &mut ()).unwrap();
            (Toc::open(built.toc.clone()).unwrap().blob_digest(), built.toc)
        };
    }
    TABLE.with(Clone::clone)
}

fn chunks(toc: &Toc) -> Vec<Chunk> {
    toc.chunks_in(DataRange::new(0, toc.data_size())).unwrap()
}

fn bytes_of(chunk: Chunk) -> Vec<u8> {
    tar::noise(chunk.ix + 77, usize::try_from(chunk.data.len()).unwrap())
}

/// Starts a task of a node.
fn task(node: &Arc<Node>, work: impl FnOnce(&Node) + Send + 'static) -> thread::JoinHandle<()> {
    let node = Arc::clone(node);
    thread::spawn(move || work(&node))
}

fn end(tasks: impl IntoIterator<Item = thread::JoinHandle<()>>) {
    tasks.into_iter().for_each(|task| task.join().unwrap());
}

/// Seen to fail with: a reader that lets go of the lock between its look at the map and its copy; writes that are not refused
/// during an eviction.
#[test]
fn nobody_reads_a_hole_as_content() {
    explore(|| {
        let node = Node::new(thread_rng().gen_bool(0.5));
        let read = |node: &Node| chunks(node.layer.toc()).into_iter().rev().for_each(|chunk| node.read(chunk));
        let (one, two) = (task(&node, read), task(&node, read));
        let evict = task(&node, |node| _ = node.layer.evict(u64::MAX).unwrap());
        let write = task(&node, Node::write_all);
        let sync = task(&node, |node| node.layer.sync().unwrap());
        end([one, two, evict, write, sync]);
        read(&node);
        let held = chunks(node.layer.toc()).into_iter().filter(|chunk| node.layer.has(chunk.ix));
        let held: u64 = held.map(|chunk| chunk.data.len().next_multiple_of(4096)).sum();
        assert_eq!((node.layer.bytes_stored(), node.space.used()), (held, held), "the account is right in the end");
    });
}

/// Seen to fail with: pages that still count after their chunk was given up.
#[test]
fn nobody_reads_a_hole_as_pages() {
    explore(|| {
        let node = Node::new(false);
        let long = chunks(node.layer.toc())[1];
        let pages = move |node: &Node| {
            let bytes = bytes_of(long);
            for (start, page) in [(0, &bytes[..4096]), (4096, &bytes[4096..])] {
                match node.layer.write_pages(long, &[(start, page)]) {
                    Ok(()) | Err(StoreError::NoSpace { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        };
        let read = move |node: &Node| {
            for page in bytes_of(long).chunks(4096).zip(0..) {
                let range = DataRange::with_len(long.data.start + page.1 * 4096, page.0.len() as u64);
                let mut out = vec![0; page.0.len()];
                if node.layer.read(range, &mut out).unwrap().is_empty() {
                    assert!(out == page.0, "page {} reads as something else", page.1);
                }
            }
        };
        let evict = |node: &Node| _ = node.layer.evict(u64::MAX).unwrap();
        end([task(&node, evict), task(&node, pages), task(&node, Node::write_all), task(&node, read)]);
        end([task(&node, evict), task(&node, read)]);
        read(&node);
    });
}

/// Seen to fail with: holes that are made before the disk has forgotten the chunks; no record that a verified layer is lazy again;
/// a proof that does not wait for an eviction.
#[test]
fn a_death_at_any_moment_leaves_no_hole_that_counts() {
    explore(|| {
        let node = Node::new(thread_rng().gen_bool(0.5));
        let evict = task(&node, |node| _ = node.layer.evict(5000).unwrap());
        let hydrate = task(&node, |node| {
            node.write_all();
            match node.layer.set_verified() {
                Ok(()) | Err(StoreError::Incomplete { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        });
        let sync = task(&node, |node| node.layer.sync().unwrap());
        let dies = task(&node, Node::found);
        end([evict, hydrate, sync, dies]);
        node.found();
        let whole = chunks(node.layer.toc()).into_iter().all(|chunk| node.layer.has(chunk.ix));
        assert!(whole || node.layer.state() == LayerState::Lazy, "proven, and not all of it is there");
    });
}

/// Seen to fail with: no look whether the layer was removed; a removal that does not wait for the eviction.
#[test]
fn an_eviction_brings_nothing_of_a_removed_layer_back() {
    explore(|| {
        let node = Node::new(thread_rng().gen_bool(0.5));
        let evict = task(&node, |node| match node.layer.evict(u64::MAX) {
            Ok(_) | Err(StoreError::Unknown { .. }) => {}
            Err(error) => panic!("{error}"),
        });
        let write = task(&node, Node::write_all);
        let read = task(&node, |node| chunks(node.layer.toc()).into_iter().for_each(|chunk| node.read(chunk)));
        // As `Store::remove` does.
        let remove = task(&node, |node| {
            node.index.forget_layer(&node.layer.digest()).unwrap();
            node.layer.mark_removed();
            durable::remove_tree(&node.files()).unwrap();
        });
        end([evict, write, read, remove]);
        assert!(!node.files().exists(), "files of a layer that was removed");
        assert_eq!(node.index.layer(&node.layer.digest()).unwrap(), None);
    });
}
