//! The kernels of one model, looked up and loaded once, and those that are on trial.

use std::collections::BTreeMap;

use bespoke_kernel_gen::cuda::render::render;
use bespoke_kernel_gen::cuda::{Arch, Interval, KvType, Launch, Regime, Spec, Variant, Workspace};
use bespoke_kernel_gen::plan::Provenance;
use bespoke_kernel_gen::spec::{LinearRole, ModelShape};

use super::device::Device;
use crate::error::Error;

/// A loaded kernel.
pub(super) struct Kernel<K> {
    pub(super) variant: Variant,
    pub(super) run: K,
}

impl<K> Kernel<K> {
    pub(super) fn launch(&self, rows: usize, num_sms: usize) -> Launch {
        self.variant.launch(rows, num_sms)
    }
}

/// The kernels of one spec.
struct Served<K> {
    spec: Spec,
    /// Ascending; the last has no limit.
    intervals: Vec<ServedRows<K>>,
}

/// Row counts up to `rows_max`, and what serves them.
struct ServedRows<K> {
    rows_max: usize,
    kernel: Kernel<K>,
    provenance: Provenance,
}

/// Which of the specs serves the linears of a role in one form.
struct Linear {
    role: LinearRole,
    served_idx: usize,
}

pub(super) struct Kernels<K> {
    pub(super) num_sms: usize,
    /// Of all roles, each in all of its forms.
    linears: Vec<Linear>,
    /// Those of the ops below, in their order, and of the linears.
    served: Vec<Served<K>>,
    /// What may be tried in place of what serves.
    candidates: BTreeMap<Variant, Kernel<K>>,
    on_trial: Option<Variant>,
}

/// Ops that every model has once, in the order of [`Kernels::served`].
const EMBED: usize = 0;
const RMS_NORM: usize = 1;
const ROPE: usize = 2;
const ATTENTION: usize = 3;
const SILU_AND_MUL: usize = 4;
const SAMPLE: usize = 5;

impl<K> Kernels<K> {
    /// Loads everything `shape` needs.
    pub(super) fn load<D: Device<Kernel = K>>(
        device: &mut D,
        shape: &ModelShape,
        kv_type: KvType,
    ) -> Result<Kernels<K>, Error> {
        let mut specs = vec![
            shape.cuda_embed(),
            shape.cuda_rms_norm(),
            shape.cuda_rope(kv_type),
            shape.cuda_paged_attention(kv_type),
            shape.cuda_silu_and_mul(),
            shape.cuda_sample(),
        ];
        let mut linears = Vec::new();
        for role in LinearRole::ALL {
            for spec in shape.cuda_linear_forms(role)? {
                linears.push(Linear { role, served_idx: specs.len() });
                specs.push(spec);
            }
        }
        let servings = find(device, shape, &specs)?;
        let variants: Vec<Variant> =
            servings.iter().flatten().map(|interval| interval.variant).collect();
        let mut loaded = device.load(&variants)?.into_iter();
        let mut interval = |Interval { rows_max, variant, provenance }: Interval| {
            let run = loaded.next().expect("as many kernels as were asked for");
            ServedRows { rows_max, kernel: Kernel { variant, run }, provenance }
        };
        let served = specs.iter().zip(servings).map(|(spec, intervals)| Served {
            spec: *spec,
            intervals: intervals.into_iter().map(&mut interval).collect(),
        });
        let served = served.collect();
        let num_sms = device.info().num_sms;
        Ok(Kernels { num_sms, linears, served, candidates: BTreeMap::new(), on_trial: None })
    }

    /// Loads kernels that may be tried.
    pub(super) fn load_candidates<D: Device<Kernel = K>>(
        &mut self,
        device: &mut D,
        variants: &[Variant],
    ) -> Result<(), Error> {
        let loaded = device.load(variants)?;
        let kernels = variants.iter().zip(loaded);
        self.candidates.extend(kernels.map(|(variant, run)| {
            let variant = *variant;
            (variant, Kernel { variant, run })
        }));
        Ok(())
    }

    /// Takes a candidate, whatever the rows, in place of what serves its spec (of attention:
    /// decoding or prompts), until another call.
    pub(super) fn try_out(&mut self, candidate: Option<Variant>) {
        assert!(candidate.is_none_or(|variant| self.candidates.contains_key(&variant)));
        self.on_trial = candidate;
    }

    pub(super) fn embed(&self) -> &Kernel<K> {
        self.serving(EMBED, 1)
    }

    pub(super) fn rms_norm(&self) -> &Kernel<K> {
        self.serving(RMS_NORM, 1)
    }

    pub(super) fn rope(&self) -> &Kernel<K> {
        self.serving(ROPE, 1)
    }

    pub(super) fn decode(&self) -> &Kernel<K> {
        self.serving(ATTENTION, 1)
    }

    pub(super) fn prefill(&self) -> &Kernel<K> {
        self.serving(ATTENTION, usize::MAX)
    }

    pub(super) fn silu_and_mul(&self) -> &Kernel<K> {
        self.serving(SILU_AND_MUL, 1)
    }

    pub(super) fn sample(&self) -> &Kernel<K> {
        self.serving(SAMPLE, 1)
    }

    /// The kernel of a linear, by its [`Kernels::linear_idx`].
    pub(super) fn linear(&self, idx: usize, rows: usize) -> &Kernel<K> {
        self.serving(self.linears[idx].served_idx, rows)
    }

    pub(super) fn linear_spec(&self, idx: usize) -> &Spec {
        &self.served[self.linears[idx].served_idx].spec
    }

    fn serving(&self, idx: usize, rows: usize) -> &Kernel<K> {
        let Served { spec, intervals } = &self.served[idx];
        let is_of_call = |variant: &Variant| {
            let is_other_part =
                matches!(variant.regime, Regime::Decode | Regime::Prefill) && !variant.serves(rows);
            variant.spec() == *spec && !is_other_part
        };
        if let Some(variant) = self.on_trial.filter(is_of_call) {
            return &self.candidates[&variant];
        }
        let found = intervals.iter().find(|interval| rows <= interval.rows_max);
        &found.expect("the last interval of a serving has no limit").kernel
    }

    /// What serves a linear whose weights are quantized or not: the kernels of that form where the
    /// role has two, its only ones else.
    pub(super) fn linear_idx(&self, role: LinearRole, is_quantized: bool) -> usize {
        let of_role = |linear: &Linear| linear.role == role;
        let fits = |linear: &Linear| {
            let spec = &self.served[linear.served_idx].spec;
            of_role(linear) && matches!(spec, Spec::AwqGemm(_)) == is_quantized
        };
        let idx = self.linears.iter().position(fits);
        let idx = idx.or_else(|| self.linears.iter().position(of_role));
        idx.expect("the kernels of every role were loaded")
    }

    /// A hash of the sources of all kernels.
    pub(super) fn identity(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for kernel in self.all() {
            // What was compiled could be rendered; a source that cannot has only its name.
            let text = render(&kernel.variant).map_or_else(|_| kernel.variant.symbol(), |s| s.text);
            hasher.update(text.as_bytes());
        }
        hasher.finalize().to_string()
    }

    fn all(&self) -> impl Iterator<Item = &Kernel<K>> {
        let served = self.served.iter().flat_map(|served| &served.intervals);
        served.map(|interval| &interval.kernel)
    }

    /// Where the choice of what serves each interval of rows of each spec comes from.
    pub(super) fn provenances(&self) -> Vec<Provenance> {
        let served = self.served.iter().flat_map(|served| &served.intervals);
        served.map(|interval| interval.provenance).collect()
    }

    /// What any launch for up to `rows_max` rows and `items_max` items of attention needs.
    pub(super) fn workspace(&self, rows_max: usize, items_max: usize) -> Workspace {
        let of_kernel = |kernel: &Kernel<K>| {
            let limit = kernel.variant.regime.rows_max().unwrap_or(rows_max);
            kernel.variant.workspace(match kernel.variant.regime {
                Regime::Decode | Regime::Prefill => items_max,
                _ => limit.min(rows_max),
            })
        };
        let all = self.all().chain(self.candidates.values());
        all.map(of_kernel).fold(Workspace::default(), |all, one| Workspace {
            floats: all.floats.max(one.floats),
            counters: all.counters.max(one.counters),
        })
    }
}

/// What serves each of `specs`; an error names the kernels that are missing.
fn find<D: Device>(
    device: &D,
    shape: &ModelShape,
    specs: &[Spec],
) -> Result<Vec<Vec<Interval>>, Error> {
    let arch = device.info().arch;
    let mut found = Vec::new();
    let mut missing = Vec::new();
    for spec in specs {
        match device.serving(spec) {
            Some(serving) => found.push(serving.intervals),
            None => {
                let there = device.kernels(spec);
                let wanted = spec.regimes().iter().map(|regime| spec.variant(*regime, arch));
                let wanted = wanted.filter(|variant| !there.contains(variant));
                missing.extend(wanted.map(|variant| variant.symbol()));
            }
        }
    }
    match missing.is_empty() {
        true => Ok(found),
        false => Err(missing_kernels(shape, arch, missing)),
    }
}

fn missing_kernels(shape: &ModelShape, arch: Arch, symbols: Vec<String>) -> Error {
    let message = format!(
        "this binary was not built for {} on {}: {} of its kernels are missing; build one that has \
         them with `BESPOKE_MODEL=<model folder> BESPOKE_CUDA_TARGETS={} cargo build --release \
         --features cuda`, or run on the CPU with `--backend cpu`",
        shape.name,
        arch.name(),
        symbols.len(),
        arch.name()
    );
    Error::MissingKernels { symbols, message }
}
