//! `rope`: QK-norm where the model has it, rotary embedding, and the append of K and V to pages.

use super::op::{Instance, Launch, Op, config, flag, size, type_of};
use super::spec::check_regime;
use super::{Arch, KvType, Regime, RowType};
use crate::name::Words;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rope {
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub rotary_dim: usize,
    pub qk_norm: bool,
    pub rows: RowType,
    pub kv: KvType,
    pub page_size: usize,
}

config! {
    pub struct Config {
        /// Of a block; each takes one head of one row.
        warps: "w",
    }
}

impl Op for Rope {
    const NAME: &'static str = "rope";
    type Config = Config;

    fn words(&self) -> String {
        let Rope { num_heads, num_kv_heads, head_dim, rotary_dim, page_size, .. } = self;
        let norm = if self.qk_norm { "_qknorm" } else { "" };
        let (rows, kv) = (self.rows.name(), self.kv.name());
        format!(
            "h{num_heads}_v{num_kv_heads}_d{head_dim}_r{rotary_dim}_p{page_size}_{rows}_{kv}{norm}"
        )
    }

    fn parse(words: &mut Words<'_>) -> Option<Rope> {
        // NOTE: fields are evaluated in the order they are written, the order of the words.
        Some(Rope {
            num_heads: words.size("h")?,
            num_kv_heads: words.size("v")?,
            head_dim: words.size("d")?,
            rotary_dim: words.size("r")?,
            page_size: words.size("p")?,
            rows: words.row_type()?,
            kv: words.kv_type()?,
            qk_norm: words.take("qknorm"),
        })
    }

    fn default_config(&self, _regime: Regime, _arch: Arch) -> Config {
        Config { warps: 4 }
    }

    fn candidates(&self, _regime: Regime, _arch: Arch) -> Vec<Config> {
        [2, 4, 8].map(|warps| Config { warps }).to_vec()
    }

    fn is_feasible(&self, _config: &Config, regime: Regime, _arch: Arch) -> Result<(), String> {
        check_regime::<Rope>(regime)?;
        super::paged_attention::check_heads(
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.page_size,
        )?;
        let Rope { rotary_dim, head_dim, .. } = *self;
        if rotary_dim % 2 != 0 || rotary_dim > head_dim {
            return Err(format!(
                "rotary_dim {rotary_dim} is not an even number up to head_dim {head_dim}"
            ));
        }
        Ok(())
    }

    fn instance(&self, config: &Config, _regime: Regime, _arch: Arch) -> Instance {
        Instance {
            kernel: "Kernel",
            params: "RopeParams",
            constants: vec![
                type_of("Rows", self.rows.template()),
                type_of("Kv", self.kv.template(self.rows)),
                size("HEADS", self.num_heads),
                size("KV_HEADS", self.num_kv_heads),
                size("HEAD_DIM", self.head_dim),
                size("ROTARY_DIM", self.rotary_dim),
                size("PAGE", self.page_size),
                flag("QK_NORM", self.qk_norm),
                size("WARPS", config.warps),
            ],
            threads: config.warps * 32,
            min_blocks: 1,
            shared_bytes: config.warps * self.head_dim.next_multiple_of(64) * 4,
        }
    }

    fn launch(&self, config: &Config, _regime: Regime, rows: usize, _num_sms: usize) -> Launch {
        let units = rows * (self.num_heads + 2 * self.num_kv_heads);
        Launch { grid_x: units.div_ceil(config.warps).max(1), grid_y: 1 }
    }
}
