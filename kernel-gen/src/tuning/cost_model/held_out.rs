//! How good predictions are about problems that the model has not seen: each problem in turn is
//! left out of the fit and predicted from the others.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::{ClassModel, Observation, observations};
use crate::tuning::record::Record;

/// A class of kernels on the devices of one family.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HeldOut {
    /// [`crate::plan::KernelVariant::reduction_class`]
    pub class: String,
    /// Problems with times of others than the defaults.
    pub num_problems: usize,
    pub num_times: usize,
    /// `None` where there is only one problem, or nothing to choose from in any.
    pub scores: Option<Scores>,
}

impl HeldOut {
    /// As lines of text.
    pub fn text(&self) -> String {
        let HeldOut { class, num_problems, num_times, scores } = self;
        let mut text = format!("  {class}: {num_times} times of {num_problems} problems");
        match scores {
            None => text.push_str("; two are needed to leave one out\n"),
            Some(scores) => {
                let percent = |share: f64| format!("{:.1} %", 100.0 * share);
                text.push_str(&format!(
                    "\n    left out, {} cases: regret {} in the mean, {} at worst ({}); that of \
                     the defaults {}\n    rank correlation {:.2}, error {}\n",
                    scores.num_cases,
                    percent(scores.mean_regret),
                    percent(scores.worst_regret),
                    scores.worst_case,
                    percent(scores.default_regret),
                    scores.rank_correlation,
                    percent(scores.error)
                ));
            }
        }
        text
    }
}

/// Predictions against measurements. A case is a problem at a row count on a device; its regret is
/// by how much the kernel that is predicted to be fastest takes longer than the fastest of those
/// that were raced to the end.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scores {
    pub num_cases: usize,
    pub mean_regret: f64,
    pub worst_regret: f64,
    /// `awq_gemm_n960_k576_g64_int8 rows 8`
    pub worst_case: String,
    /// Mean regret of the defaults.
    pub default_regret: f64,
    /// Spearman's, mean over the cases with three kernels or more.
    pub rank_correlation: f64,
    /// Relative error that 68 % of the predictions do not exceed which promise a gain over the
    /// default, since on these alone is acted; 0 without any. Times have accidents, so that this
    /// says more than a mean.
    pub error: f64,
}

/// Scores of all classes of the family of the device of this key.
pub fn held_out<'a>(records: impl IntoIterator<Item = &'a Record>, device: &str) -> Vec<HeldOut> {
    let mut classes: BTreeMap<String, Vec<Observation>> = BTreeMap::new();
    for one in observations(records, device) {
        classes.entry(one.variant.reduction_class()).or_default().push(one);
    }
    let scored = classes.into_iter().map(|(class, all)| {
        let others = || all.iter().filter(|one| !one.is_default());
        let specs: BTreeSet<&str> = others().map(|one| &*one.spec).collect();
        HeldOut {
            class,
            num_problems: specs.len(),
            num_times: others().count(),
            scores: scores(&all, &specs),
        }
    });
    scored.collect()
}

/// A kernel's ratio to the default.
#[derive(Clone, Copy, Debug)]
struct Pair {
    predicted: f64,
    measured: f64,
    is_finalist: bool,
}

fn scores(all: &[Observation], specs: &BTreeSet<&str>) -> Option<Scores> {
    let mut cases: BTreeMap<(&str, usize, &str), Vec<Pair>> = BTreeMap::new();
    for spec in specs {
        let others: Vec<&Observation> = all.iter().filter(|one| one.spec != *spec).collect();
        let Some(model) = ClassModel::fit(&others) else { continue };
        for one in all.iter().filter(|one| one.spec == *spec && !one.is_default()) {
            if let Some(predicted) = model.predict(&one.variant, one.rows) {
                let case = (&*one.spec, one.rows, &*one.device);
                let (measured, is_finalist) = (one.ratio, one.is_finalist);
                let pair = Pair { predicted, measured, is_finalist };
                cases.entry(case).or_default().push(pair);
            }
        }
    }
    cases.retain(|_, pairs| pairs.len() > 1);
    Tally::of(&cases).scores()
}

/// Sums over cases.
#[derive(Default)]
struct Tally {
    num_cases: usize,
    regret: f64,
    worst: Option<(f64, String)>,
    default_regret: f64,
    num_ranked: usize,
    correlation: f64,
    /// Of what is predicted to be faster than the default.
    errors: Vec<f64>,
}

impl Tally {
    fn of(cases: &BTreeMap<(&str, usize, &str), Vec<Pair>>) -> Tally {
        let mut tally = Tally::default();
        for ((spec, rows, _), pairs) in cases {
            let finalists = pairs.iter().filter(|pair| pair.is_finalist);
            let fastest = finalists.map(|pair| pair.measured).fold(1.0, f64::min);
            // NOTE: the default is taken unless another is predicted to be faster.
            let promised = pairs.iter().filter(|pair| pair.predicted < 1.0);
            let picked = promised.min_by(|a, b| a.predicted.total_cmp(&b.predicted));
            let regret = (picked.map_or(1.0, |pair| pair.measured) / fastest - 1.0).max(0.0);
            tally.num_cases += 1;
            tally.regret += regret;
            tally.default_regret += 1.0 / fastest - 1.0;
            if tally.worst.as_ref().is_none_or(|worst| regret > worst.0) {
                tally.worst = Some((regret, format!("{spec} rows {rows}")));
            }
            if pairs.len() > 2 {
                tally.num_ranked += 1;
                tally.correlation += rank_correlation(pairs);
            }
            let promised = pairs.iter().filter(|pair| pair.predicted < 1.0);
            let error = |pair: &Pair| (pair.predicted / pair.measured).ln().abs();
            tally.errors.extend(promised.map(error));
        }
        tally
    }

    fn scores(mut self) -> Option<Scores> {
        self.errors.sort_by(f64::total_cmp);
        let error = self.errors.get((self.errors.len() as f64 * 0.68) as usize);
        let (worst_regret, worst_case) = self.worst?;
        let num_cases = self.num_cases as f64;
        Some(Scores {
            num_cases: self.num_cases,
            mean_regret: self.regret / num_cases,
            worst_regret,
            worst_case,
            default_regret: self.default_regret / num_cases,
            rank_correlation: self.correlation / self.num_ranked.max(1) as f64,
            error: error.copied().unwrap_or(0.0),
        })
    }
}

/// Spearman's: the correlation of the ranks; equal values share the mean of their ranks. 0 where
/// all of one side are equal.
fn rank_correlation(pairs: &[Pair]) -> f64 {
    let first = ranks(pairs.iter().map(|pair| pair.predicted).collect());
    let second = ranks(pairs.iter().map(|pair| pair.measured).collect());
    let mean = (pairs.len() as f64 - 1.0) / 2.0;
    let product = |a: &[f64], b: &[f64]| -> f64 {
        a.iter().zip(b).map(|(a, b)| (a - mean) * (b - mean)).sum()
    };
    let spread = (product(&first, &first) * product(&second, &second)).sqrt();
    if spread > 0.0 { product(&first, &second) / spread } else { 0.0 }
}

fn ranks(values: Vec<f64>) -> Vec<f64> {
    let rank = |value: &f64| {
        let num_below = values.iter().filter(|other| *other < value).count();
        let num_equal = values.iter().filter(|other| *other == value).count();
        num_below as f64 + (num_equal as f64 - 1.0) / 2.0
    };
    values.iter().map(rank).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(all: &[(f64, f64)]) -> Vec<Pair> {
        let pair = |(predicted, measured): &(f64, f64)| Pair {
            predicted: *predicted,
            measured: *measured,
            is_finalist: true,
        };
        all.iter().map(pair).collect()
    }

    #[test]
    fn ranks_are_correlated() {
        let check = |all: &[(f64, f64)], expected: f64| {
            assert!((rank_correlation(&pairs(all)) - expected).abs() < 1e-12, "{all:?}");
        };
        check(&[(1.0, 10.0), (2.0, 20.0), (3.0, 90.0)], 1.0);
        check(&[(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)], -1.0);
        check(&[(1.0, 3.0), (2.0, 3.0), (3.0, 3.0)], 0.0);
        check(&[(1.0, 1.0), (2.0, 3.0), (3.0, 2.0)], 0.5);
        assert_eq!(ranks(vec![5.0, 1.0, 5.0, 9.0]), [1.5, 0.0, 1.5, 3.0]);
    }

    #[test]
    fn regret_is_that_of_the_kernel_predicted_to_be_fastest() {
        let mut cases = BTreeMap::new();
        cases.insert(("a", 1, "d"), pairs(&[(0.5, 0.8), (0.6, 0.4)]));
        cases.insert(("a", 2, "d"), pairs(&[(1.5, 0.8), (1.6, 1.4)]));
        // Lucky, and out early.
        let lucky = Pair { predicted: 2.0, measured: 0.1, is_finalist: false };
        cases.get_mut(&("a", 2, "d")).unwrap().push(lucky);
        let scores = Tally::of(&cases).scores().unwrap();
        assert_eq!((scores.num_cases, &*scores.worst_case), (2, "a rows 1"));
        assert!((scores.worst_regret - 1.0).abs() < 1e-12);
        assert!((scores.mean_regret - 0.625).abs() < 1e-12);
        assert!((scores.default_regret - 0.875).abs() < 1e-12);
        assert!((scores.error - (0.8_f64 / 0.5).ln()).abs() < 1e-12, "the larger of two");
        assert_eq!(Tally::default().scores(), None);
    }
}
