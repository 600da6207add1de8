//! What the backend needs of a GPU: memory, launches in order, recordings of launches.
//!
//! All work of a device is done in the order in which it was asked for (one stream). Memory lives
//! as long as its device: everything is allocated at start.
//!
//! Loading may fail, and says why. Later, only a defect can go wrong: of a kernel, of the driver or
//! of the machine. After such a failure nothing that the device holds can be trusted or even read,
//! so the methods without a `Result` panic with what failed and what to do.

use bespoke_kernel_gen::cuda::{Arch, Launch, Serving, Spec, Variant};
use bespoke_kernel_gen::tuning::CudaDevice;

use crate::error::Error;

/// An address in the memory of a device; 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Address(pub u64);

impl Address {
    pub const NULL: Address = Address(0);

    /// `len` bytes further.
    pub fn offset(self, len: usize) -> Address {
        Address(self.0 + len as u64)
    }
}

/// What is known of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    pub name: String,
    /// Architecture of the kernels that it runs.
    pub arch: Arch,
    pub num_sms: usize,
    pub memory_bytes: usize,
}

impl DeviceInfo {
    /// What timings depend on, as records and locks name it.
    pub fn class(&self) -> CudaDevice {
        CudaDevice::new(self.arch.name(), self.num_sms, self.memory_bytes, &self.name)
    }
}

/// Memory that only kernels write, or that the host writes while nothing reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Written once, at start.
    Weights,
    /// Written by kernels and steps.
    Working,
}

pub trait Device {
    /// A loaded kernel.
    type Kernel;
    /// A recording of launches.
    type Graph;
    /// Memory of the host that the device can copy from and to while the host goes on.
    type Host: AsRef<[u8]> + AsMut<[u8]>;

    fn info(&self) -> &DeviceInfo;

    /// What serves `spec` on the device; `None` where one of its kernels is missing.
    fn serving(&self, spec: &Spec) -> Option<Serving>;

    /// All kernels of `spec` that there are, sorted: those that serve, and a tuner's candidates.
    fn kernels(&self, spec: &Spec) -> Vec<Variant>;

    /// Loads kernels that [`Device::serving`] or [`Device::kernels`] gave, in their order.
    fn load(&mut self, variants: &[Variant]) -> Result<Vec<Self::Kernel>, Error>;

    fn free_bytes(&self) -> Result<usize, Error>;

    /// `len` zeroed bytes for `what`, which an error names; aligned to 256 bytes.
    fn alloc(&mut self, len: usize, usage: Use, what: &str) -> Result<Address, Error>;

    fn alloc_host(&mut self, len: usize) -> Result<Self::Host, Error>;

    /// Copies to the device. `bytes` may be written again after the next [`Device::download`] or
    /// [`Device::synchronize`], and at once where they are not of [`Device::alloc_host`].
    fn upload(&mut self, to: Address, bytes: &[u8]);

    /// Waits for all work before it and copies from the device.
    fn download(&mut self, from: Address, bytes: &mut [u8]);

    /// Copies within the device; the ranges do not overlap.
    fn copy(&mut self, from: Address, to: Address, len: usize);

    /// `params` are the bytes of the kernel's parameter struct.
    fn launch(&mut self, kernel: &Self::Kernel, launch: Launch, params: &[u8]);

    /// Launches are recorded instead of run, until [`Device::end_capture`].
    fn begin_capture(&mut self);

    fn end_capture(&mut self) -> Self::Graph;

    fn replay(&mut self, graph: &Self::Graph);

    fn synchronize(&mut self);
}
