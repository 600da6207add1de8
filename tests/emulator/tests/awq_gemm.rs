//! `awq_gemm` against a loop in float64, and against itself.

use bespoke_kernel_gen::cuda::{Arch, AwqGemm, RowType, Spec};
use bespoke_kernel_gen::spec::GroupSize;

use crate::common::{SEEDS, models};
use crate::matmul::{Kernel, Linear, ROW_COUNTS, check_kernels};

fn check(n: usize, k: usize, group: GroupSize, arch: Arch, row_counts: &[usize], seeds: &[u64]) {
    for rows in RowType::ALL {
        let op = AwqGemm { n, k, group, rows };
        let kernels = Kernel::all(&op.into(), arch);
        for (i, seed) in seeds.iter().enumerate() {
            // All row counts once, then a few of them with other numbers.
            let row_counts = if i == 0 { row_counts } else { &[2, 17, 65] };
            let rows_max = row_counts.iter().copied().max().unwrap();
            let linear = Linear::awq(op, rows_max, seed % 2 == 1, *seed);
            linear.check(&kernels, row_counts, *seed);
        }
    }
}

#[test]
fn group_sizes() {
    for group in [32, 64, 128] {
        check(64, 256, GroupSize::Of(group), Arch::Sm90a, &ROW_COUNTS, &SEEDS);
    }
    check(64, 512, GroupSize::Of(256), Arch::Sm90a, &[1, 16, 65], &SEEDS);
    check(64, 256, GroupSize::Channel, Arch::Sm90a, &ROW_COUNTS, &SEEDS);
}

#[test]
fn sizes_that_tiles_do_not_divide() {
    check(72, 96, GroupSize::Of(32), Arch::Sm80, &ROW_COUNTS, &SEEDS);
    check(200, 1040, GroupSize::Of(16), Arch::Sm86, &[1, 9, 17, 33, 65], &SEEDS);
    check(8, 200, GroupSize::Channel, Arch::Sm90a, &[1, 16, 65], &SEEDS);
}

#[test]
fn groups_that_fragments_do_not_divide() {
    for group in [8, 24, 40, 48, 80, 96, 192] {
        check(40, group * 5, GroupSize::Of(group), Arch::Sm90a, &[1, 9, 65], &SEEDS[..2]);
    }
}

#[test]
fn kernels_of_the_models() {
    for spec in models::specs() {
        if let Spec::AwqGemm(op) = spec {
            let kernels = Kernel::all(&spec, Arch::Sm90a);
            check_kernels(&kernels, |num_rows, seed| {
                Linear::awq(op, num_rows, seed % 2 == 1, seed)
            });
        }
    }
}
