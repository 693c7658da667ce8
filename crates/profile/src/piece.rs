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
