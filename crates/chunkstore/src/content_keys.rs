//! Which contents a layer has, by keys that equal contents share.
//!
//! The keys of a layer are made when they are first asked for, and kept in a file beside its TOC: for each content 12 bytes,
//! its key and its number, sorted. They are a hint and nothing more. Whoever finds a pair by them compares size and digests
//! in both TOCs, so the file is neither synced nor proven; one that is damaged hides some pairs.

use std::fs;
use std::io::Write as _;
use std::path::Path;

use millstream_toc::Toc;
use millstream_toc::format::{ContentIx, FormatError};

use crate::{Layer, durable};

/// Their file in the directory of a layer.
pub(crate) const FILE: &str = "keys";
/// A new file before it takes its place.
pub(crate) const TEMPORARY: &str = "keys.tmp";
/// Bytes of a key and the number of its content.
const RECORD: usize = 12;
/// Of many equal contents in one layer so many are offered: more than one, since a layer that is not complete may have one
/// of them and not another.
const OFFERS: usize = 4;

/// The keys of one layer's contents, ascending, as long as nobody changed the file.
#[derive(Debug)]
pub(crate) struct ContentKeys(Vec<u8>);

impl ContentKeys {
    /// Those of `layer`, from its file if it is there. Reads all of it, or all digests of the TOC.
    ///
    /// # Errors
    /// When the TOC is damaged.
    pub(crate) fn of(layer: &Layer) -> Result<Self, FormatError> {
        let toc = layer.toc();
        let file = layer.dir().join(FILE);
        match fs::read(&file) {
            Ok(bytes) if bytes.len() == toc.content_count() as usize * RECORD => Ok(Self(bytes)),
            _ => {
                let keys = Self::make(toc)?;
                if let Err(error) = keep(layer.dir(), &keys.0) {
                    tracing::debug!(layer = %layer.digest(), %error, "keys are not kept");
                }
                Ok(keys)
            }
        }
    }

    fn make(toc: &Toc) -> Result<Self, FormatError> {
        let mut all = Vec::with_capacity(toc.content_count() as usize);
        for ix in 0..toc.content_count() {
            let content = toc.content(ix)?;
            let mut hasher = blake3::Hasher::new();
            hasher.update(&content.size.get().to_le_bytes());
            hasher.update(toc.chunk_digests(&content)?.as_flattened());
            let mut key = [0; 8];
            key.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
            all.push((u64::from_le_bytes(key), ix));
        }
        all.sort_unstable();
        let mut bytes = Vec::with_capacity(all.len() * RECORD);
        for (key, ix) in all {
            bytes.extend_from_slice(&key.to_le_bytes());
            bytes.extend_from_slice(&ix.to_le_bytes());
        }
        Ok(Self(bytes))
    }

    fn get(&self, place: usize) -> Option<(u64, ContentIx)> {
        let record = self.0.as_chunks::<RECORD>().0.get(place)?;
        let (key, ix) = record.split_first_chunk::<8>()?;
        Some((u64::from_le_bytes(*key), ContentIx::from_le_bytes(*ix.first_chunk()?)))
    }

    /// Calls `each` with pairs of contents, one of this layer and one of the other, that have one key. Takes time in
    /// proportion to both, whatever is in the files.
    pub(crate) fn pairs(&self, other: &Self, mut each: impl FnMut(ContentIx, ContentIx)) {
        let (mut here, mut there) = (0, 0);
        while let (Some((key, mine)), Some((theirs, _))) = (self.get(here), other.get(there)) {
            if key > theirs {
                there += 1;
                continue;
            }
            let offers = (there..).map_while(|place| other.get(place)).take_while(|(theirs, _)| *theirs == key);
            offers.take(OFFERS).for_each(|(_, theirs)| each(mine, theirs));
            here += 1;
        }
    }
}

fn keep(dir: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let temporary = dir.join(TEMPORARY);
    let written = durable::private_file().truncate(true).open(&temporary).and_then(|mut file| file.write_all(bytes));
    written.and_then(|()| fs::rename(&temporary, dir.join(FILE))).inspect_err(|_| {
        // What was written of it takes space, and nobody will miss it.
        let _ = fs::remove_file(&temporary);
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys(all: &[u64]) -> ContentKeys {
        let mut sorted: Vec<(u64, u32)> = all.iter().copied().zip(0..).collect();
        sorted.sort_unstable();
        ContentKeys(sorted.iter().flat_map(|(key, ix)| [&key.to_le_bytes()[..], &ix.to_le_bytes()].concat()).collect())
    }

    proptest! {
        #[test]
        fn every_content_finds_one_with_its_key_and_no_other(
            mine in proptest::collection::vec(0u64..20, 0..30), theirs in proptest::collection::vec(0u64..20, 0..30),
        ) {
            let mut found = vec![0; mine.len()];
            keys(&mine).pairs(&keys(&theirs), |one, other| {
                assert_eq!(mine[one as usize], theirs[other as usize]);
                found[one as usize] += 1;
            });
            for (key, found) in mine.iter().zip(found) {
                prop_assert_eq!(found, theirs.iter().filter(|other| *other == key).count().min(OFFERS));
            }
        }

        #[test]
        fn any_bytes_are_gone_through_once(
            one in proptest::collection::vec(any::<u8>(), 0..200), other in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let (one, other) = (ContentKeys(one), ContentKeys(other));
            let mut calls = 0;
            one.pairs(&other, |_, _| calls += 1);
            prop_assert!(calls <= one.0.len() / RECORD * OFFERS);
        }
    }
}
