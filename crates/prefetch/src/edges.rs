//! Halves of chunks that lie across the border of two spans, until the other half comes.

use std::sync::{Mutex, MutexGuard, PoisonError};

use millstream_oci::Digest;
use millstream_toc::format::ChunkIx;
use millstream_toc::span::Edge;

use crate::lru::Lru;

/// Which half of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Half {
    /// What lies in the first of its two spans.
    Head,
    /// What lies in the second one.
    Tail,
}

impl Half {
    const fn of(edge: &Edge) -> Self {
        if edge.offset == 0 { Self::Head } else { Self::Tail }
    }
}

/// One half of each chunk at most: when the other one comes, both leave. Nothing here is verified.
#[derive(Debug)]
pub(crate) struct Edges(Mutex<Lru<(Digest, ChunkIx), Edge>>);

impl Edges {
    /// Keeps up to `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Self(Mutex::new(Lru::new(limit)))
    }

    fn lock(&self) -> MutexGuard<'_, Lru<(Digest, ChunkIx), Edge>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The half of a chunk that is here. Waits for a join that is under way: a chunk that has none and is not stored after
    /// this call needs both.
    pub(crate) fn half(&self, layer: &Digest, chunk: ChunkIx) -> Option<Half> {
        self.lock().get(&(*layer, chunk)).map(Half::of)
    }

    /// Keeps `edge`, or calls `joined` with the whole chunk if the other half is here, which then is dropped.
    pub(crate) fn offer<T>(&self, layer: &Digest, edge: Edge, joined: impl FnOnce(&[u8]) -> T) -> Option<T> {
        let key = (*layer, edge.chunk.ix);
        let mut edges = self.lock();
        match edges.remove(&key) {
            Some(other) if Half::of(&other) != Half::of(&edge) => {
                let (head, tail) = if edge.offset == 0 { (edge, other) } else { (other, edge) };
                let mut whole = head.bytes;
                // The last byte of a span can hold a little of the next one.
                whole.truncate(tail.offset);
                whole.extend_from_slice(&tail.bytes);
                Some(joined(&whole))
            }
            _ => {
                let weight = edge.bytes.len();
                edges.insert(key, edge, weight);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use millstream_toc::{Chunk, DataRange};

    #[test]
    fn halves_are_joined_once_in_either_order() {
        let edges = Edges::new(1000);
        let layer = Digest::of(b"layer");
        let edge = |ix, offset, bytes: &[u8]| {
            let chunk = Chunk { ix, data: DataRange::new(0, 6) };
            Edge { chunk, offset, bytes: bytes.to_vec() }
        };
        let offer = |edge| edges.offer(&layer, edge, <[u8]>::to_vec);
        assert_eq!(edges.half(&layer, 1), None);
        assert_eq!(offer(edge(1, 0, b"abcd")), None);
        assert_eq!(offer(edge(1, 0, b"abcd")), None);
        assert_eq!((edges.half(&layer, 1), edges.half(&layer, 2)), (Some(Half::Head), None));
        assert_eq!(offer(edge(1, 3, b"def")).as_deref(), Some(&b"abcdef"[..]));
        assert_eq!(edges.half(&layer, 1), None);
        assert_eq!(offer(edge(1, 3, b"def")), None);
        assert_eq!(edges.half(&layer, 1), Some(Half::Tail));
        assert_eq!(offer(edge(1, 0, b"abc")).as_deref(), Some(&b"abcdef"[..]));
        // Too large to be kept.
        assert_eq!(offer(edge(1, 1, &[0; 1001])), None);
        assert_eq!(edges.half(&layer, 1), None);
    }
}
