//! One layer on the disk: its TOC, its data file and which chunks of it are there.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use millstream_oci::Digest;
use millstream_sys::map::GuardedMap;
use millstream_toc::format::{ChunkIx, DATA_ALIGN, NONE};
use millstream_toc::read::Chunk;
use millstream_toc::{CHUNK_SIZE, DataRange, Toc};

use self::partial::Partial;
use super::durable::{self, Faults, Step};
use super::index::{Index, LayerRecord, LayerState};
use super::presence::{self, Presence};
use super::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use super::sync::{Mutex, PoisonError, RwLock};
use super::{Space, StoreError};

// Found from `schedules` as well.
#[path = "layer/evict.rs"]
mod evict;
#[path = "layer/partial.rs"]
mod partial;

/// What [`StoreError::Damaged`] calls the data file.
pub(crate) const DATA_FILE: &str = "data file";

/// Chunks that other layers may take.
#[derive(Debug)]
pub(crate) enum Held {
    /// Every one.
    All,
    /// Those whose bit is set.
    Some(Vec<u64>),
}

impl Held {
    pub(crate) fn has(&self, chunk: ChunkIx) -> bool {
        match self {
            Self::All => true,
            Self::Some(words) => presence::is_set(words, chunk),
        }
    }
}

/// The mapped TOC file, shared between the [`Toc`] that reads it and the layer that watches it for faults.
#[derive(Debug, Clone)]
struct SharedMap(Arc<GuardedMap>);

impl AsRef<[u8]> for SharedMap {
    fn as_ref(&self) -> &[u8] {
        (*self.0).as_ref()
    }
}

/// A layer in the store. All methods may be called from any thread; those that touch the disk block.
#[derive(Debug)]
pub struct Layer {
    digest: Digest,
    number: u32,
    toc: Arc<Toc>,
    toc_digest: Digest,
    toc_map: SharedMap,
    dir: PathBuf,
    data: File,
    data_path: PathBuf,
    presence: Presence,
    /// What is here of chunks that are not present.
    partial: Partial,
    /// Held by whoever looks at or changes presence and data together; [`evict`] says what for. True: content is being given
    /// up, and nothing is written.
    content: RwLock<bool>,
    bytes_present: AtomicU64,
    bytes_total: u64,
    /// Bytes of `bytes_present` whose record is on the disk.
    bytes_synced: AtomicU64,
    /// Bytes of the disk that content takes, as [`Space`] counts them.
    stored: AtomicU64,
    /// Nanoseconds since 1970 of the last use.
    used: AtomicU64,
    space: Arc<Space>,
    state: RwLock<LayerState>,
    /// Chunks were written since the last sync began.
    dirty: AtomicBool,
    /// Its files are gone; what is written goes nowhere.
    removed: AtomicBool,
    /// What was here before it was opened and is not any more.
    lost: Option<String>,
    /// Held while the presence file or the state is replaced. The presence that is known to be on the disk, as bits.
    persist: Mutex<Vec<u64>>,
    index: Arc<Index>,
    faults: Arc<dyn Faults>,
}

impl Layer {
    /// Opens the layer that `record` names in `dir`.
    ///
    /// Bytes of a layer that is not verified are trusted as far as its presence file proves; without a good one, or
    /// with a data file of another length, it starts empty.
    pub(crate) fn open(
        dir: &Path,
        digest: Digest,
        record: LayerRecord,
        index: Arc<Index>,
        faults: Arc<dyn Faults>,
        space: Arc<Space>,
    ) -> Result<Self, StoreError> {
        let (toc, toc_map) = open_toc(&dir.join("toc"), &digest, &record.toc)?;
        let data_path = dir.join("data");
        let verified = record.state == LayerState::Verified;
        let (data, kept) = open_data(&data_path, &digest, toc.data_size(), verified)?;
        let (presence, lost) = if verified {
            (all(toc.chunk_count()), None)
        } else {
            match load_presence(dir, &toc, &record, &data, kept) {
                Ok(presence) => (presence, None),
                Err(lost) => (Presence::empty(toc.chunk_count()), lost),
            }
        };
        let Measured { present, total, stored } = measure(&toc, &presence)?;
        let persist = Mutex::new(presence.snapshot());
        let metadata = data.metadata().map_err(|e| StoreError::io("inspect", &data_path, e))?;
        let used = metadata.accessed().ok().and_then(|used| used.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
        let occupied = metadata.blocks().saturating_mul(STAT_BLOCK);
        space.add(stored);
        let layer = Self {
            digest,
            number: record.number,
            toc: Arc::new(toc),
            toc_digest: record.toc,
            toc_map,
            dir: dir.to_owned(),
            data,
            data_path,
            presence,
            partial: Partial::default(),
            content: RwLock::new(false),
            bytes_present: AtomicU64::new(present),
            bytes_total: total,
            bytes_synced: AtomicU64::new(present),
            stored: AtomicU64::new(stored),
            used: AtomicU64::new(nanoseconds(used)),
            space,
            state: RwLock::new(record.state),
            dirty: AtomicBool::new(false),
            removed: AtomicBool::new(false),
            lost,
            persist,
            index,
            faults,
        };
        if !verified
            && occupied > stored
            && let Err(error) = layer.free_what_is_missing()
        {
            tracing::warn!(layer = %layer.digest, %error, "space of lost content is not free");
        }
        Ok(layer)
    }

    /// The same, with what it had and lost.
    pub(crate) fn with_lost(mut self, lost: &str) -> Self {
        self.lost = Some(lost.to_owned());
        self
    }

    /// Digest of the layer's blob.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The layer's number in node ids; between 1 and [`MAX_NUMBER`](crate::MAX_NUMBER).
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The layer's TOC. It was checked when it was admitted.
    #[must_use]
    pub fn toc(&self) -> &Arc<Toc> {
        &self.toc
    }

    /// SHA-256 of the canonical TOC.
    #[must_use]
    pub fn toc_digest(&self) -> Digest {
        self.toc_digest
    }

    /// Why content that was here is fetched again, if this layer had some that was lost before it was opened.
    #[must_use]
    pub fn lost(&self) -> Option<&str> {
        self.lost.as_deref()
    }

    /// How far the layer can be trusted now.
    #[must_use]
    pub fn state(&self) -> LayerState {
        self.state.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether a chunk is in the data file; a chunk that does not exist is not.
    #[must_use]
    pub fn has(&self, chunk: ChunkIx) -> bool {
        self.presence.has(chunk)
    }

    /// The chunks of `range` that must be written before it can be read, ascending. Chunks that lie wholly in a hole of a
    /// sparse file are never missing, nor are those of which the pages in `range` are here.
    ///
    /// # Errors
    /// [`StoreError::Toc`] when the range leaves the layer, [`StoreError::Damaged`] when the TOC file was changed.
    pub fn missing(&self, range: DataRange) -> Result<Vec<Chunk>, StoreError> {
        let mut chunks = self.toc.chunks_in(range)?;
        self.check_map()?;
        chunks.retain(|chunk| !self.presence.has(chunk.ix));
        self.partial.retain_unreadable(&mut chunks, range);
        Ok(chunks)
    }

    /// Reads `range` of the data address space into `out`, and gives those of its chunks that are missing: their bytes in `out`
    /// mean nothing.
    ///
    /// # Errors
    /// [`StoreError::Quarantined`], [`StoreError::OutOfRange`], [`StoreError::Damaged`] when the data file got shorter, those
    /// of [`Layer::missing`].
    pub fn read(&self, range: DataRange, out: &mut [u8]) -> Result<Vec<Chunk>, StoreError> {
        self.check_trusted()?;
        if range.end > self.toc.data_size() || range.len() != out.len() as u64 {
            return Err(StoreError::OutOfRange { range });
        }
        // What is seen here stays until it is read.
        let _content = self.content.read().unwrap_or_else(PoisonError::into_inner);
        let missing = self.missing(range)?;
        let read = self.faults.before(Step::ReadData, &self.data_path);
        let read = read.and_then(|()| self.data.read_exact_at(out, range.start)).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => damaged(DATA_FILE, &self.digest),
            _ => StoreError::io("read", &self.data_path, error),
        });
        if read.is_err() {
            self.space.note(&read);
        }
        read.map(|()| missing)
    }

    /// Has `copy` take the content of `chunks` out of the data file, if all of them are there and can be trusted.
    pub(crate) fn give(&self, chunks: Range<ChunkIx>, copy: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
        let _content = self.content.read().unwrap_or_else(PoisonError::into_inner);
        if !chunks.into_iter().all(|ix| self.presence.has(ix)) {
            return Err(io::Error::other("content of the other layer was given up meanwhile"));
        }
        copy(&self.data)?;
        // A TOC that turned to zeros meanwhile may have named wrong places.
        self.check_trusted().map_err(io::Error::other)
    }

    /// Puts the bytes of a chunk in its place; the caller has verified them. A chunk that is present is left alone. When
    /// the layer was removed meanwhile, nothing happens.
    ///
    /// # Errors
    /// [`StoreError::NoSpace`] when the disk is full, [`StoreError::OutOfRange`] when it is not a chunk of this layer or
    /// the bytes do not fill it, [`StoreError::Quarantined`].
    pub fn write(&self, chunk: Chunk, bytes: &[u8]) -> Result<(), StoreError> {
        self.check_fits(chunk, bytes)?;
        if self.presence.has(chunk.ix) { Ok(()) } else { self.rewrite(chunk, bytes) }
    }

    /// As [`Layer::write`], but writes a chunk that is present as well.
    ///
    /// # Errors
    /// As [`Layer::write`].
    pub fn rewrite(&self, chunk: Chunk, bytes: &[u8]) -> Result<(), StoreError> {
        self.check_fits(chunk, bytes)?;
        self.put(chunk.ix..chunk.ix + 1, |data| data.write_all_at(bytes, chunk.data.start)).map(drop)
    }

    fn check_fits(&self, chunk: Chunk, bytes: &[u8]) -> Result<(), StoreError> {
        self.check_trusted()?;
        if self.toc.chunk(chunk.ix)?.data != chunk.data || chunk.data.len() != bytes.len() as u64 {
            return Err(StoreError::OutOfRange { range: chunk.data });
        }
        Ok(())
    }

    /// Has `write` bring the bytes of `chunks` to their places in the data file and then counts them as present; gives the
    /// number of bytes that were not before. When the layer was removed meanwhile, nothing happens.
    ///
    /// # Errors
    /// As [`Layer::write`]. Nothing of `chunks` counts as present then that did not before.
    pub(crate) fn put(
        &self,
        chunks: Range<ChunkIx>,
        write: impl FnOnce(&File) -> io::Result<()>,
    ) -> Result<u64, StoreError> {
        if self.removed.load(Ordering::Acquire) {
            return Ok(0);
        }
        let content = self.content.read().unwrap_or_else(PoisonError::into_inner);
        let result = self.put_with(chunks, write, *content);
        self.space.note(&result);
        result
    }

    /// The caller holds `content`, which said whether this layer is `evicting`.
    fn put_with(
        &self,
        chunks: Range<ChunkIx>,
        write: impl FnOnce(&File) -> io::Result<()>,
        evicting: bool,
    ) -> Result<u64, StoreError> {
        let mut needed = 0;
        for ix in chunks.clone().filter(|ix| !self.presence.has(*ix)) {
            needed += stored_len(&self.toc.chunk(ix)?);
        }
        if evicting || needed > self.space.free() {
            return Err(StoreError::NoSpace { action: "store more content in", path: self.data_path.clone() });
        }
        self.faults
            .before(Step::WriteData, &self.data_path)
            .and_then(|()| write(&self.data))
            .map_err(|e| StoreError::io("write", &self.data_path, e))?;
        // Places come from the TOC: one that turned to zeros meanwhile may have named wrong ones.
        self.check_map()?;
        let (mut new, mut stored) = (0, 0);
        for ix in chunks {
            let chunk = self.toc.chunk(ix)?;
            if self.presence.set(ix) {
                new += chunk.data.len();
                stored += stored_len(&chunk);
            }
            // While `content` is held: nothing may count by its pages after it was given up.
            self.partial.forget(ix);
        }
        self.bytes_present.fetch_add(new, Ordering::Relaxed);
        self.stored.fetch_add(stored, Ordering::Relaxed);
        self.space.add(stored);
        self.dirty.store(true, Ordering::Release);
        Ok(new)
    }

    /// Forces what was written to the disk, then the record of it: chunks that are present now are so after a restart.
    /// Does nothing when nothing was written since the last time.
    ///
    /// # Errors
    /// Those of the disk. When the data itself could not be synced, chunks that were written since the last success are
    /// missing again; else they stay readable, and the next call tries again.
    pub fn sync(&self) -> Result<(), StoreError> {
        let mut durable = self.persist.lock().unwrap_or_else(PoisonError::into_inner);
        if self.removed.load(Ordering::Acquire) || !self.dirty.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let result = self.persist_presence(&mut durable);
        if result.is_err() {
            self.dirty.store(true, Ordering::Release);
        }
        result
    }

    fn persist_presence(&self, durable: &mut Vec<u64>) -> Result<(), StoreError> {
        // Taken before the sync: a chunk that is written during it may be set but not on the disk.
        let present = self.bytes_present();
        let words = self.presence.snapshot();
        self.sync_data(durable)?;
        durable.clone_from(&words);
        let bytes = presence::encode(&words, self.toc.chunk_count(), &self.toc_digest);
        durable::replace(&*self.faults, &self.dir.join("present"), &bytes)?;
        // Counted before its marks were looked at: rather too little.
        self.bytes_synced.store(present, Ordering::Relaxed);
        Ok(())
    }

    /// Writes the presence file anew if it is damaged or gone. False: it was.
    pub(crate) fn persist_if_damaged(&self) -> Result<bool, StoreError> {
        let mut durable = self.persist.lock().unwrap_or_else(PoisonError::into_inner);
        if self.removed.load(Ordering::Acquire) {
            return Ok(true);
        }
        let found = fs::read(self.dir.join("present")).ok();
        let whole = found
            .as_ref()
            .is_some_and(|bytes| presence::decode(bytes, self.toc.chunk_count(), &self.toc_digest).is_some());
        // One that was never written to has none.
        if whole || (found.is_none() && durable.iter().all(|word| *word == 0)) {
            return Ok(true);
        }
        self.persist_presence(&mut durable)?;
        Ok(false)
    }

    /// Forces the data file to the disk, which has `durable` already.
    ///
    /// The kernel reports a page that it could not write once, and may drop it then: the next sync would succeed without it,
    /// and reads would find a hole. So nothing that this sync was to bring to the disk counts as present after a failure.
    fn sync_data(&self, durable: &[u64]) -> Result<(), StoreError> {
        let result = self.faults.before(Step::SyncData, &self.data_path).and_then(|()| self.data.sync_data());
        if result.is_err() {
            self.partial.clear();
            for chunk in self.presence.keep(durable).into_iter().filter_map(|ix| self.toc.chunk(ix).ok()) {
                self.bytes_present.fetch_sub(chunk.data.len(), Ordering::Relaxed);
                self.stored.fetch_sub(stored_len(&chunk), Ordering::Relaxed);
                self.space.give_back(stored_len(&chunk));
            }
        }
        result.map_err(|e| StoreError::io("sync", &self.data_path, e))
    }

    /// Records that the layer is wholly local and proven. Syncs first.
    ///
    /// # Errors
    /// [`StoreError::Incomplete`] while chunks are missing, [`StoreError::Quarantined`], those of the disk.
    pub fn set_verified(&self) -> Result<(), StoreError> {
        let mut durable = self.persist.lock().unwrap_or_else(PoisonError::into_inner);
        self.check_trusted()?;
        if self.removed.load(Ordering::Acquire) {
            return Err(StoreError::Unknown { object: self.digest.to_string() });
        }
        let missing = (0..self.toc.chunk_count()).filter(|ix| !self.presence.has(*ix)).count();
        if missing > 0 {
            let missing = u32::try_from(missing).unwrap_or(u32::MAX);
            return Err(StoreError::Incomplete { layer: self.digest, missing });
        }
        let words = self.presence.snapshot();
        self.sync_data(&durable)?;
        *durable = words;
        self.change_state(LayerState::Verified)?;
        self.bytes_synced.store(self.bytes_total, Ordering::Relaxed);
        self.dirty.store(false, Ordering::Release);
        // Its work is done; left behind it would only take space.
        let _ = durable::remove_file(&self.dir.join("present"));
        Ok(())
    }

    /// Records that the layer was proven wrong: from now on it can neither be read nor written.
    ///
    /// # Errors
    /// Those of the database; in memory the layer is quarantined in any case.
    pub fn quarantine(&self, reason: &str) -> Result<(), StoreError> {
        let _guard = self.persist.lock().unwrap_or_else(PoisonError::into_inner);
        let state = LayerState::Quarantined { reason: reason.to_owned() };
        *self.state.write().unwrap_or_else(PoisonError::into_inner) = state.clone();
        if self.removed.load(Ordering::Acquire) {
            return Ok(());
        }
        self.index.set_state(&self.digest, &state)
    }

    /// Takes chunks back that turned out to be wrong: they are missing from now on, also after a restart. A verified layer is
    /// lazy again then. Chunks that are missing already are left out.
    ///
    /// # Errors
    /// [`StoreError::Quarantined`], those of disk and database; in memory the chunks are missing in any case.
    pub fn drop_chunks(&self, chunks: &[ChunkIx]) -> Result<(), StoreError> {
        let mut durable = self.persist.lock().unwrap_or_else(PoisonError::into_inner);
        self.check_trusted()?;
        let mut kept = vec![u64::MAX; durable.len()];
        for ix in chunks {
            presence::unset(&mut kept, *ix);
        }
        for chunk in self.presence.keep(&kept).into_iter().filter_map(|ix| self.toc.chunk(ix).ok()) {
            self.bytes_present.fetch_sub(chunk.data.len(), Ordering::Relaxed);
            self.stored.fetch_sub(stored_len(&chunk), Ordering::Relaxed);
            self.space.give_back(stored_len(&chunk));
        }
        for (word, kept) in durable.iter_mut().zip(&kept) {
            *word &= kept;
        }
        if self.removed.load(Ordering::Acquire) {
            return Ok(());
        }
        // First which chunks are there, then that not all are: between the two, the layer counts as whole as it did before.
        self.persist_presence(&mut durable)?;
        if self.state() == LayerState::Verified {
            self.change_state(LayerState::Lazy)?;
        }
        Ok(())
    }

    /// What other layers may take from this one: only what is known to be on the disk, since a page that the kernel fails to
    /// write may read as zeros until the next sync finds out. `None`: nothing.
    pub(crate) fn held(&self) -> Option<Held> {
        match self.state() {
            LayerState::Verified => Some(Held::All),
            LayerState::Quarantined { .. } => None,
            LayerState::Lazy => {
                if let Err(error) = self.sync() {
                    tracing::warn!(layer = %self.digest, %error, "layer could not be synced");
                }
                let durable = self.persist.lock().unwrap_or_else(PoisonError::into_inner).clone();
                durable.iter().any(|word| *word != 0).then_some(Held::Some(durable))
            }
        }
    }

    fn change_state(&self, state: LayerState) -> Result<(), StoreError> {
        self.index.set_state(&self.digest, &state)?;
        *self.state.write().unwrap_or_else(PoisonError::into_inner) = state;
        Ok(())
    }

    /// Bytes of file content that can be read now, holes included.
    #[must_use]
    pub fn bytes_present(&self) -> u64 {
        self.bytes_present.load(Ordering::Relaxed)
    }

    /// Bytes of [`Layer::bytes_present`] that a power cut would leave: they were synced, and so was the record of them.
    #[must_use]
    pub fn bytes_synced(&self) -> u64 {
        self.bytes_synced.load(Ordering::Relaxed).min(self.bytes_present())
    }

    /// Bytes of the disk that its content takes now.
    #[must_use]
    pub fn bytes_stored(&self) -> u64 {
        self.stored.load(Ordering::Relaxed)
    }

    /// Notes that somebody has use for the layer.
    pub fn note_use(&self, now: SystemTime) {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        // Of no consequence for anything else.
        self.used.fetch_max(nanoseconds(now), Ordering::Relaxed);
    }

    /// When somebody last had use for it.
    #[must_use]
    pub fn last_use(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_nanos(self.used.load(Ordering::Relaxed))
    }

    /// Writes the last use down, as time of access of the data file; it need not survive a power cut.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn record_use(&self) -> Result<(), StoreError> {
        let times = fs::FileTimes::new().set_accessed(self.last_use());
        self.data.set_times(times).map_err(|e| StoreError::io("set the times of", &self.data_path, e))
    }

    /// Bytes of file content the layer has; [`Layer::bytes_present`] when it is complete.
    #[must_use]
    pub fn bytes_total(&self) -> u64 {
        self.bytes_total
    }

    /// Bytes on the disk once the layer is wholly local: data file and TOC.
    #[must_use]
    pub fn disk_size(&self) -> u64 {
        self.toc.data_size().saturating_add(self.toc.as_bytes().len() as u64)
    }

    /// The data file, for whoever hands it to the kernel (passthrough, EROFS devices). Only [`Layer::write`] writes to it.
    #[must_use]
    pub fn data_file(&self) -> &File {
        &self.data
    }

    /// From now on nothing of this layer reaches the disk. Waits for a sync that is under way.
    pub(crate) fn mark_removed(&self) {
        let _guard = self.persist.lock().unwrap_or_else(PoisonError::into_inner);
        self.removed.store(true, Ordering::Release);
    }

    /// Directory of its files.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn check_trusted(&self) -> Result<(), StoreError> {
        if let LayerState::Quarantined { reason } = &*self.state.read().unwrap_or_else(PoisonError::into_inner) {
            return Err(StoreError::Quarantined { layer: self.digest, reason: reason.clone() });
        }
        self.check_map()
    }

    /// A TOC file that got shorter reads as zeros where it is missing, which must not become a wrong answer.
    fn check_map(&self) -> Result<(), StoreError> {
        if self.toc_map.0.poisoned() { Err(damaged("TOC", &self.digest)) } else { Ok(()) }
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        // If it was removed, its data file ends with it.
        self.space.give_back(self.bytes_stored());
    }
}

/// Enough until the year 2554.
fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Bytes of a block as `stat(2)` counts them, whatever the file system.
const STAT_BLOCK: u64 = 512;

/// Bytes of the disk that a chunk takes: whole blocks.
fn stored_len(chunk: &Chunk) -> u64 {
    chunk.data.len().next_multiple_of(DATA_ALIGN)
}

fn damaged(what: &'static str, layer: &Digest) -> StoreError {
    StoreError::Damaged { what, object: layer.to_string() }
}

/// Maps the TOC and compares it with the digest of the one that was checked and admitted.
fn open_toc(path: &Path, layer: &Digest, expected: &Digest) -> Result<(Toc, SharedMap), StoreError> {
    let map = File::open(path).and_then(|file| GuardedMap::new(&file)).map_err(|e| StoreError::io("map", path, e))?;
    let map = SharedMap(Arc::new(map));
    let toc = Toc::open(map.clone())?;
    if toc.digest() != *expected || toc.blob_digest() != *layer || map.0.poisoned() {
        return Err(damaged("TOC", layer));
    }
    Ok((toc, map))
}

/// Opens the data file at its full length. `false`: it is new, or what was in it before cannot be trusted and is gone.
///
/// # Errors
/// [`StoreError::Damaged`] when a verified layer has no such file.
fn open_data(path: &Path, layer: &Digest, size: u64, verified: bool) -> Result<(File, bool), StoreError> {
    let whole = fs::symlink_metadata(path).is_ok_and(|found| found.is_file() && found.len() == size);
    if verified && !whole {
        return Err(damaged(DATA_FILE, layer));
    }
    durable::clear_way(path)?;
    let data = durable::private_file().open(path).map_err(|e| StoreError::io("open", path, e))?;
    let found = data.metadata().map_err(|e| StoreError::io("inspect", path, e))?.len();
    if found == size {
        return Ok((data, true));
    }
    data.set_len(0).and_then(|()| data.set_len(size)).map_err(|e| StoreError::io("resize", path, e))?;
    Ok((data, false))
}

fn all(chunks: u32) -> Presence {
    let presence = Presence::empty(chunks);
    for ix in 0..chunks {
        presence.set(ix);
    }
    presence
}

/// What the presence file proves. Else nothing is present; with it what was lost, unless nothing was here.
fn load_presence(
    dir: &Path,
    toc: &Toc,
    record: &LayerRecord,
    data: &File,
    data_kept: bool,
) -> Result<Presence, Option<String>> {
    match fs::read(dir.join("present")) {
        Ok(_) if !data_kept => Err(Some("its data file was gone or had another length".to_owned())),
        Ok(bytes) => presence::decode(&bytes, toc.chunk_count(), &record.toc)
            .map(Presence::from_words)
            .ok_or_else(|| Some("its presence file is damaged".to_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            // A file that was never written to takes no blocks.
            let written = data.metadata().is_ok_and(|found| found.blocks() > 0);
            Err(written.then(|| "its presence file is gone".to_owned()))
        }
        Err(error) => Err(Some(format!("its presence file cannot be read: {error}"))),
    }
}

/// Bytes of a layer when it is opened.
struct Measured {
    /// Of file content that is present.
    present: u64,
    /// Of all file content.
    total: u64,
    /// Of the disk.
    stored: u64,
}

/// Marks chunks that lie wholly in holes, which no source ever gives.
fn measure(toc: &Toc, presence: &Presence) -> Result<Measured, StoreError> {
    let mut measured = Measured { present: 0, total: 0, stored: 0 };
    for ix in 0..toc.content_count() {
        let content = toc.content(ix)?;
        let sparse = content.first_extent.get() != NONE;
        let mut left = content.size.get();
        measured.total = measured.total.saturating_add(left);
        let mut chunk = content.first_chunk.get();
        while left > 0 {
            let len = left.min(CHUNK_SIZE);
            if sparse && toc.is_hole(chunk)? {
                presence.set(chunk);
                measured.present = measured.present.saturating_add(len);
            } else if presence.has(chunk) {
                measured.present = measured.present.saturating_add(len);
                measured.stored = measured.stored.saturating_add(len.next_multiple_of(DATA_ALIGN));
            }
            left -= len;
            chunk = chunk.saturating_add(1);
        }
    }
    Ok(measured)
}
