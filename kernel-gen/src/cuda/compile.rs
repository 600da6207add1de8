//! Sources → machine code, one nvcc call a kernel, each checked by the assembler's own report.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::cache::{Cache, Entry, Temporary};
use super::jobs::Jobs;
use super::process;
use super::ptxas::{self, Usage};
use super::render::Source;
use super::toolkit::Toolkit;
use crate::error::Error;

/// A kernel's machine code and what it is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Artifact {
    pub source: Source,
    /// Of the source, the compiler's version and its flags: 32 hex digits.
    pub hash: String,
    pub usage: Usage,
    pub cubin: Vec<u8>,
    /// Whether the cache had it.
    pub is_cached: bool,
}

/// How kernels are compiled.
#[derive(Debug)]
pub struct Compiler {
    pub toolkit: Toolkit,
    pub cache: Cache,
    pub jobs: Jobs,
    /// A call that takes longer is stopped.
    pub limit: Duration,
}

/// How long one kernel may take.
pub const LIMIT: Duration = Duration::from_secs(600);

/// NOTE: no contraction of products and sums: a body that wants a fused multiply-add says so, and
/// kernels of one reduction class round alike whatever surrounds an expression.
const FLAGS: [&str; 6] = [
    "-cubin",
    "-O3",
    "-std=c++17",
    "-fmad=false",
    "--Werror=cross-execution-space-call",
    "-Xptxas=-v",
];

impl Compiler {
    /// Compiles all sources that the cache does not have, in parallel.
    ///
    /// The error of the first kernel that the compiler refuses, or that wastes registers.
    pub fn compile(&self, sources: Vec<Source>) -> Result<Vec<Artifact>, Error> {
        self.jobs.run(sources.len(), |idx| self.compile_one(&sources[idx]))
    }

    fn compile_one(&self, source: &Source) -> Result<Artifact, Error> {
        let key = key(source, &self.toolkit.version);
        let found = self.cache.get(&key);
        let is_cached = found.is_some();
        let entry = match found {
            Some(entry) => entry,
            None => self.call(source)?,
        };
        let usage = ptxas::check(&entry.report, &source.symbol)
            .map_err(|message| compile_error(source, message))?;
        if !is_cached {
            self.cache.put(&key, &entry)?;
        }
        let hash = key[..HASH_LEN].to_string();
        Ok(Artifact { source: source.clone(), hash, usage, cubin: entry.cubin, is_cached })
    }

    /// As [`Compiler::compile`], but leaves out what the compiler refuses: those errors come
    /// second. What else goes wrong is an error.
    pub fn compile_candidates(
        &self,
        sources: Vec<Source>,
    ) -> Result<(Vec<Artifact>, Vec<Error>), Error> {
        let one = |idx: usize| match self.compile_one(&sources[idx]) {
            Err(refused @ Error::Compile { .. }) => Ok(Err(refused)),
            Err(other) => Err(other),
            Ok(artifact) => Ok(Ok(artifact)),
        };
        let (mut artifacts, mut refused) = (Vec::new(), Vec::new());
        for result in self.jobs.run(sources.len(), one)? {
            match result {
                Ok(artifact) => artifacts.push(artifact),
                Err(error) => refused.push(error),
            }
        }
        Ok((artifacts, refused))
    }

    fn call(&self, source: &Source) -> Result<Entry, Error> {
        let text = Temporary(self.cache.temporary("cu")?);
        let cubin = Temporary(self.cache.temporary("cubin")?);
        let io = |path: &Path| {
            let path = path.display().to_string();
            |source| Error::Io { path, source }
        };
        std::fs::write(text.path(), &source.text).map_err(io(text.path()))?;
        let mut command = Command::new(&self.toolkit.nvcc);
        // NOTE: nvcc takes flags from there, which the key does not know.
        command.env_remove("NVCC_PREPEND_FLAGS").env_remove("NVCC_APPEND_FLAGS");
        command
            .args(FLAGS)
            .arg(format!("-arch={}", source.variant.arch.name()))
            .arg("-o")
            .arg(cubin.path())
            .arg(text.path());
        let output = process::run(&mut command, self.limit).map_err(|failure| {
            compile_error(source, format!("{}: {failure}", self.toolkit.nvcc.display()))
        })?;
        let report = format!("{}{}", String::from_utf8_lossy(&output.stdout), output.stderr);
        if !output.status.success() {
            return Err(compile_error(source, format!("nvcc failed:\n{report}")));
        }
        let cubin = std::fs::read(cubin.path()).map_err(io(cubin.path()))?;
        Ok(Entry { cubin, report })
    }
}

/// Hex digits of a source hash.
const HASH_LEN: usize = 32;

/// The hash of a source as the toolkit of this version compiles it: [`Artifact::hash`].
pub fn source_hash(source: &Source, version: &str) -> String {
    key(source, version)[..HASH_LEN].to_string()
}

/// Of all that the machine code depends on.
fn key(source: &Source, version: &str) -> String {
    let mut hasher = blake3::Hasher::new();
    let arch = source.variant.arch.name();
    for part in [arch, version, &FLAGS.join(" "), &source.text] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

fn compile_error(source: &Source, message: String) -> Error {
    Error::Compile { symbol: source.symbol.clone(), message }
}

#[cfg(all(test, unix))]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use super::*;
    use crate::cuda::Variant;
    use crate::cuda::render::render;

    /// A compiler that is a shell script: what is tested is what surrounds it.
    struct Stub {
        root: PathBuf,
        compiler: Compiler,
    }

    impl Stub {
        fn new(name: &str, script: &str) -> Stub {
            let root = tempfile::Builder::new().prefix(name).tempdir().unwrap().keep();
            let nvcc = root.join("nvcc");
            fs::write(
                &nvcc,
                format!("#!/bin/sh\necho call >> {}/calls\n{script}\n", root.display()),
            )
            .unwrap();
            fs::set_permissions(&nvcc, fs::Permissions::from_mode(0o755)).unwrap();
            let compiler = Compiler {
                toolkit: Toolkit { nvcc, version: "13.0.88".to_string() },
                cache: Cache { root: root.join("cache") },
                jobs: Jobs::Threads(2),
                limit: Duration::from_secs(60),
            };
            Stub { root, compiler }
        }

        fn calls(&self) -> usize {
            fs::read_to_string(self.root.join("calls")).map_or(0, |text| text.lines().count())
        }
    }

    impl Drop for Stub {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.root);
        }
    }

    fn sources() -> Vec<Source> {
        let symbols = ["silu_and_mul_i64_f16__sm_90a", "silu_and_mul_i64_bf16__sm_80"];
        symbols.map(|symbol| render(&Variant::parse(symbol).unwrap()).unwrap()).to_vec()
    }

    /// Writes a "cubin" and a report on the kernel of the source, with `spills` bytes.
    fn script(spills: usize) -> String {
        format!(
            "for last; do :; done\n\
             while [ \"$1\" != -o ]; do shift; done\n\
             echo machine code > \"$2\"\n\
             symbol=$(sed -n 's/^KERNEL(\\([a-z0-9_]*\\),.*/\\1/p' \"$last\")\n\
             echo \"Compiling entry function '$symbol' for 'sm'\" >&2\n\
             echo '0 bytes stack frame, {spills} bytes spill stores, 0 bytes spill loads' >&2\n\
             echo 'Used 32 registers' >&2"
        )
    }

    #[test]
    fn a_second_build_calls_no_compiler() {
        let stub = Stub::new("compile", &script(0));
        let first = stub.compiler.compile(sources()).unwrap();
        assert_eq!(stub.calls(), 2);
        assert!(first.iter().all(|artifact| !artifact.is_cached));
        assert_eq!(first[0].usage.registers, 32);
        assert_eq!(first[0].cubin, b"machine code\n");
        let second = stub.compiler.compile(sources()).unwrap();
        assert_eq!(stub.calls(), 2);
        assert!(second.iter().all(|artifact| artifact.is_cached));
        assert_ne!(first[0].hash, first[1].hash);
        let newer = Toolkit { version: "13.1.0".to_string(), ..stub.compiler.toolkit.clone() };
        let cache = stub.compiler.cache.clone();
        let newer = Compiler { toolkit: newer, cache, jobs: Jobs::Threads(1), limit: LIMIT };
        newer.compile(sources()).unwrap();
        assert_eq!(stub.calls(), 4);
    }

    #[test]
    fn spills_stop_the_build_and_are_not_kept() {
        let stub = Stub::new("spills", &script(16));
        for calls in 1..=2 {
            let error = stub.compiler.compile(sources()[..1].to_vec()).unwrap_err().to_string();
            assert!(error.contains("silu_and_mul_i64_f16__sm_90a"), "{error}");
            assert!(error.contains("16 bytes stored"), "{error}");
            assert_eq!(stub.calls(), calls);
        }
    }

    #[test]
    fn candidates_that_are_refused_are_left_out() {
        let refuse = "for last; do :; done\ngrep -q _i64_f16__ \"$last\" && exit 1";
        let stub = Stub::new("candidates", &format!("{refuse}\n{}", script(0)));
        let (kept, refused) = stub.compiler.compile_candidates(sources()).unwrap();
        let [kept] = &kept[..] else { panic!("{kept:?}") };
        assert_eq!(kept.source.symbol, "silu_and_mul_i64_bf16__sm_80");
        assert_eq!(kept.hash, source_hash(&kept.source, "13.0.88"));
        assert_ne!(kept.hash, source_hash(&kept.source, "13.0.89"));
        let [refused] = &refused[..] else { panic!("{refused:?}") };
        assert!(refused.to_string().contains("silu_and_mul_i64_f16__sm_90a"), "{refused}");
    }

    #[test]
    fn errors_name_the_kernel() {
        let stub = Stub::new("errors", "echo 'line 7: expected a ;' >&2; exit 1");
        let error = stub.compiler.compile(sources()).unwrap_err().to_string();
        assert!(error.contains("silu_and_mul_i64") && error.contains("line 7"), "{error}");
        let mut stub = Stub::new("hangs", "sleep 600");
        stub.compiler.limit = Duration::from_millis(100);
        let error = stub.compiler.compile(sources()).unwrap_err().to_string();
        assert!(error.contains("stopped"), "{error}");
    }
}
