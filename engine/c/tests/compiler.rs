//! The machine's compilers, and the library beside the tests.

use std::env;
use std::env::consts::{DLL_PREFIX, DLL_SUFFIX};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// How a program gets the library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Linking {
    Shared,
    Static,
}

/// A program, compiled.
pub(crate) struct Program {
    pub(crate) path: PathBuf,
    _folder: TempDir,
}

/// Checks of the compiler, at run time.
pub(crate) const SANITIZERS: &[&str] =
    &["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"];

/// Compiles a source of this package, with warnings as errors. `None`, and a line that says so,
/// where the machine cannot.
pub(crate) fn compile(source: &str, linking: Linking, flags: &[&str]) -> Option<Program> {
    let is_cpp = source.ends_with(".cpp");
    let (variable, default) = if is_cpp { ("CXX", "c++") } else { ("CC", "cc") };
    let compiler = env::var(variable).unwrap_or_else(|_| default.to_owned());
    if !can_compile(&compiler, flags) {
        println!("skipped: `{compiler} {}` makes no programs here", flags.join(" "));
        return None;
    }
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("program");
    let mut command = Command::new(&compiler);
    command
        .arg(if is_cpp { "-std=c++17" } else { "-std=c11" })
        .args(["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-D_POSIX_C_SOURCE=200809L"])
        .args(flags)
        .arg("-I")
        .arg(package.join("include"))
        .arg(package.join(source))
        .arg("-o")
        .arg(&path);
    match linking {
        Linking::Shared => {
            let library = shared_library();
            let beside = library.parent().unwrap();
            command.arg(&library).arg(format!("-Wl,-rpath,{}", beside.display()));
        }
        Linking::Static => {
            command.arg(library("lib", ".a")).args(private_libraries(package));
        }
    }
    let output = command.arg("-lpthread").output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{errors}", output.status);
    Some(Program { path, _folder: folder })
}

/// The shared library that belongs to these tests.
pub(crate) fn shared_library() -> PathBuf {
    library(DLL_PREFIX, DLL_SUFFIX)
}

/// cargo builds the libraries of a package for its tests, beside them or in the folder above.
fn library(prefix: &str, suffix: &str) -> PathBuf {
    let tests = env::current_exe().unwrap();
    let folder = tests.parent().unwrap();
    let name = format!("{prefix}bespoke{suffix}");
    let places = [folder.join(&name), folder.join("..").join(&name)];
    let found = places.iter().find(|place| place.is_file());
    found.unwrap_or_else(|| panic!("there is none of {places:?}")).clone()
}

/// What bespoke.pc.in says that the static library needs.
fn private_libraries(package: &Path) -> Vec<String> {
    let text = fs::read_to_string(package.join("bespoke.pc.in")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Libs.private: ")).unwrap();
    line.split(' ').map(str::to_owned).collect()
}

fn can_compile(compiler: &str, flags: &[&str]) -> bool {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("empty.c");
    fs::write(&source, "int main(void) { return 0; }\n").unwrap();
    let mut command = Command::new(compiler);
    command.args(["-x", "c"]).args(flags).arg(&source).arg("-o").arg(folder.path().join("empty"));
    command.output().is_ok_and(|output| output.status.success())
}
