//! Kernel templates as ordinary modules, the arguments of their instances, and the table that
//! `kernel-gen` fills with them.

pub mod abi;
pub mod choice;
pub mod generated;

#[path = "../../templates/awq_gemm/awq_gemm.rs"]
pub mod awq_gemm;
#[path = "../../templates/common/bf16.rs"]
pub mod bf16;
#[path = "../../templates/embed/embed.rs"]
pub mod embed;
#[path = "../../templates/gemm/gemm.rs"]
pub mod gemm;
#[path = "../../templates/gemm_bf16/gemm_bf16.rs"]
pub mod gemm_bf16;
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
#[allow(clippy::approx_constant, reason = "a coefficient that is close to ln 2, and is not it")]
#[path = "../../templates/common/simd.rs"]
pub mod simd;
#[cfg(target_arch = "aarch64")]
#[path = "../../templates/common/simd_neon.rs"]
pub mod simd_neon;
#[path = "../../templates/common/simd_portable.rs"]
pub mod simd_portable;
#[cfg(target_arch = "x86_64")]
#[path = "../../templates/common/simd_x86.rs"]
pub mod simd_x86;

use std::collections::BTreeSet;

use bespoke_kernel_gen::plan::Provenance;
use bespoke_kernel_gen::spec::{KernelSpec, PAGE_SIZE, RowRegime};
use bespoke_kernel_gen::target::Target;

/// A kernel's entry, typed by its op.
#[derive(Clone, Copy)]
pub enum KernelFn {
    Embed(unsafe fn(&abi::EmbedArgs, abi::Share)),
    RmsNorm(unsafe fn(&abi::RmsNormArgs, abi::Share)),
    Gemm(unsafe fn(&abi::GemmArgs, abi::Share)),
    GemmBf16(unsafe fn(&abi::GemmBf16Args, abi::Share)),
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
    /// Hash of the template text and the instantiation.
    pub source_hash: &'static str,
    pub run: KernelFn,
}

/// Row counts up to `rows_max`, above the interval before, and the kernel that serves them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval {
    /// `usize::MAX`: no limit.
    pub rows_max: usize,
    /// Of a kernel of the same table.
    pub symbol: &'static str,
    pub provenance: Provenance,
}

/// What serves a spec on a target. For `paged_attention`, one row means decoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Serving {
    pub spec: KernelSpec,
    pub target: Target,
    /// Key of the device class it was chosen for; `None`: any.
    pub device: Option<&'static str>,
    /// Ascending, at most [`INTERVALS_MAX`](bespoke_kernel_gen::plan::INTERVALS_MAX); the last has
    /// no limit.
    pub intervals: &'static [Interval],
}

/// Row counts that a kernel serves on a device class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Served {
    pub device: Option<&'static str>,
    pub rows_min: usize,
    /// `usize::MAX`: no limit.
    pub rows_max: usize,
    pub provenance: Provenance,
}

/// All kernels of a build, and which of them serves what. The default has none, which is enough
/// for the reference backend.
#[derive(Clone, Copy)]
pub struct KernelTable {
    pub kernels: &'static [Kernel],
    pub servings: &'static [Serving],
    /// Token slots of a KV page: the kernels' own, and the engine's on any backend.
    pub page_size: usize,
    /// Whether there are kernels that serve nothing: candidates of the tuner.
    pub is_tuner: bool,
    /// The text of the lock that decided about the servings, as far as it did; may be empty.
    pub lock: &'static str,
}

impl Default for KernelTable {
    fn default() -> KernelTable {
        KernelTable::EMPTY
    }
}

impl KernelTable {
    pub const EMPTY: KernelTable = KernelTable {
        kernels: &[],
        servings: &[],
        page_size: PAGE_SIZE,
        is_tuner: false,
        lock: "",
    };

    /// Device classes that something is served for on `target`, and `None` for any.
    pub fn devices(&self, target: Target) -> BTreeSet<Option<&'static str>> {
        let of_target = self.servings.iter().filter(|serving| serving.target == target);
        of_target.map(|serving| serving.device).collect()
    }

    /// The kernel of this name.
    pub fn kernel(&self, symbol: &str) -> Option<&'static Kernel> {
        self.kernels.iter().find(|kernel| kernel.symbol == symbol)
    }

    /// The kernels that serve something, each with what it serves.
    pub fn served(&self) -> impl Iterator<Item = (&'static Kernel, Vec<Served>)> + '_ {
        self.kernels.iter().filter_map(|kernel| {
            let serves = self.serves(kernel);
            (!serves.is_empty()).then_some((kernel, serves))
        })
    }

    /// What a kernel of the table serves.
    pub fn serves(&self, kernel: &Kernel) -> Vec<Served> {
        let is_of_kernel =
            |serving: &&Serving| serving.spec == kernel.spec && serving.target == kernel.target;
        let mut all = Vec::new();
        for serving in self.servings.iter().filter(is_of_kernel) {
            let mut rows_min = 1;
            for interval in serving.intervals {
                if interval.symbol == kernel.symbol {
                    let Interval { rows_max, provenance, .. } = *interval;
                    all.push(Served { device: serving.device, rows_min, rows_max, provenance });
                }
                rows_min = interval.rows_max.saturating_add(1);
            }
        }
        all
    }

    /// What serves `spec` on exactly `target` where nothing is known of the device.
    pub fn serving(&self, spec: &KernelSpec, target: Target) -> Option<&'static Serving> {
        self.servings.iter().find(|serving| {
            serving.spec == *spec && serving.target == target && serving.device.is_none()
        })
    }

    /// The kernel that serves `num_rows` rows there.
    pub fn serving_kernel(
        &self,
        spec: &KernelSpec,
        num_rows: usize,
        target: Target,
    ) -> Option<&'static Kernel> {
        self.kernel(self.serving(spec, target)?.interval(num_rows).symbol)
    }
}

impl Serving {
    /// The interval that `num_rows` rows lie in.
    pub fn interval(&self, num_rows: usize) -> &'static Interval {
        let found = self.intervals.iter().find(|interval| num_rows <= interval.rows_max);
        found.expect("the last interval of a serving has no limit")
    }
}
