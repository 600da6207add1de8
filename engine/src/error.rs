//! What can go wrong, by who can mend it.

use std::fmt;
use std::path::{Path, PathBuf};

/// Every error of the engine. Messages say what is wrong, the offending value and what to do.
#[derive(Debug)]
pub enum Error {
    /// A model's files are damaged, incomplete or contradict each other.
    Model { path: PathBuf, message: String },
    /// The model is sound, but this build or version cannot run it.
    Unsupported(String),
    /// Kernels this model needs are not in this binary.
    MissingKernels { symbols: Vec<String>, message: String },
    /// A request asks for something impossible.
    Request(String),
    /// What is asked for is in use; it can be had later.
    Busy(String),
    /// Not enough memory or disk: what was needed and what there is.
    Resources(String),
    /// The engine has died or was stopped: it has to be started anew.
    Engine(String),
    /// A download failed.
    Download(String),
    /// The operating system refused an operation on a file.
    Io { path: PathBuf, source: std::io::Error },
    /// The generator refused the model's configuration.
    KernelGen(bespoke_kernel_gen::Error),
}

impl Error {
    pub fn model(path: impl AsRef<Path>, message: impl Into<String>) -> Error {
        Error::Model { path: path.as_ref().to_owned(), message: message.into() }
    }

    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Error {
        Error::Io { path: path.as_ref().to_owned(), source }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Model { path, message } => write!(f, "{}: {message}", path.display()),
            Error::Unsupported(message)
            | Error::Request(message)
            | Error::Busy(message)
            | Error::Resources(message)
            | Error::Engine(message)
            | Error::Download(message) => f.write_str(message),
            Error::MissingKernels { symbols, message } => {
                writeln!(f, "{message}")?;
                write!(f, "missing: {}", symbols.join(", "))
            }
            Error::Io { path, source } => write!(f, "{}: {source}", path.display()),
            Error::KernelGen(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Error {}

impl From<bespoke_kernel_gen::Error> for Error {
    fn from(error: bespoke_kernel_gen::Error) -> Error {
        Error::KernelGen(error)
    }
}
