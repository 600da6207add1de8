//! Errors of a whole input, reported together.

use proc_macro2::{Span, TokenStream};

/// Collects errors; none stops the others from being found.
#[derive(Default)]
pub(crate) struct Errors(Vec<syn::Error>);

impl Errors {
    pub(crate) fn push(&mut self, span: Span, message: impl std::fmt::Display) {
        self.0.push(syn::Error::new(span, message));
    }

    pub(crate) fn add(&mut self, error: syn::Error) {
        self.0.push(error);
    }

    /// One `compile_error!` an error.
    pub(crate) fn into_compile_errors(self) -> TokenStream {
        self.0.iter().map(syn::Error::to_compile_error).collect()
    }

    /// `line:column: message`, one line an error.
    #[cfg(test)]
    pub(crate) fn print(&self) -> String {
        let line = |error: &syn::Error| {
            let start = error.span().start();
            format!("{}:{}: {error}\n", start.line, start.column + 1)
        };
        self.0.iter().map(line).collect()
    }
}
