//! One attempt at one group of spans from one source.

use std::future::Future;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use millstream_chunkstore::Layer;
use millstream_source::{ByteStream, ContentSource, ErrorKind, Priority, SourceError};
use millstream_toc::format::SpanIx;
use millstream_toc::read::Chunk;
use millstream_toc::span::{SpanError, SpanExtractor};
use millstream_toc::{BlobRange, DataRange, Toc};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::attached::ImageSources;
use crate::deliver::{ChunkSink, toc_failed};
use crate::fetcher::Shared;
use crate::gate::{Permit, Urgency};
use crate::pace::Paced;
use crate::plan::{self, Group};

/// Pieces of a body between the connection and the decompressor.
const PIECES: usize = 8;
/// Bytes of plain content asked for at once.
const CONTENT_SIZE: u64 = 1024 * 1024;

/// What an attempt needs to know.
#[derive(Clone, Copy)]
pub(crate) struct Attempt<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) layer: &'a Arc<Layer>,
    pub(crate) group: &'a Group,
    pub(crate) urgency: &'a Urgency,
    pub(crate) sink: &'a Arc<dyn ChunkSink>,
}

impl<'a> Attempt<'a> {
    /// Fetches `spans`, which lie at `blob`, decompresses them as they arrive and hands on every chunk that matches.
    pub(crate) async fn try_blob(
        self,
        image: &ImageSources,
        spans: &Range<SpanIx>,
        blob: BlobRange,
    ) -> Result<(), SourceError> {
        let Self { shared, layer, group, urgency, sink } = self;
        let permit = shared.gate.acquire(urgency).await?;
        if group.chunks.iter().all(|chunk| !sink.wants(chunk.ix)) {
            // Hydration was faster.
            permit.served();
            return Ok(());
        }
        let idle = shared.options.idle_timeout;
        shared.tally.request();
        let body = self.open(image, blob);
        let window = shared.windows.get(layer, spans.start, &*image.windows, &shared.tally);
        let window = bounded(idle, "window of a span", window);
        let first = async { tokio::try_join!(body, window) };
        let ((body, other), window) = permit.hear(shared.options.starvation, first).await?;
        let permit = other.unwrap_or(permit);

        let (pieces, received) = mpsc::channel(PIECES);
        let (toc, sink, extracted) = (layer.toc().clone(), sink.clone(), spans.clone());
        let extracted = shared.runtime.spawn_blocking(move || extract(&toc, &extracted, &window, received, &*sink));
        let pumped = self.pump(&permit, body, blob.len(), pieces).await;
        // What the decompressor says explains more than the end of the body it caused.
        extracted.await.map_err(|e| SourceError::new(ErrorKind::Local, format!("decompressor failed: {e}")))??;
        pumped?;
        self.check_complete(spans)?;
        permit.served();
        Ok(())
    }

    /// Asks for the bytes; where a reader waits and no answer comes for longer than most took lately, once more, and takes what
    /// comes first. Gives the permit of the second request if that is what it took.
    async fn open(
        self,
        image: &ImageSources,
        blob: BlobRange,
    ) -> Result<(ByteStream, Option<Permit<'a>>), SourceError> {
        let Self { shared, layer, urgency, .. } = self;
        let (digest, hedge) = (layer.digest(), &shared.hedge);
        let ask = async || {
            let begun = Instant::now();
            let read = image.blob.read(&digest, blob);
            let body = bounded(shared.options.idle_timeout, "first byte of a blob", read).await?;
            hedge.answered(begun.elapsed());
            Ok(body)
        };
        let mut first = pin!(ask());
        let permit = loop {
            // While it is not known what late is, it is looked again now and then: others answer meanwhile.
            let patience = hedge.patience().unwrap_or(shared.options.starvation);
            match tokio::time::timeout(patience, &mut first).await {
                Ok(body) => return Ok((body?, None)),
                // A reader may join at any time.
                Err(_) if urgency.priority() != Priority::Demand || hedge.patience().is_none() => {}
                Err(_) => match self.second_slot() {
                    Some(permit) => break permit,
                    None => return Ok((first.await?, None)),
                },
            }
        };
        shared.tally.request();
        shared.tally.hedge();
        // One that fails leaves it to the other.
        let opened = {
            let mut second = pin!(permit.hear(shared.options.starvation, ask()));
            tokio::select! {
                body = &mut first => match body {
                    Ok(body) => Ok((body, false)),
                    Err(_) => second.await.map(|body| (body, true)),
                },
                body = &mut second => match body {
                    Ok(body) => Ok((body, true)),
                    Err(_) => first.await.map(|body| (body, false)),
                },
            }
        };
        opened.map(|(body, second)| (body, second.then_some(permit)))
    }

    /// A slot for asking once more, if one is free now and it is not asked too often.
    fn second_slot(self) -> Option<Permit<'a>> {
        let permit = self.shared.gate.acquire_now(Priority::Demand, self.layer.number())?;
        self.shared.hedge.take().then_some(permit)
    }

    /// Passes the `left` bytes of the body on, piece by piece. Ends early, without an error, when nobody takes the pieces any
    /// more.
    async fn pump(
        self,
        permit: &Permit<'_>,
        body: ByteStream,
        mut left: u64,
        pieces: mpsc::Sender<Bytes>,
    ) -> Result<(), SourceError> {
        let Self { shared, layer, urgency, .. } = self;
        let mut body = Paced::new(body, shared.options.idle_timeout);
        while let Some(piece) = permit.hear(shared.options.starvation, body.next()).await? {
            shared.tally.received(urgency.priority(), piece.len());
            left = left.checked_sub(piece.len() as u64).ok_or_else(|| wrong_length(layer))?;
            if pieces.send(piece).await.is_err() {
                return Ok(());
            }
        }
        if left == 0 { Ok(()) } else { Err(wrong_length(layer)) }
    }

    /// All bytes came and matched so far, so every chunk of which all spans were fetched must be there.
    fn check_complete(self, fetched: &Range<SpanIx>) -> Result<(), SourceError> {
        let Self { layer, group, sink, .. } = self;
        for chunk in group.chunks.iter().filter(|chunk| sink.wants(chunk.ix)) {
            let spans = plan::spans_of(layer.toc(), *chunk).map_err(toc_failed)?;
            if spans.is_some_and(|spans| fetched.start <= spans.start && spans.end <= fetched.end) {
                let message = format!("spans {fetched:?} of {} ended before chunk {}", layer.digest(), chunk.ix);
                return Err(SourceError::new(ErrorKind::DigestMismatch, message));
            }
        }
        Ok(())
    }

    /// Fetches the group's chunks as plain content.
    pub(crate) async fn try_content(self, content: &dyn ContentSource) -> Result<(), SourceError> {
        let Self { shared, layer, group, urgency, sink } = self;
        let missing: Vec<Chunk> = group.chunks.iter().filter(|chunk| sink.wants(chunk.ix)).copied().collect();
        for run in runs(&missing) {
            let permit = shared.gate.acquire(urgency).await?;
            shared.tally.request();
            let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
            let range = DataRange::new(first.data.start, last.data.end);
            let digest = layer.digest();
            let idle = shared.options.idle_timeout;
            // It comes as a whole: what takes its time may yet be on its way.
            let patience = shared.options.starvation.max(idle / 4);
            let bytes = permit.hear(patience, bounded(idle, "content", content.content(&digest, range))).await?;
            shared.tally.content(bytes.len());
            let (toc, sink, run) = (layer.toc().clone(), sink.clone(), run.to_vec());
            let verified = shared.runtime.spawn_blocking(move || take_content(&toc, range, &bytes, &run, &*sink));
            verified.await.map_err(|e| SourceError::new(ErrorKind::Local, format!("verification failed: {e}")))??;
            permit.served();
        }
        Ok(())
    }
}

/// Decompresses the pieces of `spans` until they end.
fn extract(
    toc: &Toc,
    spans: &Range<SpanIx>,
    window: &[u8],
    mut pieces: mpsc::Receiver<Bytes>,
    sink: &dyn ChunkSink,
) -> Result<(), SourceError> {
    let end = toc.span(spans.end.saturating_sub(1)).map_err(toc_failed)?.tar.end;
    let mut extractor = SpanExtractor::new(toc, spans.start, window).map_err(|e| span_failed(toc, e))?;
    let mut refused = Ok(());
    while let Some(piece) = pieces.blocking_recv() {
        let pushed = extractor.push(&piece, &mut |chunk, bytes| {
            if refused.is_ok() && sink.wants(chunk.ix) {
                refused = sink.put(chunk, bytes);
            }
        });
        std::mem::replace(&mut refused, Ok(()))?;
        pushed.map_err(|e| span_failed(toc, e))?;
        if let Some(front) = extractor.take_front() {
            sink.edge(front)?;
        }
    }
    // A body that broke off would give less than the head of the chunk.
    if extractor.position() >= end
        && let Some(back) = extractor.back().map_err(|e| span_failed(toc, e))?
    {
        sink.edge(back)?;
    }
    Ok(())
}

/// The window was verified and the length is counted, so whatever the decompressor trips over are bytes that are not the
/// blob's, or a TOC that lies: in both cases this source cannot help.
fn span_failed(toc: &Toc, error: SpanError) -> SourceError {
    match error {
        SpanError::Toc(error) => toc_failed(error),
        other => SourceError::new(ErrorKind::DigestMismatch, format!("blob {}: {other}", toc.blob_digest())),
    }
}

fn take_content(
    toc: &Toc,
    range: DataRange,
    bytes: &[u8],
    chunks: &[Chunk],
    sink: &dyn ChunkSink,
) -> Result<(), SourceError> {
    if bytes.len() as u64 != range.len() {
        let message = format!("content {range} of {} has {} bytes", toc.blob_digest(), bytes.len());
        return Err(SourceError::new(ErrorKind::Malformed, message));
    }
    for chunk in chunks {
        let start = usize::try_from(chunk.data.start.saturating_sub(range.start)).unwrap_or(usize::MAX);
        let len = usize::try_from(chunk.data.len()).unwrap_or(usize::MAX);
        let bytes = bytes.get(start..).and_then(|rest| rest.get(..len)).unwrap_or_default();
        if !toc.verify_chunk(chunk.ix, bytes).map_err(toc_failed)? {
            let message = format!("content of chunk {} of {} does not match its digest", chunk.ix, toc.blob_digest());
            return Err(SourceError::new(ErrorKind::DigestMismatch, message));
        }
        if sink.wants(chunk.ix) {
            sink.put(*chunk, bytes)?;
        }
    }
    Ok(())
}

/// Cuts ascending chunks into runs that are worth one request each: close to each other and not longer than
/// [`CONTENT_SIZE`].
fn runs(chunks: &[Chunk]) -> impl Iterator<Item = &[Chunk]> {
    let mut rest = chunks;
    std::iter::from_fn(move || {
        let first = rest.first()?;
        let mut end = first.data.end;
        let len = rest.iter().take_while(|chunk| {
            let joins = chunk.data.start.saturating_sub(end) <= millstream_toc::CHUNK_SIZE
                && chunk.data.end.saturating_sub(first.data.start) <= CONTENT_SIZE;
            end = chunk.data.end;
            joins
        });
        let (run, after) = rest.split_at(len.count().max(1));
        rest = after;
        Some(run)
    })
}

/// Ends `work` with [`ErrorKind::TimedOut`] after `bound`.
pub(crate) async fn bounded<T>(
    bound: Duration,
    what: &str,
    work: impl Future<Output = Result<T, SourceError>>,
) -> Result<T, SourceError> {
    match tokio::time::timeout(bound, work).await {
        Ok(result) => result,
        Err(_) => Err(SourceError::new(ErrorKind::TimedOut, format!("{what} did not come within {bound:?}"))),
    }
}

fn wrong_length(layer: &Layer) -> SourceError {
    SourceError::new(ErrorKind::Malformed, format!("body of blob {} has the wrong length", layer.digest()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_hold_every_chunk_once_and_stay_short(sizes in proptest::collection::vec((1u64..=16384, 0u64..40_000), 0..200)) {
            let mut at = 0;
            let chunks: Vec<Chunk> = sizes.iter().zip(0..).map(|((len, gap), ix)| {
                let data = DataRange::with_len(at, *len);
                at = data.end + gap;
                Chunk { ix, data }
            }).collect();
            let mut all = Vec::new();
            for run in runs(&chunks) {
                prop_assert!(run[run.len() - 1].data.end - run[0].data.start <= CONTENT_SIZE);
                prop_assert!(run.windows(2).all(|pair| pair[1].data.start - pair[0].data.end <= millstream_toc::CHUNK_SIZE));
                all.extend_from_slice(run);
            }
            prop_assert_eq!(all, chunks);
        }
    }
}
