//! Tests of the CUDA kernels on the emulator, and of the emulator.

mod common;
mod paged_attention;
mod rope;
mod silu_and_mul;
