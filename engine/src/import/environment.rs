//! The environment variables that say where models come from and go to.

use std::env;
use std::path::PathBuf;

use super::cache::Cache;
use super::hub::HubOptions;
use super::package::PipOptions;
use super::pull::PullOptions;
use crate::error::Error;

/// `BESPOKE_HOME`, or the platform's cache folder.
pub fn cache() -> Result<Cache, Error> {
    if let Some(root) = path("BESPOKE_HOME") {
        return Ok(Cache { root });
    }
    let xdg = path("XDG_CACHE_HOME").filter(|dir| dir.is_absolute());
    let platform = if cfg!(target_os = "macos") {
        env::home_dir().map(|home| home.join("Library/Caches"))
    } else if cfg!(windows) {
        path("LOCALAPPDATA")
    } else {
        xdg.or_else(|| env::home_dir().map(|home| home.join(".cache")))
    };
    match platform {
        Some(dir) => Ok(Cache { root: dir.join("bespoke") }),
        None => Err(Error::Request(
            "no home folder is known; set BESPOKE_HOME to the folder for models".to_owned(),
        )),
    }
}

/// [`cache`], with `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_TOKEN` and the Hub's cache variables.
pub fn pull_options() -> Result<PullOptions, Error> {
    let hf_home = path("HF_HOME")
        .or_else(|| env::home_dir().map(|home| home.join(".cache").join("huggingface")));
    let hub = HubOptions {
        endpoint: text("HF_ENDPOINT").map(|url| url.trim_end_matches('/').to_owned()),
        offline: text("HF_HUB_OFFLINE").is_some_and(|value| is_on(&value)),
        shared_cache: path("HF_HUB_CACHE").or_else(|| hf_home.map(|home| home.join("hub"))),
        token: text("HF_TOKEN"),
        ..HubOptions::default()
    };
    Ok(PullOptions { cache: cache()?, hub, pip: PipOptions::default() })
}

fn path(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn text(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// As the Hub's own tools read switches.
fn is_on(value: &str) -> bool {
    ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str())
}
