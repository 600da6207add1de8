//! The kernels inside a binary: a static table of them, and those of one device loaded from it.

use std::collections::BTreeMap;
use std::io::Read;

use super::serving::{Interval, Serving};
use super::{Arch, Spec, Variant};
use crate::error::Error;
use crate::plan::Provenance;
use crate::tuning::device::CudaDevice;
use crate::tuning::distance::{Distance, nearest};

/// All CUDA kernels of a build. The default has none.
#[derive(Clone, Copy, Debug, Default)]
pub struct CudaKernelTable {
    /// Version of the compiler, `13.0.88`: what the driver has to know.
    pub toolkit: &'static str,
    /// One for each architecture, sorted.
    pub targets: &'static [EmbeddedTarget],
    /// Whether there are kernels that serve nothing: candidates of the tuner.
    pub is_tuner: bool,
}

/// The kernels of one architecture.
#[derive(Clone, Copy, Debug)]
pub struct EmbeddedTarget {
    pub arch: Arch,
    /// In the order of their machine code.
    pub kernels: &'static [EmbeddedKernel],
    /// All machine code, one after the other, deflated.
    pub cubins: &'static [u8],
    /// What was chosen on devices of the architecture.
    pub servings: &'static [EmbeddedServing],
}

/// A choice that was made on a device.
#[derive(Clone, Copy, Debug)]
pub struct EmbeddedServing {
    /// Its key.
    pub device: &'static str,
    /// As in [`Serving`]: most rows, symbol, and where the choice comes from.
    pub intervals: &'static [(usize, &'static str, Provenance)],
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

/// The kernels of one architecture, and what they serve.
#[derive(Clone, Debug)]
pub struct KernelSet {
    pub arch: Arch,
    kernels: BTreeMap<Variant, LoadedKernel>,
    servings: Vec<Serving>,
}

impl CudaKernelTable {
    pub fn archs(&self) -> Vec<Arch> {
        self.targets.iter().map(|target| target.arch).collect()
    }

    /// The architecture whose kernels a device of this compute capability runs.
    pub fn arch_for(&self, capability: (u32, u32)) -> Option<Arch> {
        Arch::best_for(capability, &self.archs())
    }

    /// What was chosen on devices, by architecture.
    pub fn servings(&self) -> impl Iterator<Item = Serving> {
        self.targets.iter().flat_map(|target| {
            target.servings.iter().filter_map(|embedded| serving(embedded, target.arch))
        })
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
            kernels.insert(variant, kernel);
        }
        let serving = |embedded: &EmbeddedServing| {
            serving(embedded, arch)
                .filter(|found| {
                    found.intervals.iter().all(|one| kernels.contains_key(&one.variant))
                })
                .ok_or_else(|| broken(format!("what serves on {} is damaged", embedded.device)))
        };
        let servings = target.servings.iter().map(serving).collect::<Result<_, Error>>()?;
        Ok(KernelSet { arch, kernels, servings })
    }
}

/// `None` where it names no kernels.
fn serving(embedded: &EmbeddedServing, arch: Arch) -> Option<Serving> {
    let interval = |(rows_max, symbol, provenance): &(usize, &str, Provenance)| {
        Some(Interval {
            rows_max: *rows_max,
            variant: Variant::parse(symbol)?,
            provenance: *provenance,
        })
    };
    let intervals = embedded.intervals.iter().map(interval).collect::<Option<Vec<Interval>>>()?;
    let spec = intervals.first()?.variant.spec();
    let has_no_limit = intervals.last()?.rows_max == usize::MAX;
    let device = Some(embedded.device.to_string());
    has_no_limit.then_some(Serving { spec, arch, device, intervals })
}

impl KernelSet {
    /// A kernel, or an error that names what is missing.
    pub fn kernel(&self, variant: &Variant) -> Result<&LoadedKernel, Error> {
        self.kernels.get(variant).ok_or_else(|| Error::Compile {
            symbol: variant.symbol(),
            message: "this binary has no such kernel; build with BESPOKE_MODEL set to the model"
                .to_string(),
        })
    }

    /// What serves `spec` on `device`: what was chosen on it, else on the device of the
    /// architecture with the nearest number of multiprocessors, else the defaults. `None` where one
    /// of those is missing.
    pub fn serving(&self, spec: &Spec, device: &CudaDevice) -> Option<Serving> {
        let own = || self.servings.iter().filter(|serving| serving.spec == *spec);
        let keys = own().filter_map(|serving| serving.device.as_deref());
        let Some((key, distance)) = nearest(&device.key(), keys) else {
            let default = Serving::default_for(spec, self.arch);
            let has = |interval: &Interval| self.kernels.contains_key(&interval.variant);
            return default.intervals.iter().all(has).then_some(default);
        };
        let mut serving = own().find(|serving| serving.device.as_deref() == Some(key))?.clone();
        if distance != Distance::Exact {
            for Interval { provenance, .. } in &mut serving.intervals {
                *provenance = provenance.transferred();
            }
        }
        Some(serving)
    }

    /// All kernels of `spec`, sorted.
    pub fn of_spec(&self, spec: &Spec) -> Vec<Variant> {
        self.kernels.keys().filter(|variant| variant.spec() == *spec).copied().collect()
    }

    pub fn iter(&self) -> impl Iterator<Item = &LoadedKernel> {
        self.kernels.values()
    }
}
