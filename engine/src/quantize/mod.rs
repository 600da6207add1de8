//! Weights → 4-bit AWQ "gemm" checkpoints.

pub mod checkpoint;
