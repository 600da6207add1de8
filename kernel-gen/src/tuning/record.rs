//! Records: measurements, certificates and failures as lines of JSON in files that only grow.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::certificate::Certificate;
use super::device::Device;
use crate::error::Error;

/// Version of the form.
pub const VERSION: u32 = 2;
/// Samples of a time that a choice may rest on; fewer show that a kernel dropped out.
pub const SAMPLES_MIN: usize = 5;

/// Limits of what is read: longer lines, larger files, and files and folders beyond these are
/// skipped with a warning.
pub const LINE_BYTES_MAX: usize = 64 << 10;
pub const FILE_BYTES_MAX: u64 = 256 << 20;
pub const NUM_FILES_MAX: usize = 4096;
pub const FOLDER_DEPTH_MAX: usize = 8;
/// Warnings of one file; the rest are counted.
const FILE_WARNINGS_MAX: usize = 8;

/// One line of a file of records. Lines of several files may be put into one; order means nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub v: u32,
    pub problem: Problem,
    pub device: Device,
    pub variant: Variant,
    #[serde(flatten)]
    pub outcome: Outcome,
    /// Seconds since 1970; information only.
    pub measured_at: u64,
}

/// What was computed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Problem {
    /// `awq_gemm_n960_k576_g64_int8`
    pub spec: String,
    /// `avx512`, `sm_90a`
    pub target: String,
    pub case: Case,
}

/// At which size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Case {
    /// Of certificates and failures: no size in particular.
    All,
    /// `rows 8`
    Rows(usize),
    /// `decode 8x1024`: a row of each of 8 sequences with 1024 tokens.
    Decode { num_sequences: usize, context_len: usize },
    /// `prefill 512`: a prompt of 512 tokens.
    Prefill(usize),
}

/// The kernel: a changed body has another hash.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Variant {
    pub symbol: String,
    pub source_hash: String,
    /// Version of rustc or nvcc.
    pub compiler: String,
    /// Of machine code; 0 where unknown.
    pub code_bytes: usize,
}

/// What came out. In JSON: `"kind": "time", "result": {…}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", content = "result", rename_all = "lowercase")]
pub enum Outcome {
    Time(Time),
    Certificate(Certificate),
    Failure(Failure),
}

/// A measurement beside the default kernel's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Time {
    /// How it was run: `backend` as served on a CPU, `graph` replayed from a recording.
    pub mode: String,
    /// `cold`: weights come from memory.
    pub cache: String,
    /// Microseconds of one call: 10th, 50th and 90th percentile.
    pub us: [f64; 3],
    pub num_samples: usize,
    /// Symbol of the kernel that it was raced against.
    pub default: String,
    /// Median of the ratios to that kernel's time in the same round; 1 for itself.
    pub vs_default: f64,
    /// Relative, from racing the default against itself.
    pub noise: f64,
    /// What memory and arithmetic of the device allow, measured in the same run.
    pub limit_us: Option<f64>,
}

/// A variant that is not tried again while its source is the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// `crash`, `hang`, `mismatch`, `compile` …
    pub reason: String,
    pub message: String,
}

impl Record {
    pub fn time(&self) -> Option<&Time> {
        match &self.outcome {
            Outcome::Time(time) => Some(time),
            _ => None,
        }
    }

    pub fn certificate(&self) -> Option<&Certificate> {
        match &self.outcome {
            Outcome::Certificate(certificate) => Some(certificate),
            _ => None,
        }
    }

    pub fn failure(&self) -> Option<&Failure> {
        match &self.outcome {
            Outcome::Failure(failure) => Some(failure),
            _ => None,
        }
    }

    /// The record's line, without its end.
    pub fn line(&self) -> Result<String, Error> {
        self.check().map_err(|message| Error::Record { message })?;
        let line = serde_json::to_string(self).map_err(|error| Error::Record {
            message: format!("{} cannot be written: {error}", self.variant.symbol),
        })?;
        match line.len() < LINE_BYTES_MAX {
            true => Ok(line),
            false => Err(Error::Record {
                message: format!(
                    "the record of {} has {} bytes; {LINE_BYTES_MAX} are possible",
                    self.variant.symbol,
                    line.len()
                ),
            }),
        }
    }

    /// The record of a line, or why it is none.
    pub fn parse(line: &str) -> Result<Record, String> {
        #[derive(Deserialize)]
        struct Version {
            v: u32,
        }
        let Version { v } = serde_json::from_str(line).map_err(|error| error.to_string())?;
        if v != VERSION {
            return Err(format!("a record of version {v}; this program knows {VERSION}"));
        }
        let record: Record = serde_json::from_str(line).map_err(|error| error.to_string())?;
        record.check()?;
        Ok(record)
    }

    fn check(&self) -> Result<(), String> {
        match &self.outcome {
            Outcome::Time(time) => time.check(),
            Outcome::Certificate(certificate) => {
                let is_same = certificate.symbol == self.variant.symbol
                    && certificate.source_hash == self.variant.source_hash;
                match is_same {
                    true => Ok(()),
                    false => Err(format!("a certificate of {}, not its own", certificate.symbol)),
                }
            }
            Outcome::Failure(_) => Ok(()),
        }
    }
}

impl Time {
    fn check(&self) -> Result<(), String> {
        let [p10, p50, p90] = self.us;
        let positive = [p10, p50, p90, self.vs_default, self.limit_us.unwrap_or(1.0)];
        if let Some(value) = positive.iter().find(|value| !(**value > 0.0 && value.is_finite())) {
            return Err(format!("a time of {value}"));
        }
        if p10 > p50 || p50 > p90 {
            return Err(format!("percentiles {p10}, {p50}, {p90} are not in order"));
        }
        if !(0.0..=1.0).contains(&self.noise) {
            return Err(format!("a noise of {}", self.noise));
        }
        if self.num_samples == 0 {
            return Err("a time of no samples".to_string());
        }
        Ok(())
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Case::All => f.write_str("all"),
            Case::Rows(rows) => write!(f, "rows {rows}"),
            Case::Decode { num_sequences, context_len } => {
                write!(f, "decode {num_sequences}x{context_len}")
            }
            Case::Prefill(len) => write!(f, "prefill {len}"),
        }
    }
}

impl FromStr for Case {
    type Err = String;

    fn from_str(text: &str) -> Result<Case, String> {
        let number = |text: &str| text.parse().ok().filter(|number: &usize| *number > 0);
        let case = match text.split_once(' ') {
            None if text == "all" => Some(Case::All),
            Some(("rows", rows)) => number(rows).map(Case::Rows),
            Some(("prefill", len)) => number(len).map(Case::Prefill),
            Some(("decode", sizes)) => sizes.split_once('x').and_then(|(sequences, context)| {
                let (num_sequences, context_len) = (number(sequences)?, number(context)?);
                Some(Case::Decode { num_sequences, context_len })
            }),
            _ => None,
        };
        case.ok_or_else(|| format!("{text:?} is no case such as rows 8 or decode 8x1024"))
    }
}

impl Serialize for Case {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Case {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Case, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Something that was skipped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    pub path: PathBuf,
    /// From 1; `None`: the whole file or folder.
    pub line: Option<usize>,
    pub message: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        write!(f, ": {}", self.message)
    }
}

/// All records of a folder.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Records {
    /// In the order of paths and lines, which means nothing.
    pub all: Vec<Record>,
}

impl Records {
    /// Reads a file, or every `*.jsonl` in and below a folder; where nothing is, there are no
    /// records. What cannot be read is skipped with a warning.
    pub fn open(path: &Path) -> (Records, Vec<Warning>) {
        let (mut records, mut warnings) = (Records::default(), Vec::new());
        let paths = match path.is_file() {
            true => vec![path.to_path_buf()],
            false => files_below(path, &mut warnings),
        };
        for path in paths {
            read_file(&path, &mut records.all, &mut warnings);
        }
        (records, warnings)
    }

    /// The records of a text, as if it were the file `path`.
    pub fn parse(text: &[u8], path: &Path) -> (Records, Vec<Warning>) {
        let (mut records, mut warnings) = (Records::default(), Vec::new());
        read_lines(text, path, &mut records.all, &mut warnings);
        (records, warnings)
    }
}

/// The `*.jsonl` in and below a folder, sorted. Links to folders are not followed.
fn files_below(folder: &Path, warnings: &mut Vec<Warning>) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![(folder.to_path_buf(), 0)];
    let mut warn = |path: &Path, message: String| {
        warnings.push(Warning { path: path.to_path_buf(), line: None, message });
    };
    while let Some((path, depth)) = folders.pop() {
        let entries = match std::fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => {
                warn(&path, error.to_string());
                continue;
            }
        };
        for entry in entries.flatten() {
            let (path, kind) = (entry.path(), entry.file_type());
            if kind.is_ok_and(|kind| kind.is_dir()) {
                match depth < FOLDER_DEPTH_MAX {
                    true => folders.push((path, depth + 1)),
                    false => warn(&path, format!("deeper than {FOLDER_DEPTH_MAX} folders")),
                }
            } else if path.extension().is_some_and(|extension| extension == "jsonl") {
                files.push(path);
            }
        }
    }
    files.sort();
    if files.len() > NUM_FILES_MAX {
        let message = format!("{} files of records; {NUM_FILES_MAX} are read", files.len());
        warn(folder, message);
        files.truncate(NUM_FILES_MAX);
    }
    files
}

fn read_file(path: &Path, records: &mut Vec<Record>, warnings: &mut Vec<Warning>) {
    let mut warn =
        |message| warnings.push(Warning { path: path.to_path_buf(), line: None, message });
    let file = match File::open(path).and_then(|file| Ok((file.metadata()?, file))) {
        Ok((metadata, _)) if !metadata.is_file() => return warn("not a file".to_string()),
        Ok((metadata, _)) if metadata.len() > FILE_BYTES_MAX => {
            return warn(format!("{} bytes; {FILE_BYTES_MAX} are read", metadata.len()));
        }
        Ok((_, file)) => file,
        Err(error) => return warn(error.to_string()),
    };
    // NOTE: the file may grow while it is read.
    read_lines(BufReader::new(file.take(FILE_BYTES_MAX)), path, records, warnings);
}

fn read_lines(
    mut reader: impl BufRead,
    path: &Path,
    records: &mut Vec<Record>,
    warnings: &mut Vec<Warning>,
) {
    let (mut line_idx, mut num_skipped) = (0, 0);
    loop {
        line_idx += 1;
        let message = match next_line(&mut reader) {
            Ok(None) => break,
            Ok(Some(line)) if line.trim().is_empty() => continue,
            Ok(Some(line)) => match Record::parse(&line) {
                Ok(record) => {
                    records.push(record);
                    continue;
                }
                Err(message) => message,
            },
            Err(ReadError::Line(message)) => message,
            Err(ReadError::File(message)) => {
                warnings.push(Warning { path: path.to_path_buf(), line: None, message });
                break;
            }
        };
        num_skipped += 1;
        if num_skipped <= FILE_WARNINGS_MAX {
            let message = format!("skipped: {message}");
            warnings.push(Warning { path: path.to_path_buf(), line: Some(line_idx), message });
        }
    }
    if let Some(num_more) = num_skipped.checked_sub(FILE_WARNINGS_MAX + 1) {
        let message = format!("{} more lines skipped", num_more + 1);
        warnings.push(Warning { path: path.to_path_buf(), line: None, message });
    }
}

enum ReadError {
    /// The line is passed.
    Line(String),
    /// Nothing more can be read.
    File(String),
}

/// The next line, or `None` at the end. A line that is too long is passed without being kept.
fn next_line(reader: &mut impl BufRead) -> Result<Option<String>, ReadError> {
    let mut bytes = Vec::new();
    let mut limited = reader.take(LINE_BYTES_MAX as u64);
    limited.read_until(b'\n', &mut bytes).map_err(|error| ReadError::File(error.to_string()))?;
    if bytes.is_empty() {
        return Ok(None);
    }
    if bytes.last() != Some(&b'\n') && bytes.len() == LINE_BYTES_MAX {
        reader.skip_until(b'\n').map_err(|error| ReadError::File(error.to_string()))?;
        return Err(ReadError::Line(format!("a line of more than {LINE_BYTES_MAX} bytes")));
    }
    String::from_utf8(bytes).map(Some).map_err(|error| ReadError::Line(error.to_string()))
}

/// A file of records, opened to append to. Several processes may append to one file.
#[derive(Debug)]
pub struct Appender {
    path: PathBuf,
    file: File,
}

impl Appender {
    /// Opens a file, or makes it and its folder. What is in it stays as it is.
    pub fn open(path: &Path) -> Result<Appender, Error> {
        let io = |source| Error::Io { path: path.display().to_string(), source };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(io)?;
        }
        let mut options = File::options();
        let file = options.create(true).read(true).append(true).open(path).map_err(io)?;
        Ok(Appender { path: path.to_path_buf(), file })
    }

    /// Appends a line by one call of the system, so that whoever is killed loses at most the line
    /// that it is writing; the next one begins a line of its own.
    pub fn append(&mut self, record: &Record) -> Result<(), Error> {
        let line = record.line()?;
        let io = |source| Error::Io { path: self.path.display().to_string(), source };
        // NOTE: where a file system has no locks, appending is still atomic on most of them.
        let is_locked = self.file.lock().is_ok();
        let result = append_line(&mut self.file, &line);
        if is_locked {
            self.file.unlock().map_err(io)?;
        }
        result.map_err(io)
    }
}

fn append_line(file: &mut File, line: &str) -> std::io::Result<()> {
    let len = file.seek(SeekFrom::End(0))?;
    if len + line.len() as u64 + 2 > FILE_BYTES_MAX {
        let message = format!("the file is full at {FILE_BYTES_MAX} bytes; begin another one");
        return Err(std::io::Error::other(message));
    }
    let mut last = *b"\n";
    if len > 0 {
        file.seek(SeekFrom::Start(len - 1))?;
        file.read_exact(&mut last)?;
    }
    let start = if last == *b"\n" { "" } else { "\n" };
    file.write_all(format!("{start}{line}\n").as_bytes())?;
    file.flush()
}
