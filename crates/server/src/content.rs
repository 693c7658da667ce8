//! File content of layers: spans from the registry or packed content from the store, decompressed, verified chunk by chunk,
//! kept in memory for a while.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::TryStreamExt;
use millstream_oci::Digest;
use millstream_source::BlobSource;
use millstream_toc::format::{ChunkIx, SpanIx};
use millstream_toc::pack::unpack;
use millstream_toc::read::Chunk;
use millstream_toc::span::{SpanError, SpanExtractor};
use millstream_toc::{BlobRange, DataRange, FormatError, Toc};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::ServeError;
use crate::blob::{ChannelReader, channel, pump};
use crate::bounded::Bounded;
use crate::metrics::{Cache, ServerMetrics};
use crate::store::Store;
use crate::{packed, pieces};

/// Bytes of memory for what was read lately.
#[derive(Debug, Clone)]
pub struct ContentOptions {
    /// For TOCs.
    pub toc_cache: u64,
    /// For verified chunks.
    pub chunk_cache: u64,
    /// A TOC that is larger than this (canonical form) is not read; all that are in use have at most this and
    /// `toc_cache` together.
    pub max_toc: u64,
}

impl Default for ContentOptions {
    fn default() -> Self {
        Self { toc_cache: 128 << 20, chunk_cache: 128 << 20, max_toc: 512 << 20 }
    }
}

/// TOCs that are unpacked at a time.
const LOADS_AT_ONCE: usize = 2;
/// How long a request waits for its turn to unpack a TOC.
const LOAD_PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of a window: deflate looks back no further.
const MAX_WINDOW: usize = 32 * 1024;
/// How often a random chunk is drawn until one is found that is not a hole.
const DRAWS: u64 = 64;
/// A blob of at most this many bytes is read whole where no chunk of it can be shown.
const SMALL_BLOB: u64 = 64 << 10;

/// Reads content.
pub(crate) struct Content {
    store: Store,
    options: ContentOptions,
    metrics: ServerMetrics,
    tocs: Mutex<Bounded<Digest, Arc<Toc>>>,
    /// TOCs in use, also those that are too large to be kept.
    in_use: Mutex<HashMap<Digest, Weak<Toc>>>,
    /// Places for unpacking, which takes a few times the TOC's own memory.
    loads: Semaphore,
    /// KiB of memory for TOCs: each holds its own for as long as anybody uses it.
    memory: Arc<Semaphore>,
    chunk_cache: Arc<ChunkCache>,
}

/// A TOC with its share of the memory.
struct Held {
    bytes: Vec<u8>,
    _memory: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Bytes as KiB, rounded up, as far as a semaphore counts.
fn kib(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX >> 3)
}

type ChunkCache = Mutex<Bounded<(Digest, ChunkIx), Bytes>>;

impl Content {
    pub(crate) fn new(store: Store, options: ContentOptions, metrics: ServerMetrics) -> Self {
        let tocs = Mutex::new(Bounded::new(options.toc_cache));
        let chunk_cache = Arc::new(Mutex::new(Bounded::new(options.chunk_cache)));
        let memory = kib(options.toc_cache.saturating_add(options.max_toc));
        let memory = Arc::new(Semaphore::new(usize::try_from(memory).unwrap_or(usize::MAX)));
        let loads = Semaphore::new(LOADS_AT_ONCE);
        Self { store, options, metrics, tocs, in_use: Mutex::default(), loads, memory, chunk_cache }
    }

    /// The TOC of `blob`.
    pub(crate) async fn toc(&self, blob: &Digest) -> Result<Arc<Toc>, ServeError> {
        let known = self.known_toc(blob);
        self.metrics.looked_up(Cache::Tocs, u64::from(known.is_some()), u64::from(known.is_none()));
        if let Some(toc) = known {
            return Ok(toc);
        }
        let exhausted = |_| ServeError::Exhausted { what: "tables of contents to unpack", limit: LOADS_AT_ONCE };
        let _load = tokio::time::timeout(LOAD_PATIENCE, self.loads.acquire()).await.map_err(exhausted)?;
        // Whoever waited may find it loaded.
        match self.known_toc(blob) {
            Some(toc) => Ok(toc),
            None => self.load_toc(blob).await,
        }
    }

    fn known_toc(&self, blob: &Digest) -> Option<Arc<Toc>> {
        let kept = lock(&self.tocs).get(blob);
        kept.or_else(|| lock(&self.in_use).get(blob).and_then(Weak::upgrade))
    }

    async fn load_toc(&self, blob: &Digest) -> Result<Arc<Toc>, ServeError> {
        let mut pieces =
            self.store.toc(blob).await?.ok_or_else(|| ServeError::NotImported { image: blob.to_string() })?;
        let mut packed = BytesMut::new();
        while let Some(piece) = pieces.try_next().await? {
            packed.extend_from_slice(&piece);
            if packed.len() as u64 > self.options.max_toc {
                return Err(toc_error(blob)(FormatError::Damaged { what: "larger than the limit" }));
            }
        }
        let max = self.options.max_toc;
        let bytes = blocking(move || unpack(&packed, max)).await?.map_err(toc_error(blob))?;
        let needed = kib(bytes.len() as u64);
        // Held to the end, so that two who unpacked the same one share one of them.
        let mut in_use = lock(&self.in_use);
        if let Some(toc) = in_use.get(blob).and_then(Weak::upgrade) {
            return Ok(toc);
        }
        let memory = Arc::clone(&self.memory).try_acquire_many_owned(needed).map_err(|_| ServeError::Exhausted {
            what: "bytes of tables of contents in use",
            limit: usize::try_from(self.options.toc_cache.saturating_add(max)).unwrap_or(usize::MAX),
        })?;
        let toc = Toc::open(Held { bytes, _memory: memory }).map_err(toc_error(blob))?;
        if toc.blob_digest() != *blob {
            return Err(toc_error(blob)(FormatError::Damaged { what: "it is of another layer" }));
        }
        let toc = Arc::new(toc);
        in_use.retain(|_, toc| toc.strong_count() > 0);
        in_use.insert(*blob, Arc::downgrade(&toc));
        drop(in_use);
        // As the semaphore counts it, so that what is kept never takes more of it than `toc_cache`.
        lock(&self.tocs).insert(*blob, Arc::clone(&toc), u64::from(needed) * 1024);
        Ok(toc)
    }

    /// The bytes of `range` of the data address space, which must lie within it. Gaps and holes read as zeros. The answer is
    /// held in memory as a whole, and so are the chunks that it touches.
    pub(crate) async fn read(
        &self,
        toc: &Arc<Toc>,
        source: &dyn BlobSource,
        range: DataRange,
    ) -> Result<Bytes, ServeError> {
        let blob = toc.blob_digest();
        let chunks = toc.chunks_in(range).map_err(toc_error(&blob))?;
        let found = self.chunks(toc, source, &chunks).await?;
        let mut out = vec![0; usize::try_from(range.len()).map_err(|_| too_long())?];
        for chunk in &chunks {
            match found.get(&chunk.ix) {
                Some(bytes) => place(&mut out, range, chunk.data, bytes),
                None if toc.is_hole(chunk.ix).map_err(toc_error(&blob))? => (),
                None => {
                    let what = format!("layer {blob}: chunk {} does not come out of its spans", chunk.ix);
                    return Err(ServeError::Mismatch { what });
                }
            }
        }
        Ok(out.into())
    }

    /// The ascending `chunks`, verified, but for holes; all in memory. Of closed spans, what is stored between the first and the
    /// last of them goes through memory, too.
    pub(crate) async fn chunks(
        &self,
        toc: &Arc<Toc>,
        source: &dyn BlobSource,
        chunks: &[Chunk],
    ) -> Result<BTreeMap<ChunkIx, Bytes>, ServeError> {
        let blob = toc.blob_digest();
        let mut found: BTreeMap<ChunkIx, Bytes> = BTreeMap::new();
        let mut needed: BTreeSet<SpanIx> = BTreeSet::new();
        let mut closed: Vec<Chunk> = Vec::new();
        for chunk in chunks {
            // Bound to a name: the lock must not be held over the arms.
            let cached = lock(&self.chunk_cache).get(&(blob, chunk.ix));
            match cached {
                Some(bytes) => drop(found.insert(chunk.ix, bytes)),
                None if toc.is_closed(chunk.data).map_err(toc_error(&blob))? => closed.push(*chunk),
                None => needed.extend(toc.spans_for(chunk.data).map_err(toc_error(&blob))?),
            }
        }
        let hits = found.len() as u64;
        self.metrics.looked_up(Cache::Chunks, hits, (chunks.len() as u64).saturating_sub(hits));
        for run in runs(&needed) {
            let wanted = chunks.iter().map(|chunk| chunk.ix).collect();
            found.extend(self.extract(toc, source, run, wanted).await?);
        }
        found.extend(self.unpacked(toc, closed).await?);
        Ok(found)
    }

    /// The ascending chunks `wanted`, which must be stored in closed spans, out of packed content. They are verified and go
    /// to the cache.
    async fn unpacked(&self, toc: &Arc<Toc>, wanted: Vec<Chunk>) -> Result<Vec<(ChunkIx, Bytes)>, ServeError> {
        let (Some(first), Some(last)) = (wanted.first(), wanted.last()) else { return Ok(Vec::new()) };
        let blob = toc.blob_digest();
        let units = packed::units_of(DataRange::new(first.data.start, last.data.end));
        let items = self.store.packed(&blob, packed::units(toc.data_size()), units.start, units.end).await?;
        let (for_thread, cache) = (Arc::clone(toc), Arc::clone(&self.chunk_cache));
        let unpacked = blocking(move || {
            let bytes: Option<Vec<Vec<u8>>> = items.iter().map(|item| packed::unpack(item).ok()).collect();
            let bytes = bytes?;
            let mut found = Vec::with_capacity(wanted.len());
            for chunk in wanted {
                let bytes = Bytes::from(packed::assemble(chunk.data, units.start, &bytes)?);
                if !for_thread.verify_chunk(chunk.ix, &bytes).ok()? {
                    return None;
                }
                lock(&cache).insert((blob, chunk.ix), bytes.clone(), bytes.len() as u64);
                found.push((chunk.ix, bytes));
            }
            Some(found)
        });
        let damaged = || ServeError::Internal { what: format!("packed content of layer {blob} is damaged") };
        unpacked.await?.ok_or_else(damaged)
    }

    /// Whether `source` really has the blob of `toc`: reads one chunk, chosen by chance, past every cache; or where spans are
    /// closed one piece of the blob; or the whole blob where a small one has no content. `Ok(false)` when there is nothing
    /// to ask for.
    ///
    /// A TOC is found by the blob's digest alone, and a digest is no secret. Who cannot show the bytes is not given what is
    /// derived from them.
    pub(crate) async fn prove(&self, toc: &Arc<Toc>, source: &dyn BlobSource) -> Result<bool, ServeError> {
        let blob = toc.blob_digest();
        if toc.has_closed_spans().map_err(toc_error(&blob))? {
            return self.prove_piece(&blob, toc.blob_size(), source).await;
        }
        let seed = RandomState::new();
        let Some(count) = Some(u64::from(toc.chunk_count())).filter(|count| *count > 0) else {
            return prove_whole(toc, source).await;
        };
        for draw in 0..DRAWS {
            let Ok(ix) = ChunkIx::try_from(seed.hash_one(draw) % count) else { break };
            if toc.is_hole(ix).map_err(toc_error(&blob))? {
                continue;
            }
            let chunk = toc.chunk(ix).map_err(toc_error(&blob))?;
            let spans = toc.spans_for(chunk.data).map_err(toc_error(&blob))?.into_iter().collect();
            for run in runs(&spans) {
                if self.extract(toc, source, run, BTreeSet::from([ix])).await?.iter().any(|(found, _)| *found == ix) {
                    return Ok(true);
                }
            }
            let what = format!("layer {blob}: chunk {ix} does not come out of its spans");
            return Err(ServeError::Mismatch { what });
        }
        Ok(false)
    }

    async fn prove_piece(&self, blob: &Digest, size: u64, source: &dyn BlobSource) -> Result<bool, ServeError> {
        let (ix, range) = pieces::choose(size, RandomState::new().hash_one(size));
        let expected = self.store.piece(blob, ix).await?;
        let (sender, mut reader) = channel();
        let read = blocking(move || {
            let mut bytes = Vec::new();
            while let Some(piece) = reader.next() {
                bytes.extend_from_slice(&piece);
            }
            bytes
        });
        let (pumped, bytes) = tokio::join!(pump(source, blob, range, sender, &|_| ()), read);
        pumped?;
        if pieces::matches(&bytes?, &expected) {
            return Ok(true);
        }
        let what = format!("layer {blob}: bytes {range} of the registry are not those of the blob");
        Err(ServeError::Mismatch { what })
    }

    /// Fetches the consecutive `spans` and decompresses them. All chunks that come out go to the cache, the `wanted` ones
    /// also to the caller.
    async fn extract(
        &self,
        toc: &Arc<Toc>,
        source: &dyn BlobSource,
        spans: Range<SpanIx>,
        wanted: BTreeSet<ChunkIx>,
    ) -> Result<Vec<(ChunkIx, Bytes)>, ServeError> {
        let blob = toc.blob_digest();
        let first = toc.span(spans.start).map_err(toc_error(&blob))?;
        let last = toc.span(spans.end.saturating_sub(1)).map_err(toc_error(&blob))?;
        let window = self.window(toc, spans.start).await?;
        let (sender, mut reader) = channel();
        let cache = Arc::clone(&self.chunk_cache);
        let for_thread = Arc::clone(toc);
        let extracted = blocking(move || {
            let keep = |chunk: Chunk, bytes: &Bytes| {
                lock(&cache).insert((blob, chunk.ix), bytes.clone(), bytes.len() as u64);
            };
            extract_chunks(&for_thread, spans.start, &window, &mut reader, &wanted, &keep)
        });
        let range = BlobRange::new(first.blob.start, last.blob.end);
        let (pumped, extracted) = tokio::join!(pump(source, &blob, range, sender, &|_| ()), extracted);
        pumped?;
        extracted?.map_err(|error| ServeError::Mismatch { what: format!("layer {blob}: {error}") })
    }

    /// The window of `span`, raw and verified.
    async fn window(&self, toc: &Toc, span: SpanIx) -> Result<Vec<u8>, ServeError> {
        let blob = toc.blob_digest();
        let damaged = || ServeError::Internal { what: format!("stored window {span} of layer {blob} is damaged") };
        let record = toc.span(span).map_err(toc_error(&blob))?;
        if record.window_len == 0 {
            return Ok(Vec::new());
        }
        let packed = self.store.windows(&blob, toc.span_count(), span, span + 1).await?;
        let raw =
            packed.first().and_then(|packed| crate::items::unpack(packed, MAX_WINDOW).ok()).ok_or_else(damaged)?;
        if toc.verify_window(span, &raw) { Ok(raw) } else { Err(damaged()) }
    }
}

/// As [`Content::prove`], by the whole blob; `Ok(false)` when that is large.
async fn prove_whole(toc: &Toc, source: &dyn BlobSource) -> Result<bool, ServeError> {
    let (blob, size) = (toc.blob_digest(), toc.blob_size());
    if size > SMALL_BLOB {
        return Ok(false);
    }
    let (sender, mut reader) = channel();
    let read = blocking(move || std::iter::from_fn(|| reader.next()).flatten().collect::<Vec<u8>>());
    let (pumped, bytes) = tokio::join!(pump(source, &blob, BlobRange::new(0, size), sender, &|_| ()), read);
    pumped?;
    if Digest::of(&bytes?) == blob {
        return Ok(true);
    }
    Err(ServeError::Mismatch { what: format!("layer {blob}: the bytes that came have another digest") })
}

/// Decompresses what `reader` gives, which starts with span `first`.
fn extract_chunks(
    toc: &Toc,
    first: SpanIx,
    window: &[u8],
    reader: &mut ChannelReader,
    wanted: &BTreeSet<ChunkIx>,
    keep: &dyn Fn(Chunk, &Bytes),
) -> Result<Vec<(ChunkIx, Bytes)>, SpanError> {
    let mut extractor = SpanExtractor::new(toc, first, window)?;
    let mut found = Vec::new();
    while let Some(piece) = reader.next() {
        extractor.push(&piece, &mut |chunk, bytes| {
            let bytes = Bytes::copy_from_slice(bytes);
            keep(chunk, &bytes);
            if wanted.contains(&chunk.ix) {
                found.push((chunk.ix, bytes));
            }
        })?;
    }
    Ok(found)
}

/// Copies the part of `bytes` (which lie at `at`) that falls into `range` to its place in `out` (which is `range`).
fn place(out: &mut [u8], range: DataRange, at: DataRange, bytes: &[u8]) {
    let Some(both) = range.intersect(&at) else { return };
    let inside = |base: u64| usize::try_from(both.start - base).ok().zip(usize::try_from(both.end - base).ok());
    let (Some((out_start, out_end)), Some((start, end))) = (inside(range.start), inside(at.start)) else { return };
    if let (Some(out), Some(bytes)) = (out.get_mut(out_start..out_end), bytes.get(start..end)) {
        out.copy_from_slice(bytes);
    }
}

/// Consecutive spans, as ranges.
fn runs(spans: &BTreeSet<SpanIx>) -> Vec<Range<SpanIx>> {
    let mut runs: Vec<Range<SpanIx>> = Vec::new();
    for span in spans {
        match runs.last_mut() {
            Some(run) if run.end == *span => run.end += 1,
            _ => runs.push(*span..*span + 1),
        }
    }
    runs
}

/// Runs `work` where it may block or compute for long.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ServeError> {
    let failed = |error: tokio::task::JoinError| ServeError::Internal { what: format!("worker thread: {error}") };
    tokio::task::spawn_blocking(work).await.map_err(failed)
}

pub(crate) fn toc_error(blob: &Digest) -> impl Fn(FormatError) -> ServeError + use<> {
    let layer = *blob;
    move |source| ServeError::Toc { layer, source }
}

fn too_long() -> ServeError {
    ServeError::Invalid { what: "more bytes than fit into memory".to_owned() }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use millstream_toc::build::{BuildOptions, Compression, build};
    use millstream_toc::pack::pack;

    use super::*;

    /// The store of a TOC whose size is `limit`, and the digest of its blob.
    async fn one_toc(directory: &std::path::Path) -> (Store, Digest, u64) {
        let store = Store::open(directory.to_str().unwrap()).unwrap();
        let blob = [0; 1024];
        let toc = build(&blob[..], &BuildOptions::new(Compression::Plain), &mut ()).unwrap().toc;
        let digest = Digest::of(&blob);
        store.put_toc(&digest, pack(&toc)).await.unwrap();
        (store, digest, toc.len() as u64)
    }

    #[tokio::test]
    async fn what_is_in_use_is_shared_even_if_it_is_not_kept() {
        let directory = tempfile::tempdir().unwrap();
        let (store, blob, size) = one_toc(directory.path()).await;
        let content = Content::new(
            store,
            ContentOptions { toc_cache: 0, chunk_cache: 0, max_toc: size },
            ServerMetrics::default(),
        );
        let (one, two) = tokio::join!(content.toc(&blob), content.toc(&blob));
        let (one, two) = (one.unwrap(), two.unwrap());
        assert!(Arc::ptr_eq(&one, &two));
        assert_eq!(content.memory.available_permits(), 0, "there is memory for one");
        drop((one, two));
        assert_eq!(content.memory.available_permits(), 1, "and it is given back");
        content.toc(&blob).await.unwrap();
    }

    #[tokio::test]
    async fn memory_for_tocs_is_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let (store, blob, size) = one_toc(directory.path()).await;
        let content = Content::new(
            store,
            ContentOptions { toc_cache: 0, chunk_cache: 0, max_toc: size },
            ServerMetrics::default(),
        );
        let _all = content.memory.try_acquire().unwrap();
        assert!(matches!(content.toc(&blob).await, Err(ServeError::Exhausted { .. })));
    }

    #[test]
    fn runs_are_consecutive() {
        assert_eq!(runs(&BTreeSet::from([1, 2, 3, 7, 9, 10])), [1..4, 7..8, 9..11]);
        assert!(runs(&BTreeSet::new()).is_empty());
    }

    #[test]
    fn chunks_are_placed_by_overlap() {
        let mut out = vec![0; 6];
        let range = DataRange::new(10, 16);
        place(&mut out, range, DataRange::new(8, 12), b"abcd");
        place(&mut out, range, DataRange::new(14, 20), b"efghij");
        place(&mut out, range, DataRange::new(20, 21), b"x");
        assert_eq!(out, b"cd\0\0ef");
    }
}
