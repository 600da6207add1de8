//! Symbols: a variant's name, from which the variant can be read back.
//!
//! ```text
//! awq_gemm_n960_k576_g64_int8_few__avx512
//! op       sizes, formats      regime target     (Any has no regime; a configuration other than
//! awq_gemm_n960_k576_g64_int8_few_r4_c2__avx512   the default is written out)
//! ```

use crate::config::KernelConfig;
use crate::cuda::{KvType, RowType};
use crate::plan::KernelVariant;
use crate::spec::{ActivationType, DType, GroupSize, KernelSpec, KvDType, RowFormat, RowRegime};
use crate::target::Target;

/// The symbol of a variant.
pub fn symbol(variant: &KernelVariant) -> String {
    let KernelVariant { spec, regime, target, config } = variant;
    let mut name = spec_name(spec);
    if *regime != RowRegime::Any {
        name.push('_');
        name.push_str(regime.name());
    }
    if *config != KernelConfig::default_for(spec, *regime, *target) {
        name.push_str(&format!("_r{}_c{}", config.rows, config.cols));
    }
    format!("{name}__{}", target.name())
}

fn rows_name(out: RowFormat) -> String {
    match out {
        RowFormat::F32 => "f32".to_string(),
        RowFormat::I8 { group } => format!("int8_g{group}"),
    }
}

/// A spec's name, which the symbols of its kernels begin with.
pub fn spec_name(spec: &KernelSpec) -> String {
    let op = spec.op();
    match *spec {
        KernelSpec::Embed { hidden, dtype } => format!("{op}_h{hidden}_{}", dtype.name()),
        KernelSpec::RmsNorm { hidden, out } => format!("{op}_h{hidden}_{}", rows_name(out)),
        KernelSpec::Gemm { n, k, weight } => format!("{op}_n{n}_k{k}_{}", weight.name()),
        KernelSpec::AwqGemm { n, k, group, activation } => {
            let activation = match activation {
                ActivationType::Float => "float",
                ActivationType::Int8 => "int8",
            };
            format!("{op}_n{n}_k{k}_g{group}_{activation}")
        }
        KernelSpec::Rope {
            num_heads,
            num_kv_heads,
            head_dim,
            rotary_dim,
            qk_norm,
            kv,
            page_size,
        } => {
            let norm = if qk_norm { "_qknorm" } else { "" };
            let heads = format!("{op}_h{num_heads}_v{num_kv_heads}_d{head_dim}");
            format!("{heads}_r{rotary_dim}_p{page_size}_{}{norm}", kv.name())
        }
        KernelSpec::PagedAttention { num_heads, num_kv_heads, head_dim, window, kv, page_size } => {
            let kv = kv.name();
            format!("{op}_h{num_heads}_v{num_kv_heads}_d{head_dim}_w{window}_p{page_size}_{kv}")
        }
        KernelSpec::SiluAndMul { intermediate, out } => {
            format!("{op}_i{intermediate}_{}", rows_name(out))
        }
        KernelSpec::Quantize { k, group } => format!("{op}_k{k}_g{group}"),
        KernelSpec::Sample { vocab } => format!("{op}_v{vocab}"),
    }
}

/// The words of a symbol, taken one after the other.
#[derive(Debug)]
pub struct Words<'a>(std::iter::Peekable<std::str::Split<'a, char>>);

impl<'a> Words<'a> {
    pub(crate) fn new(text: &'a str) -> Words<'a> {
        Words(text.split('_').peekable())
    }

    pub(crate) fn is_empty(&mut self) -> bool {
        self.0.peek().is_none()
    }

    /// The number behind `prefix` in the next word.
    pub(crate) fn size(&mut self, prefix: &str) -> Option<usize> {
        self.0.next()?.strip_prefix(prefix)?.parse().ok()
    }

    fn size_if(&mut self, prefix: &str) -> Option<usize> {
        let size = self.0.peek()?.strip_prefix(prefix)?.parse().ok()?;
        self.0.next();
        Some(size)
    }

    /// Whether the next word is `word`, which is passed then.
    pub(crate) fn take(&mut self, word: &str) -> bool {
        self.0.next_if_eq(&word).is_some()
    }

    pub(crate) fn row_type(&mut self) -> Option<RowType> {
        RowType::ALL.into_iter().find(|rows| self.take(rows.name()))
    }

    pub(crate) fn kv_type(&mut self) -> Option<KvType> {
        KvType::ALL.into_iter().find(|kv| self.take(kv.name()))
    }

    pub(crate) fn dtype(&mut self) -> Option<DType> {
        let word = self.0.next()?;
        [DType::F32, DType::F16, DType::BF16, DType::I8].into_iter().find(|d| d.name() == word)
    }

    fn kv(&mut self) -> Option<KvDType> {
        let word = self.0.next()?;
        KvDType::ALL.into_iter().find(|kv| kv.name() == word)
    }

    fn rows(&mut self) -> Option<RowFormat> {
        match self.0.next()? {
            "f32" => Some(RowFormat::F32),
            "int8" => Some(RowFormat::I8 { group: self.size("g")? }),
            _ => None,
        }
    }

    pub(crate) fn group(&mut self) -> Option<GroupSize> {
        if self.take("gchannel") {
            return Some(GroupSize::Channel);
        }
        Some(GroupSize::Of(self.size("g")?))
    }

    fn activation(&mut self) -> Option<ActivationType> {
        match self.0.next()? {
            "float" => Some(ActivationType::Float),
            "int8" => Some(ActivationType::Int8),
            _ => None,
        }
    }

    fn regime(&mut self) -> RowRegime {
        [RowRegime::One, RowRegime::Few, RowRegime::Many]
            .into_iter()
            .find(|regime| self.take(regime.name()))
            .unwrap_or(RowRegime::Any)
    }
}

const OPS: [&str; 9] = [
    "embed",
    "rms_norm",
    "gemm",
    "awq_gemm",
    "rope",
    "paged_attention",
    "silu_and_mul",
    "quantize",
    "sample",
];

/// The variant a symbol names; `None` for anything [`symbol`] does not write.
pub fn parse(text: &str) -> Option<KernelVariant> {
    let (name, target) = text.rsplit_once("__")?;
    let target = Target::from_name(target)?;
    let op = OPS
        .into_iter()
        .find(|op| name.strip_prefix(op).is_some_and(|rest| rest.starts_with('_')))?;
    let mut words = Words::new(&name[op.len() + 1..]);
    let spec = parse_spec(op, &mut words)?;
    let regime = words.regime();
    let config = match words.size_if("r") {
        Some(rows) => KernelConfig { rows, cols: words.size("c")? },
        None => KernelConfig::default_for(&spec, regime, target),
    };
    let variant = KernelVariant { spec, regime, target, config };
    // NOTE: leftover words, leading zeros and the like do not survive the way back.
    (words.is_empty() && symbol(&variant) == text).then_some(variant)
}

fn parse_spec(op: &str, words: &mut Words<'_>) -> Option<KernelSpec> {
    // NOTE: fields are evaluated in the order they are written, the order of the words.
    Some(match op {
        "embed" => KernelSpec::Embed { hidden: words.size("h")?, dtype: words.dtype()? },
        "rms_norm" => KernelSpec::RmsNorm { hidden: words.size("h")?, out: words.rows()? },
        "gemm" => {
            KernelSpec::Gemm { n: words.size("n")?, k: words.size("k")?, weight: words.dtype()? }
        }
        "awq_gemm" => KernelSpec::AwqGemm {
            n: words.size("n")?,
            k: words.size("k")?,
            group: words.group()?,
            activation: words.activation()?,
        },
        "rope" => KernelSpec::Rope {
            num_heads: words.size("h")?,
            num_kv_heads: words.size("v")?,
            head_dim: words.size("d")?,
            rotary_dim: words.size("r")?,
            page_size: words.size("p")?,
            kv: words.kv()?,
            qk_norm: words.take("qknorm"),
        },
        "paged_attention" => KernelSpec::PagedAttention {
            num_heads: words.size("h")?,
            num_kv_heads: words.size("v")?,
            head_dim: words.size("d")?,
            window: words.size("w")?,
            page_size: words.size("p")?,
            kv: words.kv()?,
        },
        "silu_and_mul" => {
            KernelSpec::SiluAndMul { intermediate: words.size("i")?, out: words.rows()? }
        }
        "quantize" => KernelSpec::Quantize { k: words.size("k")?, group: words.size("g")? },
        _ => KernelSpec::Sample { vocab: words.size("v")? },
    })
}
