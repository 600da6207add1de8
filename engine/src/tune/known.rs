//! What races so far have shown about the kernels of one matmul.

use std::collections::{BTreeMap, BTreeSet};

use bespoke_kernel_gen::tuning::record::{Case, Record, SAMPLES_MIN};

use super::race::{RaceOptions, median};
use crate::kernels::Kernel;

/// Ratios to the default's time, by index of the kernel and row count.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Known {
    /// Of races that a choice may rest on.
    ratios: BTreeMap<(usize, usize), Vec<f64>>,
    /// Of kernels that dropped out early.
    dropped: BTreeMap<(usize, usize), f64>,
}

impl Known {
    pub(super) fn new(records: &[Record], spec: &str, kernels: &[&Kernel]) -> Known {
        let mut known = Known::default();
        let of_spec = records.iter().filter(|record| record.problem.spec == spec);
        for record in of_spec {
            let (Some(time), Case::Rows(rows)) = (record.time(), record.problem.case) else {
                continue;
            };
            let is_own = |kernel: &&Kernel| kernel.symbol == record.variant.symbol;
            if let Some(kernel) = kernels.iter().position(is_own) {
                known.add((kernel, rows), time.vs_default, time.num_samples);
            }
        }
        known
    }

    fn add(&mut self, key: (usize, usize), ratio: f64, num_samples: usize) {
        if num_samples >= SAMPLES_MIN {
            self.ratios.entry(key).or_default().push(ratio);
        } else {
            self.dropped.insert(key, ratio);
        }
    }

    /// The median of a kernel's ratios, once it has run in so many passes or dropped out.
    pub(super) fn ratio(&self, kernel: usize, rows: usize, num_passes: usize) -> Option<f64> {
        let key = (kernel, rows);
        let ratios = self.ratios.get(&key).filter(|ratios| ratios.len() >= num_passes);
        ratios.and_then(|ratios| median(ratios)).or_else(|| self.dropped.get(&key).copied())
    }

    /// Kernels and row counts that are worth another pass: the fastest at each, and everywhere
    /// those that are ahead somewhere.
    pub(super) fn finalists(&self, options: &RaceOptions) -> BTreeSet<(usize, usize)> {
        let mut by_rows: BTreeMap<usize, Vec<(f64, usize)>> = BTreeMap::new();
        for ((kernel, rows), ratios) in &self.ratios {
            by_rows.entry(*rows).or_default().extend(median(ratios).map(|ratio| (ratio, *kernel)));
        }
        let (mut finalists, mut ahead) = (BTreeSet::new(), BTreeSet::new());
        for (rows, all) in &mut by_rows {
            all.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            finalists.extend(all.iter().take(options.num_finalists).map(|one| (one.1, *rows)));
            if options.first_rows.contains(rows) {
                ahead.extend(all.iter().take(options.num_survivors).map(|one| one.1));
            }
        }
        let everywhere = self.ratios.keys().copied().filter(|(kernel, _)| ahead.contains(kernel));
        finalists.extend(everywhere);
        finalists
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Known {
        let mut known = Known::default();
        for (kernel, rows, ratio) in
            [(0, 1, 1.0), (1, 1, 0.8), (2, 1, 0.9), (3, 1, 0.7), (1, 64, 1.2), (3, 64, 1.1)]
        {
            known.add((kernel, rows), ratio, SAMPLES_MIN);
        }
        known.add((3, 1), 0.95, SAMPLES_MIN);
        known.add((3, 1), 0.99, SAMPLES_MIN);
        known.add((4, 1), 0.5, SAMPLES_MIN - 1);
        known
    }

    #[test]
    fn races_of_several_passes_count_by_their_median() {
        let known = known();
        assert_eq!(known.ratio(3, 1, 1), Some(0.95));
        assert_eq!(known.ratio(3, 1, 3), Some(0.95));
        assert_eq!(known.ratio(3, 1, 4), None, "it takes part in the fourth pass");
        assert_eq!(known.ratio(1, 1, 2), None);
        assert_eq!(known.ratio(4, 1, 4), Some(0.5), "who dropped out is out");
        assert_eq!(known.ratio(9, 1, 1), None);
    }

    #[test]
    fn the_fastest_run_again_and_everywhere() {
        let options = RaceOptions {
            first_rows: vec![1],
            num_finalists: 2,
            num_survivors: 1,
            ..RaceOptions::default()
        };
        let finalists: Vec<_> = known().finalists(&options).into_iter().collect();
        // Kernel 1 is ahead at one row, kernel 2 second; at 64 rows both are there.
        assert_eq!(finalists, [(1, 1), (1, 64), (2, 1), (3, 64)]);
    }
}
