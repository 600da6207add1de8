//! Generates the kernels of the tiny golden models, of one of them with every page size, of another
//! for every target.

use std::path::PathBuf;

use bespoke_kernel_gen::cargo::build_configs;
use bespoke_kernel_gen::target::Target;

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
    let targets = [this_machine()];
    build_configs(&configs, &targets, 32, "");
    let one = [tiny.join("llama-gqa2/config.json")];
    let mixed = [tiny.join("llama-awq-mixed/config.json")];
    build_configs(&mixed, &Target::ALL, 32, "targets");
    for (page_size, folder) in [(16, "pages16"), (64, "pages64")] {
        build_configs(&one, &targets, page_size, folder);
    }
}

/// The best target of the machine that builds the tests, which is the one that runs them. The op
/// tests cover the others.
fn this_machine() -> Target {
    #[cfg(target_arch = "x86_64")]
    {
        let has_v3 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let has_avx512 = is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx512bf16")
            && is_x86_feature_detected!("avx512vl");
        match (has_v3, has_avx512) {
            (true, true) => return Target::Avx512,
            (true, false) => return Target::X86_64V3,
            (false, _) => {}
        }
    }
    Target::Portable
}
