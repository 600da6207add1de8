//! The kernels of one model, looked up once.

use bespoke_kernel_gen::config::KernelConfig;
use bespoke_kernel_gen::plan::KernelVariant;
use bespoke_kernel_gen::spec::{DType, KernelSpec, LinearRole, ModelShape, RowFormat, RowRegime};
use bespoke_kernel_gen::target::Target;

use super::CpuOptions;
use crate::error::Error;
use crate::kernels::abi::{
    AwqGemmArgs, EmbedArgs, GemmArgs, PagedAttentionArgs, QuantizeArgs, RmsNormArgs, RopeArgs,
    SampleArgs, Share, SiluAndMulArgs,
};
use crate::kernels::{Kernel, KernelFn, KernelTable};

/// An entry point, typed by its arguments.
pub(super) type Run<A> = unsafe fn(&A, Share);

/// One entry per row regime.
#[derive(Clone, Copy)]
pub(super) struct Regimes<A> {
    one: Run<A>,
    few: Run<A>,
    many: Run<A>,
}

impl<A> Regimes<A> {
    pub(super) fn of(&self, num_rows: usize) -> Run<A> {
        match num_rows {
            0 | 1 => self.one,
            2..=RowRegime::FEW_MAX => self.few,
            _ => self.many,
        }
    }
}

/// How a linear's weights are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Weights {
    Dense(DType),
    /// Inputs that share a packed scale and zero.
    Awq {
        group: usize,
    },
}

#[derive(Clone, Copy)]
pub(super) enum Matmul {
    Gemm(Regimes<GemmArgs>),
    AwqGemm(Regimes<AwqGemmArgs>),
}

/// What serves one linear.
#[derive(Clone, Copy)]
pub(super) struct LinearKernels {
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
    linears: Vec<(LinearRole, LinearKernels)>,
    norms: Vec<(RowFormat, Run<RmsNormArgs>)>,
    pub(super) embed: Run<EmbedArgs>,
    pub(super) rope: Run<RopeArgs>,
    pub(super) decode: Run<PagedAttentionArgs>,
    pub(super) prefill: Run<PagedAttentionArgs>,
    pub(super) silu_and_mul: Run<SiluAndMulArgs>,
    /// Where attention's rows must become int8.
    pub(super) quantize: Option<Run<QuantizeArgs>>,
    pub(super) sample: Run<SampleArgs>,
}

const ROLES: [LinearRole; 5] =
    [LinearRole::Qkv, LinearRole::O, LinearRole::GateUp, LinearRole::Down, LinearRole::Head];

impl Kernels {
    pub(super) fn linear(&self, role: LinearRole) -> &LinearKernels {
        // Every role is looked up in `find`.
        &self.linears.iter().find(|(found, _)| *found == role).expect("all roles have kernels").1
    }

    pub(super) fn norm(&self, rows: RowFormat) -> Run<RmsNormArgs> {
        // The norms of all roles' row formats are looked up in `find`.
        self.norms.iter().find(|(found, _)| *found == rows).expect("all formats have norms").1
    }

    /// Looks up everything `shape` needs on `target`.
    pub(super) fn find(
        table: &KernelTable,
        shape: &ModelShape,
        target: Target,
        options: &CpuOptions,
    ) -> Result<Kernels, Error> {
        let mut lookup = Lookup { table, target, missing: Vec::new(), scratch_bytes: 0 };
        let mut linears = Vec::new();
        let mut norms = Vec::new();
        for role in ROLES {
            let spec = shape.linear_kernel(role, options.activation)?;
            let rows = shape.linear_rows(role, options.activation);
            linears.push((role, lookup.linear(spec, rows)));
            let reads_norm =
                matches!(role, LinearRole::Qkv | LinearRole::GateUp | LinearRole::Head);
            if reads_norm && !norms.iter().any(|(found, _)| *found == rows) {
                let spec = KernelSpec::RmsNorm { hidden: shape.hidden_size, out: rows };
                norms.push((rows, lookup.any(spec).map(rms_norm)));
            }
        }
        let small = SmallOps::find(&mut lookup, shape, options);
        lookup.finish(shape)?;
        // Nothing is missing, so every lookup holds a kernel.
        let found = "finish() reported no missing kernel";
        Ok(Kernels {
            target,
            scratch_bytes: lookup.scratch_bytes.max(64),
            linears: linears.into_iter().map(|(role, l)| (role, l.expect(found))).collect(),
            norms: norms.into_iter().map(|(rows, norm)| (rows, norm.expect(found))).collect(),
            embed: small.embed.expect(found),
            rope: small.rope.expect(found),
            decode: small.decode.expect(found),
            prefill: small.prefill.expect(found),
            silu_and_mul: small.silu_and_mul.expect(found),
            quantize: small.quantize,
            sample: small.sample.expect(found),
        })
    }
}

struct SmallOps {
    embed: Option<Run<EmbedArgs>>,
    rope: Option<Run<RopeArgs>>,
    decode: Option<Run<PagedAttentionArgs>>,
    prefill: Option<Run<PagedAttentionArgs>>,
    silu_and_mul: Option<Run<SiluAndMulArgs>>,
    quantize: Option<Run<QuantizeArgs>>,
    sample: Option<Run<SampleArgs>>,
}

impl SmallOps {
    fn find(lookup: &mut Lookup<'_>, shape: &ModelShape, options: &CpuOptions) -> SmallOps {
        let attention = shape.paged_attention_kernel(options.kv_dtype);
        let down_rows = shape.linear_rows(LinearRole::Down, options.activation);
        let silu_and_mul =
            KernelSpec::SiluAndMul { intermediate: shape.intermediate_size, out: down_rows };
        let quantize = match shape.linear_rows(LinearRole::O, options.activation) {
            RowFormat::F32 => None,
            RowFormat::I8 { group } => Some(KernelSpec::Quantize { k: shape.o.k, group }),
        };
        let embed = KernelSpec::Embed { hidden: shape.hidden_size, dtype: shape.dtype };
        SmallOps {
            embed: lookup.any(embed).map(|kernel| match kernel.run {
                KernelFn::Embed(run) => run,
                _ => mismatch(kernel),
            }),
            rope: lookup.any(shape.rope_kernel(options.kv_dtype)).map(|kernel| match kernel.run {
                KernelFn::Rope(run) => run,
                _ => mismatch(kernel),
            }),
            decode: lookup.regime(attention, RowRegime::One).map(paged_attention),
            prefill: lookup.regime(attention, RowRegime::Many).map(paged_attention),
            silu_and_mul: lookup.any(silu_and_mul).map(|kernel| match kernel.run {
                KernelFn::SiluAndMul(run) => run,
                _ => mismatch(kernel),
            }),
            quantize: quantize.and_then(|spec| lookup.any(spec)).map(|kernel| match kernel.run {
                KernelFn::Quantize(run) => run,
                _ => mismatch(kernel),
            }),
            sample: lookup.any(KernelSpec::Sample { vocab: shape.vocab_size }).map(|kernel| {
                match kernel.run {
                    KernelFn::Sample(run) => run,
                    _ => mismatch(kernel),
                }
            }),
        }
    }
}

fn mismatch(kernel: &Kernel) -> ! {
    panic!("kernel {} has the entry of another op: the kernel table is inconsistent", kernel.symbol)
}

fn rms_norm(kernel: &'static Kernel) -> Run<RmsNormArgs> {
    match kernel.run {
        KernelFn::RmsNorm(run) => run,
        _ => mismatch(kernel),
    }
}

fn paged_attention(kernel: &'static Kernel) -> Run<PagedAttentionArgs> {
    match kernel.run {
        KernelFn::PagedAttention(run) => run,
        _ => mismatch(kernel),
    }
}

fn gemm(kernel: &'static Kernel) -> Run<GemmArgs> {
    match kernel.run {
        KernelFn::Gemm(run) => run,
        _ => mismatch(kernel),
    }
}

fn awq_gemm(kernel: &'static Kernel) -> Run<AwqGemmArgs> {
    match kernel.run {
        KernelFn::AwqGemm(run) => run,
        _ => mismatch(kernel),
    }
}

/// Finds kernels and remembers those that are missing.
struct Lookup<'a> {
    table: &'a KernelTable,
    target: Target,
    missing: Vec<String>,
    scratch_bytes: usize,
}

impl Lookup<'_> {
    fn regime(&mut self, spec: KernelSpec, regime: RowRegime) -> Option<&'static Kernel> {
        let kernel = self.table.find(&spec, regime, self.target);
        match kernel {
            Some(kernel) => self.scratch_bytes = self.scratch_bytes.max(kernel.scratch_bytes),
            None => {
                let config = KernelConfig::default_for(&spec, regime, self.target);
                let variant = KernelVariant { spec, regime, target: self.target, config };
                self.missing.push(variant.symbol());
            }
        }
        kernel
    }

    fn any(&mut self, spec: KernelSpec) -> Option<&'static Kernel> {
        self.regime(spec, RowRegime::Any)
    }

    fn linear(&mut self, spec: KernelSpec, rows: RowFormat) -> Option<LinearKernels> {
        let one = self.regime(spec, RowRegime::One);
        let few = self.regime(spec, RowRegime::Few);
        let many = self.regime(spec, RowRegime::Many);
        let (one, few, many) = (one?, few?, many?);
        assert!(
            one.cols == few.cols && few.cols == many.cols,
            "the row regimes of {} want different panels",
            one.symbol
        );
        let (weights, matmul) = match spec {
            KernelSpec::AwqGemm { k, group, .. } => {
                let group = bespoke_kernel_gen::spec::activation_group(k, group)?;
                let regimes =
                    Regimes { one: awq_gemm(one), few: awq_gemm(few), many: awq_gemm(many) };
                (Weights::Awq { group }, Matmul::AwqGemm(regimes))
            }
            KernelSpec::Gemm { weight, .. } => {
                let regimes = Regimes { one: gemm(one), few: gemm(few), many: gemm(many) };
                (Weights::Dense(weight), Matmul::Gemm(regimes))
            }
            _ => unreachable!("a linear is served by a matmul"),
        };
        Some(LinearKernels { weights, cols: one.cols, rows, matmul })
    }

    fn finish(&self, shape: &ModelShape) -> Result<(), Error> {
        if self.missing.is_empty() {
            return Ok(());
        }
        let message = format!(
            "this binary was not built for {}: {} of its kernels for {} are missing; build one \
             that has them with `BESPOKE_MODEL=<model folder> cargo build --release`, or run \
             without generated kernels, slowly, with `--backend reference`",
            shape.name,
            self.missing.len(),
            self.target.name()
        );
        Err(Error::MissingKernels { symbols: self.missing.clone(), message })
    }
}
