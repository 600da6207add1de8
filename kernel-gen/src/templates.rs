//! The text of the CPU templates, from which kernels take their bodies and their hashes.

use crate::spec::{KernelSpec, RowFormat};
use crate::target::Target;

/// A template file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Template {
    /// Path in the repository.
    pub path: &'static str,
    pub text: &'static str,
}

macro_rules! template {
    ($path:literal) => {
        Template {
            path: concat!("templates/", $path),
            text: include_str!(concat!("../templates/", $path)),
        }
    };
}

pub const SIMD: Template = template!("common/simd.rs");
pub const SIMD_PORTABLE: Template = template!("common/simd_portable.rs");
pub const SIMD_X86: Template = template!("common/simd_x86.rs");
pub const PAGES: Template = template!("common/pages.rs");
pub const EMBED: Template = template!("embed/embed.rs");
pub const RMS_NORM: Template = template!("rms_norm/rms_norm.rs");
pub const GEMM: Template = template!("gemm/gemm.rs");
pub const AWQ_GEMM: Template = template!("awq_gemm/awq_gemm.rs");
pub const ROPE: Template = template!("rope/rope.rs");
pub const PAGED_ATTENTION: Template = template!("paged_attention/paged_attention.rs");
pub const SILU_AND_MUL: Template = template!("silu_and_mul/silu_and_mul.rs");
pub const QUANTIZE: Template = template!("quantize/quantize.rs");
pub const SAMPLE: Template = template!("sample/sample.rs");

/// The file that holds the entry points of the spec's op.
pub fn body(spec: &KernelSpec) -> Template {
    match spec {
        KernelSpec::Embed { .. } => EMBED,
        KernelSpec::RmsNorm { .. } => RMS_NORM,
        KernelSpec::Gemm { .. } => GEMM,
        KernelSpec::AwqGemm { .. } => AWQ_GEMM,
        KernelSpec::Rope { .. } => ROPE,
        KernelSpec::PagedAttention { .. } => PAGED_ATTENTION,
        KernelSpec::SiluAndMul { .. } => SILU_AND_MUL,
        KernelSpec::Quantize { .. } => QUANTIZE,
        KernelSpec::Sample { .. } => SAMPLE,
    }
}

/// All files a kernel's code comes from, the body first.
pub fn used(spec: &KernelSpec, target: Target) -> Vec<Template> {
    let mut files = vec![body(spec), SIMD];
    files.push(match target {
        Target::Portable => SIMD_PORTABLE,
        Target::X86_64V3 | Target::Avx512 => SIMD_X86,
    });
    match spec {
        KernelSpec::Rope { .. } | KernelSpec::PagedAttention { .. } => files.push(PAGES),
        KernelSpec::RmsNorm { out: RowFormat::I8 { .. }, .. }
        | KernelSpec::SiluAndMul { out: RowFormat::I8 { .. }, .. } => files.push(QUANTIZE),
        _ => {}
    }
    files
}
