//! Ridge regression: weighted least squares with a penalty on the coefficients' squares (Hoerl and
//! Kennard 1970), without an intercept. Samples far off count less (Huber 1964): times have
//! accidents, nearly all of them upwards.

/// What each coefficient's square costs, in mean weights of a sample.
const PENALTY: f64 = 3.0;

/// Residuals beyond so many deviations, or beyond this where those are small, count as if they
/// were that far off.
const OUTLIER: f64 = 3.0;
const OUTLIER_MIN: f64 = 0.25;
/// Fits, each with the weights that the residuals of the one before give.
const NUM_FITS: usize = 6;

/// One equation.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    pub(super) features: Vec<f64>,
    pub(super) value: f64,
    pub(super) weight: f64,
}

/// Coefficients, one a feature.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Ridge {
    coefficients: Vec<f64>,
}

impl Ridge {
    /// All samples have equally many features. `None` without samples, or where they are no
    /// numbers.
    pub(super) fn fit(samples: &[Sample]) -> Option<Ridge> {
        let num = samples.first()?.features.len();
        let scales = scales(samples, num);
        let mean = samples.iter().map(|one| one.weight).sum::<f64>() / samples.len() as f64;
        let mut weights: Vec<f64> = samples.iter().map(|one| one.weight / mean).collect();
        let mut ridge = least_squares(samples, &weights, &scales)?;
        for _ in 1..NUM_FITS {
            let residual = |sample: &Sample| (sample.value - ridge.value(&sample.features)).abs();
            let residuals: Vec<f64> = samples.iter().map(residual).collect();
            let mut sorted = residuals.clone();
            sorted.sort_by(f64::total_cmp);
            // NOTE: the median of a normal distribution's absolute values is 1 / 1.4826.
            let bound = (OUTLIER * 1.4826 * sorted[sorted.len() / 2]).max(OUTLIER_MIN);
            for (weight, (residual, one)) in weights.iter_mut().zip(residuals.iter().zip(samples)) {
                let share = if *residual > bound { bound / residual } else { 1.0 };
                *weight = one.weight / mean * share;
            }
            ridge = least_squares(samples, &weights, &scales)?;
        }
        Some(ridge)
    }

    pub(super) fn value(&self, features: &[f64]) -> f64 {
        self.coefficients.iter().zip(features).map(|(one, feature)| one * feature).sum()
    }
}

fn least_squares(samples: &[Sample], weights: &[f64], scales: &[f64]) -> Option<Ridge> {
    let num = scales.len();
    let mut matrix = vec![vec![0.0; num]; num];
    let mut right = vec![0.0; num];
    for (sample, weight) in samples.iter().zip(weights) {
        let scaled: Vec<f64> =
            sample.features.iter().zip(scales).map(|(value, scale)| value / scale).collect();
        for (row, own) in scaled.iter().enumerate().filter(|(_, own)| **own != 0.0) {
            right[row] += weight * own * sample.value;
            for (sum, other) in matrix[row].iter_mut().zip(&scaled) {
                *sum += weight * own * other;
            }
        }
    }
    for (idx, row) in matrix.iter_mut().enumerate() {
        row[idx] += PENALTY;
    }
    let solved = solve(matrix, right)?;
    let coefficients = solved.iter().zip(scales).map(|(value, scale)| value / scale);
    Some(Ridge { coefficients: coefficients.collect() })
}

/// The root mean square of each feature; 1 where it is always 0.
fn scales(samples: &[Sample], num: usize) -> Vec<f64> {
    let scale = |idx: usize| {
        let sum: f64 = samples.iter().map(|sample| sample.features[idx].powi(2)).sum();
        let scale = (sum / samples.len() as f64).sqrt();
        if scale > 0.0 { scale } else { 1.0 }
    };
    (0..num).map(scale).collect()
}

/// The solution of a positive definite system, by Cholesky's factors. `None` where it is not one.
fn solve(mut matrix: Vec<Vec<f64>>, mut right: Vec<f64>) -> Option<Vec<f64>> {
    let num = right.len();
    for row in 0..num {
        for col in 0..=row {
            let (lower, upper) = (&matrix[row], &matrix[col]);
            let sum: f64 = (0..col).map(|idx| lower[idx] * upper[idx]).sum();
            let value = matrix[row][col] - sum;
            if row != col {
                matrix[row][col] = value / matrix[col][col];
            } else if value > 0.0 {
                matrix[row][row] = value.sqrt();
            } else {
                return None;
            }
        }
    }
    for row in 0..num {
        let sum: f64 = (0..row).map(|idx| matrix[row][idx] * right[idx]).sum();
        right[row] = (right[row] - sum) / matrix[row][row];
    }
    for row in (0..num).rev() {
        let sum: f64 = (row + 1..num).map(|idx| matrix[idx][row] * right[idx]).sum();
        right[row] = (right[row] - sum) / matrix[row][row];
    }
    right.iter().all(|value| value.is_finite()).then_some(right)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systems_are_solved() {
        let matrix = vec![vec![4.0, 2.0, 0.0], vec![2.0, 5.0, 1.0], vec![0.0, 1.0, 3.0]];
        let found = solve(matrix, vec![8.0, 15.0, 11.0]).unwrap();
        for (value, expected) in found.iter().zip([1.0, 2.0, 3.0]) {
            assert!((value - expected).abs() < 1e-12, "{found:?}");
        }
        assert_eq!(solve(vec![vec![1.0, 2.0], vec![2.0, 1.0]], vec![1.0, 1.0]), None);
    }

    #[test]
    fn coefficients_are_found_and_unused_features_have_none() {
        let sample = |idx: usize| {
            let (a, b) = ((idx % 7) as f64, (idx % 5) as f64 * 100.0);
            let value = 0.5 * a - 0.02 * b;
            Sample { features: vec![a, b, 0.0], value, weight: 1.0 + (idx % 3) as f64 }
        };
        let samples: Vec<Sample> = (0..1000).map(sample).collect();
        let ridge = Ridge::fit(&samples).unwrap();
        let [a, b, unused] = ridge.coefficients[..] else { panic!("{ridge:?}") };
        assert!((a - 0.5).abs() < 0.01 && (b + 0.02).abs() < 0.001, "{ridge:?}");
        assert_eq!(unused, 0.0);
        // Every tenth is an accident.
        let mut accidents = samples;
        accidents.iter_mut().step_by(10).for_each(|sample| sample.value += 5.0);
        let ridge = Ridge::fit(&accidents).unwrap();
        let [a, b, _] = ridge.coefficients[..] else { panic!("{ridge:?}") };
        assert!((a - 0.5).abs() < 0.02 && (b + 0.02).abs() < 0.002, "{ridge:?}");
        assert_eq!(Ridge::fit(&[]), None);
    }
}
