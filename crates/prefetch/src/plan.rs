//! From missing chunks to requests: which spans are fetched together.

use std::ops::Range;

use millstream_toc::format::{FormatError, SpanIx};
use millstream_toc::read::Chunk;
use millstream_toc::{BlobRange, DataRange, Toc};

/// Bytes of the data address space that are fetched together, from a multiple of them on, where a layer cannot be entered: its
/// neighbours come along, as they do with a span.
pub const CLOSED_BLOCK: u64 = 512 * 1024;

/// Chunks that are fetched together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// How they are fetched.
    pub way: Way,
    /// The chunks, ascending. With spans, the first and the last may need one span more, which is or was fetched by somebody
    /// else, and other chunks within the spans come along.
    pub chunks: Vec<Chunk>,
}

/// How chunks are fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// As consecutive spans, none of them closed, with one request; or, where no registry gives them, as plain content.
    Spans {
        /// The spans.
        spans: Range<SpanIx>,
        /// Their compressed bytes.
        blob: BlobRange,
    },
    /// As plain content only: a span that they need is closed.
    Content,
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

/// Chunks as they were found missing, divided by how they are fetched.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Missing {
    /// Those that come out of spans.
    pub open: Vec<Chunk>,
    /// Those that do not, because a span they need is closed.
    pub closed: Vec<Chunk>,
}

/// Divides `chunks`.
///
/// # Errors
/// When the TOC is damaged.
pub fn divide(toc: &Toc, chunks: &[Chunk]) -> Result<Missing, FormatError> {
    let mut missing = Missing::default();
    for chunk in chunks {
        let part = if toc.is_closed(chunk.data)? { &mut missing.closed } else { &mut missing.open };
        part.push(*chunk);
    }
    Ok(missing)
}

/// One group for each block in which one of `chunks` begins, which need closed spans and ascend: those of the block's chunks
/// that need them, too, and are `wanted`.
///
/// # Errors
/// When the TOC is damaged.
pub fn blocks(toc: &Toc, chunks: &[Chunk], wanted: impl Fn(&Chunk) -> bool) -> Result<Vec<Group>, FormatError> {
    let mut groups: Vec<Group> = Vec::new();
    for chunk in chunks {
        if groups.last().is_some_and(|group| group.chunks.last() >= Some(chunk)) {
            continue;
        }
        let start = chunk.data.start / CLOSED_BLOCK * CLOSED_BLOCK;
        let after = groups.last().and_then(|group| group.chunks.last()).copied();
        let mut around = Vec::new();
        for other in toc.chunks_in(DataRange::new(start, start.saturating_add(CLOSED_BLOCK)))? {
            if other == *chunk || (Some(other) > after && wanted(&other) && toc.is_closed(other.data)?) {
                around.push(other);
            }
        }
        groups.push(Group { way: Way::Content, chunks: around });
    }
    Ok(groups)
}

/// Fetches each chunk, none of which needs a closed span, with all the spans it needs.
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
    let mut joined: Vec<(Range<SpanIx>, Vec<Chunk>)> = Vec::new();
    for Need { chunk, spans } in needs {
        if let Some((so_far, chunks)) = joined.last_mut()
            && joins(toc, so_far, spans, bounds)?
        {
            so_far.end = so_far.end.max(spans.end);
            if chunks.last() != Some(chunk) {
                chunks.push(*chunk);
            }
            continue;
        }
        joined.push((spans.clone(), vec![*chunk]));
    }
    let mut groups = Vec::with_capacity(joined.len());
    for (spans, chunks) in joined {
        let (first, last) = (toc.span(spans.start)?, toc.span(spans.end.saturating_sub(1))?);
        let blob = BlobRange::new(first.blob.start, last.blob.end);
        groups.push(Group { way: Way::Spans { spans, blob }, chunks });
    }
    Ok(groups)
}

fn joins(toc: &Toc, so_far: &Range<SpanIx>, spans: &Range<SpanIx>, bounds: Bounds) -> Result<bool, FormatError> {
    if spans.start < so_far.start {
        return Ok(false);
    }
    if spans.end <= so_far.end {
        return Ok(true);
    }
    if spans.end - so_far.start > bounds.spans.max(1) {
        return Ok(false);
    }
    // Few compressed bytes can be much output.
    for between in so_far.end..spans.start {
        if toc.span(between)?.is_closed() {
            return Ok(false);
        }
    }
    let end = toc.span(so_far.end.saturating_sub(1))?.blob.end;
    Ok(toc.span(spans.start)?.blob.start.saturating_sub(end) <= bounds.gap)
}
