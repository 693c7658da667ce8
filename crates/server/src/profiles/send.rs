//! Sending a pack, whole or without the layers that the caller has.

use std::io::{self, Read, Write};

use bytes::Bytes;
use futures::TryStreamExt;
use millstream_oci::Digest;
use millstream_wire::millstream::v1::{self, get_profile_response::Part};
use tokio::sync::mpsc;

use super::Profiles;
use super::kept::{ImageKey, KeptProfile, OpenPack, PackHead};
use crate::ServeError;
use crate::answer::Answer;
use crate::blob::{ChannelReader, channel};
use crate::content::blocking;
use crate::store::Pieces;
use crate::tables::Behind;

/// Bytes of one message, none of which is of use to the caller before all of it is there: at 100 Mbit/s that takes 5 ms.
const MESSAGE: usize = 64 << 10;
/// Messages between the compressor and the caller.
const QUEUE: usize = 16;
/// Fast: a caller waits for it.
const LEVEL: i32 = 1;
/// Bytes that are copied from one stream to the other at a time.
const COPY: usize = 64 << 10;

/// Where pages go.
pub(crate) struct Line {
    pub(crate) answer: Answer<v1::GetProfileResponse>,
    /// Each piece of them comes behind tables that are under way.
    pub(crate) behind: Behind,
}

/// What a caller is told first.
pub(crate) fn plan_message(kept: &KeptProfile, pages: bool) -> v1::GetProfileResponse {
    let layers = kept
        .layers
        .iter()
        .map(|layer| v1::ProfileLayer { digest: layer.digest.to_string(), toc_digest: layer.toc.to_string() });
    let plan =
        v1::ProfilePlan { layers: layers.collect(), runs: kept.runs.clone(), recordings: kept.recordings, pages };
    v1::GetProfileResponse { part: Some(Part::Plan(plan)) }
}

impl Profiles {
    /// Sends the pages of `pack`, but those of the layers `local`.
    ///
    /// The last message goes out only after the digest of all that was read was found right: a stream that is whole is right.
    pub(crate) async fn send(
        &self,
        key: &ImageKey,
        pack: OpenPack,
        local: &[Digest],
        line: Line,
    ) -> Result<(), ServeError> {
        let OpenPack { head, packed } = pack;
        let runs = wanted_runs(&head, local);
        let sent = if runs.iter().all(|(_, wanted)| *wanted) {
            self.send_whole(&head, packed, &line).await
        } else {
            self.send_part(&head, packed, runs, &line).await
        };
        if let Err(error @ ServeError::Internal { .. }) = &sent {
            tracing::warn!(%error, manifest = %key.manifest, "kept pages are damaged, they will be made again");
            self.store.remove_pack(key).await?;
        }
        sent
    }

    async fn send_whole(&self, head: &PackHead, mut packed: Pieces, line: &Line) -> Result<(), ServeError> {
        let mut check = Check::new(head);
        let mut waiting: Vec<u8> = Vec::new();
        while let Some(piece) = packed.try_next().await? {
            check.add(&piece);
            for part in piece.chunks(MESSAGE) {
                if !waiting.is_empty() && waiting.len() + part.len() > MESSAGE {
                    self.send_piece(std::mem::take(&mut waiting), line).await?;
                }
                waiting.extend_from_slice(part);
            }
        }
        check.end()?;
        self.send_piece(waiting, line).await
    }

    async fn send_part(
        &self,
        head: &PackHead,
        packed: Pieces,
        runs: Vec<(u32, bool)>,
        line: &Line,
    ) -> Result<(), ServeError> {
        let (sender, reader) = channel();
        let (out, filtered) = mpsc::channel(QUEUE);
        let filter = blocking(move || filter(reader, &runs, out));
        let (read, filter, last) =
            tokio::join!(read(packed, Check::new(head), sender), filter, self.forward(filtered, line));
        // Whoever went away is why the others ended.
        let last = last?;
        read?;
        filter?.map_err(|error| damaged(&error.to_string()))?;
        self.send_piece(last, line).await
    }

    /// Sends all messages but the last one, which it gives back.
    async fn forward(&self, mut filtered: mpsc::Receiver<Vec<u8>>, line: &Line) -> Result<Vec<u8>, ServeError> {
        let mut waiting = Vec::new();
        while let Some(piece) = filtered.recv().await {
            let before = std::mem::replace(&mut waiting, piece);
            if !before.is_empty() {
                self.send_piece(before, line).await?;
            }
        }
        Ok(waiting)
    }

    async fn send_piece(&self, piece: Vec<u8>, line: &Line) -> Result<(), ServeError> {
        line.behind.turn().await;
        self.metrics.profile_sent(piece.len() as u64);
        line.answer.send(v1::GetProfileResponse { part: Some(Part::Packed(piece)) }).await
    }
}

/// The bytes of each run, and whether they are wanted.
fn wanted_runs(head: &PackHead, local: &[Digest]) -> Vec<(u32, bool)> {
    let is_local: Vec<bool> = head.profile.layers.iter().map(|layer| local.contains(&layer.digest)).collect();
    let layers = head.profile.runs.iter().step_by(3);
    let wanted = layers.map(|layer| !is_local.get(*layer as usize).is_some_and(|local| *local));
    head.sizes.iter().copied().zip(wanted).collect()
}

/// Compares what comes out of the store with what was put there.
struct Check {
    hash: blake3::Hasher,
    len: u64,
    expected: (String, u64),
}

impl Check {
    fn new(head: &PackHead) -> Self {
        Self { hash: blake3::Hasher::new(), len: 0, expected: (head.digest.clone(), head.size) }
    }

    fn add(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.len += bytes.len() as u64;
    }

    fn end(self) -> Result<(), ServeError> {
        let found = (self.hash.finalize().to_hex().to_string(), self.len);
        if found == self.expected { Ok(()) } else { Err(damaged("they have another digest")) }
    }
}

fn damaged(reason: &str) -> ServeError {
    ServeError::Internal { what: format!("kept pages of the startup profile are damaged: {reason}") }
}

/// Passes the stored stream on to the thread that filters it.
async fn read(mut packed: Pieces, mut check: Check, sender: mpsc::Sender<Bytes>) -> Result<(), ServeError> {
    while let Some(piece) = packed.try_next().await? {
        check.add(&piece);
        if sender.send(piece).await.is_err() {
            // It knows why.
            return Ok(());
        }
    }
    check.end()
}

/// Copies the wanted of the `runs`, which the stream consists of, to a stream of its own. Blocks.
fn filter(reader: ChannelReader, runs: &[(u32, bool)], out: mpsc::Sender<Vec<u8>>) -> io::Result<()> {
    let mut decoder = zstd::stream::read::Decoder::new(reader)?;
    let messages = Messages { waiting: Vec::with_capacity(MESSAGE), out };
    let mut encoder = zstd::stream::write::Encoder::new(messages, LEVEL)?;
    let mut buffer = vec![0; COPY];
    for (size, wanted) in runs {
        let mut left = *size as usize;
        while left > 0 {
            let part = &mut buffer[..left.min(COPY)];
            decoder.read_exact(part)?;
            if *wanted {
                encoder.write_all(part)?;
            }
            left -= part.len();
        }
    }
    if decoder.read(&mut buffer[..1])? > 0 {
        return Err(io::Error::other("more than the plan has"));
    }
    encoder.finish()?.flush()
}

/// Gathers messages for the caller.
struct Messages {
    waiting: Vec<u8>,
    out: mpsc::Sender<Vec<u8>>,
}

impl Write for Messages {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let part = &bytes[..bytes.len().min(MESSAGE - self.waiting.len())];
        self.waiting.extend_from_slice(part);
        if self.waiting.len() == MESSAGE {
            self.flush()?;
        }
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let message = std::mem::replace(&mut self.waiting, Vec::with_capacity(MESSAGE));
        self.out.blocking_send(message).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}
