//! What the CUDA backend keeps on its device: linears, rows between ops and the KV cache.

use bespoke_kernel_gen::spec::LinearRole;

use super::device::Address;

/// A linear's weights in the layout of its kernels.
#[derive(Clone, Copy, Debug)]
pub struct CudaLinear {
    pub(super) role: LinearRole,
    /// Place of its kernels among the model's.
    pub(super) kernels_idx: usize,
    pub(super) weight: Address,
    /// Of AWQ weights.
    pub(super) scales: Address,
    /// float32 `[n]`, or null.
    pub(super) bias: Address,
}

/// `[rows_max, width]` float32 elements, or 16-bit ones of the rows' type.
#[derive(Clone, Copy, Debug)]
pub struct CudaRows {
    pub(super) data: Address,
    pub(super) is_f32: bool,
    pub(super) rows_max: usize,
    pub(super) width: usize,
}

/// 16-bit `[rows_max, k]`.
#[derive(Clone, Copy, Debug)]
pub struct CudaInput {
    pub(super) data: Address,
    pub(super) rows_max: usize,
    pub(super) k: usize,
}

/// Pages of all layers: `[layer][page]`, see `templates/common/pages.cuh`. Behind the last page of
/// a layer lie some that nothing reads: rows which only fill up a batch are written there.
#[derive(Clone, Copy, Debug)]
pub struct CudaKvCache {
    pub(super) data: Address,
    /// Bytes of one page of one layer.
    pub(super) page_bytes: usize,
    pub(super) num_pages: usize,
    pub(super) num_spare: usize,
    pub(super) num_layers: usize,
}

impl CudaKvCache {
    pub(super) fn len(num_layers: usize, num_pages: usize, page_bytes: usize) -> Option<usize> {
        num_layers.checked_mul(num_pages)?.checked_mul(page_bytes)
    }

    /// Where a layer's pages start.
    pub(super) fn layer(&self, layer_idx: usize) -> Address {
        assert!(layer_idx < self.num_layers, "layer {layer_idx} of {}", self.num_layers);
        self.data.offset(layer_idx * (self.num_pages + self.num_spare) * self.page_bytes)
    }

    /// Where a page of a layer starts.
    pub(super) fn page(&self, layer_idx: usize, page: u32) -> Address {
        assert!((page as usize) < self.num_pages, "page {page} of {}", self.num_pages);
        self.layer(layer_idx).offset(page as usize * self.page_bytes)
    }
}
