//! `gemm`: dense matmul of 16-bit rows and weights.

use super::op::{Instance, Launch, Op, config, flag, size, type_of};
use super::spec::{check_positive, check_regime};
use super::{Arch, OutType, Regime, RowType};
use crate::name::Words;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gemm {
    pub n: usize,
    pub k: usize,
    /// Of rows and weights.
    pub rows: RowType,
    pub out: OutType,
}

config! {
    pub struct Config {
        /// Of a block.
        threads: "t",
    }
}

impl Op for Gemm {
    const NAME: &'static str = "gemm";
    const REGIMES: &'static [Regime] = &Regime::MATMUL;
    type Config = Config;

    fn words(&self) -> String {
        let out = match self.out {
            OutType::Rows => "",
            OutType::F32 => "_f32out",
        };
        format!("n{}_k{}_{}{out}", self.n, self.k, self.rows.name())
    }

    fn parse(words: &mut Words<'_>) -> Option<Gemm> {
        Some(Gemm {
            n: words.size("n")?,
            k: words.size("k")?,
            rows: words.row_type()?,
            out: if words.take("f32out") { OutType::F32 } else { OutType::Rows },
        })
    }

    fn default_config(&self, _regime: Regime, _arch: Arch) -> Config {
        Config { threads: 128 }
    }

    fn is_feasible(&self, _config: &Config, regime: Regime, _arch: Arch) -> Result<(), String> {
        check_regime::<Gemm>(regime)?;
        check_positive(&[("n", self.n), ("k", self.k)])
    }

    fn instance(&self, config: &Config, regime: Regime, _arch: Arch) -> Instance {
        Instance {
            kernel: if regime == Regime::Many { "Tiled" } else { "Skinny" },
            params: "LinearParams",
            constants: vec![
                type_of("Rows", self.rows.template()),
                size("N", self.n),
                size("K", self.k),
                flag("F32_OUT", self.out == OutType::F32),
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
