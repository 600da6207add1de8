//! Specs × targets → the kernels to build.

use std::collections::BTreeSet;
use std::fmt;

use crate::config::KernelConfig;
use crate::error::Error;
use crate::name;
use crate::spec::{ActivationType, DType, KernelSpec, ModelShape, RowRegime};
use crate::target::Target;

/// One kernel: what it computes, for how many rows, on which machine, with which choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KernelVariant {
    pub spec: KernelSpec,
    pub regime: RowRegime,
    pub target: Target,
    pub config: KernelConfig,
}

impl KernelVariant {
    pub fn symbol(&self) -> String {
        name::symbol(self)
    }

    /// Kernels of one class give the same bits for a row, whatever the row count.
    pub fn reduction_class(&self) -> String {
        let form = match self.spec {
            KernelSpec::AwqGemm { activation: ActivationType::Float, .. } => "_float",
            KernelSpec::AwqGemm { activation: ActivationType::Int8, .. }
            | KernelSpec::Gemm { weight: DType::I8, .. } => "_int8",
            KernelSpec::Gemm { .. } => "_float",
            _ => "",
        };
        format!("{}{form}.{}", self.spec.op(), self.target.name())
    }

    /// Where the choice of the configuration comes from.
    pub fn provenance(&self) -> &'static str {
        match self.config == KernelConfig::default_for(&self.spec, self.regime, self.target) {
            true => "default",
            false => "given",
        }
    }

    pub fn scratch_bytes(&self) -> usize {
        self.config.scratch_bytes(&self.spec, self.regime, self.target)
    }
}

/// A line of the printed plan.
impl fmt::Display for KernelVariant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.symbol())?;
        if self.spec.is_matmul() {
            write!(f, " rows={} cols={}", self.config.rows, self.config.cols)?;
        }
        if self.scratch_bytes() > 0 {
            write!(f, " scratch={}", self.scratch_bytes())?;
        }
        write!(f, " class={} from={}", self.reduction_class(), self.provenance())
    }
}

/// The kernels of all `shapes` on all `targets`, sorted, each once.
///
/// A spec that no kernel can serve is an error that names it: nothing is left out in silence.
pub fn plan(shapes: &[ModelShape], targets: &[Target]) -> Result<Vec<KernelVariant>, Error> {
    let specs: BTreeSet<KernelSpec> = shapes.iter().flat_map(ModelShape::kernel_specs).collect();
    let mut variants = BTreeSet::new();
    for spec in &specs {
        for regime in spec.regimes() {
            for target in targets {
                let config = KernelConfig::default_for(spec, *regime, *target);
                let variant =
                    KernelVariant { spec: *spec, regime: *regime, target: *target, config };
                config
                    .is_feasible(spec, *regime, *target)
                    .map_err(|reason| Error::Infeasible { symbol: variant.symbol(), reason })?;
                variants.insert(variant);
            }
        }
    }
    Ok(variants.into_iter().collect())
}

/// The plan as text, one line a kernel.
pub fn print(variants: &[KernelVariant]) -> String {
    variants.iter().map(|variant| format!("{variant}\n")).collect()
}
