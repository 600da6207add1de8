//! Coverage on GPUs: which kernel serves each op of a model, whether it was measured, and how often
//! a model uses each spec.

use std::collections::BTreeMap;

use super::plan::{Options, Plan, plan_with};
use super::serving::{Interval, Serving};
use super::{Arch, KvType, Spec};
use crate::error::Error;
use crate::plan::Provenance;
use crate::spec::{LinearRole, ModelShape};
use crate::tuning::distance::{Distance, nearest};
use crate::tuning::explain::Explanation;
use crate::tuning::lock::Lock;

/// How a model is run, and on which device.
#[derive(Clone, Debug)]
pub struct Run {
    pub kv: KvType,
    pub arch: Arch,
    /// Key of the device.
    pub device: String,
}

/// What serves some places of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Covered {
    /// `every layer`, `qkv`, `head`
    pub places: String,
    pub spec: Spec,
    pub explanations: Vec<Explanation>,
}

/// All specs that a run of a model uses, by place, as a build with this lock and the compiler that
/// the lock names serves them: by what was chosen on the device, else on the nearest of its
/// architecture. What is stale in the lock is served by the defaults.
///
/// # Errors
/// A lock that no build can follow, or a model that cannot be run.
pub fn coverage(shape: &ModelShape, lock: &Lock, run: &Run) -> Result<Vec<Covered>, Error> {
    let options = Options { lock: Some(lock), ..Options::default() };
    let plan = plan_with(std::slice::from_ref(shape), &[run.arch], &options)?;
    let covered = |(spec, places): (Spec, String)| {
        let explanations = explanations(&spec, &plan, lock, run);
        Covered { places, spec, explanations }
    };
    Ok(places(shape, run.kv)?.into_iter().map(covered).collect())
}

fn explanations(spec: &Spec, plan: &Plan, lock: &Lock, run: &Run) -> Vec<Explanation> {
    let own = || plan.servings.iter().filter(|serving| serving.spec == *spec);
    let keys = own().filter_map(|serving| serving.device.as_deref());
    let Some((key, distance)) = nearest(&run.device, keys) else {
        return Serving::default_for(spec, run.arch).explanations();
    };
    let serving = own().find(|serving| serving.device.as_deref() == Some(key));
    let problem = lock.problem(&spec.name(), run.arch.name(), key);
    let facts = problem.map_or(&[][..], |problem| &problem.intervals);
    let plain = serving.map_or(Vec::new(), Serving::explanations);
    let explained = plain.into_iter().zip(facts).map(|(plain, fact)| {
        let found = plain.with_times(fact, key);
        let provenance = Provenance::from_name(found.provenance).unwrap_or(Provenance::Default);
        match distance {
            Distance::Exact => found,
            _ => Explanation { provenance: provenance.transferred().name(), ..found },
        }
    });
    explained.collect()
}

impl Serving {
    /// What serves which rows, of which nothing was measured as far as is known here.
    pub fn explanations(&self) -> Vec<Explanation> {
        let mut rows_min = 1;
        let explained = self.intervals.iter().map(|interval| {
            let Interval { rows_max, variant, provenance } = *interval;
            let limit = (rows_max < usize::MAX).then_some(rows_max);
            let found = Explanation::unmeasured(rows_min, limit, variant.symbol(), provenance);
            rows_min = rows_max.saturating_add(1);
            Explanation { chosen_on: self.device.clone(), ..found }
        });
        explained.collect()
    }
}

/// Specs in the order of the model's data path, and where they are used.
fn places(shape: &ModelShape, kv: KvType) -> Result<Vec<(Spec, String)>, Error> {
    let every_layer = || "every layer".to_string();
    let mut all = vec![
        (shape.cuda_embed(), "embedding".to_string()),
        (shape.cuda_rms_norm(), every_layer()),
        (shape.cuda_rope(kv), every_layer()),
        (shape.cuda_paged_attention(kv), every_layer()),
        (shape.cuda_silu_and_mul(), every_layer()),
    ];
    for role in LinearRole::ALL {
        let forms = shape.cuda_linear_forms(role)?.into_iter();
        all.extend(forms.map(|spec| (spec, role.name().to_string())));
    }
    all.push((shape.cuda_sample(), "sampling".to_string()));
    Ok(all)
}

/// How often each spec is used by models, by its name; those of the KV cache for each of its types.
pub fn uses(shapes: &[ModelShape]) -> Result<BTreeMap<String, usize>, Error> {
    let mut uses: BTreeMap<String, usize> = BTreeMap::new();
    for shape in shapes {
        let mut add = |spec: Spec, count: usize| *uses.entry(spec.name()).or_default() += count;
        for spec in shape.cuda_specs()? {
            match spec {
                Spec::AwqGemm(_) | Spec::Gemm(_) => {}
                Spec::Embed(_) | Spec::Sample(_) => add(spec, 1),
                // NOTE: before attention and before the MLP.
                Spec::RmsNorm(_) => add(spec, 2 * shape.num_layers),
                _ => add(spec, shape.num_layers),
            }
        }
        for role in LinearRole::ALL {
            let count = if role == LinearRole::Head { 1 } else { shape.num_layers };
            for spec in shape.cuda_linear_forms(role)? {
                add(spec, count);
            }
        }
    }
    Ok(uses)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::presets;

    #[test]
    fn every_spec_of_a_model_is_covered_and_used() {
        let shape = presets::shape("llama-3.1-8b-awq", &[]).unwrap();
        let device = "sm_90a-sms-132-mem-80".to_string();
        let run = Run { kv: KvType::Rows, arch: Arch::Sm90a, device };
        let covered = coverage(&shape, &Lock::default(), &run).unwrap();
        let is_of_cache = |spec: &Spec| matches!(spec, Spec::Rope(_) | Spec::PagedAttention(_));
        for spec in shape.cuda_specs().unwrap().iter().filter(|spec| !is_of_cache(spec)) {
            assert!(covered.iter().any(|one| one.spec == *spec), "{}", spec.name());
        }
        let is_default = |one: &Covered| one.explanations.iter().all(|e| e.provenance == "default");
        assert!(covered.iter().all(is_default));
        let qkv = covered.iter().find(|one| one.places == "qkv").unwrap();
        let rows: Vec<Option<usize>> = qkv.explanations.iter().map(|one| one.rows_max).collect();
        assert_eq!(rows, [Some(8), Some(16), Some(32), Some(64), None]);
        let uses = uses(std::slice::from_ref(&shape)).unwrap();
        assert_eq!(uses["awq_gemm_n6144_k4096_g128_f16"], 32);
        assert_eq!(uses["gemm_n128256_k4096_f16_f32out"], 1);
        assert_eq!(uses.len(), shape.cuda_specs().unwrap().len());
    }
}
