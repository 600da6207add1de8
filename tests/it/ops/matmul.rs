//! What the tests of both matmuls share: row regimes, rows, threads.

use super::run;
use bespoke::kernels::abi::{Share, int8_stride};

/// Row counts at the edges of the regimes and of the row blocks.
pub(super) const ROWS: [usize; 9] = [1, 2, 3, 5, 8, 9, 13, 50, 61];

/// The kernels of the three row regimes.
pub(super) type Regimes<A> = [unsafe fn(&A, Share); 3];

/// The three row regimes of a matmul on every instruction set of this machine, in a configuration
/// with remainders in pairs and in two with halves, with the lanes of a packed tile; element type,
/// where there is one, and sizes follow the entry points.
macro_rules! regimes {
    ($args:ty, $op:ident, [$one:ident, $few:ident, $many:ident], $($generic:tt)+) => {{
        use $crate::ops::instances;
        // A block of many float rows cannot be repeated.
        const HALVES: usize = (stringify!($many).as_bytes()[0] == b'i') as usize;
        // Behind the sizes: cols, rows, tiles, unroll, prefetch, split, halves.
        let one = instances!($args, $op::$one::<S, $($generic)+, 4, 1, 4, 1, 2048, 0, 0>);
        let few = instances!($args, $op::$few::<S, $($generic)+, 4, 4, 4, 1, 2048, 0, 0>);
        let many = instances!($args, $op::$many::<S, $($generic)+, 4, 6, 2, 1, 0, 48, 0>);
        let few_8 = instances!($args, $op::$few::<S, $($generic)+, 4, 8, 2, 1, 0, 0, 1>);
        let many_8 = instances!($args, $op::$many::<S, $($generic)+, 4, 8, 1, 1, 0, 0, HALVES>);
        let few_14 = instances!($args, $op::$few::<S, $($generic)+, 4, 14, 1, 1, 0, 0, 1>);
        let many_6 = instances!($args, $op::$many::<S, $($generic)+, 4, 6, 4, 1, 0, 3, HALVES>);
        let sets = [(few, many), (few_8, many_8), (few_14, many_6)];
        sets.into_iter().flat_map(move |(few, many)| {
            let sets = one.clone().into_iter().zip(few).zip(many);
            sets.map(|((one, few), many)| {
                let lanes = if one.0 == "avx512" { 16 } else { 8 };
                (lanes, [one.1, few.1, many.1])
            })
        })
    }};
}
pub(super) use regimes;

/// Runs the kernel of the regime of `rows` in `count` shares.
pub(super) fn run_shares<A>(regimes: &Regimes<A>, rows: usize, args: &A, count: usize) {
    let kernel = match rows {
        1 => regimes[0],
        2..=8 => regimes[1],
        _ => regimes[2],
    };
    // K_BLOCK inputs of four tiles of sixteen float32 columns.
    run(kernel, args, count, 512 * 64 * 4);
}

/// Compares rows with the same rows of earlier, shorter calls bit for bit, and remembers new ones.
pub(super) fn assert_same_rows(known: &mut Vec<f32>, out: &[f32], rows: usize, n: usize) {
    for (at, (a, b)) in known.iter().zip(out).enumerate() {
        assert_eq!(a.to_bits(), b.to_bits(), "row {} of {rows} has other bits", at / n);
    }
    if out.len() > known.len() {
        known.extend_from_slice(&out[known.len()..]);
    }
}

/// `(bias + Σ a·b, |bias| + Σ |a·b|)`
pub(super) fn dot(a: &[f64], b: &[f64], bias: f64) -> (f64, f64) {
    let terms = a.iter().zip(b).map(|(a, b)| a * b);
    terms.fold((bias, bias.abs()), |(sum, size), term| (sum + term, size + term.abs()))
}

/// Panics unless every value lies within `tolerance · Σ |term|` of the expected one; `out` may hold
/// fewer rows.
pub(super) fn assert_near(out: &[f32], expected: &[(f64, f64)], tolerance: f64) {
    for (at, (got, (sum, size))) in out.iter().zip(expected).enumerate() {
        let error = (f64::from(*got) - sum).abs();
        assert!(error <= tolerance * size + 1e-30, "element {at}: {got}, expected {sum}");
    }
}

/// int8 rows by a plain loop: `(q, scales, sums)` as `quantize` lays them out.
pub(super) fn quantize_rows(x: &[f32], k: usize, group: usize) -> (Vec<i8>, Vec<f32>, Vec<i32>) {
    let rows = x.len() / k;
    let mut q = vec![0i8; rows * int8_stride(k)];
    let (mut scales, mut sums) = (Vec::new(), Vec::new());
    for (row, values) in x.chunks_exact(k).enumerate() {
        for (group_idx, values) in values.chunks_exact(group).enumerate() {
            let scale = values.iter().fold(0.0f32, |max, v| max.max(v.abs())) / 127.0;
            let mut sum = 0;
            for (i, value) in values.iter().enumerate() {
                let rounded = (value / scale).round_ties_even().clamp(-127.0, 127.0) as i8;
                q[row * int8_stride(k) + group_idx * group + i] = rounded;
                sum += i32::from(rounded);
            }
            scales.push(scale);
            sums.push(sum);
        }
    }
    (q, scales, sums)
}
