//! Levels that make up for each other's errors.
//!
//! The error of the outputs over all calibration rows is `‖e · L‖²` for each row e of weight
//! errors, where `L · Lᵀ` is the Gram matrix of the inputs. [`compensated`] rounds inputs one after
//! the other, each to what is best after the errors of those before it: Babai's nearest plane,
//! which is what GPTQ does (Frantar et al. 2022; Chen et al., "The geometry of LLM quantization",
//! 2025). [`improved`] then moves single levels and scales for as long as that helps.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};

use super::grid::{Grid, Rounded, stored};
use super::linalg::{cholesky, for_each};

/// Inputs that are rounded one by one before their errors go to all others.
const PANEL: usize = 64;
/// Outputs that one thread rounds at a time.
const BLOCK: usize = 64;
/// Damping is raised tenfold where it does not make the matrix positive definite, so often at most.
const DAMPING_RAISES: usize = 8;

/// The factor L of a damped Gram matrix, inputs in the order of their size.
pub(super) struct Feedback {
    /// Inputs, those with the smallest activations first: they are rounded last.
    order: Vec<usize>,
    l: Array2<f32>,
}

/// The factor L of `gram` with `damping` times the mean of its diagonal added to the diagonal;
/// `None` for a matrix that is not finite.
pub(super) fn damped_factor(
    gram: ArrayView2<'_, f32>,
    mut damping: f32,
    num_threads: usize,
) -> Option<Array2<f32>> {
    let mean = mean_or_one(&gram.diag().to_vec());
    for _ in 0..=DAMPING_RAISES {
        let mut damped = gram.to_owned();
        damped.diag_mut().mapv_inplace(|value| value + damping * mean);
        if let Some(l) = cholesky(damped, num_threads) {
            return Some(l);
        }
        damping *= 10.0;
    }
    None
}

impl Feedback {
    /// See [`damped_factor`].
    pub(super) fn new(
        gram: ArrayView2<'_, f32>,
        damping: f32,
        num_threads: usize,
    ) -> Option<Feedback> {
        let mut order: Vec<usize> = (0..gram.nrows()).collect();
        order.sort_by(|a, b| gram[[*a, *a]].total_cmp(&gram[[*b, *b]]));
        let permuted =
            Array2::from_shape_fn(gram.dim(), |(row, column)| gram[[order[row], order[column]]]);
        let l = damped_factor(permuted.view(), damping, num_threads)?;
        Some(Feedback { order, l })
    }

    /// How much an error of each input costs once the inputs after it have made up for what they
    /// can.
    pub(super) fn importance(&self) -> Vec<f32> {
        let mut importance = vec![0.0; self.order.len()];
        for (place, &input) in self.order.iter().enumerate() {
            importance[input] = self.l[[place, place]].powi(2);
        }
        importance
    }
}

/// The mean of the diagonal; 1 where all of it is zero.
fn mean_or_one(diagonal: &[f32]) -> f32 {
    let sum: f64 = diagonal.iter().map(|value| f64::from(*value)).sum();
    if sum > 0.0 { (sum / diagonal.len() as f64) as f32 } else { 1.0 }
}

/// Levels on `grid` for `weights` `[n, k]`.
pub(super) fn compensated(
    weights: ArrayView2<'_, f32>,
    grid: Grid,
    feedback: &Feedback,
    num_threads: usize,
) -> Rounded {
    let mut levels = Array2::zeros(weights.dim());
    let items = levels.axis_chunks_iter_mut(Axis(0), BLOCK).enumerate().collect();
    for_each(items, num_threads, &|(block, levels)| {
        let first = block * BLOCK;
        let weights = weights.slice(s![first..first + levels.nrows(), ..]);
        compensate_block(weights, (&grid, first), feedback, levels);
    });
    Rounded { grid, levels }
}

/// Rounds some outputs, those of the grid from `first` on.
fn compensate_block(
    weights: ArrayView2<'_, f32>,
    (grid, first): (&Grid, usize),
    feedback: &Feedback,
    mut levels: ArrayViewMut2<'_, f32>,
) {
    let Feedback { order, l } = feedback;
    // What errors of the inputs after each one ask of it, times its diagonal element of L.
    let mut pull = Array2::<f32>::zeros(weights.dim());
    let mut errors = Array2::<f32>::zeros(weights.dim());
    let starts = (0..order.len()).step_by(PANEL);
    for start in starts.rev() {
        let end = order.len().min(start + PANEL);
        for n in 0..weights.nrows() {
            let mut pull = pull.slice_mut(s![n, start..end]);
            let pull = pull.as_slice_mut().expect("a stretch of a row");
            for place in (start..end).rev() {
                let input = order[place];
                let steps = grid.steps(first + n, input / grid.group);
                let weight = weights[[n, input]];
                let level = steps.level(weight + pull[place - start] / l[[place, place]]);
                let error = weight - (level - steps.zero) * steps.scale;
                levels[[n, input]] = level;
                errors[[n, place]] = error;
                let own = l.slice(s![place, start..place]);
                for (pull, l) in pull.iter_mut().zip(own) {
                    *pull += error * l;
                }
            }
        }
        let (errors, across) = (errors.slice(s![.., start..end]), l.slice(s![start..end, ..start]));
        general_mat_mul(1.0, &errors, &across, 1.0, &mut pull.slice_mut(s![.., ..start]));
    }
}

/// Moves levels and scales, group by group, wherever that lowers the error of the outputs;
/// `num_sweeps` times over all groups.
pub(super) fn improved(
    mut rounded: Rounded,
    weights: ArrayView2<'_, f32>,
    gram: ArrayView2<'_, f32>,
    num_sweeps: usize,
    num_threads: usize,
) -> Rounded {
    let Rounded { grid, levels } = &mut rounded;
    let group = grid.group;
    let scales = grid.scales.axis_chunks_iter_mut(Axis(0), BLOCK);
    let zeros = grid.zeros.axis_chunks_iter(Axis(0), BLOCK);
    let levels = levels.axis_chunks_iter_mut(Axis(0), BLOCK);
    let rows = weights.axis_chunks_iter(Axis(0), BLOCK);
    let items = rows.zip(levels).zip(scales.zip(zeros)).collect();
    for_each(items, num_threads, &|((weights, levels), (scales, zeros))| {
        let mut block = Sweep { group, levels, scales, zeros };
        block.run(weights, gram, num_sweeps);
    });
    rounded
}

/// Some outputs that are being improved.
struct Sweep<'a> {
    group: usize,
    levels: ArrayViewMut2<'a, f32>,
    scales: ArrayViewMut2<'a, f32>,
    zeros: ArrayView2<'a, f32>,
}

impl Sweep<'_> {
    fn run(&mut self, weights: ArrayView2<'_, f32>, gram: ArrayView2<'_, f32>, num_sweeps: usize) {
        let (num_rows, k) = weights.dim();
        let errors = Array2::from_shape_fn((num_rows, k), |(n, input)| {
            let g = input / self.group;
            weights[[n, input]]
                - (self.levels[[n, input]] - self.zeros[[n, g]]) * self.scales[[n, g]]
        });
        // Half the slope of the error, for each weight.
        let mut slope = errors.dot(&gram);
        for _ in 0..num_sweeps {
            for (g, first) in (0..k).step_by(self.group).enumerate() {
                let inputs = first..first + self.group;
                let own = gram.slice(s![inputs.clone(), inputs.clone()]);
                let own = own.as_standard_layout();
                let mut moved = Array2::zeros((num_rows, self.group));
                let mut local = slope.slice(s![.., inputs.clone()]).to_owned();
                self.move_levels(g, own.view(), &mut local, &mut moved);
                self.fit_scales(g, own.view(), &mut local, &mut moved);
                self.move_levels(g, own.view(), &mut local, &mut moved);
                general_mat_mul(-1.0, &moved, &gram.slice(s![inputs, ..]), 1.0, &mut slope);
            }
        }
    }

    /// Each level of group `g` to where the error is least, all others as they are.
    fn move_levels(
        &mut self,
        g: usize,
        gram: ArrayView2<'_, f32>,
        slope: &mut Array2<f32>,
        moved: &mut Array2<f32>,
    ) {
        let first = g * self.group;
        for (n, mut slope) in slope.rows_mut().into_iter().enumerate() {
            let slope = slope.as_slice_mut().expect("a row");
            let scale = self.scales[[n, g]];
            for i in 0..self.group {
                let square = gram[[i, i]];
                if square <= 0.0 {
                    continue;
                }
                let level = &mut self.levels[[n, first + i]];
                let wanted = *level + slope[i] / (square * scale);
                let better = wanted.round_ties_even().clamp(0.0, 15.0);
                if better != *level {
                    let step = (better - *level) * scale;
                    *level = better;
                    moved[[n, i]] += step;
                    for (slope, gram) in slope.iter_mut().zip(gram.row(i)) {
                        *slope -= step * gram;
                    }
                }
            }
        }
    }

    /// Each scale of group `g` to where the error is least, all else as it is.
    fn fit_scales(
        &mut self,
        g: usize,
        gram: ArrayView2<'_, f32>,
        slope: &mut Array2<f32>,
        moved: &mut Array2<f32>,
    ) {
        let first = g * self.group;
        let mut differences = self.levels.slice(s![.., first..first + self.group]).to_owned();
        for (n, mut row) in differences.rows_mut().into_iter().enumerate() {
            row -= self.zeros[[n, g]];
        }
        let weighed = differences.dot(&gram);
        for n in 0..differences.nrows() {
            let (difference, weighed) = (differences.row(n), weighed.row(n));
            let (gain, square) = (difference.dot(&slope.row(n)), difference.dot(&weighed));
            let scale = self.scales[[n, g]];
            if square <= 0.0 || scale + gain / square <= 0.0 {
                continue;
            }
            let better = stored(scale + gain / square);
            let step = better - scale;
            // As float16 holds it, the better scale may be none.
            if better.is_finite() && step * (2.0 * gain - step * square) > 0.0 {
                self.scales[[n, g]] = better;
                slope.row_mut(n).scaled_add(-step, &weighed);
                moved.row_mut(n).scaled_add(step, &difference);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::gram::energy;
    use super::super::linalg::tests::random;
    use super::*;

    /// Rows that depend on each other: a few sources, mixed.
    fn correlated_gram(k: usize) -> Array2<f32> {
        let x = random(400, 12, 1).dot(&random(12, k, 2)) + 0.2 * random(400, k, 3);
        x.t().dot(&x)
    }

    fn cost(rounded: &Rounded, weights: &Array2<f32>, gram: &Array2<f32>) -> f64 {
        energy(rounded.errors(weights.view()).view(), gram.view(), 1)
    }

    /// The last input in order is rounded by itself, the one before it to make up for that.
    #[test]
    fn two_inputs_are_rounded_to_the_nearest_plane() {
        let weights = random(50, 2, 4);
        let gram = ndarray::array![[1.0f32, 0.9], [0.9, 1.1]];
        let grid = Grid::covering(weights.view(), 2, false);
        let feedback = Feedback::new(gram.view(), 0.0, 1).unwrap();
        let found = compensated(weights.view(), grid.clone(), &feedback, 1);
        for n in 0..50 {
            let steps = grid.steps(n, 0);
            let error = |k: usize, level: f32| weights[[n, k]] - (level - steps.zero) * steps.scale;
            let cost = |levels: [f32; 2]| {
                let (a, b) = (error(0, levels[0]), error(1, levels[1]));
                a * a + 1.8 * a * b + 1.1 * b * b
            };
            let levels = || (0..16).map(|level| level as f32);
            let second = levels().min_by(|a, b| error(1, *a).abs().total_cmp(&error(1, *b).abs()));
            let second = second.unwrap();
            let first =
                levels().min_by(|a, b| cost([*a, second]).total_cmp(&cost([*b, second]))).unwrap();
            assert_eq!([found.levels[[n, 0]], found.levels[[n, 1]]], [first, second], "output {n}");
        }
    }

    #[test]
    fn compensation_helps_where_inputs_are_correlated() {
        let (k, group) = (160, 32);
        let (weights, gram) = (random(70, k, 4), correlated_gram(k));
        let grid = Grid::covering(weights.view(), group, false);
        let nearest = grid.clone().nearest(weights.view());
        let feedback = Feedback::new(gram.view(), 0.01, 2).unwrap();
        let found = compensated(weights.view(), grid, &feedback, 2);
        let (before, after) = (cost(&nearest, &weights, &gram), cost(&found, &weights, &gram));
        assert!(after < 0.5 * before, "{after} of {before}");
        let better = improved(found, weights.view(), gram.view(), 2, 2);
        assert!(cost(&better, &weights, &gram) < 0.9 * after);
    }

    #[test]
    fn no_single_level_is_left_to_improve() {
        let (k, group) = (32, 16);
        let (weights, gram) = (random(9, k, 6), correlated_gram(k));
        let nearest = Grid::covering(weights.view(), group, false).nearest(weights.view());
        let found = improved(nearest, weights.view(), gram.view(), 30, 1);
        let least = cost(&found, &weights, &gram);
        for n in 0..9 {
            for input in 0..k {
                for level in 0..16 {
                    let mut other = found.clone();
                    other.levels[[n, input]] = level as f32;
                    assert!(cost(&other, &weights, &gram) >= least * (1.0 - 1e-5));
                }
            }
        }
    }

    #[test]
    fn threads_change_no_bit() {
        let (weights, gram) = (random(150, 96, 4), correlated_gram(96));
        let round = |num_threads| {
            let feedback = Feedback::new(gram.view(), 0.01, num_threads).unwrap();
            let grid = Grid::by_gram(weights.view(), gram.view(), (32, false), num_threads);
            let found = compensated(weights.view(), grid, &feedback, num_threads);
            improved(found, weights.view(), gram.view(), 2, num_threads)
        };
        let one = round(1);
        assert_eq!(round(2), one);
        assert_eq!(round(5), one);
    }

    #[test]
    fn damping_makes_up_for_what_is_missing() {
        // Fewer rows than inputs, and an input that is never active.
        let mut x = random(10, 40, 1);
        x.column_mut(7).fill(0.0);
        let gram = x.t().dot(&x);
        assert!(Feedback::new(gram.view(), 0.01, 1).is_some());
        assert!(Feedback::new(Array2::zeros((4, 4)).view(), 0.01, 1).is_some());
        assert!(Feedback::new(Array2::from_elem((4, 4), f32::NAN).view(), 0.01, 1).is_none());
    }
}
