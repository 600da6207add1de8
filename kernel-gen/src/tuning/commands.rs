//! The commands `select`, `explain`, `model` and `check --measured`: their words, and what they
//! print.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::cost_model::{self, HeldOut};
use super::coverage::{self, Place, Run};
use super::device::this_cpu;
use super::explain::{self, Explanation};
use super::lock::{self, Lock};
use super::record::{Records, Warning};
use super::select::{self, Options, Profile, Selection};
use super::trace::{self, Trace};
use crate::cuda::{self, Arch, KvType};
use crate::error::Error;
use crate::plan::Provenance;
use crate::presets;
use crate::spec::{ActivationType, KvDType, ModelShape};
use crate::target::Target;

/// What the words of a command mean.
#[derive(Debug)]
pub struct Arguments {
    /// Models, or specs.
    words: Vec<String>,
    records: PathBuf,
    lock: PathBuf,
    options: Options,
    traces: Vec<PathBuf>,
    rows: Option<usize>,
    allowed: Vec<String>,
    activation: ActivationType,
    kv: KvDType,
    target: Target,
    /// In place of `target`.
    arch: Option<Arch>,
    device: Option<String>,
    is_json: bool,
}

/// Options of each command, all with a value but `--measured` and `--json`.
const OPTIONS: [(&str, &[&str]); 4] = [
    (
        "select",
        &["--records", "-o", "--from-trace", "--max-kernel-bytes", "--profile", "--variants"],
    ),
    ("explain", &["--records", "--rows", "--profile", "--variants"]),
    ("model", &["--records", "--json"]),
    (
        "check",
        &["--measured", "--lock", "--allow", "--target", "--device", "--activations", "--kv"],
    ),
];

/// Whether these words are a command of this file.
pub fn is_command(command: &str, words: &[String]) -> bool {
    match command {
        "check" => words.iter().any(|word| word == "--measured"),
        _ => OPTIONS.iter().any(|(name, _)| *name == command),
    }
}

/// Reads the words of a command.
pub fn parse(command: &str, words: &[String]) -> Result<Arguments, String> {
    let found = OPTIONS.iter().find(|(name, _)| *name == command);
    let (_, options) = found.ok_or_else(|| format!("no command {command}"))?;
    let mut arguments = Arguments {
        words: Vec::new(),
        records: PathBuf::from("tuning/records"),
        lock: PathBuf::from("kernels.lock"),
        options: Options::default(),
        traces: Vec::new(),
        rows: None,
        allowed: Vec::new(),
        activation: ActivationType::Int8,
        kv: KvDType::F16,
        target: Target::best(),
        arch: None,
        device: None,
        is_json: false,
    };
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if !word.starts_with('-') {
            arguments.words.push(word.clone());
        } else if !options.contains(&word.as_str()) {
            return Err(format!("{command} takes no option {word}"));
        } else if word == "--json" {
            arguments.is_json = true;
        } else if word != "--measured" {
            let value = words.next().ok_or_else(|| format!("{word} wants a value"))?;
            arguments.set(word, value)?;
        }
    }
    if command == "explain" && arguments.words.is_empty() {
        return Err("explain wants a spec, such as awq_gemm_n960_k576_g64_int8".to_string());
    }
    Ok(arguments)
}

impl Arguments {
    fn set(&mut self, option: &str, value: &str) -> Result<(), String> {
        let wrong = |what: &str| format!("{option} {value} is no {what}");
        let number = |what: &str| value.parse().map_err(|_| wrong(what));
        match option {
            "--records" => self.records = PathBuf::from(value),
            "-o" | "--lock" => self.lock = PathBuf::from(value),
            "--from-trace" => self.traces.push(PathBuf::from(value)),
            "--max-kernel-bytes" => {
                self.options.kernel_bytes_max = Some(number("number of bytes")?);
            }
            "--variants" => {
                let count = number("number of kernels from 0 to 8")?;
                let count = Some(count).filter(|count| *count <= 8);
                self.options.variants_max =
                    count.ok_or_else(|| wrong("number of kernels from 0 to 8"))?;
            }
            "--profile" => {
                let profile = Profile::from_name(value);
                self.options.profile = profile.ok_or_else(|| wrong("profile: invariant, free"))?;
            }
            "--rows" => self.rows = Some(number("number of rows")?),
            "--allow" => self.allowed.push(value.to_string()),
            "--target" => match Arch::from_name(value) {
                Some(arch) => self.arch = Some(arch),
                None => self.target = Target::from_name(value).ok_or_else(|| wrong("target"))?,
            },
            "--device" => self.device = Some(value.to_string()),
            "--activations" => {
                let activation = ActivationType::from_name(value);
                self.activation =
                    activation.ok_or_else(|| wrong("form of activations: float, int8, bf16"))?;
            }
            _ => {
                let kv = KvDType::ALL.into_iter().find(|kv| kv.name() == value);
                self.kv = kv.ok_or_else(|| wrong("KV cache: f32, f16, int8, int4"))?;
            }
        }
        Ok(())
    }

    fn shapes(&self) -> Result<Vec<ModelShape>, Error> {
        let shape = |model: &String| presets::shape(model, &[PathBuf::new()]);
        self.words.iter().map(shape).collect()
    }
}

/// Runs a command; the text is what it says.
pub fn run(command: &str, arguments: &Arguments) -> Result<String, Error> {
    match command {
        "select" => run_select(arguments),
        "explain" => run_explain(arguments),
        "model" => run_model(arguments),
        _ => run_check(arguments),
    }
}

fn run_select(arguments: &Arguments) -> Result<String, Error> {
    let mut options = arguments.options.clone();
    let shapes = arguments.shapes()?;
    options.uses = coverage::uses(&shapes)?;
    // NOTE: a spec that a CPU and a GPU have under one name is used by both as often.
    options.uses.extend(cuda::coverage::uses(&shapes)?);
    for path in &arguments.traces {
        let trace = Trace::parse(&read(path, trace::TEXT_BYTES_MAX)?)?;
        options.trace.get_or_insert_default().merge(&trace);
    }
    let (selection, warnings) = selection(arguments, &options)?;
    if selection.lock.problems.is_empty() {
        let folder = arguments.records.display();
        let message = format!(
            "nothing in {folder} to choose from{}; measure with `bespoke tune`",
            reasons(&selection)
        );
        return Err(Error::Record { message });
    }
    write(&arguments.lock, &selection.lock.print())?;
    Ok(warnings + &report(&selection, &arguments.lock))
}

/// The selection of the records of a folder, and the warnings of reading them as text.
fn selection(arguments: &Arguments, options: &Options) -> Result<(Selection, String), Error> {
    let (records, warnings) = Records::open(&arguments.records);
    let line = |warning: &Warning| format!("warning: {warning}\n");
    let warnings: String = warnings.iter().map(line).collect();
    let hashes = select::hashes_of(&records.all)?;
    Ok((select::select(&records.all, &hashes, options)?, warnings))
}

fn reasons(selection: &Selection) -> String {
    let reason = |(reason, count): (&String, &usize)| format!("{count} records are {reason}");
    let all: Vec<String> = selection.unused.iter().map(reason).collect();
    if all.is_empty() { String::new() } else { format!(" ({})", all.join("; ")) }
}

fn report(selection: &Selection, path: &Path) -> String {
    let mut text = String::new();
    for decision in &selection.decisions {
        let share = decision.cost * 100.0;
        text.push_str(&format!("{} on {}: {share:.1} %", decision.spec, decision.device));
        if decision.is_predicted {
            text.push_str(", predicted");
        }
        if !decision.rejected.is_empty() {
            text.push_str(&format!(", {} kernels rejected", decision.rejected.len()));
        }
        text.push('\n');
    }
    for (bytes, cost) in &selection.frontier {
        let share = cost * 100.0;
        text.push_str(&format!("{bytes} bytes of kernels: {share:.2} % of the defaults' time\n"));
    }
    for (reason, count) in &selection.unused {
        text.push_str(&format!("{count} records unused: {reason}\n"));
    }
    let (problems, kernels) = (selection.lock.problems.len(), selection.lock.certificates.len());
    text + &format!("{}: {problems} problems, {kernels} kernels\n", path.display())
}

fn run_explain(arguments: &Arguments) -> Result<String, Error> {
    let mut options = arguments.options.clone();
    options.uses = arguments.words.iter().map(|spec| (spec.clone(), 1)).collect();
    let (selection, warnings) = selection(arguments, &options)?;
    if selection.decisions.is_empty() {
        let message = format!(
            "nothing of {} in {}{}",
            arguments.words.join(", "),
            arguments.records.display(),
            reasons(&selection)
        );
        return Err(Error::Record { message });
    }
    let case = arguments.rows.map(|rows| format!("rows {rows}"));
    let texts = selection.decisions.iter().map(|one| explain::print(one, case.as_deref()));
    Ok(warnings + &texts.collect::<String>())
}

/// How good the cost model is on the devices of one family.
#[derive(Serialize)]
struct Family {
    /// Key of one of them.
    device: String,
    classes: Vec<HeldOut>,
}

fn run_model(arguments: &Arguments) -> Result<String, Error> {
    let (records, warnings) = Records::open(&arguments.records);
    let family = |device: String| {
        let classes = cost_model::held_out(&records.all, &device);
        Family { device, classes }
    };
    let families: Vec<Family> =
        cost_model::families(&records.all).into_iter().map(family).collect();
    if arguments.is_json {
        return Ok(format!("{:#}\n", serde_json::json!({ "families": families })));
    }
    let line = |warning: &Warning| format!("warning: {warning}\n");
    let mut text: String = warnings.iter().map(line).collect();
    if families.is_empty() {
        text.push_str(&format!("no times of matmuls in {}\n", arguments.records.display()));
    }
    for Family { device, classes } in &families {
        text.push_str(&format!("devices like {device}\n"));
        classes.iter().for_each(|class| text.push_str(&class.text()));
    }
    Ok(text)
}

fn run_check(arguments: &Arguments) -> Result<String, Error> {
    let lock = Lock::parse(&read(&arguments.lock, lock::TEXT_BYTES_MAX)?)?;
    let shapes = match arguments.words.is_empty() {
        true => presets::default_shapes()?,
        false => arguments.shapes()?,
    };
    let mut check = Check::default();
    let device = match arguments.arch {
        Some(arch) => check_cuda(arguments, arch, &shapes, &lock, &mut check)?,
        None => check_cpu(arguments, &shapes, &lock, &mut check)?,
    };
    let Check { text, missing } = check;
    match missing.is_empty() {
        true => Ok(text),
        false => Err(Error::Lock {
            message: format!(
                "not all rows of these are served by measured kernels on {device}: {}; measure \
                 them with `bespoke tune`, or allow them with --allow\n{text}",
                missing.join(", ")
            ),
        }),
    }
}

/// What a check has found.
#[derive(Default)]
struct Check {
    text: String,
    /// Specs that are neither measured nor allowed.
    missing: Vec<String>,
}

impl Check {
    fn add(&mut self, places: &str, spec: String, explanations: &[Explanation], is_allowed: bool) {
        self.text.push_str(&format!("{places}: {spec}\n"));
        for interval in explanations {
            self.text.push_str(&interval.line());
        }
        let measured = Provenance::Measured.name();
        let is_measured = explanations.iter().all(|interval| interval.provenance == measured);
        if !is_measured && !is_allowed && !self.missing.contains(&spec) {
            self.missing.push(spec);
        }
    }
}

/// Gives the device's key.
fn check_cpu(
    arguments: &Arguments,
    shapes: &[ModelShape],
    lock: &Lock,
    check: &mut Check,
) -> Result<String, Error> {
    let num_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let target = arguments.target;
    let here = super::CpuDevice { target, ..this_cpu(num_threads) }.key();
    let device = arguments.device.clone().unwrap_or(here);
    for shape in shapes {
        let activation = arguments.activation;
        let run = Run { activation, kv: arguments.kv, target, device: device.clone() };
        for covered in coverage::coverage(shape, lock, &run)? {
            let is_allowed = arguments.allowed.iter().any(|word| covered.is_named_by(word));
            let Place { layers, op, spec } = &covered.place;
            let places = format!("{} {layers} {op}", shape.name);
            let spec = crate::name::spec_name(spec);
            check.add(&places, spec, &covered.explanations, is_allowed);
        }
    }
    Ok(device)
}

/// Gives the device's key, which has to be named: there may be no GPU here.
fn check_cuda(
    arguments: &Arguments,
    arch: Arch,
    shapes: &[ModelShape],
    lock: &Lock,
    check: &mut Check,
) -> Result<String, Error> {
    let wrong = |message: &str| Error::Lock { message: message.to_string() };
    let device = arguments.device.clone();
    let device = device.ok_or_else(|| wrong("name the GPU with --device sm_90a-sms-132-mem-80"))?;
    let kv = KvType::of(arguments.kv)
        .ok_or_else(|| wrong("a KV cache of float32 elements exists on the CPU only"))?;
    for shape in shapes {
        let run = cuda::coverage::Run { kv, arch, device: device.clone() };
        for covered in cuda::coverage::coverage(shape, lock, &run)? {
            let (spec, op) = (covered.spec.name(), covered.spec.op());
            let is_allowed = arguments.allowed.iter().any(|word| *word == spec || word == op);
            let places = format!("{} {}", shape.name, covered.places);
            check.add(&places, spec, &covered.explanations, is_allowed);
        }
    }
    Ok(device)
}

fn read(path: &Path, bytes_max: usize) -> Result<String, Error> {
    let io = |source| Error::Io { path: path.display().to_string(), source };
    let len = std::fs::metadata(path).map_err(io)?.len();
    if len > bytes_max as u64 {
        return Err(io(std::io::Error::other(format!("{len} bytes; {bytes_max} are possible"))));
    }
    std::fs::read_to_string(path).map_err(io)
}

/// Whole or not at all: a build may read it at the same time.
fn write(path: &Path, text: &str) -> Result<(), Error> {
    let io = |source| Error::Io { path: path.display().to_string(), source };
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}", std::process::id()));
    let temporary = path.with_file_name(name);
    std::fs::write(&temporary, text).map_err(io)?;
    std::fs::rename(&temporary, path).map_err(io)
}
