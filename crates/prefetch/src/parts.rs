//! Into which parts a blob is cut for its hydration.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use millstream_toc::BlobRange;

/// Sizes of consecutive parts in eighths of the largest. Parts of one size that begin together share the line and end together,
/// and then the line is idle for a round trip until the next ones come: a ninth of the time with four of 512 KiB at 100 Mbit/s
/// and 20 ms. What differs in size ends one after the other.
const EIGHTHS: [u64; 5] = [4, 7, 5, 8, 6];

/// A blob of `size` bytes in parts, in order. `largest` is asked for each part how many bytes it may have at most.
pub fn of_blob(size: u64, mut largest: impl FnMut() -> u64) -> impl Iterator<Item = BlobRange> {
    let mut start = 0;
    EIGHTHS.iter().cycle().map_while(move |eighths| {
        if start == size {
            return None;
        }
        let end = size.min(start + (largest().saturating_mul(*eighths) / 8).max(1));
        let part = BlobRange::new(start, end);
        start = end;
        Some(part)
    })
}

/// How large a part may be: what takes about as long as is wanted, as the last ones came.
#[derive(Debug)]
pub struct PartSize {
    least: u64,
    most: u64,
    time: Duration,
    now: AtomicU64,
}

impl PartSize {
    /// Begins with the least; `time` is how long a part should take.
    #[must_use]
    pub const fn new(least: u64, most: u64, time: Duration) -> Self {
        Self { least, most, time, now: AtomicU64::new(least) }
    }

    /// Bytes that a part may have now.
    #[must_use]
    pub fn largest(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }

    /// A request for so many bytes took so long. What is smaller than any part should be says more of the round trip than of
    /// the line.
    pub fn took(&self, bytes: u64, time: Duration) {
        if bytes < self.least / 2 {
            return;
        }
        let fitting = u128::from(bytes) * self.time.as_nanos() / time.as_nanos().max(1);
        let fitting = u64::try_from(fitting).unwrap_or(u64::MAX).clamp(self.least, self.most.max(self.least));
        // Half of the way, so that one request that was lucky does not decide. Of two that end together one may go unnoticed.
        self.now.store(u64::midpoint(self.largest(), fitting), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn parts_are_the_whole_blob_and_none_is_too_large(size in 0u64..100_000, largest in 1u64..40_000) {
            let mut next = 0;
            for part in of_blob(size, || largest) {
                prop_assert!(part.start == next && part.end > next && part.len() <= largest);
                next = part.end;
            }
            prop_assert_eq!(next, size);
        }
    }

    #[test]
    fn a_bound_of_nothing_is_a_byte() {
        assert_eq!(of_blob(3, || 0).count(), 3);
    }

    #[test]
    fn parts_grow_with_the_line_and_shrink_with_it() {
        let ms = Duration::from_millis;
        let size = PartSize::new(500, 4000, ms(250));
        assert_eq!(size.largest(), 500);
        // Of the time that is wanted.
        size.took(500, ms(250));
        assert_eq!(size.largest(), 500);
        for _ in 0..20 {
            size.took(1000, ms(125));
        }
        assert!((1990..=2000).contains(&size.largest()), "{}", size.largest());
        // Too small to tell.
        size.took(249, ms(1000));
        assert!(size.largest() >= 1990);
        size.took(500, ms(0));
        size.took(500, ms(0));
        size.took(500, ms(0));
        assert!((3000..=4000).contains(&size.largest()), "{}", size.largest());
        for _ in 0..20 {
            size.took(4000, ms(60_000));
        }
        assert!((500..=501).contains(&size.largest()), "{}", size.largest());
    }
}
