//! Coverage: which kernel serves each linear and each op of a model, and whether it was measured.

use std::collections::BTreeMap;

use super::explain::{self, Explanation};
use super::lock::Lock;
use crate::error::Error;
use crate::name::spec_name;
use crate::plan::{PlanOptions, Serving, plan};
use crate::spec::{ActivationType, KernelSpec, KvDType, LinearRole, ModelShape};
use crate::target::Target;

/// How a model is run, and on which device.
#[derive(Clone, Debug)]
pub struct Run {
    pub activation: ActivationType,
    pub kv: KvDType,
    pub target: Target,
    /// Key of the device.
    pub device: String,
}

/// What serves some places of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Covered {
    /// `layers 0-29 qkv`, `every layer`, `head`
    pub places: String,
    pub spec: KernelSpec,
    pub explanations: Vec<Explanation>,
}

impl Covered {
    /// Whether all row counts are served by what was measured on the device.
    pub fn is_measured(&self) -> bool {
        self.explanations.iter().all(|interval| interval.provenance == "measured")
    }

    /// Whether a word names the spec, its op, or what its name begins with.
    pub fn is_named_by(&self, word: &str) -> bool {
        let name = spec_name(&self.spec);
        self.spec.op() == word || name == word
    }
}

/// All specs that a run of a model uses, by place, as a build with this lock serves them: what is
/// stale in the lock is served by the defaults.
///
/// # Errors
/// A lock that no build can follow, or a model that cannot be run.
pub fn coverage(shape: &ModelShape, lock: &Lock, run: &Run) -> Result<Vec<Covered>, Error> {
    let options = PlanOptions { lock: Some(lock), ..PlanOptions::default() };
    let plan = plan(std::slice::from_ref(shape), &[run.target], &options)?;
    let is_followed = |spec: &KernelSpec| {
        let serving = |one: &Serving| one.spec == *spec && one.device.as_ref() == Some(&run.device);
        plan.servings.iter().any(serving)
    };
    let covered = |(spec, places): (KernelSpec, String)| {
        let name = spec_name(&spec);
        let explanations = match is_followed(&spec) {
            true => explain::from_lock(lock, &name, run.target.name(), &run.device),
            false => defaults(&spec, run.target),
        };
        Covered { places, spec, explanations }
    };
    Ok(places(shape, run)?.into_iter().map(covered).collect())
}

fn defaults(spec: &KernelSpec, target: Target) -> Vec<Explanation> {
    let mut rows_min = 1;
    let serving = Serving::default_for(spec, target);
    let explained = serving.intervals.iter().map(|interval| {
        let rows_max = (interval.rows_max < usize::MAX).then_some(interval.rows_max);
        let found = Explanation::of_default(rows_min, rows_max, interval.variant.symbol());
        rows_min = interval.rows_max.saturating_add(1);
        found
    });
    explained.collect()
}

/// Specs in the order of the model's data path, and where they are used.
fn places(shape: &ModelShape, run: &Run) -> Result<Vec<(KernelSpec, String)>, Error> {
    let embed = KernelSpec::Embed { hidden: shape.hidden_size, dtype: shape.dtype };
    let mut all = vec![(embed, "embedding".to_string())];
    all.push((shape.rope_kernel(run.kv), "every layer".to_string()));
    all.push((shape.paged_attention_kernel(run.kv), "every layer".to_string()));
    for role in LinearRole::ALL {
        let name = role.name();
        for linear in shape.served_forms(role, run.activation) {
            let rows = linear.row_format(run.activation);
            if let Some(input) = shape.input_kernel(role, rows) {
                all.push((input, format!("input of {name}")));
            }
        }
        if role == LinearRole::Head {
            all.push((shape.linear_kernel(role, run.activation)?, name.to_string()));
            continue;
        }
        let mut layers: BTreeMap<KernelSpec, Vec<usize>> = BTreeMap::new();
        for layer_idx in 0..shape.num_layers {
            let spec = shape.linear_in(role, layer_idx).kernel(run.activation)?;
            layers.entry(spec).or_default().push(layer_idx);
        }
        let place = |(spec, layers): (KernelSpec, Vec<usize>)| {
            (spec, format!("layers {} {name}", ranges(&layers)))
        };
        all.extend(layers.into_iter().map(place));
    }
    all.push((KernelSpec::Sample { vocab: shape.vocab_size }, "sampling".to_string()));
    Ok(all)
}

/// `0-3,5` of ascending numbers.
fn ranges(numbers: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == *number => *last = *number,
            _ => runs.push((*number, *number)),
        }
    }
    let word = |(first, last): &(usize, usize)| match first == last {
        true => format!("{first}"),
        false => format!("{first}-{last}"),
    };
    runs.iter().map(word).collect::<Vec<_>>().join(",")
}

/// How often each spec is used by models, for float and for int8 activations.
pub fn uses(shapes: &[ModelShape]) -> Result<BTreeMap<String, usize>, Error> {
    let mut uses = BTreeMap::new();
    for shape in shapes {
        for spec in shape.kernel_specs() {
            *uses.entry(spec_name(&spec)).or_default() += match spec {
                KernelSpec::Embed { .. } | KernelSpec::Sample { .. } => 1,
                _ if spec.is_matmul() => 0,
                _ => shape.num_layers,
            };
        }
        for activation in [ActivationType::Float, ActivationType::Int8] {
            for role in LinearRole::ALL.into_iter().filter(|role| *role != LinearRole::Head) {
                for layer_idx in 0..shape.num_layers {
                    let spec = shape.linear_in(role, layer_idx).kernel(activation)?;
                    *uses.entry(spec_name(&spec)).or_default() += 1;
                }
            }
            let head = shape.linear_kernel(LinearRole::Head, activation)?;
            *uses.entry(spec_name(&head)).or_default() += 1;
        }
    }
    Ok(uses)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::presets;
    use crate::tuning::lock::{LockedInterval, LockedProblem, VERSION};

    const DEVICE: &str = "avx512-amd-25-17-l2-1024-l3-32768-t2";

    fn run() -> Run {
        Run {
            activation: ActivationType::Int8,
            kv: KvDType::F16,
            target: Target::Avx512,
            device: DEVICE.to_string(),
        }
    }

    #[test]
    fn every_place_of_a_model_is_covered() {
        let shape = presets::shape("smollm2-135m-awq", &[]).unwrap();
        let covered = coverage(&shape, &Lock::default(), &run()).unwrap();
        let specs = shape.kernel_specs();
        assert!(covered.iter().all(|one| specs.contains(&one.spec) && !one.is_measured()));
        let of = |places: &str| covered.iter().find(|one| one.places == places).unwrap();
        assert_eq!(spec_name(&of("layers 0-29 qkv").spec), "awq_gemm_n960_k576_g64_int8");
        let rows: Vec<Option<usize>> =
            of("head").explanations.iter().map(|one| one.rows_max).collect();
        assert_eq!(rows, [Some(1), Some(8), None]);
        assert!(of("head").is_named_by("gemm") && !of("head").is_named_by("awq_gemm"));
        let uses = uses(std::slice::from_ref(&shape)).unwrap();
        assert_eq!(uses["awq_gemm_n960_k576_g64_int8"], 30);
        assert_eq!(uses.len(), specs.len());
        assert!(uses.values().all(|count| *count > 0), "{uses:?}");
    }

    #[test]
    fn what_the_lock_has_measured_on_the_device_is_covered() {
        let shape = presets::shape("smollm2-135m-awq", &[]).unwrap();
        let locked = |device: &str| {
            let interval = LockedInterval {
                rows_max: None,
                symbol: "sample_v49152__avx512".to_string(),
                provenance: "default".to_string(),
                us: 1.0,
                default_us: 1.0,
                runner_up: None,
                runner_up_us: None,
                margin: 0.0,
            };
            let problem = LockedProblem {
                spec: "sample_v49152".to_string(),
                target: "avx512".to_string(),
                device: device.to_string(),
                intervals: vec![interval],
            };
            Lock { version: VERSION, problems: vec![problem], ..Lock::default() }
        };
        let us = |lock: &Lock| {
            let covered = coverage(&shape, lock, &run()).unwrap();
            covered.iter().find(|one| one.places == "sampling").unwrap().explanations[0].us
        };
        assert_eq!(us(&locked(DEVICE)), 1.0);
        assert_eq!(us(&locked("avx512-amd-25-17-l2-512-l3-32768-t2")), 0.0);
    }

    #[test]
    fn numbers_are_put_together() {
        for (numbers, text) in [(&[][..], ""), (&[3], "3"), (&[0, 1, 2, 5, 7, 8], "0-2,5,7-8")] {
            assert_eq!(ranges(numbers), text);
        }
    }
}
