//! Models from elsewhere: GGUF files, the Hub, packages; and the cache they are kept in.

pub mod cache;
pub mod environment;
pub mod gguf;
pub mod hub;
#[cfg(feature = "hub")]
mod hub_client;
pub mod package;
pub mod pull;

use std::path::PathBuf;

use crate::error::Error;
use crate::progress::Report;

/// [`pull::pull`] with the settings of the environment.
pub fn pull(name: &str, report: Report) -> Result<PathBuf, Error> {
    pull::pull(name, &environment::pull_options()?, report)
}

/// [`cache::resolve`] in the cache of the environment.
pub fn resolve_model(name_or_path: &str) -> Result<PathBuf, Error> {
    cache::resolve(name_or_path, environment::cache)
}
