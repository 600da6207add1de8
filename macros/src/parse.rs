//! Tokens → declarations: what is written, not yet what it means.

use proc_macro2::{Span, TokenStream};
use syn::parse::{ParseStream, Parser};
use syn::{ExprStruct, Ident, LitInt, LitStr, Path, Token, braced, bracketed};

use crate::error::Errors;

syn::custom_keyword!(kernel);
syn::custom_keyword!(serving);

/// All that is declared.
#[derive(Default)]
pub(crate) struct Declarations {
    pub(crate) kernels: Vec<Declaration>,
    pub(crate) servings: Vec<ServingDeclaration>,
}

/// `serving { device: …, intervals: [<rows> => <symbol> as <provenance>, …] }`.
pub(crate) struct ServingDeclaration {
    /// Of the keyword.
    pub(crate) span: Span,
    pub(crate) device: Option<LitStr>,
    pub(crate) intervals: Vec<IntervalDeclaration>,
}

pub(crate) struct IntervalDeclaration {
    /// `None` for `_`.
    pub(crate) rows_max: Option<LitInt>,
    pub(crate) symbol: Ident,
    pub(crate) provenance: Ident,
}

/// `kernel <symbol> { <key>: <value>, … }`. Keys that are missing are `None`.
pub(crate) struct Declaration {
    pub(crate) symbol: Ident,
    pub(crate) run: Option<Path>,
    pub(crate) spec: Option<ExprStruct>,
    pub(crate) regime: Option<Ident>,
    pub(crate) target: Option<Ident>,
    pub(crate) features: Option<LitStr>,
    pub(crate) rows: Option<LitInt>,
    pub(crate) cols: Option<LitInt>,
    pub(crate) scratch_bytes: Option<LitInt>,
    pub(crate) reduction_class: Option<LitStr>,
    pub(crate) source_hash: Option<LitStr>,
}

impl Declaration {
    fn new(symbol: Ident) -> Declaration {
        Declaration {
            symbol,
            run: None,
            spec: None,
            regime: None,
            target: None,
            features: None,
            rows: None,
            cols: None,
            scratch_bytes: None,
            reduction_class: None,
            source_hash: None,
        }
    }

    fn parse_value(&mut self, key: &Ident, input: ParseStream<'_>) -> syn::Result<()> {
        match key.to_string().as_str() {
            "run" => set(&mut self.run, key, input.parse()?),
            "spec" => set(&mut self.spec, key, input.parse()?),
            "regime" => set(&mut self.regime, key, input.parse()?),
            "target" => set(&mut self.target, key, input.parse()?),
            "features" => set(&mut self.features, key, input.parse()?),
            "rows" => set(&mut self.rows, key, input.parse()?),
            "cols" => set(&mut self.cols, key, input.parse()?),
            "scratch_bytes" => set(&mut self.scratch_bytes, key, input.parse()?),
            "reduction_class" => set(&mut self.reduction_class, key, input.parse()?),
            "source_hash" => set(&mut self.source_hash, key, input.parse()?),
            other => Err(syn::Error::new(key.span(), format!("no key `{other}` in a kernel"))),
        }
    }
}

fn set<T>(slot: &mut Option<T>, key: &Ident, value: T) -> syn::Result<()> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(syn::Error::new(key.span(), format!("`{key}` is given twice"))),
    }
}

/// All declarations that can be read. A broken one is reported and the next is read.
pub(crate) fn parse(input: TokenStream, errors: &mut Errors) -> Declarations {
    let mut declarations = Declarations::default();
    let parser = |input: ParseStream<'_>| {
        while !input.is_empty() {
            if input.peek(serving) {
                let span = input.parse::<serving>()?.span;
                let body;
                braced!(body in input);
                match parse_serving(span, &body) {
                    Ok(serving) => declarations.servings.push(serving),
                    Err(error) => errors_of(&body, error, errors),
                }
                continue;
            }
            input.parse::<kernel>()?;
            let symbol: Ident = input.parse()?;
            let body;
            braced!(body in input);
            let mut declaration = Declaration::new(symbol);
            match parse_body(&mut declaration, &body) {
                Ok(()) => declarations.kernels.push(declaration),
                Err(error) => errors_of(&body, error, errors),
            }
        }
        Ok(())
    };
    if let Err(error) = parser.parse2(input) {
        errors.add(error);
    }
    declarations
}

/// Reports `error` and takes what is left of the body, which cannot be told apart any more.
fn errors_of(body: ParseStream<'_>, error: syn::Error, errors: &mut Errors) {
    errors.add(error);
    let _rest: syn::Result<TokenStream> = body.parse();
}

fn parse_body(declaration: &mut Declaration, body: ParseStream<'_>) -> syn::Result<()> {
    while !body.is_empty() {
        let key: Ident = body.parse()?;
        body.parse::<Token![:]>()?;
        declaration.parse_value(&key, body)?;
        if !body.is_empty() {
            body.parse::<Token![,]>()?;
        }
    }
    Ok(())
}

fn parse_serving(span: Span, body: ParseStream<'_>) -> syn::Result<ServingDeclaration> {
    let (mut device, mut intervals) = (None, None);
    while !body.is_empty() {
        let key: Ident = body.parse()?;
        body.parse::<Token![:]>()?;
        match key.to_string().as_str() {
            "device" => set(&mut device, &key, body.parse()?)?,
            "intervals" => {
                let list;
                bracketed!(list in body);
                let parsed = list.parse_terminated(parse_interval, Token![,])?;
                set(&mut intervals, &key, parsed.into_iter().collect())?;
            }
            other => {
                return Err(syn::Error::new(key.span(), format!("no key `{other}` in a serving")));
            }
        }
        if !body.is_empty() {
            body.parse::<Token![,]>()?;
        }
    }
    let intervals = intervals.ok_or_else(|| syn::Error::new(span, "`intervals` is missing"))?;
    Ok(ServingDeclaration { span, device, intervals })
}

fn parse_interval(input: ParseStream<'_>) -> syn::Result<IntervalDeclaration> {
    let rows_max = match input.parse::<Option<Token![_]>>()? {
        Some(_) => None,
        None => Some(input.parse()?),
    };
    input.parse::<Token![=>]>()?;
    let symbol = input.parse()?;
    input.parse::<Token![as]>()?;
    Ok(IntervalDeclaration { rows_max, symbol, provenance: input.parse()? })
}

/// The value, or an error that names the missing key.
pub(crate) fn required<T>(
    value: Option<T>,
    key: &str,
    symbol: &Ident,
    errors: &mut Errors,
) -> Option<T> {
    if value.is_none() {
        let span: Span = symbol.span();
        errors.push(span, format!("`{key}` is missing"));
    }
    value
}
