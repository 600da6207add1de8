//! The text of the CPU templates, from which kernels take their bodies and their hashes.

use crate::spec::KernelSpec;
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

/// Every template, by the name of its module.
pub const ALL: [(&str, Template); 13] = [
    ("awq_gemm", AWQ_GEMM),
    ("embed", EMBED),
    ("gemm", GEMM),
    ("pages", PAGES),
    ("paged_attention", PAGED_ATTENTION),
    ("quantize", QUANTIZE),
    ("rms_norm", RMS_NORM),
    ("rope", ROPE),
    ("sample", SAMPLE),
    ("silu_and_mul", SILU_AND_MUL),
    ("simd", SIMD),
    ("simd_portable", SIMD_PORTABLE),
    ("simd_x86", SIMD_X86),
];

/// All files a kernel's code comes from: the body, the target's vectors, and what they use.
pub fn used(spec: &KernelSpec, target: Target) -> Vec<Template> {
    let vectors = match target {
        Target::Portable => SIMD_PORTABLE,
        Target::X86_64V3 | Target::Avx512 => SIMD_X86,
    };
    let mut files = vec![body(spec), vectors];
    let mut next = 0;
    while next < files.len() {
        let text = files[next].text;
        for (module, template) in ALL {
            let uses = |separator| text.contains(&format!("super::{module}{separator}"));
            if !files.contains(&template) && (uses("::") || uses(";")) {
                files.push(template);
            }
        }
        next += 1;
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(spec: &KernelSpec, target: Target) -> Vec<&'static str> {
        used(spec, target).into_iter().map(|template| template.path).collect()
    }

    #[test]
    fn used_files_follow_the_imports() {
        let spec = KernelSpec::Sample { vocab: 512 };
        let portable = ["sample/sample.rs", "common/simd_portable.rs", "common/simd.rs"];
        assert_eq!(
            paths(&spec, Target::Portable),
            portable.map(|path| format!("templates/{path}"))
        );
        let quantize = KernelSpec::Quantize { k: 512, group: 64 };
        let x86 = ["quantize/quantize.rs", "common/simd_x86.rs", "common/simd.rs"];
        assert_eq!(paths(&quantize, Target::Avx512), x86.map(|path| format!("templates/{path}")));
    }

    /// `used` reads single imports; a braced one from `super` itself would escape it.
    #[test]
    fn imports_are_written_one_by_one() {
        for (_, template) in ALL {
            assert!(!template.text.contains("super::{"), "{}", template.path);
            assert!(!template.text.contains("super::*"), "{}", template.path);
        }
    }
}
