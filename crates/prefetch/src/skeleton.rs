//! Makes a layer local and proves it without its blob: by what is here, the little that is missing, and the skeleton.
//!
//! Used where that moves at most half as many bytes as the blob has. What is proven is in the README of this crate; whatever
//! does not work out ends in the pass over the whole blob, which proves more.

use std::io::{self, Read};

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use millstream_chunkstore::{Layer, StoreError};
use millstream_source::{ErrorKind, Priority, Retry, Skeleton, SourceError, names};
use millstream_toc::format::SpanIx;
use millstream_toc::read::Chunk;
use millstream_toc::{Budget, BuildOptions, Compression, DataRange, Reassembled, Toc, build};

use crate::background::at_low_priority;
use crate::deliver::{store_failed, toc_failed};
use crate::ensure::missing;
use crate::extract::bounded;
use crate::gate::Urgency;
use crate::pace::Paced;
use crate::part::Pass;
use crate::plan;

/// This way is taken if it moves no more than one byte for so many bytes of the blob.
const WORTH: u64 = 2;
/// A blob of at most this many bytes is read whole: that is one request as well, and proves more.
const SMALL: u64 = 64 * 1024;
/// Bytes of a skeleton that are kept in memory; a larger one is not used. Some 300,000 files have as much.
const MAX_SKELETON: u64 = 16 * 1024 * 1024;
/// Bytes of the data address space that are asked for at a time.
const BATCH: u64 = 8 * 1024 * 1024;
/// History of the zstd stream, as a power of two: 8 MiB.
const WINDOW_LOG_MAX: u32 = 23;
/// A server that does not answer is asked so many times, with the pauses of a failed hydration, before the blob is read.
const PATIENCE: u32 = 2;

/// What came of it.
pub(crate) enum Outcome {
    /// The tar is the one of the diff ID, the TOC is that of this tar, and every chunk is in the store.
    Proven,
    /// The blob has to be read.
    Blob,
    /// It has to be tried again.
    Failed(SourceError),
}

/// Fetches what is missing and proves the layer, if that is the short way. `failures` is the number of passes that failed
/// before.
pub(crate) async fn prove(pass: &Pass<'_>, failures: u32, budget: Budget) -> Outcome {
    match try_prove(pass, budget).await {
        Ok(true) => Outcome::Proven,
        Ok(false) => Outcome::Blob,
        Err(Failure::Server(error)) if error.retry == Retry::Never || failures >= PATIENCE => {
            tracing::debug!({ names::LAYER } = %pass.attached.layer.digest(), %error, "the layer is proven by its blob");
            Outcome::Blob
        }
        Err(Failure::Server(error) | Failure::Chunks(error)) => Outcome::Failed(error),
    }
}

enum Failure {
    /// No skeleton came.
    Server(SourceError),
    /// Chunks did not come.
    Chunks(SourceError),
}

async fn try_prove(pass: &Pass<'_>, budget: Budget) -> Result<bool, Failure> {
    let (attached, digest) = (pass.attached, pass.attached.layer.digest());
    let toc = attached.layer.toc();
    if toc.blob_size() <= SMALL {
        return Ok(false);
    }
    let affordable = toc.blob_size() / WORTH;
    let wanted = missing(&attached.layer, DataRange::new(0, toc.data_size())).map_err(Failure::Chunks)?;
    let spans = blob_bytes(toc, &wanted).map_err(|e| Failure::Chunks(toc_failed(e)))?;
    let Some(left) = affordable.checked_sub(spans) else { return Ok(false) };
    let Some(skeleton) = fetch_skeleton(pass, left.min(MAX_SKELETON)).await.map_err(Failure::Server)? else {
        return Ok(false);
    };
    fetch_chunks(pass, &wanted).await.map_err(Failure::Chunks)?;
    let layer = attached.layer.clone();
    match at_low_priority(move || judge(&layer, &skeleton, budget)).await.map_err(Failure::Chunks)? {
        Ok(()) => Ok(true),
        // Any of the three may be wrong: skeleton, TOC, or what is here. The blob knows.
        Err(reason) => {
            attached.hydration.distrust_skeleton();
            tracing::warn!({ names::LAYER } = %digest, %reason, "the layer is not proven by its skeleton; its blob is read");
            Ok(false)
        }
    }
}

/// Compressed bytes of all spans that chunks need.
fn blob_bytes(toc: &Toc, chunks: &[Chunk]) -> Result<u64, millstream_toc::FormatError> {
    let (mut sum, mut next) = (0u64, SpanIx::MIN);
    for chunk in chunks {
        let Some(spans) = plan::spans_of(toc, *chunk)? else { continue };
        for span in spans.start.max(next)..spans.end {
            sum = sum.saturating_add(toc.span(span)?.blob.len());
            next = span + 1;
        }
    }
    Ok(sum)
}

/// The compressed skeleton, if a source has one that is not larger than `limit`.
async fn fetch_skeleton(pass: &Pass<'_>, limit: u64) -> Result<Option<Bytes>, SourceError> {
    let (shared, layer) = (pass.shared, pass.attached.layer.digest());
    let Some(content) = pass.attached.sources().iter().find_map(|source| source.image.content.clone()) else {
        return Ok(None);
    };
    pass.permitted().await?;
    let urgency = Urgency::new(Priority::Hydrate, pass.attached.layer.number());
    let _permit = shared.gate.acquire(&urgency).await?;
    shared.tally.request();
    let idle = shared.options.idle_timeout;
    let Skeleton { size, packed } = bounded(idle, "skeleton", content.skeleton(&layer)).await?;
    if size > limit {
        return Ok(None);
    }
    let (mut bytes, mut packed) = (BytesMut::new(), Paced::new(packed, idle));
    while let Some(piece) = packed.next().await? {
        if bytes.len() as u64 + piece.len() as u64 > size {
            return Err(SourceError::new(ErrorKind::Malformed, format!("skeleton of {layer} is longer than it says")));
        }
        bytes.extend_from_slice(&piece);
    }
    if bytes.len() as u64 == size {
        return Ok(Some(bytes.freeze()));
    }
    Err(SourceError::new(ErrorKind::Malformed, format!("skeleton of {layer} is shorter than it says")))
}

/// Brings chunks into the store, a few batches at once, as nobody waits for them.
async fn fetch_chunks(pass: &Pass<'_>, chunks: &[Chunk]) -> Result<(), SourceError> {
    let at_once = pass.shared.options.hydrate_slots.max(1);
    let fetch = |range| async move {
        pass.permitted().await?;
        pass.shared.ensure(pass.attached, range, Priority::Hydrate).await
    };
    let mut batches = std::pin::pin!(futures::stream::iter(batches(chunks)).map(fetch).buffered(at_once));
    while let Some(fetched) = batches.next().await {
        fetched?;
    }
    Ok(())
}

/// Ranges that hold all of `chunks`, each of about [`BATCH`] bytes.
fn batches(chunks: &[Chunk]) -> impl Iterator<Item = DataRange> {
    let mut rest = chunks;
    std::iter::from_fn(move || {
        let end = rest.first()?.data.start.saturating_add(BATCH);
        let (batch, after) = rest.split_at(rest.partition_point(|chunk| chunk.data.end <= end).max(1));
        rest = after;
        Some(DataRange::new(batch.first()?.data.start, batch.last()?.data.end))
    })
}

/// Puts the tar together, all of whose content is in the store, and compares what it has with what the TOC says. Blocks.
///
/// # Errors
/// What differs, or what kept the tar from being put together.
fn judge(layer: &Layer, skeleton: &[u8], budget: Budget) -> Result<(), String> {
    let toc = layer.toc();
    let text = |error: io::Error| format!("skeleton: {error}");
    let mut decoder = zstd::stream::read::Decoder::with_buffer(skeleton).map_err(text)?;
    decoder.window_log_max(WINDOW_LOG_MAX).map_err(text)?;
    let content = |range, out: &mut [u8]| match layer.read(range, out).map_err(local)?.is_empty() {
        true => Ok(()),
        false => Err(io::Error::other("content was given up meanwhile")),
    };
    let tar = Reassembled::new(toc, decoder, content).map_err(|e| e.to_string())?;
    let mut options = BuildOptions::new(Compression::Plain);
    options.budget = budget;
    let built = build(tar.take(toc.tar_size()), &options, &mut ()).map_err(|e| e.to_string())?;
    let built = Toc::open(built.toc).map_err(|e| e.to_string())?;
    if built.diff_id() != toc.diff_id() {
        return Err(format!("the tar has diff ID {}, the TOC says {}", built.diff_id(), toc.diff_id()));
    }
    match built.same_tar(toc) {
        Ok(true) => Ok(()),
        Ok(false) => Err("the TOC made from the tar differs from the one that was served".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn local(error: StoreError) -> io::Error {
    io::Error::other(store_failed(error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn batches_hold_every_chunk_once(sizes in proptest::collection::vec((1u64..=32768, 0u64..4_000_000), 0..200)) {
            let mut at = 0;
            let chunks: Vec<Chunk> = sizes.iter().zip(0..).map(|((len, gap), ix)| {
                let data = DataRange::with_len(at, *len);
                at = data.end + gap;
                Chunk { ix, data }
            }).collect();
            let mut held = 0;
            let mut before = 0;
            for batch in batches(&chunks) {
                prop_assert!(batch.start >= before && batch.len() <= BATCH);
                before = batch.end;
                held += chunks.iter().filter(|chunk| batch.contains(&chunk.data)).count();
            }
            prop_assert_eq!(held, chunks.len());
        }
    }
}
