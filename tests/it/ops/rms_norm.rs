//! `rms_norm` with fused residual and row selection.

use bespoke::kernels::abi::RmsNormArgs;
use bespoke::kernels::bf16::BF16_GROUP;
use bespoke::kernels::rms_norm;

use super::{
    Bf16Rows, Instance, Int8Rows, Random, assert_close, assert_same_bits, float_out, instances, run,
};

/// Outputs are of the order of 4; the sum of squares and two products round to 2⁻²⁴ each, in sums
/// of up to `hidden / 8` terms a lane: 4 · 16 · 2⁻²⁴.
const F32_TOLERANCE: f64 = 4e-6;

struct Input {
    residual: Vec<f32>,
    delta: Option<Vec<f32>>,
    weight: Vec<f32>,
    select: Option<Vec<u32>>,
}

const EPS: f32 = 1e-5;

impl Input {
    fn new(hidden: usize, seed: u64) -> Input {
        let mut random = Random(seed);
        let rows = [1, 3, 7][random.below(3)];
        let select = match seed % 3 {
            0 => None,
            1 => Some((0..rows as u32).rev().collect()),
            _ => Some(vec![rows as u32 - 1]),
        };
        let delta = seed.is_multiple_of(2).then(|| random.floats(rows * hidden));
        let weight = random.floats(hidden);
        Input { residual: random.floats(rows * hidden), delta, weight, select }
    }

    /// Output rows, and the residual after the call.
    fn expected(&self, hidden: usize) -> (Vec<f64>, Vec<f32>) {
        let mut residual = self.residual.clone();
        let mut out = Vec::new();
        let all: Vec<u32> = (0..(residual.len() / hidden) as u32).collect();
        for src in self.select.as_ref().unwrap_or(&all) {
            let at = *src as usize * hidden;
            let row = &mut residual[at..at + hidden];
            if let Some(delta) = &self.delta {
                row.iter_mut().zip(&delta[at..]).for_each(|(x, delta)| *x += delta);
            }
            let squares: f64 = row.iter().map(|x| f64::from(*x).powi(2)).sum();
            let factor = 1.0 / (squares / hidden as f64 + f64::from(EPS)).sqrt();
            let weighted = row.iter().zip(&self.weight);
            out.extend(weighted.map(|(x, w)| f64::from(*x) * factor * f64::from(*w)));
        }
        (out, residual)
    }
}

fn check(instances: Vec<Instance<RmsNormArgs>>, hidden: usize, group: usize) {
    for (vectors, kernel) in instances {
        for seed in 0..12 {
            let input = Input::new(hidden, seed);
            let (expected, expected_residual) = input.expected(hidden);
            let rows = expected.len() / hidden;
            let what = format!("{vectors}, hidden {hidden}, group {group}, seed {seed}");
            let mut residual = input.residual.clone();
            let mut int8 = Int8Rows::new(rows, hidden, if group > 0 { group } else { hidden });
            let mut bf16 = Bf16Rows::new(rows, hidden);
            let mut float = vec![f32::NAN; rows * hidden];
            let args = RmsNormArgs {
                rows,
                select: input.select.as_ref().map_or(std::ptr::null(), |x| x.as_ptr()),
                residual: residual.as_mut_ptr(),
                delta: input.delta.as_ref().map_or(std::ptr::null(), |x| x.as_ptr()),
                weight: input.weight.as_ptr(),
                eps: EPS,
                out: match group {
                    0 => float_out(&mut float),
                    BF16_GROUP => bf16.out(),
                    _ => int8.out(),
                },
            };
            run(kernel, &args, 1 + seed as usize % 3, 0);
            assert_same_bits(&residual, &expected_residual, &what);
            let rounded: Vec<f32> = expected.iter().map(|x| *x as f32).collect();
            match group {
                0 => assert_close(&float, &expected, F32_TOLERANCE, &what),
                BF16_GROUP => bf16.check(&rounded, F32_TOLERANCE as f32, &what),
                _ => int8.check(&rounded, F32_TOLERANCE as f32, &what),
            }
        }
    }
}

#[test]
fn rms_norm_to_float() {
    check(instances!(RmsNormArgs, rms_norm::run::<S, 576, 0>), 576, 0);
    check(instances!(RmsNormArgs, rms_norm::run::<S, 24, 0>), 24, 0);
    check(instances!(RmsNormArgs, rms_norm::run::<S, 100, 0>), 100, 0);
    check(instances!(RmsNormArgs, rms_norm::run::<S, 5, 0>), 5, 0);
}

#[test]
fn rms_norm_to_int8() {
    check(instances!(RmsNormArgs, rms_norm::run::<S, 576, 64>), 576, 64);
    check(instances!(RmsNormArgs, rms_norm::run::<S, 96, 32>), 96, 32);
    check(instances!(RmsNormArgs, rms_norm::run::<S, 40, 8>), 40, 8);
}

#[test]
fn rms_norm_to_bf16() {
    check(instances!(RmsNormArgs, rms_norm::run::<S, 576, 1>), 576, BF16_GROUP);
    check(instances!(RmsNormArgs, rms_norm::run::<S, 100, 1>), 100, BF16_GROUP);
    check(instances!(RmsNormArgs, rms_norm::run::<S, 5, 1>), 5, BF16_GROUP);
}
