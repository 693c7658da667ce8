//! What a profile consists of: runs of pages of an image's layers, in the order in which a start touched them first.

use millstream_oci::Digest;
use millstream_toc::format::DATA_ALIGN;
use millstream_toc::{DataRange, Toc};
use serde::{Deserialize, Serialize};

/// Bytes of a page, the unit of a profile: that of the kernel's page cache, and the alignment of every file in a layer's data
/// address space, so that no page has bytes of two files.
pub const PAGE_SIZE: u64 = DATA_ALIGN;

/// Layers of one profile, at most.
pub const MAX_LAYERS: usize = 1024;
/// Runs of one profile, at most.
pub const MAX_RUNS: usize = 1 << 18;
/// Pages of one profile, at most: 1 GiB.
pub const MAX_PAGES: u64 = 1 << 18;

/// Why something is no profile.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProfileError {
    /// It has more of something than a profile may have.
    #[error("a profile with {found} {what}, at most {most} are allowed")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        found: u64,
        /// How many there may be.
        most: u64,
    },
    /// A run is empty or names a layer that the profile does not have.
    #[error("run {run} of the profile is empty or of a layer that the profile does not name")]
    Run {
        /// Which one.
        run: usize,
    },
    /// A list of numbers that are no whole runs.
    #[error("{0} numbers are not runs of three each")]
    Ragged(usize),
}

/// A layer that a profile speaks of, with the table that its pages are counted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProfileLayer {
    /// Digest of the blob.
    pub digest: Digest,
    /// Digest of the canonical TOC.
    pub toc: Digest,
}

/// Consecutive pages of one layer's data address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRun {
    /// Place in [`Profile::layers`].
    pub layer: u32,
    /// The first page: offset in the data address space divided by [`PAGE_SIZE`].
    pub first: u32,
    /// How many; at least 1.
    pub pages: u32,
}

impl PageRun {
    /// One past its last page.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.first as u64 + self.pages as u64
    }

    /// Its pages as a range of the data address space; the last page of a file reaches past the file's end.
    #[must_use]
    pub const fn data(&self) -> DataRange {
        DataRange { start: self.first as u64 * PAGE_SIZE, end: self.end() * PAGE_SIZE }
    }
}

/// What starts of one image read, in order of first touch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Profile {
    /// The layers, in the order of the image (bottom first) as far as they occur.
    pub layers: Vec<ProfileLayer>,
    /// The runs.
    pub runs: Vec<PageRun>,
}

impl Profile {
    /// A profile of runs as [`Profile::numbers`] gives them.
    ///
    /// # Errors
    /// When it has no shape or breaks a limit.
    pub fn from_numbers(layers: Vec<ProfileLayer>, numbers: &[u32]) -> Result<Self, ProfileError> {
        let (triples, rest) = numbers.as_chunks::<3>();
        if !rest.is_empty() {
            return Err(ProfileError::Ragged(numbers.len()));
        }
        let limit = |what, found: u64, most: u64| {
            if found > most { Err(ProfileError::TooMany { what, found, most }) } else { Ok(()) }
        };
        limit("layers", layers.len() as u64, MAX_LAYERS as u64)?;
        limit("runs", triples.len() as u64, MAX_RUNS as u64)?;
        let runs: Vec<PageRun> = triples
            .iter()
            .map(|[layer, first, pages]| PageRun { layer: *layer, first: *first, pages: *pages })
            .collect();
        if let Some(run) = runs.iter().position(|run| run.pages == 0 || run.layer as usize >= layers.len()) {
            return Err(ProfileError::Run { run });
        }
        let profile = Self { layers, runs };
        limit("pages", profile.pages(), MAX_PAGES)?;
        Ok(profile)
    }

    /// Its runs as numbers: layer, first page, pages; and so on.
    #[must_use]
    pub fn numbers(&self) -> Vec<u32> {
        self.runs.iter().flat_map(|run| [run.layer, run.first, run.pages]).collect()
    }

    /// Pages of all runs.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| u64::from(run.pages)).sum()
    }

    /// The same as far as its first `most` pages.
    #[must_use]
    pub fn cut(mut self, most: u64) -> Self {
        let mut left = most;
        self.runs.retain_mut(|run| {
            run.pages = run.pages.min(u32::try_from(left).unwrap_or(u32::MAX));
            left -= u64::from(run.pages);
            run.pages > 0
        });
        self
    }

    /// Whether every run lies within its layer's data; `tocs` are those of [`Profile::layers`], in order. A layer without
    /// a table is not looked at.
    #[must_use]
    pub fn fits(&self, tocs: &[Option<&Toc>]) -> bool {
        self.runs.iter().all(|run| {
            let toc = tocs.get(run.layer as usize).copied().flatten();
            toc.is_none_or(|toc| run.end() <= toc.data_size().div_ceil(PAGE_SIZE))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(name: &str) -> ProfileLayer {
        ProfileLayer { digest: Digest::of(name.as_bytes()), toc: Digest::of(b"toc") }
    }

    #[test]
    fn numbers_are_runs_and_back() {
        let numbers = [0, 5, 2, 1, 0, 1];
        let profile = Profile::from_numbers(vec![layer("a"), layer("b")], &numbers).unwrap();
        assert_eq!(profile.runs[0], PageRun { layer: 0, first: 5, pages: 2 });
        assert_eq!(profile.runs[0].data(), DataRange::new(5 * 4096, 7 * 4096));
        assert_eq!(profile.numbers(), numbers);
        assert_eq!(profile.pages(), 3);
        assert_eq!(profile.clone().cut(1).numbers(), [0, 5, 1]);
        assert_eq!(profile.clone().cut(2).numbers(), [0, 5, 2]);
        assert_eq!(profile.clone().cut(3), profile);
        assert!(profile.cut(0).runs.is_empty());
    }

    #[test]
    fn what_is_no_profile_is_refused() {
        let refused = |layers: Vec<ProfileLayer>, numbers: &[u32]| Profile::from_numbers(layers, numbers).unwrap_err();
        assert_eq!(refused(vec![layer("a")], &[0, 1]), ProfileError::Ragged(2));
        assert_eq!(refused(vec![layer("a")], &[0, 0, 1, 1, 0, 1]), ProfileError::Run { run: 1 });
        assert_eq!(refused(vec![layer("a")], &[0, 0, 0]), ProfileError::Run { run: 0 });
        assert!(matches!(refused(vec![layer("a")], &[0, 0, u32::MAX]), ProfileError::TooMany { what: "pages", .. }));
        assert!(matches!(refused(vec![layer("a"); MAX_LAYERS + 1], &[]), ProfileError::TooMany { what: "layers", .. }));
    }
}
