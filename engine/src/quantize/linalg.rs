//! Products and Cholesky factors of matrices: the same bits for every number of threads, because
//! work is cut by rows at fixed places and every number is computed by one thread.

use std::sync::{Mutex, PoisonError};
use std::thread;

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};

/// Rows that one thread computes at a time.
const BLOCK: usize = 128;
/// Columns that are factored, and unknowns that are solved for, one by one.
const PANEL: usize = 64;

/// Calls `work` once for each item, on up to `num_threads` threads.
pub(super) fn for_each<T: Send>(items: Vec<T>, num_threads: usize, work: &(dyn Fn(T) + Sync)) {
    let num_threads = num_threads.min(items.len());
    if num_threads <= 1 {
        return items.into_iter().for_each(work);
    }
    let queue = Mutex::new(items.into_iter());
    // A thread that panics poisons nothing: the queue is whole between two calls of `next`.
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let run = || {
        while let Some(item) = next() {
            work(item);
        }
    };
    thread::scope(|scope| {
        (1..num_threads).for_each(|_| {
            scope.spawn(run);
        });
        run();
    });
}

/// Calls `work` with each stretch of rows of `matrix` and the index of its first one.
pub(super) fn for_rows(
    matrix: &mut ArrayViewMut2<'_, f32>,
    num_threads: usize,
    work: &(dyn Fn(usize, ArrayViewMut2<'_, f32>) + Sync),
) {
    let blocks: Vec<_> = matrix.axis_chunks_iter_mut(Axis(0), BLOCK).enumerate().collect();
    for_each(blocks, num_threads, &|(idx, block)| work(idx * BLOCK, block));
}

/// `out = factor · a · b + keep · out`
pub(super) fn multiply(
    factor: f32,
    a: ArrayView2<'_, f32>,
    b: ArrayView2<'_, f32>,
    keep: f32,
    out: &mut ArrayViewMut2<'_, f32>,
    num_threads: usize,
) {
    for_rows(out, num_threads, &|first, mut out| {
        let rows = a.slice(s![first..first + out.nrows(), ..]);
        general_mat_mul(factor, &rows, &b, keep, &mut out);
    });
}

/// Adds `xᵀ · x` to the upper triangle of `gram`, and to some of what lies below its diagonal.
pub(super) fn add_gram(gram: &mut Array2<f32>, x: ArrayView2<'_, f32>, num_threads: usize) {
    for_rows(&mut gram.view_mut(), num_threads, &|first, mut rows| {
        let own = x.slice(s![.., first..first + rows.nrows()]);
        let from_diagonal = x.slice(s![.., first..]);
        let mut rows = rows.slice_mut(s![.., first..]);
        general_mat_mul(1.0, &own.t(), &from_diagonal, 1.0, &mut rows);
    });
}

/// Makes a matrix symmetric whose upper triangle is right.
pub(super) fn mirror(matrix: &mut Array2<f32>) {
    for row in 1..matrix.nrows() {
        for column in 0..row {
            matrix[[row, column]] = matrix[[column, row]];
        }
    }
}

/// The lower triangular L with `L · Lᵀ = matrix`; `None` where the matrix, whose lower triangle is
/// read, is not positive definite.
pub(super) fn cholesky(mut matrix: Array2<f32>, num_threads: usize) -> Option<Array2<f32>> {
    let len = matrix.nrows();
    for start in (0..len).step_by(PANEL) {
        let width = PANEL.min(len - start);
        let (left, mut right) = matrix.view_mut().split_at(Axis(1), start);
        let left = left.slice(s![start.., ..]);
        let mut panel = right.slice_mut(s![start.., ..width]);
        let top = left.slice(s![..width, ..]);
        multiply(-1.0, left, top.t(), 1.0, &mut panel, num_threads);
        let (mut diagonal, mut below) = panel.split_at(Axis(0), width);
        factor(&mut diagonal)?;
        let diagonal = diagonal.view();
        for_rows(&mut below, num_threads, &|_, rows| forward(rows, diagonal));
    }
    for row in 0..len {
        matrix.slice_mut(s![row, row + 1..]).fill(0.0);
    }
    Some(matrix)
}

/// `rows · (L · Lᵀ)⁻¹`, in place.
pub(super) fn solve(rows: &mut Array2<f32>, l: ArrayView2<'_, f32>, num_threads: usize) {
    let len = l.nrows();
    let starts: Vec<usize> = (0..len).step_by(PANEL).collect();
    for_rows(&mut rows.view_mut(), num_threads, &|_, mut rows| {
        for &start in &starts {
            let end = len.min(start + PANEL);
            let (known, mut rest) = rows.view_mut().split_at(Axis(1), start);
            let mut block = rest.slice_mut(s![.., ..end - start]);
            let across = l.slice(s![start..end, ..start]);
            general_mat_mul(-1.0, &known, &across.t(), 1.0, &mut block);
            forward(block, l.slice(s![start..end, start..end]));
        }
        for &start in starts.iter().rev() {
            let end = len.min(start + PANEL);
            let (mut rest, known) = rows.view_mut().split_at(Axis(1), end);
            let mut block = rest.slice_mut(s![.., start..]);
            general_mat_mul(-1.0, &known, &l.slice(s![end.., start..end]), 1.0, &mut block);
            backward(block, l.slice(s![start..end, start..end]));
        }
    });
}

/// Factors a small matrix in place.
fn factor(matrix: &mut ArrayViewMut2<'_, f32>) -> Option<()> {
    for column in 0..matrix.nrows() {
        for row in column..matrix.nrows() {
            let dot: f64 = (0..column)
                .map(|k| f64::from(matrix[[row, k]]) * f64::from(matrix[[column, k]]))
                .sum();
            let rest = f64::from(matrix[[row, column]]) - dot;
            if row > column {
                matrix[[row, column]] = (rest / f64::from(matrix[[column, column]])) as f32;
            } else if rest.is_finite() && rest > 0.0 {
                matrix[[row, column]] = rest.sqrt() as f32;
            } else {
                return None;
            }
        }
    }
    Some(())
}

/// Each row x becomes the u with `u · Lᵀ = x`, for a small L.
fn forward(mut rows: ArrayViewMut2<'_, f32>, l: ArrayView2<'_, f32>) {
    for mut row in rows.rows_mut() {
        for j in 0..l.nrows() {
            let dot: f32 = (0..j).map(|i| row[i] * l[[j, i]]).sum();
            row[j] = (row[j] - dot) / l[[j, j]];
        }
    }
}

/// Each row u becomes the x with `x · L = u`, for a small L.
fn backward(mut rows: ArrayViewMut2<'_, f32>, l: ArrayView2<'_, f32>) {
    for mut row in rows.rows_mut() {
        for j in (0..l.nrows()).rev() {
            row[j] /= l[[j, j]];
            let value = row[j];
            for i in 0..j {
                row[i] -= value * l[[j, i]];
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use ndarray::Array2;

    use super::*;

    /// Numbers from −1 to 1 that depend on the seed alone.
    pub(in crate::quantize) fn random(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        Array2::from_shape_simple_fn((rows, columns), || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
    }

    fn gram(k: usize, num_threads: usize) -> Array2<f32> {
        let x = random(2 * k, k, 3);
        let mut gram = Array2::zeros((k, k));
        add_gram(&mut gram, x.view(), num_threads);
        mirror(&mut gram);
        gram
    }

    fn assert_near(a: &Array2<f32>, b: &Array2<f32>, tolerance: f32) {
        let largest = (a - b).iter().fold(0.0f32, |max, x| max.max(x.abs()));
        assert!(largest <= tolerance, "off by {largest}");
    }

    #[test]
    fn a_gram_matrix_is_a_product() {
        let x = random(300, 150, 3);
        assert_near(&gram(150, 2), &x.t().dot(&x), 1e-3);
    }

    #[test]
    fn factors_multiply_to_the_matrix_and_solve() {
        for k in [1, 63, 64, 65, 200] {
            let matrix = gram(k, 1);
            let l = cholesky(matrix.clone(), 2).expect("a Gram matrix");
            assert_near(&l.dot(&l.t()), &matrix, 1e-3);
            let x = random(5, k, 9);
            let mut solved = x.dot(&matrix);
            solve(&mut solved, l.view(), 2);
            assert_near(&solved, &x, 1e-2);
        }
        let mut negative = gram(70, 1);
        negative[[68, 68]] = -1.0;
        assert_eq!(cholesky(negative, 1), None);
    }

    #[test]
    fn threads_change_no_bit() {
        let one = cholesky(gram(300, 1), 1);
        for num_threads in [2, 3, 7] {
            assert_eq!(gram(300, num_threads), gram(300, 1));
            assert_eq!(cholesky(gram(300, 1), num_threads), one);
        }
    }
}
