//! The tables that `kernels!` declares. What it refuses is tested in its crate, on the cases in
//! `ui/`.

use std::collections::BTreeSet;

use bespoke::kernels::{Kernel, KernelTable, generated};
use bespoke_kernel_gen::name;
use bespoke_kernel_gen::plan::{self, KernelVariant, PlanOptions};
use bespoke_kernel_gen::presets;
use bespoke_kernel_gen::target::Target;
use bespoke_kernel_gen::tuning::lock::Lock;

fn variant(kernel: &Kernel) -> KernelVariant {
    let variant = name::parse(kernel.symbol);
    variant.unwrap_or_else(|| panic!("{} is not a symbol", kernel.symbol))
}

fn check_table(table: &KernelTable) {
    let symbols: BTreeSet<&str> = table.kernels.iter().map(|kernel| kernel.symbol).collect();
    assert_eq!(symbols.len(), table.kernels.len());
    for kernel in table.kernels {
        let variant = variant(kernel);
        assert_eq!((kernel.spec, kernel.regime), (variant.spec, variant.regime));
        assert_eq!((kernel.rows, kernel.cols), (variant.config.rows, variant.config.cols));
        assert_eq!(kernel.scratch_bytes, variant.scratch_bytes());
        assert_eq!(kernel.reduction_class, variant.reduction_class());
        assert_eq!(table.kernel(kernel.symbol).map(|found| found.spec), Some(kernel.spec));
        assert!(table.serving(&kernel.spec, kernel.target).is_some(), "{}", kernel.symbol);
    }
    let intervals = table.servings.iter().flat_map(|serving| serving.intervals);
    let served: BTreeSet<&str> = intervals.map(|interval| interval.symbol).collect();
    assert_eq!(served, symbols, "every kernel serves something");
}

#[test]
fn the_built_in_table_says_what_its_symbols_say() {
    check_table(&generated::table());
}

#[test]
fn the_table_of_tiny_models_says_what_its_symbols_say() {
    check_table(&bespoke_tests::tiny_kernels());
}

/// Unless the build names other models or another lock, the table is the plan of the default ones
/// with the workspace's lock.
#[test]
fn the_built_in_table_is_complete() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../kernels.lock"));
    let lock = text.ok().map(|text| Lock::parse(&text).unwrap());
    let options = PlanOptions { lock: lock.as_ref(), ..PlanOptions::default() };
    let targets = Target::of_this_arch();
    let plan = presets::default_shapes().and_then(|shapes| plan::plan(&shapes, &targets, &options));
    let planned: BTreeSet<String> = plan
        .unwrap_or_else(|error| panic!("{error}"))
        .variants
        .iter()
        .map(KernelVariant::symbol)
        .collect();
    let built: BTreeSet<String> =
        generated::table().kernels.iter().map(|kernel| kernel.symbol.to_string()).collect();
    let is_named = |name: Option<&str>| name.is_some_and(|name| !name.is_empty());
    if is_named(option_env!("BESPOKE_MODEL")) || is_named(option_env!("BESPOKE_LOCK")) {
        assert!(!built.is_empty());
    } else {
        assert_eq!(built, planned);
    }
}
