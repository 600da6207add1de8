//! Shapes × architectures → the kernels to build, and which of them serve what by a lock.

use std::collections::BTreeSet;

use super::locked::{self, Locked};
use super::serving::Serving;
use super::{Arch, Spec, Variant};
use crate::error::Error;
use crate::spec::ModelShape;
use crate::tuning::lock::Lock;

/// What a plan depends on besides shapes and architectures.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options<'a> {
    /// Choices by measurement.
    pub lock: Option<&'a Lock>,
    /// Version of the compiler; `None`: whatever made the kernels that the lock names.
    pub toolkit: Option<&'a str>,
    /// Also the candidates of a tuner for these.
    pub tuner: &'a [Arch],
}

/// The kernels of a build, and which of them serves what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// All that serve something. Sorted, each once.
    pub variants: Vec<Variant>,
    /// What a tuner may try besides, of matmuls. Sorted, each once.
    pub candidates: Vec<Variant>,
    /// Choices for devices. Everywhere else serves [`Serving::default_for`].
    pub servings: Vec<Serving>,
    /// Choices of the lock that no longer hold, in words.
    pub warnings: Vec<String>,
}

/// The kernels of all `shapes` on all `archs` that serve where nothing was measured, sorted, each
/// once.
///
/// A spec that no kernel can serve is an error that names it: nothing is left out in silence.
pub fn plan(shapes: &[ModelShape], archs: &[Arch]) -> Result<Vec<Variant>, Error> {
    Ok(plan_with(shapes, archs, &Options::default())?.variants)
}

/// As [`plan`], with the choices of a lock and the candidates of a tuner.
///
/// A lock that names kernels which cannot be, or are not certified, is an error. Where it names one
/// that was another when it was measured, the default serves, with a warning.
pub fn plan_with(
    shapes: &[ModelShape],
    archs: &[Arch],
    options: &Options<'_>,
) -> Result<Plan, Error> {
    let specs = specs(shapes)?;
    let Locked { servings, warnings } = match options.lock {
        Some(lock) => locked::servings(lock, &specs, archs, options.toolkit)?,
        None => Locked::default(),
    };
    let locked = servings.iter().flat_map(|serving| &serving.intervals);
    let mut variants: BTreeSet<Variant> = locked.map(|interval| interval.variant).collect();
    let mut candidates = BTreeSet::new();
    for spec in &specs {
        for arch in archs {
            for regime in spec.regimes() {
                let variant = spec.variant(*regime, *arch);
                variant
                    .is_feasible()
                    .map_err(|reason| Error::Infeasible { symbol: variant.symbol(), reason })?;
                variants.insert(variant);
                // NOTE: of other ops there is no ladder of verification.
                if options.tuner.contains(arch) && spec.is_matmul() {
                    candidates.extend(spec.candidates(*regime, *arch));
                }
            }
        }
    }
    candidates.retain(|candidate| !variants.contains(candidate));
    Ok(Plan {
        variants: variants.into_iter().collect(),
        candidates: candidates.into_iter().collect(),
        servings,
        warnings,
    })
}

fn specs(shapes: &[ModelShape]) -> Result<BTreeSet<Spec>, Error> {
    let mut specs = BTreeSet::new();
    for shape in shapes {
        specs.extend(shape.cuda_specs()?);
    }
    Ok(specs)
}

/// The plan as text, one line a kernel.
pub fn print(variants: &[Variant]) -> String {
    variants.iter().map(|variant| format!("{variant}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::presets;

    #[test]
    fn symbols_are_read_back() {
        for (name, _) in presets::PRESETS {
            let shape = presets::shape(name, &[]).unwrap();
            for variant in plan(&[shape], &Arch::ALL).unwrap() {
                assert_eq!(Variant::parse(&variant.symbol()), Some(variant));
                for other in variant.spec().candidates(variant.regime, variant.arch) {
                    assert_eq!(Variant::parse(&other.symbol()), Some(other));
                }
            }
        }
        for symbol in [
            "",
            "embed",
            "embed__sm_90a",
            "embed_h576_bf16",
            "embed_h576_bf16__avx512",
            "embed_h0576_bf16__sm_90a",
            "embed_h576_bf16_upto8__sm_90a",
            "embed_h576_bf16_x__sm_90a",
            "gemm_n960_k576_bf16__sm_90a",
            "gemm_n960_k576_bf16_upto9__sm_90a",
        ] {
            assert_eq!(Variant::parse(symbol), None, "{symbol}");
        }
    }

    #[test]
    fn every_spec_has_a_kernel_for_each_regime_and_architecture() {
        let shape = presets::shape("qwen2.5-7b-awq", &[]).unwrap();
        let specs = shape.cuda_specs().unwrap();
        let expected: usize = specs.iter().map(|spec| spec.regimes().len()).sum();
        let variants = plan(&[shape.clone(), shape], &Arch::ALL).unwrap();
        assert_eq!(variants.len(), expected * Arch::ALL.len());
        assert!(variants.is_sorted());
    }

    #[test]
    fn a_tuner_has_some_candidates_for_each_matmul() {
        let shape = presets::shape("llama-3.1-8b-awq", &[]).unwrap();
        let options = Options { tuner: &[Arch::Sm90a], ..Options::default() };
        let archs = [Arch::Sm80, Arch::Sm90a];
        let plan = plan_with(std::slice::from_ref(&shape), &archs, &options).unwrap();
        assert!(plan.candidates.iter().all(|one| one.arch == Arch::Sm90a && !one.is_default()));
        for spec in shape.cuda_specs().unwrap() {
            for regime in spec.regimes() {
                let is_of = |one: &&Variant| one.spec() == spec && one.regime == *regime;
                let num = plan.candidates.iter().filter(is_of).count();
                let expected = if spec.is_matmul() { 4..=60 } else { 0..=0 };
                assert!(expected.contains(&num), "{num} of {} {regime:?}", spec.name());
            }
        }
        assert!(plan.variants.iter().all(Variant::is_default));
        assert!(plan.candidates.iter().all(|one| one.is_feasible().is_ok()));
    }
}
