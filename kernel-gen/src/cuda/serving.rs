//! Which kernel serves which rows of a spec on a GPU.

use super::spec::Regime;
use super::{Arch, Spec, Variant};
use crate::plan::Provenance;

/// Row counts up to `rows_max`, above the interval before, and the kernel that serves them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval {
    /// `usize::MAX`: no limit.
    pub rows_max: usize,
    pub variant: Variant,
    pub provenance: Provenance,
}

/// What serves a spec on an architecture. For `paged_attention`, one row means decoding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Serving {
    pub spec: Spec,
    pub arch: Arch,
    /// Key of the device it was chosen on; `None`: any.
    pub device: Option<String>,
    /// Ascending; the last has no limit.
    pub intervals: Vec<Interval>,
}

impl Serving {
    /// What serves where nothing was measured: each row regime what it is made for.
    pub fn default_for(spec: &Spec, arch: Arch) -> Serving {
        let interval = |regime: &Regime| Interval {
            rows_max: rows_max(*regime),
            variant: spec.variant(*regime, arch),
            provenance: Provenance::Default,
        };
        let intervals = spec.regimes().iter().map(interval).collect();
        Serving { spec: *spec, arch, device: None, intervals }
    }

    /// The interval that `num_rows` rows lie in.
    pub fn interval(&self, num_rows: usize) -> &Interval {
        let found = self.intervals.iter().find(|interval| num_rows <= interval.rows_max);
        found.expect("the last interval of a serving has no limit")
    }
}

/// Most rows that a regime's default kernel serves.
fn rows_max(regime: Regime) -> usize {
    match regime {
        Regime::Decode => 1,
        Regime::UpTo(limit) => limit,
        Regime::Any | Regime::Prefill | Regime::Many => usize::MAX,
    }
}

impl Spec {
    pub fn is_matmul(&self) -> bool {
        matches!(self, Spec::AwqGemm(_) | Spec::Gemm(_))
    }
}

impl Variant {
    /// Whether the kernel may serve so many rows. Matmuls give right results for any number, but
    /// their workspace is made for those of the regime.
    pub fn serves(&self, num_rows: usize) -> bool {
        match self.regime {
            Regime::Decode => num_rows == 1,
            Regime::Prefill => num_rows > 1,
            Regime::UpTo(limit) => num_rows <= limit,
            Regime::Any | Regime::Many => true,
        }
    }

    /// The name of the spec, with which the symbols of its kernels begin:
    /// `awq_gemm_n960_k576_g64_bf16`.
    pub fn spec_name(&self) -> String {
        self.spec().name()
    }

    /// Whether its configuration is what is used where nothing was measured.
    pub fn is_default(&self) -> bool {
        *self == self.spec().variant(self.regime, self.arch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::presets;
    use crate::spec::LinearRole;

    #[test]
    fn defaults_serve_the_rows_of_their_regimes() {
        let shape = presets::shape("llama-3.1-8b-awq", &[]).unwrap();
        let qkv = shape.cuda_linear(LinearRole::Qkv).unwrap();
        let serving = Serving::default_for(&qkv, Arch::Sm90a);
        for rows in [1, 8, 9, 16, 17, 32, 33, 64, 65, 5000] {
            let variant = serving.interval(rows).variant;
            assert_eq!(variant.regime, Regime::of_rows(rows));
            assert!(variant.serves(rows) && variant.is_default());
        }
        assert_eq!(qkv.name(), "awq_gemm_n6144_k4096_g128_f16");
        for spec in shape.cuda_specs().unwrap() {
            let serving = Serving::default_for(&spec, Arch::Sm80);
            for Interval { rows_max, variant, .. } in &serving.intervals {
                assert!(variant.serves(*rows_max) && variant.spec() == spec);
                assert!(variant.symbol().starts_with(&spec.name()));
            }
            assert_eq!(serving.intervals.last().unwrap().rows_max, usize::MAX);
        }
    }
}
