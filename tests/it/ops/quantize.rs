//! `quantize`: float rows to int8 rows.

use bespoke::kernels::abi::QuantizeArgs;
use bespoke::kernels::quantize;

use super::{Instance, Int8Rows, Random, instances, run};

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
