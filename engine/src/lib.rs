//! LLM inference with kernels made to measure, at build time, for one model.

// NOTE: generated code names this crate `bespoke`, inside it as outside.
extern crate self as bespoke;

pub mod backend;
pub mod batch;
pub mod config;
pub mod engine;
pub mod error;
pub mod files;
pub mod import;
pub mod kernels;
pub mod kv_cache;
pub mod model;
pub mod progress;
pub mod quantize;
pub mod request;
pub mod safetensors_writer;
pub mod sampling;
pub mod scheduler;
pub mod sequence;

pub use error::Error;
