//! `awq_gemm`: fused AWQ-dequant matmul of 16-bit rows and int4 weights.

use super::matmul::{AwqLayout, Config, Shape, check_awq_group};
use super::op::{Instance, Launch, Op, Workspace, size, type_of};
use super::spec::{check_positive, check_regime};
use super::{Arch, Regime, RowType};
use crate::name::Words;
use crate::spec::GroupSize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AwqGemm {
    pub n: usize,
    pub k: usize,
    pub group: GroupSize,
    pub rows: RowType,
}

impl AwqGemm {
    pub fn layout(&self) -> AwqLayout {
        AwqLayout::new(self.n, self.k, self.group)
    }

    fn shape(&self) -> Shape {
        Shape::awq(&self.layout())
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

    fn default_config(&self, regime: Regime, arch: Arch) -> Config {
        self.shape().default_config(regime, arch)
    }

    fn candidates(&self, regime: Regime, arch: Arch) -> Vec<Config> {
        self.shape().candidates(regime, arch)
    }

    fn is_feasible(&self, config: &Config, regime: Regime, _arch: Arch) -> Result<(), String> {
        check_regime::<AwqGemm>(regime)?;
        check_positive(&[("n", self.n), ("k", self.k)])?;
        check_awq_group(self.k, self.group)?;
        self.shape().is_feasible(config, regime)
    }

    fn instance(&self, config: &Config, _regime: Regime, arch: Arch) -> Instance {
        let mut constants = vec![
            type_of("Rows", self.rows.template()),
            type_of("Out", self.rows.template()),
            size("SCALE_GROUP", self.layout().scale_group),
        ];
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
