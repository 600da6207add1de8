//! Tests of the CUDA kernels on the emulator, and of the emulator.

mod awq_gemm;
mod common;
mod embed;
mod engine;
mod faults;
mod gemm;
mod matmul;
mod paged_attention;
mod primitives;
mod rms_norm;
mod rope;
mod sample;
mod silu_and_mul;
mod tune;
mod verify;
