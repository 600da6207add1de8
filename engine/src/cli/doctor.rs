//! `bespoke doctor`: what this machine has and what this binary holds.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use bespoke_kernel_gen::target::Target;
use bespoke_kernel_gen::tuning::device::{CpuDevice, Match, this_cpu};
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use serde::Serialize;

use super::console::Console;
use crate::backend::cpu;
use crate::bundle::Bundle;
use crate::files::{free_space, human_bytes};
use crate::memory;

/// Show what this machine has and what this binary holds
#[derive(clap::Args)]
pub(super) struct Args {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    cpu: Cpu,
    memory: MemoryReport,
    gpu: Gpu,
    cache: CacheReport,
    /// The model that this program brings, null in one that was built for any.
    model: Option<ModelReport>,
    kernels: Kernels,
}

#[derive(Serialize)]
struct ModelReport {
    name: String,
    /// Machines that the program was built for.
    targets: Vec<String>,
    /// Of the configuration, the tokenizer and the chat template.
    files_bytes: u64,
    /// Null where the weights are not in the program.
    weights_bytes: Option<u64>,
}

#[derive(Serialize)]
struct Cpu {
    name: Option<String>,
    threads: usize,
    /// Extensions that matter to inference, as the operating system names them.
    features: Vec<&'static str>,
    /// Instruction sets that kernels are made for and this machine has.
    targets: Vec<&'static str>,
    /// The one whose kernels are used, null where this binary holds none of them.
    target: Option<&'static str>,
}

#[derive(Serialize)]
struct MemoryReport {
    total_bytes: Option<u64>,
    available_bytes: Option<u64>,
}

#[derive(Serialize)]
struct Gpu {
    /// The NVIDIA driver's own words, null without a driver.
    driver: Option<String>,
    devices: usize,
    cuda: Option<Cuda>,
    /// The CUDA compiler, null where none is on the PATH.
    nvcc: Option<PathBuf>,
}

/// What this binary has for GPUs, and what it finds; null without the feature `cuda`.
#[derive(Serialize)]
struct Cuda {
    /// The compiler of the kernels.
    toolkit: &'static str,
    /// The oldest driver that runs them.
    driver_needed: &'static str,
    /// Architectures that this binary has kernels for.
    archs: Vec<&'static str>,
    /// CUDA version that the driver knows, null without a driver.
    driver_version: Option<String>,
    devices: Vec<CudaDevice>,
    /// Why models do not run on a GPU, null where they do.
    problem: Option<String>,
}

#[derive(Serialize)]
struct CudaDevice {
    name: String,
    capability: String,
    num_sms: usize,
    memory_bytes: usize,
    /// The kernels that it would run, null where this binary has none for it.
    arch: Option<&'static str>,
}

/// CPU extensions worth telling.
const FEATURES: [&str; 19] = [
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
];

#[derive(Serialize)]
struct CacheReport {
    path: Option<PathBuf>,
    free_bytes: Option<u64>,
    models: Vec<String>,
}

#[derive(Serialize)]
struct Kernels {
    count: usize,
    by_target: BTreeMap<&'static str, usize>,
    by_op: BTreeMap<&'static str, usize>,
    /// Key of this machine's device class.
    device: Option<String>,
    /// Device classes that kernels were chosen for, and how near each is.
    chosen_for: Vec<ChosenFor>,
}

#[derive(Serialize)]
struct ChosenFor {
    device: &'static str,
    /// `exact`, `family`, or `other`: not used here.
    matches: &'static str,
}

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let report = report(console);
    match args.json {
        true => console.print_json(&report),
        false => console.print(&text(&report)),
    }
}

fn report(console: &Console<'_>) -> Report {
    let is_available = |target: &Target| cpu::is_available(*target);
    let available = Target::ALL.into_iter().filter(is_available);
    let kernels = console.kernels.kernels;
    let mut by_target = BTreeMap::new();
    let mut by_op = BTreeMap::new();
    for kernel in kernels {
        *by_target.entry(kernel.target.name()).or_default() += 1;
        *by_op.entry(kernel.spec.op()).or_default() += 1;
    }
    let target = cpu::best_target(&console.kernels);
    let device = target.map(|target| CpuDevice { target, ..this_cpu(cpu::available_threads()) });
    let chosen_for = device.as_ref().map_or(Vec::new(), |device| chosen_for(console, device));
    let device = device.map(|device| device.key());
    let cache = console.cache().ok();
    Report {
        version: env!("CARGO_PKG_VERSION"),
        cpu: Cpu {
            name: cpu_field("model name"),
            threads: thread::available_parallelism().map_or(1, usize::from),
            features: cpu_features(),
            targets: available.map(Target::name).collect(),
            target: target.map(Target::name),
        },
        memory: MemoryReport {
            total_bytes: memory::total_bytes(),
            available_bytes: memory::available_bytes(),
        },
        gpu: gpu(),
        cache: CacheReport {
            free_bytes: cache.as_ref().and_then(|cache| free_space(existing(&cache.root)?)),
            models: cache.as_ref().map_or(Vec::new(), |cache| cache.names()),
            path: cache.map(|cache| cache.root),
        },
        model: console.bundle.as_deref().map(model),
        kernels: Kernels { count: kernels.len(), by_target, by_op, device, chosen_for },
    }
}

fn model(bundle: &Bundle) -> ModelReport {
    ModelReport {
        name: bundle.name().to_owned(),
        targets: bundle.targets().to_vec(),
        files_bytes: bundle.files().map(|(_, len)| len).sum(),
        weights_bytes: bundle.weights_len(),
    }
}

fn model_text(model: &ModelReport) -> String {
    let weights = match model.weights_bytes {
        Some(bytes) => format!("with {} of weights", human_bytes(bytes)),
        None => "without weights".to_owned(),
    };
    format!("{}, {weights}, for {}", model.name, model.targets.join(", "))
}

/// The device classes of this binary's kernels, and how near `device` is to them.
fn chosen_for(console: &Console<'_>, device: &CpuDevice) -> Vec<ChosenFor> {
    let devices = Target::ALL.into_iter().flat_map(|target| console.kernels.devices(target));
    let row = |key: &'static str| ChosenFor {
        device: key,
        matches: match device.matches(key) {
            Some(Match::Exact) => "exact",
            Some(Match::Family) => "family",
            None => "other",
        },
    };
    devices.flatten().map(row).collect()
}

/// `path`, or the nearest folder above it that is there.
fn existing(path: &Path) -> Option<&Path> {
    path.ancestors().find(|path| path.exists())
}

/// A field of the first CPU, as the operating system tells it.
fn cpu_field(name: &str) -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn cpu_features() -> Vec<&'static str> {
    // NOTE: the first is the name on x86, the other on aarch64.
    let flags = cpu_field("flags").or_else(|| cpu_field("Features")).unwrap_or_default();
    let flags: Vec<&str> = flags.split(' ').collect();
    FEATURES.into_iter().filter(|feature| flags.contains(feature)).collect()
}

/// What the driver's files say, and in a binary with CUDA the driver itself.
fn gpu() -> Gpu {
    let version = fs::read_to_string("/proc/driver/nvidia/version").ok();
    let driver = version.as_deref().and_then(|text| text.lines().next()).map(str::to_owned);
    let devices = fs::read_dir("/proc/driver/nvidia/gpus").map_or(0, Iterator::count);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let nvcc = std::env::split_paths(&path).map(|dir| dir.join("nvcc")).find(|file| file.is_file());
    Gpu { driver, devices, cuda: cuda(), nvcc }
}

#[cfg(not(feature = "cuda"))]
fn cuda() -> Option<Cuda> {
    None
}

#[cfg(feature = "cuda")]
fn cuda() -> Option<Cuda> {
    use crate::backend::cuda::driver::{Driver, Probe, driver_release, probe};
    let table = crate::kernels::generated::cuda_table();
    let (driver_version, found) = match probe() {
        Probe::Devices { driver_version, devices } => (Some(driver_version), devices),
        Probe::NoDriver | Probe::Refused(_) => (None, Vec::new()),
    };
    let device = |found: crate::backend::cuda::driver::Found| CudaDevice {
        arch: table.arch_for(found.capability).map(|arch| arch.name()),
        capability: format!("{}.{}", found.capability.0, found.capability.1),
        name: found.name,
        num_sms: found.num_sms,
        memory_bytes: found.memory_bytes,
    };
    Some(Cuda {
        toolkit: table.toolkit,
        driver_needed: driver_release(table.toolkit),
        archs: table.archs().iter().map(|arch| arch.name()).collect(),
        driver_version: driver_version
            .map(|version| format!("{}.{}", version / 1000, version % 1000 / 10)),
        devices: found.into_iter().map(device).collect(),
        problem: Driver::open(&table).err().map(|error| error.to_string()),
    })
}

fn gpu_text(gpu: &Gpu) -> String {
    let driver = gpu.driver.as_deref().unwrap_or("no NVIDIA driver");
    let Some(cuda) = &gpu.cuda else {
        return format!("{} device(s), {driver}; this binary has no CUDA kernels", gpu.devices);
    };
    let mut lines = vec![format!(
        "{driver}; kernels made by CUDA {}, for drivers {} and later",
        cuda.toolkit, cuda.driver_needed
    )];
    lines.push(format!("kernels for {}", cuda.archs.join(", ")));
    if let Some(version) = &cuda.driver_version {
        lines.push(format!("the driver knows CUDA {version}"));
    }
    for device in &cuda.devices {
        lines.push(format!(
            "{}, compute capability {}, {} multiprocessors, {}: {}",
            device.name,
            device.capability,
            device.num_sms,
            human_bytes(device.memory_bytes as u64),
            device.arch.unwrap_or("no kernels for it")
        ));
    }
    lines.extend(cuda.problem.clone());
    lines.join("\n")
}

fn text(report: &Report) -> String {
    let unknown = || "unknown".to_owned();
    let bytes = |bytes: Option<u64>| bytes.map_or_else(unknown, human_bytes);
    let counts = |counts: &BTreeMap<&str, usize>| {
        let parts: Vec<String> = counts.iter().map(|(name, n)| format!("{n} {name}")).collect();
        parts.join(", ")
    };
    let cpu = &report.cpu;
    let name = cpu.name.clone().unwrap_or_else(unknown);
    let gpu = gpu_text(&report.gpu);
    let nvcc = match &report.gpu.nvcc {
        None => "no nvcc on the PATH".to_owned(),
        Some(path) => path.display().to_string(),
    };
    let models = match report.cache.models.as_slice() {
        [] => "none; bespoke pull smollm2-135m fetches one".to_owned(),
        names => names.join(", "),
    };
    let cache = match &report.cache.path {
        Some(path) => format!("{} ({} free)", path.display(), bytes(report.cache.free_bytes)),
        None => "no folder known; set BESPOKE_HOME".to_owned(),
    };
    let model = report.model.as_ref().map_or("none".to_owned(), model_text);
    let target = cpu.target.unwrap_or("none; only the reference backend works");
    let chosen_for: Vec<String> = report
        .kernels
        .chosen_for
        .iter()
        .map(|chosen| format!("{} ({})", chosen.device, chosen.matches))
        .collect();
    let chosen_for = match chosen_for.as_slice() {
        [] => "no device: the defaults serve".to_owned(),
        _ => chosen_for.join("\n"),
    };
    let memory = &report.memory;
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.add_rows([
        ["version", report.version],
        ["CPU", &format!("{name}, {} threads", cpu.threads)],
        ["CPU features", &cpu.features.join(" ")],
        ["targets", &cpu.targets.join(", ")],
        ["kernels used", target],
        ["device class", report.kernels.device.as_deref().unwrap_or("unknown")],
        ["kernels chosen for", &chosen_for],
        [
            "memory",
            &format!("{}, {} available", bytes(memory.total_bytes), bytes(memory.available_bytes)),
        ],
        ["GPU", &gpu],
        ["CUDA compiler", &nvcc],
        ["model cache", &cache],
        ["cached models", &models],
        ["own model", &model],
        ["kernels by target", &counts(&report.kernels.by_target)],
        ["kernels by op", &counts(&report.kernels.by_op)],
    ]);
    format!("{}\n", table.trim_fmt())
}
