//! The same lock and compiler give the same sources and the same machine code, wherever they are
//! built.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use bespoke_kernel_gen::cargo::{cuda_environment, jobs};
use bespoke_kernel_gen::cuda::cache::Cache;
use bespoke_kernel_gen::cuda::compile::{Compiler, LIMIT};
use bespoke_kernel_gen::cuda::render::{Source, render};
use bespoke_kernel_gen::cuda::toolkit::Toolkit;
use bespoke_kernel_gen::cuda::{Arch, Variant, plan};
use bespoke_kernel_gen::presets;
use bespoke_tuning_tests::planted::{self, Fault};

use crate::build::{build, lock, todays_hash};

/// Files that cargo has made of a crate beside this test, the newest first.
fn built(name: &str, extension: &str) -> Vec<PathBuf> {
    let test = std::env::current_exe().unwrap();
    let begin = format!("lib{name}-");
    let is_built = |path: &PathBuf| {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        file.starts_with(&begin) && path.extension().is_some_and(|found| found == extension)
    };
    let entries = std::fs::read_dir(test.parent().unwrap()).unwrap();
    let mut found: Vec<PathBuf> =
        entries.map(|entry| entry.unwrap().path()).filter(is_built).collect();
    found.sort_by_key(|path| std::fs::metadata(path).unwrap().modified().unwrap());
    found.reverse();
    found
}

/// What kernels are compiled against.
struct Crates {
    engine: PathBuf,
}

impl Crates {
    /// Those that this test has been built with.
    fn find(folder: &Path) -> Crates {
        std::fs::create_dir_all(folder).unwrap();
        let text = "bespoke::kernels! {}\npub use bespoke::kernels::Kernel;\n";
        std::fs::write(folder.join("lib.rs"), text).unwrap();
        let mut errors = String::new();
        // NOTE: builds with other features lie there as well, some of them of other sources.
        for engine in built("bespoke", "rlib").into_iter().take(8) {
            let crates = Crates { engine };
            match crates.compile(folder) {
                Ok(()) => return crates,
                Err(error) => errors.push_str(&error),
            }
        }
        panic!("nothing can be compiled\n{errors}");
    }

    /// Compiles a folder's `lib.rs` into `objects`, as a release build does; what the compiler says
    /// if it cannot.
    fn compile(&self, folder: &Path) -> Result<(), String> {
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let mut command = Command::new(rustc);
        command
            .args(["--edition=2024", "--crate-type=lib", "--crate-name=kernels", "--emit=obj"])
            .args(["-Copt-level=3", "-Ccodegen-units=16", "-Cdebug-assertions=off"])
            .arg(format!("--extern=bespoke={}", self.engine.display()))
            .arg(format!("-Ldependency={}", self.engine.parent().unwrap().display()))
            .arg("--out-dir")
            .arg(folder.join("objects"))
            .arg(folder.join("lib.rs"));
        let output = command.output().unwrap();
        match output.status.success() {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }
}

/// The object files of a folder by name.
fn objects(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder.join("objects")).unwrap();
    let object = |path: PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        (name, std::fs::read(&path).unwrap())
    };
    entries.map(|entry| object(entry.unwrap().path())).collect()
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

#[test]
fn the_same_lock_gives_the_same_machine_code() {
    let root = tempfile::tempdir().unwrap();
    let text = lock(&todays_hash()).print();
    let folders = ["a", "elsewhere/b"].map(|name| root.path().join(name));
    let sources = folders.each_ref().map(|folder| {
        std::fs::create_dir_all(folder).unwrap();
        let path = folder.join("kernels.lock");
        std::fs::write(&path, &text).unwrap();
        build(folder, &path).1
    });
    assert_eq!(sources[0], sources[1]);

    let crates = Crates::find(&root.path().join("crates"));
    std::thread::scope(|scope| {
        for folder in &folders {
            let text = "#![allow(non_snake_case)]\ninclude!(\"kernels.rs\");\n";
            std::fs::write(folder.join("lib.rs"), text).unwrap();
            scope.spawn(|| crates.compile(folder).unwrap_or_else(|error| panic!("{error}")));
        }
    });
    let objects = folders.each_ref().map(|folder| objects(folder));
    let names: Vec<&String> = objects[0].keys().collect();
    assert_eq!(names, objects[1].keys().collect::<Vec<_>>());
    let symbol = planted::symbol(Fault::None);
    assert!(
        objects[0].values().any(|bytes| contains(bytes, symbol)),
        "{symbol} is not in {names:?}"
    );
    for (name, bytes) in &objects[0] {
        assert!(*bytes == objects[1][name], "{name} differs");
    }
}

#[test]
fn the_same_source_gives_the_same_cubin() {
    let environment = cuda_environment().unwrap();
    let Ok(toolkit) = Toolkit::find(&environment) else {
        println!("skipped: no nvcc (cargo run -p bespoke-kernel-gen -- toolkit)");
        return;
    };
    let root = tempfile::tempdir().unwrap();
    let shape = presets::shape("smollm2-135m-awq", &[]).unwrap();
    let variants = plan::plan(&[shape], &[Arch::Sm90a]).unwrap();
    // One of each template.
    let variants: BTreeMap<&str, &Variant> =
        variants.iter().map(|variant| (variant.spec().op(), variant)).collect();
    assert!(variants.len() >= 7, "{:?}", variants.keys());
    let sources: Vec<Source> =
        variants.into_values().map(|variant| render(variant).unwrap()).collect();
    let compiled = ["a", "elsewhere/b"].map(|name| {
        let cache = Cache { root: root.path().join(name) };
        let compiler = Compiler { toolkit: toolkit.clone(), cache, jobs: jobs(), limit: LIMIT };
        compiler.compile(sources.clone()).unwrap()
    });
    assert!(compiled.iter().flatten().all(|artifact| !artifact.is_cached));
    for (first, second) in compiled[0].iter().zip(&compiled[1]) {
        assert!(first.cubin == second.cubin, "{} differs", first.source.symbol);
        assert_eq!((&first.hash, &first.usage), (&second.hash, &second.usage));
    }
}
