//! What a model needs computed: `ModelShape` and the `KernelSpec`s that follow from it.

mod forms;

use std::collections::BTreeSet;
use std::fmt;

use crate::error::Error;

/// Number of KV token slots in a page of the default build.
pub const PAGE_SIZE: usize = 32;

/// Page sizes that a build may choose: the keys of 16 tokens are one vector of the widest target.
pub const PAGE_SIZES: [usize; 3] = [16, 32, 64];

/// Element type of dense weights and of the embedding table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DType {
    F32,
    F16,
    BF16,
    /// Signed bytes with one scale per output channel.
    I8,
}

/// Element type of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KvDType {
    F32,
    F16,
    /// Unsigned bytes with a scale and a minimum per token and head.
    I8,
    /// As `I8` in half a byte, over rotated heads.
    I4,
}

/// Number of consecutive input weights that share a scale and a zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum GroupSize {
    /// `Of(g)`: every `g` input weights of an output.
    Of(usize),
    /// The whole input of an output (`group_size: -1` in checkpoints).
    Channel,
}

/// How the weights of one linear are stored in the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WeightFormat {
    Dense(DType),
    /// AWQ "gemm": 4 bits, a float16 scale and a 4-bit zero per group.
    Awq(GroupSize),
}

/// What a matmul multiplies its weights with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ActivationType {
    /// float32 rows as they are.
    Float,
    /// Rows of quantized linears rounded to signed bytes, one scale per row and group
    /// (absmax / 127); those of others as they are.
    Int8,
    /// Rows of bfloat16 linears rounded to bfloat16. There are no others in such a model.
    Bf16,
}

impl ActivationType {
    /// Name in options and symbols.
    pub const fn name(self) -> &'static str {
        match self {
            ActivationType::Float => "float",
            ActivationType::Int8 => "int8",
            ActivationType::Bf16 => "bf16",
        }
    }

    pub fn from_name(name: &str) -> Option<ActivationType> {
        let all = [ActivationType::Float, ActivationType::Int8, ActivationType::Bf16];
        all.into_iter().find(|activation| activation.name() == name)
    }
}

/// The form in which an op hands its rows to the next linear.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RowFormat {
    F32,
    /// int8 with one float32 scale and one int32 sum per row and group of `group` elements.
    I8 {
        group: usize,
    },
    /// bfloat16
    Bf16,
}

/// One linear of the decoder, by its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LinearRole {
    /// q, k and v as one matmul; outputs in this order.
    Qkv,
    /// The attention output projection.
    O,
    /// gate and up as one matmul; all gate outputs first.
    GateUp,
    Down,
    /// The language-model head.
    Head,
}

impl LinearRole {
    pub const ALL: [LinearRole; 5] =
        [LinearRole::Qkv, LinearRole::O, LinearRole::GateUp, LinearRole::Down, LinearRole::Head];

    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            LinearRole::Qkv => "qkv",
            LinearRole::O => "o",
            LinearRole::GateUp => "gate_up",
            LinearRole::Down => "down",
            LinearRole::Head => "head",
        }
    }
}

/// Sizes and format of one linear: `[rows, k] × [n, k]ᵀ → [rows, n]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinearShape {
    pub n: usize,
    pub k: usize,
    pub format: WeightFormat,
    pub bias: bool,
}

/// A linear of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinearPlace {
    pub layer_idx: usize,
    pub role: LinearRole,
}

/// All sizes of a model that its kernels depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelShape {
    pub name: String,
    pub num_layers: usize,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// Leading dimensions of a head that rotate; the rest pass through.
    pub rotary_dim: usize,
    pub qk_norm: bool,
    /// Attention looks back over this many tokens, itself included.
    pub sliding_window: Option<usize>,
    /// Type of embedding, norms and dense linears.
    pub dtype: DType,
    pub qkv: LinearShape,
    pub o: LinearShape,
    pub gate_up: LinearShape,
    pub down: LinearShape,
    pub head: LinearShape,
    /// Linears that are dense where other layers' are quantized, in order, each once.
    pub dense_linears: Vec<LinearPlace>,
    pub page_size: usize,
}

/// An op at fixed sizes. The sizes become constants of the generated kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KernelSpec {
    Embed {
        hidden: usize,
        dtype: DType,
    },
    /// `residual += delta; out = rms_norm(residual) · weight`
    RmsNorm {
        hidden: usize,
        out: RowFormat,
    },
    /// Dense matmul over float rows, or over int8 rows for `DType::I8` weights.
    Gemm {
        n: usize,
        k: usize,
        weight: DType,
    },
    /// Dense matmul of bfloat16 rows and weights.
    GemmBf16 {
        n: usize,
        k: usize,
    },
    /// Fused AWQ-dequant matmul.
    AwqGemm {
        n: usize,
        k: usize,
        group: GroupSize,
        activation: ActivationType,
    },
    /// QK-norm where the model has it, rotary embedding, and the append of K and V to their pages.
    Rope {
        num_heads: usize,
        num_kv_heads: usize,
        head_dim: usize,
        rotary_dim: usize,
        qk_norm: bool,
        kv: KvDType,
        page_size: usize,
    },
    PagedAttention {
        num_heads: usize,
        num_kv_heads: usize,
        head_dim: usize,
        /// 0 for full attention.
        window: usize,
        kv: KvDType,
        page_size: usize,
    },
    SiluAndMul {
        intermediate: usize,
        out: RowFormat,
    },
    /// Float rows to rows of another form, where no other op can do it on its way.
    Quantize {
        k: usize,
        out: RowFormat,
    },
    /// Maximum, its index and log-sum-exp of a row of logits.
    Sample {
        vocab: usize,
    },
}

/// Row counts a kernel variant is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RowRegime {
    /// Any row count: ops whose rows are independent and small.
    Any,
    /// Exactly one row (attention: one query row per sequence).
    One,
    /// 2 to [`RowRegime::FEW_MAX`] rows.
    Few,
    /// More rows than `Few` (attention: several query rows per sequence).
    Many,
}

impl RowRegime {
    /// Largest row count of [`RowRegime::Few`].
    pub const FEW_MAX: usize = 8;

    pub fn name(self) -> &'static str {
        match self {
            RowRegime::Any => "any",
            RowRegime::One => "one",
            RowRegime::Few => "few",
            RowRegime::Many => "many",
        }
    }
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::I8 => 1,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::I8 => "i8",
        }
    }
}

impl KvDType {
    pub const ALL: [KvDType; 4] = [KvDType::F32, KvDType::F16, KvDType::I8, KvDType::I4];

    pub fn name(self) -> &'static str {
        match self {
            KvDType::F32 => "f32",
            KvDType::F16 => "f16",
            KvDType::I8 => "int8",
            KvDType::I4 => "int4",
        }
    }

    /// Bits of one element.
    pub fn bits(self) -> usize {
        match self {
            KvDType::F32 => 32,
            KvDType::F16 => 16,
            KvDType::I8 => 8,
            KvDType::I4 => 4,
        }
    }
}

impl WeightFormat {
    /// Name in errors.
    fn name(self) -> &'static str {
        match self {
            WeightFormat::Dense(dtype) => dtype.name(),
            WeightFormat::Awq(_) => "4-bit",
        }
    }
}

impl GroupSize {
    /// Weights in a group of a linear with `k` inputs.
    pub fn of(self, k: usize) -> usize {
        match self {
            GroupSize::Of(g) => g,
            GroupSize::Channel => k,
        }
    }
}

impl fmt::Display for GroupSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GroupSize::Of(g) => write!(f, "{g}"),
            GroupSize::Channel => f.write_str("channel"),
        }
    }
}

/// Elements that share an int8 activation scale on a linear with `k` inputs and weight group
/// `group`: the weight group itself up to 128, else the largest of 128, 64, 32, 16, 8 dividing `k`.
pub fn activation_group(k: usize, group: GroupSize) -> Option<usize> {
    match group {
        GroupSize::Of(g) if g <= 128 => Some(g),
        _ => [128, 64, 32, 16, 8].into_iter().find(|g| k.is_multiple_of(*g)),
    }
}

/// Refuses a group size that does not divide `k`.
pub fn check_group(k: usize, group: GroupSize) -> Result<(), Error> {
    match group.of(k) {
        0 => Err(Error::GroupSize { group: 0, k }),
        size if !k.is_multiple_of(size) => Err(Error::GroupSize { group: size, k }),
        _ => Ok(()),
    }
}

impl KernelSpec {
    /// The op's name in templates, symbols and tables.
    pub fn op(&self) -> &'static str {
        match self {
            KernelSpec::Embed { .. } => "embed",
            KernelSpec::RmsNorm { .. } => "rms_norm",
            KernelSpec::Gemm { .. } => "gemm",
            KernelSpec::GemmBf16 { .. } => "gemm_bf16",
            KernelSpec::AwqGemm { .. } => "awq_gemm",
            KernelSpec::Rope { .. } => "rope",
            KernelSpec::PagedAttention { .. } => "paged_attention",
            KernelSpec::SiluAndMul { .. } => "silu_and_mul",
            KernelSpec::Quantize { .. } => "quantize",
            KernelSpec::Sample { .. } => "sample",
        }
    }

    /// The row counts the op has kernels for.
    pub fn regimes(&self) -> &'static [RowRegime] {
        match self {
            _ if self.is_matmul() => &[RowRegime::One, RowRegime::Few, RowRegime::Many],
            KernelSpec::PagedAttention { .. } => &[RowRegime::One, RowRegime::Many],
            _ => &[RowRegime::Any],
        }
    }

    /// Names and values of the sizes that become constants, without the group size.
    pub fn sizes(&self) -> Vec<(&'static str, usize)> {
        match *self {
            KernelSpec::Embed { hidden, .. } | KernelSpec::RmsNorm { hidden, .. } => {
                vec![("hidden", hidden)]
            }
            KernelSpec::Gemm { n, k, .. }
            | KernelSpec::GemmBf16 { n, k }
            | KernelSpec::AwqGemm { n, k, .. } => vec![("n", n), ("k", k)],
            KernelSpec::Rope {
                num_heads, num_kv_heads, head_dim, rotary_dim, page_size, ..
            } => vec![
                ("num_heads", num_heads),
                ("num_kv_heads", num_kv_heads),
                ("head_dim", head_dim),
                ("rotary_dim", rotary_dim),
                ("page_size", page_size),
            ],
            KernelSpec::PagedAttention {
                num_heads,
                num_kv_heads,
                head_dim,
                window,
                page_size,
                ..
            } => vec![
                ("num_heads", num_heads),
                ("num_kv_heads", num_kv_heads),
                ("head_dim", head_dim),
                ("window", window),
                ("page_size", page_size),
            ],
            KernelSpec::SiluAndMul { intermediate, .. } => vec![("intermediate", intermediate)],
            KernelSpec::Quantize { k, .. } => vec![("k", k)],
            KernelSpec::Sample { vocab } => vec![("vocab", vocab)],
        }
    }

    /// What the op reads or writes besides float32: weights, KV cache, or quantized rows.
    pub fn dtype(&self) -> &'static str {
        let rows = |out| match out {
            RowFormat::F32 => "f32",
            RowFormat::I8 { .. } => "int8",
            RowFormat::Bf16 => "bf16",
        };
        match *self {
            KernelSpec::Embed { dtype, .. } => dtype.name(),
            KernelSpec::Gemm { weight, .. } => weight.name(),
            KernelSpec::GemmBf16 { .. } => "bf16-bf16",
            KernelSpec::AwqGemm { activation: ActivationType::Int8, .. } => "int4-int8",
            KernelSpec::AwqGemm { .. } => "int4",
            KernelSpec::Rope { kv, .. } | KernelSpec::PagedAttention { kv, .. } => kv.name(),
            KernelSpec::RmsNorm { out, .. }
            | KernelSpec::SiluAndMul { out, .. }
            | KernelSpec::Quantize { out, .. } => rows(out),
            KernelSpec::Sample { .. } => "f32",
        }
    }

    /// Elements that share a scale in the op's weights or quantized rows.
    pub fn group_size(&self) -> Option<usize> {
        match *self {
            KernelSpec::AwqGemm { k, group, .. } => Some(group.of(k)),
            KernelSpec::RmsNorm { out: RowFormat::I8 { group }, .. }
            | KernelSpec::SiluAndMul { out: RowFormat::I8 { group }, .. }
            | KernelSpec::Quantize { out: RowFormat::I8 { group }, .. } => Some(group),
            _ => None,
        }
    }

    /// Whether the op is a matmul with packed weights.
    pub fn is_matmul(&self) -> bool {
        matches!(
            self,
            KernelSpec::Gemm { .. } | KernelSpec::GemmBf16 { .. } | KernelSpec::AwqGemm { .. }
        )
    }
}

impl ModelShape {
    /// The linear `role` as layers have it, but for those of `dense_linears`; see
    /// [`ModelShape::linear_in`].
    pub fn linear(&self, role: LinearRole) -> LinearShape {
        match role {
            LinearRole::Qkv => self.qkv,
            LinearRole::O => self.o,
            LinearRole::GateUp => self.gate_up,
            LinearRole::Down => self.down,
            LinearRole::Head => self.head,
        }
    }

    /// The matmul that serves the linear `role`. The head of a quantized model runs in int8 when
    /// activations do.
    pub fn linear_kernel(
        &self,
        role: LinearRole,
        activation: ActivationType,
    ) -> Result<KernelSpec, Error> {
        self.served_linear(role, activation).kernel(activation)
    }

    /// The form of the rows that [`ModelShape::linear_kernel`] reads.
    pub fn linear_rows(&self, role: LinearRole, activation: ActivationType) -> RowFormat {
        self.served_linear(role, activation).row_format(activation)
    }

    fn served_linear(&self, role: LinearRole, activation: ActivationType) -> LinearShape {
        match role {
            LinearRole::Head => self.head_for(activation),
            _ => self.linear(role),
        }
    }

    pub fn rope_kernel(&self, kv: KvDType) -> KernelSpec {
        KernelSpec::Rope {
            num_heads: self.num_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            rotary_dim: self.rotary_dim,
            qk_norm: self.qk_norm,
            kv,
            page_size: self.page_size,
        }
    }

    pub fn paged_attention_kernel(&self, kv: KvDType) -> KernelSpec {
        KernelSpec::PagedAttention {
            num_heads: self.num_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            window: self.sliding_window.unwrap_or(0),
            kv,
            page_size: self.page_size,
        }
    }

    /// Whether any linear of the layers is quantized.
    pub fn is_quantized(&self) -> bool {
        [self.qkv, self.o, self.gate_up, self.down]
            .iter()
            .any(|linear| matches!(linear.format, WeightFormat::Awq(_)))
    }
}

impl ModelShape {
    /// Every kernel the model needs, sorted, each once.
    ///
    /// A model gets kernels for each of [`ModelShape::activations`]; a quantized one its head in
    /// the checkpoint's type and in int8.
    pub fn kernel_specs(&self) -> Vec<KernelSpec> {
        let mut specs = BTreeSet::new();
        specs.insert(KernelSpec::Embed { hidden: self.hidden_size, dtype: self.dtype });
        specs.insert(KernelSpec::Sample { vocab: self.vocab_size });
        self.add_attention(&mut specs);
        for activation in self.activations() {
            self.add_linears(*activation, &mut specs);
        }
        specs.into_iter().collect()
    }

    fn add_attention(&self, specs: &mut BTreeSet<KernelSpec>) {
        for kv in KvDType::ALL {
            specs.insert(self.rope_kernel(kv));
            specs.insert(self.paged_attention_kernel(kv));
        }
    }

    /// The linears and the ops that make their inputs.
    fn add_linears(&self, activation: ActivationType, specs: &mut BTreeSet<KernelSpec>) {
        for role in LinearRole::ALL {
            for linear in self.served_forms(role, activation) {
                specs.insert(linear.kernel_spec(activation));
                specs.extend(self.input_kernel(role, linear.row_format(activation)));
            }
        }
    }

    /// The op that makes the rows which the linear `role` reads. Attention's are always float32,
    /// and another op brings them into another form.
    pub(crate) fn input_kernel(&self, role: LinearRole, out: RowFormat) -> Option<KernelSpec> {
        match (role, out) {
            (LinearRole::Qkv | LinearRole::GateUp | LinearRole::Head, out) => {
                Some(KernelSpec::RmsNorm { hidden: self.hidden_size, out })
            }
            (LinearRole::Down, out) => {
                Some(KernelSpec::SiluAndMul { intermediate: self.intermediate_size, out })
            }
            (LinearRole::O, RowFormat::F32) => None,
            // NOTE: attention's threads see heads, not whole rows, so they cannot quantize.
            (LinearRole::O, out) => Some(KernelSpec::Quantize { k: self.o.k, out }),
        }
    }

    /// The head as it is run: int8 with int8 activations in a quantized model, whatever the
    /// checkpoint holds.
    pub fn head_for(&self, activation: ActivationType) -> LinearShape {
        match activation {
            ActivationType::Int8 if self.is_quantized() => {
                LinearShape { format: WeightFormat::Dense(DType::I8), ..self.head }
            }
            _ => self.head,
        }
    }
}

impl LinearShape {
    fn is_bf16(&self) -> bool {
        self.format == WeightFormat::Dense(DType::BF16)
    }

    fn kernel_spec(&self, activation: ActivationType) -> KernelSpec {
        let LinearShape { n, k, .. } = *self;
        match self.format {
            WeightFormat::Dense(DType::BF16) if activation == ActivationType::Bf16 => {
                KernelSpec::GemmBf16 { n, k }
            }
            WeightFormat::Dense(weight) => KernelSpec::Gemm { n, k, weight },
            WeightFormat::Awq(group) => KernelSpec::AwqGemm { n, k, group, activation },
        }
    }

    /// The matmul that serves this linear in a layer, or the reason there is none.
    pub fn kernel(&self, activation: ActivationType) -> Result<KernelSpec, Error> {
        if let WeightFormat::Awq(group) = self.format {
            check_group(self.k, group)?;
        }
        if activation == ActivationType::Bf16 && !self.is_bf16() {
            return Err(Error::Activations { weights: self.format.name() });
        }
        Ok(self.kernel_spec(activation))
    }

    /// The row form that [`LinearShape::kernel`] reads.
    pub fn row_format(&self, activation: ActivationType) -> RowFormat {
        let int8 = |group| match activation_group(self.k, group) {
            Some(group) => RowFormat::I8 { group },
            None => RowFormat::F32,
        };
        match (self.format, activation) {
            (WeightFormat::Awq(group), ActivationType::Int8) => int8(group),
            (WeightFormat::Dense(DType::I8), _) => int8(GroupSize::Channel),
            (WeightFormat::Dense(DType::BF16), ActivationType::Bf16) => RowFormat::Bf16,
            _ => RowFormat::F32,
        }
    }
}
