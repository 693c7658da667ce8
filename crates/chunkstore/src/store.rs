//! All layers of a node, found again after a restart.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use millstream_oci::Digest;
use millstream_toc::Toc;
use redb::Database;

use crate::durable::{self, Faults, NoFaults};
use crate::index::{Index, LayerRecord};
use crate::layer::DATA_FILE;
use crate::{Layer, LayerState, Space, StoreError, content_keys};

/// Threads that write the tables of an image's layers.
const WRITERS: usize = 8;

/// A table that was checked, and of what it is.
#[derive(Debug, Clone, Copy)]
struct Admission<'a> {
    digest: Digest,
    toc_digest: Digest,
    toc: &'a [u8],
}

impl<'a> Admission<'a> {
    fn of(toc: &'a [u8]) -> Result<Self, StoreError> {
        let parsed = Toc::open(toc.to_vec())?;
        parsed.check()?;
        Ok(Self { digest: parsed.blob_digest(), toc_digest: parsed.digest(), toc })
    }
}

/// How a store behaves.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Layers that were written to are synced this often by a thread of the store. Zero: only by [`Layer::sync`] and
    /// [`Store::sync_all`].
    pub sync_interval: Duration,
    /// Layers and views of a database that has given out no number yet get numbers above this one: for a new database on a
    /// root whose old one was lost, and whose numbers the kernel may still know.
    pub numbers_above: u32,
    /// Lets tests make the disk fail.
    pub faults: Arc<dyn Faults>,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self { sync_interval: Duration::from_secs(5), numbers_above: 0, faults: Arc::new(NoFaults) }
    }
}

/// The local store of one node. One process has it open, as redb sees to.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    pub(crate) index: Arc<Index>,
    pub(crate) faults: Arc<dyn Faults>,
    layers: Arc<Layers>,
    /// Held by [`Store::admit`], [`Store::admit_all`] and [`Store::remove`]: they change the same directories.
    admission: Mutex<()>,
    space: Arc<Space>,
    /// Held by [`Store::evict`]: of two layers that take content over from each other, one at most is waited for.
    evicting: Mutex<()>,
    /// Held while it is looked for equal contents: one look at a time needs memory and makes files of keys.
    pub(crate) comparing: Mutex<()>,
    _sync: Option<SyncThread>,
}

#[derive(Debug, Default)]
struct Layers(RwLock<Tables>);

#[derive(Debug, Default)]
struct Tables {
    by_digest: BTreeMap<Digest, Arc<Layer>>,
    by_number: HashMap<u32, Arc<Layer>>,
    damaged: BTreeMap<Digest, String>,
}

impl Layers {
    fn read(&self) -> RwLockReadGuard<'_, Tables> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Tables> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn all(&self) -> Vec<Arc<Layer>> {
        self.read().by_digest.values().cloned().collect()
    }
}

impl Tables {
    fn insert(&mut self, layer: &Arc<Layer>) {
        self.damaged.remove(&layer.digest());
        self.by_digest.insert(layer.digest(), layer.clone());
        self.by_number.insert(layer.number(), layer.clone());
    }

    fn remove(&mut self, digest: &Digest) -> Option<Arc<Layer>> {
        self.damaged.remove(digest);
        let layer = self.by_digest.remove(digest)?;
        self.by_number.remove(&layer.number());
        Some(layer)
    }
}

impl Store {
    /// Opens the store below `root`, which is created if it is not there, and removes what interrupted work left behind.
    /// Layers that cannot be opened are listed by [`Store::damaged`].
    ///
    /// # Errors
    /// When the root directory or the database cannot be used at all.
    pub fn open(root: &Path, db: Arc<Database>, options: StoreOptions) -> Result<Self, StoreError> {
        for dir in [root.to_owned(), root.join("layers"), root.join("views")] {
            durable::make_dir(&dir)?;
        }
        let index = Arc::new(Index::open(db, options.faults.clone(), options.numbers_above)?);
        let layers = Arc::new(Layers::default());
        let sync = SyncThread::start(&layers, options.sync_interval)?;
        let store = Self {
            root: root.to_owned(),
            index,
            faults: options.faults,
            layers,
            admission: Mutex::default(),
            space: Arc::default(),
            evicting: Mutex::default(),
            comparing: Mutex::default(),
            _sync: sync,
        };
        store.load()?;
        store.sweep()?;
        store.sweep_views()?;
        Ok(store)
    }

    fn load(&self) -> Result<(), StoreError> {
        for (digest, record) in self.index.layers()? {
            let opened = record.and_then(|record| self.open_or_empty(digest, record));
            let mut tables = self.layers.write();
            match opened {
                Ok(layer) => tables.insert(&layer),
                Err(error) => {
                    tables.damaged.insert(digest, error.to_string());
                }
            }
        }
        Ok(())
    }

    /// Opens a layer; a verified one whose data is lost starts empty. Its names and attributes need nobody else.
    fn open_or_empty(&self, digest: Digest, record: LayerRecord) -> Result<Arc<Layer>, StoreError> {
        let (toc, number) = (record.toc, record.number);
        let opened = self.open_layer(digest, record);
        if !matches!(&opened, Err(StoreError::Damaged { what: DATA_FILE, .. })) {
            return opened;
        }
        self.empty(&digest, toc, number)?;
        let record = self.index.layer(&digest)?.ok_or_else(|| StoreError::Unknown { object: digest.to_string() })?;
        let dir = self.layer_dir(&digest);
        let (index, faults, space) = (self.index.clone(), self.faults.clone(), self.space.clone());
        let layer = Layer::open(&dir, digest, record, index, faults, space)?;
        Ok(Arc::new(layer.with_lost("its data file was gone or had another length")))
    }

    /// Records that nothing of a layer's content is here.
    fn empty(&self, digest: &Digest, toc: Digest, number: u32) -> Result<(), StoreError> {
        let dir = self.layer_dir(digest);
        durable::make_dir(&dir)?;
        for file in ["data", "present"] {
            durable::clear_way(&dir.join(file))?;
            durable::remove_file(&dir.join(file))?;
        }
        self.index.put_layer(digest, toc, Some(number)).map(drop)
    }

    fn open_layer(&self, digest: Digest, record: LayerRecord) -> Result<Arc<Layer>, StoreError> {
        let dir = self.layer_dir(&digest);
        let (index, faults, space) = (self.index.clone(), self.faults.clone(), self.space.clone());
        Layer::open(&dir, digest, record, index, faults, space).map(Arc::new)
    }

    /// Removes directories that no record names and temporary files.
    fn sweep(&self) -> Result<(), StoreError> {
        let known: Vec<String> = {
            let tables = self.layers.read();
            tables.by_digest.keys().chain(tables.damaged.keys()).map(Digest::hex).collect()
        };
        let dir = self.root.join("layers");
        for entry in fs::read_dir(&dir).map_err(|e| StoreError::io("list", &dir, e))? {
            let entry = entry.map_err(|e| StoreError::io("list", &dir, e))?;
            let name = entry.file_name();
            if !known.iter().any(|hex| name.to_str() == Some(hex)) {
                tracing::info!(file = %entry.path().display(), "removing what an interrupted admission left behind");
                discard(&entry.path());
                continue;
            }
            // Made again when it is needed; what is in its place would be in the way.
            if let Err(error) = durable::clear_way(&entry.path().join(content_keys::FILE)) {
                tracing::warn!(%error, "something stays where the keys of a layer should be");
            }
            for file in ["toc.tmp", "present.tmp", content_keys::TEMPORARY] {
                if let Err(error) = durable::remove_file(&entry.path().join(file)) {
                    tracing::warn!(%error, "temporary file stays");
                }
            }
        }
        Ok(())
    }

    pub(crate) fn views_dir(&self) -> PathBuf {
        self.root.join("views")
    }

    fn layer_dir(&self, digest: &Digest) -> PathBuf {
        self.root.join("layers").join(digest.hex())
    }

    /// Takes a layer in by its canonical TOC, which is checked here; the layer is the one whose blob digest the TOC names.
    /// A layer that is there already is given back as it is.
    ///
    /// # Errors
    /// [`StoreError::Toc`] when the bytes are no sound TOC, [`StoreError::DifferentToc`] when the layer is there with another
    /// one and not verified, [`StoreError::Quarantined`] until the layer is removed, those of disk and database.
    pub fn admit(&self, toc: &[u8]) -> Result<Arc<Layer>, StoreError> {
        let admission = Admission::of(toc)?;
        let _guard = self.admission.lock().unwrap_or_else(PoisonError::into_inner);
        self.admit_one(&admission)
    }

    /// Takes the layers of one image in, as [`Store::admit`] would one after the other, but waits for the disk only once for
    /// all of those that are new. Layers that are quarantined stay so.
    ///
    /// # Errors
    /// Those of [`Store::admit`] but [`StoreError::Quarantined`]; some of the layers may have been taken in then.
    pub fn admit_all(&self, tocs: &[Vec<u8>]) -> Result<(), StoreError> {
        let admissions = tocs.iter().map(|toc| Admission::of(toc)).collect::<Result<Vec<_>, _>>()?;
        let _guard = self.admission.lock().unwrap_or_else(PoisonError::into_inner);
        let mut new: Vec<&Admission<'_>> = Vec::new();
        for admission in &admissions {
            let digest = &admission.digest;
            let known = self.layer(digest).is_some() || !matches!(self.index.layer(digest), Ok(None));
            if !known && new.iter().all(|other| other.digest != *digest) {
                new.push(admission);
            }
        }
        self.create_all(&new)?;
        for admission in &admissions {
            match self.admit_one(admission) {
                Ok(_) | Err(StoreError::Quarantined { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The caller holds `admission`.
    fn admit_one(&self, admission: &Admission<'_>) -> Result<Arc<Layer>, StoreError> {
        let Admission { digest, toc_digest, toc } = *admission;
        if let Some(layer) = self.layer(&digest) {
            return match layer.state() {
                LayerState::Quarantined { reason } => Err(StoreError::Quarantined { layer: digest, reason }),
                LayerState::Verified => Ok(layer),
                LayerState::Lazy if layer.toc_digest() == toc_digest => Ok(layer),
                LayerState::Lazy => Err(StoreError::DifferentToc { layer: digest }),
            };
        }
        let layer = self.create(digest, toc, toc_digest)?;
        self.layers.write().insert(&layer);
        Ok(layer)
    }

    /// Does for layers that are new what `create` does for one. Syncs that run side by side end together, since they share the
    /// commits of the file system's journal; one after the other, those of 60 layers take seconds.
    fn create_all(&self, new: &[&Admission<'_>]) -> Result<(), StoreError> {
        if new.is_empty() {
            return Ok(());
        }
        let next = AtomicUsize::new(0);
        let write = || -> Result<(), StoreError> {
            while let Some(admission) = new.get(next.fetch_add(1, Ordering::Relaxed)) {
                self.write_toc(&admission.digest, admission.toc)?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            let more =
                (1..WRITERS.min(new.len())).filter_map(|_| thread::Builder::new().spawn_scoped(scope, write).ok());
            let more: Vec<_> = more.collect();
            let mut result: Result<(), StoreError> = write();
            for writer in more {
                result = result.and(writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
            result
        })?;
        durable::sync_dir(&*self.faults, &self.root.join("layers"))?;
        let records = self.index.put_layers(new.iter().map(|admission| (admission.digest, admission.toc_digest)))?;
        for (admission, record) in new.iter().zip(records) {
            let layer = self.open_layer(admission.digest, record)?;
            self.layers.write().insert(&layer);
        }
        Ok(())
    }

    /// Puts the table of a layer that is new into a directory that nobody has synced yet.
    fn write_toc(&self, digest: &Digest, toc: &[u8]) -> Result<(), StoreError> {
        let dir = self.layer_dir(digest);
        durable::remove_tree(&dir)?;
        durable::make_dir(&dir)?;
        durable::replace(&*self.faults, &dir.join("toc"), toc)
    }

    /// Writes the files of a layer that is new or damaged. The record is committed last, so that it never names files
    /// that a crash took away.
    fn create(&self, digest: Digest, toc: &[u8], toc_digest: Digest) -> Result<Arc<Layer>, StoreError> {
        // A damaged layer keeps its number only with the same TOC: node ids of running containers point into it.
        let known = match self.index.layer(&digest) {
            Ok(record) => record.filter(|record| record.toc == toc_digest),
            Err(StoreError::Record(_)) => None,
            Err(error) => return Err(error),
        };
        if let Some(LayerRecord { state: LayerState::Quarantined { reason }, .. }) = known {
            return Err(StoreError::Quarantined { layer: digest, reason });
        }
        let dir = self.layer_dir(&digest);
        if known.is_none() || !dir.is_dir() {
            durable::remove_tree(&dir).or_else(|_| durable::remove_file(&dir))?;
        }
        durable::make_dir(&dir)?;
        durable::replace(&*self.faults, &dir.join("toc"), toc)?;
        durable::sync_dir(&*self.faults, &self.root.join("layers"))?;
        let Some(record) = known else {
            let record = self.index.put_layer(&digest, toc_digest, None)?;
            return self.open_layer(digest, record);
        };
        // The TOC is good now; what is left to be wrong is the data of a verified layer.
        self.open_or_empty(digest, record)
    }

    /// The layer of a blob.
    #[must_use]
    pub fn layer(&self, digest: &Digest) -> Option<Arc<Layer>> {
        self.layers.read().by_digest.get(digest).cloned()
    }

    /// The layer of a number in a node id.
    #[must_use]
    pub fn layer_by_number(&self, number: u32) -> Option<Arc<Layer>> {
        self.layers.read().by_number.get(&number).cloned()
    }

    /// All layers that can be used, by digest.
    #[must_use]
    pub fn layers(&self) -> Vec<Arc<Layer>> {
        self.layers.all()
    }

    /// Layers that could not be opened, and why.
    #[must_use]
    pub fn damaged(&self) -> Vec<(Digest, String)> {
        self.layers.read().damaged.iter().map(|(digest, reason)| (*digest, reason.clone())).collect()
    }

    /// Treats a layer as one that could not be opened: its files were changed while it was in use. Whoever holds it keeps it.
    /// [`Store::admit`] takes it in again.
    pub fn set_damaged(&self, digest: &Digest, reason: String) {
        let mut tables = self.layers.write();
        tables.remove(digest);
        tables.damaged.insert(*digest, reason);
    }

    /// Whether the layer is here and could not be opened.
    #[must_use]
    pub fn is_damaged(&self, digest: &Digest) -> bool {
        self.layers.read().damaged.contains_key(digest)
    }

    /// Removes a layer and its number. Its names are gone at once; handles that are still held can go on reading, what
    /// they write goes nowhere, and the space is free when the last of them is dropped.
    ///
    /// # Errors
    /// Those of database and disk; files that could not be removed now are removed at the next start.
    pub fn remove(&self, digest: &Digest) -> Result<(), StoreError> {
        let _guard = self.admission.lock().unwrap_or_else(PoisonError::into_inner);
        // First the record: a directory without one is rubbish, a record without a directory would be damage.
        self.index.forget_layer(digest)?;
        // Out of the tables before it waits for a sync that is under way: every read of every layer needs the tables.
        let removed = self.layers.write().remove(digest);
        if let Some(layer) = removed {
            layer.mark_removed();
        }
        durable::remove_tree(&self.layer_dir(digest))
    }

    /// Its directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What its content takes of the disk, and may take.
    #[must_use]
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// Gives up content of a layer until `wanted` bytes of disk space are free or nothing of it is left; gives the bytes that
    /// are free now. What is given up is missing from then on, and a verified layer is lazy: the caller has seen to it that
    /// there are sources. Reads that are under way get their bytes; until the end of the eviction nothing of the layer is
    /// stored. Blocks.
    ///
    /// # Errors
    /// Those of disk and database; then nothing is given up, or it is and its space is not free yet.
    pub fn evict(&self, layer: &Layer, wanted: u64) -> Result<u64, StoreError> {
        let _one_at_a_time = self.evicting.lock().unwrap_or_else(PoisonError::into_inner);
        layer.evict(wanted)
    }

    /// Syncs every layer that was written to, as before an orderly end.
    ///
    /// # Errors
    /// The first failure; the other layers are synced all the same.
    pub fn sync_all(&self) -> Result<(), StoreError> {
        let mut result = Ok(());
        for layer in self.layers() {
            result = result.and(layer.sync());
        }
        result
    }
}

/// Removes a directory or file that nothing refers to; at the next start it is tried again.
fn discard(path: &Path) {
    let removed = if path.is_dir() { durable::remove_tree(path) } else { durable::remove_file(path) };
    if let Err(error) = removed {
        tracing::warn!(%error, "rubbish stays in the store");
    }
}

/// Syncs dirty layers now and then, until it is dropped.
#[derive(Debug)]
struct SyncThread {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl SyncThread {
    fn start(layers: &Arc<Layers>, interval: Duration) -> Result<Option<Self>, StoreError> {
        if interval.is_zero() {
            return Ok(None);
        }
        let (stop, stopped) = mpsc::channel::<()>();
        let layers = layers.clone();
        let run = move || {
            while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                for layer in layers.all() {
                    if let Err(error) = layer.sync() {
                        tracing::warn!(layer = %layer.digest(), %error, "layer could not be synced");
                    }
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("store-sync".to_owned())
            .spawn(run)
            .map_err(|e| StoreError::io("start a thread for", Path::new("the store"), e))?;
        Ok(Some(Self { stop: Some(stop), thread: Some(thread) }))
    }
}

impl Drop for SyncThread {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic there was printed when it happened.
            let _ = thread.join();
        }
    }
}
