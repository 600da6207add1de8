//! Kernel templates as ordinary modules, the arguments of their instances, and the table that
//! `kernel-gen` fills with them.

pub mod abi;
pub mod generated;

#[path = "../../templates/awq_gemm/awq_gemm.rs"]
pub mod awq_gemm;
#[path = "../../templates/embed/embed.rs"]
pub mod embed;
#[path = "../../templates/gemm/gemm.rs"]
pub mod gemm;
#[path = "../../templates/paged_attention/paged_attention.rs"]
pub mod paged_attention;
#[path = "../../templates/common/pages.rs"]
pub mod pages;
#[path = "../../templates/quantize/quantize.rs"]
pub mod quantize;
#[path = "../../templates/rms_norm/rms_norm.rs"]
pub mod rms_norm;
#[path = "../../templates/rope/rope.rs"]
pub mod rope;
#[path = "../../templates/sample/sample.rs"]
pub mod sample;
#[path = "../../templates/silu_and_mul/silu_and_mul.rs"]
pub mod silu_and_mul;
#[path = "../../templates/common/simd.rs"]
pub mod simd;
#[path = "../../templates/common/simd_portable.rs"]
pub mod simd_portable;
#[cfg(target_arch = "x86_64")]
#[path = "../../templates/common/simd_x86.rs"]
pub mod simd_x86;

use bespoke_kernel_gen::spec::{KernelSpec, PAGE_SIZE, RowRegime};
use bespoke_kernel_gen::target::Target;

/// A kernel's entry, typed by its op.
#[derive(Clone, Copy)]
pub enum KernelFn {
    Embed(unsafe fn(&abi::EmbedArgs, abi::Share)),
    RmsNorm(unsafe fn(&abi::RmsNormArgs, abi::Share)),
    Gemm(unsafe fn(&abi::GemmArgs, abi::Share)),
    AwqGemm(unsafe fn(&abi::AwqGemmArgs, abi::Share)),
    Rope(unsafe fn(&abi::RopeArgs, abi::Share)),
    PagedAttention(unsafe fn(&abi::PagedAttentionArgs, abi::Share)),
    SiluAndMul(unsafe fn(&abi::SiluAndMulArgs, abi::Share)),
    Quantize(unsafe fn(&abi::QuantizeArgs, abi::Share)),
    Sample(unsafe fn(&abi::SampleArgs, abi::Share)),
}

/// One generated kernel: what it computes, how, for which machine, and its entry.
#[derive(Clone, Copy)]
pub struct Kernel {
    pub symbol: &'static str,
    pub spec: KernelSpec,
    pub regime: RowRegime,
    pub target: Target,
    /// Rows of a register block.
    pub rows: usize,
    /// Column tiles of a packed weight panel; 0 for ops without packed weights.
    pub cols: usize,
    /// Scratch memory that one thread needs.
    pub scratch_bytes: usize,
    /// Kernels of one class give the same bits for a row, whatever the row count.
    pub reduction_class: &'static str,
    /// Where the choice of this configuration comes from.
    pub provenance: &'static str,
    /// Hash of the template text and the instantiation.
    pub source_hash: &'static str,
    pub run: KernelFn,
}

/// All kernels of a build. The default has none, which is enough for the reference backend.
#[derive(Clone, Copy)]
pub struct KernelTable {
    pub kernels: &'static [Kernel],
    /// Token slots of a KV page: the kernels' own, and the engine's on any backend.
    pub page_size: usize,
}

impl Default for KernelTable {
    fn default() -> KernelTable {
        KernelTable { kernels: &[], page_size: PAGE_SIZE }
    }
}

impl KernelTable {
    /// The kernel for `spec` at `regime` on exactly `target`.
    pub fn find(
        &self,
        spec: &KernelSpec,
        regime: RowRegime,
        target: Target,
    ) -> Option<&'static Kernel> {
        self.kernels.iter().find(|kernel| {
            kernel.spec == *spec && kernel.regime == regime && kernel.target == target
        })
    }
}
