//! Generated kernels on an NVIDIA GPU.
pub mod pack;
