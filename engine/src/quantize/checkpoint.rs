//! The tensors of a model folder, in one safetensors file or in shards: where each lies, checked
//! against the files' sizes before anything is read.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use crate::error::Error;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const HEADER_BYTES_MAX: u64 = 100_000_000;
const INDEX_BYTES_MAX: u64 = 100_000_000;
const RANK_MAX: usize = 8;

/// One tensor of the checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredTensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub num_bytes: u64,
    shard: usize,
    /// From the start of the shard's file.
    offset: u64,
}

/// All tensors of a model folder.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    shards: Vec<(PathBuf, File)>,
    pub tensors: BTreeMap<String, StoredTensor>,
}

impl Checkpoint {
    /// Reads the headers of `model.safetensors`, or of the shards that the index names.
    pub fn open(dir: &Path) -> Result<Checkpoint, Error> {
        let index = dir.join(INDEX);
        let names = if dir.join(SINGLE).is_file() || !index.is_file() {
            BTreeSet::from([SINGLE.to_owned()])
        } else {
            shard_names(&index)?
        };
        let mut checkpoint =
            Checkpoint { dir: dir.to_owned(), shards: Vec::new(), tensors: BTreeMap::new() };
        for name in names {
            checkpoint.add_shard(&dir.join(name))?;
        }
        Ok(checkpoint)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn add_shard(&mut self, path: &Path) -> Result<(), Error> {
        let mut file = File::open(path).map_err(|e| Error::io(path, e))?;
        let shard = self.shards.len();
        for (name, tensor) in read_header(&mut file, path, shard)? {
            if self.tensors.insert(name.clone(), tensor).is_some() {
                return Err(Error::model(path, format!("tensor '{name}' is in another shard too")));
            }
        }
        self.shards.push((path.to_owned(), file));
        Ok(())
    }

    /// Fills `out` with bytes of `tensor`, from its byte `from` on.
    pub fn read_at(
        &mut self,
        tensor: &StoredTensor,
        from: u64,
        out: &mut [u8],
    ) -> Result<(), Error> {
        assert!(from + out.len() as u64 <= tensor.num_bytes);
        let (path, file) = &mut self.shards[tensor.shard];
        file.seek(SeekFrom::Start(tensor.offset + from)).map_err(|e| Error::io(&*path, e))?;
        file.read_exact(out).map_err(|e| Error::io(&*path, e))
    }

    /// The file that holds `tensor`, for messages.
    pub fn path_of(&self, tensor: &StoredTensor) -> &Path {
        &self.shards[tensor.shard].0
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The distinct shards of an index, each a plain name in the same folder.
fn shard_names(index: &Path) -> Result<BTreeSet<String>, Error> {
    let size = fs::metadata(index).map_err(|e| Error::io(index, e))?.len();
    if size > INDEX_BYTES_MAX {
        return Err(Error::model(index, format!("{size} bytes, above {INDEX_BYTES_MAX}")));
    }
    let text = fs::read(index).map_err(|e| Error::io(index, e))?;
    let parsed: Index =
        serde_json::from_slice(&text).map_err(|e| Error::model(index, e.to_string()))?;
    let names: BTreeSet<String> = parsed.weight_map.into_values().collect();
    let is_plain = |name: &str| {
        name.ends_with(".safetensors")
            && !name.starts_with('.')
            && !name.contains(['/', '\\', ':', '\0'])
    };
    match names.iter().find(|name| !is_plain(name)) {
        Some(name) => Err(Error::model(index, format!("shard {name:?} is no plain file name"))),
        None => Ok(names),
    }
}

#[derive(Deserialize)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// Entries of a header in order. A name that occurs twice would hide one of its tensors.
struct Header(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Header, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Header, M::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<serde::de::IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

fn read_header(
    file: &mut File,
    path: &Path,
    shard: usize,
) -> Result<BTreeMap<String, StoredTensor>, Error> {
    let file_len = file.metadata().map_err(|e| Error::io(path, e))?.len();
    let mut prefix = [0; 8];
    let damaged = |message: String| {
        Error::model(path, format!("{message}; the file is damaged or incomplete"))
    };
    if file_len < 8 {
        return Err(damaged(format!("{file_len} bytes are no safetensors file")));
    }
    file.read_exact(&mut prefix).map_err(|e| Error::io(path, e))?;
    let header_len = u64::from_le_bytes(prefix);
    if header_len > HEADER_BYTES_MAX || header_len > file_len - 8 {
        return Err(damaged(format!("a header of {header_len} bytes in {file_len}")));
    }
    let mut header = vec![0; header_len as usize];
    file.read_exact(&mut header).map_err(|e| Error::io(path, e))?;
    let Header(entries) =
        serde_json::from_slice(&header).map_err(|e| damaged(format!("header: {e}")))?;
    let data_start = 8 + header_len;
    let data_len = file_len - data_start;
    let mut tensors = BTreeMap::new();
    let mut spans = Vec::new();
    for (name, entry) in entries {
        let (begin, end) = entry.data_offsets;
        let num_bytes = checked_bytes(&entry)
            .filter(|&bytes| begin <= end && end <= data_len && end - begin == bytes)
            .ok_or_else(|| {
                damaged(format!(
                    "tensor {name:?} of shape {:?} does not fill bytes {begin} to {end} of \
                     {data_len}",
                    entry.shape
                ))
            })?;
        spans.push((begin, end));
        let offset = data_start + begin;
        let Entry { dtype, shape, .. } = entry;
        let tensor = StoredTensor { dtype, shape, num_bytes, shard, offset };
        if name.chars().any(char::is_control) || tensors.insert(name.clone(), tensor).is_some() {
            return Err(damaged(format!("tensor name {name:?} is malformed or occurs twice")));
        }
    }
    spans.sort_unstable();
    if spans.windows(2).any(|pair| pair[0].1 > pair[1].0) {
        return Err(damaged("two tensors overlap".to_owned()));
    }
    Ok(tensors)
}

fn checked_bytes(entry: &Entry) -> Option<u64> {
    if entry.shape.len() > RANK_MAX {
        return None;
    }
    let elements = entry.shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64))?;
    let bits = elements.checked_mul(entry.dtype.bitsize() as u64)?;
    (bits % 8 == 0).then_some(bits / 8)
}
