//! Tuning of this machine's CPU.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bespoke_kernel_gen::tuning::device::{CpuDevice, Device, this_cpu};
use bespoke_kernel_gen::tuning::record::Record;

use super::{Args, Console, child, open_records, output, shapes_of};
use crate::backend::cpu::{available_threads, best_target};
use crate::cli::kernels::code_bytes;
use crate::tune::cpu::{CpuSetting, CpuTuning, problems};
use crate::tune::isolation::Isolation;
use crate::tune::ladder::verify_all;
use crate::tune::race::RaceOptions;
use crate::tune::report::TuningReport;
use crate::tune::{TuneProgress, TuneSummary};

/// What made this binary's kernels.
const COMPILER: &str = env!("BESPOKE_COMPILER");
/// How long the verification of one kernel may take: the largest matmuls, on a busy machine.
const SILENCE_MAX: Duration = Duration::from_secs(60);

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let table = console.kernels;
    if !table.is_tuner {
        bail!(
            "this binary has no candidates to choose from; build one that has them with \
             `BESPOKE_TUNER=1 BESPOKE_MODEL={} cargo build --release --target-dir target/tuner`",
            args.model.as_deref().unwrap_or("MODEL")
        );
    }
    let shapes = shapes_of(args, console)?;
    let num_threads = args.threads.unwrap_or_else(available_threads);
    let target = best_target(&table).context("this binary has no kernels for this machine")?;
    let device = Device::Cpu(CpuDevice { target, ..this_cpu(num_threads) });
    let (records, mut keeper) = open_records(args, &device.key(), console)?;
    let path = keeper.path.clone();
    let mut append = |record: &Record| keeper.keep(record);
    let program = console.program.clone().context("only the program itself can tune")?;
    let command = |symbols: &[String]| verifier(&program, num_threads, symbols);
    let code_bytes = code_bytes(table.kernels);
    let setting = CpuSetting {
        table: &table,
        target,
        device: device.clone(),
        num_threads,
        compiler: COMPILER,
        code_bytes: &code_bytes,
        isolation: Isolation { command: &command, silence_max: SILENCE_MAX },
    };
    let mut tuning = CpuTuning::new(setting, records, &mut append);
    let mut summary = TuneSummary::default();
    let num_models = shapes.len() as u32;
    for shape in &shapes {
        let problems = problems(shape, args.activations.choice())?;
        let budget = args.budget / num_models;
        let progress = &mut |progress: TuneProgress<'_>| console.report(&output::line(&progress));
        summary = tuning.run(&problems, &RaceOptions::default(), budget, progress)?;
    }
    let names: Vec<&str> = shapes.iter().map(|shape| shape.name.as_str()).collect();
    let report = TuningReport::new(&names.join(", "), &device, &tuning.into_records());
    output::finish(args, &report, &summary, &path, console)
}

/// The process that verifies kernels.
fn verifier(program: &Path, num_threads: usize, symbols: &[String]) -> Command {
    let mut command = Command::new(program);
    command.args(["tune", "--end-with-input", "--threads", &num_threads.to_string()]);
    command.arg("--verify-candidates").arg(symbols.join(","));
    command
}

/// What the process does that may crash.
pub(super) fn verify_candidates(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let table = console.kernels;
    let num_threads = args.threads.unwrap_or_else(available_threads);
    child::run(args, console, |begin, take| {
        verify_all(&table, &args.verify_candidates, num_threads, begin, take)
    })
}
