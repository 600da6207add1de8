//! Kernels for NVIDIA GPUs: which a model needs, how each is made from `templates/<op>/<op>.cuh`,
//! how it is compiled and embedded, and how it is launched.
//!
//! The stages are those of the CPU side: [`ModelShape::cuda_specs`](crate::spec::ModelShape) →
//! [`plan::plan`] → [`render::render`] → compile → emit. Each op has a file here that says what is
//! its own ([`op::Op`]); the engine asks the same [`Variant`] for grids and workspaces at run time.
//!
//! ```
//! use bespoke_kernel_gen::cuda::{Arch, Variant, plan};
//! use bespoke_kernel_gen::presets;
//!
//! let shape = presets::shape("smollm2-135m", &[])?;
//! let variants = plan::plan(&[shape], &[Arch::Sm90a])?;
//! let embed = Variant::parse("embed_h576_bf16__sm_90a").unwrap();
//! assert!(variants.contains(&embed));
//! assert_eq!(embed.instance().params, "EmbedParams");
//! # Ok::<(), bespoke_kernel_gen::Error>(())
//! ```

pub mod arch;
pub mod attention_plan;
pub mod awq_gemm;
pub mod cache;
pub mod commands;
pub mod compile;
pub mod coverage;
pub mod embed;
pub mod emit;
pub mod gemm;
pub mod jobs;
mod locked;
pub mod matmul;
pub mod op;
pub mod paged_attention;
pub mod pages;
pub mod plan;
pub mod process;
pub mod ptxas;
pub mod render;
pub mod rms_norm;
pub mod rope;
pub mod sample;
pub mod sass;
pub mod serving;
pub mod silu_and_mul;
pub mod spec;
pub mod table;
pub mod templates;
pub mod toolkit;
mod variant;

pub use arch::Arch;
pub use awq_gemm::AwqGemm;
pub use embed::Embed;
pub use gemm::Gemm;
pub use locked::{compiler_name, version_of};
pub use op::{Constant, Instance, Launch, Op, Workspace};
pub use paged_attention::PagedAttention;
pub use rms_norm::RmsNorm;
pub use rope::Rope;
pub use sample::Sample;
pub use serving::{Interval, Serving};
pub use silu_and_mul::SiluAndMul;
pub use spec::{KvType, OutType, Regime, RowType};
pub use table::{CudaKernelTable, KernelSet, LoadedKernel};
pub use variant::{Choice, Kernel, Spec, Variant};

use crate::error::Error;
use crate::spec::ModelShape;

/// All stages in order: the kernels of `shapes` on `archs`, compiled. Candidates of a tuner that
/// the compiler refuses are left out, with a warning.
pub fn generate(
    shapes: &[ModelShape],
    archs: &[Arch],
    options: &plan::Options<'_>,
    compiler: &compile::Compiler,
) -> Result<Output, Error> {
    let toolkit = compiler.toolkit.version.as_str();
    let options = plan::Options { toolkit: Some(toolkit), ..*options };
    let plan::Plan { variants, candidates, servings, mut warnings } =
        plan::plan_with(shapes, archs, &options)?;
    let sources = |variants: &[Variant]| -> Result<Vec<render::Source>, Error> {
        variants.iter().map(render::render).collect()
    };
    let mut artifacts = compiler.compile(sources(&variants)?)?;
    let (kept, refused) = compiler.compile_candidates(sources(&candidates)?)?;
    if let Some(first) = refused.first() {
        let (num, all) = (refused.len(), candidates.len());
        warnings
            .push(format!("{num} of {all} CUDA candidates cannot be compiled; the first: {first}"));
    }
    artifacts.extend(kept);
    let is_tuner = !options.tuner.is_empty();
    let contents = emit::Contents { artifacts: &artifacts, servings: &servings, toolkit, is_tuner };
    Ok(Output { generated: emit::emit(&contents), warnings })
}

/// What a build includes, and what people should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    pub generated: emit::Generated,
    pub warnings: Vec<String>,
}
