//! A variant → its source: the template function it instantiates, with which types and constants.

use std::fmt;

use crate::config::KernelConfig;
use crate::plan::KernelVariant;
use crate::spec::{
    ActivationType, DType, GroupSize, KernelSpec, KvDType, RowFormat, RowRegime, activation_group,
};
use crate::target::Target;

/// A generic argument of a template function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Argument {
    /// `S = Avx512`
    Type { parameter: &'static str, name: &'static str },
    /// `K = 576`
    Size { parameter: &'static str, value: usize },
    /// `QK_NORM = true`
    Flag { parameter: &'static str, value: bool },
}

/// One kernel's instantiation of a template function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    pub variant: KernelVariant,
    pub symbol: String,
    /// Function in the op's template.
    pub entry: &'static str,
    /// In the order of the function's parameters.
    pub arguments: Vec<Argument>,
}

impl Argument {
    pub fn parameter(&self) -> &'static str {
        match self {
            Argument::Type { parameter, .. }
            | Argument::Size { parameter, .. }
            | Argument::Flag { parameter, .. } => parameter,
        }
    }
}

impl fmt::Display for Argument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Argument::Type { parameter, name } => write!(f, "{parameter} = {name}"),
            Argument::Size { parameter, value } => write!(f, "{parameter} = {value}"),
            Argument::Flag { parameter, value } => write!(f, "{parameter} = {value}"),
        }
    }
}

impl Source {
    /// The kernel as Rust would call it: `gemm::one<S = V3, E = BF16, …>`.
    pub fn instantiation(&self) -> String {
        let arguments: Vec<String> = self.arguments.iter().map(Argument::to_string).collect();
        format!("{}::{}<{}>", self.variant.spec.op(), self.entry, arguments.join(", "))
    }

    /// The kernel's declaration for `kernels!`, with the hash of what it is made from.
    pub fn declaration(&self, source_hash: &str) -> String {
        let KernelVariant { spec, regime, target, config } = &self.variant;
        format!(
            "    kernel {symbol} {{\n        \
                 run: {run},\n        \
                 spec: {spec:?},\n        \
                 regime: {regime:?},\n        \
                 target: {target:?},\n        \
                 features: \"{features}\",\n        \
                 rows: {rows},\n        \
                 cols: {cols},\n        \
                 scratch_bytes: {scratch},\n        \
                 reduction_class: \"{class}\",\n        \
                 source_hash: \"{source_hash}\",\n    \
             }}\n",
            symbol = self.symbol,
            run = self.instantiation(),
            features = target.features(),
            rows = config.rows,
            cols = config.cols,
            scratch = self.variant.scratch_bytes(),
            class = self.variant.reduction_class(),
        )
    }
}

/// The source of one kernel.
pub fn render(variant: &KernelVariant) -> Source {
    let mut arguments = vec![simd(variant.target)];
    arguments.extend(arguments_of(variant));
    Source {
        variant: *variant,
        symbol: variant.symbol(),
        entry: entry(&variant.spec, variant.regime),
        arguments,
    }
}

fn simd(target: Target) -> Argument {
    let name = match target {
        Target::Portable => "Portable",
        Target::X86_64V3 => "V3",
        Target::Avx512 => "Avx512",
        Target::Neon => "Neon",
    };
    Argument::Type { parameter: "S", name }
}

fn entry(spec: &KernelSpec, regime: RowRegime) -> &'static str {
    let by_regime = |names: [&'static str; 3]| match regime {
        RowRegime::Any | RowRegime::One => names[0],
        RowRegime::Few => names[1],
        RowRegime::Many => names[2],
    };
    match spec {
        KernelSpec::Gemm { weight: DType::I8, .. }
        | KernelSpec::AwqGemm { activation: ActivationType::Int8, .. } => {
            by_regime(["int8_one", "int8_few", "int8_many"])
        }
        KernelSpec::Gemm { .. } | KernelSpec::GemmBf16 { .. } => by_regime(["one", "few", "many"]),
        KernelSpec::AwqGemm { .. } => by_regime(["float_one", "float_few", "float_many"]),
        KernelSpec::PagedAttention { .. } => by_regime(["decode", "decode", "prefill"]),
        _ => "run",
    }
}

fn element(dtype: DType) -> Argument {
    let name = match dtype {
        DType::F32 => "F32",
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        DType::I8 => unreachable!("is_feasible refuses int8 embeddings; int8 weights have no E"),
    };
    Argument::Type { parameter: "E", name }
}

fn kv_element(kv: KvDType) -> Argument {
    let name = match kv {
        KvDType::F32 => "KvF32",
        KvDType::F16 => "KvF16",
        KvDType::I8 => "KvI8",
        KvDType::I4 => "KvI4",
    };
    Argument::Type { parameter: "KV", name }
}

fn size(parameter: &'static str, value: usize) -> Argument {
    Argument::Size { parameter, value }
}

/// 0 stands for float32 rows, 1 for bfloat16 ones: `BF16_GROUP` of `bf16.rs`.
fn rows_group(out: RowFormat) -> Argument {
    let group = match out {
        RowFormat::F32 => 0,
        RowFormat::Bf16 => 1,
        RowFormat::I8 { group } => group,
    };
    size("GROUP", group)
}

fn arguments_of(variant: &KernelVariant) -> Vec<Argument> {
    let KernelConfig { rows, cols, tiles, unroll, prefetch, split, halves } = variant.config;
    let config = [
        size("COLS", cols),
        size("ROWS", rows),
        size("TILES", tiles),
        size("UNROLL", unroll),
        size("PREFETCH", prefetch),
        size("SPLIT", split),
        size("HALVES", halves),
    ];
    let int8_matmul = |n, k, group| {
        // NOTE: is_feasible has seen that there is a group.
        let group = activation_group(k, group).unwrap_or(0);
        let mut arguments = vec![size("N", n), size("K", k), size("GROUP", group)];
        arguments.extend(config.clone());
        arguments
    };
    match variant.spec {
        KernelSpec::Embed { hidden, dtype } => vec![element(dtype), size("HIDDEN", hidden)],
        KernelSpec::RmsNorm { hidden, out } => vec![size("HIDDEN", hidden), rows_group(out)],
        KernelSpec::Gemm { n, k, weight: DType::I8 } => int8_matmul(n, k, GroupSize::Channel),
        KernelSpec::Gemm { n, k, weight } => {
            let mut arguments = vec![element(weight), size("N", n), size("K", k)];
            arguments.extend(config.clone());
            arguments
        }
        KernelSpec::GemmBf16 { n, k } => {
            let mut arguments = vec![size("N", n), size("K", k)];
            arguments.extend(config.clone());
            arguments
        }
        KernelSpec::AwqGemm { n, k, group, .. } => int8_matmul(n, k, group),
        KernelSpec::Rope {
            num_heads,
            num_kv_heads,
            head_dim,
            rotary_dim,
            qk_norm,
            kv,
            page_size,
        } => vec![
            kv_element(kv),
            size("HEADS", num_heads),
            size("KV_HEADS", num_kv_heads),
            size("HEAD_DIM", head_dim),
            size("ROTARY_DIM", rotary_dim),
            size("PAGE", page_size),
            Argument::Flag { parameter: "QK_NORM", value: qk_norm },
        ],
        KernelSpec::PagedAttention { num_heads, num_kv_heads, head_dim, window, kv, page_size } => {
            vec![
                kv_element(kv),
                size("HEADS", num_heads),
                size("KV_HEADS", num_kv_heads),
                size("HEAD_DIM", head_dim),
                size("WINDOW", window),
                size("PAGE", page_size),
            ]
        }
        KernelSpec::SiluAndMul { intermediate, out } => {
            vec![size("INTERMEDIATE", intermediate), rows_group(out)]
        }
        KernelSpec::Quantize { k, out } => vec![size("K", k), rows_group(out)],
        KernelSpec::Sample { vocab } => vec![size("VOCAB", vocab)],
    }
}
