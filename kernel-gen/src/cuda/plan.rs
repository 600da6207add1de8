//! Shapes × architectures → the kernels to build.

use std::collections::BTreeSet;

use super::{Arch, Spec, Variant};
use crate::error::Error;
use crate::spec::ModelShape;

/// The kernels of all `shapes` on all `archs`, sorted, each once.
///
/// A spec that no kernel can serve is an error that names it: nothing is left out in silence.
pub fn plan(shapes: &[ModelShape], archs: &[Arch]) -> Result<Vec<Variant>, Error> {
    let mut specs: BTreeSet<Spec> = BTreeSet::new();
    for shape in shapes {
        specs.extend(shape.cuda_specs()?);
    }
    let mut variants = BTreeSet::new();
    for spec in &specs {
        for regime in spec.regimes() {
            for arch in archs {
                let variant = spec.variant(*regime, *arch);
                variant
                    .is_feasible()
                    .map_err(|reason| Error::Infeasible { symbol: variant.symbol(), reason })?;
                variants.insert(variant);
            }
        }
    }
    Ok(variants.into_iter().collect())
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
}
