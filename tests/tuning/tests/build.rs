//! A lock in front of a build script whose templates have changed since.

use std::path::{Path, PathBuf};

use bespoke_kernel_gen::name::spec_name;
use bespoke_kernel_gen::plan::{KernelVariant, Serving};
use bespoke_kernel_gen::tuning::lock::{
    Lock, LockedInterval, LockedProblem, LockedVariant, VERSION,
};
use bespoke_kernel_gen::{compile, render};
use bespoke_tuning_tests::planted::{self, Fault};

/// A lock in which a kernel that is not the default serves all rows but the single ones, made from
/// a source of this hash.
pub(crate) fn lock(source_hash: &str) -> Lock {
    let default = planted::default_kernel();
    let defaults = Serving::default_for(&default.spec, default.target).intervals;
    let interval = |rows_max, symbol: &str, provenance: &str| LockedInterval {
        rows_max,
        symbol: symbol.to_owned(),
        provenance: provenance.to_owned(),
        us: 1.0,
        default_us: 2.0,
        runner_up: None,
        runner_up_us: None,
        margin: 0.0,
    };
    let symbol = planted::symbol(Fault::None);
    let one = defaults[0].variant.symbol();
    Lock {
        version: VERSION,
        problems: vec![LockedProblem {
            spec: spec_name(&default.spec),
            target: default.target.name().to_owned(),
            device: "of-a-test".to_owned(),
            intervals: vec![interval(Some(1), &one, "default"), interval(None, symbol, "measured")],
        }],
        certificates: vec![LockedVariant {
            symbol: symbol.to_owned(),
            source_hash: source_hash.to_owned(),
            certificate: "of a test".to_owned(),
            compiler: "of a test".to_owned(),
            code_bytes: 1,
        }],
        ..Lock::default()
    }
}

/// The source hash of the kernel that [`lock`] names.
pub(crate) fn todays_hash() -> String {
    let variant = KernelVariant::parse(planted::symbol(Fault::None)).unwrap();
    compile::hash(&render::render(&variant))
}

/// Runs the build script of the engine with a lock; what it says, and the kernels it declares.
pub(crate) fn build(folder: &Path, lock: &Path) -> (String, String) {
    let mut command = crate::process("");
    command.env("OUT_DIR", folder).env("CARGO_MANIFEST_DIR", folder).env("BESPOKE_LOCK", lock);
    command.env("BESPOKE_MODEL", bespoke_tuning_tests::model());
    for name in ["BESPOKE_TUNER", "BESPOKE_PAGE_SIZE", "CARGO_FEATURE_CUDA"] {
        command.env_remove(name);
    }
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}");
    (said, std::fs::read_to_string(folder.join("kernels.rs")).unwrap())
}

#[test]
fn a_kernel_whose_body_changed_is_not_built_in() {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("other.lock");
    let symbol = planted::symbol(Fault::None);
    let today = todays_hash();
    let warns = |said: &str| {
        let mut lines = said.lines().filter(|line| line.starts_with("cargo::warning="));
        lines.any(|line| line.contains(symbol) && line.contains("other code than today's"))
    };
    std::fs::write(&path, lock(&today).print()).unwrap();
    let (said, kernels) = build(folder.path(), &path);
    assert!(!warns(&said), "{said}");
    assert!(kernels.contains(&format!("kernel {symbol} {{")));
    assert!(kernels.contains("device: \"of-a-test\""));

    // NOTE: templates are part of the program, so the lock is what differs.
    let before = if today.starts_with('0') { "1" } else { "0" };
    std::fs::write(&path, lock(&format!("{before}{}", &today[1..])).print()).unwrap();
    let (said, kernels) = build(folder.path(), &path);
    assert!(warns(&said), "{said}");
    assert!(!kernels.contains(symbol));
    assert!(!kernels.contains("device: \"of-a-test\""));
}
