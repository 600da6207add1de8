//! `bespoke verify` on emulated CUDA.

use std::path::PathBuf;

use bespoke::verify::{Report, cuda};
use bespoke_kernel_gen::cuda::Arch;
use bespoke_kernel_gen::cuda::plan::plan;
use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::spec::ModelShape;

use crate::engine::device::Emulated;

fn shape(case: &str) -> ModelShape {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../golden/tiny").join(case);
    ModelConfig::from_file(&folder.join("config.json")).unwrap().shape(case).unwrap()
}

/// All kernels of a model are run, and right.
fn check(case: &str) {
    let shape = shape(case);
    let mut report = Report::default();
    let mut open = || Ok(Emulated::new(11));
    cuda(&mut open, std::slice::from_ref(&shape), &mut report, &mut |_| {}).unwrap();
    let failures: Vec<_> = report.failures().collect();
    assert!(failures.is_empty(), "{failures:#?}");
    for variant in plan(&[shape], &[Arch::Sm90a]).unwrap() {
        assert!(report.kernels.contains(&variant.symbol()), "{variant} was not verified");
    }
}

#[test]
fn dense_kernels() {
    check("llama-gqa2");
}

#[test]
fn awq_kernels() {
    check("llama-awq-g32");
}

#[test]
fn kernels_of_a_mixed_model() {
    check("llama-awq-mixed");
}

#[test]
fn kernels_with_query_norms() {
    check("qwen3-qknorm");
}

/// Whatever op fails to do its work is named.
#[test]
fn broken_kernels_are_named() {
    let shape = shape("llama-awq-g32");
    for op in ["embed", "rms_norm", "awq_gemm", "rope", "paged_attention", "silu_and_mul", "sample"]
    {
        let mut report = Report::default();
        let mut open = || Ok(Emulated::broken(12, op));
        cuda(&mut open, std::slice::from_ref(&shape), &mut report, &mut |_| {}).unwrap();
        let names = |kernels: &[String]| kernels.iter().any(|symbol| symbol.starts_with(op));
        let first = report.failures().next().unwrap_or_else(|| panic!("{op} is not missed"));
        assert!(names(&first.kernels), "{op}: {first:?}");
    }
}
