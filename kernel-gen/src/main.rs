//! `kernel-gen`: a window on each stage of the generator.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line prints")]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bespoke_kernel_gen::spec::ModelShape;
use bespoke_kernel_gen::target::Target;
use bespoke_kernel_gen::{Error, generate, plan, presets, render};

const USAGE: &str = "\
kernel-gen plan   [MODEL…] [--target T]          one line a kernel
kernel-gen render [MODEL…] [--target T]          every kernel's instantiation of its template
kernel-gen build  [MODEL…] [--target T] -o DIR   writes kernels.rs and kernels.json
kernel-gen check  [MODEL…]                       generates twice and compares; nothing is written

MODEL is a model folder, a config.json or a preset; without one, the default models (check: and
every preset). T is portable, x86_64_v3 or avx512; without one, all of them.";

struct Arguments {
    models: Vec<String>,
    targets: Vec<Target>,
    out: Option<PathBuf>,
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
    let arguments = match parse_arguments(rest) {
        Ok(arguments) => arguments,
        Err(message) => return wrong_usage(&message),
    };
    let result = match (command.as_str(), &arguments.out) {
        ("plan", None) => run_plan(&arguments),
        ("render", None) => run_render(&arguments),
        ("build", Some(folder)) => run_build(&arguments, folder),
        ("check", None) => run_check(&arguments),
        ("build", None) => return wrong_usage("build wants -o DIR"),
        ("plan" | "render" | "check", Some(_)) => return wrong_usage("only build takes -o"),
        (other, _) => return wrong_usage(&format!("no command {other}")),
    };
    match result {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn wrong_usage(message: &str) -> ExitCode {
    eprintln!("error: {message}\n\n{USAGE}");
    ExitCode::from(2)
}

fn parse_arguments(words: &[String]) -> Result<Arguments, String> {
    let mut arguments = Arguments { models: Vec::new(), targets: Vec::new(), out: None };
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} wants a value"));
        match word.as_str() {
            "--target" => {
                let name = value()?;
                let target = Target::from_name(name).ok_or_else(|| format!("no target {name}"))?;
                arguments.targets.push(target);
            }
            "-o" => arguments.out = Some(PathBuf::from(value()?)),
            flag if flag.starts_with('-') => return Err(format!("no option {flag}")),
            model => arguments.models.push(model.to_string()),
        }
    }
    if arguments.targets.is_empty() {
        arguments.targets = Target::ALL.to_vec();
    }
    Ok(arguments)
}

fn shapes(models: &[String]) -> Result<Vec<ModelShape>, Error> {
    if models.is_empty() {
        return presets::default_shapes();
    }
    models.iter().map(|model| presets::shape(model, &[PathBuf::new()])).collect()
}

fn run_plan(arguments: &Arguments) -> Result<String, Error> {
    Ok(plan::print(&plan::plan(&shapes(&arguments.models)?, &arguments.targets)?))
}

fn run_render(arguments: &Arguments) -> Result<String, Error> {
    let variants = plan::plan(&shapes(&arguments.models)?, &arguments.targets)?;
    let line = |variant| {
        let source = render::render(variant);
        format!("{} = {}\n", source.symbol, source.instantiation())
    };
    Ok(variants.iter().map(line).collect())
}

fn run_build(arguments: &Arguments, folder: &Path) -> Result<String, Error> {
    let generated = generate(&shapes(&arguments.models)?, &arguments.targets)?;
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
        let first = generate(&shapes, &arguments.targets)?;
        if generate(&shapes, &arguments.targets)? != first {
            let message = "two runs generated different text".to_string();
            return Err(Error::Model { name, message });
        }
        let num_kernels = plan::plan(&shapes, &arguments.targets)?.len();
        report.push_str(&format!("{name}: {num_kernels} kernels\n"));
    }
    Ok(report)
}
