//! The kernels that the build script generated, and the table of them.

#![allow(non_snake_case, reason = "a symbol's target stands behind two underscores")]

use bespoke_kernel_gen::cuda::CudaKernelTable;

use super::KernelTable;

// NOTE: no unit test runs a kernel, and to compile them takes minutes. Those of the package `tests`
// have them.
#[cfg(not(test))]
include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
#[cfg(test)]
const KERNELS: &[super::Kernel] = &[];
#[cfg(test)]
const PAGE_SIZE: usize = bespoke_kernel_gen::spec::PAGE_SIZE;
include!(concat!(env!("OUT_DIR"), "/models.rs"));

/// All kernels of this build.
pub fn table() -> KernelTable {
    KernelTable { kernels: KERNELS, page_size: PAGE_SIZE }
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
