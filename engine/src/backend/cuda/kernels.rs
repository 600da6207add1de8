//! The kernels of one model, looked up and loaded once.

use bespoke_kernel_gen::cuda::render::render;
use bespoke_kernel_gen::cuda::{Arch, KvType, Launch, Regime, Spec, Variant, Workspace};
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

/// The kernels of the linears of a role in one form, one for each of [`Regime::MATMUL`].
pub(super) struct Linear<K> {
    role: LinearRole,
    pub(super) spec: Spec,
    regimes: Vec<Kernel<K>>,
}

pub(super) struct Kernels<K> {
    pub(super) num_sms: usize,
    /// Of all roles, each in all of its forms.
    pub(super) linears: Vec<Linear<K>>,
    pub(super) embed: Kernel<K>,
    pub(super) rms_norm: Kernel<K>,
    pub(super) rope: Kernel<K>,
    pub(super) decode: Kernel<K>,
    pub(super) prefill: Kernel<K>,
    pub(super) silu_and_mul: Kernel<K>,
    pub(super) sample: Kernel<K>,
}

impl<K> Linear<K> {
    pub(super) fn of_rows(&self, rows: usize) -> &Kernel<K> {
        let regime = Regime::of_rows(rows);
        let found = self.regimes.iter().find(|kernel| kernel.variant.regime == regime);
        found.expect("a kernel of every regime was loaded")
    }
}

impl<K> Kernels<K> {
    /// Loads everything `shape` needs.
    pub(super) fn load<D: Device<Kernel = K>>(
        device: &mut D,
        shape: &ModelShape,
        kv_type: KvType,
    ) -> Result<Kernels<K>, Error> {
        let attention = shape.cuda_paged_attention(kv_type);
        let small = [
            (shape.cuda_embed(), Regime::Any),
            (shape.cuda_rms_norm(), Regime::Any),
            (shape.cuda_rope(kv_type), Regime::Any),
            (attention, Regime::Decode),
            (attention, Regime::Prefill),
            (shape.cuda_silu_and_mul(), Regime::Any),
            (shape.cuda_sample(), Regime::Any),
        ];
        let mut linears = Vec::new();
        for role in LinearRole::ALL {
            linears.extend(shape.cuda_linear_forms(role)?.into_iter().map(|spec| (role, spec)));
        }
        let matmuls =
            linears.iter().flat_map(|(_, spec)| Regime::MATMUL.map(|regime| (*spec, regime)));
        let variants = find(device, shape, small.into_iter().chain(matmuls))?;
        let loaded = device.load(&variants)?;
        let mut loaded = variants.into_iter().zip(loaded);
        let mut next = || {
            let (variant, run) = loaded.next().expect("as many kernels as were asked for");
            Kernel { variant, run }
        };
        Ok(Kernels {
            num_sms: device.info().num_sms,
            embed: next(),
            rms_norm: next(),
            rope: next(),
            decode: next(),
            prefill: next(),
            silu_and_mul: next(),
            sample: next(),
            linears: linears
                .into_iter()
                .map(|(role, spec)| {
                    let regimes = Regime::MATMUL.iter().map(|_| next()).collect();
                    Linear { role, spec, regimes }
                })
                .collect(),
        })
    }

    /// What serves a linear whose weights are quantized or not: the kernels of that form where the
    /// role has two, its only ones else.
    pub(super) fn linear_idx(&self, role: LinearRole, is_quantized: bool) -> usize {
        let of_role = |linear: &Linear<K>| linear.role == role;
        let fits = |linear: &Linear<K>| {
            of_role(linear) && matches!(linear.spec, Spec::AwqGemm(_)) == is_quantized
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
        let small = [
            &self.embed,
            &self.rms_norm,
            &self.rope,
            &self.decode,
            &self.prefill,
            &self.silu_and_mul,
            &self.sample,
        ];
        small.into_iter().chain(self.linears.iter().flat_map(|linear| &linear.regimes))
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
        self.all().map(of_kernel).fold(Workspace::default(), |all, one| Workspace {
            floats: all.floats.max(one.floats),
            counters: all.counters.max(one.counters),
        })
    }
}

/// The variants that serve `wanted`, in order; an error names those that are missing.
fn find<D: Device>(
    device: &D,
    shape: &ModelShape,
    wanted: impl Iterator<Item = (Spec, Regime)>,
) -> Result<Vec<Variant>, Error> {
    let arch = device.info().arch;
    let mut found = Vec::new();
    let mut missing = Vec::new();
    for (spec, regime) in wanted {
        match device.find(&spec, regime) {
            Some(variant) => found.push(variant),
            None => missing.push(spec.variant(regime, arch).symbol()),
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
