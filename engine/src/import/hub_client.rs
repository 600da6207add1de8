//! The Hub's protocol, through the `hf-hub` crate.
//!
//! The crate knows no time limits, so that it works in a thread of its own whose signs of life
//! are watched. What the server names (files, revision, etags) is checked before it is used in a
//! path.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use serde_json::{Value as Json, json};

use super::hub::HubOptions;
use crate::error::Error;
use crate::files;
use crate::progress::{Progress, Report, Unit};
use crate::quantize::checkpoint::Checkpoint;

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// Files of a model folder besides the weights.
const SMALL_FILES: [&str; 8] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "quant_config.json",
    "LICENSE",
];
/// Without these there is no model.
const NEEDED_FILES: [&str; 2] = ["config.json", "tokenizer.json"];
const SHARDS_MAX: usize = 1000;
/// A file is asked for again, from where it stopped, this many times.
const ATTEMPTS: usize = 3;

/// What the downloading thread says.
enum Event {
    /// The server answered.
    Alive,
    Progress {
        done: u64,
        total: u64,
    },
    Done {
        files: Vec<(String, PathBuf)>,
        revision: String,
    },
    Failed(Error),
}

pub(super) fn fetch(
    repository: &str,
    options: &HubOptions,
    partial: &Path,
    dir: &Path,
    report: Report,
) -> Result<Json, Error> {
    let origin = |revision: &str| {
        json!({
            "source": "hub",
            "repository": repository,
            "revision": revision,
            "weights": "as published",
        })
    };
    if let Some(shared) = &options.shared_cache
        && let Some(revision) = copy_shared(repository, shared, dir, report)?
    {
        return Ok(origin(&revision));
    }
    if options.offline {
        return Err(Error::Download(
            "HF_HUB_OFFLINE is set and the Hub's cache does not have it".to_owned(),
        ));
    }
    let downloads = partial.join("hub");
    let (downloaded, revision) = watch(repository, options, &downloads, report)?;
    for (name, path) in downloaded {
        let target = dir.join(name);
        fs::rename(&path, &target).map_err(|e| files::write_error(&target, 0, e))?;
    }
    // A file cut short must not get a final name.
    Checkpoint::open(dir)?;
    Ok(origin(&revision))
}

/// Copies a whole model from the Hub's own cache; `None` when it is not there or incomplete.
fn copy_shared(
    repository: &str,
    shared: &Path,
    dir: &Path,
    report: Report,
) -> Result<Option<String>, Error> {
    let cache = Cache::new(shared.to_owned()).model(repository.to_owned());
    let mut found = Vec::new();
    for name in SMALL_FILES {
        match cache.get(name) {
            Some(path) => found.push((name.to_owned(), path)),
            None if NEEDED_FILES.contains(&name) => return Ok(None),
            None => {}
        }
    }
    let mut weights = vec![SINGLE.to_owned()];
    if let Some(index) = cache.get(INDEX) {
        let Ok(shards) = shard_names(&index) else { return Ok(None) };
        weights = shards;
        weights.push(INDEX.to_owned());
    }
    for name in weights {
        let Some(path) = cache.get(&name) else { return Ok(None) };
        found.push((name, path));
    }
    let size = |path: &Path| fs::metadata(path).map_or(0, |m| m.len());
    let total = found.iter().map(|(_, path)| size(path)).sum();
    files::ensure_space(dir, total)?;
    let mut done = 0;
    for (name, path) in &found {
        let target = dir.join(name);
        done += fs::copy(path, &target).map_err(|e| files::write_error(&target, total, e))?;
        report(Progress { stage: "copying from cache", done, total, unit: Unit::Bytes });
    }
    if Checkpoint::open(dir).is_err() {
        return Ok(None);
    }
    let revision = found[0].1.parent().and_then(|dir| dir.file_name()?.to_str());
    Ok(Some(revision.unwrap_or("main").to_owned()))
}

/// Downloads in a thread, and gives up on it when it shows no sign of life.
fn watch(
    repository: &str,
    options: &HubOptions,
    downloads: &Path,
    report: Report,
) -> Result<(Vec<(String, PathBuf)>, String), Error> {
    let (sender, receiver) = mpsc::channel();
    let (repository, owned_options) = (repository.to_owned(), options.clone());
    let owned_downloads = downloads.to_owned();
    // NOTE: the thread is left alone when it stalls. It can only write below `downloads`.
    std::thread::spawn(move || {
        let event = match download(&repository, &owned_options, &owned_downloads, &sender) {
            Ok((files, revision)) => Event::Done { files, revision },
            Err(error) => Event::Failed(error),
        };
        let _ = sender.send(event);
    });
    let mut timeout = options.answer_timeout;
    loop {
        match receiver.recv_timeout(timeout) {
            Ok(Event::Alive) => timeout = options.stall_timeout,
            Ok(Event::Progress { done, total }) => {
                report(Progress { stage: "downloading", done, total, unit: Unit::Bytes });
            }
            Ok(Event::Done { files, revision }) => return Ok((files, revision)),
            Ok(Event::Failed(error)) => return Err(error),
            Err(RecvTimeoutError::Timeout) => {
                let seconds = timeout.as_secs_f64();
                return Err(Error::Download(format!("no answer for {seconds} s")));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::Download("the server's answer makes no sense".to_owned()));
            }
        }
    }
}

fn download(
    repository: &str,
    options: &HubOptions,
    downloads: &Path,
    sender: &Sender<Event>,
) -> Result<(Vec<(String, PathBuf)>, String), Error> {
    let api = build_api(options, downloads).map_err(|e| describe(&e))?;
    let info = api.model(repository.to_owned()).info().map_err(|e| describe(&e))?;
    let _ = sender.send(Event::Alive);
    let revision = plain_component(&info.sha, "revision")?;
    let siblings: Vec<String> = info.siblings.into_iter().map(|s| s.rfilename).collect();
    // All files come from one commit, whatever is pushed meanwhile.
    let repo = Repo::with_revision(repository.to_owned(), RepoType::Model, revision.clone());
    let cached = Cache::new(downloads.to_owned()).repo(repo.clone());
    let repo = api.repo(repo);
    let names = choose_files(&siblings, &repo, downloads, sender)?;
    let mut sizes = Vec::new();
    for name in &names {
        let metadata = api.metadata(&repo.url(name)).map_err(|e| describe(&e))?;
        plain_component(metadata.etag(), "etag")?;
        plain_component(metadata.commit_hash(), "commit")?;
        sizes.push(metadata.size() as u64);
        let _ = sender.send(Event::Alive);
    }
    let total = sizes.iter().fold(0, |sum: u64, &size| sum.saturating_add(size));
    files::ensure_space(downloads.parent().unwrap_or(downloads), total)?;
    let (mut found, mut done) = (Vec::new(), 0);
    for (name, size) in names.into_iter().zip(sizes) {
        let has_size = |path: &PathBuf| fs::metadata(path).is_ok_and(|m| m.len() == size);
        let path = match cached.get(&name).filter(has_size) {
            Some(path) => path,
            None => {
                let progress = FileProgress { before: done, total, current: 0, sender };
                download_file(&repo, &name, downloads, progress)?
            }
        };
        if !has_size(&path) {
            return Err(Error::Download(format!("'{name}' does not have its {size} bytes")));
        }
        done += size;
        found.push((name, inside(&path, downloads)?));
    }
    Ok((found, revision))
}

fn build_api(options: &HubOptions, downloads: &Path) -> Result<Api, ApiError> {
    let shared = options.shared_cache.clone().unwrap_or_else(|| downloads.to_owned());
    // The shared cache is where the token file lies.
    let mut builder = ApiBuilder::from_cache(Cache::new(shared))
        .with_cache_dir(downloads.to_owned())
        .with_progress(false);
    if let Some(endpoint) = &options.endpoint {
        builder = builder.with_endpoint(endpoint.clone());
    }
    if let Some(token) = &options.token {
        builder = builder.with_token(Some(token.clone()));
    }
    builder.build()
}

/// Config, tokenizer and weights out of what the repository has. Where the weights are sharded,
/// their names are in the index, which is fetched here.
fn choose_files(
    siblings: &[String],
    repo: &ApiRepo,
    downloads: &Path,
    sender: &Sender<Event>,
) -> Result<Vec<String>, Error> {
    let has = |name: &str| siblings.iter().any(|sibling| sibling == name);
    if let Some(missing) = NEEDED_FILES.iter().find(|name| !has(name)) {
        return Err(Error::Download(format!("the repository has no {missing}")));
    }
    let mut names: Vec<String> =
        SMALL_FILES.iter().filter(|name| has(name)).map(|&name| name.to_owned()).collect();
    if has(SINGLE) {
        names.push(SINGLE.to_owned());
    } else if has(INDEX) {
        let progress = FileProgress { before: 0, total: 0, current: 0, sender };
        let path = download_file(repo, INDEX, downloads, progress)?;
        names.extend(shard_names(&inside(&path, downloads)?)?);
        names.push(INDEX.to_owned());
    } else {
        return Err(Error::Download(format!("the repository has neither {SINGLE} nor {INDEX}")));
    }
    Ok(names)
}

/// The distinct file names in an index, each a plain one.
fn shard_names(index: &Path) -> Result<Vec<String>, Error> {
    let text = fs::read(index).map_err(|e| Error::io(index, e))?;
    let json: Json =
        serde_json::from_slice(&text).map_err(|e| Error::model(index, e.to_string()))?;
    let map = json["weight_map"]
        .as_object()
        .ok_or_else(|| Error::model(index, "no object 'weight_map'"))?;
    let mut names = Vec::new();
    for value in map.values() {
        let name = value.as_str().unwrap_or("");
        if !name.ends_with(".safetensors") {
            return Err(Error::model(index, format!("{value} is no safetensors file")));
        }
        names.push(plain_component(name, "shard")?);
    }
    names.sort();
    names.dedup();
    if names.len() > SHARDS_MAX {
        return Err(Error::model(index, format!("{} shards, above {SHARDS_MAX}", names.len())));
    }
    Ok(names)
}

/// Sends how far a file has come.
struct FileProgress<'a> {
    before: u64,
    total: u64,
    current: u64,
    sender: &'a Sender<Event>,
}

impl hf_hub::api::Progress for FileProgress<'_> {
    fn init(&mut self, _size: usize, _filename: &str) {
        self.current = 0;
    }

    fn update(&mut self, size: usize) {
        self.current += size as u64;
        let done = self.before.saturating_add(self.current).min(self.total);
        let _ = self.sender.send(Event::Progress { done, total: self.total });
    }

    fn finish(&mut self) {}
}

/// Downloads one file. A connection that breaks is taken up again where it stopped.
fn download_file(
    repo: &ApiRepo,
    name: &str,
    downloads: &Path,
    progress: FileProgress,
) -> Result<PathBuf, Error> {
    let mut attempt = 1;
    loop {
        let progress = FileProgress { current: 0, ..progress };
        match repo.download_with_progress(name, progress) {
            Ok(path) => return Ok(path),
            Err(ApiError::IoError(_) | ApiError::RequestError(_)) if attempt < ATTEMPTS => {
                attempt += 1;
            }
            Err(ApiError::InvalidResume) if attempt < ATTEMPTS => {
                remove_parts(downloads)?;
                attempt += 1;
            }
            Err(error) => {
                let Error::Download(reason) = describe(&error) else {
                    return Err(describe(&error));
                };
                return Err(Error::Download(format!("'{name}': {reason}")));
            }
        }
    }
}

/// Removes parts that are longer than their file: left by another program, or damaged.
fn remove_parts(downloads: &Path) -> Result<(), Error> {
    for folder in fs::read_dir(downloads).map_err(|e| Error::io(downloads, e))?.flatten() {
        for blob in fs::read_dir(folder.path().join("blobs")).into_iter().flatten().flatten() {
            if blob.path().extension().is_some_and(|extension| extension == "part") {
                files::remove_any(&blob.path())?;
            }
        }
    }
    Ok(())
}

/// Follows links to the file itself, which must lie below `downloads`.
fn inside(path: &Path, downloads: &Path) -> Result<PathBuf, Error> {
    let root = downloads.canonicalize().map_err(|e| Error::io(downloads, e))?;
    let file = path.canonicalize().map_err(|e| Error::io(path, e))?;
    if file.starts_with(&root) && file.is_file() {
        Ok(file)
    } else {
        Err(Error::Download(format!("{} lies outside {}", file.display(), root.display())))
    }
}

/// What a server says becomes part of a path only when it is one harmless name.
fn plain_component(text: &str, what: &str) -> Result<String, Error> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+');
    let ok = (1..=200).contains(&text.len())
        && text.chars().all(allowed)
        && !text.starts_with('.')
        && !text.contains("..");
    if ok {
        Ok(text.to_owned())
    } else {
        Err(Error::Download(format!(
            "the server gave the {what} '{}', which is no plain name",
            text.escape_debug()
        )))
    }
}

/// What went wrong, in words; a full disk stays one.
fn describe(error: &ApiError) -> Error {
    match error {
        ApiError::IoError(e) if e.kind() == std::io::ErrorKind::StorageFull => {
            Error::Resources(format!("the disk is full: {e}; make room and run it again"))
        }
        ApiError::RequestError(e) => {
            let hint = match e.to_string() {
                text if text.contains("401") || text.contains("403") => {
                    " (refused: the repository may need HF_TOKEN)"
                }
                text if text.contains("404") => " (no such repository or file)",
                _ => "",
            };
            Error::Download(format!("{e}{hint}"))
        }
        other => Error::Download(other.to_string()),
    }
}
