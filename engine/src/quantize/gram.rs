//! All that is kept of the calibration rows that a linear reads.
//!
//! The outputs' error over all rows for weight errors e is `e · H · eᵀ` with the Gram matrix
//! `H = Xᵀ · X`, so that no row has to be looked at twice.

use ndarray::{Array2, ArrayView2};

use super::linalg::{add_gram, mirror, multiply};

/// Sums over the rows of one input, `[rows, k]`.
pub(super) struct Gram {
    /// `[k, k]`; whole once [`Gram::finish`] was called.
    pub(super) matrix: Array2<f32>,
    /// Of absolute values, by input.
    sums: Vec<f64>,
    num_rows: usize,
    num_threads: usize,
}

impl Gram {
    pub(super) fn new(k: usize, num_threads: usize) -> Gram {
        Gram { matrix: Array2::zeros((k, k)), sums: vec![0.0; k], num_rows: 0, num_threads }
    }

    /// Adds some rows.
    pub(super) fn add(&mut self, rows: ArrayView2<'_, f32>) {
        add_gram(&mut self.matrix, rows, self.num_threads);
        for row in rows.rows() {
            self.sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(x.abs()));
        }
        self.num_rows += rows.nrows();
    }

    /// Mean absolute value of each input.
    pub(super) fn means(&self) -> Vec<f32> {
        let mean = |sum: &f64| (sum / self.num_rows.max(1) as f64) as f32;
        self.sums.iter().map(mean).collect()
    }

    /// Makes the matrix whole; `false` where a number was not finite.
    pub(super) fn finish(&mut self) -> bool {
        mirror(&mut self.matrix);
        self.matrix.iter().all(|value| value.is_finite())
    }
}

/// `Σ errors · matrix · errorsᵀ`: the sum of squares of the outputs that the errors make.
pub(super) fn energy(
    errors: ArrayView2<'_, f32>,
    matrix: ArrayView2<'_, f32>,
    num_threads: usize,
) -> f64 {
    let mut weighed = Array2::zeros(errors.dim());
    multiply(1.0, errors, matrix, 0.0, &mut weighed.view_mut(), num_threads);
    let rows = errors.rows().into_iter().zip(weighed.rows());
    // Rounding may leave a little less than nothing.
    rows.map(|(a, b)| f64::from(a.dot(&b))).sum::<f64>().max(0.0)
}

#[cfg(test)]
mod tests {
    use super::super::linalg::tests::random;
    use super::*;

    #[test]
    fn the_energy_of_errors_is_that_of_their_outputs() {
        let (x, errors) = (random(200, 48, 1), random(16, 48, 2));
        let mut gram = Gram::new(48, 2);
        for rows in x.axis_chunks_iter(ndarray::Axis(0), 64) {
            gram.add(rows);
        }
        assert!(gram.finish());
        let direct: f64 = x.dot(&errors.t()).iter().map(|y| f64::from(*y).powi(2)).sum();
        let found = energy(errors.view(), gram.matrix.view(), 2);
        assert!((found / direct - 1.0).abs() < 1e-5, "{found} and {direct}");
        let mean = x.column(5).iter().map(|x| x.abs()).sum::<f32>() / 200.0;
        assert!((gram.means()[5] - mean).abs() < 1e-5);
    }

    #[test]
    fn what_is_not_finite_is_noticed() {
        let mut gram = Gram::new(3, 1);
        let mut rows = random(2, 3, 1);
        rows[[1, 2]] = f32::NAN;
        gram.add(rows.view());
        assert!(!gram.finish());
    }
}
