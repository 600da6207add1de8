//! Compiled kernels by the hash of all they are made from, kept between builds.
//!
//! An entry is one file: a line of JSON (hash and length of the machine code, the assembler's
//! report), then the machine code. Files appear under their names complete (`rename`), so builds
//! that run at the same time may share a cache; a damaged file counts as absent.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};

use crate::error::Error;

/// The folder of compiled kernels and installed toolkits.
#[derive(Clone, Debug)]
pub struct Cache {
    pub root: PathBuf,
}

/// What the compiler made of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub cubin: Vec<u8>,
    /// All that the compiler said.
    pub report: String,
}

static NUM_TEMPORARIES: AtomicU64 = AtomicU64::new(0);

impl Cache {
    /// The entry under `key`, if it is there and undamaged.
    pub fn get(&self, key: &str) -> Option<Entry> {
        decode(&fs::read(self.path(key)).ok()?)
    }

    pub fn put(&self, key: &str, entry: &Entry) -> Result<(), Error> {
        let path = self.path(key);
        let temporary = self.temporary("entry")?;
        let write = || -> io::Result<()> {
            fs::create_dir_all(path.parent().unwrap_or(&self.root))?;
            fs::write(&temporary, encode(entry))?;
            fs::rename(&temporary, &path)
        };
        write().map_err(|source| Error::Io { path: path.display().to_string(), source })
    }

    /// A path that nobody else uses, in a folder on the same file system.
    pub fn temporary(&self, suffix: &str) -> Result<PathBuf, Error> {
        let folder = self.root.join("tmp");
        fs::create_dir_all(&folder)
            .map_err(|source| Error::Io { path: folder.display().to_string(), source })?;
        let number = NUM_TEMPORARIES.fetch_add(1, Ordering::Relaxed);
        Ok(folder.join(format!("{}-{number}.{suffix}", std::process::id())))
    }

    pub fn toolkits(&self) -> PathBuf {
        self.root.join("toolkits")
    }

    fn path(&self, key: &str) -> PathBuf {
        let (folder, _) = key.split_at(2);
        self.root.join("kernels").join(folder).join(key)
    }
}

fn encode(entry: &Entry) -> Vec<u8> {
    let head = json!({
        "hash": blake3::hash(&entry.cubin).to_hex().as_str(),
        "len": entry.cubin.len(),
        "report": entry.report,
    });
    let mut bytes = head.to_string().into_bytes();
    bytes.push(b'\n');
    bytes.extend(&entry.cubin);
    bytes
}

fn decode(bytes: &[u8]) -> Option<Entry> {
    let end = bytes.iter().position(|byte| *byte == b'\n')?;
    let head: Value = serde_json::from_slice(&bytes[..end]).ok()?;
    let cubin = &bytes[end + 1..];
    let is_whole = head["len"].as_u64() == Some(cubin.len() as u64)
        && head["hash"].as_str() == Some(blake3::hash(cubin).to_hex().as_str());
    let report = head["report"].as_str()?.to_string();
    is_whole.then(|| Entry { cubin: cubin.to_vec(), report })
}

/// Removes a temporary file when the work on it ends.
pub(super) struct Temporary(pub(super) PathBuf);

impl Temporary {
    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // NOTE: it may never have been written, or be a folder that was renamed.
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(name: &str) -> Cache {
        let root = std::env::temp_dir().join(format!("bespoke-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        Cache { root }
    }

    #[test]
    fn entries_come_back_whole_or_not_at_all() {
        let cache = cache("cache");
        let key = "ab12";
        let entry = Entry { cubin: vec![0, 10, 255, 10, 7], report: "40 registers\n".to_string() };
        assert_eq!(cache.get(key), None);
        cache.put(key, &entry).unwrap();
        assert_eq!(cache.get(key), Some(entry.clone()));
        let whole = fs::read(cache.path(key)).unwrap();
        for len in 0..whole.len() {
            fs::write(cache.path(key), &whole[..len]).unwrap();
            assert_eq!(cache.get(key), None, "cut to {len} bytes");
        }
        let head = whole.iter().position(|byte| *byte == b'\n').unwrap();
        for idx in head + 1..whole.len() {
            let mut damaged = whole.clone();
            damaged[idx] ^= 1;
            fs::write(cache.path(key), &damaged).unwrap();
            assert_eq!(cache.get(key), None, "byte {idx}");
        }
        cache.put(key, &entry).unwrap();
        assert_eq!(cache.get(key), Some(entry));
        assert_eq!(fs::read_dir(cache.root.join("tmp")).unwrap().count(), 0);
        fs::remove_dir_all(&cache.root).unwrap();
    }
}
