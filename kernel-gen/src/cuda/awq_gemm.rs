//! `awq_gemm`: fused AWQ-dequant matmul of 16-bit rows and int4 weights.

use super::op::{Instance, Launch, Op, config, size, type_of};
use super::spec::{check_positive, check_regime};
use super::{Arch, Regime, RowType};
use crate::name::Words;
use crate::spec::{GroupSize, check_group};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AwqGemm {
    pub n: usize,
    pub k: usize,
    pub group: GroupSize,
    pub rows: RowType,
}

config! {
    pub struct Config {
        /// Of a block.
        threads: "t",
    }
}

impl Op for AwqGemm {
    const NAME: &'static str = "awq_gemm";
    const REGIMES: &'static [Regime] = &Regime::MATMUL;
    type Config = Config;

    fn words(&self) -> String {
        format!("n{}_k{}_g{}_{}", self.n, self.k, self.group, self.rows.name())
    }

    fn parse(words: &mut Words<'_>) -> Option<AwqGemm> {
        Some(AwqGemm {
            n: words.size("n")?,
            k: words.size("k")?,
            group: words.group()?,
            rows: words.row_type()?,
        })
    }

    fn default_config(&self, _regime: Regime, _arch: Arch) -> Config {
        Config { threads: 128 }
    }

    fn is_feasible(&self, _config: &Config, regime: Regime, _arch: Arch) -> Result<(), String> {
        check_regime::<AwqGemm>(regime)?;
        check_positive(&[("n", self.n), ("k", self.k)])?;
        check_group(self.k, self.group).map_err(|error| error.to_string())
    }

    fn instance(&self, config: &Config, regime: Regime, _arch: Arch) -> Instance {
        Instance {
            kernel: if regime == Regime::Many { "Tiled" } else { "Skinny" },
            params: "LinearParams",
            constants: vec![
                type_of("Rows", self.rows.template()),
                size("N", self.n),
                size("K", self.k),
                size("GROUP", self.group.of(self.k)),
                size("THREADS", config.threads),
            ],
            threads: config.threads,
            min_blocks: 1,
            shared_bytes: 0,
        }
    }

    fn launch(&self, _config: &Config, _regime: Regime, _rows: usize, _num_sms: usize) -> Launch {
        Launch { grid_x: self.n.div_ceil(64), grid_y: 1 }
    }
}
