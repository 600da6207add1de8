//! A group per op: every kernel that this binary holds for the best instruction set of the machine.
//!
//! After criterion's own lines each kernel prints its rates and the share of what the machine
//! allows. `BESPOKE_BENCH_OUT=benches/runs cargo bench -p bespoke-benches --bench kernels` also
//! writes the table to `<date>-<device>/kernels.md` below that folder.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a bench reports to its terminal")]

use std::time::Duration;

use bespoke::backend::cpu::best_target;
use bespoke::kernels::{Kernel, generated};
use bespoke_benches::case::{OPS, Scratch, row_counts};
use bespoke_benches::report::Samples;
use bespoke_benches::{Bench, Case};
use criterion::{BenchmarkId, Criterion, Throughput};

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
        .configure_from_args();
    if let Err(error) = bench_kernels(&mut criterion) {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
    criterion.final_summary();
}

fn bench_kernels(criterion: &mut Criterion) -> Result<(), bespoke::Error> {
    let table = generated::table();
    let target = best_target(&table).expect("a build holds kernels for every machine");
    let mut kernels: Vec<&'static Kernel> =
        table.kernels.iter().filter(|kernel| kernel.target == target).collect();
    kernels.sort_by_key(|kernel| OPS.iter().position(|op| *op == kernel.spec.op()));
    let mut bench = Bench::new()?;
    let mut scratch = Scratch::new(bench.team.len(), kernels.iter().copied())?;
    for kernel in kernels {
        for rows in row_counts(kernel.regime) {
            bench_kernel(criterion, &mut bench, &mut scratch, kernel, *rows)?;
        }
    }
    bench.finish("kernels.md")
}

fn bench_kernel(
    criterion: &mut Criterion,
    bench: &mut Bench,
    scratch: &mut Scratch,
    kernel: &Kernel,
    rows: usize,
) -> Result<(), bespoke::Error> {
    let mut samples = Samples::default();
    let mut made = None;
    let mut group = criterion.benchmark_group(kernel.spec.op());
    group.throughput(Throughput::Elements(rows as u64));
    group.bench_function(BenchmarkId::new(kernel.symbol, rows), |bencher| {
        // Only a kernel that the command line's filter lets through gets its data.
        let case = made.get_or_insert_with(|| Case::new(kernel, rows));
        let Ok(case) = case else { return };
        bencher.iter_custom(|num_calls| {
            samples.time(num_calls, || case.run(&mut bench.team, scratch))
        });
    });
    group.finish();
    match made {
        None => Ok(()),
        Some(Err(error)) => Err(error),
        Some(Ok(case)) => {
            bench.record(case.op, case.symbol, rows, case.work, samples);
            Ok(())
        }
    }
}
