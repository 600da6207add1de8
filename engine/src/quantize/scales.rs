//! Factors on the inputs of linears that share them.
//!
//! Weights of an input with large activations are rounded more finely where they are multiplied
//! by a factor, and the activations divided by it (AWQ, Lin et al. 2023). What makes the
//! activations divides them: a norm, or the linear before.

use bespoke_kernel_gen::spec::DType;
use half::{bf16, f16};
use ndarray::{Array2, ArrayView2, Axis, s};

use super::grid::rough_errors;
use super::linalg::{for_each, multiply};

/// Exponents that are tried first.
const ALPHAS: [f32; 5] = [0.0, 0.25, 0.5, 0.75, 1.0];
const BETAS: [f32; 4] = [0.0, 0.25, 0.5, 0.75];
/// Steps around the best exponents found so far.
const REFINEMENTS: [f32; 2] = [0.125, 0.0625];
/// Outputs of a module that stand for all of them.
const SAMPLE_ROWS: usize = 192;
/// Largest factor, and one over the smallest.
const FACTOR_MAX: f32 = 256.0;
const BLOCK: usize = 64;

/// What divides the activations by their factors.
pub(super) enum Carrier {
    /// A norm's weights, as an element type holds them.
    Norm { weight: Vec<f32>, dtype: DType },
    /// Outputs of the linear before.
    Outputs {
        /// By input: the output, which several inputs may share.
        of_input: Vec<usize>,
        /// By output: the smallest and largest factor that its scales bear.
        bounds: Vec<(f32, f32)>,
    },
    /// Nothing: there are no factors.
    Nothing,
}

/// Factors that can be carried.
#[derive(Clone, Debug)]
pub(super) struct Choice {
    pub(super) alpha: f32,
    pub(super) beta: f32,
    /// `[k]`
    pub(super) factors: Vec<f32>,
}

impl Choice {
    pub(super) fn none(k: usize) -> Choice {
        Choice { alpha: 0.0, beta: 0.0, factors: vec![1.0; k] }
    }
}

impl Carrier {
    /// The factors that come of it if each input is to have its own of `wanted`.
    fn carried(&self, wanted: &[f32]) -> Vec<f32> {
        match self {
            Carrier::Nothing => vec![1.0; wanted.len()],
            Carrier::Norm { weight, dtype } => {
                let carried = |(weight, wanted): (&f32, &f32)| {
                    let factor = weight / stored(weight / wanted, *dtype);
                    if factor.is_finite() && factor > 0.0 { factor } else { 1.0 }
                };
                weight.iter().zip(wanted).map(carried).collect()
            }
            Carrier::Outputs { of_input, bounds } => {
                let mut sums = vec![(0.0f32, 0usize); bounds.len()];
                for (output, wanted) in of_input.iter().zip(wanted) {
                    sums[*output].0 += wanted.ln();
                    sums[*output].1 += 1;
                }
                let shared = |output: &usize| {
                    let (sum, count) = sums[*output];
                    let (low, high) = bounds[*output];
                    (sum / count as f32).exp().max(low).min(high)
                };
                of_input.iter().map(shared).collect()
            }
        }
    }
}

/// A number as an element type holds it.
pub(super) fn stored(value: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(value).to_f32(),
        DType::BF16 => bf16::from_f32(value).to_f32(),
        DType::F32 | DType::I8 => value,
    }
}

/// Linears with a common input, and what errors of their weights cost.
pub(super) struct Search<'a> {
    /// Some outputs of each, `[rows, k]`.
    rows: Array2<f32>,
    /// What one unit of a row's error counts.
    row_shares: Vec<f64>,
    /// Mean absolute activation and weight of each input.
    activations: &'a [f32],
    weights: Vec<f32>,
    costs: Costs<'a>,
    group: (usize, bool),
    num_threads: usize,
}

/// What errors of an output's weights cost.
pub(super) enum Costs<'a> {
    /// `errorᵀ · gram · error`
    Gram(ArrayView2<'a, f32>),
    /// `Σ importance · error²`
    Importance(&'a [f32]),
}

impl<'a> Search<'a> {
    /// `modules`: weights `[n, k]` and the sum of squares of the outputs. `group`: its size, and
    /// whether levels lie around zero.
    pub(super) fn new(
        modules: &[(ArrayView2<'_, f32>, f64)],
        activations: &'a [f32],
        costs: Costs<'a>,
        group: (usize, bool),
        num_threads: usize,
    ) -> Search<'a> {
        let k = activations.len();
        let mut rows = Vec::new();
        let mut row_shares = Vec::new();
        let mut sums = vec![0.0f64; k];
        let mut num_rows = 0;
        for (weights, energy) in modules {
            let step = weights.nrows().div_ceil(SAMPLE_ROWS).max(1);
            let taken = weights.slice(s![..;step, ..]);
            let share =
                weights.nrows() as f64 / taken.nrows() as f64 / energy.max(f64::MIN_POSITIVE);
            row_shares.extend(std::iter::repeat_n(share, taken.nrows()));
            rows.extend(taken.iter().copied());
            num_rows += weights.nrows();
            for row in weights.rows() {
                sums.iter_mut().zip(row).for_each(|(sum, w)| *sum += f64::from(w.abs()));
            }
        }
        let rows = Array2::from_shape_vec((row_shares.len(), k), rows).expect("rows of k weights");
        let weights = sums.iter().map(|sum| (sum / num_rows.max(1) as f64) as f32).collect();
        Search { rows, row_shares, activations, weights, costs, group, num_threads }
    }

    /// The best exponents; no factors where none are better.
    pub(super) fn run(&self, carrier: &Carrier) -> Choice {
        let mut best = Choice::none(self.activations.len());
        if matches!(carrier, Carrier::Nothing) {
            return best;
        }
        let mut least = self.cost(&best.factors);
        let mut tried = vec![(0.0, 0.0)];
        let mut offer = |best: &mut Choice, alpha: f32, beta: f32| {
            let is_new = !tried.contains(&(alpha, beta));
            if !is_new || alpha < 0.0 || beta < 0.0 {
                return;
            }
            tried.push((alpha, beta));
            let factors = carrier.carried(&self.wanted(alpha, beta));
            let cost = self.cost(&factors);
            if cost < least {
                (*best, least) = (Choice { alpha, beta, factors }, cost);
            }
        };
        for alpha in ALPHAS {
            BETAS.into_iter().for_each(|beta| offer(&mut best, alpha, beta));
        }
        for step in REFINEMENTS {
            let (alpha, beta) = (best.alpha, best.beta);
            for (a, b) in [(step, 0.0), (-step, 0.0), (0.0, step), (0.0, -step)] {
                offer(&mut best, alpha + a, beta + b);
            }
        }
        best
    }

    /// `activation^alpha / weight^beta`, with the largest one over the smallest.
    fn wanted(&self, alpha: f32, beta: f32) -> Vec<f32> {
        const LEAST: f32 = 1e-6;
        let raw = |(x, w): (&f32, &f32)| x.max(LEAST).powf(alpha) / w.max(LEAST).powf(beta);
        let raw: Vec<f32> = self.activations.iter().zip(&self.weights).map(raw).collect();
        let max = raw.iter().copied().fold(0.0, f32::max);
        let min = raw.iter().copied().fold(f32::INFINITY, f32::min);
        let middle = max.sqrt() * min.sqrt();
        raw.iter().map(|x| (x / middle).clamp(1.0 / FACTOR_MAX, FACTOR_MAX)).collect()
    }

    /// What rounding costs with these factors, in shares of the modules' outputs.
    fn cost(&self, factors: &[f32]) -> f64 {
        let diagonal = match &self.costs {
            Costs::Gram(gram) => gram.diag().to_vec(),
            Costs::Importance(importance) => importance.to_vec(),
        };
        let scaled: Vec<f32> =
            diagonal.iter().zip(factors).map(|(cost, factor)| cost / (factor * factor)).collect();
        let mut errors = Array2::<f32>::zeros(self.rows.dim());
        let items = errors.axis_chunks_iter_mut(Axis(0), BLOCK).enumerate().collect();
        for_each(items, self.num_threads, &|(block, mut errors)| {
            for (i, mut errors) in errors.rows_mut().into_iter().enumerate() {
                let row = self.rows.row(block * BLOCK + i);
                let row: Vec<f32> = row.iter().zip(factors).map(|(w, f)| w * f).collect();
                let errors = errors.as_slice_mut().expect("a row");
                rough_errors(&row, &scaled, self.group, errors);
                errors.iter_mut().zip(factors).for_each(|(error, factor)| *error /= factor);
            }
        });
        let weighed = match &self.costs {
            Costs::Gram(gram) => {
                let mut weighed = Array2::zeros(errors.dim());
                let mut out = weighed.view_mut();
                multiply(1.0, errors.view(), gram.view(), 0.0, &mut out, self.num_threads);
                weighed
            }
            Costs::Importance(importance) => {
                Array2::from_shape_fn(errors.dim(), |(n, k)| errors[[n, k]] * importance[k])
            }
        };
        let rows = errors.rows().into_iter().zip(weighed.rows());
        let costs = rows.map(|(error, weighed)| f64::from(error.dot(&weighed)));
        costs.zip(&self.row_shares).map(|(cost, share)| cost * share).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::super::linalg::tests::random;
    use super::*;

    #[test]
    fn factors_are_what_the_carrier_can_bear() {
        let norm = Carrier::Norm { weight: vec![1.0, -0.3, 0.0], dtype: DType::BF16 };
        let carried = norm.carried(&[3.0, 3.0, 3.0]);
        assert_eq!(carried[0] * stored(1.0 / 3.0, DType::BF16), 1.0);
        assert!((carried[1] - 3.0).abs() < 0.02 && carried[1] > 0.0);
        assert_eq!(carried[2], 1.0);
        let outputs =
            Carrier::Outputs { of_input: vec![0, 1, 0, 1], bounds: vec![(0.1, 5.0), (0.5, 2.0)] };
        let carried = outputs.carried(&[1.0, 8.0, 4.0, 8.0]);
        assert!((carried[0] - 2.0).abs() < 1e-5 && carried[0] == carried[2]);
        assert_eq!((carried[1], carried[3]), (2.0, 2.0));
        assert_eq!(Carrier::Nothing.carried(&[7.0]), [1.0]);
    }

    #[test]
    fn inputs_with_large_activations_get_large_factors() {
        let weights = random(64, 64, 1);
        let mut x = random(300, 64, 2);
        x.column_mut(17).mapv_inplace(|x| x * 30.0);
        let gram = x.t().dot(&x);
        let activations: Vec<f32> =
            x.columns().into_iter().map(|x| x.mapv(f32::abs).sum()).collect();
        let modules = [(weights.view(), 1.0)];
        let costs = Costs::Gram(gram.view());
        let search = Search::new(&modules, &activations, costs, (32, false), 2);
        let carrier = Carrier::Norm { weight: vec![1.0; 64], dtype: DType::F32 };
        let choice = search.run(&carrier);
        assert!(choice.alpha > 0.0 && choice.factors[17] > 1.5 * choice.factors[16]);
        assert!(search.cost(&choice.factors) < search.cost(&[1.0; 64]));
        assert_eq!(search.run(&Carrier::Nothing).factors, vec![1.0; 64]);
    }
}
