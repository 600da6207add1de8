//! Generated kernels on an NVIDIA GPU.
