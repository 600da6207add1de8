//! `silu_and_mul`: the activation between gate, up and down.

use bespoke::kernels::abi::SiluAndMulArgs;
use bespoke::kernels::bf16::BF16_GROUP;
use bespoke::kernels::silu_and_mul;

use super::{Bf16Rows, Instance, Int8Rows, Random, assert_close, float_out, instances, run};

/// Values of the order of 12: the exponential (2e-7), a sum, a quotient and a product (2⁻²⁴ each).
const F32_TOLERANCE: f64 = 12.0 * 4e-7;

fn silu_and_mul(gate_up: &[f32], intermediate: usize) -> Vec<f64> {
    let row = |row: &[f32]| -> Vec<f64> {
        let (gate, up) = row.split_at(intermediate);
        let pairs = gate.iter().zip(up);
        pairs
            .map(|(g, u)| (f64::from(*g), f64::from(*u)))
            .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
            .collect()
    };
    gate_up.chunks(2 * intermediate).flat_map(row).collect()
}

fn check(instances: Vec<Instance<SiluAndMulArgs>>, intermediate: usize, group: usize) {
    for (vectors, kernel) in instances {
        for seed in 0..9 {
            let what = format!("{vectors}, {intermediate}, group {group}, seed {seed}");
            let mut random = Random(seed);
            let rows = [1, 2, 5][random.below(3)];
            let mut gate_up = random.floats(rows * 2 * intermediate);
            gate_up.iter_mut().for_each(|x| *x *= 3.5);
            // The ends of the exponential's range.
            gate_up[..6].copy_from_slice(&[-1000.0, -88.5, -87.0, -0.0, 12.0, 0.0]);
            let expected = silu_and_mul(&gate_up, intermediate);
            let mut int8 = Int8Rows::new(rows, intermediate, group.max(1));
            let mut bf16 = Bf16Rows::new(rows, intermediate);
            let mut float = vec![f32::NAN; rows * intermediate];
            let out = match group {
                0 => float_out(&mut float),
                BF16_GROUP => bf16.out(),
                _ => int8.out(),
            };
            let args = SiluAndMulArgs { rows, gate_up: gate_up.as_ptr(), out };
            run(kernel, &args, 1 + seed as usize % 3, 0);
            let rounded: Vec<f32> = expected.iter().map(|x| *x as f32).collect();
            match group {
                0 => assert_close(&float, &expected, F32_TOLERANCE * 4.0, &what),
                BF16_GROUP => bf16.check(&rounded, F32_TOLERANCE as f32 * 4.0, &what),
                _ => int8.check(&rounded, F32_TOLERANCE as f32, &what),
            }
        }
    }
}

#[test]
fn silu_and_mul_to_float() {
    check(instances!(SiluAndMulArgs, silu_and_mul::run::<S, 1536, 0>), 1536, 0);
    check(instances!(SiluAndMulArgs, silu_and_mul::run::<S, 52, 0>), 52, 0);
    check(instances!(SiluAndMulArgs, silu_and_mul::run::<S, 7, 0>), 7, 0);
}

#[test]
fn silu_and_mul_to_int8() {
    check(instances!(SiluAndMulArgs, silu_and_mul::run::<S, 1536, 64>), 1536, 64);
    check(instances!(SiluAndMulArgs, silu_and_mul::run::<S, 72, 24>), 72, 24);
}

#[test]
fn silu_and_mul_to_bf16() {
    check(instances!(SiluAndMulArgs, silu_and_mul::run::<S, 1536, 1>), 1536, BF16_GROUP);
    check(instances!(SiluAndMulArgs, silu_and_mul::run::<S, 7, 1>), 7, BF16_GROUP);
}
