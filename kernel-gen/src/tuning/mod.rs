//! Tuning: from measurements to the choice of kernels that a build follows.
//!
//! - [`record::Record`] is a measurement, a certificate or a failure: one line of JSON. Records
//!   are only ever appended to, and no build reads them.
//! - [`certificate::Certificate`] says which tests a kernel has passed.
//! - [`lock::Lock`] is the choice, `kernels.lock`: the only one of these that a build reads.
//! - [`device::Device`] is what timings depend on.
//! - [`cost_model::CostModel`] predicts what was not measured.

mod budget;
pub mod certificate;
pub mod commands;
pub mod cost_model;
pub mod coverage;
pub mod device;
pub mod distance;
pub mod explain;
mod intervals;
pub mod lock;
pub mod record;
pub mod select;
pub mod trace;

pub use certificate::Certificate;
pub use device::{CpuDevice, CudaDevice, Device};
pub use lock::Lock;
pub use record::{Appender, Case, Record, Records, Warning};
