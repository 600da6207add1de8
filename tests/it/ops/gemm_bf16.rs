//! `gemm_bf16` against a naive loop in f64 over rounded rows, on every instruction set of this
//! machine, and bit for bit against itself over row regimes and thread counts.

use super::Random;
use super::matmul::{ROWS, Regimes, assert_near, assert_same_rows, dot, regimes, run_shares};
use bespoke::backend::cpu::pack::{self, Panels};
use bespoke::kernels::abi::{GemmBf16Args, bf16_stride};
use bespoke::kernels::gemm_bf16;
use bespoke::model::linear::{DenseView, LinearPart, LinearSource};
use bespoke_kernel_gen::spec::DType;
use half::bf16;

/// Relative to Σ |x·w|, as for `gemm`: products are exact, and each of them is added once.
fn tolerance(k: usize) -> f64 {
    8.0 * (k as f64).sqrt() * f64::from(f32::EPSILON)
}

struct Case {
    n: usize,
    k: usize,
    lanes: usize,
    regimes: Regimes<GemmBf16Args>,
    bias: bool,
}

impl Case {
    fn check(&self, seed: u64) {
        let (n, k) = (self.n, self.k);
        let mut rng = Random(seed);
        let mut rounded =
            |len: usize| -> Vec<bf16> { (0..len).map(|_| bf16::from_f32(rng.float())).collect() };
        let rows_max = *ROWS.last().unwrap();
        let (weights, rows) = (rounded(n * k), rounded(rows_max * k));
        let bias: Vec<f32> = rounded(n).iter().map(|value| value.to_f32()).collect();
        let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        let view = DenseView { n, k, dtype: DType::BF16, bytes: &bytes };
        let parts = vec![LinearPart::Dense(view)];
        let source = LinearSource { parts, row_map: None, bias: None };
        let panels = Panels { n, k, lanes: self.lanes, cols: 4 };
        let packed = pack::bf16_pairs(&source, panels, 2).unwrap();
        let mut x = vec![0u16; rows_max * bf16_stride(k)];
        for (to, from) in x.chunks_exact_mut(bf16_stride(k)).zip(rows.chunks_exact(k)) {
            to.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_bits());
        }
        let expected = self.expected(&rows, &weights, &bias);
        let mut alone: Vec<f32> = Vec::new();
        for num_rows in ROWS {
            for count in [1, 2, 3] {
                let mut out = vec![f32::NAN; num_rows * n];
                let args = GemmBf16Args {
                    rows: num_rows,
                    x: x.as_ptr(),
                    weight: packed.ptr(),
                    bias: if self.bias { bias.as_ptr() } else { std::ptr::null() },
                    out: out.as_mut_ptr(),
                };
                run_shares(&self.regimes, num_rows, &args, count);
                assert_near(&out, &expected, tolerance(k));
                assert_same_rows(&mut alone, &out, num_rows, n);
            }
        }
    }

    /// `(value, Σ |term|)` of every row and output, in f64.
    fn expected(&self, rows: &[bf16], weights: &[bf16], bias: &[f32]) -> Vec<(f64, f64)> {
        let wide = |values: &[bf16]| values.iter().map(|v| v.to_f64()).collect::<Vec<f64>>();
        let (rows, weights) = (wide(rows), wide(weights));
        let bias = |n: usize| if self.bias { f64::from(bias[n]) } else { 0.0 };
        let of_row = |row: &[f64]| -> Vec<(f64, f64)> {
            let columns = weights.chunks_exact(self.k).enumerate();
            columns.map(|(n, weights)| dot(row, weights, bias(n))).collect()
        };
        rows.chunks_exact(self.k).flat_map(of_row).collect()
    }
}

macro_rules! check {
    ($n:literal, $k:literal, $bias:literal) => {
        for (lanes, regimes) in regimes!(GemmBf16Args, gemm_bf16, [one, few, many], $n, $k) {
            for seed in 0..3 {
                Case { n: $n, k: $k, lanes, regimes, bias: $bias }.check(seed);
            }
        }
    };
}

#[test]
fn bf16_rows_and_weights() {
    check!(64, 64, false);
    check!(130, 7, true);
    check!(72, 160, true);
    check!(5, 600, false);
}

/// Rows pass a long panel in parts, of which the last may be short and hold half a pair.
#[test]
fn long_bf16_rows() {
    check!(33, 1030, true);
    check!(96, 1024, true);
    check!(17, 2051, false);
}
