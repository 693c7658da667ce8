//! What the files of a tree hold, read in three ways that take different roads through a file system.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use millstream_sys::map::GuardedMap;
use sha2::{Digest as _, Sha256};

use super::{Differences, Tree, name};

/// Bytes of one sequential read.
const SEQUENTIAL: usize = 128 * 1024;
/// Bytes of one read at a random place: odd, so that reads cross pages, chunks and spans.
const RANDOM: usize = 37 * 1024 + 11;
/// A file is assembled in memory when it is read in random order.
const LARGEST: u64 = 2 << 30;

/// The digest of one file, read in each way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hashes {
    /// By `read(2)` from the beginning to the end.
    pub sequential: [u8; 32],
    /// By `pread(2)` in a shuffled order.
    pub random: [u8; 32],
    /// Through `mmap(2)`.
    pub mapped: [u8; 32],
    /// Something is in it, but `stat(2)` says that it occupies no block: programs then take it for a hole.
    pub denied_by_blocks: bool,
}

/// The digests of all regular files of a tree.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Contents {
    files: BTreeMap<Vec<u8>, Hashes>,
}

impl Contents {
    /// Reads every file of `tree`, which was read at `root`. `seed` chooses the random order.
    ///
    /// # Errors
    ///
    /// If a file cannot be read, is larger than 2 GiB, or a page of it cannot be mapped.
    pub fn read(root: &Path, tree: &Tree, seed: u64) -> Result<Self> {
        let mut files = BTreeMap::new();
        for (path, record) in tree.files() {
            let at = root.join(OsStr::from_bytes(path));
            let hashes = hash(&at, record.blockless, seed).with_context(|| format!("reading {}", at.display()))?;
            files.insert(path.to_vec(), hashes);
        }
        Ok(Self { files })
    }

    /// The digests by path.
    pub fn files(&self) -> &BTreeMap<Vec<u8>, Hashes> {
        &self.files
    }

    /// What `other` holds differently, and where the three ways of reading do not agree.
    pub fn differences(&self, other: &Self) -> Differences {
        let mut lines = Vec::new();
        for (path, expected) in &self.files {
            let Some(found) = other.files.get(path) else {
                lines.push(format!("{}: missing", name(path)));
                continue;
            };
            for (way, digest) in [("sequential", found.sequential), ("random", found.random), ("mapped", found.mapped)]
            {
                if digest != expected.sequential {
                    lines.push(format!("{}: content differs ({way})", name(path)));
                }
            }
            if found.denied_by_blocks && !expected.denied_by_blocks {
                lines.push(format!("{}: holds something but occupies no block", name(path)));
            }
        }
        for path in other.files.keys().filter(|path| !self.files.contains_key(*path)) {
            lines.push(format!("{}: should not be there", name(path)));
        }
        Differences::from_lines(lines)
    }
}

/// The random way goes first, so that a lazily filled file is not already complete when it is read in that order.
fn hash(at: &Path, blockless: bool, seed: u64) -> Result<Hashes> {
    let file = File::open(at)?;
    let random = random(&file, seed)?;
    let (sequential, empty) = sequential(&file)?;
    Ok(Hashes { sequential, random, mapped: mapped(&file)?, denied_by_blocks: blockless && !empty })
}

/// Digest, and whether there are only zeros.
fn sequential(mut file: &File) -> Result<([u8; 32], bool)> {
    let mut sha256 = Sha256::new();
    let mut buffer = vec![0; SEQUENTIAL];
    let mut zeros = true;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok((sha256.finalize().into(), zeros)),
            Ok(length) => {
                zeros &= buffer[..length].iter().all(|byte| *byte == 0);
                sha256.update(&buffer[..length]);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("in order"),
        }
    }
}

fn random(file: &File, seed: u64) -> Result<[u8; 32]> {
    let size = file.metadata()?.len();
    ensure!(size <= LARGEST, "{size} bytes are too many to read in random order");
    let mut content = vec![0; usize::try_from(size)?];
    let mut pieces: Vec<usize> = (0..content.len().div_ceil(RANDOM)).collect();
    shuffle(&mut pieces, seed);
    for piece in pieces {
        let start = piece * RANDOM;
        let end = (start + RANDOM).min(content.len());
        file.read_exact_at(&mut content[start..end], start as u64)
            .with_context(|| format!("{} bytes at {start}", end - start))?;
    }
    Ok(Sha256::digest(&content).into())
}

fn mapped(file: &File) -> Result<[u8; 32]> {
    let map = GuardedMap::new(file)?;
    let digest = Sha256::digest(map.as_ref()).into();
    ensure!(!map.poisoned(), "a page could not be mapped in");
    Ok(digest)
}

/// Fisher and Yates's shuffle with a small generator (xorshift): the same order for the same seed everywhere.
fn shuffle(pieces: &mut [usize], seed: u64) {
    let mut state = seed | 1;
    for last in (1..pieces.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let chosen = usize::try_from(state % (last as u64 + 1)).unwrap_or(0);
        pieces.swap(last, chosen);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn three_ways_agree_and_one_changed_byte_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..200_000_u32).map(|number| number.to_le_bytes()[0] ^ number.to_le_bytes()[1]).collect();
        std::fs::write(dir.path().join("f"), &bytes).unwrap();
        std::fs::write(dir.path().join("empty"), "").unwrap();
        let tree = Tree::read(dir.path()).unwrap();
        let before = Contents::read(dir.path(), &tree, 42).unwrap();
        assert_eq!(before.differences(&before).to_string(), "");
        assert_eq!(before.files().len(), 2);
        let mut changed = bytes;
        changed[150_000] ^= 1;
        std::fs::write(dir.path().join("f"), &changed).unwrap();
        let after = Contents::read(dir.path(), &tree, 43).unwrap();
        assert_eq!(before.differences(&after).len(), 3);
    }

    #[test]
    fn a_shuffle_keeps_all_pieces() {
        let mut pieces: Vec<usize> = (0..100).collect();
        shuffle(&mut pieces, 7);
        assert!(pieces.windows(2).any(|pair| pair[0] > pair[1]));
        pieces.sort_unstable();
        assert!(pieces.into_iter().eq(0..100));
    }
}
