//! Measured times and their percentiles.

use serde::Serialize;

use crate::cli::generate::round;
use crate::sampling::uniform;

/// Values that are kept: 8 MB. A longer measurement keeps a fair choice of all it saw.
const KEPT_MAX: usize = 1 << 20;

/// A sample of times in milliseconds.
#[derive(Clone, Debug)]
pub(super) struct Samples {
    kept_max: usize,
    kept: Vec<f64>,
    num_seen: u64,
    sum: f64,
    min: f64,
    max: f64,
}

/// What a sample says, in milliseconds; all null where nothing was measured.
///
/// The percentiles are values that were measured (nearest rank).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Summary {
    pub(super) mean: Option<f64>,
    pub(super) min: Option<f64>,
    pub(super) max: Option<f64>,
    pub(super) p50: Option<f64>,
    pub(super) p75: Option<f64>,
    pub(super) p95: Option<f64>,
    pub(super) p99: Option<f64>,
}

impl Default for Samples {
    fn default() -> Samples {
        Samples::keeping(KEPT_MAX)
    }
}

impl Samples {
    fn keeping(kept_max: usize) -> Samples {
        let (min, max) = (f64::INFINITY, f64::NEG_INFINITY);
        Samples { kept_max, kept: Vec::new(), num_seen: 0, sum: 0.0, min, max }
    }

    /// Adds a value; the percentiles see it with the same probability as any other (algorithm R,
    /// Vitter 1985).
    pub(super) fn push(&mut self, value: f64) {
        self.num_seen += 1;
        self.sum += value;
        self.min = self.min.min(value);
        self.max = self.max.max(value);
        if self.kept.len() < self.kept_max {
            return self.kept.push(value);
        }
        let place = (uniform(0, self.num_seen) * self.num_seen as f64) as usize;
        if let Some(kept) = self.kept.get_mut(place) {
            *kept = value;
        }
    }

    pub(super) fn summary(&self) -> Summary {
        let mut sorted = self.kept.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let is_any = !sorted.is_empty();
        let percentile = |percent| percentile(&sorted, percent).map(round);
        Summary {
            mean: is_any.then(|| round(self.sum / self.num_seen as f64)),
            min: is_any.then(|| round(self.min)),
            max: is_any.then(|| round(self.max)),
            p50: percentile(50),
            p75: percentile(75),
            p95: percentile(95),
            p99: percentile(99),
        }
    }
}

/// The smallest value that at least `percent` of a hundred values do not exceed (nearest rank);
/// `None` of no values.
fn percentile(sorted: &[f64], percent: usize) -> Option<f64> {
    let rank = (percent * sorted.len()).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let check = |values: &[f64], percent, expected| {
            assert_eq!(percentile(values, percent), expected, "{values:?} {percent}");
        };
        check(&[], 50, None);
        check(&[7.0], 1, Some(7.0));
        check(&[7.0], 99, Some(7.0));
        check(&[1.0, 2.0], 50, Some(1.0));
        check(&[1.0, 2.0], 51, Some(2.0));
        let five = [15.0, 20.0, 35.0, 40.0, 50.0];
        check(&five, 0, Some(15.0));
        check(&five, 30, Some(20.0));
        check(&five, 40, Some(20.0));
        check(&five, 50, Some(35.0));
        check(&five, 100, Some(50.0));
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        check(&hundred, 99, Some(99.0));
    }

    #[test]
    fn summarizes() {
        assert_eq!(Samples::default().summary(), Summary::default());
        let mut samples = Samples::default();
        [3.0, 1.0, 2.0, 10.0].into_iter().for_each(|value| samples.push(value));
        let summary = samples.summary();
        assert_eq!((summary.min, summary.max), (Some(1.0), Some(10.0)));
        assert_eq!((summary.mean, summary.p50), (Some(4.0), Some(2.0)));
        assert_eq!((summary.p75, summary.p99), (Some(3.0), Some(10.0)));
    }

    #[test]
    fn keeps_a_bounded_fair_choice() {
        let mut samples = Samples::keeping(1000);
        (0..100_000).for_each(|value| samples.push(f64::from(value)));
        assert_eq!(samples.kept.len(), 1000);
        let summary = samples.summary();
        assert_eq!((summary.min, summary.max), (Some(0.0), Some(99_999.0)));
        assert_eq!(summary.mean, Some(49_999.5));
        // The median of 1000 fair values lies within 4 σ = 4 · 100000 / (2 · √1000) of the middle.
        let median = summary.p50.unwrap();
        assert!((median - 50_000.0).abs() < 6400.0, "{median}");
    }
}
