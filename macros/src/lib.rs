//! Binds generated kernels with their shapes checked by the compiler.
//!
//! [`bind!`] makes a module of the model that a build script has made kernels for.
//!
//! [`kernels!`] turns the declarations that `bespoke-kernel-gen` emits into functions, one a
//! kernel, and the table `KERNELS` of all of them. A declaration looks like
//!
//! ```text
//! kernel gemm_n960_k576_bf16_few__avx512 {
//!     run: gemm::few<S = Avx512, E = BF16, N = 960, K = 576, COLS = 4, ROWS = 8,
//!         TILES = 4, UNROLL = 0, PREFETCH = 1024, SPLIT = 0, HALVES = 0>,
//!     spec: Gemm { n: 960, k: 576, weight: BF16 },
//!     regime: Few,
//!     target: Avx512,
//!     features: "avx512f,…",
//!     rows: 8,
//!     cols: 4,
//!     scratch_bytes: 0,
//!     reduction_class: "gemm_float.avx512",
//!     source_hash: "…",
//! }
//! serving {
//!     device: "avx512-…",
//!     intervals: [1 => <symbol> as Default, 8 => <symbol> as Measured, _ => <symbol> as Default],
//! }
//! ```
//!
//! A serving says which kernels serve which row counts, up to a limit and above the one before; it
//! becomes a row of the table `SERVINGS`. Without a `device` it is for any.

mod binding;
mod error;
mod expand;
mod model;
mod parse;
mod serving;
#[cfg(test)]
mod tests;

/// Declares kernels, `pub static KERNELS: &[bespoke::kernels::Kernel]` and
/// `pub static SERVINGS: &[bespoke::kernels::Serving]`.
///
/// What a declaration says twice, in `run` for the template and in `spec` for the engine, must
/// agree: names are compared here, sizes by constant assertions, so that a wrong table does not
/// compile. All errors are reported at once, each at its place.
#[proc_macro]
pub fn kernels(input: proc_macro::TokenStream) -> proc_macro::TokenStream {
    kernels_tokens(input.into()).into()
}

/// Binds the kernels that a build script has made with `bespoke_kernel_gen::cargo::build_model`.
///
/// ```text
/// bespoke::bind! {
///     /// The model of this program.
///     pub mod model {
///         hidden_size: 576,
///         group_size: 64,
///         dtype: F16,
///     }
/// }
/// ```
///
/// makes a module `model` with the model's sizes as constants (`HIDDEN_SIZE`, `NUM_HEADS`, …), the
/// type `Kernels`, by which engines and `bespoke::slices` find its kernels, and a type for each op
/// that runs on slices. What stands between the braces is optional (`pub mod model;`): sizes that
/// the program relies on. Where the model has another, the program does not compile, and the
/// message names both numbers. `group_size: Channel` is one group for all inputs, `group_size: 0`
/// stands for dense weights.
#[proc_macro]
pub fn bind(input: proc_macro::TokenStream) -> proc_macro::TokenStream {
    bind_tokens(input.into()).into()
}

fn bind_tokens(input: proc_macro2::TokenStream) -> proc_macro2::TokenStream {
    let mut errors = error::Errors::default();
    let mut tokens = binding::expand(input, &mut errors);
    tokens.extend(errors.into_compile_errors());
    tokens
}

fn kernels_tokens(input: proc_macro2::TokenStream) -> proc_macro2::TokenStream {
    let mut errors = error::Errors::default();
    let mut tokens = expand_all(input, &mut errors);
    tokens.extend(errors.into_compile_errors());
    tokens
}

/// What is right of the input, expanded; the rest is reported.
fn expand_all(
    input: proc_macro2::TokenStream,
    errors: &mut error::Errors,
) -> proc_macro2::TokenStream {
    let parse::Declarations { kernels, servings } = parse::parse(input, errors);
    let symbols: Vec<syn::Ident> = kernels.iter().map(|kernel| kernel.symbol.clone()).collect();
    let kernels = model::check(kernels, errors);
    let servings = serving::check(servings, &symbols, &kernels, errors);
    expand::expand(&kernels, &servings)
}
