//! Which chunks of a layer are in its data file: in memory, and as bytes that prove themselves.

use millstream_oci::Digest;

use super::sync::atomic::{AtomicU64, Ordering};

const MAGIC: [u8; 8] = *b"mspres\0\x01";
/// Magic, digest of the TOC, number of chunks.
const HEAD: usize = 8 + 32 + 4;
const CHECKSUM: usize = 32;

/// One bit for each chunk.
#[derive(Debug)]
pub(crate) struct Presence {
    words: Box<[AtomicU64]>,
}

impl Presence {
    /// Nothing is present.
    pub(crate) fn empty(chunks: u32) -> Self {
        Self { words: (0..chunks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect() }
    }

    /// What [`decode`] gave.
    pub(crate) fn from_words(words: Vec<u64>) -> Self {
        Self { words: words.into_iter().map(AtomicU64::new).collect() }
    }

    /// Whether chunk `ix` is present; a chunk that does not exist is not. What was written before [`Presence::set`] is
    /// visible to whoever sees `true` here.
    pub(crate) fn has(&self, ix: u32) -> bool {
        self.words.get(ix as usize / 64).is_some_and(|word| word.load(Ordering::Acquire) & bit(ix) != 0)
    }

    /// Marks chunk `ix`; `true` if it was not marked before.
    pub(crate) fn set(&self, ix: u32) -> bool {
        self.words.get(ix as usize / 64).is_some_and(|word| word.fetch_or(bit(ix), Ordering::AcqRel) & bit(ix) == 0)
    }

    /// Takes the mark of chunk `ix` back.
    pub(crate) fn clear(&self, ix: u32) {
        if let Some(word) = self.words.get(ix as usize / 64) {
            word.fetch_and(!bit(ix), Ordering::AcqRel);
        }
    }

    /// Takes back every mark that `kept` does not have. Gives the chunks that lost theirs.
    pub(crate) fn keep(&self, kept: &[u64]) -> Vec<u32> {
        let mut lost = Vec::new();
        for ((word, kept), first) in self.words.iter().zip(kept).zip((0u32..).step_by(64)) {
            let gone = word.fetch_and(*kept, Ordering::AcqRel) & !kept;
            lost.extend((0..64).filter(|ix| gone & bit(*ix) != 0).map(|ix| first + ix));
        }
        lost
    }

    /// The bits at one moment for each word. Every bit that is found set had its bytes written before.
    pub(crate) fn snapshot(&self) -> Vec<u64> {
        self.words.iter().map(|word| word.load(Ordering::Acquire)).collect()
    }
}

/// Whether `words`, as [`Presence::snapshot`] gives them, have chunk `ix`.
pub(crate) fn is_set(words: &[u64], ix: u32) -> bool {
    words.get(ix as usize / 64).is_some_and(|word| word & bit(ix) != 0)
}

/// Takes chunk `ix` out of `words`.
pub(crate) fn unset(words: &mut [u64], ix: u32) {
    if let Some(word) = words.get_mut(ix as usize / 64) {
        *word &= !bit(ix);
    }
}

fn bit(ix: u32) -> u64 {
    1 << (ix % 64)
}

/// Bytes for the presence file of the layer whose TOC has digest `toc`.
pub(crate) fn encode(words: &[u64], chunks: u32, toc: &Digest) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD + words.len() * 8 + CHECKSUM);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(toc.as_bytes());
    bytes.extend_from_slice(&chunks.to_le_bytes());
    for word in words {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    let checksum = Digest::of(&bytes);
    bytes.extend_from_slice(checksum.as_bytes());
    bytes
}

/// The bits of a presence file, or `None` unless it is whole and was made for this TOC.
pub(crate) fn decode(bytes: &[u8], chunks: u32, toc: &Digest) -> Option<Vec<u64>> {
    let words = chunks.div_ceil(64) as usize;
    if bytes.len() != HEAD + words * 8 + CHECKSUM {
        return None;
    }
    let (body, checksum) = bytes.split_at(bytes.len() - CHECKSUM);
    if Digest::of(body).as_bytes() != checksum {
        return None;
    }
    let (head, body) = body.split_at(HEAD);
    if head[..8] != MAGIC || &head[8..40] != toc.as_bytes() || head[40..] != chunks.to_le_bytes() {
        return None;
    }
    let words: Vec<u64> = body.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
    // Bits behind the last chunk would count as chunks.
    let unused = if chunks.is_multiple_of(64) { 0 } else { u64::MAX << (chunks % 64) };
    match words.last() {
        Some(last) if last & unused != 0 => None,
        _ => Some(words),
    }
}
