//! `rms_norm`: `residual += delta; out = rms_norm(residual) · weight`, one block a row.

use super::op::{Instance, Launch, Op, config, size, type_of};
use super::spec::{check_positive, check_regime};
use super::{Arch, Regime, RowType};
use crate::name::Words;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RmsNorm {
    pub hidden: usize,
    pub rows: RowType,
}

config! {
    pub struct Config {
        /// Of a block.
        threads: "t",
    }
}

const THREADS_MAX: usize = 512;

/// The sums of 32 warps, twice.
const SHARED_BYTES: usize = 2 * 32 * 4;

impl Op for RmsNorm {
    const NAME: &'static str = "rms_norm";
    type Config = Config;

    fn words(&self) -> String {
        format!("h{}_{}", self.hidden, self.rows.name())
    }

    fn parse(words: &mut Words<'_>) -> Option<RmsNorm> {
        Some(RmsNorm { hidden: words.size("h")?, rows: words.row_type()? })
    }

    fn default_config(&self, _regime: Regime, _arch: Arch) -> Config {
        // One run of 8 elements a thread, as far as a block reaches.
        let threads = self.hidden.div_ceil(8).next_multiple_of(32);
        Config { threads: threads.clamp(32, THREADS_MAX) }
    }

    fn is_feasible(&self, _config: &Config, regime: Regime, _arch: Arch) -> Result<(), String> {
        check_regime::<RmsNorm>(regime)?;
        check_positive(&[("hidden", self.hidden)])
    }

    fn instance(&self, config: &Config, _regime: Regime, _arch: Arch) -> Instance {
        Instance {
            kernel: "Kernel",
            params: "RmsNormParams",
            constants: vec![
                type_of("Rows", self.rows.template()),
                size("HIDDEN", self.hidden),
                size("THREADS", config.threads),
            ],
            threads: config.threads,
            min_blocks: 1,
            shared_bytes: SHARED_BYTES,
        }
    }

    fn launch(&self, _config: &Config, _regime: Regime, rows: usize, _num_sms: usize) -> Launch {
        Launch { grid_x: rows.max(1), grid_y: 1 }
    }
}
