//! `bespoke build`: a program that is made for one model, and brings it.

mod cargo;
mod files;
mod sizes;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use bespoke_kernel_gen::cuda::Arch;
use bespoke_kernel_gen::target::Target;

use self::cargo::Cargo;
use self::sizes::Sizes;
use super::console::Console;
use super::elf;
use crate::backend::cpu::is_available;
use crate::bundle::{self, Bundle, Contents};
use crate::files::{IfExists, StagedFile, write_error};
use crate::source::ModelFolder;

/// Build one program for one model
///
/// The program has the model's kernels for the chosen machines, its tokenizer and its chat
/// template, and with --embed-weights its weights: one file that needs nothing else. It knows its
/// model, so that `FILE generate --prompt …` is all. Building takes a Rust toolchain and this
/// project's source; the same inputs give the same bytes.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// Model folder, name of a cached model, or preset
    model: String,
    /// Program to write; an older one is replaced
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Machines: cpu (all of the next), portable, x86_64_v3, avx512 (or neon on aarch64), and GPUs
    /// such as sm_90a
    #[arg(long, value_name = "TARGET,…", value_delimiter = ',', default_value = "cpu")]
    target: Vec<String>,
    /// Put the weights into the program too, packed for the best of its CPU targets
    #[arg(long)]
    embed_weights: bool,
    /// Refuse more machine code of CPU kernels than this
    #[arg(long, value_name = "N")]
    max_kernel_bytes: Option<u64>,
    /// Folder of this project's source [default: the current folder, or one above it]
    #[arg(long, value_name = "DIR")]
    source: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  bespoke build smollm2-135m-awq-g64 -o smollm --embed-weights
  bespoke build ./my-model -o my-model --target avx512,x86_64_v3
  bespoke build ./my-model -o my-model --target avx512,sm_90a

Without --embed-weights the program wants them by --model DIR.";

/// What `--target` names.
#[derive(Debug, PartialEq, Eq)]
struct Targets {
    /// Ascending, each once.
    cpu: Vec<Target>,
    cuda: Vec<Arch>,
}

impl Targets {
    fn parse(names: &[String]) -> anyhow::Result<Targets> {
        let own = Target::of_this_arch();
        let mut targets = Targets { cpu: Vec::new(), cuda: Vec::new() };
        for name in names.iter().map(|name| name.trim()) {
            let target = Target::from_name(name);
            if name == "cpu" {
                targets.cpu.extend(&own);
            } else if let Some(target) = target.filter(|one| own.contains(one)) {
                targets.cpu.push(target);
            } else if let Some(arch) = Arch::from_name(name) {
                targets.cuda.push(arch);
            } else {
                let what = match target.and_then(Target::arch) {
                    Some(arch) => format!(", whose kernels are for {arch}, not this machine"),
                    None => String::new(),
                };
                let cpu: Vec<&str> = own.iter().map(|target| target.name()).collect();
                let (cpu, cuda) = (cpu.join(", "), Arch::ALL.map(Arch::name).join(", "));
                bail!("--target names {name:?}{what}; choose of cpu, {cpu}, {cuda}");
            }
        }
        // NOTE: a program for GPUs still starts, and says what is wrong, on a machine without one.
        if targets.cpu.is_empty() {
            targets.cpu.extend(&own);
        }
        targets.cpu.sort_unstable();
        targets.cpu.dedup();
        targets.cuda.dedup();
        Ok(targets)
    }

    fn cpu_names(&self) -> Vec<&'static str> {
        self.cpu.iter().map(|target| target.name()).collect()
    }

    fn cuda_names(&self) -> Vec<&'static str> {
        self.cuda.iter().map(|arch| arch.name()).collect()
    }
}

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let targets = Targets::parse(&args.target)?;
    let dir = fs::canonicalize(console.resolve(&args.model)?)?;
    let files = files::read(&dir)?;
    let name = ModelFolder::Disk(dir.clone()).name().into_owned();
    let source = cargo::source(args.source.as_deref())?;
    let staged = StagedFile::create(&args.output, IfExists::Replace)?;
    console.report(&format!("building {name} for {}\n", targets.cpu_names().join(", ")));
    let cargo = Cargo { source: &source, model: &dir };
    let built = cargo.build(&targets.cpu_names(), &targets.cuda_names())?;
    let kernels = sizes::kernels(&built)?;
    refuse_large(&kernels, args.max_kernel_bytes)?;
    let weights = match args.embed_weights {
        true => Some(pack(&built, &dir, &targets, &staged)?),
        false => None,
    };
    let program = elf::stripped(&fs::read(&built)?);
    let names = [targets.cpu_names(), targets.cuda_names()].concat();
    let contents = Contents {
        name: &name,
        targets: names.into_iter().map(str::to_owned).collect(),
        files,
        weights: weights.as_ref().map(|weights| weights.0.as_path()),
    };
    let len = write(staged.path(), &program, &contents)?;
    let bundle = Bundle::open(staged.path())?.context("the model that was appended is gone")?;
    let sizes = Sizes::new(kernels, program.len() as u64, &bundle, len);
    drop(weights);
    staged.commit()?;
    match args.json {
        true => console.print_json(&sizes),
        false => console.print(&sizes.text(&args.output)),
    }
}

fn refuse_large(kernels: &BTreeMap<String, u64>, bytes_max: Option<u64>) -> anyhow::Result<()> {
    let total: u64 = kernels.values().sum();
    let Some(bytes_max) = bytes_max.filter(|bytes_max| total > *bytes_max) else { return Ok(()) };
    let by_op: Vec<String> = kernels.iter().map(|(op, bytes)| format!("{op} {bytes}")).collect();
    bail!(
        "the kernels have {total} bytes of machine code, more than --max-kernel-bytes {bytes_max}: \
         {}; choose fewer targets or a larger limit",
        by_op.join(", ")
    )
}

/// A file that is removed when it is no longer needed.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // It lies in a folder for temporary files of builds.
        let _ = fs::remove_file(&self.0);
    }
}

/// The weights, packed by the new program for the best target that it has here.
fn pack(
    program: &Path,
    dir: &Path,
    targets: &Targets,
    staged: &StagedFile,
) -> anyhow::Result<Scratch> {
    let best = targets.cpu.iter().rev().find(|target| is_available(**target));
    let Some(target) = best else {
        bail!(
            "this machine lacks the instructions of {}, so it cannot pack weights for them; add \
             --target portable, or build on another machine",
            targets.cpu_names().join(", ")
        );
    };
    let mut path = staged.path().as_os_str().to_owned();
    path.push(".weights");
    let scratch = Scratch(PathBuf::from(path));
    let _ = fs::remove_file(&scratch.0);
    let mut command = std::process::Command::new(program);
    command.arg("pack-weights").arg(dir).arg("-o").arg(&scratch.0);
    command.args(["--target", target.name()]);
    let output = command.output().with_context(|| program.display().to_string())?;
    ensure!(
        output.status.success(),
        "the weights could not be packed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(scratch)
}

/// Writes the program and what it brings; the length of all.
fn write(path: &Path, program: &[u8], contents: &Contents<'_>) -> anyhow::Result<u64> {
    let fail = |error| write_error(path, program.len() as u64, error);
    let file = File::create_new(path).map_err(fail)?;
    make_executable(&file).map_err(fail)?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(program).map_err(fail)?;
    let len = bundle::append(&mut out, program.len() as u64, contents).map_err(fail)?;
    let file = out.into_inner().map_err(|error| fail(error.into_error()))?;
    file.sync_all().map_err(fail)?;
    Ok(len)
}

fn make_executable(file: &File) -> std::io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        file.set_permissions(fs::Permissions::from_mode(0o755))?;
    }
    #[cfg(not(unix))]
    let _ = file;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(names: &[&str]) -> anyhow::Result<Targets> {
        Targets::parse(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn targets_are_checked() {
        let own = Target::of_this_arch();
        let best = own.last().unwrap().name();
        let targets = parse(&[best, "portable", best, "sm_90a"]).unwrap();
        assert_eq!(targets.cpu_names(), ["portable", best]);
        assert_eq!(targets.cuda, [Arch::Sm90a]);
        assert_eq!(parse(&["cpu"]).unwrap().cpu, own);
        assert_eq!(parse(&["sm_80"]).unwrap().cpu, own);
        let error = parse(&["avx", "cpu"]).unwrap_err().to_string();
        assert!(error.contains("\"avx\"; choose of cpu, portable") && error.contains(best));
        let other = if own.contains(&Target::Neon) { Target::Avx512 } else { Target::Neon };
        let error = parse(&[other.name()]).unwrap_err().to_string();
        assert!(error.contains("not this machine; choose of cpu, portable"), "{error}");
    }

    #[test]
    fn large_kernels_are_refused_with_their_sizes() {
        let kernels = BTreeMap::from([("gemm".to_owned(), 70), ("rope".to_owned(), 31)]);
        assert!(refuse_large(&kernels, None).is_ok() && refuse_large(&kernels, Some(101)).is_ok());
        let error = refuse_large(&kernels, Some(100)).unwrap_err().to_string();
        assert!(error.contains("101 bytes") && error.contains("gemm 70, rope 31"), "{error}");
    }
}
