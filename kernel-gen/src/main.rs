//! `kernel-gen`: a window on each stage of the generator, and the CUDA compiler's installation.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line prints")]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bespoke_kernel_gen::cuda::compile::{self, Compiler};
use bespoke_kernel_gen::cuda::jobs::Jobs;
use bespoke_kernel_gen::cuda::toolkit::{Environment, Toolkit};
use bespoke_kernel_gen::cuda::{self, Arch, Variant, commands};
use bespoke_kernel_gen::plan::{Plan, PlanOptions};
use bespoke_kernel_gen::spec::ModelShape;
use bespoke_kernel_gen::target::Target;
use bespoke_kernel_gen::tuning::commands as tuning;
use bespoke_kernel_gen::{Error, cargo, generate, plan, presets, render};

const USAGE: &str = "\
kernel-gen plan   [MODEL…] [--target T]          one line a kernel
kernel-gen render [MODEL…] [--target T]          every kernel's instantiation of its template
kernel-gen source SYMBOL                         the source of a CUDA kernel
kernel-gen build  [MODEL…] [--target T] -o DIR   writes kernels.rs and kernels.json, for CUDA
                  [--jobs N]                     targets machine code (*.cubin) and kernels.json
kernel-gen check  [MODEL…] [--target T]          generates twice and compares; nothing is written
kernel-gen check  --measured [MODEL…]            what serves each layer by kernels.lock; fails where
                  [--lock FILE] [--target T]     it was not measured on the device (this one, or
                  [--device KEY]                 that of KEY), but for the specs or ops that are
                  [--allow SPEC]                 allowed
                  [--activations float|int8|bf16] [--kv f32|f16|int8|int4]
kernel-gen select [MODEL…] [-o kernels.lock]     chooses kernels from the records of `bespoke tune`,
                  [--records DIR]                those in tuning/records, for the specs of the
                  [--from-trace FILE]            models, else for all; weighs row counts by traces
                  [--max-kernel-bytes N]         of engines; limits the bytes of all kernels beside
                  [--variants N]                 the defaults, and the kernels of each spec (4)
                  [--profile invariant|free]
kernel-gen explain SPEC [--rows N]               all measured times, what was chosen, and why
                  [--records DIR]
kernel-gen model [--records DIR] [--json]        how well the cost model predicts problems that
                                                 it has not seen: regret and rank correlation
kernel-gen toolkit [--python PYTHON]             installs the CUDA compiler with pip
kernel-gen sass   [MODEL…] [--target T]          instructions of CUDA kernels and of their loops
kernel-gen sass   --check FILE | --write FILE    those of some kernels, compared or written
kernel-gen params --check FILE | --write FILE    launch parameters for the engine, compared or
                                                 written (with the feature bindgen)

MODEL is a model folder, a config.json or a preset; without one, the default models (check: and
every preset); for CUDA also the symbols of single kernels. T is portable, x86_64_v3, avx512 or
neon, without one all of these; or a CUDA target: sm_80, sm_86, sm_89, sm_90a, sm_100a, sm_120, or
cuda for all of those.

CUDA: the compiler is that of CUDA_HOME, else nvcc in PATH, else the one that toolkit installs.
Compiled kernels are kept in BESPOKE_KERNEL_CACHE, else in the user's cache folder.";

#[derive(Default)]
struct Arguments {
    models: Vec<String>,
    targets: Vec<Target>,
    archs: Vec<Arch>,
    out: Option<PathBuf>,
    jobs: Option<usize>,
    python: Option<String>,
    check: Option<PathBuf>,
    write: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((command, rest)) = arguments.split_first() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    if matches!(command.as_str(), "help" | "-h" | "--help") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    let result = match tuning::is_command(command, rest) {
        true => tuning::parse(command, rest).map(|arguments| tuning::run(command, &arguments)),
        false => parse_arguments(command, rest).map(|arguments| run(command, &arguments)),
    };
    match result {
        Ok(result) => match result {
            Ok(text) => {
                print!("{text}");
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("error: {error}");
                ExitCode::FAILURE
            }
        },
        Err(message) => {
            eprintln!("error: {message}\n\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn run(command: &str, arguments: &Arguments) -> Result<String, Error> {
    let is_cuda = !arguments.archs.is_empty();
    match command {
        "plan" => run_plan(arguments),
        "render" => run_render(arguments),
        "source" => commands::source(&arguments.models),
        "build" if is_cuda => run_build_cuda(arguments),
        "build" => run_build(arguments),
        "toolkit" => run_toolkit(arguments),
        "sass" => run_sass(arguments),
        "params" => run_params(arguments),
        _ => run_check(arguments),
    }
}

/// The options that each command takes.
const OPTIONS: [(&str, &[&str]); 8] = [
    ("plan", &["--target"]),
    ("render", &["--target"]),
    ("source", &[]),
    ("build", &["--target", "-o", "--jobs"]),
    ("check", &["--target"]),
    ("toolkit", &["--python"]),
    ("sass", &["--target", "--jobs", "--check", "--write"]),
    ("params", &["--check", "--write"]),
];

fn parse_arguments(command: &str, words: &[String]) -> Result<Arguments, String> {
    let Some((_, options)) = OPTIONS.iter().find(|(name, _)| *name == command) else {
        return Err(format!("no command {command}"));
    };
    let mut arguments = Arguments::default();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if !word.starts_with('-') {
            arguments.models.push(word.clone());
            continue;
        }
        if !options.contains(&word.as_str()) {
            return Err(format!("{command} takes no option {word}"));
        }
        let value = words.next().ok_or_else(|| format!("{word} wants a value"))?;
        match word.as_str() {
            "--target" => add_target(&mut arguments, value)?,
            "-o" => arguments.out = Some(PathBuf::from(value)),
            "--python" => arguments.python = Some(value.clone()),
            "--check" => arguments.check = Some(PathBuf::from(value)),
            "--write" => arguments.write = Some(PathBuf::from(value)),
            _ => {
                let jobs = value.parse().ok().filter(|jobs| *jobs > 0);
                let jobs = jobs.ok_or_else(|| format!("--jobs {value} is no number of jobs"))?;
                arguments.jobs = Some(jobs);
            }
        }
    }
    check_arguments(command, &mut arguments)?;
    Ok(arguments)
}

fn add_target(arguments: &mut Arguments, name: &str) -> Result<(), String> {
    if name == "cuda" {
        arguments.archs.extend(Arch::ALL);
    } else if let Some(arch) = Arch::from_name(name) {
        arguments.archs.push(arch);
    } else {
        let target = Target::from_name(name).ok_or_else(|| format!("no target {name}"))?;
        arguments.targets.push(target);
    }
    Ok(())
}

fn check_arguments(command: &str, arguments: &mut Arguments) -> Result<(), String> {
    if command == "build" && arguments.out.is_none() {
        return Err("build wants -o DIR".to_string());
    }
    if command == "build" && !arguments.targets.is_empty() && !arguments.archs.is_empty() {
        return Err("build wants targets of one kind: CPU or CUDA".to_string());
    }
    if command == "source" && arguments.models.is_empty() {
        return Err("source wants the symbol of a CUDA kernel".to_string());
    }
    if command == "params" && arguments.check.is_some() == arguments.write.is_some() {
        return Err("params wants --check FILE or --write FILE".to_string());
    }
    if command == "sass" {
        let has_file = arguments.check.is_some() || arguments.write.is_some();
        if has_file && !(arguments.models.is_empty() && arguments.archs.is_empty()) {
            return Err("sass --check and --write take neither models nor targets".to_string());
        }
    }
    let has_symbols = arguments.models.iter().any(|word| Variant::parse(word).is_some());
    if arguments.archs.is_empty() && (command == "sass" || has_symbols) {
        arguments.archs = Arch::ALL.to_vec();
    }
    if arguments.targets.is_empty() && arguments.archs.is_empty() {
        arguments.targets = Target::ALL.to_vec();
    }
    Ok(())
}

fn shapes(models: &[String]) -> Result<Vec<ModelShape>, Error> {
    if models.is_empty() {
        return presets::default_shapes();
    }
    models.iter().map(|model| presets::shape(model, &[PathBuf::new()])).collect()
}

fn cpu_plan(shapes: &[ModelShape], arguments: &Arguments) -> Result<Plan, Error> {
    plan::plan(shapes, &arguments.targets, &PlanOptions::default())
}

fn run_plan(arguments: &Arguments) -> Result<String, Error> {
    let shapes = shapes(&arguments.models)?;
    let cpu = plan::print(&cpu_plan(&shapes, arguments)?.variants);
    Ok(cpu + &cuda::plan::print(&cuda::plan::plan(&shapes, &arguments.archs)?))
}

fn run_render(arguments: &Arguments) -> Result<String, Error> {
    let shapes = shapes(&arguments.models)?;
    let line = |variant| {
        let source = render::render(variant);
        format!("{} = {}\n", source.symbol, source.instantiation())
    };
    let cpu: String = cpu_plan(&shapes, arguments)?.variants.iter().map(line).collect();
    Ok(cpu + &commands::render(&cuda::plan::plan(&shapes, &arguments.archs)?)?)
}

fn run_build(arguments: &Arguments) -> Result<String, Error> {
    let folder = arguments.out.as_deref().unwrap_or(Path::new("."));
    let shapes = shapes(&arguments.models)?;
    let generated = generate(&shapes, &arguments.targets, &PlanOptions::default())?;
    let mut report = String::new();
    for (name, text) in
        [("kernels.rs", &generated.kernels_rs), ("kernels.json", &generated.kernels_json)]
    {
        let path = folder.join(name);
        let io = |source| Error::Io { path: path.display().to_string(), source };
        std::fs::write(&path, text).map_err(io)?;
        report.push_str(&format!("{}\n", path.display()));
    }
    Ok(report)
}

fn run_build_cuda(arguments: &Arguments) -> Result<String, Error> {
    let folder = arguments.out.as_deref().unwrap_or(Path::new("."));
    commands::build(&variants(arguments)?, &compiler(arguments)?, folder)
}

/// The CUDA kernels that the arguments mean: those of symbols, else those of models.
fn variants(arguments: &Arguments) -> Result<Vec<Variant>, Error> {
    let symbols: Option<Vec<Variant>> =
        arguments.models.iter().map(|word| Variant::parse(word)).collect();
    match symbols {
        Some(variants) if !variants.is_empty() => Ok(variants),
        _ => cuda::plan::plan(&shapes(&arguments.models)?, &arguments.archs),
    }
}

fn run_toolkit(arguments: &Arguments) -> Result<String, Error> {
    let python = arguments.python.as_deref().unwrap_or("python3");
    let toolkit = Toolkit::install(&cargo::cuda_environment()?, python)?;
    Ok(format!("{} {}\n", toolkit.nvcc.display(), toolkit.version))
}

fn run_sass(arguments: &Arguments) -> Result<String, Error> {
    let compiler = compiler(arguments)?;
    if let Some(path) = &arguments.check {
        return commands::check_sass(&compiler, path);
    }
    if let Some(path) = &arguments.write {
        return commands::write_sass(&compiler, path);
    }
    commands::print_sass(&variants(arguments)?, &compiler)
}

#[cfg(feature = "bindgen")]
fn run_params(arguments: &Arguments) -> Result<String, Error> {
    use bespoke_kernel_gen::params;
    match (&arguments.check, &arguments.write) {
        (Some(path), _) => params::check(path),
        (None, Some(path)) => params::write(path),
        (None, None) => params::generate(),
    }
}

#[cfg(not(feature = "bindgen"))]
fn run_params(_arguments: &Arguments) -> Result<String, Error> {
    let message = "this kernel-gen was built without the feature bindgen: cargo run -p \
                   bespoke-kernel-gen --features bindgen -- params …";
    Err(Error::Toolkit { message: message.to_string() })
}

fn compiler(arguments: &Arguments) -> Result<Compiler, Error> {
    let environment: Environment = cargo::cuda_environment()?;
    let toolkit = Toolkit::find(&environment)?;
    let jobs = arguments.jobs.map_or_else(cargo::jobs, Jobs::Threads);
    Ok(Compiler { toolkit, cache: environment.cache, jobs, limit: compile::LIMIT })
}

fn run_check(arguments: &Arguments) -> Result<String, Error> {
    let mut sets: Vec<(String, Vec<ModelShape>)> = Vec::new();
    if arguments.models.is_empty() {
        sets.push(("default".to_string(), presets::default_shapes()?));
    }
    let presets = presets::PRESETS.iter().map(|(name, _)| name.to_string());
    let models: Vec<String> = match arguments.models.is_empty() {
        true => presets.collect(),
        false => arguments.models.clone(),
    };
    for model in models {
        let shape = shapes(std::slice::from_ref(&model))?;
        sets.push((model, shape));
    }
    let mut report = String::new();
    for (name, shapes) in sets {
        let generated = || generate(&shapes, &arguments.targets, &PlanOptions::default());
        let cuda = || commands::render(&cuda::plan::plan(&shapes, &arguments.archs)?);
        if generated()? != generated()? || cuda()? != cuda()? {
            let message = "two runs generated different text".to_string();
            return Err(Error::Model { name, message });
        }
        let num_kernels = cpu_plan(&shapes, arguments)?.variants.len()
            + cuda::plan::plan(&shapes, &arguments.archs)?.len();
        report.push_str(&format!("{name}: {num_kernels} kernels\n"));
    }
    Ok(report)
}
