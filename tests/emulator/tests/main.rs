//! Tests of the CUDA kernels on the emulator, and of the emulator.

mod awq_gemm;
mod common;
mod engine;
mod embed;
mod faults;
mod gemm;
mod matmul;
mod primitives;
mod rms_norm;
mod sample;
mod paged_attention;
mod primitives;
mod rope;
mod silu_and_mul;
