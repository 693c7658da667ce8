//! The pass over a whole blob: stores what the TOC says, and finds out whether the TOC says the truth. What is here already
//! is written again: what is called verified is what was hashed, whatever the disk made of the bytes that came before.

use std::io::{self, Read};

use bytes::{Buf, Bytes};
use millstream_chunkstore::{Layer, StoreError};
use millstream_oci::Digest;
use millstream_source::{ErrorKind, SourceError};
use millstream_toc::format::{ChunkIx, SHORT_DIGEST};
use millstream_toc::read::Chunk;
use millstream_toc::{Budget, BuildError, BuildOptions, BuildSink, DataRange, Toc, build};
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use crate::background::Courtesy;
use crate::deliver::store_failed;

/// What a pass proved.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// Blob, tar and TOC are what was served, and every chunk is in the store.
    Proven,
    /// The bytes that came are not the blob.
    WrongBytes,
    /// The bytes are the blob, and it does not have the TOC that was served.
    WrongToc(String),
    /// The pass did not come to its end.
    Failed(SourceError),
}

/// Builds the TOC of the blob whose parts come through `parts`, stores its chunks and compares. Blocks.
pub(crate) fn rebuild(layer: &Layer, parts: mpsc::Receiver<Bytes>, budget: Budget) -> Verdict {
    let toc = layer.toc();
    let compression = match toc.compression() {
        Ok(compression) => compression,
        Err(error) => return Verdict::WrongToc(error.to_string()),
    };
    // Whatever the server allows itself: a tar that is longer than the TOC says is found out when it gets longer, and there is no
    // file of more than all content.
    let (tar, data) = (toc.tar_size(), toc.data_size());
    let budget = Budget { max_tar_size: tar, max_file_size: data, max_ratio: u64::MAX, ..budget };
    let mut blob = Parts {
        parts,
        current: Bytes::new(),
        left: toc.blob_size(),
        hash: Sha256::new(),
        courtesy: Courtesy::of_this_thread(),
    };
    let mut sink = Keeper { layer, toc, wrong: None, failed: None };
    let built = build(&mut blob, &BuildOptions { budget, ..BuildOptions::new(compression) }, &mut sink);
    if let Some(error) = sink.failed {
        return Verdict::Failed(store_failed(error));
    }
    // Whoever is to blame for a failed build is known only when the whole blob was hashed.
    if let Err(error) = io::copy(&mut blob, &mut io::sink()) {
        return Verdict::Failed(SourceError::new(ErrorKind::Unavailable, format!("blob {}: {error}", layer.digest())));
    }
    if Digest::from_bytes(blob.hash.finalize().into()) != layer.digest() {
        return Verdict::WrongBytes;
    }
    judge(toc, built.map(|built| built.toc), sink.wrong)
}

/// The blob is right; is the TOC?
fn judge(toc: &Toc, built: Result<Vec<u8>, BuildError>, wrong: Option<ChunkIx>) -> Verdict {
    let built = match built {
        Ok(built) => built,
        Err(BuildError::Read(error)) => {
            return Verdict::Failed(SourceError::new(ErrorKind::Local, format!("blob {}: {error}", toc.blob_digest())));
        }
        Err(error) => return Verdict::WrongToc(format!("the blob has no TOC at all: {error}")),
    };
    if built == toc.as_bytes() && wrong.is_none() {
        return Verdict::Proven;
    }
    let reason = match (Toc::open(built), wrong) {
        (Ok(built), _) if built.diff_id() != toc.diff_id() => {
            format!("the tar has diff ID {}, the TOC says {}", built.diff_id(), toc.diff_id())
        }
        (_, Some(chunk)) => format!("chunk {chunk} of the blob is not what the TOC says"),
        _ => "the TOC made from the blob differs from the one that was served".to_owned(),
    };
    Verdict::WrongToc(reason)
}

/// The blob as its parts arrive, hashed on the way.
struct Parts {
    parts: mpsc::Receiver<Bytes>,
    current: Bytes,
    left: u64,
    hash: Sha256,
    courtesy: Courtesy,
}

impl Read for Parts {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        // Nothing more is fetched meanwhile than fits into the channel: all of hydration rests. Not only between two parts, which
        // take long.
        self.courtesy.rest();
        while self.current.is_empty() {
            match self.parts.blocking_recv() {
                Some(part) => self.current = part,
                None if self.left == 0 => return Ok(0),
                // Never an end of file: a build must not take a part of a blob for all of it.
                None => return Err(io::Error::new(io::ErrorKind::BrokenPipe, "the pass was ended")),
            }
        }
        let len = self.current.len().min(out.len());
        self.current.copy_to_slice(&mut out[..len]);
        self.hash.update(&out[..len]);
        self.left = self.left.saturating_sub(len as u64);
        Ok(len)
    }
}

/// Stores chunks that match the trusted TOC. After the first that does not, nothing more is stored, but the pass goes on: its
/// end tells who was wrong.
struct Keeper<'l> {
    layer: &'l Layer,
    toc: &'l Toc,
    wrong: Option<ChunkIx>,
    failed: Option<StoreError>,
}

impl BuildSink for Keeper<'_> {
    fn chunk(&mut self, chunk: ChunkIx, data: DataRange, digest: &[u8; SHORT_DIGEST], bytes: &[u8]) -> io::Result<()> {
        if self.wrong.is_some() {
            return Ok(());
        }
        if !self.matches(chunk, data, digest) {
            self.wrong = Some(chunk);
            return Ok(());
        }
        self.layer.rewrite(Chunk { ix: chunk, data }, bytes).map_err(|error| {
            let message = error.to_string();
            self.failed = Some(error);
            io::Error::other(message)
        })
    }
}

impl Keeper<'_> {
    fn matches(&self, chunk: ChunkIx, data: DataRange, digest: &[u8; SHORT_DIGEST]) -> bool {
        self.toc.chunk_digest(chunk).is_ok_and(|expected| expected == *digest)
            && self.toc.chunk(chunk).is_ok_and(|expected| expected.data == data)
    }
}
