//! Tuning of this machine's GPU.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bespoke_kernel_gen::spec::KvDType;
use bespoke_kernel_gen::tuning::device::Device as AnyDevice;
use bespoke_kernel_gen::tuning::record::Record;

use super::{Args, Console, child, open_records, output, shapes_of};
use crate::backend::cuda::device::Device as _;
use crate::backend::cuda::driver::Driver;
use crate::kernels::generated;
use crate::tune::cuda::{CudaSetting, CudaTuneOptions, CudaTuning, verify_all};
use crate::tune::isolation::Isolation;
use crate::tune::report::TuningReport;
use crate::tune::{TuneProgress, TuneSummary};

/// How long a process may say nothing: it makes and packs the weights of the largest matmul, and
/// copies them, before the first kernel.
const SILENCE_MAX: Duration = Duration::from_secs(120);
/// Types of KV cache, and their shares of a model's time: all but attention and what writes the
/// cache is tuned with the first.
const KV_SHARES: [(KvDType, f64); 3] =
    [(KvDType::F16, 0.85), (KvDType::I8, 0.5), (KvDType::I4, 1.0)];

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let table = generated::cuda_table();
    if !table.is_tuner {
        bail!(
            "this binary has no CUDA candidates to choose from; build one that has them with \
             `BESPOKE_TUNER=1 BESPOKE_MODEL={} cargo build --release --features cuda --target-dir \
             target/tuner`, or tune the CPU with `--backend cpu`",
            args.model.as_deref().unwrap_or("MODEL")
        );
    }
    let end = Instant::now() + args.budget;
    let shapes = shapes_of(args, console)?;
    let info = Driver::open(&table)?.info().clone();
    let device = info.class();
    let (records, mut keeper) = open_records(args, &device.key(), console)?;
    let path = keeper.path.clone();
    let mut append = |record: &Record| keeper.keep(record);
    let program = console.program.clone().context("only the program itself can tune")?;
    let models = args.model.clone();
    let command = |symbols: &[String]| verifier(&program, models.as_deref(), symbols);
    let isolation = Isolation { command: &command, silence_max: SILENCE_MAX };
    let target = table.targets.iter().find(|target| target.arch == info.arch);
    let kernels = target.map_or(&[][..], |target| target.kernels).iter();
    let made_from: BTreeMap<&str, (&str, usize)> =
        kernels.map(|kernel| (kernel.symbol, (kernel.source_hash, kernel.cubin_len))).collect();
    let setting = CudaSetting {
        device: device.clone(),
        toolkit: table.toolkit,
        made_from: &|symbol| made_from.get(symbol).map(|(hash, len)| ((*hash).to_owned(), *len)),
        verify: &mut |symbols, take| isolation.verify(symbols, take),
    };
    let mut tuning = CudaTuning::new(setting, records, &mut append);
    let mut summary = TuneSummary::default();
    for (idx, shape) in shapes.iter().enumerate() {
        let num_left = (shapes.len() - idx) as f64;
        let shape_end = Instant::now() + left(end).div_f64(num_left);
        for (kv_dtype, share) in KV_SHARES {
            console.report(&format!("{}, {} KV cache\n", shape.name, kv_dtype.name()));
            let options = CudaTuneOptions::default();
            let budget = left(shape_end).mul_f64(share);
            let progress =
                &mut |progress: TuneProgress<'_>| console.report(&output::line(&progress));
            let opened = Driver::open(&table)?;
            summary = tuning.run(opened, shape, kv_dtype, &options, budget, progress)?;
        }
    }
    let names: Vec<&str> = shapes.iter().map(|shape| shape.name.as_str()).collect();
    let device = AnyDevice::Cuda(device);
    let report = TuningReport::new(&names.join(", "), &device, &tuning.into_records());
    output::finish(args, &report, &summary, &path, console)
}

fn left(end: Instant) -> Duration {
    end.saturating_duration_since(Instant::now())
}

/// The process that verifies kernels.
fn verifier(program: &Path, model: Option<&str>, symbols: &[String]) -> Command {
    let mut command = Command::new(program);
    command.arg("tune").args(model).args(["--backend", "cuda", "--end-with-input"]);
    command.arg("--verify-candidates").arg(symbols.join(","));
    command
}

/// What the process does that may crash.
pub(super) fn verify_candidates(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let table = generated::cuda_table();
    let shapes = shapes_of(args, console)?;
    let mut open = || Driver::open(&table);
    child::run(args, console, |begin, take| {
        verify_all(&mut open, &shapes, &args.verify_candidates, begin, take)
    })
}
