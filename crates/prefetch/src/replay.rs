//! What starts of an image read comes ahead of its readers: as one stream of pages where the source has them, else chunk by
//! chunk in the same order. A reader of a page that is about to come waits for it instead of fetching a whole span.

use std::collections::HashMap;
use std::io::{self, Read};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures::StreamExt;
use futures::future::BoxFuture;
use millstream_chunkstore::Layer;
use millstream_oci::Digest;
use millstream_profile::proof::{self, Mask, proof_len};
use millstream_profile::{Profile, pieces};
use millstream_source::{ByteStream, ErrorKind, Priority, ServedProfile, SourceError, names};
use millstream_toc::DataRange;
use millstream_toc::format::ChunkIx;
use millstream_toc::read::Chunk;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};

use crate::attached::Attached;
use crate::deliver::{store_failed, toc_failed};
use crate::ensure::{Halves, missing};
use crate::extract::bounded;
use crate::fetcher::Shared;
use crate::flight;
use crate::pace::Paced;

/// Pieces of the stream between the connection and the decompressor.
const PIECES: usize = 16;
/// History of the zstd stream, as a power of two: 8 MiB.
const WINDOW_LOG_MAX: u32 = 23;
/// Bytes of the data address space that are asked for at once where the plan comes without pages.
const BATCH: u64 = 2 * 1024 * 1024;
/// So many of them at once.
const BATCHES: usize = 4;
/// How long a stream has to come before it is said how fast it is.
const TRIAL: Duration = Duration::from_millis(100);
/// A stream that is over: every piece has come that ever will.
const OVER: u64 = u64::MAX;

/// A startup profile that a source was asked for: before it is certain that the image is lazy, since each round trip counts.
pub struct AskedProfile {
    /// Layers of which nothing is to come, as the source was told.
    pub local: Vec<Digest>,
    /// The answer; dropping it takes the request back.
    pub answer: BoxFuture<'static, Result<ServedProfile, SourceError>>,
    /// Who is told of pages as they come to the store, in their order.
    pub sink: Option<ChooseSink>,
}

/// Says who is told of the pages of a profile that is made of so many recordings (0: it was carried over from another image).
/// Dropped when no more of them come.
pub type ChooseSink = Box<dyn FnOnce(u32) -> Option<Arc<dyn PageSink>> + Send>;

/// Is told of pages. Called from a thread that has more to do; must not block.
pub trait PageSink: Send + Sync + std::fmt::Debug {
    /// These `pages` of `chunk` can be read.
    fn came(&self, layer: &Arc<Layer>, chunk: Chunk, pages: Mask);
}

impl std::fmt::Debug for AskedProfile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AskedProfile").field("local", &self.local).finish_non_exhaustive()
    }
}

/// A piece of the stream: pages of one chunk.
#[derive(Debug, Clone, Copy)]
struct Piece {
    /// Place in the list of layers.
    layer: usize,
    chunk: Chunk,
    pages: Mask,
}

impl Piece {
    fn proof_len(&self) -> usize {
        proof_len(self.chunk.data.len(), self.pages)
    }
}

/// One replay under way, as the readers of a layer see it.
#[derive(Debug)]
pub(crate) struct Replay {
    /// The pages that come, chunk by chunk, each with the place in the stream after which it is there.
    pages: HashMap<(Digest, ChunkIx), Vec<(Mask, u64)>>,
    /// Bytes of the stream (not compressed) that were taken in.
    taken: watch::Sender<u64>,
    /// When the first of them came, and how many. What came before it, a round trip and more, says nothing about the rest.
    first: OnceLock<(Instant, u64)>,
}

impl Replay {
    fn new(layers: &[Option<Arc<Attached>>], pieces: &[Piece]) -> Self {
        let mut pages: HashMap<(Digest, ChunkIx), Vec<(Mask, u64)>> = HashMap::new();
        let mut at = 0;
        for piece in pieces {
            at += piece.proof_len() as u64;
            if let Some(attached) = &layers[piece.layer] {
                pages.entry((attached.layer.digest(), piece.chunk.ix)).or_default().push((piece.pages, at));
            }
        }
        Self { pages, taken: watch::Sender::new(0), first: OnceLock::new() }
    }

    /// The place in the stream after which all of `chunks` can be read as far as `range` goes; `None` if some page of them does
    /// not come.
    fn place(&self, layer: &Digest, chunks: &[Chunk], range: DataRange) -> Option<u64> {
        let mut last = 0;
        for chunk in chunks {
            let wanted = chunk.pages(range);
            let mut have = 0;
            for (pages, at) in self.pages.get(&(*layer, chunk.ix))? {
                if pages & wanted & !have != 0 {
                    have |= pages;
                    last = last.max(*at);
                }
            }
            if have & wanted != wanted {
                return None;
            }
        }
        Some(last)
    }

    /// Notes that the stream is at `taken`.
    fn came(&self, taken: u64) {
        self.first.get_or_init(|| (Instant::now(), taken));
        self.taken.send_replace(taken);
    }

    /// How long until the stream is at `place`, going by how it came so far; as long as that says little, no time.
    fn due(&self, place: u64, taken: u64) -> Duration {
        let Some((began, first)) = self.first.get() else { return Duration::ZERO };
        let (elapsed, came) = (began.elapsed(), taken.saturating_sub(*first));
        if elapsed < TRIAL {
            return Duration::ZERO;
        }
        let nanoseconds =
            elapsed.as_nanos().saturating_mul(place.saturating_sub(taken).into()) / u128::from(came.max(1));
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }

    /// Waits until `range` is here, or will not be in time: it does not come, comes later than `patience` from now, or the
    /// stream stands still for so long.
    async fn wait(&self, layer: &Layer, range: DataRange, patience: Duration) -> Result<(), SourceError> {
        let mut taken = self.taken.subscribe();
        loop {
            let now = *taken.borrow_and_update();
            let missing = missing(layer, range)?;
            let Some(place) = self.place(&layer.digest(), &missing, range) else { return Ok(()) };
            if missing.is_empty() || place <= now || self.due(place, now) > patience {
                return Ok(());
            }
            match timeout(patience, taken.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return Ok(()),
            }
        }
    }
}

/// Ends a replay for its readers, however its task ends.
struct Ending<'a> {
    replay: Arc<Replay>,
    layers: &'a [Option<Arc<Attached>>],
    /// Those under way.
    count: &'a AtomicUsize,
}

impl<'a> Ending<'a> {
    /// Shows the replay to the readers of its layers until this is dropped.
    fn begin(replay: Arc<Replay>, layers: &'a [Option<Arc<Attached>>], count: &'a AtomicUsize) -> Self {
        for attached in layers.iter().flatten() {
            attached.replays().push(Arc::clone(&replay));
        }
        count.fetch_add(1, Ordering::Relaxed);
        Self { replay, layers, count }
    }
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        for attached in self.layers.iter().flatten() {
            attached.replays().retain(|other| !Arc::ptr_eq(other, &self.replay));
        }
        self.replay.taken.send_replace(OVER);
        self.count.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shared {
    /// Waits for what a replay is about to bring of `range`.
    pub(crate) async fn await_replay(&self, attached: &Attached, range: DataRange) -> Result<(), SourceError> {
        let replays = attached.replays().clone();
        for replay in replays {
            replay.wait(&attached.layer, range, self.options.replay_patience).await?;
        }
        Ok(())
    }

    /// Brings what starts of an image read. `image` is all layers of the image.
    ///
    /// # Errors
    /// Those of the source; then what did not come is fetched when it is read.
    pub(crate) async fn replay(
        self: &Arc<Self>,
        image: &[(Digest, Option<Arc<Attached>>)],
        asked: AskedProfile,
    ) -> Result<(), SourceError> {
        self.tally.request();
        let _foreground = self.gate.foreground();
        let served = bounded(self.options.idle_timeout, "startup profile", asked.answer).await?;
        let layers = known_layers(&served.plan, image, &asked.local)?;
        let pieces = all_pieces(&served.plan, &layers)?;
        let replay = Arc::new(Replay::new(&layers, &pieces));
        let sink = asked.sink.and_then(|choose| choose(served.recordings));
        let Some(packed) = served.packed else {
            return self.fetch_in_order(&layers, &pieces, sink.as_deref()).await;
        };
        let _ending = Ending::begin(Arc::clone(&replay), &layers, &self.replaying);
        self.take_stream(packed, &layers, pieces, &replay, sink).await
    }

    /// Takes the stream apart as it comes.
    async fn take_stream(
        &self,
        packed: ByteStream,
        layers: &[Option<Arc<Attached>>],
        pieces: Vec<Piece>,
        replay: &Arc<Replay>,
        sink: Option<Arc<dyn PageSink>>,
    ) -> Result<(), SourceError> {
        let (sender, received) = mpsc::channel(PIECES);
        let (layers, replay) = (layers.to_vec(), Arc::clone(replay));
        let taken = self.runtime.spawn_blocking(move || take(received, &layers, &pieces, &replay, sink.as_deref()));
        let mut packed = Paced::new(packed, self.options.idle_timeout);
        let pumped = async {
            while let Some(piece) = packed.next().await? {
                self.tally.profile(piece.len());
                if sender.send(piece).await.is_err() {
                    break;
                }
            }
            drop(sender);
            Ok(())
        };
        let pumped: Result<(), SourceError> = pumped.await;
        // What the decompressor says explains more than the end of the stream that it caused.
        let taken = taken.await.map_err(|e| SourceError::new(ErrorKind::Local, format!("decompressor failed: {e}")))?;
        pumped.and(taken).inspect_err(|error| {
            if error.kind == ErrorKind::DigestMismatch {
                self.tally.mismatch();
            }
        })
    }

    /// Fetches the pieces from the layers' own sources, a few batches at once.
    async fn fetch_in_order(
        self: &Arc<Self>,
        layers: &[Option<Arc<Attached>>],
        pieces: &[Piece],
        sink: Option<&dyn PageSink>,
    ) -> Result<(), SourceError> {
        // Together they are no more than the plan is.
        let batches: Vec<(Arc<Attached>, &[Piece])> =
            batches(pieces).filter_map(|batch| Some((layers[batch.first()?.layer].clone()?, batch))).collect();
        let fetch = async |(attached, batch): (Arc<Attached>, &[Piece])| {
            let chunks = batch.iter().map(|piece| piece.chunk).collect();
            self.fetch_batch(&attached, chunks).await.map(|()| (attached, batch.to_vec()))
        };
        let mut fetched = std::pin::pin!(futures::stream::iter(batches).map(fetch).buffered(BATCHES));
        while let Some(batch) = fetched.next().await {
            let (attached, batch) = batch?;
            if let Some(sink) = sink {
                let there = batch.iter().filter(|piece| attached.layer.has(piece.chunk.ix));
                there.for_each(|piece| sink.came(&attached.layer, piece.chunk, piece.pages));
            }
        }
        Ok(())
    }

    async fn fetch_batch(
        self: &Arc<Self>,
        attached: &Arc<Attached>,
        mut chunks: Vec<Chunk>,
    ) -> Result<(), SourceError> {
        chunks.sort_unstable();
        chunks.dedup();
        chunks.retain(|chunk| !attached.layer.has(chunk.ix) && !attached.will_be_shared(chunk.data));
        let (Some(first), Some(last)) = (chunks.first(), chunks.last()) else { return Ok(()) };
        let range = DataRange::new(first.data.start, last.data.end);
        let flights = self.join(attached, &chunks, Priority::Prefetch, Halves::Joined)?;
        let fetched = flight::wait(&flights, range);
        attached.cancel.run_until_cancelled(fetched).await.unwrap_or(Ok(()))
    }
}

/// The layers of the plan that pages can be taken in for, in its order. One that is neither here whole nor known by the plan's own
/// table must have no runs: how much of the stream is its is not known.
fn known_layers(
    plan: &Profile,
    image: &[(Digest, Option<Arc<Attached>>)],
    local: &[Digest],
) -> Result<Vec<Option<Arc<Attached>>>, SourceError> {
    let find = |(ix, layer): (usize, &millstream_profile::ProfileLayer)| {
        if local.contains(&layer.digest) || !plan.runs.iter().any(|run| run.layer as usize == ix) {
            return Ok(None);
        }
        let attached = image.iter().find(|(digest, _)| *digest == layer.digest).and_then(|(_, known)| known.clone());
        match attached {
            Some(attached) if attached.layer.toc_digest() == layer.toc => Ok(Some(attached)),
            _ => {
                let message = format!("a startup profile of layer {}, by a table that is not here", layer.digest);
                Err(SourceError::new(ErrorKind::Malformed, message))
            }
        }
    };
    plan.layers.iter().enumerate().map(find).collect()
}

/// What comes for each run, but for layers that are here.
fn all_pieces(plan: &Profile, layers: &[Option<Arc<Attached>>]) -> Result<Vec<Piece>, SourceError> {
    let tocs: Vec<_> = layers.iter().map(|known| known.as_ref().map(|attached| &**attached.layer.toc())).collect();
    if !plan.fits(&tocs) {
        return Err(SourceError::new(ErrorKind::Malformed, "a startup profile with pages that its layers do not have"));
    }
    let mut all = Vec::new();
    for run in &plan.runs {
        let layer = run.layer as usize;
        if let Some(toc) = tocs.get(layer).copied().flatten() {
            let pieces = pieces(run, toc).map_err(toc_failed)?;
            all.extend(pieces.into_iter().map(|(chunk, pages)| Piece { layer, chunk, pages }));
        }
    }
    Ok(all)
}

/// Consecutive pieces of one layer, of about [`BATCH`] bytes.
fn batches(pieces: &[Piece]) -> impl Iterator<Item = &[Piece]> {
    let mut rest = pieces;
    std::iter::from_fn(move || {
        let layer = rest.first()?.layer;
        let mut bytes = 0;
        let len = rest.iter().take_while(|piece| {
            bytes += piece.chunk.data.len();
            piece.layer == layer && bytes <= BATCH
        });
        let (batch, after) = rest.split_at(len.count().max(1));
        rest = after;
        Some(batch)
    })
}

/// The stream as its pieces arrive.
struct Received {
    pieces: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl Read for Received {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.current = piece,
                None => return Ok(0),
            }
        }
        let len = self.current.len().min(out.len());
        self.current.copy_to_slice(&mut out[..len]);
        Ok(len)
    }
}

/// Decompresses, proves and stores one piece after the other. Blocks.
fn take(
    received: mpsc::Receiver<Bytes>,
    layers: &[Option<Arc<Attached>>],
    pieces: &[Piece],
    replay: &Replay,
    sink: Option<&dyn PageSink>,
) -> Result<(), SourceError> {
    let malformed = |error: io::Error| {
        SourceError::new(ErrorKind::Malformed, format!("the pages of a startup profile cannot be read: {error}"))
    };
    let received = Received { pieces: received, current: Bytes::new() };
    let mut decoder = zstd::stream::read::Decoder::new(received).map_err(malformed)?;
    decoder.window_log_max(WINDOW_LOG_MAX).map_err(malformed)?;
    let mut bytes = Vec::new();
    let mut taken = 0;
    for piece in pieces {
        bytes.resize(piece.proof_len(), 0);
        decoder.read_exact(&mut bytes).map_err(malformed)?;
        if let Some(attached) = &layers[piece.layer]
            && !attached.cancel.is_cancelled()
        {
            put(&attached.layer, piece, &bytes)?;
            if let Some(sink) = sink {
                sink.came(&attached.layer, piece.chunk, piece.pages);
            }
        }
        taken += bytes.len() as u64;
        replay.came(taken);
    }
    Ok(())
}

fn put(layer: &Layer, piece: &Piece, bytes: &[u8]) -> Result<(), SourceError> {
    let digest = layer.toc().chunk_digest(piece.chunk.ix).map_err(toc_failed)?;
    let mut pages: Vec<(u64, Vec<u8>)> = Vec::new();
    proof::verify(piece.chunk.data.len(), piece.pages, &digest, bytes, |start, page| {
        pages.push((start, page.to_vec()))
    })
    .map_err(|error| {
        let message = format!("startup profile: chunk {} of layer {}: {error}", piece.chunk.ix, layer.digest());
        SourceError::new(ErrorKind::DigestMismatch, message)
    })?;
    let pages: Vec<(u64, &[u8])> = pages.iter().map(|(start, page)| (*start, page.as_slice())).collect();
    layer.write_pages(piece.chunk, &pages).map_err(store_failed)
}

/// One line about how a replay ended; nobody waits for its outcome.
pub(crate) fn report(image: &str, outcome: Result<(), SourceError>) {
    match outcome {
        Ok(()) => tracing::info!({ names::IMAGE } = image, "what starts of the image read is here"),
        Err(error) if error.kind == ErrorKind::NotFound => {
            tracing::debug!({ names::IMAGE } = image, "nothing is known of what starts of the image read");
        }
        Err(error) => tracing::warn!(
            { names::IMAGE } = image, { names::CODE } = error.kind.code(), %error,
            "startup profile is not replayed; what is read is fetched when it is read",
        ),
    }
}
