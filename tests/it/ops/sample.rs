//! `sample`: statistics of logits.

use bespoke::kernels::abi::{LogitStats, SampleArgs};
use bespoke::kernels::sample;

use super::{Instance, Random, instances, run};

/// Sums of up to `vocab / 8` exponentials a lane, each within 2e-7; the logarithm makes relative
/// errors of the sum absolute.
const F32_TOLERANCE: f64 = 1e-5;

fn expected(logits: &[f32]) -> (f32, u32, f64) {
    let mut best = (f32::NEG_INFINITY, 0);
    for (i, x) in logits.iter().enumerate() {
        if *x > best.0 {
            best = (*x, i as u32);
        }
    }
    let max = f64::from(best.0);
    let terms = logits.iter().filter(|x| !x.is_nan()).map(|x| (f64::from(*x) - max).exp());
    let sum = if max.is_finite() { max + terms.sum::<f64>().ln() } else { max };
    (best.0, best.1, sum)
}

/// Rows of `vocab` logits, one kind of trouble each.
fn rows(vocab: usize, seed: u64) -> Vec<f32> {
    let mut random = Random(seed);
    let mut rows = random.floats(8 * vocab);
    rows.iter_mut().for_each(|x| *x *= 20.0);
    let last = vocab - 1;
    let row = |i: usize| i * vocab;
    // Ties of the maximum, the smallest index anywhere.
    let first = random.below(vocab);
    for i in [first, random.below(vocab), last] {
        rows[row(1) + i] = 50.0;
    }
    rows[row(2) + last] = 40.0;
    rows[row(3)..row(4)].fill(f32::NEG_INFINITY);
    rows[row(4)..row(5)].fill(f32::NAN);
    for _ in 0..vocab / 3 + 1 {
        rows[row(5) + random.below(vocab)] = f32::NAN;
        rows[row(6) + random.below(vocab)] = f32::NEG_INFINITY;
    }
    rows[row(7) + random.below(vocab)] = f32::INFINITY;
    rows
}

fn check(instances: Vec<Instance<SampleArgs>>, vocab: usize) {
    for (vectors, kernel) in instances {
        for seed in 0..4 {
            let logits = rows(vocab, seed);
            let mut out = vec![LogitStats::default(); logits.len() / vocab];
            let args =
                SampleArgs { rows: out.len(), logits: logits.as_ptr(), out: out.as_mut_ptr() };
            run(kernel, &args, 1 + seed as usize % 3, 0);
            for (row, (stats, logits)) in out.iter().zip(logits.chunks(vocab)).enumerate() {
                let what = format!("{vectors}, vocab {vocab}, seed {seed}, row {row}");
                let (max, argmax, log_sum_exp) = expected(logits);
                assert_eq!((stats.max, stats.argmax), (max, argmax), "{what}");
                let got = f64::from(stats.log_sum_exp);
                let close = (got - log_sum_exp).abs() <= F32_TOLERANCE;
                assert!(close || got == log_sum_exp, "{what}: {got}, expected {log_sum_exp}");
            }
        }
    }
}

#[test]
fn sample_statistics() {
    check(instances!(SampleArgs, sample::run::<S, 49152>), 49152);
    check(instances!(SampleArgs, sample::run::<S, 1000>), 1000);
    check(instances!(SampleArgs, sample::run::<S, 67>), 67);
    check(instances!(SampleArgs, sample::run::<S, 3>), 3);
}
