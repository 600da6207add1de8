//! The command line: arguments in, text or one JSON value out.

mod bench;
#[cfg(feature = "make")]
mod build;
#[cfg(feature = "chat")]
mod chat;
mod console;
#[cfg(feature = "make")]
mod dequantize;
mod doctor;
mod elf;
mod eval;
#[cfg(feature = "make")]
mod explain;
#[cfg(feature = "make")]
mod export;
mod generate;
mod grammar;
#[cfg(feature = "make")]
mod import;
#[cfg(any(feature = "chat", feature = "make"))]
mod interrupt;
mod kernels;
mod logits;
mod model;
mod pack_weights;
mod perplexity;
#[cfg(feature = "server")]
mod probation;
mod progress;
mod prompt;
#[cfg(feature = "make")]
mod pull;
#[cfg(feature = "make")]
mod quantize;
#[cfg(feature = "make")]
mod quickstart;
mod sampling;
#[cfg(feature = "server")]
mod serve;
mod startup;
#[cfg(feature = "make")]
mod tune;
mod verify;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

pub use console::Console;

use crate::kernels::choice::Pin;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Done,
    Failed,
    /// The arguments make no sense; nothing was done.
    WrongUsage,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// LLM inference with kernels made to measure at build time.
#[derive(Parser)]
#[command(name = "bespoke", version, arg_required_else_help = true, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  bespoke quickstart
  bespoke generate --model smollm2-135m --prompt 'The capital of France is'
  bespoke chat --model smollm2-135m
  bespoke quantize smollm2-135m -o smollm2-int4 --group-size 64

MODEL is a model folder, the name of a cached model, or a preset (smollm2-135m).
Exit codes: 0 done, 1 failed, 2 wrong usage.";

/// What a program that brings a model says instead.
const OWN: &str = "\
Examples:
  generate --prompt 'The capital of France is'
  chat
  serve

Exit codes: 0 done, 1 failed, 2 wrong usage.";

#[derive(Subcommand)]
enum Command {
    #[cfg(feature = "make")]
    Quickstart(quickstart::Args),
    #[cfg(feature = "make")]
    Pull(pull::Args),
    #[cfg(feature = "make")]
    Import(import::Args),
    #[cfg(feature = "make")]
    Export(export::Args),
    #[cfg(feature = "make")]
    Quantize(quantize::Args),
    #[cfg(feature = "make")]
    Build(build::Args),
    Generate(generate::Args),
    #[cfg(feature = "chat")]
    Chat(chat::Args),
    Logits(logits::Args),
    Perplexity(perplexity::Args),
    Eval(eval::Args),
    Bench(bench::Args),
    #[cfg(feature = "server")]
    Serve(serve::Args),
    Kernels(kernels::Args),
    #[cfg(feature = "make")]
    Explain(explain::Args),
    Verify(verify::Args),
    #[cfg(feature = "make")]
    Tune(tune::Args),
    Doctor(doctor::Args),
    #[command(hide = true)]
    #[cfg(feature = "make")]
    Dequantize(dequantize::Args),
    #[command(hide = true)]
    PackWeights(pack_weights::Args),
    #[cfg(feature = "server")]
    #[command(hide = true)]
    ProbeTemplate(probation::Args),
}

/// Runs the command line `args`, whose first is the program's name.
pub fn run<I, T>(args: I, console: &mut Console<'_>) -> Exit
where
    I: IntoIterator<Item = T>,
    T: Into<OsString> + Clone,
{
    let cli = match parse(args, console) {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => {
            console.report(&error.render().to_string());
            return Exit::WrongUsage;
        }
        Err(help) => return console.end(|console| console.print(&help.render().to_string())),
    };
    console.end(|console| {
        pin_kernels(console)?;
        run_command(cli.command, console)
    })
}

/// Puts the kernels that `BESPOKE_KERNEL_PIN` names (`SPEC=SYMBOL`, separated by commas) in place
/// of those that would serve, to compare them.
fn pin_kernels(console: &mut Console<'_>) -> anyhow::Result<()> {
    let pins = Pin::parse_list(&std::env::var("BESPOKE_KERNEL_PIN").unwrap_or_default())?;
    console.kernels = console.kernels.pinned(&pins)?;
    Ok(())
}

fn run_command(command: Command, console: &mut Console<'_>) -> anyhow::Result<()> {
    match command {
        #[cfg(feature = "make")]
        Command::Quickstart(args) => quickstart::run(&args, console),
        #[cfg(feature = "make")]
        Command::Pull(args) => pull::run(&args, console),
        #[cfg(feature = "make")]
        Command::Import(args) => import::run(&args, console),
        #[cfg(feature = "make")]
        Command::Export(args) => export::run(&args, console),
        #[cfg(feature = "make")]
        Command::Quantize(args) => quantize::run(&args, console),
        #[cfg(feature = "make")]
        Command::Build(args) => build::run(&args, console),
        Command::Generate(args) => generate::run(&args, console),
        #[cfg(feature = "chat")]
        Command::Chat(args) => chat::run(&args, console),
        Command::Logits(args) => logits::run(&args, console),
        Command::Perplexity(args) => perplexity::run(&args, console),
        Command::Eval(args) => eval::run(&args, console),
        Command::Bench(args) => bench::run(&args, console),
        #[cfg(feature = "server")]
        Command::Serve(args) => serve::run(&args, console),
        Command::Kernels(args) => kernels::run(&args, console),
        #[cfg(feature = "make")]
        Command::Explain(args) => explain::run(&args, console),
        Command::Verify(args) => verify::run(&args, console),
        #[cfg(feature = "make")]
        Command::Tune(args) => tune::run(&args, console),
        Command::Doctor(args) => doctor::run(&args, console),
        #[cfg(feature = "make")]
        Command::Dequantize(args) => dequantize::run(&args, console),
        Command::PackWeights(args) => pack_weights::run(&args, console),
        #[cfg(feature = "server")]
        Command::ProbeTemplate(args) => probation::run(&args, console),
    }
}

/// Commands with a model, which a program that brings one need not be told.
const WITH_MODEL: [&str; 7] =
    ["generate", "chat", "logits", "perplexity", "eval", "bench", "serve"];

fn parse<I, T>(args: I, console: &Console<'_>) -> Result<Cli, clap::Error>
where
    I: IntoIterator<Item = T>,
    T: Into<OsString> + Clone,
{
    let mut command = Cli::command();
    if let Some(bundle) = &console.bundle {
        // Arguments are parsed once in the life of a program.
        let name: &'static str = bundle.name().to_owned().leak();
        let with_default = |arg: clap::Arg| arg.required(false).default_value(name);
        command = command.after_help(format!("This program brings the model {name}.\n\n{OWN}"));
        for name in WITH_MODEL {
            if command.find_subcommand(name).is_some() {
                command =
                    command.mut_subcommand(name, |command| command.mut_arg("model", with_default));
            }
        }
    }
    Cli::from_arg_matches(&command.try_get_matches_from(args)?)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn arguments_are_consistent() {
        super::Cli::command().debug_assert();
    }
}
