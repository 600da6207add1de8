//! `gemm`: dense matmul of 16-bit rows and weights.

use super::matmul::{Config, DenseLayout, Shape};
use super::op::{Instance, Launch, Op, Workspace, type_of};
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

impl Gemm {
    pub fn layout(&self) -> DenseLayout {
        DenseLayout { n: self.n, k: self.k }
    }

    fn shape(&self) -> Shape {
        Shape::dense(self.n, self.k)
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

    fn default_config(&self, regime: Regime, arch: Arch) -> Config {
        self.shape().default_config(regime, arch)
    }

    fn candidates(&self, regime: Regime, arch: Arch) -> Vec<Config> {
        self.shape().candidates(regime, arch)
    }

    fn is_feasible(&self, config: &Config, regime: Regime, _arch: Arch) -> Result<(), String> {
        check_regime::<Gemm>(regime)?;
        check_positive(&[("n", self.n), ("k", self.k)])?;
        self.shape().is_feasible(config, regime)
    }

    fn instance(&self, config: &Config, _regime: Regime, arch: Arch) -> Instance {
        let out = match self.out {
            OutType::Rows => self.rows.template(),
            OutType::F32 => "F32",
        };
        let mut constants = vec![type_of("Rows", self.rows.template()), type_of("Out", out)];
        constants.extend(self.shape().constants(config));
        Instance {
            kernel: "Kernel",
            params: "LinearParams",
            constants,
            threads: config.threads(),
            min_blocks: config.min_blocks(&self.shape(), arch),
            shared_bytes: config.shared_bytes(&self.shape()),
        }
    }

    fn launch(&self, config: &Config, _regime: Regime, rows: usize, _num_sms: usize) -> Launch {
        self.shape().launch(config, rows)
    }

    fn workspace(&self, config: &Config, _regime: Regime, rows: usize) -> Workspace {
        self.shape().workspace(config, rows)
    }
}
