//! Model folder → GGUF file, as llama.cpp reads it.
//!
//! Weights in 16 and 32 bits stay as they are. 4-bit weights `(q − z) · s` become Q4_1, which holds
//! `q · d + m`: d is s, and m is −s · z rounded to float16. Where z is no power of two that product
//! may have more bits than float16; how many groups that concerns, and by how much, is reported.
//! Q5_0 holds `(q − z) · s` exactly, in half a bit more a weight.

mod blocks;
mod metadata;
mod tensors;
mod tokenizer;
mod writer;

use std::path::Path;

use bespoke_kernel_gen::model::ModelConfig;

pub use blocks::Rounding;

use self::tensors::Plan;
use self::writer::GgufWriter;
use crate::error::Error;
use crate::files::{IfExists, StagedFile};
use crate::model::weights::Weights;
use crate::progress::{Progress, Report, Unit};

/// What quantized linears become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinearFormat {
    /// 5 bits a weight; the minimum of a group is rounded.
    Q4_1,
    /// 5.5 bits a weight, exact.
    Q5_0,
}

/// What embedding and language-model head become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadFormat {
    /// What they are in the folder.
    AsStored,
    F16,
    /// 8.5 bits a weight.
    Q8_0,
}

/// How to export.
#[derive(Clone, Copy, Debug)]
pub struct ExportOptions {
    pub linears: LinearFormat,
    pub head: HeadFormat,
    pub if_exists: IfExists,
}

/// What was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    pub num_tensors: usize,
    pub num_bytes: u64,
    /// `None` for a model without quantized linears.
    pub rounding: Option<Rounding>,
    /// What the file cannot say, or its readers do otherwise.
    pub notes: Vec<String>,
}

/// Writes the model in `dir` to `file`, which appears when all is there. One linear is in memory
/// at a time.
pub fn export(
    dir: &Path,
    file: &Path,
    options: &ExportOptions,
    report: Report,
) -> Result<Summary, Error> {
    let config = ModelConfig::from_file(&dir.join("config.json"))?;
    let shape = config.shape("model")?;
    let mut notes = Vec::new();
    let mut metadata = metadata::of_config(dir, &config, &mut notes)?;
    metadata.extend(tokenizer::metadata(dir, &config, &mut notes)?);
    let weights = Weights::open(dir, &config, &shape)?;
    let plan = Plan::new(dir, &config, &shape, options)?;
    metadata.extend(metadata::of_formats(&plan));
    let staged = StagedFile::create(file, options.if_exists)?;
    let mut writer = GgufWriter::create(staged.path(), &metadata, plan.entries())?;
    let mut rounding = Rounding::default();
    let (mut done, total) = (0, plan.num_tensors() as u64);
    for part in &plan.parts {
        tensors::write(part, &config, &weights, &mut writer, &mut rounding)?;
        done += part.tensors.len() as u64;
        report(Progress { stage: "exporting", done, total, unit: Unit::Tensors });
    }
    let num_bytes = writer.finish()?;
    staged.commit()?;
    let rounding = (rounding.num_groups > 0).then_some(rounding);
    Ok(Summary { num_tensors: plan.num_tensors(), num_bytes, rounding, notes })
}
