//! The kernels that the build script generated, and the table of them.

#![allow(non_snake_case, reason = "a symbol's target stands behind two underscores")]

use bespoke_kernel_gen::cuda::CudaKernelTable;

use super::KernelTable;

// NOTE: no unit test runs a kernel, and to compile them takes minutes. Those of the package `tests`
// have them.
#[cfg(not(test))]
include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
include!(concat!(env!("OUT_DIR"), "/models.rs"));

/// All kernels of this build.
#[cfg(not(test))]
pub fn table() -> KernelTable {
    KernelTable {
        kernels: KERNELS,
        servings: SERVINGS,
        page_size: PAGE_SIZE,
        is_tuner: IS_TUNER,
        lock: LOCK,
    }
}

/// As in a build without kernels.
#[cfg(test)]
pub fn table() -> KernelTable {
    KernelTable::EMPTY
}

#[cfg(feature = "cuda")]
mod cuda {
    include!(concat!(env!("OUT_DIR"), "/cuda_kernels.rs"));
}

/// All CUDA kernels of this build; without the feature `cuda` there are none.
pub fn cuda_table() -> CudaKernelTable {
    #[cfg(feature = "cuda")]
    return cuda::CUDA_KERNELS;
    #[cfg(not(feature = "cuda"))]
    CudaKernelTable::default()
}
