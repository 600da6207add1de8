//! The model cache: a folder of model folders, each there whole or not at all.

use std::fs;
use std::path::{Path, PathBuf};

use super::pull::PRESETS;
use crate::error::Error;

/// Where models are kept: `<root>/models/<name>/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cache {
    pub root: PathBuf,
}

/// A name under which a model can be cached: `name`, or `organization/name` as on the Hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelName(String);

impl ModelName {
    /// Refuses whatever could lead out of the cache's folder or hide in it.
    pub fn parse(text: &str) -> Result<ModelName, Error> {
        let num_parts = text.split('/').count();
        if num_parts <= 2 && text.split('/').all(is_plain) {
            return Ok(ModelName(text.to_owned()));
        }
        Err(Error::Request(format!(
            "'{}' is no model name; give a Hub repository such as 'organization/name', or one of \
             the presets: {}",
            text.escape_debug(),
            preset_names()
        )))
    }

    /// Whether this names a repository of the Hub.
    pub fn is_repository(&self) -> bool {
        self.0.contains('/')
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The folder's name in the cache.
    pub fn folder(&self) -> String {
        self.0.replace('/', "--")
    }
}

fn is_plain(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=96).contains(&part.len())
        && part.chars().all(allowed)
        && part.starts_with(|c: char| c.is_ascii_alphanumeric())
        && !part.contains("..")
        && !part.contains("--")
        && !part.ends_with('.')
}

impl Cache {
    pub fn models_dir(&self) -> PathBuf {
        self.root.join("models")
    }

    /// Where the model of this name is, or would be.
    pub fn model_dir(&self, name: &ModelName) -> PathBuf {
        self.models_dir().join(name.folder())
    }

    /// The names of all cached models, sorted.
    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.models_dir()).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries
            .filter(|entry| is_model_dir(&entry.path()))
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| !name.starts_with('.'))
            .map(|name| name.replacen("--", "/", 1))
            .collect();
        names.sort();
        names
    }
}

/// A folder with a config.json. Folders of the cache get their name only when they are whole.
pub fn is_model_dir(path: &Path) -> bool {
    path.join("config.json").is_file()
}

/// Finds the folder of a model given as a path, a cached name or a preset. Fetches nothing, and
/// asks for the cache where the path is no model folder.
pub fn resolve(
    name_or_path: &str,
    cache: impl FnOnce() -> Result<Cache, Error>,
) -> Result<PathBuf, Error> {
    let path = Path::new(name_or_path);
    if is_model_dir(path) {
        return Ok(path.to_owned());
    }
    if path.is_file() {
        return Err(Error::Request(format!(
            "{name_or_path}: a file, not a model folder; for a GGUF file run: bespoke import gguf \
             {name_or_path} -o DIR"
        )));
    }
    let cache = cache()?;
    let name = ModelName::parse(name_or_path).ok();
    if let Some(name) = &name {
        let dir = cache.model_dir(name);
        if is_model_dir(&dir) {
            return Ok(dir);
        }
    }
    if path.is_dir() {
        return Err(Error::Request(format!(
            "{name_or_path}: a folder without config.json, so no model folder"
        )));
    }
    let is_preset = PRESETS.iter().any(|preset| preset.name == name_or_path);
    if is_preset || name.is_some_and(|name| name.is_repository()) {
        return Err(Error::Request(format!(
            "model '{name_or_path}' is not in the cache {}; run: bespoke pull {name_or_path}",
            cache.root.display()
        )));
    }
    let cached = match cache.names().as_slice() {
        [] => "none".to_owned(),
        names => names.join(", "),
    };
    Err(Error::Request(format!(
        "no model '{}': neither a folder nor a cached name; cached: {cached}; presets: {}",
        name_or_path.escape_debug(),
        preset_names()
    )))
}

pub(super) fn preset_names() -> String {
    let names: Vec<_> = PRESETS.iter().map(|preset| preset.name).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::ModelName;

    #[test]
    fn names_cannot_leave_the_cache() {
        for good in ["smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "a", "Qwen/Qwen2.5_7"] {
            assert!(ModelName::parse(good).is_ok(), "{good}");
        }
        let bad = [
            "", "..", ".", "../x", "a/..", "/etc", "a//b", "a/b/c", ".hidden", "a/.b", "a\\b",
            "a\0b", "a b", "x--y", "-rf", "a/-b", "ä", "a.", "a..b", "C:x",
        ];
        for name in bad {
            assert!(ModelName::parse(name).is_err(), "{name:?}");
        }
    }
}
