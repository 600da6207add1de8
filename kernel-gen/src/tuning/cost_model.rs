//! A cost model: how long a kernel takes beside the default, from the times of other kernels and
//! other problems of one family of devices.
//!
//! One model for each class of kernels ([`KernelVariant::reduction_class`]): a ridge regression
//! (Hoerl and Kennard 1970) of the logarithm of the paired ratios on the differences between the
//! features of a kernel and those of the default that it was raced against. So the default's
//! prediction is 1 by construction, and what depends on the problem alone cancels out.

mod features;
mod held_out;
mod ridge;

use std::collections::{BTreeMap, BTreeSet};

use super::distance::distance;
use super::record::{Case, Record, SAMPLES_MIN};
use crate::plan::{KernelVariant, Serving};
use crate::spec::{KernelSpec, RowRegime};
use features::Setting;
use ridge::{Ridge, Sample};

pub use held_out::{HeldOut, held_out};

/// Problems of a class that a prediction for another problem rests on at least.
pub const NUM_PROBLEMS_MIN: usize = 3;
/// Times of a class, beside the defaults', that any prediction rests on at least.
pub const NUM_TIMES_MIN: usize = 60;

/// Ratios beyond this, either way, are accidents; they count as this.
const RATIO_MAX: f64 = 3.0;
/// Relative error of a time beside what its noise says: kernels of one row count have things in
/// common that no feature knows.
const ERROR_MIN: f64 = 0.03;
/// Samples of a time that the records' noise is that of.
const NOISE_SAMPLES: f64 = 9.0;

/// Predictions for the devices of one family.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CostModel {
    /// By reduction class.
    classes: BTreeMap<String, ClassModel>,
}

#[derive(Clone, Debug, PartialEq)]
struct ClassModel {
    ridge: Ridge,
    setting: Setting,
    num_times: usize,
    /// By row regime and spec: the least and the largest row count of a kernel beside the default.
    ranges: BTreeMap<(RowRegime, String), (usize, usize)>,
    rows: BTreeSet<usize>,
}

impl CostModel {
    /// Fitted to all times of the family of the device of this key; the same records in any order
    /// give the same model. Which records still hold is the caller's business.
    pub fn fit<'a>(records: impl IntoIterator<Item = &'a Record>, device: &str) -> CostModel {
        let mut classes: BTreeMap<String, Vec<Observation>> = BTreeMap::new();
        for one in observations(records, device) {
            classes.entry(one.variant.reduction_class()).or_default().push(one);
        }
        let fitted = classes.into_iter().filter_map(|(class, all)| {
            let all: Vec<&Observation> = all.iter().collect();
            Some((class, ClassModel::fit(&all)?))
        });
        CostModel { classes: fitted.collect() }
    }

    /// The time of `variant` at so many rows as a share of the default's; below 1 is faster. `None`
    /// where the records say too little about its class: for all of a spec's kernels or none.
    pub fn predict(&self, variant: &KernelVariant, rows: usize) -> Option<f64> {
        let class = self.classes.get(&variant.reduction_class())?;
        (class.num_times >= NUM_TIMES_MIN).then(|| class.predict(variant, rows))?
    }

    /// The row counts at which kernels of the class of `variant` were measured, ascending.
    pub fn rows(&self, variant: &KernelVariant) -> Vec<usize> {
        let class = self.classes.get(&variant.reduction_class());
        class.map_or(Vec::new(), |class| class.rows.iter().copied().collect())
    }

    /// Whether enough problems beside `spec` were measured for a prediction about it: at this row
    /// count or at some below and above, and with kernels of the row regime of `variant`.
    pub fn is_grounded(&self, variant: &KernelVariant, rows: usize, spec: &str) -> bool {
        let Some(class) = self.classes.get(&variant.reduction_class()) else { return false };
        let covers = |((regime, other), (min, max)): &(&(RowRegime, String), &(usize, usize))| {
            *regime == variant.regime && other != spec && (*min..=*max).contains(&rows)
        };
        class.ranges.iter().filter(covers).count() >= NUM_PROBLEMS_MIN
    }
}

impl ClassModel {
    fn fit(all: &[&Observation]) -> Option<ClassModel> {
        let setting = Setting { rows_balanced: rows_balanced(all) };
        let sample = |one: &&Observation| {
            let features = setting.difference(&one.variant, &one.default, one.rows)?;
            let ratio = one.ratio.clamp(1.0 / RATIO_MAX, RATIO_MAX);
            Some(Sample { features, value: ratio.ln(), weight: one.weight })
        };
        let others = || all.iter().filter(|one| !one.is_default());
        let samples: Vec<Sample> = others().filter_map(sample).collect();
        let mut ranges: BTreeMap<(RowRegime, String), (usize, usize)> = BTreeMap::new();
        for one in others() {
            let key = (one.variant.regime, one.spec.clone());
            let range = ranges.entry(key).or_insert((one.rows, one.rows));
            *range = (range.0.min(one.rows), range.1.max(one.rows));
        }
        Some(ClassModel {
            ridge: Ridge::fit(&samples)?,
            setting,
            num_times: samples.len(),
            ranges,
            rows: all.iter().map(|one| one.rows).collect(),
        })
    }

    fn predict(&self, variant: &KernelVariant, rows: usize) -> Option<f64> {
        let default = default_at(&variant.spec, variant, rows)?;
        let features = self.setting.difference(variant, &default, rows)?;
        Some(self.ridge.value(&features).exp().clamp(1.0 / RATIO_MAX, RATIO_MAX))
    }
}

/// What serves so many rows without a lock.
fn default_at(spec: &KernelSpec, like: &KernelVariant, rows: usize) -> Option<KernelVariant> {
    let serving = Serving::default_for(spec, like.target);
    let interval = serving.intervals.iter().find(|interval| rows <= interval.rows_max)?;
    Some(interval.variant)
}

/// The ratio of a kernel's time to a default's at one row count, the median of all records.
#[derive(Clone, Debug)]
struct Observation {
    device: String,
    spec: String,
    rows: usize,
    variant: KernelVariant,
    default: KernelVariant,
    ratio: f64,
    /// One over the variance that it is expected to have.
    weight: f64,
    limit_us: Option<f64>,
    /// Whether it was raced to the end: who drops out early may have had bad luck.
    is_finalist: bool,
}

/// What a record says of a time.
struct Found {
    ratio: f64,
    variance: f64,
    limit_us: Option<f64>,
    num_samples: usize,
}

impl Observation {
    fn is_default(&self) -> bool {
        self.variant == self.default
    }
}

/// The key of one device of each family that matmul times are of, the least one.
pub fn families(records: &[Record]) -> Vec<String> {
    let timed = records.iter().filter(|record| record.time().is_some());
    let keys: BTreeSet<String> = timed.map(|record| record.device.key()).collect();
    let mut families: Vec<String> = Vec::new();
    for key in keys {
        let is_known = families.iter().any(|family| distance(family, &key).is_some());
        if !is_known && !observations(records, &key).is_empty() {
            families.push(key);
        }
    }
    families
}

/// The matmul times of a family of devices, in canonical order.
fn observations<'a>(
    records: impl IntoIterator<Item = &'a Record>,
    device: &str,
) -> Vec<Observation> {
    let mut families: BTreeMap<String, bool> = BTreeMap::new();
    let mut groups: BTreeMap<(String, &str, usize, &str, &str), Vec<Found>> = BTreeMap::new();
    for record in records {
        let (Some(time), Case::Rows(rows)) = (record.time(), record.problem.case) else { continue };
        let key = record.device.key();
        if !*families.entry(key.clone()).or_insert_with_key(|key| distance(device, key).is_some()) {
            continue;
        }
        let share = time.noise.powi(2) * (NOISE_SAMPLES / time.num_samples as f64).max(1.0);
        let variance = ERROR_MIN.powi(2) + share;
        let (spec, symbol) = (&*record.problem.spec, &*record.variant.symbol);
        let group = groups.entry((key, spec, rows, symbol, &*time.default)).or_default();
        let (ratio, limit_us, num_samples) = (time.vs_default, time.limit_us, time.num_samples);
        group.push(Found { ratio, variance, limit_us, num_samples });
    }
    let observation = |(key, mut times): (_, Vec<Found>)| {
        let (device, spec, rows, symbol, default): (String, &str, usize, &str, &str) = key;
        let variant = KernelVariant::parse(symbol)?;
        let default = KernelVariant::parse(default)?;
        let is_one_problem = variant.spec == default.spec && variant.target == default.target;
        if !is_one_problem || crate::name::spec_name(&variant.spec) != spec {
            return None;
        }
        let limit = |time: &Found| time.limit_us.unwrap_or(0.0);
        times.sort_by(|a, b| {
            let by_ratio = a.ratio.total_cmp(&b.ratio).then(a.variance.total_cmp(&b.variance));
            by_ratio.then(limit(a).total_cmp(&limit(b)))
        });
        let Found { ratio, variance, limit_us, .. } = times[times.len() / 2];
        Some(Observation {
            device,
            spec: spec.to_string(),
            rows,
            variant,
            default,
            ratio,
            weight: times.len() as f64 / variance,
            limit_us,
            is_finalist: times.iter().any(|time| time.num_samples >= SAMPLES_MIN),
        })
    };
    groups.into_iter().filter_map(observation).collect()
}

/// Row counts above which arithmetic takes longer than reading the weights, by the physical limits
/// in the records: the limit of one row, which is the weights', over that of a row among many.
fn rows_balanced(all: &[&Observation]) -> f64 {
    let mut by_spec: BTreeMap<(&str, &str), Vec<(usize, f64)>> = BTreeMap::new();
    for one in all {
        if let Some(us) = one.limit_us {
            by_spec.entry((&one.device, &one.spec)).or_default().push((one.rows, us));
        }
    }
    let balance = |limits: &Vec<(usize, f64)>| {
        let few = limits.iter().min_by_key(|(rows, _)| *rows)?;
        let many = limits.iter().max_by_key(|(rows, _)| *rows)?;
        (few.0 < many.0).then(|| few.1 / (many.1 / many.0 as f64))
    };
    let mut found: Vec<f64> = by_spec.values().filter_map(balance).collect();
    found.sort_by(f64::total_cmp);
    found.get(found.len() / 2).copied().unwrap_or(ROWS_BALANCED)
}

/// Where no record has a limit.
const ROWS_BALANCED: f64 = 16.0;

#[cfg(test)]
mod tests;
