//! Kernels → Rust: a function and its assertions a kernel, and the table of all.

use proc_macro2::{Span, TokenStream};
use quote::{format_ident, quote, quote_spanned};
use syn::{Ident, LitInt};

use crate::model::{Kernel, Kind, TARGETS, Value, argument};
use crate::serving::{Interval, Serving};

pub(crate) fn expand(kernels: &[Kernel], servings: &[Serving<'_>]) -> TokenStream {
    let functions = kernels.iter().map(expand_function);
    let rows = kernels.iter().map(expand_row);
    let servings = servings.iter().map(expand_serving);
    quote! {
        #(#functions)*

        /// Every kernel of this build, sorted by op and sizes.
        pub static KERNELS: &[::bespoke::kernels::Kernel] = &[#(#rows),*];

        /// Which kernel serves which rows.
        pub static SERVINGS: &[::bespoke::kernels::Serving] = &[#(#servings),*];
    }
}

/// Kernels of an architecture's instruction sets exist only there.
fn condition(kernel: &Kernel) -> Option<TokenStream> {
    let arch = TARGETS.iter().find(|target| kernel.target == target.name)?.arch?;
    Some(quote! { #[cfg(target_arch = #arch)] })
}

fn expand_function(kernel: &Kernel) -> TokenStream {
    let Kernel { symbol, op, entry, features, .. } = kernel;
    let condition = condition(kernel);
    let assertions = assertions(kernel);
    let features = match features.value().is_empty() {
        true => None,
        false => Some(quote! { #[target_feature(enable = #features)] }),
    };
    let module = format_ident!("{}", op.name);
    let function = format_ident!("{}", entry.name);
    let args = format_ident!("{}", op.args);
    let generics = entry.parameters.iter().zip(&kernel.arguments).map(generic);
    quote! {
        #condition
        #[allow(clippy::modulo_one, reason = "a size may be 1")]
        const _: () = { #(#assertions)* };

        #condition
        #features
        unsafe fn #symbol(
            args: &::bespoke::kernels::abi::#args,
            share: ::bespoke::kernels::abi::Share,
        ) {
            // SAFETY: the caller's, with the instruction set enabled above.
            unsafe { ::bespoke::kernels::#module::#function::<#(#generics),*>(args, share) }
        }
    }
}

/// A generic argument, types by their full path.
fn generic((parameter, value): (&&str, &Value)) -> TokenStream {
    match value {
        Value::Size(size) => quote! { #size },
        Value::Flag(flag) => quote! { #flag },
        Value::Name(name) | Value::Sized(name, _) => {
            let module = match *parameter {
                "KV" => "pages",
                _ => TARGETS
                    .iter()
                    .find(|target| *parameter == "S" && name == target.simd)
                    .map_or("simd", |target| target.module),
            };
            let module = format_ident!("{module}");
            quote! { ::bespoke::kernels::#module::#name }
        }
    }
}

fn expand_row(kernel: &Kernel) -> TokenStream {
    let Kernel { symbol, op, regime, target, rows, cols, scratch_bytes, .. } = kernel;
    let Kernel { reduction_class, source_hash, .. } = kernel;
    let condition = condition(kernel);
    let name = symbol.to_string();
    let op_ident = format_ident!("{}", op.spec);
    let spec = spec(kernel);
    quote! {
        #condition
        ::bespoke::kernels::Kernel {
            symbol: #name,
            spec: #spec,
            regime: ::bespoke::kernel_gen::spec::RowRegime::#regime,
            target: ::bespoke::kernel_gen::target::Target::#target,
            rows: #rows,
            cols: #cols,
            scratch_bytes: #scratch_bytes,
            reduction_class: #reduction_class,
            source_hash: #source_hash,
            run: ::bespoke::kernels::KernelFn::#op_ident(#symbol),
        }
    }
}

/// The kernel's spec as an expression.
fn spec(kernel: &Kernel) -> TokenStream {
    let op = format_ident!("{}", kernel.op.spec);
    let fields = kernel.op.fields.iter().zip(&kernel.fields).map(|(field, value)| {
        let name = format_ident!("{}", field.name);
        let value = field_value(field.kind, value);
        quote! { #name: #value }
    });
    quote! { ::bespoke::kernel_gen::spec::KernelSpec::#op { #(#fields),* } }
}

/// Kernels are named, not pointed to, so that a table with others in their places serves those.
fn expand_serving(serving: &Serving<'_>) -> TokenStream {
    // A serving has at least one interval.
    let first = serving.intervals[0].kernel;
    let (condition, spec, target) = (condition(first), spec(first), &first.target);
    let device = match &serving.device {
        Some(device) => quote! { ::core::option::Option::Some(#device) },
        None => quote! { ::core::option::Option::None },
    };
    let intervals = serving.intervals.iter().map(|Interval { rows_max, kernel, provenance }| {
        let rows_max = match rows_max {
            Some(rows) => quote! { #rows },
            None => quote! { usize::MAX },
        };
        let symbol = kernel.symbol.to_string();
        quote! {
            ::bespoke::kernels::Interval {
                rows_max: #rows_max,
                symbol: #symbol,
                provenance: ::bespoke::kernel_gen::plan::Provenance::#provenance,
            }
        }
    });
    quote! {
        #condition
        ::bespoke::kernels::Serving {
            spec: #spec,
            target: ::bespoke::kernel_gen::target::Target::#target,
            device: #device,
            intervals: &[#(#intervals),*],
        }
    }
}

fn field_value(kind: Kind, value: &Value) -> TokenStream {
    let path = format_ident!("{}", format!("{kind:?}"));
    let path = quote! { ::bespoke::kernel_gen::spec::#path };
    match value {
        Value::Size(size) => quote! { #size },
        Value::Flag(flag) => quote! { #flag },
        Value::Name(name) => quote! { #path::#name },
        Value::Sized(name, size) if kind == Kind::RowFormat => {
            quote! { #path::#name { group: #size } }
        }
        Value::Sized(name, size) => quote! { #path::#name(#size) },
    }
}

/// What the sizes of one kernel must fulfil, each with the numbers in its message.
fn assertions(kernel: &Kernel) -> Vec<TokenStream> {
    let mut assertions = Vec::new();
    let size = |parameter| match argument(kernel, Some(parameter)) {
        Some(Value::Size(size)) => Some(size),
        _ => None,
    };
    for (field, value) in kernel.op.fields.iter().zip(&kernel.fields) {
        let Some(given) = field.parameter.and_then(size) else { continue };
        let parameter = field.parameter.unwrap_or_default();
        match (field.kind, value) {
            (Kind::Size, Value::Size(wanted)) | (Kind::RowFormat, Value::Sized(_, wanted)) => {
                let what = format!("{parameter} {given} is not the spec's {} {wanted}", field.name);
                assertions.push(assertion(
                    kernel,
                    given.span(),
                    quote! { #given == #wanted },
                    &what,
                ));
            }
            (Kind::RowFormat, _) => {
                let (wanted, rows) = match value.is_name("Bf16") {
                    true => (1usize, "bfloat16"),
                    false => (0, "float32"),
                };
                let what = format!("{parameter} {given} is not {wanted}, which {rows} rows have");
                let is_right = quote! { #given == #wanted };
                assertions.push(assertion(kernel, given.span(), is_right, &what));
            }
            (Kind::GroupSize, Value::Sized(_, group)) => {
                assertions.extend(divides(kernel, (parameter, given), (field.name, group)));
            }
            _ => {}
        }
    }
    let pairs =
        [("GROUP", "K"), ("GROUP", "HIDDEN"), ("GROUP", "INTERMEDIATE"), ("KV_HEADS", "HEADS")];
    for (small, large) in pairs {
        if let (Some(divisor), Some(number)) = (size(small), size(large)) {
            assertions.extend(divides(kernel, (small, divisor), (large, number)));
        }
    }
    for (name, declared) in [("ROWS", &kernel.rows), ("COLS", &kernel.cols)] {
        if let Some(given) = size(name) {
            let what = format!("{name} {given} is not the declared {declared}");
            assertions.push(assertion(kernel, given.span(), quote! { #given == #declared }, &what));
        }
    }
    assertions
}

/// `divisor` divides `number`; 0 stands for "no groups".
fn divides(
    kernel: &Kernel,
    (divisor_name, divisor): (&str, &LitInt),
    (number_name, number): (&str, &LitInt),
) -> Option<TokenStream> {
    if divisor.base10_digits() == "0" {
        return None;
    }
    let what = format!("{divisor_name} {divisor} does not divide {number_name} {number}");
    Some(assertion(kernel, divisor.span(), quote! { #number % #divisor == 0 }, &what))
}

fn assertion(kernel: &Kernel, span: Span, condition: TokenStream, what: &str) -> TokenStream {
    let symbol: &Ident = &kernel.symbol;
    let message = format!("{symbol}: {what}");
    quote_spanned! { span => ::core::assert!(#condition, #message); }
}
