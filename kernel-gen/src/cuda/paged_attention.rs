//! `paged_attention`: decoding (one query row per sequence) and prefill over the paged KV cache.

use super::op::{Instance, Launch, Op, config, size, type_of};
use super::spec::{check_positive, check_regime};
use super::{Arch, KvType, Regime, RowType};
use crate::name::Words;
use crate::spec::PAGE_SIZES;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PagedAttention {
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// 0 for full attention.
    pub window: usize,
    pub rows: RowType,
    pub kv: KvType,
    pub page_size: usize,
}

config! {
    pub struct Config {
        /// Of a block.
        threads: "t",
    }
}

impl Op for PagedAttention {
    const NAME: &'static str = "paged_attention";
    const REGIMES: &'static [Regime] = &[Regime::Decode, Regime::Prefill];
    type Config = Config;

    fn words(&self) -> String {
        let PagedAttention { num_heads, num_kv_heads, head_dim, window, page_size, .. } = self;
        let (rows, kv) = (self.rows.name(), self.kv.name());
        format!("h{num_heads}_v{num_kv_heads}_d{head_dim}_w{window}_p{page_size}_{rows}_{kv}")
    }

    fn parse(words: &mut Words<'_>) -> Option<PagedAttention> {
        // NOTE: fields are evaluated in the order they are written, the order of the words.
        Some(PagedAttention {
            num_heads: words.size("h")?,
            num_kv_heads: words.size("v")?,
            head_dim: words.size("d")?,
            window: words.size("w")?,
            page_size: words.size("p")?,
            rows: words.row_type()?,
            kv: words.kv_type()?,
        })
    }

    fn default_config(&self, _regime: Regime, _arch: Arch) -> Config {
        Config { threads: 128 }
    }

    fn is_feasible(&self, _config: &Config, regime: Regime, _arch: Arch) -> Result<(), String> {
        check_regime::<PagedAttention>(regime)?;
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim, self.page_size)
    }

    fn instance(&self, config: &Config, regime: Regime, _arch: Arch) -> Instance {
        Instance {
            kernel: if regime == Regime::Decode { "Decode" } else { "Prefill" },
            params: "PagedAttentionParams",
            constants: vec![
                type_of("Rows", self.rows.template()),
                type_of("Kv", self.kv.template(self.rows)),
                size("HEADS", self.num_heads),
                size("KV_HEADS", self.num_kv_heads),
                size("HEAD_DIM", self.head_dim),
                size("WINDOW", self.window),
                size("PAGE", self.page_size),
                size("THREADS", config.threads),
            ],
            threads: config.threads,
            min_blocks: 1,
            shared_bytes: 0,
        }
    }

    fn launch(&self, _config: &Config, _regime: Regime, rows: usize, _num_sms: usize) -> Launch {
        Launch { grid_x: rows.max(1), grid_y: self.num_kv_heads }
    }
}

/// Sizes of heads and pages that the kernels of the KV cache can have.
pub(super) fn check_heads(
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    page_size: usize,
) -> Result<(), String> {
    let sizes = [
        ("num_heads", num_heads),
        ("num_kv_heads", num_kv_heads),
        ("head_dim", head_dim),
        ("page_size", page_size),
    ];
    check_positive(&sizes)?;
    if !num_heads.is_multiple_of(num_kv_heads) {
        return Err(format!("{num_heads} query heads are not a multiple of {num_kv_heads}"));
    }
    if !PAGE_SIZES.contains(&page_size) {
        return Err(format!("page size {page_size} is not one of 16, 32 and 64"));
    }
    Ok(())
}
