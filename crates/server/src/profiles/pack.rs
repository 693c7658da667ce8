//! Making a pack: the pages of a plan, each with what proves it, as one zstd stream.
//!
//! The order of the stream is that of the plan, in which neighbours of one span lie far apart. So the pages are taken in the
//! order of the layers' data and written to their places in a scratch file, which is then compressed from its begin to its end.

use std::fs::File;
use std::io::{self, BufWriter, Seek, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use millstream_oci::Digest;
use millstream_profile::proof::{Mask, proof_len, prove};
use millstream_profile::{PageRun, Profile, pieces};
use millstream_source::BlobSource;
use millstream_toc::format::SpanIx;
use millstream_toc::read::Chunk;
use millstream_toc::{FormatError, Toc};

use crate::content::{Content, blocking, toc_error};
use crate::{ServeError, StoreError};

/// It is made once and sent often. Of 52 MB of libraries, 15 makes 2 % less in ten times the time, 6 makes 5 % more in half of it.
const LEVEL: i32 = 9;
/// History of the stream as a power of two, 4 MiB; nodes take up to 8 MiB.
const WINDOW_LOG: u32 = 22;
/// Bytes of the data address space that are read at a time. More only where one span has more.
const AT_ONCE: u64 = 16 << 20;
/// Time for reading that much, whatever the registry does meanwhile.
const READ_DEADLINE: Duration = Duration::from_secs(300);

/// A finished stream.
pub(crate) struct Made {
    /// Bytes of each run's part, not compressed.
    pub(crate) sizes: Vec<u32>,
    /// The stream, at its begin.
    pub(crate) packed: File,
    /// Bytes of it.
    pub(crate) size: u64,
    /// Its BLAKE3.
    pub(crate) digest: blake3::Hash,
}

/// Pages of one chunk for one run.
#[derive(Clone, Copy)]
struct Piece {
    chunk: Chunk,
    pages: Mask,
    run: usize,
    /// Where its proof begins in the stream.
    at: u64,
}

/// Makes the pack of `profile`, reading what `content` does not have from `source`. Files in `scratch` have the size of the pages
/// and of the pack; memory: a few words for each page and [`AT_ONCE`], or one span if that is more.
pub(crate) async fn make(
    content: &Content,
    source: &dyn BlobSource,
    profile: &Profile,
    scratch: &Path,
) -> Result<Made, ServeError> {
    let mut layers = list(content, profile).await?;
    let sizes = lay_out(&mut layers, profile.runs.len())?;
    let pages = Arc::new(tempfile::tempfile_in(scratch).map_err(scratch_failed)?);
    for (digest, pieces) in layers {
        let toc = content.toc(&digest).await?;
        fill(content, source, &toc, pieces, &pages).await?;
    }
    let directory = scratch.to_owned();
    let (packed, size, digest) = blocking(move || compress(&pages, &directory)).await?.map_err(scratch_failed)?;
    Ok(Made { sizes, packed, size, digest })
}

/// The pieces of each layer, without their places. One table at a time is in use.
async fn list(content: &Content, profile: &Profile) -> Result<Vec<(Digest, Vec<Piece>)>, ServeError> {
    let mut layers = Vec::new();
    for (ix, layer) in (0..).zip(&profile.layers) {
        let runs = profile.runs.iter().enumerate().filter(|(_, run)| run.layer == ix);
        let runs: Vec<(usize, PageRun)> = runs.map(|(number, run)| (number, *run)).collect();
        if runs.is_empty() {
            continue;
        }
        let toc = content.toc(&layer.digest).await?;
        let expected = layer.toc;
        let listed = blocking(move || {
            if toc.digest() != expected {
                return Err(FormatError::Damaged { what: "it is not the one that the profile counts by" });
            }
            let mut all = Vec::new();
            for (number, run) in runs {
                let pieces = pieces(&run, &toc)?.into_iter();
                all.extend(pieces.map(|(chunk, pages)| Piece { chunk, pages, run: number, at: 0 }));
            }
            Ok(all)
        });
        layers.push((layer.digest, listed.await?.map_err(toc_error(&layer.digest))?));
    }
    Ok(layers)
}

/// Gives every piece its place; the bytes of each run.
fn lay_out(layers: &mut [(Digest, Vec<Piece>)], runs: usize) -> Result<Vec<u32>, ServeError> {
    let mut all: Vec<&mut Piece> = layers.iter_mut().flat_map(|(_, pieces)| pieces).collect();
    // Within a run they ascend already.
    all.sort_by_key(|piece| piece.run);
    let (mut sizes, mut at) = (vec![0_u64; runs], 0);
    for piece in all {
        let len = proof_len(piece.chunk.data.len(), piece.pages) as u64;
        piece.at = at;
        at += len;
        sizes[piece.run] += len;
    }
    let too_long = |_| ServeError::Internal { what: "a run of pages with more bytes than a run may have".to_owned() };
    sizes.into_iter().map(u32::try_from).collect::<Result<_, _>>().map_err(too_long)
}

/// Reads the chunks of one layer and writes the proofs of their pages to `pages`.
async fn fill(
    content: &Content,
    source: &dyn BlobSource,
    toc: &Arc<Toc>,
    mut pieces: Vec<Piece>,
    pages: &Arc<File>,
) -> Result<(), ServeError> {
    pieces.sort_by_key(|piece| piece.chunk.ix);
    let mut chunks: Vec<Chunk> = pieces.iter().map(|piece| piece.chunk).collect();
    chunks.dedup();
    let mut rest = &pieces[..];
    let blob = toc.blob_digest();
    for batch in batches(toc, &chunks).map_err(toc_error(&blob))? {
        let timed_out = |_| ServeError::TimedOut { what: "reading from the registry" };
        let found = content.chunks(toc, source, batch);
        let found = tokio::time::timeout(READ_DEADLINE, found).await.map_err(timed_out)??;
        let last = batch.last().map_or(0, |chunk| chunk.ix);
        let (here, after) = rest.split_at(rest.partition_point(|piece| piece.chunk.ix <= last));
        rest = after;
        let (here, pages) = (here.to_vec(), Arc::clone(pages));
        let written = blocking(move || {
            let mut proof = Vec::new();
            for piece in here {
                let Some(bytes) = found.get(&piece.chunk.ix) else { return Ok(Some(piece.chunk.ix)) };
                proof.clear();
                prove(bytes, piece.pages, &mut proof);
                pages.write_all_at(&proof, piece.at)?;
            }
            Ok(None)
        });
        if let Some(ix) = written.await?.map_err(scratch_failed)? {
            let what = format!("layer {blob}: chunk {ix} does not come out of its spans");
            return Err(ServeError::Mismatch { what });
        }
    }
    Ok(())
}

/// Ascending `chunks`, of which none is a hole, in portions of about [`AT_ONCE`]. A portion begins with a chunk that ends in a span
/// of its own, so that at most one span is read for two of them; but closed spans, whose content is kept in pieces, are cut
/// anywhere.
fn batches<'c>(toc: &Toc, chunks: &'c [Chunk]) -> Result<Vec<&'c [Chunk]>, FormatError> {
    let (mut batches, mut begin, mut last): (_, _, Option<SpanIx>) = (Vec::new(), 0, None);
    for (ix, chunk) in chunks.iter().enumerate() {
        let spans = toc.spans_for(chunk.data)?;
        let is_new = spans.last() > last.as_ref() || toc.is_closed(chunk.data)?;
        if ix > begin && is_new && chunk.data.end - chunks[begin].data.start > AT_ONCE {
            batches.push(&chunks[begin..ix]);
            begin = ix;
        }
        last = spans.last().copied();
    }
    batches.push(&chunks[begin..]);
    batches.retain(|batch| !batch.is_empty());
    Ok(batches)
}

/// Counts and hashes what is written.
struct Counted {
    file: BufWriter<File>,
    hash: blake3::Hasher,
    len: u64,
}

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.len += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn compress(mut pages: &File, scratch: &Path) -> io::Result<(File, u64, blake3::Hash)> {
    pages.rewind()?;
    let file = BufWriter::new(tempfile::tempfile_in(scratch)?);
    let counted = Counted { file, hash: blake3::Hasher::new(), len: 0 };
    let mut encoder = zstd::stream::write::Encoder::new(counted, LEVEL)?;
    encoder.window_log(WINDOW_LOG)?;
    io::copy(&mut pages, &mut encoder)?;
    let Counted { file, hash, len } = encoder.finish()?;
    let mut file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.rewind()?;
    Ok((file, len, hash.finalize()))
}

fn scratch_failed(source: io::Error) -> ServeError {
    StoreError::from(source).into()
}
