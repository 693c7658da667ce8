//! What to fetch after a read, before anybody asks for it.

use std::collections::VecDeque;

use millstream_toc::DataRange;
use millstream_toc::format::ContentIx;

/// Files whose reads are remembered for one layer.
const REMEMBERED: usize = 64;

/// Where files of one layer were read last.
#[derive(Debug, Default)]
pub(crate) struct RecentReads(VecDeque<(ContentIx, u64)>);

impl RecentReads {
    /// Remembers a read of `range` of content `ix`; `true` if it goes on where the last one ended.
    fn record(&mut self, ix: ContentIx, range: DataRange) -> bool {
        let before = self.0.iter().position(|(content, _)| *content == ix).and_then(|at| self.0.remove(at));
        if self.0.len() >= REMEMBERED {
            self.0.pop_front();
        }
        self.0.push_back((ix, range.end));
        before.is_some_and(|(_, end)| end == range.start)
    }

    /// What to fetch after `range` of `content` was read: all of a small file, the next `read_ahead` bytes of one that is
    /// read in order, else nothing.
    pub(crate) fn after(
        &mut self,
        ix: ContentIx,
        content: DataRange,
        range: DataRange,
        small_file: u64,
        read_ahead: u64,
    ) -> Option<DataRange> {
        let in_order = self.record(ix, range);
        let wanted = if content.len() <= small_file {
            content
        } else if in_order {
            DataRange::with_len(range.end, read_ahead)
        } else {
            return None;
        };
        content.intersect(&wanted)
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
    fn memory_is_bounded() {
        let mut reads = RecentReads::default();
        for ix in 0..1000 {
            reads.after(ix, DataRange::new(0, 10), DataRange::new(0, 1), 0, 1);
        }
        assert_eq!(reads.0.len(), REMEMBERED);
    }
}
