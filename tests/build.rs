//! Generates the kernels of the tiny golden models, of one of them with every page size, of another
//! for every target of this architecture, of one with a lock, and of one in bfloat16.

use std::path::{Path, PathBuf};

use bespoke_kernel_gen::cargo::{Configs, build_configs};
use bespoke_kernel_gen::compile;
use bespoke_kernel_gen::name::spec_name;
use bespoke_kernel_gen::plan::{KernelVariant, PlanOptions, Provenance, candidates};
use bespoke_kernel_gen::presets;
use bespoke_kernel_gen::render::render;
use bespoke_kernel_gen::spec::{KernelSpec, RowRegime};
use bespoke_kernel_gen::target::Target;
use bespoke_kernel_gen::tuning::device::this_cpu;
use bespoke_kernel_gen::tuning::lock::{
    Lock, LockedInterval, LockedProblem, LockedVariant, VERSION,
};

/// Mixture-of-experts models, which the generator refuses; a test checks that it does.
const REFUSED: [&str; 2] = ["mixtral-moe", "qwen3-moe"];

fn main() {
    let folder = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let tiny = folder.join("golden/tiny");
    println!("cargo::rerun-if-changed={}", tiny.display());
    let entries = std::fs::read_dir(&tiny).expect("the golden models are part of the repository");
    let mut configs: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| !REFUSED.iter().any(|name| path.ends_with(name)))
        .map(|path| path.join("config.json"))
        .collect();
    configs.sort();
    // NOTE: the machine that builds the tests is the one that runs them. The op tests cover the
    // other targets.
    let targets = [Target::best()];
    let locked = [tiny.join("llama-awq-g32/config.json")];
    let lock = lock(&locked[0], targets[0]);
    let options = PlanOptions { lock: Some(&lock), tuner: None };
    let with_lock = Configs { paths: &locked, targets: &targets, page_size: 32, options };
    build_configs(&with_lock, "locked");
    let options = PlanOptions::default();
    let all = Configs { paths: &configs, targets: &targets, page_size: 32, options };
    build_configs(&all, "");
    let one = [tiny.join("llama-gqa2/config.json")];
    let mixed = [tiny.join("llama-awq-mixed/config.json")];
    let every = Target::of_this_arch();
    build_configs(&Configs { paths: &mixed, targets: &every, ..all }, "targets");
    let bf16 = [in_bf16(&tiny.join("llama-hd80-bias/config.json"))];
    build_configs(&Configs { paths: &bf16, targets: &every, ..all }, "bf16");
    for (page_size, folder) in [(16, "pages16"), (64, "pages64")] {
        build_configs(&Configs { paths: &one, page_size, ..all }, folder);
    }
}

/// The same model with bfloat16 weights, in a folder of the build.
fn in_bf16(config: &Path) -> PathBuf {
    let text = std::fs::read_to_string(config).expect("a config of a golden model");
    let folder = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default()).join("tiny-bf16");
    std::fs::create_dir_all(&folder).expect("a folder in OUT_DIR");
    let path = folder.join("config.json");
    let text = text.replace("\"float32\"", "\"bfloat16\"");
    std::fs::write(&path, text).expect("a file in OUT_DIR");
    path
}

/// A lock for two threads of this machine, as if kernels other than the default ones had been
/// measured best for every matmul that has such: with intervals that no row regime has.
fn lock(config: &Path, target: Target) -> Lock {
    let shape = presets::shape(&config.to_string_lossy(), &[PathBuf::new()]);
    let shape = shape.expect("the golden model has a shape");
    let mut lock = Lock { version: VERSION, ..Lock::default() };
    for spec in shape.kernel_specs().into_iter().filter(KernelSpec::is_matmul) {
        let all = candidates(&spec, target);
        let default = all.iter().find(|variant| variant.is_default());
        let cols = default.expect("the default is a candidate").config.cols;
        let of_regime = |regime: RowRegime, is_default: bool| {
            let mut found = all.iter().filter(|variant| variant.config.cols == cols);
            found.find(|variant| variant.regime == regime && variant.is_default() == is_default)
        };
        let one = of_regime(RowRegime::One, true).expect("there is a default");
        let few = of_regime(RowRegime::Few, true).expect("there is a default");
        let other_few = of_regime(RowRegime::Few, false).unwrap_or(few);
        let many = of_regime(RowRegime::Many, false);
        let many = many.or(of_regime(RowRegime::Many, true)).expect("there is a default");
        let intervals = [(Some(1), one), (Some(3), other_few), (Some(12), many), (None, few)];
        lock.problems.push(LockedProblem {
            spec: spec_name(&spec),
            target: target.name().to_string(),
            device: this_cpu(2).key(),
            intervals: intervals.map(|(rows_max, variant)| interval(rows_max, variant)).into(),
        });
        lock.certificates.extend([one, few, other_few, many].map(certificate));
    }
    lock
}

fn interval(rows_max: Option<usize>, variant: &KernelVariant) -> LockedInterval {
    LockedInterval {
        rows_max,
        symbol: variant.symbol(),
        provenance: Provenance::Measured.name().to_string(),
        us: 1.0,
        default_us: 2.0,
        runner_up: None,
        runner_up_us: None,
        margin: 0.0,
    }
}

fn certificate(variant: &KernelVariant) -> LockedVariant {
    LockedVariant {
        symbol: variant.symbol(),
        source_hash: compile::hash(&render(variant)),
        certificate: "of a test".to_string(),
        compiler: "of a test".to_string(),
        code_bytes: 1,
    }
}
