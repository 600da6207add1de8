//! Kernels of aarch64 against naive loops, and tiny models that run on them. `check.sh` builds this
//! for another machine's processor, with the kernels of the models below (`BESPOKE_MODEL`).

#![cfg(target_arch = "aarch64")]

#[path = "../it/golden/expected.rs"]
mod expected;
#[cfg(feature = "ops")]
#[path = "../it/ops/mod.rs"]
mod ops;

use std::ops::ControlFlow;
use std::path::PathBuf;

use bespoke::backend::cpu::is_available;
use bespoke::config::{BackendChoice, EngineOptions};
use bespoke::engine::Engine;
use bespoke::kernels::generated;
use bespoke::request::Request;
use bespoke_kernel_gen::spec::{ActivationType, KvDType};
use bespoke_kernel_gen::target::Target;

/// The folder of golden files.
pub(crate) fn golden_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../golden")
}

/// Dense, int4, and heads that fill no vector.
const CASES: [&str; 3] = ["llama-gqa2", "llama-awq-g32", "llama-mqa-hd24"];

const TARGETS: [Target; 2] = [Target::Portable, Target::Neon];

fn options(target: Target) -> EngineOptions {
    EngineOptions {
        backend: BackendChoice::Cpu,
        target: Some(target),
        num_threads: Some(2),
        max_context: Some(96),
        ..EngineOptions::new(generated::table())
    }
}

#[test]
fn there_are_kernels_of_this_architecture_alone() {
    assert!(is_available(Target::Neon));
    assert_eq!(Target::best(), Target::Neon);
    let kernels = generated::table().kernels;
    let num = |target| kernels.iter().filter(|kernel| kernel.target == target).count();
    let [portable, neon] = TARGETS.map(num);
    assert!(neon > 0);
    assert_eq!((portable, portable + neon), (neon, kernels.len()));
}

/// The tokens of transformers, which the x86 kernels are held to as well.
#[test]
fn float_rows_give_the_golden_tokens() {
    for case in CASES {
        for target in TARGETS {
            let float = expected::float_options(BackendChoice::Cpu, generated::table());
            let options = EngineOptions { target: Some(target), num_threads: Some(2), ..float };
            expected::check(case, &options);
        }
    }
}

/// The tokens of plain Rust, which are the same on every machine, from int8 rows and small caches.
#[test]
fn int8_rows_give_the_tokens_of_plain_rust() {
    let tokens = |case: &str, target, kv_dtype| {
        let options =
            EngineOptions { kv_dtype, activation: ActivationType::Int8, ..options(target) };
        let mut engine = Engine::load(&expected::case_dir(case), &options, &mut |_| {}).unwrap();
        let request = Request {
            prompt_ids: vec![1, 2, 3, 150, 77, 9, 9, 8, 31, 100],
            max_tokens: 24,
            ignore_eos: true,
            ..Request::default()
        };
        let answer = engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap();
        answer.output_ids
    };
    for case in CASES {
        for kv_dtype in [KvDType::F16, KvDType::I8, KvDType::I4] {
            let [portable, neon] = TARGETS.map(|target| tokens(case, target, kv_dtype));
            assert_eq!(portable.len(), 24);
            assert_eq!(portable, neon, "{case}, {kv_dtype:?}");
        }
    }
}
