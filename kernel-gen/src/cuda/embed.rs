//! `embed`: rows of the embedding table, widened to float32.

use super::op::{Instance, Launch, Op, config, size, type_of};
use super::spec::{check_positive, check_regime};
use super::{Arch, Regime};
use crate::name::Words;
use crate::spec::DType;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Embed {
    pub hidden: usize,
    /// Element type of the table: the checkpoint's.
    pub table: DType,
}

config! {
    pub struct Config {
        /// Of a block.
        threads: "t",
    }
}

impl Op for Embed {
    const NAME: &'static str = "embed";
    type Config = Config;

    fn words(&self) -> String {
        format!("h{}_{}", self.hidden, self.table.name())
    }

    fn parse(words: &mut Words<'_>) -> Option<Embed> {
        Some(Embed { hidden: words.size("h")?, table: words.dtype()? })
    }

    fn default_config(&self, _regime: Regime, _arch: Arch) -> Config {
        Config { threads: 256 }
    }

    fn is_feasible(&self, _config: &Config, regime: Regime, _arch: Arch) -> Result<(), String> {
        check_regime::<Embed>(regime)?;
        if self.table == DType::I8 {
            return Err("embedding tables are f32, f16 or bf16, not i8".to_string());
        }
        check_positive(&[("hidden", self.hidden)])
    }

    fn instance(&self, config: &Config, _regime: Regime, _arch: Arch) -> Instance {
        let table = match self.table {
            DType::F32 => "F32",
            DType::BF16 => "BF16",
            DType::F16 | DType::I8 => "F16",
        };
        Instance {
            kernel: "Kernel",
            params: "EmbedParams",
            constants: vec![
                type_of("Table", table),
                size("HIDDEN", self.hidden),
                size("THREADS", config.threads),
            ],
            threads: config.threads,
            min_blocks: 1,
            shared_bytes: 0,
        }
    }

    fn launch(&self, _config: &Config, _regime: Regime, rows: usize, _num_sms: usize) -> Launch {
        Launch { grid_x: rows.max(1), grid_y: 1 }
    }
}
