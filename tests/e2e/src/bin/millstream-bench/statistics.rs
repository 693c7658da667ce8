//! Medians, and ratios of paired runs with an interval of confidence.

use serde::{Deserialize, Serialize};

/// Times that the pairs are drawn anew.
const DRAWS: usize = 2000;
/// Share of the draws that lies below the interval, and above it.
const TAIL: f64 = 0.025;

/// Median of the ratios of pairs, with the interval that holds it with 95 % confidence.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Ratio {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
    pub(crate) pairs: usize,
}

/// The median; none of nothing.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        length if length % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// The geometric mean; none of nothing, or where one is not positive.
pub(crate) fn geometric_mean(values: &[f64]) -> Option<f64> {
    let sound = !values.is_empty() && values.iter().all(|value| *value > 0.0 && value.is_finite());
    sound.then(|| (values.iter().map(|value| value.ln()).sum::<f64>() / values.len() as f64).exp())
}

/// The ratio of the first to the second of each pair.
pub(crate) fn ratio(pairs: &[(f64, f64)]) -> Option<Ratio> {
    let ratios: Vec<f64> = pairs.iter().filter(|(_, below)| *below > 0.0).map(|(above, below)| above / below).collect();
    let middle = median(&ratios)?;
    let (low, high) = interval(&ratios);
    Some(Ratio { median: middle, low, high, pairs: ratios.len() })
}

/// Bootstrap of the median. The draws are the same each time, so that a report is.
fn interval(values: &[f64]) -> (f64, f64) {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut medians: Vec<f64> = (0..DRAWS)
        .filter_map(|_| {
            let drawn: Vec<f64> = values.iter().map(|_| values[random.below(values.len())]).collect();
            median(&drawn)
        })
        .collect();
    medians.sort_by(f64::total_cmp);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let cut = (medians.len() as f64 * TAIL) as usize;
    (medians[cut], medians[medians.len() - 1 - cut])
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let mixed = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(mixed % (limit as u64)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::float_cmp)]
    use super::*;

    #[test]
    fn medians_and_means_of_few_values() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert!((geometric_mean(&[1.0, 4.0]).unwrap() - 2.0).abs() < 1e-12);
        assert_eq!(geometric_mean(&[1.0, 0.0]), None);
        assert_eq!(geometric_mean(&[]), None);
    }

    #[test]
    fn the_interval_holds_the_median_and_narrows_to_it_where_all_pairs_agree() {
        let pairs: Vec<(f64, f64)> = (1..=9).map(|n| (f64::from(n), 10.0)).collect();
        let found = ratio(&pairs).unwrap();
        assert_eq!((found.median, found.pairs), (0.5, 9));
        assert!(found.low < 0.5 && found.low >= 0.1, "{found:?}");
        assert!(found.high > 0.5 && found.high <= 0.9, "{found:?}");
        assert_eq!(ratio(&pairs), Some(found), "the same draws each time");
        let same = ratio(&[(1.0, 2.0); 5]).unwrap();
        assert_eq!((same.low, same.high), (0.5, 0.5));
        assert_eq!(ratio(&[(1.0, 0.0)]), None);
    }

    #[test]
    fn pairs_are_compared_one_by_one_and_not_as_two_heaps() {
        // The machine was slow in one round, for both alike.
        let found = ratio(&[(1.0, 2.0), (10.0, 20.0), (1.1, 2.2)]).unwrap();
        assert!((found.low - 0.5).abs() < 1e-12 && (found.high - 0.5).abs() < 1e-12, "{found:?}");
    }
}
