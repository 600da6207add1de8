//! Generated kernels on this machine.
