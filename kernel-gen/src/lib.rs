//! Build-time generator of inference kernels: `spec → plan → render → compile → emit`.

pub mod error;
pub mod model;
pub mod spec;
pub mod target;

pub use error::Error;
