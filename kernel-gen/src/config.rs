//! The choices a kernel leaves open (`KernelConfig`), and which of them can work.

use crate::spec::{
    ActivationType, DType, GroupSize, KernelSpec, PAGE_SIZES, RowFormat, RowRegime,
    activation_group, check_group,
};
use crate::target::Target;

/// Tile sizes of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KernelConfig {
    /// Rows of a register block; 1 for ops that work row by row.
    pub rows: usize,
    /// Column tiles of a packed weight panel; 0 for ops without packed weights.
    pub cols: usize,
}

/// Scratch memory of `paged_attention` in decoding.
const DECODE_SCRATCH_BYTES: usize = 64 << 10;
/// The largest head whose rows fit `paged_attention`'s scratch memory.
const HEAD_DIM_MAX: usize = 256;

/// Vector registers of the instruction set.
fn num_registers(target: Target) -> usize {
    match target {
        Target::Portable | Target::X86_64V3 => 16,
        Target::Avx512 => 32,
    }
}

impl KernelConfig {
    /// What is used where nothing was measured.
    pub fn default_for(spec: &KernelSpec, regime: RowRegime, _target: Target) -> KernelConfig {
        if !spec.is_matmul() {
            return KernelConfig { rows: 1, cols: 0 };
        }
        let rows = match regime {
            RowRegime::Any | RowRegime::One => 1,
            RowRegime::Few => 8,
            RowRegime::Many => 6,
        };
        KernelConfig { rows, cols: 4 }
    }

    /// All configurations worth a trial, the default among them.
    pub fn candidates(spec: &KernelSpec, regime: RowRegime, target: Target) -> Vec<KernelConfig> {
        let default = KernelConfig::default_for(spec, regime, target);
        let rows: &[usize] = match regime {
            _ if !spec.is_matmul() => &[1],
            RowRegime::Any | RowRegime::One => &[1],
            RowRegime::Few => &[2, 4, 8],
            RowRegime::Many => &[4, 6, 8, 12, 14],
        };
        let cols: &[usize] = if spec.is_matmul() { &[1, 2, 4, 8] } else { &[default.cols] };
        let all = rows
            .iter()
            .flat_map(|rows| cols.iter().map(|cols| KernelConfig { rows: *rows, cols: *cols }));
        all.filter(|config| config.is_feasible(spec, regime, target).is_ok()).collect()
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
        let KernelConfig { rows, cols } = *self;
        if !spec.is_matmul() {
            return match (rows, cols) {
                (1, 0) => Ok(()),
                _ => Err(format!("{} has no choice of rows {rows} and cols {cols}", spec.op())),
            };
        }
        if !(1..=16).contains(&cols) {
            return Err(format!("{cols} column tiles a panel; 1 to 16 are possible"));
        }
        let rows_max = match regime {
            RowRegime::Any | RowRegime::One => 1,
            RowRegime::Few => RowRegime::FEW_MAX,
            RowRegime::Many => usize::MAX,
        };
        if rows == 0 || rows > rows_max {
            return Err(format!("a block of {rows} rows in row regime {}", regime.name()));
        }
        // NOTE: an accumulator a row, and beside them a weight, an activation and a scale.
        let (used, registers) = (rows + 3, num_registers(target));
        if used > registers {
            return Err(format!(
                "a block of {rows} rows takes {used} vector registers, {} has {registers}",
                target.name()
            ));
        }
        Ok(())
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
                ActivationType::Float => unpacked_f32(k),
            },
            (KernelSpec::PagedAttention { .. }, RowRegime::One) => DECODE_SCRATCH_BYTES,
            (KernelSpec::PagedAttention { .. }, _) => 256 << 10,
            _ => 0,
        }
    }
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
        KernelSpec::Quantize { k, group } => check_rows(k, group),
        KernelSpec::Gemm { k, weight: DType::I8, .. } => {
            check_activation_group(k, GroupSize::Channel)
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
