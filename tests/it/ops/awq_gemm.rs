//! `awq_gemm` against a naive loop in f64, on every instruction set of this machine, and bit for
//! bit against itself over row regimes and thread counts.

use super::Random;
use super::matmul::{
    ROWS, Regimes, assert_near, assert_same_rows, quantize_rows, regimes, run_shares,
};
use bespoke::backend::cpu::pack::{self, Panels};
use bespoke::kernels::abi::{AwqGemmArgs, RowsIn, int8_stride};
use bespoke::kernels::awq_gemm;
use bespoke::model::linear::{AwqView, LinearPart, LinearSource};
use bespoke_kernel_gen::spec::LinearRole;
use half::f16;

/// Nibble order of AutoAWQ: nibble p of a word holds column `ORDER[p]`.
const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

struct Weights {
    n: usize,
    k: usize,
    group: usize,
    q: Vec<u8>,
    zeros: Vec<u8>,
    scales: Vec<f16>,
    qweight: Vec<u8>,
    qzeros: Vec<u8>,
    scale_bytes: Vec<u8>,
}

impl Weights {
    fn random(rng: &mut Random, n: usize, k: usize, group: usize) -> Weights {
        let q: Vec<u8> = (0..n * k).map(|_| (rng.next() % 16) as u8).collect();
        let zeros: Vec<u8> = (0..k / group * n).map(|_| (rng.next() % 16) as u8).collect();
        let scales: Vec<f16> =
            (0..k / group * n).map(|_| f16::from_f32(0.01 + 0.02 * rng.float().abs())).collect();
        let words = |values: &[u8]| -> Vec<u8> {
            let words = values.chunks_exact(8).flat_map(|eight| {
                let nibbles = (0..8).map(|p| u32::from(eight[ORDER[p]]) << (4 * p));
                nibbles.sum::<u32>().to_le_bytes()
            });
            words.collect()
        };
        let scale_bytes = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        let (qweight, qzeros) = (words(&q), words(&zeros));
        Weights { n, k, group, q, zeros, scales, qweight, qzeros, scale_bytes }
    }

    fn view(&self) -> AwqView<'_> {
        AwqView {
            n: self.n,
            k: self.k,
            group: self.group,
            qweight: &self.qweight,
            qzeros: Some(&self.qzeros),
            scales: &self.scale_bytes,
        }
    }

    /// The weight of output `n` and input `k` in f64.
    fn value(&self, n: usize, k: usize) -> f64 {
        let param = k / self.group * self.n + n;
        let q = f64::from(self.q[k * self.n + n]) - f64::from(self.zeros[param]);
        q * f64::from(self.scales[param])
    }
}

/// Relative to Σ |x·w|: float32 rounding of a chain of K terms, K · 2⁻²⁴ at worst, its root as a
/// rule.
fn tolerance(k: usize) -> f64 {
    8.0 * (k as f64).sqrt() * f64::from(f32::EPSILON)
}

struct Case {
    weights: Weights,
    /// Inputs that share packed scales.
    kernel_group: usize,
    lanes: usize,
    regimes: Regimes<AwqGemmArgs>,
    int8: bool,
    bias: bool,
}

impl Case {
    fn check(&self, seed: u64) {
        let Weights { n, k, .. } = self.weights;
        let mut rng = Random(seed);
        let bias: Vec<f32> = (0..n).map(|_| rng.float()).collect();
        let source = LinearSource {
            parts: vec![LinearPart::Awq(self.weights.view())],
            row_map: None,
            bias: None,
        };
        let panels = Panels { n, k, lanes: self.lanes, cols: 4 };
        let packed = pack::awq(&source, LinearRole::Down, self.kernel_group, panels, 2).unwrap();
        let rows_max = *ROWS.last().unwrap();
        let x: Vec<f32> = (0..rows_max * k).map(|_| rng.float()).collect();
        let (q, scales, sums) = quantize_rows(&x, k, self.kernel_group);
        let expected = self.expected(&x, (&q, &scales), &bias);
        let mut alone: Vec<f32> = Vec::new();
        for rows in ROWS {
            for count in [1, 2, 3] {
                let mut out = vec![f32::NAN; rows * n];
                let x_in = match self.int8 {
                    true => RowsIn {
                        f32: std::ptr::null(),
                        q: q.as_ptr(),
                        scales: scales.as_ptr(),
                        sums: sums.as_ptr(),
                    },
                    false => RowsIn {
                        f32: x.as_ptr(),
                        q: std::ptr::null(),
                        scales: std::ptr::null(),
                        sums: std::ptr::null(),
                    },
                };
                let args = AwqGemmArgs {
                    rows,
                    x: x_in,
                    weight: packed.weight.ptr(),
                    scales: packed.scales.ptr(),
                    zeros: packed.zeros.ptr(),
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
    fn expected(&self, x: &[f32], int8: (&[i8], &[f32]), bias: &[f32]) -> Vec<(f64, f64)> {
        let Weights { n, k, .. } = self.weights;
        let weights: Vec<f64> = (0..n * k).map(|at| self.weights.value(at / k, at % k)).collect();
        let mut expected = Vec::new();
        for row in 0..x.len() / k {
            let value = |i: usize| match self.int8 {
                true => {
                    let scale = int8.1[row * (k / self.kernel_group) + i / self.kernel_group];
                    f64::from(int8.0[row * int8_stride(k) + i]) * f64::from(scale)
                }
                false => f64::from(x[row * k + i]),
            };
            let values: Vec<f64> = (0..k).map(value).collect();
            for (weights, bias) in weights.chunks_exact(k).zip(bias) {
                let bias = if self.bias { f64::from(*bias) } else { 0.0 };
                expected.push(super::matmul::dot(&values, weights, bias));
            }
        }
        expected
    }
}

macro_rules! check_shape {
    ($n:literal, $k:literal, $group:literal, $kernel_group:literal, $bias:literal) => {
        let float = regimes!(
            AwqGemmArgs,
            awq_gemm,
            [float_one, float_few, float_many],
            $n,
            $k,
            $kernel_group
        );
        let int8 =
            regimes!(AwqGemmArgs, awq_gemm, [int8_one, int8_few, int8_many], $n, $k, $kernel_group);
        let float = float.map(|(lanes, regimes)| (lanes, regimes, false));
        for (lanes, regimes, int8) in
            float.chain(int8.map(|(lanes, regimes)| (lanes, regimes, true)))
        {
            for seed in 0..3 {
                let weights = Weights::random(&mut Random(seed + 77), $n, $k, $group);
                let kernel_group = $kernel_group;
                Case { weights, kernel_group, lanes, regimes, int8, bias: $bias }.check(seed);
            }
        }
    };
}

#[test]
fn groups_of_32_64_and_128() {
    check_shape!(64, 64, 32, 32, false);
    check_shape!(72, 128, 64, 64, true);
    check_shape!(40, 256, 128, 128, false);
}

#[test]
fn per_channel_scales_are_repeated_per_activation_group() {
    check_shape!(16, 96, 96, 32, false);
    check_shape!(88, 40, 40, 8, true);
}

#[test]
fn outputs_that_fill_no_tile_and_inputs_beyond_one_block() {
    check_shape!(8, 64, 64, 64, true);
    check_shape!(200, 1088, 64, 64, false);
}

#[test]
fn a_checkpoint_word_unpacks_in_autoawq_order() {
    let word = 0x7531_6420u32.to_le_bytes();
    let view =
        AwqView { n: 8, k: 1, group: 1, qweight: &word, qzeros: Some(&word), scales: &[0; 16] };
    for column in 0..8 {
        assert_eq!(view.q(0, column), column as u8);
        assert_eq!(view.zero(0, column), column as u8);
    }
}
