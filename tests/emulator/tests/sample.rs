//! `sample` against a plain loop in float64.

use bespoke_emulator::Access;
use bespoke_kernel_gen::cuda::{Arch, Regime, Sample, Spec};

use crate::common::{Params, Random, SEEDS, emulator, generated, launch, models, to_u32, upload};

struct Stats {
    max: f32,
    argmax: u32,
    log_sum_exp: f32,
}

/// What the kernel promises: NaN counts as −∞, but is no place of the maximum.
fn expected(row: &[f32]) -> Stats {
    let max = row.iter().copied().filter(|v| !v.is_nan()).fold(f32::NEG_INFINITY, f32::max);
    let argmax = row.iter().position(|&v| v == max).unwrap_or(0) as u32;
    if max.is_infinite() {
        return Stats { max, argmax, log_sum_exp: max };
    }
    let numbers = row.iter().filter(|v| !v.is_nan());
    let sum: f64 = numbers.map(|&v| (f64::from(v) - f64::from(max)).exp()).sum();
    Stats { max, argmax, log_sum_exp: (f64::from(max) + sum.ln()) as f32 }
}

fn check(vocab: usize, rows: &[Vec<f32>], seed: u64) {
    let variant = Spec::from(Sample { vocab }).variant(Regime::Any, Arch::Sm80);
    let library = generated(&variant);
    let mut device = emulator(seed);
    let logits = upload(&mut device, &rows.concat(), Access::ReadOnly);
    let out = device.alloc(rows.len() * 12, Access::ReadWrite);
    let params = Params::default().u64(logits).u64(out).u32(rows.len() as u32).u32(0);
    let report = launch(&mut device, &library, &variant, rows.len(), &params);
    let report = report.unwrap_or_else(|fault| panic!("{vocab} seed {seed}: {fault}"));
    assert_eq!(report.bank_conflicts(), 0);
    let got = to_u32(&device.read(out, rows.len() * 12).unwrap());
    for (i, (row, got)) in rows.iter().zip(got.chunks(3)).enumerate() {
        let Stats { max, argmax, log_sum_exp } = expected(row);
        assert_eq!(f32::from_bits(got[0]), max, "{vocab} row {i}");
        assert_eq!(got[1], argmax, "{vocab} row {i}");
        let value = f32::from_bits(got[2]);
        let close = (value - log_sum_exp).abs() <= 1e-5 + log_sum_exp.abs() * 1e-6;
        assert!(value == log_sum_exp || close, "{vocab} row {i}: {value} {log_sum_exp}");
    }
}

#[test]
fn random_rows() {
    // SmolLM2's, the tiny models', and what neither 16 bytes nor a block divide.
    for vocab in [49152, 256, 512, 4096, 4100, 1, 2, 31, 1023, 1025, 5003] {
        for seed in SEEDS {
            let mut random = Random(seed);
            let num_rows = if vocab > 10_000 { 1 } else { 3 };
            let rows: Vec<Vec<f32>> = (0..num_rows).map(|_| random.floats(vocab, 20.0)).collect();
            check(vocab, &rows, seed);
        }
    }
}

#[test]
fn the_first_of_equal_logits_wins() {
    for vocab in [4100, 1025] {
        let mut random = Random(3);
        let rows: Vec<Vec<f32>> = (0..4)
            .map(|_| (0..vocab).map(|_| (random.below(5) as f32) - 2.0).collect())
            .chain([vec![1.5; vocab]])
            .collect();
        check(vocab, &rows, 1);
    }
}

#[test]
fn rows_that_are_no_numbers() {
    let vocab = 1030;
    let plain = Random(7).floats(vocab, 5.0);
    let with = |places: &[(usize, f32)]| {
        let mut row = plain.clone();
        for &(i, value) in places {
            row[i] = value;
        }
        row
    };
    let (nan, infinity) = (f32::NAN, f32::INFINITY);
    let mut hidden = vec![nan; vocab];
    hidden[1029] = -infinity;
    let mut last = vec![-infinity; vocab];
    last[1029] = -3.0;
    let rows = [
        with(&[(0, nan), (1029, nan), (500, nan)]),
        with(&[(700, infinity), (900, infinity)]),
        with(&[(5, -infinity), (6, nan)]),
        vec![nan; vocab],
        vec![-infinity; vocab],
        hidden,
        last,
        with(&[(0, f32::MAX), (1, -f32::MAX)]),
    ];
    for seed in SEEDS {
        check(vocab, &rows, seed);
    }
}

#[test]
fn kernels_of_the_models() {
    for spec in models::specs() {
        if let Spec::Sample(op) = spec {
            for seed in SEEDS {
                let rows = [Random(seed).floats(op.vocab, 20.0)];
                check(op.vocab, &rows, seed);
            }
        }
    }
}
