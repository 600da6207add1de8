//! The CUDA compiler: where it is found, and how a pinned one is installed.
//!
//! The order is `CUDA_HOME`, `PATH`, the cache's own. `kernel-gen toolkit` puts the latter there,
//! from NVIDIA's Python packages, a few hundred megabytes without the rest of CUDA.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::cache::Cache;
use super::process;
use crate::error::Error;

/// What decides which compiler is used, as a command line or build script finds it.
#[derive(Clone, Debug)]
pub struct Environment {
    /// `CUDA_HOME`.
    pub cuda_home: Option<PathBuf>,
    /// The folders of `PATH`.
    pub path: Vec<PathBuf>,
    pub cache: Cache,
}

/// A compiler and its version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Toolkit {
    pub nvcc: PathBuf,
    /// `13.0.88`
    pub version: String,
}

/// What a command of the toolkit may take.
const LIMIT: Duration = Duration::from_secs(60);
/// What the installation may take.
const INSTALL_LIMIT: Duration = Duration::from_secs(1800);

/// The version that is installed.
pub const VERSION: &str = "13.0";

/// The oldest version that knows all architectures.
const OLDEST: (u32, u32) = (12, 8);

/// The Python packages of [`VERSION`]; the disassembler is the oldest line there is, and reads all.
const PACKAGES: [&str; 6] = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-cuda-nvdisasm==13.2.86",
];

/// Folder of the toolkit inside an installation.
const INSTALLED: &str = "nvidia/cu13";

impl Toolkit {
    /// The compiler that builds use, or an error that says how to get one.
    pub fn find(environment: &Environment) -> Result<Toolkit, Error> {
        let Environment { cuda_home, path, cache } = environment;
        if let Some(home) = cuda_home {
            // NOTE: whoever names a toolkit wants that one and no other.
            let nvcc = home.join("bin/nvcc");
            return match nvcc.is_file() {
                true => Toolkit::at(&nvcc),
                false => Err(toolkit_error(format!(
                    "CUDA_HOME is {}, and {} does not exist.\nName the folder of a whole toolkit, \
                     {}.{} or later (NVIDIA's Python packages of CUDA 12 have the assembler alone, \
                     no nvcc), or unset CUDA_HOME and install CUDA {VERSION} with\n\n    \
                     cargo run -p bespoke-kernel-gen -- toolkit\n",
                    home.display(),
                    nvcc.display(),
                    OLDEST.0,
                    OLDEST.1
                ))),
            };
        }
        let mut on_path = path.iter().map(|folder| folder.join("nvcc"));
        if let Some(nvcc) = on_path.find(|nvcc| nvcc.is_file()) {
            return Toolkit::at(&nvcc);
        }
        let installed = cache.toolkits().join(VERSION).join(INSTALLED).join("bin/nvcc");
        match installed.is_file() {
            true => Toolkit::at(&installed),
            false => Err(toolkit_error(format!(
                "no CUDA compiler: CUDA_HOME is not set, no nvcc is in PATH, and {} does not \
                 exist.\nInstall one there with\n\n    \
                 cargo run -p bespoke-kernel-gen -- toolkit\n",
                installed.display()
            ))),
        }
    }

    fn at(nvcc: &Path) -> Result<Toolkit, Error> {
        let name = nvcc.display();
        let output = process::run(Command::new(nvcc).arg("--version"), LIMIT)
            .map_err(|error| toolkit_error(format!("{name} --version: {error}")))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = version(&text).ok_or_else(|| {
            toolkit_error(format!("{name} --version names no version: {text}{}", output.stderr))
        })?;
        let toolkit = Toolkit { nvcc: nvcc.to_path_buf(), version };
        let release = toolkit.release();
        if release < OLDEST {
            return Err(toolkit_error(format!(
                "{name} is version {}; {}.{} or later is needed, or unset CUDA_HOME and take nvcc \
                 out of PATH to use the one of `kernel-gen toolkit`",
                toolkit.version, OLDEST.0, OLDEST.1
            )));
        }
        Ok(toolkit)
    }

    /// Major and minor version.
    pub fn release(&self) -> (u32, u32) {
        let mut numbers = self.version.split('.').map(|number| number.parse().unwrap_or(0));
        (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
    }

    /// Another program of the toolkit, such as `nvdisasm`.
    pub fn tool(&self, name: &str) -> Result<PathBuf, Error> {
        let tool = self.nvcc.with_file_name(name);
        match tool.is_file() {
            true => Ok(tool),
            false => Err(toolkit_error(format!(
                "{} does not exist; the toolkit of `kernel-gen toolkit` has it",
                tool.display()
            ))),
        }
    }

    /// Installs the pinned packages with pip, unless they are there.
    pub fn install(environment: &Environment, python: &str) -> Result<Toolkit, Error> {
        let folder = environment.cache.toolkits().join(VERSION);
        let nvcc = folder.join(INSTALLED).join("bin/nvcc");
        if nvcc.is_file() {
            return Toolkit::at(&nvcc);
        }
        let temporary = environment.cache.temporary("toolkit")?;
        let result = install_into(&temporary, python).and_then(|()| {
            Toolkit::at(&temporary.join(INSTALLED).join("bin/nvcc"))?;
            publish(&temporary, &folder)
        });
        if result.is_err() {
            // NOTE: the error that stopped the installation is the one to report.
            let _ = fs::remove_dir_all(&temporary);
        }
        result?;
        Toolkit::at(&nvcc)
    }
}

fn install_into(folder: &Path, python: &str) -> Result<(), Error> {
    let mut command = Command::new(python);
    command
        .args(["-m", "pip", "install", "--no-deps", "--no-compile", "--quiet", "--target"])
        .arg(folder)
        .args(["--disable-pip-version-check", "--only-binary", ":all:"])
        .args(PACKAGES);
    let output = process::run(&mut command, INSTALL_LIMIT).map_err(|error| {
        toolkit_error(format!("{python} -m pip: {error}; install Python 3 with pip"))
    })?;
    match output.status.success() {
        true => Ok(()),
        false => Err(toolkit_error(format!("{python} -m pip install failed:\n{}", output.stderr))),
    }
}

/// Gives the finished folder its name; one that another process has finished meanwhile is as good.
fn publish(temporary: &Path, folder: &Path) -> Result<(), Error> {
    let io = |source| Error::Io { path: folder.display().to_string(), source };
    if let Some(parent) = folder.parent() {
        fs::create_dir_all(parent).map_err(io)?;
    }
    match fs::rename(temporary, folder) {
        Err(_) if folder.is_dir() => fs::remove_dir_all(temporary).map_err(io),
        result => result.map_err(io),
    }
}

/// `13.0.88` of `Cuda compilation tools, release 13.0, V13.0.88`.
fn version(text: &str) -> Option<String> {
    let (_, rest) = text.split_once(", V")?;
    let version: String = rest.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
    (!version.is_empty()).then_some(version)
}

fn toolkit_error(message: String) -> Error {
    Error::Toolkit { message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        let text = "Built on Wed\nCuda compilation tools, release 13.0, V13.0.88\nBuild cuda_13";
        assert_eq!(version(text).as_deref(), Some("13.0.88"));
        assert_eq!(version("no compiler"), None);
        let nvcc = PathBuf::from("nvcc");
        assert_eq!(Toolkit { nvcc, version: "12.8.93".to_string() }.release(), (12, 8));
    }

    #[test]
    fn without_a_compiler_the_error_says_how_to_get_one() {
        let cache = Cache { root: PathBuf::from("/nowhere") };
        let environment = Environment { cuda_home: None, path: Vec::new(), cache };
        let error = Toolkit::find(&environment).unwrap_err().to_string();
        assert!(error.contains("-p bespoke-kernel-gen -- toolkit"), "{error}");
        let environment = Environment { cuda_home: Some("/nowhere".into()), ..environment };
        let error = Toolkit::find(&environment).unwrap_err().to_string();
        for part in ["/nowhere/bin/nvcc", "12.8", "Python packages", "-- toolkit"] {
            assert!(error.contains(part), "{error}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn old_and_broken_compilers_are_refused() {
        use std::os::unix::fs::PermissionsExt;
        let root = std::env::temp_dir().join(format!("bespoke-toolkit-{}", std::process::id()));
        let nvcc = root.join("bin/nvcc");
        fs::create_dir_all(root.join("bin")).unwrap();
        let find = |output: &str| {
            fs::write(&nvcc, format!("#!/bin/sh\necho '{output}'\n")).unwrap();
            fs::set_permissions(&nvcc, fs::Permissions::from_mode(0o755)).unwrap();
            let cache = Cache { root: root.join("cache") };
            let cuda_home = Some(root.clone());
            Toolkit::find(&Environment { cuda_home, path: Vec::new(), cache })
        };
        let old = find("Cuda compilation tools, release 12.4, V12.4.131").unwrap_err().to_string();
        assert!(old.contains("12.4.131") && old.contains("12.8"), "{old}");
        assert!(find("hello").unwrap_err().to_string().contains("hello"));
        let new = find("Cuda compilation tools, release 12.8, V12.8.93").unwrap();
        assert_eq!(new.release(), (12, 8));
        assert!(new.tool("nvdisasm").is_err());
        fs::remove_dir_all(&root).unwrap();
    }
}
