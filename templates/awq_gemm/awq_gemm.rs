//! `awq_gemm`
