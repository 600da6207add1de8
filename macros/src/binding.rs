//! `bind!`: a module with the model that a build script has made kernels for, and what its user
//! claims about the sizes.

use proc_macro2::{Span, TokenStream};
use quote::{format_ident, quote, quote_spanned};
use syn::parse::{ParseStream, Parser};
use syn::{Attribute, Expr, Ident, Lit, LitInt, Token, Visibility, braced};

use crate::error::Errors;

/// Sizes that a claim may name; the module has a constant of each, in capitals.
const SIZES: [&str; 11] = [
    "group_size",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_kv_heads",
    "num_layers",
    "page_size",
    "rotary_dim",
    "vocab_size",
    "window",
];

const DTYPES: [&str; 3] = ["F32", "F16", "BF16"];

/// `<attributes> <visibility> mod <name>;`, or with claims in place of the semicolon.
struct Binding {
    attributes: Vec<Attribute>,
    visibility: Visibility,
    name: Ident,
    claims: Vec<(Ident, Expr)>,
}

/// What a claim says the model has.
enum Claim {
    Size(LitInt),
    /// All inputs are one group.
    Channel(Span),
    DType(Ident),
}

/// The module, with an assertion for each claim that can be read; the others are reported.
pub(crate) fn expand(input: TokenStream, errors: &mut Errors) -> TokenStream {
    let Binding { attributes, visibility, name, claims } = match parse.parse2(input) {
        Ok(binding) => binding,
        Err(error) => {
            errors.add(error);
            return TokenStream::new();
        }
    };
    let mut assertions = Vec::new();
    let mut named: Vec<&Ident> = Vec::new();
    for (key, value) in &claims {
        if named.contains(&key) {
            errors.push(key.span(), format!("`{key}` is given twice"));
            continue;
        }
        named.push(key);
        match check(key, value) {
            Ok(claim) => assertions.push(assertion(key, &claim)),
            Err(error) => errors.add(error),
        }
    }
    quote! {
        #(#attributes)*
        #[allow(dead_code, non_snake_case, reason = "generated: a program need not use all of it")]
        #visibility mod #name {
            ::core::include!(::core::concat!(::core::env!("OUT_DIR"), "/binding.rs"));

            #(#assertions)*
        }
    }
}

fn parse(input: ParseStream<'_>) -> syn::Result<Binding> {
    let attributes = input.call(Attribute::parse_outer)?;
    let visibility = input.parse()?;
    input.parse::<Token![mod]>()?;
    let name = input.parse()?;
    let mut claims = Vec::new();
    if input.parse::<Option<Token![;]>>()?.is_none() && !input.is_empty() {
        let body;
        braced!(body in input);
        let claim = |body: ParseStream<'_>| {
            let key = body.parse()?;
            body.parse::<Token![:]>()?;
            Ok((key, body.parse()?))
        };
        claims.extend(body.parse_terminated(claim, Token![,])?);
    }
    Ok(Binding { attributes, visibility, name, claims })
}

fn check(key: &Ident, value: &Expr) -> syn::Result<Claim> {
    let refuse = |message: String| Err(syn::Error::new_spanned(value, message));
    let name = match value {
        Expr::Path(path) => path.path.get_ident(),
        _ => None,
    };
    if key == "dtype" {
        return match name.filter(|name| DTYPES.iter().any(|dtype| *name == dtype)) {
            Some(name) => Ok(Claim::DType(name.clone())),
            None => refuse(format!("`dtype` wants one of {}", DTYPES.join(", "))),
        };
    }
    if !SIZES.iter().any(|size| key == size) {
        let message = format!("no size `{key}` in a model; there are dtype, {}", SIZES.join(", "));
        return Err(syn::Error::new(key.span(), message));
    }
    if let (true, Some(name)) = (key == "group_size", name)
        && name == "Channel"
    {
        return Ok(Claim::Channel(name.span()));
    }
    match value {
        Expr::Lit(literal) => match &literal.lit {
            // NOTE: sizes are usize; the compiler refuses what does not fit.
            Lit::Int(int) if int.base10_parse::<u64>().is_ok() => Ok(Claim::Size(int.clone())),
            _ => refuse(format!("`{key}` wants an integer")),
        },
        _ if key == "group_size" => refuse("`group_size` wants an integer, or Channel".to_string()),
        _ => refuse(format!("`{key}` wants an integer")),
    }
}

/// Compares the module's constant with the claim, at whose place the compiler reports.
fn assertion(key: &Ident, claim: &Claim) -> TokenStream {
    let name = key.to_string();
    let constant = format_ident!("{}", name.to_uppercase());
    let (span, check) = match claim {
        Claim::Size(size) => (size.span(), quote! { check_size(#name, #constant, #size) }),
        Claim::Channel(span) => (*span, quote! { check_size(#name, #constant, usize::MAX) }),
        Claim::DType(dtype) => {
            let claimed = quote! { ::bespoke::kernel_gen::spec::DType::#dtype };
            (dtype.span(), quote! { check_dtype(#constant, #claimed) })
        }
    };
    quote_spanned! { span => const _: () = ::bespoke::binding::#check; }
}
