//! `sample`: maximum, its index and log-sum-exp of a row of logits.

use super::op::{Instance, Launch, Op, config, size};
use super::spec::{check_positive, check_regime};
use super::{Arch, Regime};
use crate::name::Words;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sample {
    pub vocab: usize,
}

config! {
    pub struct Config {
        /// Of a block.
        threads: "t",
    }
}

/// Of 32 warps: the best logit with its index, and a sum.
const SHARED_BYTES: usize = 32 * (8 + 4);

impl Op for Sample {
    const NAME: &'static str = "sample";
    type Config = Config;

    fn words(&self) -> String {
        format!("v{}", self.vocab)
    }

    fn parse(words: &mut Words<'_>) -> Option<Sample> {
        Some(Sample { vocab: words.size("v")? })
    }

    fn default_config(&self, _regime: Regime, _arch: Arch) -> Config {
        Config { threads: 1024 }
    }

    fn is_feasible(&self, _config: &Config, regime: Regime, _arch: Arch) -> Result<(), String> {
        check_regime::<Sample>(regime)?;
        check_positive(&[("vocab", self.vocab)])
    }

    fn instance(&self, config: &Config, _regime: Regime, _arch: Arch) -> Instance {
        Instance {
            kernel: "Kernel",
            params: "SampleParams",
            constants: vec![size("VOCAB", self.vocab), size("THREADS", config.threads)],
            threads: config.threads,
            min_blocks: 1,
            shared_bytes: SHARED_BYTES,
        }
    }

    fn launch(&self, _config: &Config, _regime: Regime, rows: usize, _num_sms: usize) -> Launch {
        Launch { grid_x: rows.max(1), grid_y: 1 }
    }
}
