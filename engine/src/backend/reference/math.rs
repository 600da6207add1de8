//! Dot products, matrix products and row statistics in plain loops.

use crate::kernels::abi::LogitStats;

/// Independent sums of a dot product: the compiler keeps them in vector registers.
const LANES: usize = 8;
/// Rows that share one pass over a weight row.
const ROWS: usize = 4;
/// Multiplications below which a second thread costs more than it brings.
const THREAD_WORK_MIN: usize = 1 << 20;

/// `[n, k]` weights with a bias.
pub(crate) struct Matrix<'a> {
    pub(crate) weight: &'a [f32],
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) n: usize,
    pub(crate) k: usize,
}

impl Matrix<'_> {
    /// `out[i, row] = weight[i] · x[row] + bias[i]` with `x` `[num_rows, k]`,
    /// `out` `[n, num_rows]`.
    pub(crate) fn multiply(&self, x: &[f32], out: &mut [f32], num_threads: usize) {
        let num_rows = x.len() / self.k;
        let work = num_rows * self.n * self.k;
        let num_threads = num_threads.min(work / THREAD_WORK_MIN).max(1);
        let share = self.n.div_ceil(num_threads);
        if num_threads == 1 {
            return self.multiply_outputs(0, x, out);
        }
        std::thread::scope(|scope| {
            for (idx, out) in out.chunks_mut(share * num_rows).enumerate() {
                scope.spawn(move || self.multiply_outputs(idx * share, x, out));
            }
        });
    }

    /// The outputs from `first` on that fit `out`.
    fn multiply_outputs(&self, first: usize, x: &[f32], out: &mut [f32]) {
        let num_rows = x.len() / self.k;
        for (idx, out) in out.chunks_exact_mut(num_rows).enumerate() {
            let output = first + idx;
            let weight = &self.weight[output * self.k..(output + 1) * self.k];
            dot_rows(weight, x, out);
            if let Some(bias) = self.bias {
                out.iter_mut().for_each(|value| *value += bias[output]);
            }
        }
    }
}

/// `out[row] = weight · x[row]`; every row is summed in the same order, whatever the row count.
fn dot_rows(weight: &[f32], x: &[f32], out: &mut [f32]) {
    let k = weight.len();
    let mut blocks = x.chunks_exact(ROWS * k);
    let mut outs = out.chunks_exact_mut(ROWS);
    for (x, out) in blocks.by_ref().zip(outs.by_ref()) {
        let (x0, x) = x.split_at(k);
        let (x1, x) = x.split_at(k);
        let (x2, x3) = x.split_at(k);
        out.copy_from_slice(&dots(weight, [x0, x1, x2, x3]));
    }
    for (x, out) in blocks.remainder().chunks_exact(k).zip(outs.into_remainder()) {
        *out = dot(weight, x);
    }
}

/// `a · b`
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    dots(a, [b])[0]
}

/// `a · b[i]` for each `i`.
fn dots<const N: usize>(a: &[f32], b: [&[f32]; N]) -> [f32; N] {
    let whole = a.len() / LANES * LANES;
    let b = b.map(|b| &b[..a.len()]);
    let mut sums = [[0.0f32; LANES]; N];
    for at in (0..whole).step_by(LANES) {
        let a = &a[at..at + LANES];
        for (sums, b) in sums.iter_mut().zip(&b) {
            let b = &b[at..at + LANES];
            for lane in 0..LANES {
                sums[lane] += a[lane] * b[lane];
            }
        }
    }
    let mut totals = [0.0; N];
    for ((total, sums), b) in totals.iter_mut().zip(&sums).zip(&b) {
        let halves: [f32; LANES / 2] = std::array::from_fn(|i| sums[i] + sums[i + LANES / 2]);
        let rest: f32 = a[whole..].iter().zip(&b[whole..]).map(|(a, b)| a * b).sum();
        *total = (halves[0] + halves[2]) + (halves[1] + halves[3]) + rest;
    }
    totals
}

/// `out = x / sqrt(mean(x²) + eps) · weight`
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

/// The first maximum and the log-sum-exp of a row; NaN is never the maximum.
pub(crate) fn logit_stats(logits: &[f32]) -> LogitStats {
    let mut max = f32::NEG_INFINITY;
    let mut argmax = 0;
    for (idx, logit) in logits.iter().enumerate() {
        if *logit > max {
            max = *logit;
            argmax = idx as u32;
        }
    }
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    LogitStats { max, argmax, log_sum_exp: max + sum.ln() as f32 }
}
