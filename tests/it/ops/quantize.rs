//! `quantize`: float rows to int8 or bfloat16 rows.

use bespoke::kernels::abi::QuantizeArgs;
use bespoke::kernels::quantize;

use super::{Bf16Rows, Instance, Int8Rows, Random, instances, run};

fn check(instances: Vec<Instance<QuantizeArgs>>, k: usize, group: usize) {
    for (vectors, kernel) in instances {
        for (seed, rows) in [1, 2, 5].into_iter().enumerate() {
            for shares in [1, 2, 3] {
                let what = format!("{vectors}, k {k}, group {group}, seed {seed}, shares {shares}");
                let mut random = Random(seed as u64);
                let mut x = random.floats(rows * k);
                // One group of zeros, one of large and one of small values, and an exact tie.
                x[..group].fill(0.0);
                x[k - group..k].iter_mut().for_each(|x| *x *= 1e30);
                x[(rows - 1) * k..][..group].iter_mut().for_each(|x| *x *= 1e-20);
                x[(rows - 1) * k] = 1.27;
                x[(rows - 1) * k + 1] = 0.025;
                let mut out = Int8Rows::new(rows, k, group);
                run(kernel, &QuantizeArgs { rows, x: x.as_ptr(), out: out.out() }, shares, 0);
                out.check(&x, 0.0, &what);
            }
        }
    }
}

#[test]
fn quantize_rounds_groups() {
    check(instances!(QuantizeArgs, quantize::run::<S, 576, 64>), 576, 64);
    check(instances!(QuantizeArgs, quantize::run::<S, 96, 32>), 96, 32);
    check(instances!(QuantizeArgs, quantize::run::<S, 72, 24>), 72, 24);
    check(instances!(QuantizeArgs, quantize::run::<S, 40, 8>), 40, 8);
    check(instances!(QuantizeArgs, quantize::run::<S, 256, 128>), 256, 128);
}

/// Ties, the largest and the smallest numbers, infinity and NaN among others.
fn check_bf16(instances: Vec<Instance<QuantizeArgs>>, k: usize) {
    let bits = [0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0x3f80_7fff, 0x0080_0000, 0x0000_0001];
    let bits = bits.into_iter().chain([0x7f7f_ffff, 0x7f80_0000, 0x7fff_ffff, 0x7f80_0001]);
    let values = bits.flat_map(|bits| [f32::from_bits(bits), f32::from_bits(bits | 1 << 31)]);
    let values: Vec<f32> = values.collect();
    for (vectors, kernel) in instances {
        for (rows, shares) in [(1, 1), (2, 3), (5, 2)] {
            let mut x = Random(k as u64).floats(rows * k);
            x.iter_mut().step_by(3).zip(values.iter().cycle()).for_each(|(x, value)| *x = *value);
            let mut out = Bf16Rows::new(rows, k);
            run(kernel, &QuantizeArgs { rows, x: x.as_ptr(), out: out.out() }, shares, 0);
            out.check(&x, 0.0, &format!("{vectors}, k {k}, rows {rows}, shares {shares}"));
        }
    }
}

#[test]
fn quantize_rounds_to_bf16() {
    check_bf16(instances!(QuantizeArgs, quantize::run::<S, 576, 1>), 576);
    check_bf16(instances!(QuantizeArgs, quantize::run::<S, 120, 1>), 120);
    check_bf16(instances!(QuantizeArgs, quantize::run::<S, 7, 1>), 7);
}
