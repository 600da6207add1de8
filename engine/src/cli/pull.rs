//! `bespoke pull`: a model into the cache.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::console::Console;
use super::progress::Meter;
use crate::import;

/// Fetch a model into the model cache
///
/// A model that is there already is left alone, so this is safe to repeat; an interrupted download
/// is continued. The cache is $BESPOKE_HOME, or `bespoke` in the platform's cache folder.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  bespoke pull smollm2-135m\n  bespoke pull Qwen/Qwen2.5-0.5B")]
pub(super) struct Args {
    /// Hub repository (organization/name), or the preset smollm2-135m
    name: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    name: &'a str,
    path: &'a Path,
}

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let path = pull(&args.name, console)?;
    match args.json {
        true => console.print_json(&Report { name: &args.name, path: &path }),
        false => console.print(&format!("{}\n", path.display())),
    }
}

/// The folder of the model `name`, fetched if need be.
pub(super) fn pull(name: &str, console: &mut Console<'_>) -> anyhow::Result<PathBuf> {
    let options = console.pull_options()?;
    let mut meter = Meter::new(console);
    Ok(import::pull::pull(name, &options, &mut |progress| meter.show(progress))?)
}
