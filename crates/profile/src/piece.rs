//! What travels for a run of pages: for each chunk that it touches, which of its pages.

use millstream_toc::read::Chunk;
use millstream_toc::{DataRange, FormatError, Toc};

use crate::proof::Mask;
use crate::run::PageRun;

/// The chunks that `run` touches, ascending, each with those of its pages that the run has. What lies between files belongs to no
/// chunk, and a chunk that is wholly a hole needs nothing: both are left out, and so is what lies behind the end of the data.
///
/// # Errors
/// When the table is damaged.
pub fn pieces(run: &PageRun, toc: &Toc) -> Result<Vec<(Chunk, Mask)>, FormatError> {
    let data = run.data();
    let range = DataRange::new(data.start.min(toc.data_size()), data.end.min(toc.data_size()));
    let mut pieces = Vec::new();
    for chunk in toc.chunks_in(range)? {
        let mask = chunk.pages(range);
        if mask != 0 && !toc.is_hole(chunk.ix)? {
            pieces.push((chunk, mask));
        }
    }
    Ok(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proof::{prove, verify};
    use crate::run::{PAGE_SIZE, Profile, ProfileLayer};
    use crate::samples::{sample, sparse};
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn run(first: u32, pages: u32) -> PageRun {
        PageRun { layer: 0, first, pages }
    }

    #[test]
    fn the_pages_of_each_chunk_and_nothing_between_files() {
        // Pages: a 0..3, b 3..28 in chunks of 8, c 28.
        let toc = sample(&[("a", 9000), ("b", 100_000), ("c", 1)]).toc;
        let found =
            |run| pieces(&run, &toc).unwrap().into_iter().map(|(chunk, mask)| (chunk.ix, mask)).collect::<Vec<_>>();
        assert_eq!(found(run(2, 1)), [(0, 0b100)]);
        assert_eq!(found(run(2, 4)), [(0, 0b100), (1, 0b111)]);
        assert_eq!(found(run(4, 9)), [(1, 0b1111_1110), (2, 0b11)]);
        assert_eq!(found(run(27, 500)), [(4, 1), (5, 1)], "what is behind the end is nothing");
        assert_eq!(found(run(u32::MAX, u32::MAX)), []);
    }

    #[test]
    fn holes_need_nothing() {
        let toc = sparse("holes", 1 << 20, 300_000, &[7; 100]);
        let all = pieces(&run(0, 256), &toc).unwrap();
        let stored = 300_000 / millstream_toc::CHUNK_SIZE;
        assert_eq!(all.iter().map(|(chunk, mask)| (u64::from(chunk.ix), *mask)).collect::<Vec<_>>(), [(stored, 0xff)]);
        assert_eq!(pieces(&run(0, 8), &toc).unwrap(), []);
        // A page of zeros in a chunk that has some bytes travels like any other.
        let hole = u32::try_from(stored * 8).unwrap();
        assert_eq!(pieces(&run(hole, 1), &toc).unwrap().len(), 1);
    }

    proptest! {
        #[test]
        fn what_travels_is_what_the_runs_name(numbers in proptest::collection::vec((0u32..50, 1u32..60), 0..20)) {
            let sample = sample(&[("a", 9000), ("b", 100_000), ("c", 1), ("d", 32_768), ("e", 40_000)]);
            for (first, pages) in numbers {
                let run = run(first, pages);
                let mut seen = BTreeSet::new();
                for (chunk, mask) in pieces(&run, &sample.toc).unwrap() {
                    let (name, bytes) =
                        sample.files.iter().find(|(name, _)| sample.place(name).contains(&chunk.data)).unwrap();
                    let at = |offset: u64| usize::try_from(offset - sample.place(name).start).unwrap();
                    let bytes = &bytes[at(chunk.data.start)..at(chunk.data.end)];
                    let mut proof = Vec::new();
                    prove(bytes, mask, &mut proof);
                    let digest = sample.toc.chunk_digest(chunk.ix).unwrap();
                    verify(chunk.data.len(), mask, &digest, &proof, |start, pages| {
                        for page in 0..(pages.len() as u64).div_ceil(PAGE_SIZE) {
                            assert!(seen.insert((chunk.data.start + start) / PAGE_SIZE + page), "once");
                        }
                    }).unwrap();
                }
                let end = run.end().min(sample.toc.data_size() / PAGE_SIZE);
                prop_assert!(seen.into_iter().eq(u64::from(first)..end.max(u64::from(first))));
            }
        }

        #[test]
        fn numbers_from_anybody_do_no_harm(numbers in proptest::collection::vec(any::<u32>(), 0..12)) {
            let toc = sample(&[("a", 9000), ("b", 100_000)]).toc;
            let layer = ProfileLayer { digest: toc.blob_digest(), toc: toc.digest() };
            let Ok(profile) = Profile::from_numbers(vec![layer], &numbers) else { return Ok(()) };
            let fits = profile.fits(&[Some(&toc)]);
            for run in &profile.runs {
                let pages: u32 = pieces(run, &toc).unwrap().iter().map(|(_, mask)| mask.count_ones()).sum();
                prop_assert!(pages <= run.pages && (!fits || pages == run.pages));
            }
        }
    }
}
