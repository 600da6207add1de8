//! Specs × targets → the kernels to build.

pub(crate) mod locked;

use std::collections::BTreeSet;
use std::fmt;

use crate::config::KernelConfig;
use crate::error::Error;
use crate::name;
use crate::spec::{ActivationType, DType, KernelSpec, ModelShape, RowRegime};
use crate::target::Target;
use crate::tuning::lock::{Lock, LockedProblem, LockedVariant};
use locked::Locked;

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

    /// The variant that a symbol names; `None` for anything [`KernelVariant::symbol`] does not
    /// write.
    pub fn parse(symbol: &str) -> Option<KernelVariant> {
        name::parse(symbol)
    }

    /// Whether its configuration is what is used where nothing was measured.
    pub fn is_default(&self) -> bool {
        self.config == KernelConfig::default_for(&self.spec, self.regime, self.target)
    }

    /// Kernels of one class give the same bits for a row, whatever the row count.
    pub fn reduction_class(&self) -> String {
        let form = match self.spec {
            KernelSpec::AwqGemm { activation: ActivationType::Int8, .. }
            | KernelSpec::Gemm { weight: DType::I8, .. } => "_int8",
            KernelSpec::AwqGemm { .. } | KernelSpec::Gemm { .. } => "_float",
            _ => "",
        };
        format!("{}{form}.{}", self.spec.op(), self.target.name())
    }

    /// Where the choice of the configuration comes from.
    pub fn provenance(&self) -> &'static str {
        match self.is_default() {
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

/// Where the choice of a kernel comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Provenance {
    /// Measured on the device class it serves.
    Measured,
    /// Measured on another machine of the same instruction set and CPU family.
    Transferred,
    /// Predicted by a cost model.
    Model,
    /// What serves where nothing was measured.
    Default,
    /// Asked for by name.
    Pinned,
}

impl Provenance {
    pub const ALL: [Provenance; 5] = [
        Provenance::Measured,
        Provenance::Transferred,
        Provenance::Model,
        Provenance::Default,
        Provenance::Pinned,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Provenance::Measured => "measured",
            Provenance::Transferred => "transferred",
            Provenance::Model => "model",
            Provenance::Default => "default",
            Provenance::Pinned => "pinned",
        }
    }

    /// What it is on a device that the choice was not made on.
    pub fn transferred(self) -> Provenance {
        match self {
            Provenance::Measured | Provenance::Model => Provenance::Transferred,
            own => own,
        }
    }

    pub fn from_name(name: &str) -> Option<Provenance> {
        Provenance::ALL.into_iter().find(|provenance| provenance.name() == name)
    }
}

/// Intervals of one serving at most: looking one up is a few compares.
pub use crate::tuning::lock::INTERVALS_MAX;

/// Row counts up to `rows_max`, above the interval before, and the kernel that serves them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval {
    /// `usize::MAX`: no limit.
    pub rows_max: usize,
    pub variant: KernelVariant,
    pub provenance: Provenance,
}

/// What serves a spec on a target. For `paged_attention`, one row means decoding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Serving {
    pub spec: KernelSpec,
    pub target: Target,
    /// Key of the device class it was chosen for; `None`: any.
    pub device: Option<String>,
    /// Ascending; the last has no limit.
    pub intervals: Vec<Interval>,
}

impl Serving {
    /// What serves where nothing was measured: each row regime what it is made for.
    pub fn default_for(spec: &KernelSpec, target: Target) -> Serving {
        let interval = |regime: &RowRegime| {
            let config = KernelConfig::default_for(spec, *regime, target);
            Interval {
                rows_max: default_rows_max(spec, *regime),
                variant: KernelVariant { spec: *spec, regime: *regime, target, config },
                provenance: Provenance::Default,
            }
        };
        let intervals = spec.regimes().iter().map(interval).collect();
        Serving { spec: *spec, target, device: None, intervals }
    }
}

/// Most rows that a regime's default kernel serves.
fn default_rows_max(spec: &KernelSpec, regime: RowRegime) -> usize {
    match regime {
        RowRegime::One => 1,
        RowRegime::Few if spec.regimes().contains(&RowRegime::Many) => RowRegime::FEW_MAX,
        _ => usize::MAX,
    }
}

/// What a plan depends on besides shapes and targets.
#[derive(Clone, Copy, Debug, Default)]
pub struct PlanOptions<'a> {
    /// Choices by measurement.
    pub lock: Option<&'a Lock>,
    /// Also the candidates of a tuner for this target.
    pub tuner: Option<Target>,
}

/// The kernels of a build, and which of them serves what.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Sorted, each once.
    pub variants: Vec<KernelVariant>,
    /// By spec and target, the one for any device first.
    pub servings: Vec<Serving>,
    /// What of the lock decided about the servings.
    pub lock: Lock,
    /// Choices of the lock that no longer hold, in words.
    pub warnings: Vec<String>,
}

/// What the kernels of all `shapes` are on all `targets`.
///
/// A spec that no kernel can serve is an error that names it: nothing is left out in silence. So is
/// a lock that names kernels which cannot be, or are not certified. Where it names one that was
/// another when it was measured, the default serves, with a warning.
pub fn plan(
    shapes: &[ModelShape],
    targets: &[Target],
    options: &PlanOptions<'_>,
) -> Result<Plan, Error> {
    let specs: BTreeSet<KernelSpec> = shapes.iter().flat_map(ModelShape::kernel_specs).collect();
    let Locked { servings: locked, warnings } = match options.lock {
        Some(lock) => locked::servings(lock, &specs, targets)?,
        None => Locked::default(),
    };
    let mut variants: BTreeSet<KernelVariant> =
        locked.iter().flat_map(|serving| &serving.intervals).map(|one| one.variant).collect();
    let mut servings = Vec::new();
    for spec in &specs {
        for target in targets {
            let serving = Serving::default_for(spec, *target);
            for Interval { variant, .. } in &serving.intervals {
                let KernelVariant { regime, config, .. } = variant;
                config
                    .is_feasible(spec, *regime, *target)
                    .map_err(|reason| Error::Infeasible { symbol: variant.symbol(), reason })?;
                variants.insert(*variant);
            }
            servings.push(serving);
            let is_of_spec =
                |serving: &&Serving| serving.spec == *spec && serving.target == *target;
            servings.extend(locked.iter().filter(is_of_spec).cloned());
            if options.tuner == Some(*target) {
                variants.extend(candidates(spec, *target));
            }
        }
    }
    let lock = options.lock.map_or_else(Lock::default, |lock| used(lock, &servings));
    Ok(Plan { variants: variants.into_iter().collect(), servings, lock, warnings })
}

/// What of a lock decided about `servings`.
fn used(lock: &Lock, servings: &[Serving]) -> Lock {
    let keys: BTreeSet<(String, &str, &str)> = servings
        .iter()
        .filter_map(|serving| {
            let device = serving.device.as_deref()?;
            Some((name::spec_name(&serving.spec), serving.target.name(), device))
        })
        .collect();
    let is_used = |problem: &&LockedProblem| {
        keys.contains(&(problem.spec.clone(), problem.target.as_str(), problem.device.as_str()))
    };
    let problems: Vec<LockedProblem> = lock.problems.iter().filter(is_used).cloned().collect();
    let symbols: BTreeSet<&str> = problems
        .iter()
        .flat_map(|problem| &problem.intervals)
        .map(|interval| interval.symbol.as_str())
        .collect();
    let is_named = |variant: &&LockedVariant| symbols.contains(variant.symbol.as_str());
    let certificates = lock.certificates.iter().filter(is_named).cloned().collect();
    Lock { version: lock.version, options: lock.options.clone(), problems, certificates }
}

/// Every kernel for `spec` on `target` that is worth a trial, the defaults among them.
pub fn candidates(spec: &KernelSpec, target: Target) -> Vec<KernelVariant> {
    let of_regime = |regime: &RowRegime| {
        let regime = *regime;
        let configs = KernelConfig::candidates(spec, regime, target).into_iter();
        configs.map(move |config| KernelVariant { spec: *spec, regime, target, config })
    };
    spec.regimes().iter().flat_map(of_regime).collect()
}

/// The plan as text, one line a kernel.
pub fn print(variants: &[KernelVariant]) -> String {
    variants.iter().map(|variant| format!("{variant}\n")).collect()
}
