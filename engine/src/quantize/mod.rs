//! Model folder → model folder with 4-bit linears, as an AWQ "gemm" checkpoint.
//!
//! [`rtn()`] rounds every weight to the nearest step of its group. [`awq()`] looks at what the
//! inputs of the linears are on a text, [`Calibration`](calibration::Calibration), quantizes layer
//! by layer, [`LayerPass`](layer_pass::LayerPass), and says how well that went,
//! [`QuantizationReport`](report::QuantizationReport).

mod activations;
mod awq;
pub mod awq_format;
mod budget;
pub mod calibration;
pub mod checkpoint;
mod gram;
mod grid;
mod group;
mod layer_builder;
mod layer_file;
pub mod layer_pass;
mod layer_runner;
mod linalg;
mod output;
pub mod quantized_layer;
pub mod report;
mod rounding;
pub mod rtn;
mod scales;
mod source;
mod streams;
mod work_dir;

use std::borrow::Cow;
use std::path::Path;
use std::thread;

use bespoke_kernel_gen::spec::GroupSize;

pub use self::awq::{AwqJob, PerplexityOf, awq};
use self::awq_format::PackedLinear;
use self::checkpoint::Checkpoint;
pub use self::output::SHARD_BYTES_MAX;
use self::output::{OutputPlan, QuantizedValues, copy_file};
use self::quantized_layer::Factors;
use self::source::{Linear, SourceModel, named_modules};
use crate::error::Error;
use crate::files::{IfExists, StagedDir};
use crate::progress::Report;

/// How to round.
#[derive(Clone, Debug)]
pub struct RtnOptions {
    pub group_size: GroupSize,
    /// Parts of the names of modules that stay as they are.
    pub skip: Vec<String>,
    pub shard_bytes_max: u64,
    pub if_exists: IfExists,
}

impl RtnOptions {
    /// All linears, into a folder that must not be there yet.
    pub fn new(group_size: GroupSize) -> RtnOptions {
        RtnOptions {
            group_size,
            skip: Vec::new(),
            shard_bytes_max: SHARD_BYTES_MAX,
            if_exists: IfExists::Refuse,
        }
    }
}

/// Quantizes the model in `model_dir` by rounding to nearest, into the new folder `out_dir`. One
/// tensor is in memory at a time.
pub fn rtn(
    model_dir: &Path,
    out_dir: &Path,
    options: &RtnOptions,
    report: Report,
) -> Result<(), Error> {
    let mut model = SourceModel::open(model_dir)?;
    let linears = model.linears(options.group_size)?;
    let skipped = named_modules(&linears, &options.skip)?;
    let config = model.quantized_config(options.group_size, &skipped)?;
    let plan = OutputPlan::new(&model.checkpoint, &linears, &skipped, options.shard_bytes_max);
    let staged = StagedDir::create(out_dir, options.if_exists)?;
    let dir = staged.path();
    plan.write(&mut model.checkpoint, &mut Rounded, dir, "quantizing", report)?;
    copy_file(&model_dir.join("README.md"), &dir.join("README.md"))?;
    output::finish(&model, &config, dir)?;
    staged.commit()
}

/// Weights that are rounded when they are asked for.
struct Rounded;

impl QuantizedValues for Rounded {
    fn enter(&mut self, _layer_idx: Option<usize>) -> Result<(), Error> {
        Ok(())
    }

    fn packed(
        &mut self,
        checkpoint: &mut Checkpoint,
        module: &str,
        linear: Linear,
    ) -> Result<Cow<'_, PackedLinear>, Error> {
        let name = format!("{module}.weight");
        let Some(tensor) = checkpoint.tensors.get(&name).cloned() else {
            return Err(Error::model(checkpoint.dir(), format!("tensor '{name}' is missing")));
        };
        // At most the size of the file, which was compared with it.
        let mut bytes = vec![0; tensor.num_bytes as usize];
        checkpoint.read_at(&tensor, 0, &mut bytes)?;
        let Linear { n, k, group, .. } = linear;
        let row_bytes = bytes.len() / n;
        let read_row = |row: usize, out: &mut [f32]| {
            output::to_f32(tensor.dtype, &bytes[row * row_bytes..][..row_bytes], out);
        };
        let num_threads = thread::available_parallelism().map_or(1, |n| n.get());
        let packed = rtn::quantize_linear((n, k, group), num_threads, &read_row);
        packed.map(Cow::Owned).map_err(|bad| {
            Error::model(
                checkpoint.path_of(&tensor),
                format!(
                    "tensor '{name}': the weight {} of output {} near input {} cannot be quantized",
                    bad.value, bad.output, bad.input
                ),
            )
        })
    }

    fn floats(&self, _tensor: &str) -> Option<&[f32]> {
        None
    }

    fn factors(&self, _module: &str) -> Option<&Factors> {
        None
    }
}
