//! `bespoke dequantize`: the values of quantized weights, for other programs to compare with.

use std::path::{Path, PathBuf};

use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::spec::{LinearRole, ModelShape};
use safetensors::Dtype;

use super::console::Console;
use super::model::ModelFiles;
use crate::files::{IfExists, StagedFile};
use crate::model::linear::{AwqView, LinearPart};
use crate::model::weights::{LinearTensors, ModelWeights, Weights};
use crate::safetensors_writer::{SafetensorsWriter, TensorSpec};
use crate::source::ModelFolder;

/// Write the quantized weights of a model as float32, exactly as they are computed with
#[derive(clap::Args)]
pub(super) struct Args {
    /// Model folder, name of a cached model, or preset
    model: String,
    /// Safetensors file to write; an older one is replaced
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
}

const ROLES: [LinearRole; 4] =
    [LinearRole::Qkv, LinearRole::O, LinearRole::GateUp, LinearRole::Down];

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let dir = console.resolve(&args.model)?;
    let config = ModelFiles::read_config(&ModelFolder::Disk(dir.clone()))?;
    let shape = config.shape("model")?;
    let staged = StagedFile::create(&args.output, IfExists::Replace)?;
    write(&dir, &config, &shape, staged.path())?;
    Ok(staged.commit()?)
}

/// Reads every linear twice: for the sizes, and for the values.
fn write(dir: &Path, config: &ModelConfig, shape: &ModelShape, path: &Path) -> anyhow::Result<()> {
    let weights = Weights::open(dir, config, shape)?;
    let all = (0..shape.num_layers).flat_map(|layer| ROLES.map(|role| (role, layer)));
    let name = |role: LinearRole, layer: usize, part_idx: usize| {
        let module = config.architecture.modules(role)[part_idx];
        format!("model.layers.{layer}.{module}.weight")
    };
    let mut specs = Vec::new();
    for (role, layer) in all.clone() {
        for (part_idx, n, k) in sizes(&weights.linear(role, layer)?) {
            let name = name(role, layer, part_idx);
            specs.push(TensorSpec { name, dtype: Dtype::F32, shape: vec![n, k] });
        }
    }
    let mut writer = SafetensorsWriter::create(path, specs)?;
    for (role, layer) in all {
        let tensors = weights.linear(role, layer)?;
        for (part_idx, part) in tensors.source().parts.iter().enumerate() {
            let LinearPart::Awq(view) = part else { continue };
            append(view, &name(role, layer, part_idx), &mut writer)?;
        }
    }
    Ok(writer.finish()?)
}

/// Index, outputs and inputs of the quantized parts.
fn sizes(tensors: &LinearTensors) -> Vec<(usize, usize, usize)> {
    let parts = tensors.source().parts.into_iter().enumerate();
    let quantized = parts.filter(|(_, part)| matches!(part, LinearPart::Awq(_)));
    quantized.map(|(idx, part)| (idx, part.n(), part.k())).collect()
}

fn append(view: &AwqView<'_>, name: &str, writer: &mut SafetensorsWriter) -> anyhow::Result<()> {
    let mut row = vec![0.0; view.k];
    let mut bytes = Vec::new();
    for n in 0..view.n {
        view.row(n, &mut row);
        bytes.clear();
        bytes.extend(row.iter().flat_map(|value| value.to_le_bytes()));
        writer.append(name, &bytes)?;
    }
    Ok(())
}
