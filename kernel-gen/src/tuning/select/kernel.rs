//! A kernel of a CPU or of a GPU, as far as a selection has to know it.

use crate::cuda;
use crate::name::spec_name;
use crate::plan::{KernelVariant, Serving};
use crate::spec::RowRegime;
use crate::tuning::record::Case;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kernel {
    Cpu(KernelVariant),
    Cuda(cuda::Variant),
}

impl Kernel {
    /// The kernel that a symbol names.
    pub(super) fn parse(symbol: &str) -> Option<Kernel> {
        let cpu = KernelVariant::parse(symbol).map(Kernel::Cpu);
        cpu.or_else(|| cuda::Variant::parse(symbol).map(Kernel::Cuda))
    }

    pub(super) fn spec_name(&self) -> String {
        match self {
            Kernel::Cpu(variant) => spec_name(&variant.spec),
            Kernel::Cuda(variant) => variant.spec_name(),
        }
    }

    /// Of a target or an architecture.
    pub(super) fn target(&self) -> &'static str {
        match self {
            Kernel::Cpu(variant) => variant.target.name(),
            Kernel::Cuda(variant) => variant.arch.name(),
        }
    }

    pub(super) fn is_feasible(&self) -> bool {
        match self {
            Kernel::Cpu(KernelVariant { spec, regime, target, config }) => {
                config.is_feasible(spec, *regime, *target).is_ok()
            }
            Kernel::Cuda(variant) => variant.is_feasible().is_ok(),
        }
    }

    /// Whether the kernel may serve a case.
    pub(super) fn serves(&self, case: Case) -> bool {
        match (self, case) {
            (_, Case::All) => false,
            (Kernel::Cpu(variant), Case::Rows(rows)) => {
                variant.regime != RowRegime::One || rows == 1
            }
            (Kernel::Cpu(variant), Case::Decode { .. }) => variant.regime == RowRegime::One,
            (Kernel::Cpu(variant), Case::Prefill(_)) => variant.regime == RowRegime::Many,
            (Kernel::Cuda(variant), Case::Rows(rows)) => variant.serves(rows),
            (Kernel::Cuda(variant), Case::Decode { .. }) => variant.regime == cuda::Regime::Decode,
            (Kernel::Cuda(variant), Case::Prefill(_)) => variant.regime == cuda::Regime::Prefill,
        }
    }

    /// Most rows and symbol of what serves the kernel's spec without a lock, ascending.
    pub(super) fn defaults(&self) -> Vec<(usize, String)> {
        match self {
            Kernel::Cpu(KernelVariant { spec, target, .. }) => {
                let intervals = Serving::default_for(spec, *target).intervals;
                intervals.iter().map(|one| (one.rows_max, one.variant.symbol())).collect()
            }
            Kernel::Cuda(variant) => {
                let serving = cuda::Serving::default_for(&variant.spec(), variant.arch);
                serving.intervals.iter().map(|one| (one.rows_max, one.variant.symbol())).collect()
            }
        }
    }

    /// The symbol of what serves a case without a lock.
    pub(super) fn default_of(&self, case: Case) -> Option<String> {
        let rows = match case {
            Case::Rows(rows) => rows,
            Case::Decode { .. } => 1,
            Case::Prefill(_) => usize::MAX,
            Case::All => return None,
        };
        self.defaults().into_iter().find(|(max, _)| rows <= *max).map(|(_, symbol)| symbol)
    }

    /// Kernels of one layout read the same packed weights.
    pub(super) fn layout(&self) -> usize {
        match self {
            Kernel::Cpu(variant) => variant.config.cols,
            // All kernels of a spec read the same.
            Kernel::Cuda(_) => 0,
        }
    }

    pub(super) fn reduction_class(&self) -> String {
        match self {
            Kernel::Cpu(variant) => variant.reduction_class(),
            Kernel::Cuda(variant) => variant.reduction_class(),
        }
    }

    /// Whether what serves so many rows of the spec may serve all above.
    pub(super) fn has_no_limit_from(&self, rows: usize) -> bool {
        match self {
            Kernel::Cpu(variant) => !variant.spec.is_matmul() || rows > RowRegime::FEW_MAX,
            Kernel::Cuda(variant) => {
                let regimes = variant.spec().regimes();
                !regimes.contains(&cuda::Regime::Many) || rows >= cuda::Regime::Many.rows_min()
            }
        }
    }
}
