//! Model folders from the Hub, or from its local cache.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value as Json;

use crate::error::Error;
use crate::progress::Report;

/// How to reach the Hub.
#[derive(Clone, Debug)]
pub struct HubOptions {
    /// Base address; `None` is the public Hub.
    pub endpoint: Option<String>,
    /// Use what the Hub's own cache has and connect to nothing.
    pub offline: bool,
    /// The Hub's own cache, which other programs share.
    pub shared_cache: Option<PathBuf>,
    /// Sent with each request where set, for repositories that need it.
    pub token: Option<String>,
    /// Give up when there is no first answer in this time.
    pub answer_timeout: Duration,
    /// Give up when nothing more arrives in this time.
    pub stall_timeout: Duration,
}

impl Default for HubOptions {
    fn default() -> HubOptions {
        HubOptions {
            endpoint: None,
            offline: false,
            shared_cache: None,
            token: None,
            answer_timeout: Duration::from_secs(8),
            stall_timeout: Duration::from_secs(60),
        }
    }
}

/// Fetches the files of `repository` that make a model folder into `dir`. What is incomplete
/// stays in `partial`, so that a later attempt continues there.
/// Returns where the model came from.
#[cfg(feature = "hub")]
pub(super) fn fetch(
    repository: &str,
    options: &HubOptions,
    partial: &Path,
    dir: &Path,
    report: Report,
) -> Result<Json, Error> {
    super::hub_client::fetch(repository, options, partial, dir, report)
}

/// Without the feature there is no Hub.
#[cfg(not(feature = "hub"))]
pub(super) fn fetch(
    _repository: &str,
    _options: &HubOptions,
    _partial: &Path,
    _dir: &Path,
    _report: Report,
) -> Result<Json, Error> {
    Err(Error::Download("this binary was built without the feature 'hub'".to_owned()))
}
