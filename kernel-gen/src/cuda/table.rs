//! The kernels inside a binary: a static table of them, and those of one device loaded from it.

use std::collections::BTreeMap;
use std::io::Read;

use super::{Arch, Regime, Spec, Variant};
use crate::error::Error;

/// All CUDA kernels of a build. The default has none.
#[derive(Clone, Copy, Debug, Default)]
pub struct CudaKernelTable {
    /// Version of the compiler, `13.0.88`: what the driver has to know.
    pub toolkit: &'static str,
    /// One for each architecture, sorted.
    pub targets: &'static [EmbeddedTarget],
}

/// The kernels of one architecture.
#[derive(Clone, Copy, Debug)]
pub struct EmbeddedTarget {
    pub arch: Arch,
    /// In the order of their machine code.
    pub kernels: &'static [EmbeddedKernel],
    /// All machine code, one after the other, deflated.
    pub cubins: &'static [u8],
}

/// One kernel. Its symbol says all that was decided for it ([`Variant::parse`]).
#[derive(Clone, Copy, Debug)]
pub struct EmbeddedKernel {
    pub symbol: &'static str,
    /// Of a thread.
    pub registers: usize,
    /// Of the source, the compiler and its flags.
    pub source_hash: &'static str,
    /// Bytes of machine code.
    pub cubin_len: usize,
}

/// A kernel ready for a driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadedKernel {
    pub variant: Variant,
    pub symbol: &'static str,
    pub registers: usize,
    pub source_hash: &'static str,
    /// An ELF file with the one function `symbol`.
    pub cubin: Vec<u8>,
}

/// The kernels of one architecture, by what they compute.
#[derive(Clone, Debug)]
pub struct KernelSet {
    pub arch: Arch,
    kernels: BTreeMap<(Spec, Regime), LoadedKernel>,
}

impl CudaKernelTable {
    pub fn archs(&self) -> Vec<Arch> {
        self.targets.iter().map(|target| target.arch).collect()
    }

    /// The architecture whose kernels a device of this compute capability runs.
    pub fn arch_for(&self, capability: (u32, u32)) -> Option<Arch> {
        Arch::best_for(capability, &self.archs())
    }

    /// Unpacks the kernels of `arch`.
    pub fn load(&self, arch: Arch) -> Result<KernelSet, Error> {
        let broken = |message: String| Error::Compile { symbol: arch.name().to_string(), message };
        let target = self
            .targets
            .iter()
            .find(|target| target.arch == arch)
            .ok_or_else(|| broken("this binary has no kernels for it".to_string()))?;
        let mut cubins = flate2::read::DeflateDecoder::new(target.cubins);
        let mut kernels = BTreeMap::new();
        for EmbeddedKernel { symbol, registers, source_hash, cubin_len } in target.kernels {
            let variant = Variant::parse(symbol)
                .ok_or_else(|| broken(format!("{symbol} is no symbol of this version")))?;
            let mut cubin = vec![0; *cubin_len];
            cubins
                .read_exact(&mut cubin)
                .map_err(|error| broken(format!("the embedded kernels are damaged: {error}")))?;
            let kernel =
                LoadedKernel { variant, symbol, registers: *registers, source_hash, cubin };
            kernels.insert((variant.spec(), variant.regime), kernel);
        }
        Ok(KernelSet { arch, kernels })
    }
}

impl KernelSet {
    /// The kernel for `spec` in `regime`, or an error that names what is missing.
    pub fn find(&self, spec: &Spec, regime: Regime) -> Result<&LoadedKernel, Error> {
        self.kernels.get(&(*spec, regime)).ok_or_else(|| Error::Compile {
            symbol: spec.variant(regime, self.arch).symbol(),
            message: "this binary has no such kernel; build with BESPOKE_MODEL set to the model"
                .to_string(),
        })
    }

    pub fn iter(&self) -> impl Iterator<Item = &LoadedKernel> {
        self.kernels.values()
    }
}
