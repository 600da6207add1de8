//! The generator inside a build script: the only place that reads the environment of cargo, writes
//! to `OUT_DIR` and prints `cargo::` lines.

#![allow(clippy::print_stdout, reason = "cargo reads the standard output of build scripts")]

use std::path::{Path, PathBuf};

use crate::binding_rs::binding_rs;
use crate::cuda::cache::Cache;
use crate::cuda::compile::{self, Compiler};
use crate::cuda::jobs::Jobs;
use crate::cuda::toolkit::{Environment, Toolkit};
use crate::cuda::{self, Arch};
use crate::emit::Generated;
use crate::error::Error;
use crate::models_rs::models_rs;
use crate::plan::PlanOptions;
use crate::presets;
use crate::spec::{ModelShape, PAGE_SIZE, PAGE_SIZES};
use crate::target::Target;
use crate::tuning::lock::Lock;

/// Generates kernels for the models that `BESPOKE_MODEL` names (folders, `config.json` files or
/// presets, separated by `:` or `,`), or for the default models, into `OUT_DIR`.
///
/// `BESPOKE_PAGE_SIZE` chooses the slots of a KV page, one of [`PAGE_SIZES`].
///
/// `BESPOKE_TARGETS` names the CPU targets, separated by commas; without it there are all that the
/// architecture of the program has.
///
/// `kernels.lock` in the package's folder, else in the one above, says which kernels serve which
/// rows; `BESPOKE_LOCK` names another file, or `none`. With `BESPOKE_TUNER=1` the build also has
/// the candidates of a tuner for `BESPOKE_TUNER_TARGET`, a target or a GPU's architecture; without
/// it, for this machine's best target and, with the feature `cuda`, all GPUs of the build.
///
/// Where the package's feature `cuda` is on, the same models' CUDA kernels are compiled for the
/// architectures of `BESPOKE_CUDA_TARGETS`, or for [`DEFAULT_ARCHS`].
///
/// Without `BESPOKE_MODEL` and without the package's feature `presets` there are no kernels: those
/// of a program that brings its own are made by [`build_model`].
///
/// A failure is printed for cargo and ends the process with exit code 1.
pub fn build() {
    tell_compiler();
    rerun_if_env_changed("BESPOKE_MODEL");
    finish(Settings::from_environment().and_then(|settings| {
        let models = variable("BESPOKE_MODEL");
        let has_presets = std::env::var_os("CARGO_FEATURE_PRESETS").is_some();
        let shapes = match models.trim().is_empty() && !has_presets {
            true => Vec::new(),
            false => shapes(&models)?,
        };
        settings.generate(&with_pages(shapes, settings.page_size)).map(|_| ())
    }));
}

/// Generates the kernels of one model into `OUT_DIR`, for a package that `bespoke::bind!` binds
/// them in: all that the `main` of its build script does is
///
/// ```no_run
/// bespoke_kernel_gen::cargo::build_model("path/to/model");
/// ```
///
/// `model` is a model folder or a `config.json`, from the package's folder or the one above, or the
/// name of a preset. All variables count that [`build`] reads, but `BESPOKE_MODEL`; GPU kernels are
/// made where the package has a feature `cuda` and it is on.
///
/// A failure is printed for cargo and ends the process with exit code 1.
pub fn build_model(model: &str) {
    finish(Settings::from_environment().and_then(|settings| {
        let shapes = with_pages(vec![shape(model, &folders())?], settings.page_size);
        let has_cuda = settings.generate(&shapes)?;
        let text = binding_rs(&shapes[0], has_cuda);
        write_if_changed(&settings.folder.join("binding.rs"), text.as_bytes())
    }));
}

/// What the environment says of a build, whatever its models are.
struct Settings {
    /// `OUT_DIR`.
    folder: PathBuf,
    page_size: usize,
    lock: Option<Lock>,
    tuner: Tuner,
    targets: Vec<Target>,
}

impl Settings {
    fn from_environment() -> Result<Settings, Error> {
        const VARIABLES: [&str; 5] = [
            "BESPOKE_PAGE_SIZE",
            "BESPOKE_TARGETS",
            "BESPOKE_LOCK",
            "BESPOKE_TUNER",
            "BESPOKE_TUNER_TARGET",
        ];
        VARIABLES.into_iter().for_each(rerun_if_env_changed);
        let arch = target_arch();
        let tuner = tuner(&variable("BESPOKE_TUNER"), &variable("BESPOKE_TUNER_TARGET"))?;
        tuner.check(&arch)?;
        Ok(Settings {
            folder: out_dir()?,
            page_size: page_size(&variable("BESPOKE_PAGE_SIZE"))?,
            lock: lock(&variable("BESPOKE_LOCK"))?,
            tuner,
            targets: targets(&variable("BESPOKE_TARGETS"), &arch)?,
        })
    }

    /// Writes the kernels of `shapes`; whether there are some for GPUs.
    fn generate(&self, shapes: &[ModelShape]) -> Result<bool, Error> {
        let Settings { folder, lock, tuner, targets, .. } = self;
        let options = PlanOptions { lock: lock.as_ref(), tuner: tuner.target() };
        generate_into(folder, shapes, targets, &options)?;
        write_if_changed(&folder.join("models.rs"), models_rs(shapes).as_bytes())?;
        let has_cuda = std::env::var_os("CARGO_FEATURE_CUDA").is_some();
        if has_cuda {
            generate_cuda_into(folder, shapes, lock.as_ref(), *tuner)?;
        }
        Ok(has_cuda)
    }
}

/// The compiler's version as `BESPOKE_COMPILER`: measurements say what made the kernels.
fn tell_compiler() {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = std::process::Command::new(rustc).arg("--version").output();
    let version = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let version = version.unwrap_or_default();
    let words: Vec<&str> = version.split_whitespace().take(2).collect();
    let version = if words.is_empty() { "unknown".to_owned() } else { words.join(" ") };
    println!("cargo::rustc-env=BESPOKE_COMPILER={version}");
}

/// What decides about the CUDA compiler and the cache of its results.
pub const CUDA_VARIABLES: [&str; 6] =
    ["CUDA_HOME", "PATH", "BESPOKE_KERNEL_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA", "HOME"];

/// Architectures of a build that names none: the machines that serve, one of each kind.
pub const DEFAULT_ARCHS: [Arch; 3] = [Arch::Sm80, Arch::Sm89, Arch::Sm90a];

/// The compiler's environment: `CUDA_HOME`, `PATH`, and the cache in `BESPOKE_KERNEL_CACHE`, else
/// in the user's cache folder.
pub fn cuda_environment() -> Result<Environment, Error> {
    let path = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let user = path("XDG_CACHE_HOME")
        .or_else(|| path("LOCALAPPDATA"))
        .or_else(|| path("HOME").map(|home| home.join(".cache")));
    let root = path("BESPOKE_KERNEL_CACHE")
        .or_else(|| user.map(|folder| folder.join("bespoke/cuda")))
        .ok_or_else(|| Error::Toolkit {
            message:
                "no home folder is known; set BESPOKE_KERNEL_CACHE to the folder for compiled \
                      CUDA kernels"
                    .to_string(),
        })?;
    let cache = Cache { root };
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let path_folders = std::env::split_paths(&folders).collect();
    Ok(Environment { cuda_home: path("CUDA_HOME"), path: path_folders, cache })
}

/// The jobs that cargo grants, or all cores.
pub fn jobs() -> Jobs {
    let flags = [variable("CARGO_MAKEFLAGS"), variable("MAKEFLAGS")];
    let flags = flags.iter().find(|flags| !flags.is_empty());
    flags.map_or_else(Jobs::cores, |flags| Jobs::from_flags(flags))
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

/// The architectures that `BESPOKE_CUDA_TARGETS` names, separated by commas.
fn archs(text: &str) -> Result<Vec<Arch>, Error> {
    let names: Vec<&str> = text.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
    if names.is_empty() {
        return Ok(DEFAULT_ARCHS.to_vec());
    }
    let arch = |name: &&str| {
        Arch::from_name(name).ok_or_else(|| Error::Toolkit {
            message: format!(
                "BESPOKE_CUDA_TARGETS names {name:?}; choose of {}",
                Arch::ALL.map(Arch::name).join(", ")
            ),
        })
    };
    names.iter().map(arch).collect()
}

/// The architecture that the program of the build script is compiled for, which need not be this
/// machine's.
fn target_arch() -> String {
    match variable("CARGO_CFG_TARGET_ARCH") {
        arch if arch.is_empty() => std::env::consts::ARCH.to_string(),
        arch => arch,
    }
}

/// The CPU targets that `BESPOKE_TARGETS` names for a program of `arch`, ascending.
fn targets(text: &str, arch: &str) -> Result<Vec<Target>, Error> {
    let names: Vec<&str> = text.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
    let all = Target::of_arch(arch);
    if names.is_empty() {
        return Ok(all);
    }
    let known: Vec<&str> = all.iter().map(|target| target.name()).collect();
    if let Some(name) = names.iter().find(|name| !known.contains(name)) {
        let what = match Target::from_name(name).and_then(Target::arch) {
            Some(own) => format!(", whose kernels are for {own}, in a build for {arch}"),
            None => String::new(),
        };
        let known = known.join(", ");
        let message = format!("BESPOKE_TARGETS names {name:?}{what}; choose of {known}");
        return Err(Error::Source { position: "environment".to_string(), message });
    }
    Ok(all.into_iter().filter(|target| names.contains(&target.name())).collect())
}

fn generate_cuda_into(
    folder: &Path,
    shapes: &[ModelShape],
    lock: Option<&Lock>,
    tuner: Tuner,
) -> Result<(), Error> {
    rerun_if_env_changed("BESPOKE_CUDA_TARGETS");
    for name in CUDA_VARIABLES {
        rerun_if_env_changed(name);
    }
    let archs = archs(&variable("BESPOKE_CUDA_TARGETS"))?;
    let environment = cuda_environment()?;
    let toolkit = Toolkit::find(&environment)?;
    rerun_if_changed(&toolkit.nvcc);
    let compiler =
        Compiler { toolkit, cache: environment.cache, jobs: jobs(), limit: compile::LIMIT };
    let tuned = tuner.archs(&archs)?;
    let options = cuda::plan::Options { lock, toolkit: None, tuner: &tuned };
    let cuda::Output { generated, warnings } = cuda::generate(shapes, &archs, &options, &compiler)?;
    for warning in warnings {
        println!("cargo::warning={}", warning.lines().collect::<Vec<_>>().join(" "));
    }
    for (name, bytes) in &generated.blobs {
        write_if_changed(&folder.join(name), bytes)?;
    }
    write_if_changed(&folder.join("cuda_kernels.rs"), generated.cuda_kernels_rs.as_bytes())?;
    write_if_changed(
        &folder.join("cuda_kernels.json"),
        crate::emit::json_text(generated.rows).as_bytes(),
    )
}

/// Kernels for `config.json` files, such as those of a test's models.
#[derive(Clone, Copy, Debug)]
pub struct Configs<'a> {
    pub paths: &'a [PathBuf],
    pub targets: &'a [Target],
    pub page_size: usize,
    pub options: PlanOptions<'a>,
}

/// Generates kernels for `configs` into the folder `folder` of `OUT_DIR`.
pub fn build_configs(configs: &Configs<'_>, folder: &str) {
    let Configs { paths, targets, page_size, options } = *configs;
    let shape = |path: &PathBuf| {
        rerun_if_changed(path);
        presets::shape(&path.to_string_lossy(), &[PathBuf::new()])
    };
    let shapes: Result<Vec<ModelShape>, Error> = paths.iter().map(shape).collect();
    finish(shapes.and_then(|shapes| {
        let folder = out_dir()?.join(folder);
        generate_into(&folder, &with_pages(shapes, page_size), targets, &options)
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

fn rerun_if_env_changed(name: &str) {
    println!("cargo::rerun-if-env-changed={name}");
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
    let folders = folders();
    names.iter().map(|name| shape(name, &folders)).collect()
}

/// The shape of a model, whose file is watched.
fn shape(model: &str, folders: &[PathBuf]) -> Result<ModelShape, Error> {
    if let Some(path) = presets::config_file(model, folders) {
        rerun_if_changed(&path);
    }
    presets::shape(model, folders)
}

/// Where relative paths may start.
///
/// NOTE: cargo runs build scripts in the package's folder; people name paths from where they are,
/// which is usually the folder above, the workspace's root.
fn folders() -> [PathBuf; 2] {
    let package = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    [package.join(".."), package]
}

/// The lock that `BESPOKE_LOCK` names; nothing stands for the package's or the workspace's own,
/// where there is one.
fn lock(name: &str) -> Result<Option<Lock>, Error> {
    let [workspace, package] = folders();
    let exists = |path: &PathBuf| path.is_file();
    let found = match name {
        "none" => return Ok(None),
        // NOTE: a file that is not there is not watched: cargo would build anew every time.
        "" => {
            [package, workspace].map(|folder| folder.join("kernels.lock")).into_iter().find(exists)
        }
        name => {
            let paths = [workspace.join(name), package.join(name)];
            Some(paths.into_iter().find(exists).ok_or_else(|| Error::Lock {
                message: format!(
                    "BESPOKE_LOCK names {name}, which is not there; name a file, or `none`"
                ),
            })?)
        }
    };
    let Some(path) = found else { return Ok(None) };
    rerun_if_changed(&path);
    let io = |source| Error::Io { path: path.display().to_string(), source };
    Lock::parse(&std::fs::read_to_string(&path).map_err(io)?).map(Some)
}

/// What a build has candidates for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tuner {
    /// Nothing: it is no tuner's.
    Off,
    /// This machine's CPU, and all architectures of the build.
    Default,
    Cpu(Target),
    Cuda(Arch),
}

impl Tuner {
    fn target(self) -> Option<Target> {
        match self {
            Tuner::Off | Tuner::Cuda(_) => None,
            Tuner::Default => Some(Target::best()),
            Tuner::Cpu(target) => Some(target),
        }
    }

    /// A program of `arch` can have the kernels.
    fn check(self, arch: &str) -> Result<(), Error> {
        let Some(target) = self.target().filter(|one| !Target::of_arch(arch).contains(one)) else {
            return Ok(());
        };
        let what = match self {
            Tuner::Default => "BESPOKE_TUNER_TARGET is not set, and this machine's best target",
            _ => "BESPOKE_TUNER_TARGET",
        };
        let known: Vec<&str> = Target::of_arch(arch).into_iter().map(Target::name).collect();
        Err(Error::Lock {
            message: format!(
                "{what} is {}, which a build for {arch} has no kernels for; choose of {}",
                target.name(),
                known.join(", ")
            ),
        })
    }

    /// Those of `archs`, the build's.
    fn archs(self, archs: &[Arch]) -> Result<Vec<Arch>, Error> {
        match self {
            Tuner::Off | Tuner::Cpu(_) => Ok(Vec::new()),
            Tuner::Default => Ok(archs.to_vec()),
            Tuner::Cuda(arch) if archs.contains(&arch) => Ok(vec![arch]),
            Tuner::Cuda(arch) => Err(Error::Lock {
                message: format!(
                    "BESPOKE_TUNER_TARGET is {}, which BESPOKE_CUDA_TARGETS does not name",
                    arch.name()
                ),
            }),
        }
    }
}

/// What the two variables say.
fn tuner(text: &str, target: &str) -> Result<Tuner, Error> {
    let wrong = |message: String| Error::Lock { message };
    match text {
        "" | "0" => return Ok(Tuner::Off),
        "1" => {}
        other => {
            return Err(wrong(format!(
                "BESPOKE_TUNER is {other:?}; set it to 1, or leave it unset"
            )));
        }
    }
    if target.is_empty() {
        return Ok(Tuner::Default);
    }
    let cpu = Target::from_name(target).map(Tuner::Cpu);
    cpu.or_else(|| Arch::from_name(target).map(Tuner::Cuda)).ok_or_else(|| {
        let names = Target::ALL.map(Target::name).join(", ");
        let archs = Arch::ALL.map(Arch::name).join(", ");
        wrong(format!("BESPOKE_TUNER_TARGET is {target:?}; choose of {names}, {archs}"))
    })
}

fn out_dir() -> Result<PathBuf, Error> {
    std::env::var_os("OUT_DIR").map(PathBuf::from).ok_or_else(|| {
        let message = "OUT_DIR is not set; call this from a build script".to_string();
        Error::Source { position: "environment".to_string(), message }
    })
}

fn generate_into(
    folder: &Path,
    shapes: &[ModelShape],
    targets: &[Target],
    options: &PlanOptions<'_>,
) -> Result<(), Error> {
    let Generated { kernels_rs, kernels_json, warnings } =
        crate::generate(shapes, targets, options)?;
    for warning in warnings {
        println!("cargo::warning={warning}");
    }
    let io = |source| Error::Io { path: folder.display().to_string(), source };
    std::fs::create_dir_all(folder).map_err(io)?;
    write_if_changed(&folder.join("kernels.rs"), kernels_rs.as_bytes())?;
    write_if_changed(&folder.join("kernels.json"), kernels_json.as_bytes())
}

/// Leaves an equal file alone, so that nothing is compiled again for its sake.
fn write_if_changed(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    if std::fs::read(path).is_ok_and(|found| found == bytes) {
        return Ok(());
    }
    let io = |source| Error::Io { path: path.display().to_string(), source };
    std::fs::write(path, bytes).map_err(io)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn architectures_are_checked() {
        assert_eq!(archs(" ").unwrap(), DEFAULT_ARCHS);
        assert_eq!(archs("sm_90a, sm_80,").unwrap(), [Arch::Sm90a, Arch::Sm80]);
        let error = archs("sm_80,sm_90").unwrap_err().to_string();
        assert!(error.contains("\"sm_90\"") && error.contains("sm_90a"), "{error}");
    }

    #[test]
    fn targets_are_checked() {
        let x86 = |text| targets(text, "x86_64").map_err(|error| error.to_string());
        assert_eq!(x86("").unwrap(), Target::of_arch("x86_64"));
        assert_eq!(x86("avx512, portable").unwrap(), [Target::Portable, Target::Avx512]);
        let error = x86("avx512,avx2").unwrap_err();
        assert!(error.contains("\"avx2\"; choose of portable, x86_64_v3, avx512"), "{error}");
        let error = x86("neon").unwrap_err();
        assert!(error.contains("\"neon\", whose kernels are for aarch64"), "{error}");
        assert!(error.ends_with("in a build for x86_64; choose of portable, x86_64_v3, avx512"));
        assert_eq!(targets("", "aarch64").unwrap(), [Target::Portable, Target::Neon]);
        let error = targets("avx512", "aarch64").unwrap_err().to_string();
        assert!(error.contains("choose of portable, neon"), "{error}");
    }

    #[test]
    fn a_tuner_has_candidates_for_its_own_architecture() {
        let check = |target, arch| tuner("1", target).unwrap().check(arch);
        assert!(check("avx512", "x86_64").is_ok() && check("neon", "aarch64").is_ok());
        assert!(check("portable", "aarch64").is_ok() && check("sm_90a", "aarch64").is_ok());
        let error = check("avx512", "aarch64").unwrap_err().to_string();
        assert!(error.contains("BESPOKE_TUNER_TARGET is avx512"), "{error}");
        assert!(error.ends_with("choose of portable, neon"), "{error}");
        assert!(Tuner::Default.check(std::env::consts::ARCH).is_ok());
        assert!(Tuner::Off.check("riscv64").is_ok());
    }

    #[test]
    fn tuners_are_checked() {
        assert_eq!(tuner("", "avx512").unwrap().target(), None);
        assert_eq!(tuner("0", "").unwrap(), Tuner::Off);
        assert_eq!(tuner("1", "").unwrap().target(), Some(Target::best()));
        assert_eq!(tuner("1", "x86_64_v3").unwrap().target(), Some(Target::X86_64V3));
        let archs = [Arch::Sm80, Arch::Sm90a];
        assert_eq!(tuner("1", "").unwrap().archs(&archs).unwrap(), archs);
        assert_eq!(tuner("1", "x86_64_v3").unwrap().archs(&archs).unwrap(), []);
        let hopper = tuner("1", "sm_90a").unwrap();
        assert_eq!(hopper.archs(&archs).unwrap(), [Arch::Sm90a]);
        assert_eq!(hopper.target(), None);
        let error = hopper.archs(&archs[..1]).unwrap_err().to_string();
        assert!(error.contains("sm_90a, which BESPOKE_CUDA_TARGETS does not name"), "{error}");
        assert!(tuner("yes", "").unwrap_err().to_string().contains("BESPOKE_TUNER is \"yes\""));
        let error = tuner("1", "sse2").unwrap_err().to_string();
        assert!(error.contains("\"sse2\"") && error.contains("portable"), "{error}");
    }

    #[test]
    fn a_lock_that_is_named_is_there() {
        assert!(lock("none").unwrap().is_none());
        let error = lock("no/such.lock").unwrap_err().to_string();
        assert!(error.contains("no/such.lock"), "{error}");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("other.lock");
        std::fs::write(&path, "version = 1\n").unwrap();
        assert_eq!(
            lock(&path.to_string_lossy()).unwrap(),
            Some(Lock { version: 1, ..Lock::default() })
        );
        std::fs::write(&path, "version = 9\n").unwrap();
        let error = lock(&path.to_string_lossy()).unwrap_err().to_string();
        assert!(error.contains("version 9"), "{error}");
    }

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
