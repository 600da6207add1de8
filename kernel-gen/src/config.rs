//! The choices a kernel leaves open (`KernelConfig`), and which of them can work.

use crate::spec::{
    ActivationType, DType, GroupSize, KernelSpec, PAGE_SIZES, RowFormat, RowRegime,
    activation_group, check_group,
};
use crate::target::Target;

/// Tile sizes of a kernel. A field that the kernel's body does not read is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KernelConfig {
    /// Rows of a register block, one of [`ROW_BLOCKS`]; 1 for ops that work row by row.
    pub rows: usize,
    /// Column tiles of a packed weight panel; 0 for ops without packed weights. All kernels that
    /// read one packed matrix agree about it.
    pub cols: usize,
    /// Column tiles of a register block: 1, 2 or 4.
    pub tiles: usize,
    /// Packed lines of inputs that a turn of the innermost loop takes.
    pub unroll: usize,
    /// Bytes between a load of weights and the line that is asked for with it; 0: none.
    pub prefetch: usize,
    /// Rows from which threads share a call out by rows instead of columns; 0: never.
    pub split: usize,
    /// What rows a register block leaves: 0 in pairs, 1 in halves of the block, where the last
    /// block may repeat rows of the one before it.
    pub halves: usize,
}

/// Rows that a register block can have.
pub const ROW_BLOCKS: [usize; 10] = [1, 2, 3, 4, 6, 7, 8, 12, 14, 16];

/// Scratch memory of `paged_attention` in decoding.
const DECODE_SCRATCH_BYTES: usize = 64 << 10;
/// The largest head whose rows fit `paged_attention`'s scratch memory.
const HEAD_DIM_MAX: usize = 256;

/// Vectors that the registers of the instruction set hold: on NEON in pairs.
fn num_registers(target: Target) -> usize {
    match target {
        Target::Portable | Target::X86_64V3 | Target::Neon => 16,
        Target::Avx512 => 32,
    }
}

impl KernelConfig {
    /// What is used where nothing was measured.
    pub fn default_for(spec: &KernelSpec, regime: RowRegime, target: Target) -> KernelConfig {
        if !spec.is_matmul() {
            return KernelConfig { rows: 1, ..KernelConfig::default() };
        }
        let (rows_max, tiles_max) = match target {
            Target::Portable => (2, 1),
            Target::X86_64V3 | Target::Neon => (6, 2),
            Target::Avx512 => (6, 4),
        };
        let form = Form::of(spec);
        let base = KernelConfig { cols: 4, tiles: tiles_max, ..KernelConfig::default() };
        // NOTE: eight lines of a whole panel.
        let lines = 8 * base.cols * target.lanes() * form.element_bytes(spec);
        let prefetch = if form == Form::AwqInt8 || form == Form::AwqFloat { 2048 } else { lines };
        let unroll = usize::from(form.unrolls());
        match regime {
            // NOTE: one int8 row leaves the processor's own prefetchers the time that asking takes.
            RowRegime::Any | RowRegime::One if form.unrolls() => {
                KernelConfig { rows: 1, unroll, ..base }
            }
            RowRegime::Any | RowRegime::One => KernelConfig { rows: 1, unroll, prefetch, ..base },
            RowRegime::Few => KernelConfig { rows: rows_max.min(4), unroll, prefetch, ..base },
            RowRegime::Many => {
                let tiles = if form == Form::AwqInt8 { tiles_max.min(2) } else { tiles_max };
                KernelConfig { rows: rows_max, tiles, split: 48, ..base }
            }
        }
    }

    /// All configurations worth a trial, sorted, the default among them.
    pub fn candidates(spec: &KernelSpec, regime: RowRegime, target: Target) -> Vec<KernelConfig> {
        let default = KernelConfig::default_for(spec, regime, target);
        let mut all = vec![default];
        if spec.is_matmul() && target != Target::Portable {
            all.extend(grid(spec, regime, target, default));
        }
        all.retain(|config| config.is_feasible(spec, regime, target).is_ok());
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Short names, as symbols have them, and values of the fields that are not 0.
    pub fn fields(&self) -> Vec<(&'static str, usize)> {
        let KernelConfig { rows, cols, tiles, unroll, prefetch, split, halves } = *self;
        let values = [rows, cols, tiles, unroll, prefetch, split, halves];
        FIELDS.into_iter().zip(values).filter(|(_, value)| *value != 0).collect()
    }

    /// The configuration whose field named `FIELDS[i]` is `values[i]`.
    pub(crate) fn from_values(values: [usize; FIELDS.len()]) -> KernelConfig {
        let [rows, cols, tiles, unroll, prefetch, split, halves] = values;
        KernelConfig { rows, cols, tiles, unroll, prefetch, split, halves }
    }

    /// Whether a kernel with this configuration exists, or the reason why not.
    pub fn is_feasible(
        &self,
        spec: &KernelSpec,
        regime: RowRegime,
        target: Target,
    ) -> Result<(), String> {
        check_spec(spec)?;
        if !spec.regimes().contains(&regime) {
            return Err(format!("{} has no kernel for row regime {}", spec.op(), regime.name()));
        }
        if !spec.is_matmul() {
            let only = KernelConfig { rows: 1, ..KernelConfig::default() };
            return match *self == only {
                true => Ok(()),
                false => Err(format!("{} has no choice of {}", spec.op(), self.text())),
            };
        }
        self.check_fields(spec, regime)?;
        self.check_block(regime, target)
    }

    /// Every field within its limits, and 0 where the body does not read it.
    fn check_fields(&self, spec: &KernelSpec, regime: RowRegime) -> Result<(), String> {
        let form = Form::of(spec);
        let KernelConfig { cols, unroll, prefetch, split, halves, .. } = *self;
        if !(1..=16).contains(&cols) {
            return Err(format!("{cols} column tiles a panel; 1 to 16 are possible"));
        }
        let is_many = regime == RowRegime::Many;
        let prefetch_max = if is_many && form != Form::GemmInt8 { 0 } else { 16 << 10 };
        let group = form.group_lines(spec);
        let unrolls = form.unrolls() && !is_many;
        let split_max = if is_many { 1 << 20 } else { 0 };
        // NOTE: a block of many float or bf16 rows adds to what it finds, so it cannot be repeated.
        let repeats = matches!(form, Form::AwqInt8 | Form::GemmInt8) || !is_many;
        let halves_max = usize::from(repeats && regime != RowRegime::One);
        if unroll != 0 && !group.is_multiple_of(unroll) {
            return Err(format!("turns of {unroll} lines do not divide a group of {group}"));
        }
        let limits = [
            ("unroll", unroll, usize::from(unrolls), if unrolls { 8 } else { 0 }),
            ("prefetch", prefetch, 0, prefetch_max),
            ("split", split, 0, split_max),
            ("halves", halves, 0, halves_max),
        ];
        for (name, value, min, max) in limits {
            if !(min..=max).contains(&value) {
                return Err(format!("{name} is {value}; {min} to {max} are possible here"));
            }
        }
        Ok(())
    }

    /// The register block exists and fits the registers.
    fn check_block(&self, regime: RowRegime, target: Target) -> Result<(), String> {
        let KernelConfig { rows, tiles, .. } = *self;
        let rows_max = match regime {
            RowRegime::Any | RowRegime::One => 1,
            RowRegime::Few | RowRegime::Many => usize::MAX,
        };
        if rows > rows_max || !ROW_BLOCKS.contains(&rows) {
            return Err(format!("a block of {rows} rows in row regime {}", regime.name()));
        }
        if ![1, 2, 4].contains(&tiles) {
            return Err(format!("a block of {tiles} column tiles; 1, 2 and 4 are possible"));
        }
        // NOTE: a sum a row and tile, and beside them a weight, an activation and a scale.
        // Accumulators of groups may live in memory.
        let (used, registers) = (rows * tiles + 3, num_registers(target));
        if used > registers {
            return Err(format!(
                "a block of {rows} rows and {tiles} tiles takes {used} vector registers, {} has \
                 {registers}",
                target.name()
            ));
        }
        Ok(())
    }

    fn text(&self) -> String {
        let words: Vec<String> =
            self.fields().iter().map(|(name, value)| format!("{name}{value}")).collect();
        words.join("_")
    }

    /// Scratch memory that one thread of the kernel needs.
    pub fn scratch_bytes(&self, spec: &KernelSpec, regime: RowRegime, target: Target) -> usize {
        let unpacked_int8 = |k: usize| k.next_multiple_of(8) * self.cols * target.lanes();
        let unpacked_f32 = |k: usize| k.min(512) * self.cols * target.lanes() * 4;
        match (*spec, regime) {
            (KernelSpec::Gemm { k, weight: DType::I8, .. }, RowRegime::Many) => unpacked_int8(k),
            (KernelSpec::Gemm { k, .. }, RowRegime::Many) => unpacked_f32(k),
            (KernelSpec::AwqGemm { k, activation, .. }, RowRegime::Many) => match activation {
                ActivationType::Int8 => unpacked_int8(k),
                _ => unpacked_f32(k),
            },
            (KernelSpec::PagedAttention { .. }, RowRegime::One) => DECODE_SCRATCH_BYTES,
            (KernelSpec::PagedAttention { .. }, _) => 256 << 10,
            _ => 0,
        }
    }
}

/// Names of the fields in symbols: rows, cols, tiles, unroll, prefetch, split, halves.
pub(crate) const FIELDS: [&str; 7] = ["r", "c", "t", "u", "p", "s", "h"];

/// The bodies of matmuls.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    GemmFloat,
    GemmBf16,
    GemmInt8,
    AwqFloat,
    AwqInt8,
}

impl Form {
    /// `spec` is a matmul.
    fn of(spec: &KernelSpec) -> Form {
        match spec {
            KernelSpec::AwqGemm { activation: ActivationType::Int8, .. } => Form::AwqInt8,
            KernelSpec::AwqGemm { .. } => Form::AwqFloat,
            KernelSpec::Gemm { weight: DType::I8, .. } => Form::GemmInt8,
            KernelSpec::GemmBf16 { .. } => Form::GemmBf16,
            _ => Form::GemmFloat,
        }
    }

    /// Whether the body takes a number of packed lines a turn.
    fn unrolls(self) -> bool {
        matches!(self, Form::AwqInt8 | Form::GemmInt8)
    }

    /// Bytes that a lane holds of a packed line.
    fn element_bytes(self, spec: &KernelSpec) -> usize {
        match *spec {
            KernelSpec::Gemm { weight, .. } if weight != DType::I8 => weight.size(),
            _ => 4,
        }
    }

    /// Packed lines of a group of int8 rows.
    fn group_lines(self, spec: &KernelSpec) -> usize {
        match *spec {
            KernelSpec::AwqGemm { k, group, .. } => activation_group(k, group).unwrap_or(k) / 8,
            KernelSpec::Gemm { k, .. } => activation_group(k, GroupSize::Channel).unwrap_or(k) / 4,
            _ => 0,
        }
    }
}

/// Configurations around `default`, some of which may not be feasible.
///
/// On AVX-512, blocks of four tiles read a panel in one stream, which weights from memory want;
/// blocks of many rows and one tile unpack a line least often and serve what is bound by the dot
/// rate.
fn grid(
    spec: &KernelSpec,
    regime: RowRegime,
    target: Target,
    default: KernelConfig,
) -> Vec<KernelConfig> {
    let form = Form::of(spec);
    let is_int8 = form == Form::AwqInt8 || form == Form::GemmInt8;
    let one = matches!(regime, RowRegime::Any | RowRegime::One);
    let blocks: &[(usize, usize)] = match (target, is_int8) {
        (Target::Avx512, _) if one => &[(1, 2), (1, 4)],
        (_, _) if one => &[(1, 1), (1, 2)],
        (Target::Avx512, true) => {
            &[(2, 4), (4, 4), (6, 2), (6, 4), (8, 1), (8, 2), (12, 1), (12, 2), (14, 1), (16, 1)]
        }
        (Target::Avx512, false) => &[(4, 4), (6, 4), (8, 2)],
        (_, true) => &[(2, 2), (4, 1), (4, 2), (6, 1), (6, 2), (8, 1), (12, 1)],
        (_, false) => &[(4, 2), (6, 2)],
    };
    let unrolls: &[usize] = match regime {
        RowRegime::Many => &[0],
        _ if is_int8 => &[1, 2],
        _ => &[0],
    };
    let prefetches: &[usize] = match (regime, is_int8) {
        (RowRegime::Many, _) => &[0],
        (RowRegime::Few, _) | (_, false) => &[0, 2048],
        _ => &[0, 512, 2048, 4096],
    };
    let splits: &[usize] = if regime == RowRegime::Many { &[0, 48] } else { &[0] };
    let halves = usize::from(!one && (is_int8 || regime == RowRegime::Few));
    let mut all = Vec::new();
    for (rows, tiles) in blocks.iter().copied() {
        for unroll in unrolls.iter().copied() {
            for prefetch in prefetches.iter().copied() {
                for split in splits.iter().copied() {
                    let block = KernelConfig { rows, tiles, halves, ..default };
                    all.push(KernelConfig { unroll, prefetch, split, ..block });
                }
            }
        }
    }
    all
}

/// Relations of the sizes that no configuration can mend.
fn check_spec(spec: &KernelSpec) -> Result<(), String> {
    for (name, size) in spec.sizes() {
        if size == 0 && name != "window" {
            return Err(format!("{name} is 0"));
        }
    }
    match *spec {
        KernelSpec::Embed { dtype: DType::I8, .. } => {
            Err("embedding tables are f32, f16 or bf16, not i8".to_string())
        }
        KernelSpec::RmsNorm { hidden, out: RowFormat::I8 { group } } => check_rows(hidden, group),
        KernelSpec::SiluAndMul { intermediate, out: RowFormat::I8 { group } } => {
            check_rows(intermediate, group)
        }
        KernelSpec::Quantize { k, out: RowFormat::I8 { group } } => check_rows(k, group),
        KernelSpec::Quantize { out: RowFormat::F32, .. } => {
            Err("float32 rows are what quantize reads".to_string())
        }
        KernelSpec::Gemm { k, weight: DType::I8, .. } => {
            check_activation_group(k, GroupSize::Channel)
        }
        KernelSpec::AwqGemm { activation: ActivationType::Bf16, .. } => {
            Err("4-bit weights are multiplied with float32 or int8 rows, not bf16".to_string())
        }
        KernelSpec::AwqGemm { k, group, .. } => check_activation_group(k, group),
        KernelSpec::Rope { num_heads, num_kv_heads, head_dim, rotary_dim, page_size, .. } => {
            check_heads(num_heads, num_kv_heads, head_dim, page_size)?;
            if rotary_dim % 2 != 0 || rotary_dim > head_dim {
                return Err(format!(
                    "rotary_dim {rotary_dim} is not an even number up to head_dim {head_dim}"
                ));
            }
            Ok(())
        }
        KernelSpec::PagedAttention { num_heads, num_kv_heads, head_dim, page_size, .. } => {
            check_heads(num_heads, num_kv_heads, head_dim, page_size)
        }
        _ => Ok(()),
    }
}

/// Rows of `k` elements quantized in groups of `group`.
fn check_rows(k: usize, group: usize) -> Result<(), String> {
    check_group(k, GroupSize::Of(group)).map_err(|error| error.to_string())?;
    if !group.is_multiple_of(8) {
        return Err(format!("group size {group} is not a multiple of 8"));
    }
    Ok(())
}

/// Weights of `k` inputs in groups of `group`, and the rows multiplied with them.
fn check_activation_group(k: usize, group: GroupSize) -> Result<(), String> {
    check_group(k, group).map_err(|error| error.to_string())?;
    if !k.is_multiple_of(8) {
        return Err(format!("input size {k} is not a multiple of 8"));
    }
    let Some(rows_group) = activation_group(k, group) else {
        return Err(format!("no group size for int8 rows divides the input size {k}"));
    };
    check_rows(k, rows_group)?;
    let size = group.of(k);
    if !size.is_multiple_of(rows_group) {
        return Err(format!(
            "group size {size} is not a multiple of {rows_group}, the group size of its int8 rows"
        ));
    }
    Ok(())
}

fn check_heads(
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    page_size: usize,
) -> Result<(), String> {
    if !num_heads.is_multiple_of(num_kv_heads) {
        return Err(format!("{num_heads} query heads are not a multiple of {num_kv_heads}"));
    }
    if !head_dim.is_multiple_of(8) {
        return Err(format!("head_dim {head_dim} is not a multiple of 8"));
    }
    if !PAGE_SIZES.contains(&page_size) {
        return Err(format!("page size {page_size} is not one of 16, 32 and 64"));
    }
    // NOTE: what `paged_attention` keeps of 16 rows, of four heads' scales, and of a head that it
    // unpacks.
    let unpacks = !head_dim.is_multiple_of(16);
    let page_bytes = if unpacks { 4 * page_size * head_dim + 64 } else { 0 };
    let scratch_bytes = 64 * (2 * head_dim + page_size + 43) + 64 * page_size + page_bytes;
    if head_dim > HEAD_DIM_MAX || scratch_bytes > DECODE_SCRATCH_BYTES {
        return Err(format!(
            "head_dim {head_dim} with pages of {page_size} takes more memory than attention has; \
             multiples of 16 up to {HEAD_DIM_MAX} are possible, others with small pages"
        ));
    }
    Ok(())
}
