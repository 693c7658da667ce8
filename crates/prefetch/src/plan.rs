//! From missing chunks to requests: which spans are fetched together.

use std::ops::Range;

use millstream_toc::format::{FormatError, SpanIx};
use millstream_toc::read::Chunk;
use millstream_toc::{BlobRange, Toc};

/// Consecutive spans that are fetched with one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// The spans.
    pub spans: Range<SpanIx>,
    /// Their compressed bytes.
    pub blob: BlobRange,
    /// The chunks they are fetched for, ascending; the first and the last may need one span more, which is or was fetched
    /// by somebody else. Other chunks within the spans come along.
    pub chunks: Vec<Chunk>,
}

/// How large a group may become.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Spans of one group; more only when a single chunk needs more.
    pub spans: u32,
    /// Compressed bytes between two groups that are fetched in vain to make them one.
    pub gap: u64,
}

/// The spans a chunk needs, gaps included; `None` when it needs none.
///
/// # Errors
/// When the TOC is damaged.
pub fn spans_of(toc: &Toc, chunk: Chunk) -> Result<Option<Range<SpanIx>>, FormatError> {
    let spans = toc.spans_for(chunk.data)?;
    Ok(spans.first().zip(spans.last()).map(|(first, last)| *first..last.saturating_add(1)))
}

/// Spans that are fetched for a chunk: all it needs, with one request; or one of two whose halves are then joined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    /// The chunk.
    pub chunk: Chunk,
    /// The spans.
    pub spans: Range<SpanIx>,
}

/// Fetches each chunk with all the spans it needs.
///
/// # Errors
/// When the TOC is damaged.
pub fn whole(toc: &Toc, chunks: &[Chunk]) -> Result<Vec<Need>, FormatError> {
    let mut needs = Vec::with_capacity(chunks.len());
    for chunk in chunks {
        needs.extend(spans_of(toc, *chunk)?.map(|spans| Need { chunk: *chunk, spans }));
    }
    Ok(needs)
}

/// Whether a chunk that needs `spans` can be joined from two halves that came with different requests. Sparse files are
/// not worth the trouble.
///
/// # Errors
/// When the TOC is damaged.
pub fn has_halves(toc: &Toc, chunk: Chunk, spans: &Range<SpanIx>) -> Result<bool, FormatError> {
    if spans.len() != 2 {
        return Ok(false);
    }
    let content = toc.content(toc.content_of_chunk(chunk.ix)?)?;
    Ok(toc.extents(&content)?.is_none())
}

/// Groups that together give all of `needs`, which ascend. The spans of one need are always in the same group; where that
/// would make a group too long, the next group begins with the shared span once more.
///
/// # Errors
/// When the TOC is damaged.
pub fn plan(toc: &Toc, needs: &[Need], bounds: Bounds) -> Result<Vec<Group>, FormatError> {
    let mut groups: Vec<Group> = Vec::new();
    for Need { chunk, spans } in needs {
        if let Some(group) = groups.last_mut()
            && joins(toc, group, spans, bounds)?
        {
            group.spans.end = group.spans.end.max(spans.end);
            if group.chunks.last() != Some(chunk) {
                group.chunks.push(*chunk);
            }
            continue;
        }
        groups.push(Group { spans: spans.clone(), blob: BlobRange::default(), chunks: vec![*chunk] });
    }
    for group in &mut groups {
        let (first, last) = (toc.span(group.spans.start)?, toc.span(group.spans.end.saturating_sub(1))?);
        group.blob = BlobRange::new(first.blob.start, last.blob.end);
    }
    Ok(groups)
}

fn joins(toc: &Toc, group: &Group, spans: &Range<SpanIx>, bounds: Bounds) -> Result<bool, FormatError> {
    if spans.start < group.spans.start {
        return Ok(false);
    }
    if spans.end <= group.spans.end {
        return Ok(true);
    }
    if spans.end - group.spans.start > bounds.spans.max(1) {
        return Ok(false);
    }
    let end = toc.span(group.spans.end.saturating_sub(1))?.blob.end;
    Ok(toc.span(spans.start)?.blob.start.saturating_sub(end) <= bounds.gap)
}
