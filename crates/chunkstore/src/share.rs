//! Content that other layers hold already: found by equal digests, taken over by reflink or copy.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, PoisonError};

use millstream_toc::format::{CHUNK_SIZE, ChunkIx, ContentIx, ContentRecord, DATA_ALIGN};
use millstream_toc::{DataRange, Toc};
use rustix::io::Errno;

use crate::content_keys::ContentKeys;
use crate::layer::Held;
use crate::{Layer, LayerState, Store, StoreError};

/// Bytes that are taken over with one call, so that a copy on a slow disk can be given up in between.
const RUN: u64 = 8 * 1024 * 1024;
/// Bytes copied at a time where the kernel cannot do it.
const BUFFER: u64 = 256 * 1024;

/// What other layers of the store hold of one layer, as it was at one moment.
///
/// The other layers may be removed meanwhile: their data files stay open as long as this lives.
#[derive(Debug)]
pub struct Shares {
    layer: Arc<Layer>,
    sources: Vec<(Arc<Layer>, Held)>,
    /// Ascending, one for each content of the layer at most.
    matches: Vec<Match>,
}

/// A content of the layer that another one holds, or a part of it.
#[derive(Debug, Clone, Copy)]
struct Match {
    data: DataRange,
    content: ContentIx,
    /// Place in [`Shares::sources`].
    source: usize,
    theirs: ContentIx,
    /// Chunks that the source held and this layer did not.
    chunks: u32,
}

/// Consecutive chunks whose places lie behind each other in both data files.
#[derive(Debug, Clone)]
struct Run {
    source: usize,
    chunks: Range<ChunkIx>,
    /// The first of them in the other layer.
    theirs: ChunkIx,
    /// Up to the next multiple of the alignment, so that whole blocks can be shared.
    to: DataRange,
    from: u64,
}

impl Store {
    /// Looks for contents that `layer` misses and other layers hold: verified ones, and of others what is synced. Takes
    /// milliseconds for each layer of the store, more for those that nobody compared before.
    ///
    /// # Errors
    /// [`StoreError::Quarantined`], [`StoreError::Damaged`], [`StoreError::Toc`], all of `layer`. Others that cannot be
    /// used are passed over.
    pub fn shares(&self, layer: &Arc<Layer>) -> Result<Shares, StoreError> {
        layer.check_trusted()?;
        let mut shares = Shares { layer: layer.clone(), sources: Vec::new(), matches: Vec::new() };
        if layer.bytes_present() == layer.bytes_total() {
            return Ok(shares);
        }
        let _one_at_a_time = self.comparing.lock().unwrap_or_else(PoisonError::into_inner);
        let mine = ContentKeys::of(layer)?;
        let mut others = self.layers();
        others.retain(|other| other.digest() != layer.digest());
        // What is complete is found first, and nothing better afterwards.
        others.sort_by_key(|other| other.state() != LayerState::Verified);
        let mut best = BTreeMap::new();
        for other in others {
            let source = shares.sources.len();
            let mut better = BTreeMap::new();
            let compared = ContentKeys::of(&other).map(|theirs| {
                mine.pairs(&theirs, |one, theirs| {
                    let known = better.get(&one).or_else(|| best.get(&one)).map_or(0, |known: &Match| known.chunks);
                    if let Some((data, chunks)) = compare(layer, one, &other, theirs, known) {
                        better.insert(one, Match { data, content: one, source, theirs, chunks });
                    }
                });
            });
            // A TOC file that was cut off reads as zeros: whatever it said does not count then.
            if compared.is_ok() && !better.is_empty() && other.check_trusted().is_ok() {
                let Some(held) = other.held() else { continue };
                best.append(&mut better);
                shares.sources.push((other, held));
            }
        }
        layer.check_trusted()?;
        shares.matches = best.into_values().collect();
        Ok(shares)
    }
}

/// Where a content of `layer` lies and how many chunks that it misses another layer has of it, if these are more than
/// `known` and the contents are equal.
fn compare(
    layer: &Layer,
    content: ContentIx,
    other: &Layer,
    theirs: ContentIx,
    known: u32,
) -> Option<(DataRange, u32)> {
    let (one, their) = (layer.toc().content(content).ok()?, other.toc().content(theirs).ok()?);
    let chunks = chunks_to_take(layer, &one, &their, |chunk| other.has(chunk)).count();
    let chunks = u32::try_from(chunks).ok().filter(|chunks| *chunks > known)?;
    let data = DataRange::with_len(one.data_off.get(), one.size.get());
    equal(layer.toc(), &one, other.toc(), &their).then_some((data, chunks))
}

/// Whether two contents have the same bytes.
fn equal(toc: &Toc, one: &ContentRecord, others: &Toc, other: &ContentRecord) -> bool {
    one.size == other.size
        && matches!((toc.chunk_digests(one), others.chunk_digests(other)), (Ok(one), Ok(other)) if one == other)
}

/// Positions within the content of chunks that `layer` misses and the other one `has`.
fn chunks_to_take(
    layer: &Layer,
    one: &ContentRecord,
    other: &ContentRecord,
    has: impl Fn(ChunkIx) -> bool,
) -> impl Iterator<Item = u32> {
    let (first, others) = (one.first_chunk.get(), other.first_chunk.get());
    let count = u32::try_from(one.size.get().div_ceil(CHUNK_SIZE)).unwrap_or(0);
    (0..count).filter(move |place| !layer.has(first.saturating_add(*place)) && has(others.saturating_add(*place)))
}

impl Shares {
    /// Whether nothing was found.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.matches.is_empty()
    }

    /// Whether something was found that lies in `range` of the layer's data address space.
    #[must_use]
    pub fn has(&self, range: DataRange) -> bool {
        self.within(range).next().is_some()
    }

    /// Pieces of the layer's data address space that hold all that was found, ascending, each of about `size` bytes or of
    /// one file if that is longer.
    pub fn pieces(&self, size: u64) -> impl Iterator<Item = DataRange> {
        let mut rest = self.matches.as_slice();
        std::iter::from_fn(move || {
            let first = rest.first()?;
            let end = first.data.start.saturating_add(size);
            let (piece, after) = rest.split_at(rest.partition_point(|found| found.data.end <= end).max(1));
            rest = after;
            Some(DataRange::new(first.data.start, piece.last()?.data.end))
        })
    }

    /// Brings the chunks over that overlap `range` and are still missing. Gives the bytes that are now present and were not
    /// before. On file systems that share blocks between files (XFS, btrfs) no byte is copied. Blocks.
    ///
    /// # Errors
    /// Those of [`Layer::write`], and of a source that cannot be read. What came over before stays.
    pub fn copy(&self, range: DataRange) -> Result<u64, StoreError> {
        let mut total = 0;
        let mut pending: Option<Run> = None;
        for found in self.within(range) {
            let (other, held) = &self.sources[found.source];
            let (one, their) = (self.layer.toc().content(found.content)?, other.toc().content(found.theirs)?);
            for place in chunks_to_take(&self.layer, &one, &their, |chunk| held.has(chunk)) {
                let next = run(found.source, &one, &their, place);
                if next.to.intersect(&range).is_none() {
                    continue;
                }
                match &mut pending {
                    Some(before) if before.joins(&next) => before.join(&next),
                    _ => total += self.take(pending.replace(next))?,
                }
            }
        }
        Ok(total + self.take(pending)?)
    }

    fn within(&self, range: DataRange) -> impl Iterator<Item = &Match> {
        let first = self.matches.partition_point(|found| found.data.end <= range.start);
        self.matches[first..].iter().take_while(move |found| found.data.start < range.end)
    }

    fn take(&self, run: Option<Run>) -> Result<u64, StoreError> {
        let Some(run) = run else { return Ok(0) };
        let other = &self.sources[run.source].0;
        self.layer.check_trusted()?;
        let theirs = run.theirs..run.theirs.saturating_add(run.chunks.end - run.chunks.start);
        self.layer.put(run.chunks, |data| {
            other.give(theirs, |from| copy_range(from, run.from, data, run.to.start, run.to.len()))
        })
    }
}

impl Run {
    fn joins(&self, next: &Self) -> bool {
        self.source == next.source
            && self.chunks.end == next.chunks.start
            && self.theirs + (self.chunks.end - self.chunks.start) == next.theirs
            && self.to.end == next.to.start
            && self.from + self.to.len() == next.from
            && self.to.len() + next.to.len() <= RUN
    }

    fn join(&mut self, next: &Self) {
        self.chunks.end = next.chunks.end;
        self.to.end = next.to.end;
    }
}

/// The run of one chunk, the one at `place` in both contents.
fn run(source: usize, one: &ContentRecord, their: &ContentRecord, place: u32) -> Run {
    let offset = u64::from(place) * CHUNK_SIZE;
    let (start, end) = (one.data_off.get() + offset, (offset + CHUNK_SIZE).min(one.size.get()));
    let chunk = one.first_chunk.get() + place;
    Run {
        source,
        chunks: chunk..chunk + 1,
        theirs: their.first_chunk.get() + place,
        // Behind the end of a file there is nothing up to the alignment, in either data file.
        to: DataRange::new(start, (one.data_off.get() + end).next_multiple_of(DATA_ALIGN)),
        from: their.data_off.get() + offset,
    }
}

/// Has the kernel copy, which shares the blocks where the file system can, else copies by reading and writing.
fn copy_range(from: &File, mut at: u64, to: &File, mut place: u64, mut left: u64) -> io::Result<()> {
    while left > 0 {
        let len = usize::try_from(left).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(from, Some(&mut at), to, Some(&mut place), len) {
            // The source got shorter; reading says so.
            Ok(0) | Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM) => {
                return copy_bytes(from, at, to, place, left);
            }
            Ok(copied) => left = left.saturating_sub(copied as u64),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_bytes(from: &File, mut at: u64, to: &File, mut place: u64, mut left: u64) -> io::Result<()> {
    let mut buffer = vec![0; usize::try_from(left.min(BUFFER)).map_err(io::Error::other)?];
    while left > 0 {
        let len = left.min(BUFFER);
        let part = &mut buffer[..usize::try_from(len).map_err(io::Error::other)?];
        from.read_exact_at(part, at)?;
        to.write_all_at(part, place)?;
        (at, place, left) = (at + len, place + len, left - len);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_of_copying_are_alike() {
        let bytes: Vec<u8> = (0..600_000u32).flat_map(u32::to_le_bytes).collect();
        let from = tempfile::tempfile().unwrap();
        from.write_all_at(&bytes, 0).unwrap();
        for copy in [copy_range, copy_bytes] {
            let to = tempfile::tempfile().unwrap();
            copy(&from, 4096, &to, 8192, 1_000_000).unwrap();
            let mut out = vec![0; 1_000_000];
            to.read_exact_at(&mut out, 8192).unwrap();
            assert_eq!(out, bytes[4096..1_004_096]);
            let error = copy(&from, 4096, &to, 0, bytes.len() as u64).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "the source is too short");
        }
    }
}
