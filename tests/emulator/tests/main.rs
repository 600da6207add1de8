//! Tests of the CUDA kernels on the emulator, and of the emulator.

mod common;
mod faults;
mod paged_attention;
mod primitives;
mod rope;
mod silu_and_mul;
