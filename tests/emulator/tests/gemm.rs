//! `gemm` against a loop in float64, and against itself.

use bespoke_kernel_gen::cuda::{Arch, Gemm, OutType, RowType, Spec};

use crate::common::{SEEDS, models};
use crate::matmul::{Kernel, Linear, ROW_COUNTS, check_kernels};

fn check(n: usize, k: usize, out: OutType, arch: Arch, row_counts: &[usize], seeds: &[u64]) {
    for rows in RowType::ALL {
        let op = Gemm { n, k, rows, out };
        let kernels = Kernel::all(&op.into(), arch);
        for (i, seed) in seeds.iter().enumerate() {
            // All row counts once, then a few of them with other numbers.
            let row_counts = if i == 0 { row_counts } else { &[2, 17, 65] };
            let rows_max = row_counts.iter().copied().max().unwrap();
            let linear = Linear::dense(op, rows_max, seed % 2 == 1, *seed);
            linear.check(&kernels, row_counts, *seed);
        }
    }
}

#[test]
fn every_row_count() {
    check(64, 256, OutType::Rows, Arch::Sm90a, &ROW_COUNTS, &SEEDS);
    check(64, 256, OutType::F32, Arch::Sm86, &ROW_COUNTS, &SEEDS);
}

#[test]
fn sizes_that_tiles_do_not_divide() {
    check(72, 96, OutType::Rows, Arch::Sm80, &ROW_COUNTS, &SEEDS);
    check(200, 1040, OutType::Rows, Arch::Sm86, &[1, 9, 17, 33, 65], &SEEDS);
    // Outputs that are no multiple of 4, inputs that are no multiple of 8.
    check(37, 90, OutType::F32, Arch::Sm90a, &[1, 9, 65], &SEEDS);
    check(37, 90, OutType::Rows, Arch::Sm90a, &[1, 9, 65], &SEEDS);
}

/// Outputs from which on a kernel gets few rows and seeds, because the loop takes long.
const WIDE: usize = 10_000;

#[test]
fn kernels_of_the_models() {
    for spec in models::specs() {
        if let Spec::Gemm(op @ Gemm { n: ..WIDE, .. }) = spec {
            let kernels = Kernel::all(&spec, Arch::Sm90a);
            check_kernels(&kernels, |num_rows, seed| {
                Linear::dense(op, num_rows, seed % 2 == 1, seed)
            });
        }
    }
}

#[test]
fn wide_kernels_of_the_models() {
    for spec in models::specs() {
        if let Spec::Gemm(op @ Gemm { n: WIDE.., .. }) = spec {
            let kernels = Kernel::all(&spec, Arch::Sm90a);
            for seed in SEEDS {
                let row_counts = if seed == SEEDS[0] { &[1, 9, 17, 33, 65][..] } else { &[1, 9] };
                let rows_max = row_counts.iter().copied().max().unwrap();
                Linear::dense(op, rows_max, false, seed).check(&kernels, row_counts, seed);
            }
        }
    }
}
