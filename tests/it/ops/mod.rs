//! Every op against a naive loop, on every instruction set of this machine.

mod awq_gemm;
mod gemm;
mod matmul;
