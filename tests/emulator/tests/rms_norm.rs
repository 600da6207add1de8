//! `rms_norm` against a plain loop in float64.

use bespoke_emulator::Access;
use bespoke_kernel_gen::cuda::{Arch, Regime, RmsNorm, RowType, Spec};

use crate::common::{
    Params, Random, SEEDS, emulator, generated, launch, models, round, to_f32, to_u16, tolerance,
    upload, widen,
};

const EPSILON: f32 = 1e-5;

/// Which rows a launch is given, and what is added to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Input {
    Rows,
    WithDelta,
    SelectedWithDelta,
}

fn check(rows: RowType, hidden: usize, num_rows: usize, input: Input, seed: u64) {
    let variant = Spec::from(RmsNorm { hidden, rows }).variant(Regime::Any, Arch::Sm80);
    let library = generated(&variant);
    let mut random = Random(seed);
    let residual = random.floats(num_rows * hidden, 4.0);
    let delta: Vec<u16> = (0..num_rows * hidden).map(|_| round(rows, random.float())).collect();
    let weight = random.floats(hidden, 2.0);
    let select: Vec<u32> = match input {
        Input::SelectedWithDelta => (0..num_rows as u32).rev().step_by(2).collect(),
        Input::Rows | Input::WithDelta => (0..num_rows as u32).collect(),
    };

    let mut device = emulator(seed);
    let residual_at = upload(&mut device, &residual, Access::ReadWrite);
    let delta_at = match input {
        Input::Rows => 0,
        Input::WithDelta | Input::SelectedWithDelta => {
            upload(&mut device, &delta, Access::ReadOnly)
        }
    };
    let weight_at = upload(&mut device, &weight, Access::Constant);
    let select_at = match input {
        Input::SelectedWithDelta => upload(&mut device, &select, Access::ReadOnly),
        Input::Rows | Input::WithDelta => 0,
    };
    let out = device.alloc(select.len() * hidden * 2, Access::ReadWrite);
    let params = Params::default().u64(residual_at).u64(delta_at).u64(weight_at).u64(select_at);
    let params = params.u64(out).u32(select.len() as u32).f32(EPSILON);
    let report = launch(&mut device, &library, &variant, select.len(), &params);
    let report = report.unwrap_or_else(|fault| panic!("{hidden} {input:?} seed {seed}: {fault}"));
    assert_eq!(report.bank_conflicts(), 0);

    let after = to_f32(&device.read(residual_at, residual.len() * 4).unwrap());
    let got = to_u16(&device.read(out, select.len() * hidden * 2).unwrap());
    let mut expected_after = residual.clone();
    for (i, &row) in select.iter().enumerate() {
        let at = row as usize * hidden;
        if input != Input::Rows {
            for j in at..at + hidden {
                expected_after[j] += widen(rows, delta[j]);
            }
        }
        let x = &expected_after[at..at + hidden];
        let squares: f64 = x.iter().map(|&v| f64::from(v).powi(2)).sum();
        let factor = 1.0 / (squares / hidden as f64 + f64::from(EPSILON)).sqrt();
        for (j, (&x, &weight)) in x.iter().zip(&weight).enumerate() {
            let expected = (f64::from(x) * factor * f64::from(weight)) as f32;
            let value = widen(rows, got[i * hidden + j]);
            assert!(
                (value - expected).abs() <= tolerance(rows, expected),
                "{rows:?} {hidden} {input:?} row {row} element {j}: {value} instead of {expected}"
            );
        }
    }
    assert_eq!(after, expected_after, "{hidden} {input:?}: the residual");
}

#[test]
fn equals_a_plain_loop() {
    for rows in RowType::ALL {
        // The sizes of SmolLM2 and of the tiny models, more than a block's threads reach at once,
        // and what 16 bytes do not divide.
        for hidden in [576, 64, 128, 4104, 1, 31, 33, 100, 515] {
            for seed in SEEDS {
                for input in [Input::Rows, Input::WithDelta, Input::SelectedWithDelta] {
                    check(rows, hidden, 1 + seed as usize, input, seed);
                }
            }
        }
    }
}

/// The same bits for a row, whatever else is in the launch.
#[test]
fn rows_are_independent() {
    let variant =
        Spec::from(RmsNorm { hidden: 576, rows: RowType::BF16 }).variant(Regime::Any, Arch::Sm80);
    let library = generated(&variant);
    let residual = Random(1).floats(7 * 576, 4.0);
    let run = |rows: &[f32], seed| {
        let mut device = emulator(seed);
        let num_rows = rows.len() / 576;
        let residual = upload(&mut device, rows, Access::ReadWrite);
        let weight = upload(&mut device, &[1.0_f32; 576], Access::Constant);
        let out = device.alloc(num_rows * 576 * 2, Access::ReadWrite);
        let params = Params::default().u64(residual).u64(0).u64(weight).u64(0).u64(out);
        let params = params.u32(num_rows as u32).f32(EPSILON);
        launch(&mut device, &library, &variant, num_rows, &params).unwrap();
        device.read(out, num_rows * 576 * 2).unwrap()
    };
    let together = run(&residual, 1);
    for (i, row) in residual.chunks(576).enumerate() {
        assert_eq!(run(row, i as u64), together[i * 576 * 2..][..576 * 2]);
    }
}

#[test]
fn kernels_of_the_models() {
    for spec in models::specs() {
        if let Spec::RmsNorm(op) = spec {
            for seed in SEEDS {
                for input in [Input::Rows, Input::WithDelta, Input::SelectedWithDelta] {
                    check(op.rows, op.hidden, 1 + seed as usize, input, seed);
                }
            }
        }
    }
}
