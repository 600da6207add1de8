//! Coverage: which kernel serves each linear and each op of a model, and whether it was measured.

use std::collections::BTreeMap;

use super::distance::{Distance, nearest};
use super::explain::Explanation;
use super::lock::Lock;
use crate::error::Error;
use crate::name::spec_name;
use crate::plan::{Plan, PlanOptions, Provenance, Serving, plan};
use crate::spec::{ActivationType, KernelSpec, KvDType, LinearRole, ModelShape, RowFormat};
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

/// An op of some layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// `layers 0-29`, `layer 3`, `model`
    pub layers: String,
    /// The role of a linear, or the op: `qkv`, `rms_norm`.
    pub op: &'static str,
    pub spec: KernelSpec,
}

/// What serves a place of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Covered {
    pub place: Place,
    pub explanations: Vec<Explanation>,
}

impl Covered {
    /// Whether all row counts are served by what was measured on the device.
    pub fn is_measured(&self) -> bool {
        let measured = Provenance::Measured.name();
        self.explanations.iter().all(|interval| interval.provenance == measured)
    }

    /// Whether a word names the spec, its op, or what its name begins with.
    pub fn is_named_by(&self, word: &str) -> bool {
        let spec = &self.place.spec;
        spec.op() == word || spec_name(spec) == word
    }
}

/// All places of a run of a model, as a build with this lock serves them: by what was chosen on the
/// device, else on the nearest of its family. What is stale in the lock is served by the defaults.
///
/// # Errors
/// A lock that no build can follow, or a model that cannot be run.
pub fn coverage(shape: &ModelShape, lock: &Lock, run: &Run) -> Result<Vec<Covered>, Error> {
    let options = PlanOptions { lock: Some(lock), ..PlanOptions::default() };
    let plan = plan(std::slice::from_ref(shape), &[run.target], &options)?;
    let covered = |place: Place| {
        let explanations = explanations(&place.spec, &plan, lock, run);
        Covered { place, explanations }
    };
    Ok(places(shape, run.activation, run.kv)?.into_iter().map(covered).collect())
}

fn explanations(spec: &KernelSpec, plan: &Plan, lock: &Lock, run: &Run) -> Vec<Explanation> {
    let own: Vec<&Serving> = plan.servings.iter().filter(|one| one.spec == *spec).collect();
    let keys = own.iter().filter_map(|serving| serving.device.as_deref());
    let (key, distance) = nearest(&run.device, keys).unzip();
    let Some(serving) = own.iter().find(|serving| serving.device.as_deref() == key) else {
        return vec![Explanation::missing()];
    };
    let problem = key.and_then(|key| lock.problem(&spec_name(spec), run.target.name(), key));
    let mut rows_min = 1;
    let mut all = Vec::new();
    for (idx, interval) in serving.intervals.iter().enumerate() {
        let provenance = match distance {
            Some(Distance::Exact) | None => interval.provenance,
            Some(_) => interval.provenance.transferred(),
        };
        let rows_max = (interval.rows_max < usize::MAX).then_some(interval.rows_max);
        let symbol = interval.variant.symbol();
        let plain = Explanation::unmeasured(rows_min, rows_max, symbol, provenance);
        let fact = problem.and_then(|problem| problem.intervals.get(idx));
        all.push(match (fact, key) {
            (Some(fact), Some(key)) => plain.with_times(fact, key),
            _ => plain,
        });
        rows_min = interval.rows_max.saturating_add(1);
    }
    all
}

/// All places of a model in the order of its data path; those of layers once for all layers that
/// have the same.
///
/// # Errors
/// A linear has no kernel.
pub fn places(
    shape: &ModelShape,
    activation: ActivationType,
    kv: KvDType,
) -> Result<Vec<Place>, Error> {
    let all = layers_text(0, shape.num_layers);
    let mut places = Vec::new();
    let mut add = |layers: &str, op, spec| {
        places.push(Place { layers: layers.to_string(), op, spec });
    };
    let embed = KernelSpec::Embed { hidden: shape.hidden_size, dtype: shape.dtype };
    add("model", embed.op(), embed);
    for role in LinearRole::ALL.into_iter().filter(|role| *role != LinearRole::Head) {
        let groups = groups(shape, role, activation)?;
        for (layers, rows, _) in &groups {
            if let Some(input) = shape.input_kernel(role, *rows) {
                add(layers, input.op(), input);
            }
        }
        groups.into_iter().for_each(|(layers, _, spec)| add(&layers, role.name(), spec));
        if role == LinearRole::Qkv {
            add(&all, "rope", shape.rope_kernel(kv));
            add(&all, "attention", shape.paged_attention_kernel(kv));
        }
    }
    let head = LinearRole::Head;
    if let Some(norm) = shape.input_kernel(head, shape.linear_rows(head, activation)) {
        add("model", norm.op(), norm);
    }
    add("model", head.name(), shape.linear_kernel(head, activation)?);
    let sample = KernelSpec::Sample { vocab: shape.vocab_size };
    add("model", sample.op(), sample);
    Ok(places)
}

/// Runs of layers with the same linear, the form of its rows, and its spec.
fn groups(
    shape: &ModelShape,
    role: LinearRole,
    activation: ActivationType,
) -> Result<Vec<(String, RowFormat, KernelSpec)>, Error> {
    let mut groups = Vec::new();
    let mut first = 0;
    for layer_idx in 0..shape.num_layers {
        let linear = shape.linear_in(role, layer_idx);
        let end = layer_idx + 1;
        if end < shape.num_layers && shape.linear_in(role, end) == linear {
            continue;
        }
        let rows = linear.row_format(activation);
        groups.push((layers_text(first, end), rows, linear.kernel(activation)?));
        first = end;
    }
    Ok(groups)
}

/// Layers `first..end` in words.
fn layers_text(first: usize, end: usize) -> String {
    match end - first {
        1 => format!("layer {first}"),
        _ => format!("layers {first}-{}", end.saturating_sub(1)),
    }
}

/// How often each spec is used by models, for all activations that they may have.
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
        let bf16 = shape.activations().iter().filter(|one| **one == ActivationType::Bf16);
        let all = [ActivationType::Float, ActivationType::Int8].iter().chain(bf16);
        for activation in all.copied() {
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
    use crate::tuning::lock::{LockedInterval, LockedProblem, LockedVariant, VERSION};

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
        assert!(covered.iter().all(|one| specs.contains(&one.place.spec) && !one.is_measured()));
        let of = |op: &str| covered.iter().find(|one| one.place.op == op).unwrap();
        assert_eq!(of("qkv").place.layers, "layers 0-29");
        assert_eq!(spec_name(&of("qkv").place.spec), "awq_gemm_n960_k576_g64_int8");
        let rows: Vec<Option<usize>> =
            of("head").explanations.iter().map(|one| one.rows_max).collect();
        assert_eq!(rows, [Some(1), Some(8), None]);
        assert!(of("head").is_named_by("gemm") && !of("head").is_named_by("awq_gemm"));
        let uses = uses(std::slice::from_ref(&shape)).unwrap();
        assert_eq!(uses["awq_gemm_n960_k576_g64_int8"], 30);
        assert_eq!(uses.len(), specs.len());
        assert!(uses.values().all(|count| *count > 0), "{uses:?}");
    }

    /// A lock that has chosen the default of sampling on a device.
    fn locked(device: &str, provenance: &str) -> Lock {
        let variant = Serving::default_for(&KernelSpec::Sample { vocab: 49152 }, Target::Avx512)
            .intervals[0]
            .variant;
        let interval = LockedInterval {
            rows_max: None,
            symbol: variant.symbol(),
            provenance: provenance.to_string(),
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
        let source_hash = crate::compile::hash(&crate::render::render(&variant));
        let certificate = LockedVariant {
            symbol: variant.symbol(),
            source_hash,
            certificate: "12".to_string(),
            compiler: "rustc".to_string(),
            code_bytes: 1,
        };
        let certificates = vec![certificate];
        Lock { version: VERSION, problems: vec![problem], certificates, ..Lock::default() }
    }

    fn sampling(lock: &Lock) -> Covered {
        let shape = presets::shape("smollm2-135m-awq", &[]).unwrap();
        let covered = coverage(&shape, lock, &run()).unwrap();
        covered.into_iter().find(|one| one.place.op == "sample").unwrap()
    }

    #[test]
    fn what_was_chosen_on_a_device_of_the_family_is_transferred() {
        let near = "avx512-amd-25-17-l2-512-l3-32768-t4";
        let check = |lock: &Lock, provenance: &str, chosen_on: Option<&str>| {
            let found = sampling(lock);
            let [one] = &found.explanations[..] else { panic!("{found:?}") };
            let found_on = one.chosen_on.as_deref();
            assert_eq!((one.provenance, found_on), (provenance, chosen_on));
            assert_eq!(one.us.is_some(), chosen_on.is_some());
            assert_eq!(found.is_measured(), provenance == "measured");
        };
        check(&locked(DEVICE, "measured"), "measured", Some(DEVICE));
        check(&locked(DEVICE, "model"), "model", Some(DEVICE));
        check(&locked(near, "measured"), "transferred", Some(near));
        check(&locked(near, "model"), "transferred", Some(near));
        check(&locked(near, "default"), "default", Some(near));
        check(&locked("avx512-intel-6-143-l2-2048-l3-1-t2", "measured"), "default", None);
        let mut both = locked(near, "measured");
        both.problems.extend(locked(DEVICE, "measured").problems);
        check(&both, "measured", Some(DEVICE));
        let mut stale = locked(near, "measured");
        stale.certificates[0].source_hash = "0".to_string();
        check(&stale, "default", None);
    }
}
