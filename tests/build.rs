//! Generates the kernels of the tiny golden models.

use std::path::PathBuf;

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
    bespoke_kernel_gen::cargo::build_configs(&configs);
}
