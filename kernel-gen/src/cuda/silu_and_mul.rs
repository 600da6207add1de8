//! `silu_and_mul`: `out = silu(gate) · up` on 16-bit rows.

use super::op::{Instance, Launch, Op, config, size, type_of};
use super::spec::{check_positive, check_regime};
use super::{Arch, Regime, RowType};
use crate::name::Words;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SiluAndMul {
    pub intermediate: usize,
    pub rows: RowType,
}

config! {
    pub struct Config {
        /// Of a block.
        threads: "t",
    }
}

/// Blocks that a multiprocessor is given.
const BLOCKS_PER_SM: usize = 4;

impl Op for SiluAndMul {
    const NAME: &'static str = "silu_and_mul";
    type Config = Config;

    fn words(&self) -> String {
        format!("i{}_{}", self.intermediate, self.rows.name())
    }

    fn parse(words: &mut Words<'_>) -> Option<SiluAndMul> {
        Some(SiluAndMul { intermediate: words.size("i")?, rows: words.row_type()? })
    }

    fn default_config(&self, _regime: Regime, _arch: Arch) -> Config {
        Config { threads: 256 }
    }

    fn is_feasible(&self, _config: &Config, regime: Regime, _arch: Arch) -> Result<(), String> {
        check_regime::<SiluAndMul>(regime)?;
        check_positive(&[("intermediate", self.intermediate)])?;
        if !self.intermediate.is_multiple_of(2) {
            return Err(format!("intermediate size {} is odd", self.intermediate));
        }
        Ok(())
    }

    fn instance(&self, config: &Config, _regime: Regime, _arch: Arch) -> Instance {
        Instance {
            kernel: "Kernel",
            params: "SiluAndMulParams",
            constants: vec![
                type_of("Rows", self.rows.template()),
                size("INTERMEDIATE", self.intermediate),
                size("THREADS", config.threads),
            ],
            threads: config.threads,
            min_blocks: 1,
            shared_bytes: 0,
        }
    }

    fn launch(&self, config: &Config, _regime: Regime, rows: usize, num_sms: usize) -> Launch {
        // What a thread of the body moves at once.
        let elements = if self.intermediate.is_multiple_of(8) { 8 } else { 2 };
        let blocks = (rows * self.intermediate / elements).div_ceil(config.threads);
        Launch { grid_x: blocks.clamp(1, num_sms * BLOCKS_PER_SM), grid_y: 1 }
    }
}
