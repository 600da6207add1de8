//! What can be wrong with a model or a plan, in words for whoever can mend it.

use std::fmt;

#[derive(Debug)]
pub enum Error {
    /// `config.json` cannot be read as a model: which field, which value, what was expected.
    Config { field: String, message: String },
    /// A model that cannot be found or has no shape: its name and why.
    Model { name: String, message: String },
    /// A group size that does not divide the input size of a linear.
    GroupSize { group: usize, k: usize },
    /// bfloat16 activations for other weights, by their type.
    Activations { weights: &'static str },
    /// A page size that is none of the possible ones.
    PageSize { value: String },
    /// A kernel that no configuration can serve.
    Infeasible { symbol: String, reason: String },
    /// A file that cannot be read or written.
    Io { path: String, source: std::io::Error },
    /// A template or rendered source that does not parse: `file:line:col: message`.
    Source { position: String, message: String },
    /// No CUDA compiler, or one that cannot be used, and what to do.
    Toolkit { message: String },
    /// A kernel that the CUDA compiler refuses, or whose machine code is not as it has to be.
    Compile { symbol: String, message: String },
    /// A measurement that cannot be written down, or records from which nothing can be chosen.
    Record { message: String },
    /// `kernels.lock` cannot be followed: why, and what to do.
    Lock { message: String },
    /// A trace of row counts that cannot be read.
    Trace { message: String },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Config { field, message } => write!(f, "config.json: {field}: {message}"),
            Error::Model { name, message } => write!(f, "model {name}: {message}"),
            Error::GroupSize { group, k } => write!(
                f,
                "group size {group} does not divide the input size {k}; use a group size that \
                 divides {k}, or 'channel'"
            ),
            Error::Activations { weights } => write!(
                f,
                "bf16 activations are for models whose weights are all bf16, and this one has {} \
                 weights; choose {}",
                weights,
                if *weights == "4-bit" { "int8 or float activations" } else { "float activations" }
            ),
            Error::PageSize { value } => {
                write!(f, "BESPOKE_PAGE_SIZE is {value:?}; choose 16, 32 or 64, or leave it unset")
            }
            Error::Infeasible { symbol, reason } => write!(f, "{symbol}: {reason}"),
            Error::Trace { message } => write!(f, "trace: {message}"),
            Error::Io { path, source } => write!(f, "{path}: {source}"),
            Error::Source { position, message } => write!(f, "{position}: {message}"),
            Error::Toolkit { message } => f.write_str(message),
            Error::Compile { symbol, message } => write!(f, "{symbol}: {message}"),
            Error::Record { message } => write!(f, "records: {message}"),
            Error::Lock { message } => write!(f, "kernels.lock: {message}"),
        }
    }
}

impl std::error::Error for Error {}
