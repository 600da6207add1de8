//! Symbols: a variant's name, from which the variant can be read back.
//!
//! ```text
//! awq_gemm_n960_k576_g64_int8_few__avx512
//! op       sizes, formats      regime target     (Any has no regime; a configuration other than
//! awq_gemm_n960_k576_g64_int8_few_r8_c4_t2_u1_h1__avx512   the default is written out, but for
//!                                                          fields that are 0)
//! ```

use crate::config::{FIELDS, KernelConfig};
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
        for (field, value) in config.fields() {
            name.push_str(&format!("_{field}{value}"));
        }
    }
    format!("{name}__{}", target.name())
}

fn rows_name(out: RowFormat) -> String {
    match out {
        RowFormat::F32 => "f32".to_string(),
        RowFormat::I8 { group } => format!("int8_g{group}"),
        RowFormat::Bf16 => "bf16".to_string(),
    }
}

/// The name of a spec, with which its symbols begin: `awq_gemm_n960_k576_g64_int8`.
pub fn spec_name(spec: &KernelSpec) -> String {
    let op = spec.op();
    match *spec {
        KernelSpec::Embed { hidden, dtype } => format!("{op}_h{hidden}_{}", dtype.name()),
        KernelSpec::RmsNorm { hidden, out } => format!("{op}_h{hidden}_{}", rows_name(out)),
        KernelSpec::Gemm { n, k, weight } => format!("{op}_n{n}_k{k}_{}", weight.name()),
        KernelSpec::GemmBf16 { n, k } => format!("{op}_n{n}_k{k}"),
        KernelSpec::AwqGemm { n, k, group, activation } => {
            format!("{op}_n{n}_k{k}_g{group}_{}", activation.name())
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
        KernelSpec::Quantize { k, out: RowFormat::I8 { group } } => format!("{op}_k{k}_g{group}"),
        KernelSpec::Quantize { k, out } => format!("{op}_k{k}_{}", rows_name(out)),
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
            "bf16" => Some(RowFormat::Bf16),
            _ => None,
        }
    }

    /// The rows that `quantize` makes: `g64` for int8.
    fn quantized_rows(&mut self) -> Option<RowFormat> {
        match self.take("bf16") {
            true => Some(RowFormat::Bf16),
            false => Some(RowFormat::I8 { group: self.size("g")? }),
        }
    }

    pub(crate) fn group(&mut self) -> Option<GroupSize> {
        if self.take("gchannel") {
            return Some(GroupSize::Channel);
        }
        Some(GroupSize::Of(self.size("g")?))
    }

    fn activation(&mut self) -> Option<ActivationType> {
        ActivationType::from_name(self.0.next()?)
    }

    fn regime(&mut self) -> RowRegime {
        [RowRegime::One, RowRegime::Few, RowRegime::Many]
            .into_iter()
            .find(|regime| self.take(regime.name()))
            .unwrap_or(RowRegime::Any)
    }
}

/// A name that begins with another op's stands before it.
const OPS: [&str; 10] = [
    "embed",
    "rms_norm",
    "gemm_bf16",
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
    let (op, mut words) = read_op(name)?;
    let spec = read_spec(op, &mut words)?;
    let regime = words.regime();
    let config = if words.is_empty() {
        KernelConfig::default_for(&spec, regime, target)
    } else {
        KernelConfig::from_values(FIELDS.map(|field| words.size_if(field).unwrap_or(0)))
    };
    let variant = KernelVariant { spec, regime, target, config };
    // NOTE: leftover words, leading zeros and the like do not survive the way back.
    (words.is_empty() && symbol(&variant) == text).then_some(variant)
}

/// The spec that `text` names; `None` for anything [`spec_name`] does not write.
pub fn parse_spec(text: &str) -> Option<KernelSpec> {
    let (op, mut words) = read_op(text)?;
    let spec = read_spec(op, &mut words)?;
    (words.is_empty() && spec_name(&spec) == text).then_some(spec)
}

/// The op that a name begins with, and the words behind it.
fn read_op(name: &str) -> Option<(&'static str, Words<'_>)> {
    let op = OPS
        .into_iter()
        .find(|op| name.strip_prefix(op).is_some_and(|rest| rest.starts_with('_')))?;
    Some((op, Words::new(&name[op.len() + 1..])))
}

fn read_spec(op: &str, words: &mut Words<'_>) -> Option<KernelSpec> {
    // NOTE: fields are evaluated in the order they are written, the order of the words.
    Some(match op {
        "embed" => KernelSpec::Embed { hidden: words.size("h")?, dtype: words.dtype()? },
        "rms_norm" => KernelSpec::RmsNorm { hidden: words.size("h")?, out: words.rows()? },
        "gemm" => {
            KernelSpec::Gemm { n: words.size("n")?, k: words.size("k")?, weight: words.dtype()? }
        }
        "gemm_bf16" => KernelSpec::GemmBf16 { n: words.size("n")?, k: words.size("k")? },
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
        "quantize" => KernelSpec::Quantize { k: words.size("k")?, out: words.quantized_rows()? },
        _ => KernelSpec::Sample { vocab: words.size("v")? },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_read_back() {
        for text in [
            "awq_gemm_n960_k576_g64_int8",
            "awq_gemm_n960_k576_gchannel_float",
            "gemm_n49152_k576_i8",
            "rope_h9_v3_d64_r64_p32_int8_qknorm",
            "paged_attention_h9_v3_d64_w0_p32_f16",
            "rms_norm_h576_int8_g64",
            "rms_norm_h576_bf16",
            "gemm_bf16_n960_k576",
            "quantize_k576_g64",
            "quantize_k576_bf16",
        ] {
            let spec = parse_spec(text).unwrap_or_else(|| panic!("{text}"));
            assert_eq!(spec_name(&spec), text);
        }
        for text in ["awq_gemm_n960_k576_g64", "gemm_n0960_k576_i8", "gemm_n1_k1_i8_few", "", "_"] {
            assert_eq!(parse_spec(text), None, "{text}");
        }
    }

    #[test]
    fn configurations_are_written_out() {
        let text = "awq_gemm_n960_k576_g64_int8_few_r8_c4_t2_u1_h1__avx512";
        let variant = parse(text).expect("a symbol");
        let KernelConfig { rows, cols, tiles, unroll, prefetch, split, halves } = variant.config;
        assert_eq!((rows, cols, tiles, unroll), (8, 4, 2, 1));
        assert_eq!((prefetch, split, halves), (0, 0, 1));
        assert_eq!(variant.symbol(), text);
        for text in [
            "awq_gemm_n960_k576_g64_int8_few_c4_r8__avx512",
            "awq_gemm_n960_k576_g64_int8_few_r8_c4_t2_u0__avx512",
            "awq_gemm_n960_k576_g64_int8_few_r8_c4_t2_x1__avx512",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
