//! `gemm` against a naive loop in f64, on every instruction set of this machine, and bit for bit
//! against itself over row regimes and thread counts.

use super::Random;
use super::matmul::{
    ROWS, Regimes, assert_near, assert_same_rows, quantize_rows, regimes, run_shares,
};
use bespoke::backend::cpu::pack::{self, Panels};
use bespoke::kernels::abi::{GemmArgs, RowsIn, int8_stride};
use bespoke::kernels::{gemm, simd};
use bespoke::model::linear::{DenseView, LinearPart, LinearSource};
use bespoke_kernel_gen::spec::DType;

/// Relative to Σ |x·w|, as for `awq_gemm`.
fn tolerance(k: usize) -> f64 {
    8.0 * (k as f64).sqrt() * f64::from(f32::EPSILON)
}

fn weight_bytes(rng: &mut Random, len: usize, dtype: DType) -> Vec<u8> {
    let values = (0..len).map(|_| rng.float());
    match dtype {
        DType::F32 => values.flat_map(|w| w.to_le_bytes()).collect(),
        DType::F16 => values.flat_map(|w| half::f16::from_f32(w).to_le_bytes()).collect(),
        DType::BF16 => values.flat_map(|w| half::bf16::from_f32(w).to_le_bytes()).collect(),
        DType::I8 => unreachable!("checkpoints hold no int8"),
    }
}

struct Case {
    n: usize,
    k: usize,
    dtype: DType,
    lanes: usize,
    regimes: Regimes<GemmArgs>,
    /// int8 rows and weights.
    group: Option<usize>,
    bias: bool,
}

impl Case {
    fn check(&self, seed: u64) {
        let (n, k) = (self.n, self.k);
        let mut rng = Random(seed);
        let bytes = weight_bytes(&mut rng, n * k, self.dtype);
        let view = DenseView { n, k, dtype: self.dtype, bytes: &bytes };
        let bias: Vec<f32> = (0..n).map(|_| rng.float()).collect();
        let parts = vec![LinearPart::Dense(view)];
        let source = LinearSource { parts, row_map: None, bias: None };
        let panels = Panels { n, k, lanes: self.lanes, cols: 4 };
        let mut weights = vec![0.0; n * k];
        for (row, out) in weights.chunks_exact_mut(k).enumerate() {
            view.row(row, out);
        }
        let (packed, packed_scales) = match self.group {
            None => (pack::dense(&source, self.dtype, panels, 2).unwrap(), None),
            Some(_) => {
                let (packed, scales) = pack::int8(&source, panels, 2).unwrap();
                for (row, scale) in weights.chunks_exact_mut(k).zip(scales.as_f32()) {
                    round_to_int8(row, *scale);
                }
                (packed, Some(scales))
            }
        };
        let rows_max = *ROWS.last().unwrap();
        let mut x: Vec<f32> = (0..rows_max * k).map(|_| rng.float()).collect();
        let (q, scales, sums) = quantize_rows(&x, k, self.group.unwrap_or(k));
        let mut x_in = RowsIn {
            f32: x.as_ptr(),
            q: std::ptr::null(),
            scales: std::ptr::null(),
            sums: std::ptr::null(),
        };
        if let Some(group) = self.group {
            for (i, value) in x.iter_mut().enumerate() {
                let (row, at) = (i / k, i % k);
                *value = f32::from(q[row * int8_stride(k) + at])
                    * scales[row * (k / group) + at / group];
            }
            let (q, scales, sums) = (q.as_ptr(), scales.as_ptr(), sums.as_ptr());
            x_in = RowsIn { f32: std::ptr::null(), q, scales, sums };
        }
        let expected = self.expected(&x, &weights, &bias);
        let mut alone: Vec<f32> = Vec::new();
        for rows in ROWS {
            for count in [1, 2, 3] {
                let mut out = vec![f32::NAN; rows * n];
                let args = GemmArgs {
                    rows,
                    x: x_in,
                    weight: packed.ptr(),
                    scales: packed_scales.as_ref().map_or(std::ptr::null(), |s| s.ptr()),
                    bias: if self.bias { bias.as_ptr() } else { std::ptr::null() },
                    out: out.as_mut_ptr(),
                };
                run_shares(&self.regimes, rows, &args, count);
                assert_near(&out, &expected, tolerance(k));
                assert_same_rows(&mut alone, &out, rows, n);
            }
        }
    }

    /// `(value, Σ |term|)` of every row and output, in f64.
    fn expected(&self, x: &[f32], weights: &[f32], bias: &[f32]) -> Vec<(f64, f64)> {
        let wide = |values: &[f32]| values.iter().map(|v| f64::from(*v)).collect::<Vec<f64>>();
        let (x, weights) = (wide(x), wide(weights));
        let mut expected = Vec::new();
        for row in x.chunks_exact(self.k) {
            for (weights, bias) in weights.chunks_exact(self.k).zip(bias) {
                let bias = if self.bias { f64::from(*bias) } else { 0.0 };
                expected.push(super::matmul::dot(row, weights, bias));
            }
        }
        expected
    }
}

/// What an int8 weight stands for: round(w / scale) · scale.
fn round_to_int8(row: &mut [f32], scale: f32) {
    for w in row {
        let q = if scale > 0.0 { (*w * (1.0 / scale)).round_ties_even() } else { 0.0 };
        *w = q.clamp(-127.0, 127.0) * scale;
    }
}

macro_rules! check_float {
    ($element:ident, $dtype:expr, $n:literal, $k:literal, $bias:literal) => {
        for (lanes, regimes) in regimes!(GemmArgs, gemm, [one, few, many], simd::$element, $n, $k) {
            for seed in 0..3 {
                let (n, k, dtype, group) = ($n, $k, $dtype, None);
                Case { n, k, dtype, lanes, regimes, group, bias: $bias }.check(seed);
            }
        }
    };
}

#[test]
fn float_weights() {
    check_float!(F32, DType::F32, 64, 64, false);
    check_float!(F32, DType::F32, 130, 7, true);
    check_float!(F16, DType::F16, 72, 160, true);
    check_float!(F16, DType::F16, 5, 600, false);
    check_float!(BF16, DType::BF16, 96, 48, false);
    check_float!(BF16, DType::BF16, 33, 1030, true);
}

macro_rules! check_int8 {
    ($n:literal, $k:literal, $group:literal, $bias:literal) => {
        for (lanes, regimes) in
            regimes!(GemmArgs, gemm, [int8_one, int8_few, int8_many], $n, $k, $group)
        {
            for seed in 0..3 {
                let (n, k, dtype, group) = ($n, $k, DType::F16, Some($group));
                Case { n, k, dtype, lanes, regimes, group, bias: $bias }.check(seed);
            }
        }
    };
}

#[test]
fn int8_weights_per_channel() {
    check_int8!(64, 64, 64, false);
    check_int8!(200, 576, 64, true);
    check_int8!(7, 40, 8, false);
}
