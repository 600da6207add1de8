//! Tests of the CUDA kernels on the emulator, and of the emulator.

mod common;
mod embed;
mod faults;
mod primitives;
mod rms_norm;
mod sample;
mod silu_and_mul;
