//! LLM inference with kernels made to measure, at build time, for one model.

// NOTE: generated code names this crate `bespoke`, inside it as outside.
extern crate self as bespoke;

pub mod answer;
pub mod backend;
pub mod batch;
pub mod binding;
pub mod bundle;
pub mod cli;
pub mod config;
pub mod engine;
pub mod error;
pub mod eval;
pub mod export;
mod fault;
pub mod files;
pub mod grammar;
pub mod handle;
pub mod import;
pub mod kernels;
pub mod kv_cache;
pub mod memory;
pub mod model;
pub mod packed;
pub mod perplexity;
mod plot;
pub mod progress;
pub mod quantize;
pub mod request;
pub mod row_histogram;
pub mod safetensors_writer;
pub mod sampling;
pub mod scheduler;
pub mod sequence;
#[cfg(feature = "server")]
pub mod server;
pub mod session;
mod session_file;
pub mod source;
pub mod startup;
pub mod tokenizer;
pub mod tune;
pub mod verify;

pub use backend::cpu::slices;
/// Macros that generated code calls, and that bind it in other crates.
pub use bespoke_macros::{bind, kernels};

/// The generator, whose specs, targets and model shapes the engine shares.
pub use bespoke_kernel_gen as kernel_gen;
pub use error::Error;
