//! Expansions and errors of the macros, as text.

use proc_macro2::TokenStream;

use crate::binding;
use crate::error::Errors;
use crate::{bind_tokens, expand_all, kernels_tokens};

const GOOD: &str = r#"
kernel awq_gemm_n960_k576_g64_int8_few__avx512 {
    run: awq_gemm::int8_few<S = Avx512, N = 960, K = 576, GROUP = 64, COLS = 4, ROWS = 8,
        TILES = 4, UNROLL = 1, PREFETCH = 2048, SPLIT = 0, HALVES = 0>,
    spec: AwqGemm { n: 960, k: 576, group: Of(64), activation: Int8 },
    regime: Few,
    target: Avx512,
    features: "avx512f,avx512vnni",
    rows: 8,
    cols: 4,
    scratch_bytes: 0,
    reduction_class: "awq_gemm_int8.avx512",
    source_hash: "0123",
}
kernel rms_norm_h576_int8_g64__portable {
    run: rms_norm::run<S = Portable, HIDDEN = 576, GROUP = 64>,
    spec: RmsNorm { hidden: 576, out: I8 { group: 64 } },
    regime: Any,
    target: Portable,
    features: "",
    rows: 1,
    cols: 0,
    scratch_bytes: 0,
    reduction_class: "rms_norm.portable",
    source_hash: "4567",
}
kernel awq_gemm_n960_k576_g64_int8_one__avx512 {
    run: awq_gemm::int8_one<S = Avx512, N = 960, K = 576, GROUP = 64, COLS = 4, ROWS = 1,
        TILES = 4, UNROLL = 1, PREFETCH = 2048, SPLIT = 0, HALVES = 0>,
    spec: AwqGemm { n: 960, k: 576, group: Of(64), activation: Int8 },
    regime: One,
    target: Avx512,
    features: "avx512f,avx512vnni",
    rows: 1,
    cols: 4,
    scratch_bytes: 0,
    reduction_class: "awq_gemm_int8.avx512",
    source_hash: "89ab",
}
serving {
    intervals: [_ => rms_norm_h576_int8_g64__portable as Default],
}
serving {
    device: "avx512-amd-25-17",
    intervals: [
        1 => awq_gemm_n960_k576_g64_int8_one__avx512 as Default,
        _ => awq_gemm_n960_k576_g64_int8_few__avx512 as Measured,
    ],
}
"#;

fn tokens(text: &str) -> TokenStream {
    text.parse().expect("the cases are tokens")
}

/// The errors of an input, one a line, with their places.
fn errors(text: &str) -> String {
    let mut errors = Errors::default();
    expand_all(tokens(text), &mut errors);
    errors.print()
}

/// `GOOD` with one piece of text replaced by another.
fn with(old: &str, new: &str) -> String {
    assert!(GOOD.contains(old), "{old} is not in the good case");
    GOOD.replacen(old, new, 1)
}

#[test]
fn expansion() {
    let file = syn::parse2(kernels_tokens(tokens(GOOD))).expect("the expansion is a file");
    insta::assert_snapshot!(prettyplease::unparse(&file));
}

#[test]
fn a_right_input_has_no_errors() {
    assert_eq!(errors(GOOD), "");
}

#[test]
fn wrong_names_are_reported_at_their_place() {
    let cases = [
        with("awq_gemm::int8_few", "awk_gemm::int8_few"),
        with("awq_gemm::int8_few", "awq_gemm::int8_lots"),
        with("awq_gemm::int8_few", "int8_few"),
        with("K = 576, ", ""),
        with("K = 576", "K = \"576\""),
        with("K = 576", "DEPTH = 576"),
        with("K = 576", "K = 576, K = 576"),
        with("S = Avx512", "S = V3"),
        with("AwqGemm {", "Gemm {"),
        with("Of(64)", "64"),
        with("group: Of(64), ", ""),
        with("n: 960", "rows: 960"),
        with("activation: Int8", "activation: Float"),
        with("regime: Few", "regime: Many"),
        with("target: Avx512", "target: Sse2"),
        with("\"avx512f,avx512vnni\"", "\"\""),
        with("cols: 4,", ""),
        with("cols: 4", "columns: 4"),
        with("cols: 4", "rows: 4"),
        with("kernel rms", "kernal rms"),
        with("rms_norm_h576_int8_g64__portable", "awq_gemm_n960_k576_g64_int8_few__avx512"),
        with("_ => rms_norm_h576", "_ => rms_norm_h577"),
        with("as Measured", "as Guessed"),
        with("1 => awq", "_ => awq"),
        with("_ => awq", "2 => awq"),
        with("1 => awq", "0 => awq"),
        with("intervals: [_ => rms_norm_h576_int8_g64__portable as Default]", "intervals: []"),
        with("device: \"avx512", "machine: \"avx512"),
        with(
            "_ => awq_gemm_n960_k576_g64_int8_few__avx512",
            "_ => rms_norm_h576_int8_g64__portable",
        ),
    ];
    let text: String = cases.iter().map(|case| errors(case)).collect();
    insta::assert_snapshot!(text);
}

#[test]
fn all_errors_are_reported_at_once() {
    let text = with("K = 576", "DEPTH = 576").replace("regime: Any", "regime: One");
    let reported = errors(&text);
    assert_eq!(reported.lines().count(), 2, "{reported}");
}

/// Kernels of a target exist on its architecture, over the vectors of its module.
#[test]
fn targets_have_their_architecture() {
    let neon = GOOD.replace("Avx512", "Neon");
    assert_eq!(errors(&neon), "");
    let expansion = kernels_tokens(tokens(&neon)).to_string();
    assert!(expansion.contains("simd_neon :: Neon") && !expansion.contains("simd_x86"));
    // A function, its assertions and its row for each of two kernels, and a serving.
    let condition =
        |arch| expansion.matches(&format!("# [cfg (target_arch = \"{arch}\")]")).count();
    assert_eq!((condition("aarch64"), condition("x86_64")), (7, 0), "{expansion}");
}

/// Sizes are compared by the compiler: the assertion carries both numbers.
#[test]
fn sizes_become_assertions() {
    let expansion = kernels_tokens(tokens(&with("GROUP = 64", "GROUP = 128"))).to_string();
    let expected = "assert ! (576 % 128 == 0 , \
        \"awq_gemm_n960_k576_g64_int8_few__avx512: GROUP 128 does not divide K 576\")";
    assert!(expansion.contains(expected), "{expansion}");
    let expansion = kernels_tokens(tokens(&with("N = 960", "N = 961"))).to_string();
    assert!(expansion.contains("N 961 is not the spec's n 960"), "{expansion}");
}

const BINDING: &str = r#"
/// The model of this program.
pub(crate) mod model {
    hidden_size: 576,
    group_size: 64,
    dtype: F16,
}
"#;

/// The errors of `BINDING` with one piece of text replaced by another.
fn binding_errors(old: &str, new: &str) -> String {
    assert!(BINDING.contains(old), "{old} is not in the good case");
    let mut errors = Errors::default();
    binding::expand(tokens(&BINDING.replacen(old, new, 1)), &mut errors);
    errors.print()
}

#[test]
fn expansion_of_a_binding() {
    let file = syn::parse2(bind_tokens(tokens(BINDING))).expect("the expansion is a file");
    insta::assert_snapshot!(prettyplease::unparse(&file));
}

/// Claims are optional, and a group may be all inputs.
#[test]
fn bindings_without_claims_expand() {
    let bare = bind_tokens(tokens("mod model;")).to_string();
    assert!(bare.contains("mod model") && !bare.contains("check_size"), "{bare}");
    assert_eq!(bare, bind_tokens(tokens("mod model {}")).to_string());
    assert_eq!(binding_errors("64", "Channel"), "");
}

#[test]
fn wrong_claims_are_reported_at_their_place() {
    let cases = [
        ("hidden_size", "hidden"),
        ("576", "\"576\""),
        ("576", "-576"),
        ("64", "Row"),
        ("F16", "I8"),
        ("F16", "16"),
        ("group_size", "hidden_size"),
        ("mod model", "model"),
        ("576,", "576"),
    ];
    let text: String = cases.iter().map(|(old, new)| binding_errors(old, new)).collect();
    insta::assert_snapshot!(text);
}

/// What rustc says to wrong declarations, each at its place in the source.
#[test]
fn wrong_declarations_do_not_compile() {
    trybuild::TestCases::new().compile_fail("../tests/it/ui/*.rs");
}
