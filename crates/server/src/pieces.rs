//! Digests of the pieces of a blob. By them a repository shows that it holds a blob of which no chunk can be had alone.
//!
//! Piece `n` is the blob from `n` MiB to `n + 1` MiB; the object is their BLAKE3 digests, 32 bytes each.

use std::io::{self, Read};

use millstream_toc::BlobRange;

/// Compressed bytes of a piece; only the last one is shorter.
const PIECE: u64 = 1 << 20;
/// Bytes of a digest.
pub(crate) const DIGEST: u64 = 32;

/// Reads a blob and makes the digests of its pieces on the way. Memory: 32 bytes for each.
pub(crate) struct PieceReader<R> {
    inner: R,
    hash: blake3::Hasher,
    filled: u64,
    digests: Vec<u8>,
}

impl<R: Read> PieceReader<R> {
    /// Reads from `inner`.
    pub(crate) fn new(inner: R) -> Self {
        Self { inner, hash: blake3::Hasher::new(), filled: 0, digests: Vec::new() }
    }

    /// The digests of what was read.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        if self.filled > 0 {
            self.end_piece();
        }
        self.digests
    }

    fn end_piece(&mut self) {
        self.digests.extend_from_slice(self.hash.finalize().as_bytes());
        self.hash.reset();
        self.filled = 0;
    }
}

impl<R: Read> Read for PieceReader<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let room = usize::try_from(PIECE - self.filled).unwrap_or(usize::MAX);
        let most = out.len().min(room);
        let read = self.inner.read(&mut out[..most])?;
        self.hash.update(&out[..read]);
        self.filled += read as u64;
        if self.filled == PIECE {
            self.end_piece();
        }
        Ok(read)
    }
}

/// One piece of a blob of `size` bytes, which has some, chosen by `random`: its number and place.
pub(crate) fn choose(size: u64, random: u64) -> (u64, BlobRange) {
    let ix = random % size.div_ceil(PIECE).max(1);
    (ix, BlobRange::new(ix * PIECE, size.min((ix + 1).saturating_mul(PIECE))))
}

/// Whether `bytes` have the digest `expected`.
pub(crate) fn matches(bytes: &[u8], expected: &[u8]) -> bool {
    blake3::hash(bytes).as_bytes() == expected
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_has_its_digest() {
        let blob: Vec<u8> = (0..2_500_000_u32).map(|at| at.to_le_bytes()[at as usize % 3]).collect();
        let mut reader = PieceReader::new(&blob[..]);
        let mut seen = Vec::new();
        reader.read_to_end(&mut seen).unwrap();
        assert!(seen == blob);
        let digests = reader.finish();
        assert_eq!(digests.len(), 3 * 32);
        for random in 0..7 {
            let (ix, range) = choose(blob.len() as u64, random);
            let place = |at: u64| usize::try_from(at).unwrap();
            let expected = &digests[place(ix) * 32..][..32];
            assert!(matches(&blob[place(range.start)..place(range.end)], expected));
            assert!(!matches(&blob[place(range.start) + 1..place(range.end)], expected));
        }
        assert!(PieceReader::new(&b""[..]).finish().is_empty());
    }
}
