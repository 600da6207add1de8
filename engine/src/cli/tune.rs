//! `bespoke tune`: which kernels are fastest on this machine, and records of it.

mod child;
mod cpu;
#[cfg(feature = "cuda")]
mod gpu;
mod output;

use std::path::{Path, PathBuf};
use std::time::Duration;

use bespoke_kernel_gen::spec::ModelShape;
use bespoke_kernel_gen::tuning::record::{Appender, Record, Records};
use clap::ValueEnum;

use super::console::Console;
use super::interrupt::Stop;
use super::model::{Activations, shape_of};
use super::verify::shapes;
use crate::error::Error;

/// Verify and measure the kernels of this binary on this machine
///
/// On a CPU, all candidates of a model's matmuls: each is verified in a process of its own, and
/// raced against the kernel that serves where nothing was measured. On a GPU, the same, replayed
/// from recordings. Each measurement is appended to the records at once; a later run goes on where
/// this one ended, at its budget or at Ctrl-C. `kernel-gen select` chooses from the records.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// Model folder, name of a cached model, or preset [default: those the binary was built for]
    model: Option<String>,
    /// Folder of records, of which all are read and one file is appended to; or one file, *.jsonl
    #[arg(long, value_name = "PATH", default_value = "tuning/records")]
    records: PathBuf,
    /// End after so long: 300, 300s or 5m; a later run goes on
    #[arg(long, value_name = "TIME", value_parser = parse_budget, default_value = "300s")]
    budget: Duration,
    /// What is tuned
    #[arg(long, value_enum, default_value_t = Which::Auto)]
    backend: Which,
    /// Rows that linears read; int8 is for 4-bit weights, and others ignore it
    #[arg(long, value_enum, default_value_t = Activations::Int8)]
    activations: Activations,
    /// Threads to compute with [default: all cores]
    #[arg(long, value_name = "N", value_parser = super::model::parse_threads)]
    threads: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Hidden: verify these kernels, in the process that does nothing else
    #[arg(long, value_name = "SYMBOL,…", value_delimiter = ',', hide = true)]
    verify_candidates: Vec<String>,
    /// Hidden: end as soon as standard input does, whatever a kernel is doing
    #[arg(long, hide = true, requires = "verify_candidates")]
    end_with_input: bool,
}

impl Args {
    /// The file that is appended to: `name` in the folder, or the one that is given.
    fn records_file(&self, name: &Path) -> PathBuf {
        match self.records.extension().is_some_and(|extension| extension == "jsonl") {
            true => self.records.clone(),
            false => self.records.join(name),
        }
    }
}

/// The answer to the first Ctrl-C.
const ENDING: &str =
    "ending after the measurement in flight; press Ctrl-C once more to end at once";

/// The file that a run appends records to, until Ctrl-C.
struct Keeper {
    path: PathBuf,
    appender: Appender,
    stop: Stop,
    num_kept: usize,
}

impl Keeper {
    fn open(path: PathBuf) -> anyhow::Result<Keeper> {
        let appender = Appender::open(&path)?;
        Ok(Keeper { path, appender, stop: Stop::listen(ENDING)?, num_kept: 0 })
    }

    /// # Errors
    /// The record cannot be written, or Ctrl-C was pressed.
    fn keep(&mut self, record: &Record) -> Result<(), Error> {
        self.appender.append(record)?;
        self.num_kept += 1;
        match self.stop.is_asked() {
            true => Err(Error::Request(format!(
                "interrupted; {} records are kept in {}, the same command goes on from there",
                self.num_kept,
                self.path.display()
            ))),
            false => Ok(()),
        }
    }
}

const EXAMPLES: &str = "\
A binary that has the candidates of a model:
  BESPOKE_TUNER=1 BESPOKE_MODEL=MODEL cargo build --release --target-dir target/tuner
  target/tuner/release/bespoke tune MODEL --budget 300s";

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    /// The GPU where this binary has kernels for one, else the CPU
    Auto,
    Cpu,
    Cuda,
}

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    if !args.verify_candidates.is_empty() {
        return match args.backend {
            #[cfg(feature = "cuda")]
            Which::Cuda => gpu::verify_candidates(args, console),
            _ => cpu::verify_candidates(args, console),
        };
    }
    match args.backend {
        Which::Cpu => cpu::run(args, console),
        Which::Auto if cfg!(not(feature = "cuda")) => cpu::run(args, console),
        Which::Auto | Which::Cuda => run_gpu(args, console),
    }
}

#[cfg(feature = "cuda")]
fn run_gpu(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    gpu::run(args, console)
}

#[cfg(not(feature = "cuda"))]
fn run_gpu(_args: &Args, _console: &mut Console<'_>) -> anyhow::Result<()> {
    anyhow::bail!(
        "this binary was built without CUDA; build it with `cargo build --release --features \
         cuda`, or tune the CPU with `--backend cpu`"
    )
}

/// The records of all runs so far, and the file that this one appends to.
fn open_records(
    args: &Args,
    device: &str,
    console: &mut Console<'_>,
) -> anyhow::Result<(Vec<Record>, Keeper)> {
    let (records, warnings) = Records::open(&args.records);
    for warning in warnings {
        console.report(&format!("warning: {warning}\n"));
    }
    let name = Path::new(device).join(format!("{}.jsonl", std::process::id()));
    Ok((records.all, Keeper::open(args.records_file(&name))?))
}

/// The model that is named, or all that the binary was built for.
fn shapes_of(args: &Args, console: &Console<'_>) -> anyhow::Result<Vec<ModelShape>> {
    let Some(model) = &args.model else { return shapes(None) };
    Ok(vec![shape_of(model, console)?])
}

/// `300`, `300s`, `5m` or `1h`, up to a day.
fn parse_budget(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text.strip_suffix(['s', 'm', 'h']) {
        Some(number) => (number, &text[number.len()..]),
        None => (text, "s"),
    };
    let seconds = match unit {
        "m" => 60,
        "h" => 3600,
        _ => 1,
    };
    let seconds = number.parse::<u64>().ok().and_then(|number| number.checked_mul(seconds));
    match seconds {
        Some(seconds @ 1..=86_400) => Ok(Duration::from_secs(seconds)),
        _ => Err("expected a time such as 300s or 5m, a day at most".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_have_units() {
        for (text, seconds) in [("300", 300), ("300s", 300), ("5m", 300), ("24h", 86_400)] {
            assert_eq!(parse_budget(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "0", "-1", "5d", "25h", "m", "99999999999999999999h", "1.5m"] {
            assert!(parse_budget(text).is_err(), "{text}");
        }
    }
}
