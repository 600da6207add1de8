//! The integration tests of Bespoke live in `it/`; here are the kernels that they run.

use bespoke::kernels::KernelTable;

/// Kernels generated for the tiny golden models.
mod generated {
    #![allow(non_snake_case, reason = "a symbol's target stands behind two underscores")]

    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

/// The table of the tiny golden models' kernels.
pub fn tiny_kernels() -> KernelTable {
    KernelTable { kernels: generated::KERNELS }
}
