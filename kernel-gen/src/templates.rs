//! The text of the CPU templates, from which kernels take their bodies and their hashes.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::LazyLock;

use proc_macro2::{Delimiter, Spacing, TokenStream, TokenTree};

use crate::spec::KernelSpec;
use crate::target::Target;

/// A template file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Template {
    /// Path in the repository.
    pub path: &'static str,
    pub text: &'static str,
}

impl Template {
    /// The file's code alone, as [`code_of`] writes it.
    pub fn code(&self) -> &'static str {
        static CODES: LazyLock<BTreeMap<&str, String>> = LazyLock::new(|| {
            ALL.iter().map(|(_, template)| (template.path, code_of(template.text))).collect()
        });
        CODES.get(self.path).map_or(self.text, String::as_str)
    }
}

/// The tokens of a source text without comments, documentation and layout. What are no tokens
/// stays as it is, for `compile` to report.
pub fn code_of(text: &str) -> String {
    match TokenStream::from_str(text) {
        Ok(tokens) => {
            let mut code = String::with_capacity(text.len());
            write_tokens(tokens, Delimiter::None, &mut code);
            code
        }
        Err(_) => text.to_string(),
    }
}

fn write_tokens(tokens: TokenStream, within: Delimiter, code: &mut String) {
    let mut tokens: Vec<TokenTree> = tokens.into_iter().collect();
    let is_comma = |token: &TokenTree| matches!(token, TokenTree::Punct(p) if p.as_char() == ',');
    // NOTE: a list over several lines ends with a comma that it lacks on one; `(a,)` is a tuple,
    // and `(a)` none.
    let num_commas = tokens.iter().filter(|token| is_comma(token)).count();
    let is_list = within != Delimiter::Parenthesis || num_commas > 1;
    if is_list && tokens.last().is_some_and(is_comma) {
        tokens.pop();
    }
    let mut idx = 0;
    while idx < tokens.len() {
        let len = doc_len(&tokens[idx..]);
        if len > 0 {
            idx += len;
            continue;
        }
        write_token(&tokens[idx], code);
        idx += 1;
    }
}

fn write_token(token: &TokenTree, code: &mut String) {
    match token {
        TokenTree::Group(group) => {
            let (open, close) = match group.delimiter() {
                Delimiter::Parenthesis => ("( ", ") "),
                Delimiter::Brace => ("{ ", "} "),
                Delimiter::Bracket => ("[ ", "] "),
                Delimiter::None => ("", ""),
            };
            code.push_str(open);
            write_tokens(group.stream(), group.delimiter(), code);
            code.push_str(close);
        }
        TokenTree::Punct(punct) => {
            code.push(punct.as_char());
            if punct.spacing() == Spacing::Alone {
                code.push(' ');
            }
        }
        other => {
            code.push_str(&other.to_string());
            code.push(' ');
        }
    }
}

/// How many of the first tokens are one attribute of documentation.
fn doc_len(tokens: &[TokenTree]) -> usize {
    let is = |token: Option<&TokenTree>, char| match token {
        Some(TokenTree::Punct(punct)) => punct.as_char() == char,
        _ => false,
    };
    if !is(tokens.first(), '#') {
        return 0;
    }
    let len = if is(tokens.get(1), '!') { 3 } else { 2 };
    let Some(TokenTree::Group(group)) = tokens.get(len - 1) else { return 0 };
    let first = group.stream().into_iter().next();
    match (group.delimiter(), first) {
        (Delimiter::Bracket, Some(TokenTree::Ident(name))) if name == "doc" => len,
        _ => 0,
    }
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
pub const SIMD_NEON: Template = template!("common/simd_neon.rs");
pub const SIMD_PORTABLE: Template = template!("common/simd_portable.rs");
pub const SIMD_X86: Template = template!("common/simd_x86.rs");
pub const BF16: Template = template!("common/bf16.rs");
pub const PAGES: Template = template!("common/pages.rs");
pub const EMBED: Template = template!("embed/embed.rs");
pub const RMS_NORM: Template = template!("rms_norm/rms_norm.rs");
pub const GEMM: Template = template!("gemm/gemm.rs");
pub const GEMM_BF16: Template = template!("gemm_bf16/gemm_bf16.rs");
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
        KernelSpec::GemmBf16 { .. } => GEMM_BF16,
        KernelSpec::AwqGemm { .. } => AWQ_GEMM,
        KernelSpec::Rope { .. } => ROPE,
        KernelSpec::PagedAttention { .. } => PAGED_ATTENTION,
        KernelSpec::SiluAndMul { .. } => SILU_AND_MUL,
        KernelSpec::Quantize { .. } => QUANTIZE,
        KernelSpec::Sample { .. } => SAMPLE,
    }
}

/// Every template, by the name of its module.
pub const ALL: [(&str, Template); 16] = [
    ("awq_gemm", AWQ_GEMM),
    ("bf16", BF16),
    ("embed", EMBED),
    ("gemm", GEMM),
    ("gemm_bf16", GEMM_BF16),
    ("pages", PAGES),
    ("paged_attention", PAGED_ATTENTION),
    ("quantize", QUANTIZE),
    ("rms_norm", RMS_NORM),
    ("rope", ROPE),
    ("sample", SAMPLE),
    ("silu_and_mul", SILU_AND_MUL),
    ("simd", SIMD),
    ("simd_neon", SIMD_NEON),
    ("simd_portable", SIMD_PORTABLE),
    ("simd_x86", SIMD_X86),
];

/// All files a kernel's code comes from: the body, the target's vectors, and what they use.
pub fn used(spec: &KernelSpec, target: Target) -> Vec<Template> {
    let vectors = match target {
        Target::Portable => SIMD_PORTABLE,
        Target::X86_64V3 | Target::Avx512 => SIMD_X86,
        Target::Neon => SIMD_NEON,
    };
    let mut files = vec![body(spec), vectors];
    let mut next = 0;
    while next < files.len() {
        let code = files[next].code();
        for (module, template) in ALL {
            let uses = |separator| code.contains(&format!("super :: {module} {separator}"));
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
    use crate::spec::DType;

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
        let embed = KernelSpec::Embed { hidden: 512, dtype: DType::F16 };
        let x86 = ["embed/embed.rs", "common/simd_x86.rs", "common/simd.rs"];
        assert_eq!(paths(&embed, Target::Avx512), x86.map(|path| format!("templates/{path}")));
        let gemm_bf16 = KernelSpec::GemmBf16 { n: 512, k: 512 };
        let files = paths(&gemm_bf16, Target::Avx512);
        for path in ["gemm_bf16/gemm_bf16.rs", "gemm/gemm.rs", "common/bf16.rs"] {
            assert!(files.contains(&format!("templates/{path}").as_str()), "{path}");
        }
        let neon = ["embed/embed.rs", "common/simd_neon.rs", "common/simd.rs"];
        assert_eq!(paths(&embed, Target::Neon), neon.map(|path| format!("templates/{path}")));
    }

    /// Comments and layout are no code; everything else is.
    #[test]
    fn code_is_what_is_compiled() {
        let text = "//! A file.\n\n/// Adds.\n#[inline]\npub fn add(a: &[u8], b: u8) -> u8 {\n    \
                    a[0] + b\n}\nuse super::simd::Simd;\n";
        let code = code_of(text);
        let same = [
            text.replace("//! A file.", "//! Another.\n//! Long."),
            text.replace("/// Adds.", "/** Sums\n up. */"),
            text.replace("/// Adds.\n", "#[doc = \"Adds.\"]\n"),
            text.replace("a[0] + b", "a[0] // The first.\n        + /* and */ b"),
            text.replace("(a: &[u8], b: u8)", "(\n    a: &[u8],\n    b: u8,\n)"),
            text.replace('\n', "\n\n"),
        ];
        for other in same {
            assert_eq!(code_of(&other), code, "{other}");
        }
        let different = [
            text.replace("a[0] + b", "a[0] - b"),
            text.replace("a[0] + b", "a[1] + b"),
            text.replace("a[0] + b", "(a[0], b,)"),
            text.replace("#[inline]", "#[inline(always)]"),
            text.replace("#[inline]\n", ""),
            text.replace("b: u8", "b: i8"),
            text.replace("&[u8]", "&&[u8]"),
        ];
        for other in different {
            assert_ne!(other, text);
            assert_ne!(code_of(&other), code, "{other}");
        }
        assert_ne!(code_of("(a,)"), code_of("(a)"));
        assert_ne!(code_of("a >> b"), code_of("a > > b"));
        assert_eq!(code_of("no \"tokens"), "no \"tokens");
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
