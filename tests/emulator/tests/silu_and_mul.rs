//! `silu_and_mul` against a plain loop.

use bespoke_emulator::Access;
use bespoke_kernel_gen::cuda::{Arch, Regime, RowType, SiluAndMul, Spec};

use crate::common::{
    Params, Random, SEEDS, emulator, generated, launch, models, round, to_u16, tolerance, upload,
    widen,
};

fn check(rows: RowType, intermediate: usize, num_rows: usize) {
    let variant = Spec::from(SiluAndMul { intermediate, rows }).variant(Regime::Any, Arch::Sm90a);
    let library = generated(&variant);
    for seed in SEEDS {
        let mut random = Random(seed);
        let values = random.floats(num_rows * 2 * intermediate, 8.0);
        let x: Vec<u16> = values.iter().map(|&v| round(rows, v)).collect();
        let mut device = emulator(seed);
        let gate_up = upload(&mut device, &x, Access::ReadOnly);
        let out = device.alloc(num_rows * intermediate * 2, Access::ReadWrite);
        let params = Params::default().u64(gate_up).u64(out).u32(num_rows as u32).u32(0);
        let result = launch(&mut device, &library, &variant, num_rows, &params);
        let report = result.unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        assert!(report.grid_waited);
        let got = to_u16(&device.read(out, num_rows * intermediate * 2).unwrap());
        for (i, &bits) in got.iter().enumerate() {
            let (row, col) = (i / intermediate, i % intermediate);
            let gate = f64::from(widen(rows, x[row * 2 * intermediate + col]));
            let up = f64::from(widen(rows, x[(row * 2 + 1) * intermediate + col]));
            let expected = (gate / (1.0 + (-gate).exp()) * up) as f32;
            let value = widen(rows, bits);
            assert!(
                (value - expected).abs() <= tolerance(rows, expected),
                "{rows:?} {row} {col}: {value} instead of {expected}"
            );
        }
    }
}

#[test]
fn equals_a_plain_loop() {
    for rows in RowType::ALL {
        for (intermediate, num_rows) in [(1536, 3), (64, 1), (96, 17), (2, 5), (86, 3), (172, 1)] {
            check(rows, intermediate, num_rows);
        }
    }
}

#[test]
fn kernels_of_the_models() {
    for spec in models::specs() {
        if let Spec::SiluAndMul(op) = spec {
            check(op.rows, op.intermediate, 5);
        }
    }
}
