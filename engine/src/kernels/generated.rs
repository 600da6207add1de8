//! The kernels that the build script generated, and the table of them.

#![allow(non_snake_case, reason = "a symbol's target stands behind two underscores")]

use super::KernelTable;

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// All kernels of this build.
pub fn table() -> KernelTable {
    KernelTable { kernels: KERNELS, page_size: PAGE_SIZE }
}
