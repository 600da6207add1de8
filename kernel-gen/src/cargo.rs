//! The generator inside a build script: the only place that reads the environment of cargo, writes
//! to `OUT_DIR` and prints `cargo::` lines.

#![allow(clippy::print_stdout, reason = "cargo reads the standard output of build scripts")]

use std::path::{Path, PathBuf};

use crate::emit::Generated;
use crate::error::Error;
use crate::presets;
use crate::spec::ModelShape;
use crate::target::Target;

/// Generates kernels for the models that `BESPOKE_MODEL` names (folders, `config.json` files or
/// presets, separated by `:` or `,`), or for the default models, into `OUT_DIR`.
///
/// A failure is printed for cargo and ends the process with exit code 1.
pub fn build() {
    println!("cargo::rerun-if-env-changed=BESPOKE_MODEL");
    let models = std::env::var("BESPOKE_MODEL").unwrap_or_default();
    finish(shapes(&models).and_then(|shapes| generate_into_out_dir(&shapes, &Target::ALL)));
}

/// Generates kernels for `config.json` files, such as those of a test's models, into `OUT_DIR`.
pub fn build_configs(configs: &[PathBuf], targets: &[Target]) {
    let shape = |path: &PathBuf| {
        rerun_if_changed(path);
        presets::shape(&path.to_string_lossy(), &[PathBuf::new()])
    };
    let shapes: Result<Vec<ModelShape>, Error> = configs.iter().map(shape).collect();
    finish(shapes.and_then(|shapes| generate_into_out_dir(&shapes, targets)));
}

fn finish(result: Result<(), Error>) {
    if let Err(error) = result {
        for line in error.to_string().lines() {
            println!("cargo::error={line}");
        }
        std::process::exit(1);
    }
}

fn rerun_if_changed(path: &Path) {
    println!("cargo::rerun-if-changed={}", path.display());
}

fn shapes(models: &str) -> Result<Vec<ModelShape>, Error> {
    let names: Vec<&str> =
        models.split([':', ',']).map(str::trim).filter(|name| !name.is_empty()).collect();
    if names.is_empty() {
        return presets::default_shapes();
    }
    // NOTE: cargo runs build scripts in the package's folder; people name paths from where they
    // are, which is usually the folder above, the workspace's root.
    let package = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let folders = [package.join(".."), package];
    let shape = |name: &&str| {
        if let Some(path) = presets::config_file(name, &folders) {
            rerun_if_changed(&path);
        }
        presets::shape(name, &folders)
    };
    names.iter().map(shape).collect()
}

fn generate_into_out_dir(shapes: &[ModelShape], targets: &[Target]) -> Result<(), Error> {
    let Some(folder) = std::env::var_os("OUT_DIR").map(PathBuf::from) else {
        let message = "OUT_DIR is not set; call this from a build script".to_string();
        return Err(Error::Source { position: "environment".to_string(), message });
    };
    let Generated { kernels_rs, kernels_json } = crate::generate(shapes, targets)?;
    write_if_changed(&folder.join("kernels.rs"), &kernels_rs)?;
    write_if_changed(&folder.join("kernels.json"), &kernels_json)
}

/// Leaves an equal file alone, so that nothing is compiled again for its sake.
fn write_if_changed(path: &Path, text: &str) -> Result<(), Error> {
    if std::fs::read(path).is_ok_and(|bytes| bytes == text.as_bytes()) {
        return Ok(());
    }
    let io = |source| Error::Io { path: path.display().to_string(), source };
    std::fs::write(path, text).map_err(io)
}
