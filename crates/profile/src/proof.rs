//! Some pages of a chunk with what proves them: a chunk's digest is the root of BLAKE3's tree, so the pages that travel need
//! only the chaining values of those that do not.
//!
//! A proof is the chunk's tree in order, left before right, from the root: a subtree of which nothing is wanted is its chaining
//! value (32 bytes), one that is a single page, or of which all is wanted, is its bytes. Subtrees follow BLAKE3's own rule
//! (the left one has the largest power of two of bytes that leaves something for the right one), so that every page begins one.
//! A chunk of which all is wanted is its bytes and nothing else.

use blake3::hazmat::{ChainingValue, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root};
use millstream_toc::format::SHORT_DIGEST;
pub use millstream_toc::read::PageMask as Mask;

use crate::run::PAGE_SIZE;

/// Bytes of a chaining value.
const CV: usize = 32;
/// [`PAGE_SIZE`].
const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_SIZE);

/// Why bytes do not prove pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProofError {
    /// There are more or fewer than the proof of these pages has.
    #[error("a proof of another length than its pages need")]
    Length,
    /// They are not of this chunk.
    #[error("pages that are not those of their chunk")]
    Mismatch,
}

/// The mask of a whole chunk of `len` bytes.
#[must_use]
pub const fn all(len: u64) -> Mask {
    let pages = len.div_ceil(PAGE_SIZE);
    if pages >= Mask::BITS as u64 { Mask::MAX } else { (1 << pages) - 1 }
}

/// One subtree: its bytes within the chunk and those of its pages that are wanted.
#[derive(Debug, Clone, Copy)]
struct Subtree {
    start: usize,
    len: usize,
    wanted: Mask,
}

impl Subtree {
    fn of_chunk(len: usize, wanted: Mask) -> Self {
        Self { start: 0, len, wanted: wanted & all(len as u64) }
    }

    fn is_whole(self) -> bool {
        self.wanted == all(self.len as u64)
    }

    fn is_absent(self) -> bool {
        self.wanted == 0
    }

    /// The two subtrees of one that is more than a page.
    fn split(self) -> (Self, Self) {
        let left = usize::try_from(left_subtree_len(self.len as u64)).unwrap_or(self.len);
        let pages = u32::try_from(left / PAGE).unwrap_or(Mask::BITS);
        let wanted = self.wanted & all(left as u64);
        let right = self.wanted.checked_shr(pages).unwrap_or(0);
        (
            Self { start: self.start, len: left, wanted },
            Self { start: self.start + left, len: self.len - left, wanted: right },
        )
    }

    fn hash(self, bytes: &[u8]) -> ChainingValue {
        blake3::Hasher::new().set_input_offset(self.start as u64).update(bytes).finalize_non_root()
    }
}

/// Bytes of the proof of the pages `wanted` of a chunk of `len` bytes.
#[must_use]
pub fn proof_len(len: u64, wanted: Mask) -> usize {
    fn of(tree: Subtree) -> usize {
        if tree.is_absent() {
            CV
        } else if tree.is_whole() {
            tree.len
        } else {
            let (left, right) = tree.split();
            of(left) + of(right)
        }
    }
    of(Subtree::of_chunk(usize::try_from(len).unwrap_or(0), wanted))
}

/// The proof of the pages `wanted` of the chunk that is `bytes`, at most [`CHUNK_SIZE`](millstream_toc::CHUNK_SIZE) of them, appended to `out`. At least one
/// page must be wanted.
pub fn prove(bytes: &[u8], wanted: Mask, out: &mut Vec<u8>) {
    fn value(tree: Subtree, bytes: &[u8]) -> ChainingValue {
        tree.hash(&bytes[tree.start..tree.start + tree.len])
    }
    fn add(tree: Subtree, bytes: &[u8], out: &mut Vec<u8>) {
        if tree.is_absent() {
            out.extend_from_slice(&value(tree, bytes));
        } else if tree.is_whole() {
            out.extend_from_slice(&bytes[tree.start..tree.start + tree.len]);
        } else {
            let (left, right) = tree.split();
            add(left, bytes, out);
            add(right, bytes, out);
        }
    }
    let tree = Subtree::of_chunk(bytes.len(), wanted);
    debug_assert!(!tree.is_absent(), "nothing to prove");
    add(tree, bytes, out);
}

/// Takes a proof apart and compares it with the chunk's digest; then gives each stretch of wanted pages to `page`, with its
/// offset in the chunk, ascending. Nothing is given before all is proven.
///
/// # Errors
/// See [`ProofError`].
pub fn verify(
    len: u64,
    wanted: Mask,
    digest: &[u8; SHORT_DIGEST],
    proof: &[u8],
    mut page: impl FnMut(u64, &[u8]),
) -> Result<(), ProofError> {
    let len = usize::try_from(len).map_err(|_| ProofError::Length)?;
    let tree = Subtree::of_chunk(len, wanted);
    if tree.is_absent() || proof.len() != proof_len(len as u64, wanted) {
        return Err(ProofError::Length);
    }
    let mut pages = Vec::new();
    let root = if tree.is_whole() {
        pages.push((0, proof));
        blake3::hash(proof)
    } else {
        let (left, right) = tree.split();
        let mut rest = proof;
        let left = take(left, &mut rest, &mut pages)?;
        let right = take(right, &mut rest, &mut pages)?;
        merge_subtrees_root(&left, &right, Mode::Hash)
    };
    if root.as_bytes()[..SHORT_DIGEST] != *digest {
        return Err(ProofError::Mismatch);
    }
    for (start, bytes) in pages {
        page(start as u64, bytes);
    }
    Ok(())
}

/// The chaining value of `tree`, whose part of the proof `rest` begins with; its wanted bytes go to `pages`.
fn take<'p>(
    tree: Subtree,
    rest: &mut &'p [u8],
    pages: &mut Vec<(usize, &'p [u8])>,
) -> Result<ChainingValue, ProofError> {
    if tree.is_absent() {
        let (value, after) = rest.split_first_chunk::<CV>().ok_or(ProofError::Length)?;
        *rest = after;
        return Ok(*value);
    }
    if tree.is_whole() {
        let (bytes, after) = rest.split_at_checked(tree.len).ok_or(ProofError::Length)?;
        *rest = after;
        pages.push((tree.start, bytes));
        return Ok(tree.hash(bytes));
    }
    let (left, right) = tree.split();
    let left = take(left, rest, pages)?;
    let right = take(right, rest, pages)?;
    Ok(merge_subtrees_non_root(&left, &right, Mode::Hash))
}

#[cfg(test)]
mod tests {
    use super::*;
    use millstream_toc::CHUNK_SIZE;
    use proptest::prelude::*;

    fn digest(bytes: &[u8]) -> [u8; SHORT_DIGEST] {
        blake3::hash(bytes).as_bytes()[..SHORT_DIGEST].try_into().unwrap()
    }

    fn content(len: usize) -> Vec<u8> {
        (0..len).map(|n| u8::try_from(n * 7 % 251).unwrap()).collect()
    }

    #[test]
    fn a_page_of_a_full_chunk_needs_three_values() {
        assert_eq!(proof_len(CHUNK_SIZE, 0b1000), 4096 + 3 * 32);
        assert_eq!(proof_len(CHUNK_SIZE, 0b11), 2 * 4096 + 2 * 32);
        assert_eq!(proof_len(CHUNK_SIZE, Mask::MAX), 32768);
        assert_eq!(proof_len(5000, 0b10), 5000 - 4096 + 32);
        assert_eq!(proof_len(100, 1), 100);
    }

    proptest! {
        #[test]
        fn pages_are_proven_and_nothing_else(len in 1usize..=32768, wanted in 1u8.., flip in any::<proptest::sample::Index>()) {
            let bytes = content(len);
            let wanted = wanted & all(len as u64);
            prop_assume!(wanted != 0);
            let mut proof = Vec::new();
            prove(&bytes, wanted, &mut proof);
            prop_assert_eq!(proof.len(), proof_len(len as u64, wanted));
            let mut seen = 0u8;
            verify(len as u64, wanted, &digest(&bytes), &proof, |start, page| {
                let at = usize::try_from(start).unwrap();
                assert_eq!(page, &bytes[at..at + page.len()]);
                for ix in at / PAGE..(at + page.len()).div_ceil(PAGE) {
                    seen |= 1 << ix;
                }
            }).unwrap();
            prop_assert_eq!(seen, wanted);
            // Whatever bit is wrong, of a page or of a value, nothing is given.
            let at = flip.index(proof.len() * 8);
            proof[at / 8] ^= 1 << (at % 8);
            let given = verify(len as u64, wanted, &digest(&bytes), &proof, |_, _| panic!("given"));
            prop_assert_eq!(given, Err(ProofError::Mismatch));
            proof.pop();
            let given = verify(len as u64, wanted, &digest(&bytes), &proof, |_, _| panic!("given"));
            prop_assert_eq!(given, Err(ProofError::Length));
        }
    }
}
