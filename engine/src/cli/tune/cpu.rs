//! Tuning of this machine's CPU.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bespoke_kernel_gen::spec::{ActivationType, ModelShape};
use bespoke_kernel_gen::tuning::device::{CpuDevice, Device, this_cpu};
use bespoke_kernel_gen::tuning::record::{Record, Records};
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use serde::Serialize;

use super::{Args, Console, Keeper};
use crate::backend::cpu::{available_threads, best_target};
use crate::cli::kernels::code_bytes;
use crate::cli::model::{Activations, shape_of};
use crate::cli::verify::shapes;
use crate::error::Error;
use crate::files::{IfExists, write_file};
use crate::tune::cpu::{CpuProgress, CpuSetting, CpuSummary, CpuTuning, problems};
use crate::tune::isolation::{Isolation, Line};
use crate::tune::ladder::verify_all;
use crate::tune::race::RaceOptions;
use crate::tune::report::{TuningReport, TuningRow};

/// What made this binary's kernels.
const COMPILER: &str = env!("BESPOKE_COMPILER");
/// How long the verification of one kernel may take: the largest matmuls, on a busy machine.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// The JSON of a run.
#[derive(Serialize)]
struct Summary<'a> {
    device: String,
    model: &'a str,
    num_verified: usize,
    num_failed: usize,
    num_measured: usize,
    /// Measurements of earlier runs.
    num_known: usize,
    records: String,
    rows: &'a [TuningRow],
}

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
    let (records, warnings) = Records::open(&args.records);
    for warning in warnings {
        console.report(&format!("warning: {warning}\n"));
    }
    let name = Path::new(&device.key()).join(format!("{}.jsonl", std::process::id()));
    let path = args.records_file(&name);
    let mut keeper = Keeper::open(path.clone())?;
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
    let mut tuning = CpuTuning::new(setting, records.all, &mut append);
    let mut summary = CpuSummary::default();
    let num_models = shapes.len() as u32;
    for shape in &shapes {
        let problems = problems(shape, activation(args))?;
        let budget = args.budget / num_models;
        let progress = &mut |progress: CpuProgress<'_>| console.report(&line(&progress));
        summary = tuning.run(&problems, &RaceOptions::default(), budget, progress)?;
    }
    let names: Vec<&str> = shapes.iter().map(|shape| shape.name.as_str()).collect();
    let report = TuningReport::new(&names.join(", "), &device, &tuning.into_records());
    finish(args, &report, &summary, &path, console)
}

/// Writes the report page, and prints what came out.
pub(super) fn finish(
    args: &Args,
    report: &TuningReport,
    summary: &CpuSummary,
    path: &Path,
    console: &mut Console<'_>,
) -> anyhow::Result<()> {
    let page = args.records_file(Path::new("tuning.html")).with_file_name("tuning.html");
    write_file(&page, report.page().as_bytes(), IfExists::Replace)?;
    let json = page.with_extension("json");
    write_file(&json, report.json().as_bytes(), IfExists::Replace)?;
    if args.json {
        let CpuSummary { num_verified, num_failed, num_measured, num_known } = *summary;
        return console.print_json(&Summary {
            device: report.device.clone(),
            model: &report.model,
            num_verified,
            num_failed,
            num_measured,
            num_known,
            records: path.display().to_string(),
            rows: &report.rows,
        });
    }
    console.print(&text(report, summary))?;
    console.report(&format!(
        "records: {}, report: {}\nchoose with `cargo run -p bespoke-kernel-gen -- select --records \
         {}`\n",
        path.display(),
        page.display(),
        args.records.display()
    ));
    Ok(())
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
    if args.end_with_input {
        end_with_input()?;
    }
    let table = console.kernels;
    let out = std::cell::RefCell::new(console);
    let print = |line: &Line| {
        let printed = out.borrow_mut().print_json(line);
        printed.map_err(|error| Error::Resources(error.to_string()))
    };
    verify_all(
        &table,
        &args.verify_candidates,
        args.threads.unwrap_or_else(available_threads),
        &mut |symbol| print(&Line::Begin(symbol.to_owned())),
        &mut |symbol, verdict| {
            let symbol = symbol.to_owned();
            print(&match verdict {
                Ok(levels) => Line::Passed(symbol, levels),
                Err(failure) => Line::Failed(symbol, failure),
            })
        },
    )?;
    Ok(())
}

/// Ends the process at the end of its standard input, which whoever waits for it holds open.
pub(super) fn end_with_input() -> anyhow::Result<()> {
    let wait = || {
        // NOTE: nobody waits any more, whatever this says.
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        std::process::exit(1);
    };
    std::thread::Builder::new().name("input".to_owned()).spawn(wait).context("cannot wait")?;
    Ok(())
}

fn activation(args: &Args) -> ActivationType {
    match args.activations {
        Activations::Float => ActivationType::Float,
        Activations::Int8 => ActivationType::Int8,
    }
}

/// The model that is named, or all that the binary was built for.
pub(super) fn shapes_of(args: &Args, console: &Console<'_>) -> anyhow::Result<Vec<ModelShape>> {
    let Some(model) = &args.model else { return shapes(None) };
    Ok(vec![shape_of(model, console)?])
}

fn line(progress: &CpuProgress<'_>) -> String {
    match progress {
        CpuProgress::Verifying { spec, num_kernels } => {
            format!("{spec}: verifying {num_kernels} kernels\n")
        }
        CpuProgress::Refused { symbol, reason } => format!("refused {symbol}: {reason}\n"),
        CpuProgress::Postponed { spec, num_kernels } => format!(
            "{spec}: no time to verify {num_kernels} kernels; call this again to go on with them\n"
        ),
        CpuProgress::Racing { spec, pass, num_kernels, seconds } => match pass {
            1 => format!("{spec}: racing {num_kernels} kernels for {seconds:.0} s at most\n"),
            _ => format!("{spec}: racing the fastest again, pass {pass}\n"),
        },
    }
}

fn text(report: &TuningReport, summary: &CpuSummary) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(["problem", "rows", "default µs", "best µs", "ratio", "of limit", "best"]);
    let mut by_spec: BTreeMap<&str, Vec<&TuningRow>> = BTreeMap::new();
    for row in &report.rows {
        by_spec.entry(&row.spec).or_default().push(row);
    }
    for row in by_spec.values().flatten() {
        let share = |share: f64| format!("{:.0} %", 100.0 * share);
        table.add_row([
            row.spec.clone(),
            row.num_rows.to_string(),
            format!("{:.1}", row.default_us),
            format!("{:.1}", row.default_us * row.ratio),
            format!("{:.3} ± {:.3}", row.ratio, row.noise),
            row.limit_share.map_or(String::new(), share),
            row.best.clone(),
        ]);
    }
    format!(
        "{}\n{} kernels verified, {} refused; {} measurements, {} known before\n",
        table.trim_fmt(),
        summary.num_verified,
        summary.num_failed,
        summary.num_measured,
        summary.num_known
    )
}
