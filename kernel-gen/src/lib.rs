//! Build-time generator of inference kernels: `spec → plan → render → compile → emit`.
//!
//! - [`model::ModelConfig`] is a model's `config.json`; its [`shape`](model::ModelConfig::shape) is
//!   a [`spec::ModelShape`].
//! - [`spec::KernelSpec`] is an op at fixed sizes; a shape knows the specs it needs.
//! - [`plan::KernelVariant`] is a spec for a row count and a [`target::Target`], with its
//!   [`config::KernelConfig`]: one symbol.
//! - [`emit::Generated`] is the text a build includes.
//!
//! ```
//! use bespoke_kernel_gen::{plan, presets, spec::{KernelSpec, RowFormat}, target::Target};
//!
//! let shape = presets::shape("smollm2-135m-awq", &[])?;
//! let plan = plan::plan(&[shape], &[Target::Avx512], &plan::PlanOptions::default())?;
//! let quantize = KernelSpec::Quantize { k: 576, out: RowFormat::I8 { group: 64 } };
//! assert!(plan.variants.iter().any(|variant| variant.spec == quantize));
//! assert_eq!(plan.variants[0].symbol(), "embed_h576_f16__avx512");
//! # Ok::<(), bespoke_kernel_gen::Error>(())
//! ```

pub mod binding_rs;
pub mod cargo;
pub mod compile;
pub mod config;
pub mod cuda;
pub mod emit;
pub mod error;
pub mod model;
pub mod models_rs;
pub mod name;
#[cfg(feature = "bindgen")]
pub mod params;
pub mod plan;
pub mod presets;
pub mod render;
pub mod spec;
pub mod target;
pub mod templates;
pub mod tuning;

pub use error::Error;

/// All five stages in order: the kernels of `shapes` on `targets`, as text. All shapes have pages
/// of one size.
pub fn generate(
    shapes: &[spec::ModelShape],
    targets: &[target::Target],
    options: &plan::PlanOptions<'_>,
) -> Result<emit::Generated, Error> {
    let page_size = shapes.first().map_or(spec::PAGE_SIZE, |shape| shape.page_size);
    assert!(shapes.iter().all(|shape| shape.page_size == page_size), "one page size a build");
    let plan = plan::plan(shapes, targets, options)?;
    let sources = plan.variants.iter().map(render::render).collect();
    let artifacts = compile::compile(sources)?;
    let is_tuner = options.tuner.is_some();
    Ok(emit::emit(&emit::Contents { artifacts: &artifacts, plan: &plan, page_size, is_tuner }))
}
