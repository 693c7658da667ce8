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
    /// The chunks they are fetched for, ascending. Other chunks within the spans come along.
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

/// Groups that together give all of `chunks` (ascending). Both halves of a chunk that straddles two spans are always in the
/// same group, since a decompressor that starts at the second span never sees the first half; where that would make a group
/// too long, the next group begins with the shared span once more.
///
/// # Errors
/// When the TOC is damaged.
pub fn plan(toc: &Toc, chunks: &[Chunk], bounds: Bounds) -> Result<Vec<Group>, FormatError> {
    let mut groups: Vec<Group> = Vec::new();
    for chunk in chunks {
        let Some(spans) = spans_of(toc, *chunk)? else { continue };
        if let Some(group) = groups.last_mut()
            && joins(toc, group, &spans, bounds)?
        {
            group.spans.end = group.spans.end.max(spans.end);
            group.chunks.push(*chunk);
            continue;
        }
        groups.push(Group { spans, blob: BlobRange::default(), chunks: vec![*chunk] });
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
