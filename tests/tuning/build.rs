//! Generates the default kernels of one tiny model for this machine.

use std::path::PathBuf;

use bespoke_kernel_gen::cargo::{Configs, build_configs};
use bespoke_kernel_gen::plan::PlanOptions;
use bespoke_kernel_gen::target::Target;

fn main() {
    let folder = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let config = folder.join("../golden/tiny/llama-awq-g32/config.json");
    let options = PlanOptions::default();
    // NOTE: the machine that builds the tests is the one that runs them.
    let targets = [Target::best()];
    build_configs(&Configs { paths: &[config], targets: &targets, page_size: 32, options }, "");
}
