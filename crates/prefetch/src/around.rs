//! What to fetch after a read, before anybody asks for it.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;

use millstream_toc::DataRange;
use millstream_toc::format::{ContentIx, SpanIx};

/// Files whose reads are remembered for one layer.
const REMEMBERED: usize = 64;

/// Where files of one layer were read last.
#[derive(Debug, Default)]
pub(crate) struct RecentReads(VecDeque<Recent>);

#[derive(Debug, Clone, Copy)]
struct Recent {
    content: ContentIx,
    /// End of the last read.
    end: u64,
    /// How far was fetched ahead of the reads that followed each other until now.
    ahead: u64,
}

impl RecentReads {
    /// What to fetch after `range` of `content` was read: all of a small file, the next `read_ahead` bytes of one that is
    /// read in order, else nothing. The next bytes are asked for when half of the last ones was read, not with every read:
    /// each request begins with the span that the one before it ended in, if a chunk lies across the border.
    pub(crate) fn after(
        &mut self,
        ix: ContentIx,
        content: DataRange,
        range: DataRange,
        small_file: u64,
        read_ahead: u64,
    ) -> Option<DataRange> {
        let before = self.0.iter().position(|recent| recent.content == ix).and_then(|at| self.0.remove(at));
        let in_order = before.filter(|recent| recent.end == range.start);
        let mut ahead = in_order.map_or(range.end, |recent| recent.ahead.max(range.end));
        let wanted = if content.len() <= small_file {
            Some(content)
        } else if in_order.is_some() && ahead - range.end <= read_ahead / 2 {
            ahead = range.end.saturating_add(read_ahead);
            Some(DataRange::new(range.end, ahead))
        } else {
            None
        };
        if self.0.len() >= REMEMBERED {
            self.0.pop_front();
        }
        self.0.push_back(Recent { content: ix, end: range.end, ahead });
        content.intersect(&wanted?)
    }
}

/// Spans of one layer that were fetched for readers or ahead of them; at most all spans of it.
#[derive(Debug, Default)]
pub(crate) struct Fetched(BTreeSet<SpanIx>);

impl Fetched {
    /// Notes that `spans` are being fetched.
    pub(crate) fn note(&mut self, spans: &Range<SpanIx>) {
        self.0.extend(spans.clone());
    }

    /// Where a reader's request for `spans` should end: after up to `most` further spans that were not fetched before, if
    /// at least `enough` of the `near` spans on either side were. Programs that start read small files all over a few
    /// parts of a layer.
    pub(crate) fn read_on(&self, spans: &Range<SpanIx>, near: u32, enough: usize, most: u32) -> SpanIx {
        let before = self.0.range(spans.start.saturating_sub(near)..spans.start).count();
        let after = self.0.range(spans.end..spans.end.saturating_add(near)).count();
        let limit = if before + after >= enough { spans.end.saturating_add(most) } else { spans.end };
        self.0.range(spans.end..limit).next().map_or(limit, |fetched| *fetched)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_files_come_whole_and_large_ones_when_read_in_order() {
        let mut reads = RecentReads::default();
        let small = DataRange::new(4096, 8000);
        assert_eq!(reads.after(0, small, DataRange::new(4096, 5000), 4000, 100), Some(small));
        let large = DataRange::new(8192, 100_000);
        assert_eq!(reads.after(1, large, DataRange::new(9000, 9100), 4000, 100), None);
        assert_eq!(reads.after(1, large, DataRange::new(9100, 9200), 4000, 100), Some(DataRange::new(9200, 9300)));
        assert_eq!(reads.after(1, large, DataRange::new(50_000, 50_010), 4000, 100), None);
        assert_eq!(
            reads.after(1, large, DataRange::new(50_010, 99_990), 4000, 100),
            Some(DataRange::new(99_990, 100_000))
        );
        assert_eq!(reads.after(1, large, DataRange::new(99_990, 100_000), 4000, 100), None);
        assert_eq!(reads.after(0, small, small, 0, 0), None);
    }

    #[test]
    fn the_next_bytes_are_asked_for_when_half_of_the_last_ones_was_read() {
        let mut reads = RecentReads::default();
        let content = DataRange::new(0, 10_000);
        let mut after = |start| reads.after(0, content, DataRange::with_len(start, 100), 0, 1000);
        assert_eq!(after(0), None);
        assert_eq!(after(100), Some(DataRange::new(200, 1200)));
        for start in (200..600).step_by(100) {
            assert_eq!(after(start), None, "{start}");
        }
        assert_eq!(after(600), Some(DataRange::new(700, 1700)));
        // Elsewhere, it begins anew.
        assert_eq!(after(5000), None);
        assert_eq!(after(5100), Some(DataRange::new(5200, 6200)));
    }

    #[test]
    fn memory_is_bounded() {
        let mut reads = RecentReads::default();
        for ix in 0..1000 {
            reads.after(ix, DataRange::new(0, 10), DataRange::new(0, 1), 0, 1);
        }
        assert_eq!(reads.0.len(), REMEMBERED);
    }
}
