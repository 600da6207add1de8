//! Generates the kernels of the tiny golden models, of one of them with every page size.

use std::path::PathBuf;

use bespoke_kernel_gen::cargo::{Configs, build_configs};
use bespoke_kernel_gen::plan::PlanOptions;
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
    // NOTE: the machine that builds the tests is the one that runs them. The op tests cover the other
    // targets.
    let targets = [Target::best()];
    let options = PlanOptions::default();
    let all = Configs { paths: &configs, targets: &targets, page_size: 32, options };
    build_configs(&all, "");
    let one = [tiny.join("llama-gqa2/config.json")];
    for (page_size, folder) in [(16, "pages16"), (64, "pages64")] {
        build_configs(&Configs { paths: &one, page_size, ..all }, folder);
    }
}
