//! Running cargo so that the same source gives the same bytes, wherever it lies.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail, ensure};

/// The source tree and the model of a build.
pub(super) struct Cargo<'a> {
    pub(super) source: &'a Path,
    pub(super) model: &'a Path,
}

impl Cargo<'_> {
    /// Builds the program; where it is. Its symbols are still there.
    pub(super) fn build(&self, cpu: &[&str], cuda: &[&str]) -> anyhow::Result<PathBuf> {
        let target_dir = self.source.join("target/one-model");
        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.current_dir(self.source);
        command.args(["build", "--profile", PROFILE, "--locked", "--package", "bespoke"]);
        command.args(["--bin", "bespoke", "--no-default-features", "--features"]);
        // NOTE: all that serves a model. What fetches and makes models is left out.
        command.arg(if cuda.is_empty() { FEATURES.to_owned() } else { format!("{FEATURES},cuda") });
        command.arg("--target-dir").arg(&target_dir);
        command.env("BESPOKE_MODEL", self.model);
        command.env("BESPOKE_TARGETS", cpu.join(","));
        command.env("BESPOKE_CUDA_TARGETS", cuda.join(","));
        command.env("BESPOKE_BUNDLE", "1").env_remove("BESPOKE_TUNER");
        command.env_remove("RUSTFLAGS").env("CARGO_ENCODED_RUSTFLAGS", self.flags(&target_dir)?);
        // Standard output is for the command's own result.
        command.stdout(std::io::stderr());
        let status = command.status().context(
            "cargo cannot be started; install a Rust toolchain (https://rustup.rs) on the machine \
             that builds",
        )?;
        ensure!(status.success(), "cargo could not build the program; see its messages above");
        let program = target_dir.join(PROFILE).join(format!("bespoke{}", env::consts::EXE_SUFFIX));
        ensure!(program.is_file(), "{}: cargo has built no program", program.display());
        Ok(program)
    }

    /// Compiler flags under which no path of this machine gets into the program.
    fn flags(&self, target_dir: &Path) -> anyhow::Result<OsString> {
        // NOTE: of several that fit, the compiler takes the last.
        let paths = [
            (self.source.to_owned(), "/bespoke"),
            (target_dir.to_owned(), "/target"),
            (cargo_home()?, "/cargo"),
        ];
        let remap = |(path, name): (PathBuf, &str)| {
            let mut flag = OsString::from("--remap-path-prefix=");
            flag.push(path);
            flag.push("=");
            flag.push(name);
            flag
        };
        let mut flags: Vec<OsString> = paths.into_iter().map(remap).collect();
        // NOTE: linkers make a build id of symbols too, some of whose names have hashes of paths.
        if cfg!(target_os = "linux") {
            flags.push("-Clink-arg=-Wl,--build-id=none".into());
        }
        Ok(flags.join(OsStr::new("\u{1f}")))
    }
}

/// Of the workspace's Cargo.toml: small, and with symbols, which tell the kernels' sizes and are
/// cut off afterwards.
const PROFILE: &str = "one-model";
const FEATURES: &str = "chat,grammar,server";

fn cargo_home() -> anyhow::Result<PathBuf> {
    let named = env::var_os("CARGO_HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    let home = named.or_else(|| env::home_dir().map(|home| home.join(".cargo")));
    home.context("no home folder is known; set CARGO_HOME to cargo's folder")
}

/// The source tree: `given`, else the nearest folder from the current one upwards that is one.
pub(super) fn source(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(given) = given {
        ensure!(is_source(given), "{}: is no source tree of Bespoke", given.display());
        return Ok(fs::canonicalize(given)?);
    }
    let current = env::current_dir().context("there is no current folder")?;
    match current.ancestors().find(|folder| is_source(folder)) {
        Some(folder) => Ok(folder.to_owned()),
        None => bail!(
            "{}: neither this folder nor one above it has Bespoke's source, which the program is \
             built from; name its folder with --source DIR",
            current.display()
        ),
    }
}

fn is_source(folder: &Path) -> bool {
    let manifest = fs::read_to_string(folder.join("engine/Cargo.toml")).unwrap_or_default();
    manifest.lines().any(|line| line.trim() == "name = \"bespoke\"")
        && folder.join("Cargo.lock").is_file()
        && folder.join("kernel-gen").is_dir()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_its_own_source() {
        let here = source(None).unwrap();
        assert!(here.join("engine/src/cli/build/cargo.rs").is_file());
        assert_eq!(source(Some(&here)).unwrap(), here);
        let error = source(Some(&here.join("engine"))).unwrap_err().to_string();
        assert!(error.contains("no source tree"), "{error}");
    }
}
