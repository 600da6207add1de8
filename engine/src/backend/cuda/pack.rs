//! Checkpoint weights into the layouts that the CUDA matmuls read.

use bespoke_kernel_gen::cuda::Spec;
use bespoke_kernel_gen::spec::LinearRole;

use crate::error::Error;
use crate::model::linear::LinearSource;

/// A linear's weights as its kernels read them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    pub weight: Vec<u8>,
    /// Of AWQ weights, else empty.
    pub scales: Vec<u8>,
}

pub fn linear(_: &Spec, _: LinearRole, _: &LinearSource<'_>) -> Result<Packed, Error> {
    unreachable!()
}
