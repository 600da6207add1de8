//! Where the sixteen levels of each group of weights lie: `(level − zero) · scale`.
//!
//! A grid that leaves out the largest weights of a group ("clipping", from AWQ, Lin et al. 2023) is
//! finer for all others. Which is best is a matter of what the errors do to the outputs.

use half::f16;
use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut2, Axis, Zip, s};

use super::awq_format::{PACK, PackedLinear, pack};
use super::linalg::for_each;

/// Shares of a group's range that a grid may cover.
const SHRINKS: usize = 18;
const SHRINK_STEP: f32 = 0.03;
/// Shares that are tried where grids are only compared with each other.
pub(super) const ROUGH_SHRINKS: [f32; 6] = [1.0, 0.94, 0.88, 0.81, 0.74, 0.66];
/// Largest groups whose errors are weighed with one another.
const CROSS_GROUP_MAX: usize = 256;
/// Smallest scale, as of plain rounding.
const SCALE_MIN: f32 = 1e-5;
const LEVEL_MAX: f32 = 15.0;
const SYMMETRIC_ZERO: f32 = 8.0;
/// Rows that one thread computes at a time.
const BLOCK: usize = 64;
const LANES: usize = 8;

/// Scale and zero of each group of each output.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Grid {
    /// Neighbouring inputs that share a scale.
    pub(super) group: usize,
    pub(super) is_symmetric: bool,
    /// Float16 numbers, `[n, k / group]`.
    pub(super) scales: Array2<f32>,
    /// Whole numbers from 0 to 15, `[n, k / group]`.
    pub(super) zeros: Array2<f32>,
}

/// Weights on a grid.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Rounded {
    pub(super) grid: Grid,
    /// Whole numbers from 0 to 15, `[n, k]`.
    pub(super) levels: Array2<f32>,
}

/// The levels of one group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Steps {
    pub(super) scale: f32,
    pub(super) zero: f32,
}

impl Steps {
    /// From the smallest to the largest of `weights`, as plain rounding has it, or over the share
    /// `shrink` of that range.
    fn covering(weights: &[f32], shrink: f32, is_symmetric: bool) -> Steps {
        let (min, max) =
            weights.iter().fold((0.0f32, 0.0f32), |(min, max), &w| (min.min(w), max.max(w)));
        let (min, max) = (shrink * min, shrink * max);
        match is_symmetric {
            true => {
                let widest = (max / (LEVEL_MAX - SYMMETRIC_ZERO)).max(-min / SYMMETRIC_ZERO);
                Steps { scale: stored(widest), zero: SYMMETRIC_ZERO }
            }
            false => {
                let scale = stored((max - min) / LEVEL_MAX);
                let zero = (-min / scale).round_ties_even().clamp(0.0, LEVEL_MAX);
                Steps { scale, zero }
            }
        }
    }

    /// The level nearest to `weight`.
    pub(super) fn level(self, weight: f32) -> f32 {
        self.difference(weight, 1.0 / self.scale) + self.zero
    }

    /// The level nearest to `weight`, less the zero.
    #[inline(always)]
    fn difference(self, weight: f32, inverse: f32) -> f32 {
        let rounded = round(weight * inverse);
        let (low, high) = (-self.zero, LEVEL_MAX - self.zero);
        let rounded = if rounded < low { low } else { rounded };
        if rounded > high { high } else { rounded }
    }

    /// `Σ importance · error²` of the nearest levels.
    fn error(self, weights: &[f32], importance: &[f32]) -> f32 {
        let inverse = 1.0 / self.scale;
        let term = |w: f32, i: f32| {
            let error = w - self.difference(w, inverse) * self.scale;
            i * error * error
        };
        // NOTE: sums side by side, so that they become one vector.
        let mut sums = [0.0f32; LANES];
        let (weights, last_weights) = weights.as_chunks::<LANES>();
        let (importance, last_importance) = importance.as_chunks::<LANES>();
        for (weights, importance) in weights.iter().zip(importance) {
            for lane in 0..LANES {
                sums[lane] += term(weights[lane], importance[lane]);
            }
        }
        let rest = last_weights.iter().zip(last_importance).map(|(w, i)| term(*w, *i));
        sums.iter().sum::<f32>() + rest.sum::<f32>()
    }

    /// These levels with the scale that suits them best, where it is another.
    fn fitted(self, weights: &[f32], importance: &[f32]) -> Steps {
        let inverse = 1.0 / self.scale;
        let (mut product, mut square) = (0.0f32, 0.0f32);
        for (w, i) in weights.iter().zip(importance) {
            let difference = self.difference(*w, inverse);
            product += i * w * difference;
            square += i * difference * difference;
        }
        match square > 0.0 && product > 0.0 {
            true => Steps { scale: stored(product / square), ..self },
            false => self,
        }
    }

    /// The best of several shares of the range, for errors weighed by `importance`.
    fn best(weights: &[f32], importance: &[f32], shrinks: &[f32], is_symmetric: bool) -> Steps {
        let mut best = Steps::covering(weights, 1.0, is_symmetric);
        let mut least = best.error(weights, importance);
        let mut offer = |steps: Steps| {
            let error = steps.error(weights, importance);
            if error < least {
                (best, least) = (steps, error);
            }
            best
        };
        for &shrink in shrinks {
            offer(Steps::covering(weights, shrink, is_symmetric));
        }
        let found = offer(Steps::covering(weights, 1.0, is_symmetric));
        let found = offer(found.fitted(weights, importance));
        if !is_symmetric && found.zero > 0.0 {
            offer(Steps { zero: found.zero - 1.0, ..found });
        }
        if !is_symmetric && found.zero < LEVEL_MAX {
            offer(Steps { zero: found.zero + 1.0, ..found });
        }
        best
    }
}

impl Grid {
    /// Over the whole range of every group, as plain rounding has it.
    pub(super) fn covering(weights: ArrayView2<'_, f32>, group: usize, symmetric: bool) -> Grid {
        let mut grid = Grid::zeros(weights, group, symmetric);
        for (n, row) in weights.rows().into_iter().enumerate() {
            for (g, weights) in slice(&row).chunks_exact(group).enumerate() {
                grid.set(n, g, Steps::covering(weights, 1.0, symmetric));
            }
        }
        grid
    }

    /// Grids for errors that are weighed input by input, with `importance` `[k]`.
    pub(super) fn by_importance(
        weights: ArrayView2<'_, f32>,
        importance: &[f32],
        (group, symmetric): (usize, bool),
        num_threads: usize,
    ) -> Grid {
        let shrinks = shrinks();
        Grid::by_rows(weights, (group, symmetric), num_threads, &|rows, mut grid| {
            for (n, row) in rows.rows().into_iter().enumerate() {
                let groups = slice(&row).chunks_exact(group).zip(importance.chunks_exact(group));
                for (g, (weights, importance)) in groups.enumerate() {
                    grid.set(n, g, Steps::best(weights, importance, &shrinks, symmetric));
                }
            }
        })
    }

    /// Grids for errors that add up within their group as `gram` `[k, k]` says.
    pub(super) fn by_gram(
        weights: ArrayView2<'_, f32>,
        gram: ArrayView2<'_, f32>,
        (group, symmetric): (usize, bool),
        num_threads: usize,
    ) -> Grid {
        let importance: Vec<f32> = gram.diag().to_vec();
        if group > CROSS_GROUP_MAX {
            return Grid::by_importance(weights, &importance, (group, symmetric), num_threads);
        }
        Grid::by_rows(weights, (group, symmetric), num_threads, &|rows, mut grid| {
            for (g, first) in (0..rows.ncols()).step_by(group).enumerate() {
                let inputs = first..first + group;
                let gram = gram.slice(s![inputs.clone(), inputs.clone()]);
                let rows = rows.slice(s![.., inputs]);
                grid.search_group(g, rows, gram.as_standard_layout().view());
            }
        })
    }

    fn zeros(weights: ArrayView2<'_, f32>, group: usize, is_symmetric: bool) -> Grid {
        let (n, k) = weights.dim();
        let (scales, zeros) = (Array2::ones((n, k / group)), Array2::zeros((n, k / group)));
        Grid { group, is_symmetric, scales, zeros }
    }

    fn by_rows(
        weights: ArrayView2<'_, f32>,
        (group, is_symmetric): (usize, bool),
        num_threads: usize,
        work: &(dyn Fn(ArrayView2<'_, f32>, GridRows<'_>) + Sync),
    ) -> Grid {
        let mut grid = Grid::zeros(weights, group, is_symmetric);
        let scales = grid.scales.axis_chunks_iter_mut(Axis(0), BLOCK);
        let zeros = grid.zeros.axis_chunks_iter_mut(Axis(0), BLOCK);
        let rows = weights.axis_chunks_iter(Axis(0), BLOCK);
        let items = rows.zip(scales.zip(zeros)).collect();
        for_each(items, num_threads, &|(rows, (scales, zeros))| {
            work(rows, GridRows { is_symmetric, scales, zeros });
        });
        grid
    }

    fn set(&mut self, n: usize, g: usize, steps: Steps) {
        (self.scales[[n, g]], self.zeros[[n, g]]) = (steps.scale, steps.zero);
    }

    pub(super) fn steps(&self, n: usize, g: usize) -> Steps {
        Steps { scale: self.scales[[n, g]], zero: self.zeros[[n, g]] }
    }

    /// Each weight to the nearest level.
    pub(super) fn nearest(self, weights: ArrayView2<'_, f32>) -> Rounded {
        let mut levels = Array2::zeros(weights.dim());
        for (n, (row, mut levels)) in weights.rows().into_iter().zip(levels.rows_mut()).enumerate()
        {
            for (k, (weight, level)) in row.iter().zip(&mut levels).enumerate() {
                *level = self.steps(n, k / self.group).level(*weight);
            }
        }
        Rounded { grid: self, levels }
    }

    /// The first output and group whose scale float16 does not hold.
    pub(super) fn overflow(&self) -> Option<(usize, usize)> {
        self.scales.indexed_iter().find(|(_, scale)| !scale.is_finite()).map(|(at, _)| at)
    }
}

/// Some outputs of a grid.
struct GridRows<'a> {
    is_symmetric: bool,
    scales: ArrayViewMut2<'a, f32>,
    zeros: ArrayViewMut2<'a, f32>,
}

impl GridRows<'_> {
    fn set(&mut self, n: usize, g: usize, steps: Steps) {
        (self.scales[[n, g]], self.zeros[[n, g]]) = (steps.scale, steps.zero);
    }

    /// The best grids of one group, `[outputs, group]`, whose errors are weighed by `gram`.
    fn search_group(&mut self, g: usize, rows: ArrayView2<'_, f32>, gram: ArrayView2<'_, f32>) {
        let num_rows = rows.nrows();
        let mut least = vec![f32::INFINITY; num_rows];
        let mut best = vec![Steps { scale: 1.0, zero: 0.0 }; num_rows];
        let mut differences = Array2::zeros(rows.dim());
        let mut errors = Array2::zeros(rows.dim());
        let mut weighed = Array2::zeros(rows.dim());
        let covering = |n: usize, shrink: f32, is_symmetric| {
            Steps::covering(&rows.row(n).to_vec(), shrink, is_symmetric)
        };
        // The last turn gives the best grid the scale that suits its levels best.
        for shrink in shrinks().map(Some).into_iter().chain([None]) {
            let steps: Vec<Steps> = match shrink {
                Some(shrink) => {
                    (0..num_rows).map(|n| covering(n, shrink, self.is_symmetric)).collect()
                }
                None => {
                    differ(rows, &best, &mut differences);
                    general_mat_mul(1.0, &differences, &gram, 0.0, &mut weighed);
                    let dot = |n: usize, other: ArrayView2<'_, f32>| -> f32 {
                        Zip::from(weighed.row(n))
                            .and(other.row(n))
                            .fold(0.0, |sum, a, b| sum + a * b)
                    };
                    let fit = |n: usize| {
                        let (product, square) = (dot(n, rows), dot(n, differences.view()));
                        match product > 0.0 && square > 0.0 {
                            true => Steps { scale: stored(product / square), ..best[n] },
                            false => best[n],
                        }
                    };
                    (0..num_rows).map(fit).collect()
                }
            };
            differ(rows, &steps, &mut differences);
            for (n, steps) in steps.iter().enumerate() {
                Zip::from(errors.row_mut(n)).and(rows.row(n)).and(differences.row(n)).for_each(
                    |error, weight, difference| *error = weight - difference * steps.scale,
                );
            }
            general_mat_mul(1.0, &errors, &gram, 0.0, &mut weighed);
            for (n, steps) in steps.into_iter().enumerate() {
                let error = errors.row(n).dot(&weighed.row(n));
                if error < least[n] {
                    (best[n], least[n]) = (steps, error);
                }
            }
        }
        best.into_iter().enumerate().for_each(|(n, steps)| self.set(n, g, steps));
    }
}

impl Rounded {
    /// What is lost: `weights − (level − zero) · scale`.
    pub(super) fn errors(&self, weights: ArrayView2<'_, f32>) -> Array2<f32> {
        let mut errors = weights.to_owned();
        for (n, mut row) in errors.rows_mut().into_iter().enumerate() {
            for (k, error) in row.iter_mut().enumerate() {
                let Steps { scale, zero } = self.grid.steps(n, k / self.grid.group);
                *error -= (self.levels[[n, k]] - zero) * scale;
            }
        }
        errors
    }

    /// Share of the groups with a weight beyond their first or last level, by more than half the
    /// way to the next.
    pub(super) fn clipped(&self, weights: ArrayView2<'_, f32>) -> f64 {
        let grid = &self.grid;
        let mut num_clipped = 0usize;
        for (n, row) in weights.rows().into_iter().enumerate() {
            for (g, group) in slice(&row).chunks_exact(grid.group).enumerate() {
                let Steps { scale, zero } = grid.steps(n, g);
                let low = (-zero - 0.5) * scale;
                let high = (LEVEL_MAX - zero + 0.5) * scale;
                num_clipped += usize::from(group.iter().any(|w| *w < low || *w > high));
            }
        }
        num_clipped as f64 / grid.scales.len() as f64
    }

    /// In the layout of the file. The number of outputs is a multiple of eight.
    pub(super) fn packed(&self) -> PackedLinear {
        let (n, k) = self.levels.dim();
        let groups = k / self.grid.group;
        let mut packed = PackedLinear::new(n, k, self.grid.group);
        for block in 0..n / PACK {
            let eight = |row: &dyn Fn(usize) -> f32| {
                pack(std::array::from_fn(|i| row(block * PACK + i) as u8))
            };
            for input in 0..k {
                packed.qweight[block * k + input] = eight(&|n| self.levels[[n, input]]);
            }
            for g in 0..groups {
                packed.qzeros[block * groups + g] = eight(&|n| self.grid.zeros[[n, g]]);
                for i in 0..PACK {
                    let scale = f16::from_f32(self.grid.scales[[block * PACK + i, g]]);
                    packed.scales[(block * groups + g) * PACK + i] = scale;
                }
            }
        }
        packed
    }
}

/// The best that one row's grids can do where errors are weighed input by input: fills `errors`.
pub(super) fn rough_errors(
    weights: &[f32],
    importance: &[f32],
    (group, symmetric): (usize, bool),
    errors: &mut [f32],
) {
    let groups = weights.chunks_exact(group).zip(importance.chunks_exact(group));
    for ((weights, importance), errors) in groups.zip(errors.chunks_exact_mut(group)) {
        let steps = Steps::best(weights, importance, &ROUGH_SHRINKS, symmetric);
        let inverse = 1.0 / steps.scale;
        for (weight, error) in weights.iter().zip(errors) {
            *error = weight - steps.difference(*weight, inverse) * steps.scale;
        }
    }
}

/// Levels less zeros.
fn differ(rows: ArrayView2<'_, f32>, steps: &[Steps], out: &mut Array2<f32>) {
    for (n, steps) in steps.iter().enumerate() {
        let inverse = 1.0 / steps.scale;
        Zip::from(out.row_mut(n))
            .and(rows.row(n))
            .for_each(|out, weight| *out = steps.difference(*weight, inverse));
    }
}

fn shrinks() -> [f32; SHRINKS] {
    std::array::from_fn(|idx| 1.0 - idx as f32 * SHRINK_STEP)
}

/// A scale as float16 holds it.
pub(super) fn stored(scale: f32) -> f32 {
    f16::from_f32(scale.max(SCALE_MIN)).to_f32()
}

/// A row of a matrix in standard layout.
fn slice<'a>(row: &'a ArrayView1<'_, f32>) -> &'a [f32] {
    row.as_slice().expect("rows of whole matrices lie side by side")
}

/// To the nearest whole number, halves to the even one, for |x| < 2²²; beyond that to one nearby,
/// which is no level. The instruction of that name is not in every machine that this is built for.
#[inline(always)]
fn round(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0;
    (x + MAGIC) - MAGIC
}

#[cfg(test)]
mod tests {
    use super::super::awq_format::unpack;
    use super::super::gram::energy;
    use super::super::linalg::tests::random;
    use super::super::rtn;
    use super::*;

    #[test]
    fn the_whole_range_is_plain_rounding() {
        let weights = random(3, 64, 5);
        let grid = Grid::covering(weights.view(), 32, false);
        for n in 0..3 {
            for g in 0..2 {
                let group = weights.slice(s![n, g * 32..(g + 1) * 32]).to_vec();
                let (scale, zero) = rtn::scale_and_zero(&group);
                let steps = grid.steps(n, g);
                assert_eq!((steps.scale, steps.zero), (scale.to_f32(), f32::from(zero)));
            }
        }
    }

    #[test]
    fn searched_grids_are_no_worse_than_the_whole_range() {
        let (weights, x) = (random(40, 64, 7), random(100, 64, 8));
        let gram = x.t().dot(&x);
        // Errors within groups only.
        let mut blocks = gram.clone();
        for ((row, column), value) in blocks.indexed_iter_mut() {
            if row / 32 != column / 32 {
                *value = 0.0;
            }
        }
        let importance = gram.diag().to_vec();
        let diagonal = Array2::from_diag(&gram.diag().to_owned());
        for symmetric in [false, true] {
            let view = weights.view();
            let cost = |grid: Grid, matrix: &Array2<f32>| {
                let errors = grid.nearest(view).errors(view);
                energy(errors.view(), matrix.view(), 1)
            };
            let plain = Grid::covering(view, 32, symmetric);
            let by_gram = Grid::by_gram(view, gram.view(), (32, symmetric), 2);
            assert!(cost(by_gram, &blocks) < cost(plain.clone(), &blocks));
            let by_importance = Grid::by_importance(view, &importance, (32, symmetric), 2);
            assert!(cost(by_importance, &diagonal) < cost(plain, &diagonal));
        }
    }

    #[test]
    fn one_large_weight_is_clipped_where_its_input_hardly_counts() {
        let mut weights = random(1, 32, 3);
        weights[[0, 9]] = 3.0;
        let mut importance = vec![1.0; 32];
        importance[9] = 1e-4;
        let grid = Grid::by_importance(weights.view(), &importance, (32, false), 1);
        let whole = Grid::covering(weights.view(), 32, false);
        assert!(grid.scales[[0, 0]] < 0.95 * whole.scales[[0, 0]]);
        assert_eq!(grid.nearest(weights.view()).clipped(weights.view()), 1.0);
        assert_eq!(whole.nearest(weights.view()).clipped(weights.view()), 0.0);
    }

    #[test]
    fn packed_words_hold_levels_zeros_and_scales() {
        let weights = random(16, 32, 11);
        let rounded = Grid::covering(weights.view(), 16, false).nearest(weights.view());
        let packed = rounded.packed();
        for n in 0..16 {
            for k in 0..32 {
                let (block, i, g) = (n / 8, n % 8, k / 16);
                assert_eq!(
                    f32::from(unpack(packed.qweight[block * 32 + k])[i]),
                    rounded.levels[[n, k]]
                );
                let steps = rounded.grid.steps(n, g);
                assert_eq!(f32::from(unpack(packed.qzeros[block * 2 + g])[i]), steps.zero);
                assert_eq!(packed.scales[(block * 2 + g) * 8 + i].to_f32(), steps.scale);
            }
        }
    }

    #[test]
    fn zeros_and_overflow() {
        let zeros = Array2::zeros((8, 16));
        let rounded = Grid::covering(zeros.view(), 16, false).nearest(zeros.view());
        assert_eq!(rounded.errors(zeros.view()), zeros);
        let mut large = random(8, 16, 2);
        large[[5, 3]] = 1e9;
        assert_eq!(Grid::covering(large.view(), 8, false).overflow(), Some((5, 0)));
    }
}
