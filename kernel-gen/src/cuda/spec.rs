//! What a model needs computed on a GPU: the element types, the row regimes, and which ops at which
//! sizes (`ModelShape::cuda_specs`).

use std::collections::BTreeSet;

use super::op::Op;
use super::{AwqGemm, Embed, Gemm, PagedAttention, RmsNorm, Rope, Sample, SiluAndMul, Spec};
use crate::error::Error;
use crate::spec::{DType, KvDType, LinearRole, LinearShape, ModelShape, WeightFormat, check_group};

/// Element type of the rows that ops hand to each other, and of dense weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RowType {
    F16,
    BF16,
}

impl RowType {
    pub const ALL: [RowType; 2] = [RowType::F16, RowType::BF16];

    /// What a model of this type is run with: float32 weights are rounded to float16.
    pub fn of(dtype: DType) -> RowType {
        match dtype {
            DType::BF16 => RowType::BF16,
            DType::F32 | DType::F16 | DType::I8 => RowType::F16,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            RowType::F16 => "f16",
            RowType::BF16 => "bf16",
        }
    }

    /// The type in the templates.
    pub fn template(self) -> &'static str {
        match self {
            RowType::F16 => "F16",
            RowType::BF16 => "BF16",
        }
    }
}

/// What a matmul writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OutType {
    /// Elements of the rows' type.
    Rows,
    /// float32, of the head.
    F32,
}

/// Element type of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KvType {
    /// 16 bits, of the rows' type.
    Rows,
    /// Unsigned bytes with a scale and a minimum per token and head.
    I8,
    /// As `I8` in half a byte, over rotated heads.
    I4,
}

impl KvType {
    pub const ALL: [KvType; 3] = [KvType::Rows, KvType::I8, KvType::I4];

    /// What the engine's choice means here; float32 caches exist on the CPU only.
    pub fn of(dtype: KvDType) -> Option<KvType> {
        match dtype {
            KvDType::F32 => None,
            KvDType::F16 => Some(KvType::Rows),
            KvDType::I8 => Some(KvType::I8),
            KvDType::I4 => Some(KvType::I4),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            KvType::Rows => "kv16",
            KvType::I8 => "kv8",
            KvType::I4 => "kv4",
        }
    }

    /// Bits of one element.
    pub fn bits(self) -> usize {
        match self {
            KvType::Rows => 16,
            KvType::I8 => 8,
            KvType::I4 => 4,
        }
    }

    /// The type in the templates.
    pub fn template(self, rows: RowType) -> &'static str {
        match self {
            KvType::Rows => match rows {
                RowType::F16 => "pages::KvF16",
                RowType::BF16 => "pages::KvBF16",
            },
            KvType::I8 => "pages::KvI8",
            KvType::I4 => "pages::KvI4",
        }
    }
}

/// Row counts that a kernel is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Regime {
    /// Any row count: ops whose rows are independent and small.
    Any,
    /// `paged_attention` with one query row per sequence.
    Decode,
    /// `paged_attention` with several query rows per sequence.
    Prefill,
    /// A matmul of at most so many rows, one of [`Regime::UP_TO`].
    UpTo(usize),
    /// A matmul of more rows.
    Many,
}

impl Regime {
    /// Row limits of the matmuls that stream their weights.
    pub const UP_TO: [usize; 4] = [8, 16, 32, 64];

    pub const MATMUL: [Regime; 5] =
        [Regime::UpTo(8), Regime::UpTo(16), Regime::UpTo(32), Regime::UpTo(64), Regime::Many];

    /// The regime of a matmul of `rows` rows.
    pub fn of_rows(rows: usize) -> Regime {
        let limit = Regime::UP_TO.into_iter().find(|limit| rows <= *limit);
        limit.map_or(Regime::Many, Regime::UpTo)
    }

    /// Fewest rows.
    pub fn rows_min(self) -> usize {
        match self {
            Regime::UpTo(limit) => {
                let below = Regime::UP_TO.into_iter().filter(|other| *other < limit);
                below.max().unwrap_or(0) + 1
            }
            Regime::Many => Regime::UP_TO[Regime::UP_TO.len() - 1] + 1,
            Regime::Any | Regime::Decode | Regime::Prefill => 1,
        }
    }

    /// Most rows, where there is a limit.
    pub fn rows_max(self) -> Option<usize> {
        match self {
            Regime::UpTo(limit) => Some(limit),
            _ => None,
        }
    }

    /// Name in symbols; `Any` has none there.
    pub fn name(self) -> String {
        match self {
            Regime::Any => "any".to_string(),
            Regime::Decode => "decode".to_string(),
            Regime::Prefill => "prefill".to_string(),
            Regime::UpTo(limit) => format!("upto{limit}"),
            Regime::Many => "many".to_string(),
        }
    }
}

impl ModelShape {
    /// The type of the rows on a GPU.
    pub fn cuda_rows(&self) -> RowType {
        RowType::of(self.dtype)
    }

    /// The matmul that serves the linear `role` on a GPU, in the form of [`ModelShape::linear`].
    pub fn cuda_linear(&self, role: LinearRole) -> Result<Spec, Error> {
        self.cuda_matmul(role, self.linear(role))
    }

    /// The matmuls that serve the linear `role` on a GPU, one for each of its forms.
    pub fn cuda_linear_forms(&self, role: LinearRole) -> Result<Vec<Spec>, Error> {
        self.linear_forms(role).map(|linear| self.cuda_matmul(role, linear)).collect()
    }

    fn cuda_matmul(&self, role: LinearRole, linear: LinearShape) -> Result<Spec, Error> {
        let LinearShape { n, k, format, .. } = linear;
        let rows = self.cuda_rows();
        Ok(match format {
            WeightFormat::Dense(_) => {
                let out = if role == LinearRole::Head { OutType::F32 } else { OutType::Rows };
                Spec::Gemm(Gemm { n, k, rows, out })
            }
            WeightFormat::Awq(group) => {
                check_group(k, group)?;
                Spec::AwqGemm(AwqGemm { n, k, group, rows })
            }
        })
    }

    pub fn cuda_embed(&self) -> Spec {
        Spec::Embed(Embed { hidden: self.hidden_size, table: self.dtype })
    }

    pub fn cuda_rms_norm(&self) -> Spec {
        Spec::RmsNorm(RmsNorm { hidden: self.hidden_size, rows: self.cuda_rows() })
    }

    pub fn cuda_rope(&self, kv: KvType) -> Spec {
        Spec::Rope(Rope {
            num_heads: self.num_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            rotary_dim: self.rotary_dim,
            qk_norm: self.qk_norm,
            rows: self.cuda_rows(),
            kv,
            page_size: self.page_size,
        })
    }

    pub fn cuda_paged_attention(&self, kv: KvType) -> Spec {
        Spec::PagedAttention(PagedAttention {
            num_heads: self.num_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            window: self.sliding_window.unwrap_or(0),
            rows: self.cuda_rows(),
            kv,
            page_size: self.page_size,
        })
    }

    pub fn cuda_silu_and_mul(&self) -> Spec {
        Spec::SiluAndMul(SiluAndMul {
            intermediate: self.intermediate_size,
            rows: self.cuda_rows(),
        })
    }

    pub fn cuda_sample(&self) -> Spec {
        Spec::Sample(Sample { vocab: self.vocab_size })
    }

    /// Every kernel the model needs on a GPU, sorted, each once.
    pub fn cuda_specs(&self) -> Result<Vec<Spec>, Error> {
        let mut specs = BTreeSet::from([
            self.cuda_embed(),
            self.cuda_rms_norm(),
            self.cuda_silu_and_mul(),
            self.cuda_sample(),
        ]);
        for role in LinearRole::ALL {
            specs.extend(self.cuda_linear_forms(role)?);
        }
        for kv in KvType::ALL {
            specs.insert(self.cuda_rope(kv));
            specs.insert(self.cuda_paged_attention(kv));
        }
        Ok(specs.into_iter().collect())
    }
}

/// Sizes that no kernel can be made for.
pub(super) fn check_positive(sizes: &[(&str, usize)]) -> Result<(), String> {
    match sizes.iter().find(|(_, size)| *size == 0) {
        Some((name, _)) => Err(format!("{name} is 0")),
        None => Ok(()),
    }
}

/// Refuses a regime that the op has no kernel for.
pub(super) fn check_regime<O: Op>(regime: Regime) -> Result<(), String> {
    match O::REGIMES.contains(&regime) {
        true => Ok(()),
        false => Err(format!("{} has no kernel for row regime {}", O::NAME, regime.name())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_count_has_one_matmul() {
        for rows in 1..200 {
            let regime = Regime::of_rows(rows);
            assert!(Regime::MATMUL.contains(&regime));
            let fits = |regime: &&Regime| {
                regime.rows_min() <= rows && regime.rows_max().is_none_or(|max| rows <= max)
            };
            let found: Vec<&Regime> = Regime::MATMUL.iter().filter(fits).collect();
            assert_eq!(found, [&regime], "{rows} rows");
        }
    }

    #[test]
    fn an_awq_model_needs_these_kernels() {
        let shape = crate::presets::shape("llama-3.1-8b-awq", &[]).unwrap();
        let mut ops: Vec<&str> = shape.cuda_specs().unwrap().iter().map(Spec::op).collect();
        ops.dedup();
        let expected = [
            "awq_gemm",
            "embed",
            "gemm",
            "paged_attention",
            "rms_norm",
            "rope",
            "sample",
            "silu_and_mul",
        ];
        assert_eq!(ops, expected);
        let head = shape.cuda_linear(LinearRole::Head).unwrap();
        let rows = shape.cuda_rows();
        assert_eq!(head, Spec::Gemm(Gemm { n: 128256, k: 4096, rows, out: OutType::F32 }));
    }

    #[test]
    fn float32_models_run_in_float16() {
        let mut shape = crate::presets::shape("smollm2-135m", &[]).unwrap();
        shape.dtype = DType::F32;
        assert_eq!(shape.cuda_rows(), RowType::F16);
        assert_eq!(shape.cuda_embed(), Spec::Embed(Embed { hidden: 576, table: DType::F32 }));
    }
}
