//! `bespoke logits`: the model's raw output at every position.

use std::path::{Path, PathBuf};

use anyhow::bail;
use safetensors::Dtype;
use serde::Serialize;

use super::console::Console;
use super::model::{ModelArgs, ModelFiles};
use super::prompt::PromptArgs;
use crate::engine::Engine;
use crate::error::Error;
use crate::safetensors_writer::{SafetensorsWriter, TensorSpec};

/// Write the logits of every position of a prompt to a file
///
/// The safetensors file holds one tensor, `logits`, float32 [length, vocabulary]. An older file of
/// that name is replaced when all is computed.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  \
    bespoke logits --model smollm2-135m --prompt-ids 504,3575,282 -o logits.safetensors")]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    /// File to write
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    model: &'a str,
    backend: &'a str,
    prompt_ids: &'a [u32],
    output: &'a Path,
    shape: [usize; 2],
}

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let files = ModelFiles::open(&args.model.model, console)?;
    let ids = args.prompt.ids(&files)?;
    let (mut engine, _) = files.load(&args.model.run, ids.len(), console)?;
    let shape = [ids.len(), engine.shape().vocab_size];
    write_logits(&mut engine, &ids, &args.output)?;
    if args.json {
        return console.print_json(&Report {
            model: &args.model.model,
            backend: engine.backend_name(),
            prompt_ids: &ids,
            output: &args.output,
            shape,
        });
    }
    console.print(&format!("{}: logits [{}, {}]\n", args.output.display(), shape[0], shape[1]))
}

/// Writes beside `path` and renames at the end.
fn write_logits(engine: &mut Engine, ids: &[u32], path: &Path) -> anyhow::Result<()> {
    let Some(name) = path.file_name().filter(|_| !path.is_dir()) else {
        bail!("{}: is a folder; give the name of a file", path.display());
    };
    let temp = Unfinished(path.with_file_name(format!(
        ".{}.tmp-{}",
        name.to_string_lossy(),
        std::process::id()
    )));
    let shape = vec![ids.len(), engine.shape().vocab_size];
    let spec = TensorSpec { name: "logits".to_owned(), dtype: Dtype::F32, shape };
    let mut writer = SafetensorsWriter::create(&temp.0, vec![spec])?;
    let mut bytes = Vec::new();
    let mut written = Ok(());
    engine.logits(ids, &mut |_, logits| {
        bytes.clear();
        bytes.extend(logits.iter().flat_map(|logit| logit.to_le_bytes()));
        if written.is_ok() {
            written = writer.append("logits", &bytes);
        }
    })?;
    written?;
    writer.finish()?;
    std::fs::rename(&temp.0, path).map_err(|error| Error::io(path, error))?;
    Ok(())
}

/// A file that is removed unless it gets another name.
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Fails after the rename, as it should.
        let _ = std::fs::remove_file(&self.0);
    }
}
