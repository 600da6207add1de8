//! `bespoke verify`: the tiny models' kernels against the reference, and what it finds wrong.

use std::path::Path;

use bespoke::backend::cpu::is_available;
use bespoke::kernels::abi::{Share, SiluAndMulArgs};
use bespoke::kernels::{Kernel, KernelFn, KernelTable};
use bespoke::verify::{Report, cpu};
use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::spec::ModelShape;

/// The models that the tests' kernels are for.
fn shapes() -> Vec<ModelShape> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/tiny");
    let entries = std::fs::read_dir(&folder).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let shape = |path: &std::path::PathBuf| {
        // NOTE: models that the generator refuses are among them.
        let config = ModelConfig::from_file(&path.join("config.json")).ok()?;
        config.shape(&path.file_name()?.to_string_lossy()).ok()
    };
    paths.iter().filter_map(shape).collect()
}

#[test]
fn all_kernels_agree_with_the_reference() {
    let table = bespoke_tests::tiny_kernels();
    let mut report = Report::default();
    cpu(&table, &shapes(), &mut report, &mut |_| {}).unwrap();
    let failures: Vec<_> = report.failures().collect();
    assert!(failures.is_empty(), "{failures:#?}");
    for kernel in table.kernels {
        assert!(report.kernels.contains(kernel.symbol), "{} was not run", kernel.symbol);
    }
}

/// With float and with bfloat16 activations, on all targets of this machine.
#[test]
fn kernels_of_a_bf16_model_agree_with_the_reference() {
    let table = bespoke_tests::bf16_kernels();
    let model = crate::golden::tiny::bf16_model();
    let config = ModelConfig::from_file(&model.path().join("config.json")).unwrap();
    let mut report = Report::default();
    cpu(&table, &[config.shape("bf16").unwrap()], &mut report, &mut |_| {}).unwrap();
    let failures: Vec<_> = report.failures().collect();
    assert!(failures.is_empty(), "{failures:#?}");
    let kernels = table.kernels.iter().filter(|kernel| is_available(kernel.target));
    for kernel in kernels {
        assert!(report.kernels.contains(kernel.symbol), "{} was not run", kernel.symbol);
    }
    let num_pairs = report.kernels.iter().filter(|symbol| symbol.starts_with("gemm_bf16")).count();
    assert!(num_pairs >= 3 * 5, "three row regimes of five linears, not {num_pairs}");
}

unsafe fn nothing(_: &SiluAndMulArgs, _: Share) {}

/// The table with kernels that do nothing in place of `silu_and_mul`.
fn broken(table: &KernelTable) -> KernelTable {
    let kernel = |kernel: &Kernel| match kernel.run {
        KernelFn::SiluAndMul(_) => Kernel { run: KernelFn::SiluAndMul(nothing), ..*kernel },
        _ => *kernel,
    };
    let kernels: Vec<Kernel> = table.kernels.iter().map(kernel).collect();
    KernelTable { kernels: Vec::leak(kernels), ..*table }
}

#[test]
fn a_kernel_that_does_nothing_is_named() {
    let shapes: Vec<ModelShape> =
        shapes().into_iter().filter(|shape| shape.name == "llama-awq-g32").collect();
    assert_eq!(shapes.len(), 1);
    let mut report = Report::default();
    cpu(&broken(&bespoke_tests::tiny_kernels()), &shapes, &mut report, &mut |_| {}).unwrap();
    let mut failures = report.failures().peekable();
    assert!(failures.peek().is_some());
    for failure in failures {
        let is_named = failure.kernels.iter().all(|name| name.starts_with("silu_and_mul"));
        assert!(is_named, "{failure:?}");
    }
}
