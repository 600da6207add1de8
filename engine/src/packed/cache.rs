//! Packed weights of the models that were loaded lately, in a folder.
//!
//! A file's name is a hash of all that its content depends on, so that a changed model or another
//! layout simply has another name; nothing is ever written in place. What is not used for longest
//! goes when the folder grows beyond its limit. A file that turns out damaged is removed and made
//! anew, and where the folder cannot be written, models are packed each time.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::{PackedFile, VERSION, packed_bytes, write};
use crate::backend::cpu::CpuBackend;
use crate::error::Error;
use crate::files::{IfExists, StagedFile, ensure_space, write_error};
use crate::model::decoder::Decoder;

/// A folder with packed weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedCache {
    pub dir: PathBuf,
    /// Bytes that all files may have together.
    pub bytes_max: u64,
}

/// Bytes of a cache unless it is told otherwise: a model of 13 billion parameters in 4 bits and its
/// smaller relatives.
pub const BYTES_MAX: u64 = 16 << 30;

const EXTENSION: &str = "bin";

impl PackedCache {
    /// The cache in `dir` with the usual limit.
    pub fn new(dir: PathBuf) -> PackedCache {
        PackedCache { dir, bytes_max: BYTES_MAX }
    }

    /// The name of a model whose weights are in `files` and look like `fingerprint`, packed as
    /// `layout` says. A file that is written anew has another length or time of change.
    pub fn key(files: &[PathBuf], fingerprint: &str, layout: &str) -> Result<String, Error> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("{VERSION}\n{fingerprint}\n{layout}\n").as_bytes());
        for path in files {
            let path = fs::canonicalize(path).map_err(|error| Error::io(path, error))?;
            let metadata = fs::metadata(&path).map_err(|error| Error::io(&path, error))?;
            let modified = metadata.modified().unwrap_or(UNIX_EPOCH);
            let nanoseconds = modified.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
            hasher.update(path.as_os_str().as_encoded_bytes());
            hasher.update(format!("\n{} {nanoseconds}\n", metadata.len()).as_bytes());
        }
        Ok(hasher.finalize().to_string())
    }

    /// Where the weights `key` are, or would be.
    pub fn path(&self, key: &str) -> PathBuf {
        self.dir.join(format!("{key}.{EXTENSION}"))
    }

    /// The weights `key`, checked on `num_threads` threads; `None` where they are not kept. A file
    /// that is damaged is removed, and an error says so.
    pub fn open(&self, key: &str, num_threads: usize) -> Result<Option<PackedFile>, Error> {
        let path = self.path(key);
        if !path.exists() {
            return Ok(None);
        }
        let opened = PackedFile::open(&path).and_then(|file| {
            file.check(num_threads)?;
            match file.source() == key {
                true => Ok(file),
                false => Err(file.damaged("they are those of another model")),
            }
        });
        match opened {
            Ok(file) => {
                // NOTE: where times cannot be set, the oldest goes first instead of the one that
                // was not used for longest.
                let used = File::open(&path).and_then(|file| file.set_modified(SystemTime::now()));
                drop(used);
                Ok(Some(file))
            }
            Err(error) => {
                self.remove(key);
                Err(error)
            }
        }
    }

    /// Forgets the weights `key`, where the folder lets it.
    pub fn remove(&self, key: &str) {
        let _ = fs::remove_file(self.path(key));
    }

    /// Keeps the weights of a loaded model, and makes room for them.
    pub fn store(&self, key: &str, decoder: &Decoder<CpuBackend>) -> Result<(), Error> {
        let needed = packed_bytes(decoder);
        if needed > self.bytes_max {
            return Ok(());
        }
        fs::create_dir_all(&self.dir).map_err(|error| Error::io(&self.dir, error))?;
        self.evict(self.bytes_max - needed);
        ensure_space(&self.dir, needed)?;
        let path = self.path(key);
        let staged = StagedFile::create(&path, IfExists::Replace)?;
        let fail = |error| write_error(staged.path(), needed, error);
        let file = File::create_new(staged.path()).map_err(fail)?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        // NOTE: not made durable, which would take as long as packing: what a crash leaves has
        // other checksums.
        write(decoder, key, &mut out).and_then(|_| out.flush()).map_err(fail)?;
        drop(out);
        staged.commit()
    }

    /// Removes those files that were not used for longest, until the others have at most
    /// `bytes_max` bytes.
    fn evict(&self, bytes_max: u64) {
        let mut files = self.files();
        files.sort();
        let mut total: u64 = files.iter().map(|(_, len, _)| len).sum();
        for (_, len, path) in files {
            if total <= bytes_max {
                return;
            }
            if fs::remove_file(&path).is_ok() {
                total -= len;
            }
        }
    }

    /// Time of the last use, bytes and path of every file.
    fn files(&self) -> Vec<(SystemTime, u64, PathBuf)> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let is_packed = |path: &Path| path.extension().is_some_and(|found| found == EXTENSION);
        let files = entries.filter(|entry| is_packed(&entry.path())).filter_map(|entry| {
            let metadata = entry.metadata().ok()?;
            Some((metadata.modified().ok()?, metadata.len(), entry.path()))
        });
        files.collect()
    }
}
