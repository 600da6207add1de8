//! The generator inside a build script: the only place that reads the environment of cargo, writes
//! to `OUT_DIR` and prints `cargo::` lines.

#![allow(clippy::print_stdout, reason = "cargo reads the standard output of build scripts")]

use std::path::{Path, PathBuf};

use crate::emit::Generated;
use crate::error::Error;
use crate::presets;
use crate::spec::{ModelShape, PAGE_SIZE, PAGE_SIZES};
use crate::target::Target;

/// Generates kernels for the models that `BESPOKE_MODEL` names (folders, `config.json` files or
/// presets, separated by `:` or `,`), or for the default models, into `OUT_DIR`.
///
/// `BESPOKE_PAGE_SIZE` chooses the slots of a KV page, one of [`PAGE_SIZES`].
///
/// A failure is printed for cargo and ends the process with exit code 1.
pub fn build() {
    println!("cargo::rerun-if-env-changed=BESPOKE_MODEL");
    println!("cargo::rerun-if-env-changed=BESPOKE_PAGE_SIZE");
    let variable = |name| std::env::var(name).unwrap_or_default();
    finish(page_size(&variable("BESPOKE_PAGE_SIZE")).and_then(|page_size| {
        let shapes = with_pages(shapes(&variable("BESPOKE_MODEL"))?, page_size);
        generate_into(&out_dir()?, &shapes, &Target::ALL)
    }));
}

/// Generates kernels for `config.json` files, such as those of a test's models, with pages of
/// `page_size` slots, into the folder `folder` of `OUT_DIR`.
pub fn build_configs(configs: &[PathBuf], targets: &[Target], page_size: usize, folder: &str) {
    let shape = |path: &PathBuf| {
        rerun_if_changed(path);
        presets::shape(&path.to_string_lossy(), &[PathBuf::new()])
    };
    let shapes: Result<Vec<ModelShape>, Error> = configs.iter().map(shape).collect();
    finish(shapes.and_then(|shapes| {
        generate_into(&out_dir()?.join(folder), &with_pages(shapes, page_size), targets)
    }));
}

/// The page size that `BESPOKE_PAGE_SIZE` names; nothing stands for the default.
fn page_size(text: &str) -> Result<usize, Error> {
    if text.is_empty() {
        return Ok(PAGE_SIZE);
    }
    let found = text.parse().ok().filter(|size| PAGE_SIZES.contains(size));
    found.ok_or_else(|| Error::PageSize { value: text.to_string() })
}

fn with_pages(shapes: Vec<ModelShape>, page_size: usize) -> Vec<ModelShape> {
    shapes.into_iter().map(|shape| ModelShape { page_size, ..shape }).collect()
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

fn out_dir() -> Result<PathBuf, Error> {
    std::env::var_os("OUT_DIR").map(PathBuf::from).ok_or_else(|| {
        let message = "OUT_DIR is not set; call this from a build script".to_string();
        Error::Source { position: "environment".to_string(), message }
    })
}

fn generate_into(folder: &Path, shapes: &[ModelShape], targets: &[Target]) -> Result<(), Error> {
    let Generated { kernels_rs, kernels_json } = crate::generate(shapes, targets)?;
    let io = |source| Error::Io { path: folder.display().to_string(), source };
    std::fs::create_dir_all(folder).map_err(io)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_sizes_are_checked() {
        for (text, expected) in [("", 32), ("16", 16), ("32", 32), ("64", 64)] {
            assert_eq!(page_size(text).unwrap(), expected);
        }
        for text in ["0", "8", "48", "128", "-16", "16.0", " 16", "many"] {
            let error = page_size(text).unwrap_err().to_string();
            assert!(error.contains("16, 32 or 64") && error.contains(text), "{error}");
        }
    }
}
