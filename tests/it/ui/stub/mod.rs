//! The names that the macro's output refers to, without what stands behind them: a case compiles
//! as little as it can.

#![allow(dead_code)]

pub mod abi {
    pub struct EmbedArgs;
    pub struct GemmArgs;
    pub struct QuantizeArgs;
    pub struct SampleArgs;
    pub struct Share;
}
pub mod simd_portable {
    pub struct Portable;
}
pub mod quantize {
    use super::abi::{QuantizeArgs, Share};
    pub unsafe fn run<S, const K: usize, const GROUP: usize>(_: &QuantizeArgs, _: Share) {}
}
pub mod sample {
    use super::abi::{SampleArgs, Share};
    pub unsafe fn run<S, const VOCAB: usize>(_: &SampleArgs, _: Share) {}
}

pub enum KernelFn {
    Quantize(unsafe fn(&abi::QuantizeArgs, abi::Share)),
    Sample(unsafe fn(&abi::SampleArgs, abi::Share)),
}

pub struct Kernel {
    pub symbol: &'static str,
    pub spec: spec::KernelSpec,
    pub regime: spec::RowRegime,
    pub target: target::Target,
    pub rows: usize,
    pub cols: usize,
    pub scratch_bytes: usize,
    pub reduction_class: &'static str,
    pub source_hash: &'static str,
    pub run: KernelFn,
}

pub struct Serving {
    pub spec: spec::KernelSpec,
    pub target: target::Target,
    pub device: Option<&'static str>,
    pub intervals: &'static [Interval],
}

pub struct Interval {
    pub rows_max: usize,
    pub symbol: &'static str,
    pub provenance: plan::Provenance,
}

pub mod plan {
    pub enum Provenance {
        Default,
    }
}
pub mod spec {
    pub enum KernelSpec {
        Quantize { k: usize, out: RowFormat },
        Sample { vocab: usize },
    }
    pub enum RowFormat {
        I8 { group: usize },
        Bf16,
    }
    pub enum RowRegime {
        Any,
    }
}
pub mod target {
    pub enum Target {
        Portable,
    }
}
