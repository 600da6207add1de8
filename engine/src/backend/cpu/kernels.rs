//! The kernels of one model, looked up once.

use std::collections::BTreeSet;

use bespoke_kernel_gen::plan::{self, INTERVALS_MAX, Provenance};
use bespoke_kernel_gen::spec::{DType, KernelSpec, LinearRole, ModelShape, RowFormat};
use bespoke_kernel_gen::target::Target;

use super::CpuOptions;
use crate::error::Error;
use crate::kernels::abi::{
    AwqGemmArgs, EmbedArgs, GemmArgs, GemmBf16Args, PagedAttentionArgs, QuantizeArgs, RmsNormArgs,
    RopeArgs, SampleArgs, Share, SiluAndMulArgs,
};
use crate::kernels::choice::Choice;
use crate::kernels::{Kernel, KernelFn};

/// An entry point, typed by its arguments.
pub(super) type Run<A> = unsafe fn(&A, Share);

/// A kernel's entry, and its place in [`Kernels::used`].
pub(super) struct Entry<A> {
    pub(super) run: Run<A>,
    pub(super) idx: usize,
}

// NOTE: derived, these would ask the same of `A`.
impl<A> Clone for Entry<A> {
    fn clone(&self) -> Entry<A> {
        *self
    }
}

impl<A> Copy for Entry<A> {}

/// Entries by the row counts that they serve.
#[derive(Clone, Copy)]
pub(super) struct ByRows<A> {
    /// Largest row counts, ascending. Those of the last interval and of unused places are
    /// `usize::MAX`, so that the first that is large enough is always there.
    rows_max: [usize; INTERVALS_MAX],
    entries: [Entry<A>; INTERVALS_MAX],
}

impl<A> ByRows<A> {
    fn new(served: &Served, entry: impl Fn(Found) -> Entry<A>) -> ByRows<A> {
        // A serving has at least one interval, the last without a limit.
        let last = served.0[served.0.len() - 1].1;
        let mut all =
            ByRows { rows_max: [usize::MAX; INTERVALS_MAX], entries: [entry(last); INTERVALS_MAX] };
        for (idx, (rows_max, found)) in served.0.iter().enumerate() {
            all.rows_max[idx] = *rows_max;
            all.entries[idx] = entry(*found);
        }
        all
    }

    pub(super) fn of(&self, num_rows: usize) -> Entry<A> {
        let idx = self.rows_max.iter().position(|rows_max| num_rows <= *rows_max);
        // The last limit is `usize::MAX`.
        self.entries[idx.unwrap_or(INTERVALS_MAX - 1)]
    }
}

/// How a linear's weights are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Weights {
    Dense(DType),
    Bf16Pairs,
    /// Inputs that share a packed scale and zero.
    Awq {
        group: usize,
    },
}

#[derive(Clone, Copy)]
pub(super) enum Matmul {
    Gemm(ByRows<GemmArgs>),
    GemmBf16(ByRows<GemmBf16Args>),
    AwqGemm(ByRows<AwqGemmArgs>),
}

/// What serves a matmul.
pub(super) struct MatmulKernels {
    pub(super) weights: Weights,
    /// Tiles of a panel.
    pub(super) cols: usize,
    pub(super) matmul: Matmul,
}

/// What serves the linears of a role in one form.
#[derive(Clone, Copy)]
pub(super) struct LinearKernels {
    role: LinearRole,
    pub(super) weights: Weights,
    /// Tiles of a panel.
    pub(super) cols: usize,
    /// The form of the rows that the kernels read.
    pub(super) rows: RowFormat,
    pub(super) matmul: Matmul,
}

pub(super) struct Kernels {
    pub(super) target: Target,
    pub(super) scratch_bytes: usize,
    /// Every kernel that serves the model, once.
    pub(super) used: Vec<&'static Kernel>,
    /// Where the choices come from, one for each interval of what serves the model.
    pub(super) provenances: Vec<Provenance>,
    /// Of all roles, each in all of its forms.
    pub(super) linears: Vec<LinearKernels>,
    norms: Vec<(RowFormat, Entry<RmsNormArgs>)>,
    silu_and_muls: Vec<(RowFormat, Entry<SiluAndMulArgs>)>,
    pub(super) embed: Entry<EmbedArgs>,
    pub(super) rope: Entry<RopeArgs>,
    pub(super) decode: Entry<PagedAttentionArgs>,
    pub(super) prefill: Entry<PagedAttentionArgs>,
    /// Where attention's rows must take another form.
    pub(super) quantize: Option<Entry<QuantizeArgs>>,
    pub(super) sample: Entry<SampleArgs>,
}

impl Kernels {
    /// What serves a linear whose weights are quantized or not: the kernels of that form where the
    /// role has two, its only ones else.
    pub(super) fn linear_idx(&self, role: LinearRole, is_quantized: bool) -> usize {
        let of_role = |linear: &LinearKernels| linear.role == role;
        let fits = |linear: &LinearKernels| {
            of_role(linear) && matches!(linear.weights, Weights::Awq { .. }) == is_quantized
        };
        let idx = self.linears.iter().position(fits);
        let idx = idx.or_else(|| self.linears.iter().position(of_role));
        // Every role is looked up in `find`.
        idx.expect("all roles have kernels")
    }

    /// The forms of the rows that the linears `role` read.
    pub(super) fn row_formats(&self, role: LinearRole) -> Vec<RowFormat> {
        let of_role = self.linears.iter().filter(|linear| linear.role == role);
        of_role.map(|linear| linear.rows).collect()
    }

    pub(super) fn norm(&self, rows: RowFormat) -> Entry<RmsNormArgs> {
        // The norms of all roles' row formats are looked up in `find`.
        self.norms.iter().find(|(found, _)| *found == rows).expect("all formats have norms").1
    }

    pub(super) fn silu_and_mul(&self, rows: RowFormat) -> Entry<SiluAndMulArgs> {
        // As above.
        let found = self.silu_and_muls.iter().find(|(found, _)| *found == rows);
        found.expect("all formats have kernels").1
    }

    /// Looks up everything `shape` needs.
    pub(super) fn find(
        choice: Choice<'_>,
        shape: &ModelShape,
        options: &CpuOptions,
    ) -> Result<Kernels, Error> {
        let target = choice.target;
        let mut lookup = Lookup::new(choice);
        let mut linears = Vec::new();
        for role in LinearRole::ALL {
            for linear in shape.served_forms(role, options.activation) {
                let rows = linear.row_format(options.activation);
                linears.push(lookup.linear(role, linear.kernel(options.activation)?, rows));
            }
        }
        let rows_of = |roles: &[LinearRole]| row_formats(shape, options, roles);
        let mut norms = Vec::new();
        for out in rows_of(&[LinearRole::Qkv, LinearRole::GateUp, LinearRole::Head]) {
            let spec = KernelSpec::RmsNorm { hidden: shape.hidden_size, out };
            norms.push((out, lookup.any(spec).map(rms_norm)));
        }
        let mut silu_and_muls = Vec::new();
        for out in rows_of(&[LinearRole::Down]) {
            let spec = KernelSpec::SiluAndMul { intermediate: shape.intermediate_size, out };
            silu_and_muls.push((out, lookup.any(spec).map(silu_and_mul)));
        }
        let small = SmallOps::find(&mut lookup, shape, options);
        lookup.finish(shape)?;
        // Nothing is missing, so every lookup holds a kernel.
        let found = "finish() reported no missing kernel";
        Ok(Kernels {
            target,
            scratch_bytes: lookup.scratch_bytes.max(64),
            used: lookup.used,
            provenances: lookup.provenances,
            linears: linears.into_iter().map(|linear| linear.expect(found)).collect(),
            norms: norms.into_iter().map(|(rows, norm)| (rows, norm.expect(found))).collect(),
            silu_and_muls: silu_and_muls.into_iter().map(|(r, s)| (r, s.expect(found))).collect(),
            embed: small.embed.expect(found),
            rope: small.rope.expect(found),
            decode: small.decode.expect(found),
            prefill: small.prefill.expect(found),
            quantize: small.quantize,
            sample: small.sample.expect(found),
        })
    }
}

struct SmallOps {
    embed: Option<Entry<EmbedArgs>>,
    rope: Option<Entry<RopeArgs>>,
    decode: Option<Entry<PagedAttentionArgs>>,
    prefill: Option<Entry<PagedAttentionArgs>>,
    quantize: Option<Entry<QuantizeArgs>>,
    sample: Option<Entry<SampleArgs>>,
}

impl SmallOps {
    fn find(lookup: &mut Lookup<'_>, shape: &ModelShape, options: &CpuOptions) -> SmallOps {
        let attention = lookup.served(shape.paged_attention_kernel(options.kv_dtype));
        let o_rows = row_formats(shape, options, &[LinearRole::O]);
        let quantize_spec = o_rows.into_iter().find_map(|rows| match rows {
            RowFormat::F32 => None,
            out => Some(KernelSpec::Quantize { k: shape.o.k, out }),
        });
        let spec = KernelSpec::Embed { hidden: shape.hidden_size, dtype: shape.dtype };
        let sample_spec = KernelSpec::Sample { vocab: shape.vocab_size };
        SmallOps {
            embed: lookup.any(spec).map(embed),
            rope: lookup.any(shape.rope_kernel(options.kv_dtype)).map(rope),
            decode: attention.as_ref().map(|served| paged_attention(served.of(1))),
            prefill: attention.as_ref().map(|served| paged_attention(served.of(usize::MAX))),
            quantize: quantize_spec.and_then(|spec| lookup.any(spec)).map(quantize),
            sample: lookup.any(sample_spec).map(sample),
        }
    }
}

/// The forms of the rows that the linears `roles` read, each once.
fn row_formats(
    shape: &ModelShape,
    options: &CpuOptions,
    roles: &[LinearRole],
) -> BTreeSet<RowFormat> {
    let forms = roles.iter().flat_map(|role| shape.served_forms(*role, options.activation));
    forms.map(|linear| linear.row_format(options.activation)).collect()
}

/// A kernel and its place in [`Kernels::used`].
#[derive(Clone, Copy)]
pub(super) struct Found {
    kernel: &'static Kernel,
    idx: usize,
}

/// Functions from a found kernel to its entry, typed by the op that each is named after.
macro_rules! entries {
    ($($op:ident: $variant:ident($args:ty);)*) => {
        $(pub(super) fn $op(found: Found) -> Entry<$args> {
            match found.kernel.run {
                KernelFn::$variant(run) => Entry { run, idx: found.idx },
                _ => panic!(
                    "kernel {} has the entry of another op: the kernel table is inconsistent",
                    found.kernel.symbol
                ),
            }
        })*
    };
}

entries! {
    awq_gemm: AwqGemm(AwqGemmArgs);
    embed: Embed(EmbedArgs);
    gemm: Gemm(GemmArgs);
    gemm_bf16: GemmBf16(GemmBf16Args);
    paged_attention: PagedAttention(PagedAttentionArgs);
    quantize: Quantize(QuantizeArgs);
    rms_norm: RmsNorm(RmsNormArgs);
    rope: Rope(RopeArgs);
    sample: Sample(SampleArgs);
    silu_and_mul: SiluAndMul(SiluAndMulArgs);
}

/// What serves a spec, by ascending row counts; at least one interval, the last without a limit.
pub(super) struct Served(Vec<(usize, Found)>);

impl Served {
    pub(super) fn of(&self, num_rows: usize) -> Found {
        let found = self.0.iter().find(|(rows_max, _)| num_rows <= *rows_max);
        found.expect("the last interval of a serving has no limit").1
    }
}

/// Finds kernels and remembers those that are missing.
pub(super) struct Lookup<'a> {
    choice: Choice<'a>,
    missing: Vec<String>,
    /// Most that a found kernel wants.
    pub(super) scratch_bytes: usize,
    used: Vec<&'static Kernel>,
    provenances: Vec<Provenance>,
}

impl<'a> Lookup<'a> {
    pub(super) fn new(choice: Choice<'a>) -> Lookup<'a> {
        Lookup {
            choice,
            missing: Vec::new(),
            scratch_bytes: 0,
            used: Vec::new(),
            provenances: Vec::new(),
        }
    }

    pub(super) fn served(&mut self, spec: KernelSpec) -> Option<Served> {
        let Some(chosen) = self.choice.serving(&spec) else {
            let serving = plan::Serving::default_for(&spec, self.choice.target);
            let intervals = serving.intervals.iter();
            self.missing.extend(intervals.map(|interval| interval.variant.symbol()));
            return None;
        };
        let mut found = Vec::new();
        for interval in chosen.serving.intervals {
            self.provenances.push(chosen.provenance(interval));
            match self.choice.table.kernel(interval.symbol) {
                Some(kernel) => found.push((interval.rows_max, self.found(kernel))),
                None => self.missing.push(interval.symbol.to_owned()),
            }
        }
        let is_complete = found.len() == chosen.serving.intervals.len();
        is_complete.then_some(Served(found))
    }

    fn found(&mut self, kernel: &'static Kernel) -> Found {
        self.scratch_bytes = self.scratch_bytes.max(kernel.scratch_bytes);
        // Layers of the same sizes share their kernels.
        let idx = self.used.iter().position(|used| used.symbol == kernel.symbol);
        let idx = idx.unwrap_or_else(|| {
            self.used.push(kernel);
            self.used.len() - 1
        });
        Found { kernel, idx }
    }

    pub(super) fn any(&mut self, spec: KernelSpec) -> Option<Found> {
        self.served(spec).map(|served| served.of(1))
    }

    fn linear(
        &mut self,
        role: LinearRole,
        spec: KernelSpec,
        rows: RowFormat,
    ) -> Option<LinearKernels> {
        let MatmulKernels { weights, cols, matmul } = self.matmul(spec)?;
        Some(LinearKernels { role, weights, cols, rows, matmul })
    }

    /// What serves a matmul at all row counts.
    pub(super) fn matmul(&mut self, spec: KernelSpec) -> Option<MatmulKernels> {
        let served = self.served(spec)?;
        let cols = served.of(1).kernel.cols;
        assert!(
            served.0.iter().all(|(_, found)| found.kernel.cols == cols),
            "the kernels that serve {spec:?} want different panels"
        );
        let (weights, matmul) = match spec {
            KernelSpec::AwqGemm { k, group, .. } => {
                let group = bespoke_kernel_gen::spec::activation_group(k, group)?;
                (Weights::Awq { group }, Matmul::AwqGemm(ByRows::new(&served, awq_gemm)))
            }
            KernelSpec::Gemm { weight, .. } => {
                (Weights::Dense(weight), Matmul::Gemm(ByRows::new(&served, gemm)))
            }
            KernelSpec::GemmBf16 { .. } => {
                (Weights::Bf16Pairs, Matmul::GemmBf16(ByRows::new(&served, gemm_bf16)))
            }
            _ => unreachable!("a linear is served by a matmul"),
        };
        Some(MatmulKernels { weights, cols, matmul })
    }

    /// Refuses what was not found.
    pub(super) fn finish(&self, shape: &ModelShape) -> Result<(), Error> {
        if self.missing.is_empty() {
            return Ok(());
        }
        let message = format!(
            "this binary was not built for {}: {} of its kernels for {} are missing; build one \
             that has them with `BESPOKE_MODEL=<model folder> cargo build --release`, or run \
             without generated kernels, slowly, with `--backend reference`",
            shape.name,
            self.missing.len(),
            self.choice.target.name()
        );
        Err(Error::MissingKernels { symbols: self.missing.clone(), message })
    }
}
