//! Safetensors files: strict validation of headers and reading of tensors by name.
//!
//! Tensors are read into memory that we own, not mapped: a file that is truncated while it is read
//! gives an error, where a mapping would end the process (SIGBUS).

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::error::Error;

/// Longest header that is read: a model with a million tensors stays below it.
const HEADER_BYTES_MAX: u64 = 100 << 20;
/// Longest `model.safetensors.index.json` or `config.json` that is read.
pub(crate) const JSON_BYTES_MAX: u64 = 64 << 20;
/// Bytes of a tensor that its fingerprint covers.
const FINGERPRINT_BYTES: usize = 4096;
const RANK_MAX: usize = 8;
const NAME_LEN_MAX: usize = 512;

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";

/// The tensors of a model folder: `model.safetensors`, or the shards of its index.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    files: Vec<TensorFile>,
    tensors: BTreeMap<String, Tensor>,
}

#[derive(Debug)]
struct TensorFile {
    path: PathBuf,
    file: File,
}

/// Where a tensor lies, checked against its file's size.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Bytes of the tensor.
    pub len: usize,
    file_idx: usize,
    start: u64,
}

impl Checkpoint {
    /// Opens the weights of a model folder and validates every header; reads no tensor.
    pub fn open(dir: &Path) -> Result<Checkpoint, Error> {
        let single = dir.join(SINGLE_FILE);
        let mut checkpoint =
            Checkpoint { dir: dir.to_owned(), files: Vec::new(), tensors: BTreeMap::new() };
        if single.exists() {
            checkpoint.add_file(single)?;
            return Ok(checkpoint);
        }
        let index_path = dir.join(INDEX_FILE);
        if !index_path.exists() {
            let message = format!(
                "holds neither {SINGLE_FILE} nor {INDEX_FILE}; give a model folder with \
                 safetensors weights"
            );
            return Err(Error::model(dir, message));
        }
        let weight_map = read_index(&index_path)?;
        let mut shards: Vec<&str> = weight_map.iter().map(|(_, file)| file.as_str()).collect();
        shards.sort_unstable();
        shards.dedup();
        for shard in shards {
            checkpoint.add_file(dir.join(shard))?;
        }
        checkpoint.check_index(&index_path, &weight_map)?;
        Ok(checkpoint)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The files that hold tensors.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// The file that holds `tensor`.
    pub fn path(&self, tensor: &Tensor) -> &Path {
        &self.files[tensor.file_idx].path
    }

    /// The bytes of the tensor `name`, little-endian.
    pub fn read(&self, name: &str) -> Result<Vec<u8>, Error> {
        let Some(tensor) = self.tensors.get(name) else {
            return Err(Error::model(&self.dir, format!("there is no tensor '{name}'")));
        };
        let TensorFile { path, file } = &self.files[tensor.file_idx];
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(tensor.len).map_err(|_| {
            Error::Resources(format!("no memory for the {} bytes of '{name}'", tensor.len))
        })?;
        let mut reader: &File = file;
        reader.seek(SeekFrom::Start(tensor.start)).map_err(|error| Error::io(path, error))?;
        let num_read = reader
            .take(tensor.len as u64)
            .read_to_end(&mut bytes)
            .map_err(|error| Error::io(path, error))?;
        if num_read != tensor.len {
            let message = format!(
                "the file ended within tensor '{name}': {num_read} of {} bytes; it was changed \
                 while it was read",
                tensor.len
            );
            return Err(Error::model(path, message));
        }
        Ok(bytes)
    }

    /// A hash of every tensor's name, type and shape, and of its first bytes: enough to tell two
    /// models apart without reading either.
    pub fn fingerprint(&self) -> Result<blake3::Hash, Error> {
        let mut hasher = blake3::Hasher::new();
        for (name, tensor) in &self.tensors {
            let Tensor { dtype, shape, len, file_idx, start } = tensor;
            hasher.update(format!("{name} {dtype:?} {shape:?};").as_bytes());
            let TensorFile { path, file } = &self.files[*file_idx];
            let mut reader: &File = file;
            reader.seek(SeekFrom::Start(*start)).map_err(|error| Error::io(path, error))?;
            let mut reader = reader.take((*len).min(FINGERPRINT_BYTES) as u64);
            hasher.update_reader(&mut reader).map_err(|error| Error::io(path, error))?;
        }
        Ok(hasher.finalize())
    }

    /// Adds all tensors of one file.
    fn add_file(&mut self, path: PathBuf) -> Result<(), Error> {
        let file = File::open(&path).map_err(|error| Error::io(&path, error))?;
        let tensors = read_header(&path, &file, self.files.len())?;
        for (name, tensor) in tensors {
            if let Some(other) = self.tensors.get(&name) {
                let other = self.files.get(other.file_idx).map_or(&path, |file| &file.path);
                let message = format!("tensor '{name}' is also in {}", other.display());
                return Err(Error::model(&path, message));
            }
            self.tensors.insert(name, tensor);
        }
        self.files.push(TensorFile { path, file });
        Ok(())
    }

    fn check_index(&self, path: &Path, weight_map: &[(String, String)]) -> Result<(), Error> {
        for (name, file) in weight_map {
            let expected = self.dir.join(file);
            match self.tensors.get(name) {
                Some(tensor) if self.files[tensor.file_idx].path == expected => {}
                Some(tensor) => {
                    let found = self.files[tensor.file_idx].path.display();
                    let message = format!("'{name}' should be in {file}, but is in {found}");
                    return Err(Error::model(path, message));
                }
                None => {
                    let message = format!("'{name}' should be in {file}, which does not hold it");
                    return Err(Error::model(path, message));
                }
            }
        }
        Ok(())
    }
}

/// Whether the folder `dir` holds weights.
pub fn has_weights(dir: &Path) -> bool {
    [SINGLE_FILE, INDEX_FILE].iter().any(|name| dir.join(name).exists())
}

/// Reads a small text file, refusing one beyond [`JSON_BYTES_MAX`].
pub(crate) fn read_json_file(path: &Path) -> Result<String, Error> {
    let file = File::open(path).map_err(|error| Error::io(path, error))?;
    let mut text = String::new();
    let num_read = file
        .take(JSON_BYTES_MAX + 1)
        .read_to_string(&mut text)
        .map_err(|error| Error::io(path, error))?;
    if num_read as u64 > JSON_BYTES_MAX {
        return Err(Error::model(path, format!("is larger than {JSON_BYTES_MAX} bytes")));
    }
    Ok(text)
}

/// The pairs of tensor and file of an index, file names checked.
fn read_index(path: &Path) -> Result<Vec<(String, String)>, Error> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: Entries<String>,
    }
    let text = read_json_file(path)?;
    let index: Index = serde_json::from_str(&text)
        .map_err(|error| Error::model(path, format!("not a safetensors index: {error}")))?;
    let entries = index.weight_map.0;
    if entries.is_empty() {
        return Err(Error::model(path, "weight_map names no tensor"));
    }
    for (name, file) in &entries {
        let mut components = Path::new(file).components();
        let plain = matches!(components.next(), Some(Component::Normal(_)))
            && components.next().is_none()
            && !file.contains(['/', '\\', '\0']);
        if !plain {
            let message = format!(
                "'{name}' points to '{file}', which is not a plain file name in the model folder"
            );
            return Err(Error::model(path, message));
        }
    }
    let mut names: Vec<&str> = entries.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::model(path, format!("'{}' is listed twice", pair[0])));
    }
    Ok(entries)
}

/// Reads and validates the header of one file.
fn read_header(path: &Path, file: &File, file_idx: usize) -> Result<Vec<(String, Tensor)>, Error> {
    let damaged = |message: String| Error::model(path, message);
    let (header, file_len) = read_header_bytes(path, file)?;
    let entries: Entries<RawTensor> = serde_json::from_slice(&header)
        .map_err(|error| damaged(format!("the safetensors header is damaged: {error}")))?;
    let data_start = 8 + header.len() as u64;
    let mut tensors = Vec::new();
    for (name, raw) in entries.0 {
        let tensor = raw.check(&name, file_idx, data_start, file_len).map_err(damaged)?;
        tensors.push((name, tensor));
    }
    check_layout(&tensors, data_start, file_len).map_err(damaged)?;
    Ok(tensors)
}

/// The JSON of a header and the length of its file.
fn read_header_bytes(path: &Path, file: &File) -> Result<(Vec<u8>, u64), Error> {
    let fail = |message: String| Err(Error::model(path, message));
    let metadata = file.metadata().map_err(|error| Error::io(path, error))?;
    if !metadata.is_file() {
        return fail("is not a regular file".to_owned());
    }
    let file_len = metadata.len();
    if file_len < 8 {
        return fail(format!("has {file_len} bytes, a safetensors file has at least 8"));
    }
    let mut reader: &File = file;
    let mut prefix = [0u8; 8];
    reader.read_exact(&mut prefix).map_err(|error| Error::io(path, error))?;
    let header_len = u64::from_le_bytes(prefix);
    if header_len > file_len - 8 {
        return fail(format!(
            "declares a header of {header_len} bytes, but only {} follow; the file is truncated \
             or not a safetensors file",
            file_len - 8
        ));
    }
    if header_len > HEADER_BYTES_MAX {
        return fail(format!(
            "declares a header of {header_len} bytes, at most {HEADER_BYTES_MAX} are read"
        ));
    }
    let mut header = Vec::new();
    reader.take(header_len).read_to_end(&mut header).map_err(|error| Error::io(path, error))?;
    match header.len() as u64 == header_len {
        true => Ok((header, file_len)),
        false => fail("the file shrank while its header was read".to_owned()),
    }
}

/// Names must be distinct, and the tensors must cover the data without overlap or hole.
fn check_layout(
    tensors: &[(String, Tensor)],
    data_start: u64,
    file_len: u64,
) -> Result<(), String> {
    let mut names: Vec<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("the header names tensor '{}' twice", pair[0]));
    }
    let mut spans: Vec<(u64, u64, &str)> = tensors
        .iter()
        .map(|(name, tensor)| (tensor.start, tensor.len as u64, name.as_str()))
        .collect();
    spans.sort_unstable();
    let mut end = data_start;
    for (start, len, name) in spans {
        if start < end {
            return Err(format!(
                "tensor '{name}' starts at byte {}, within the tensor that ends at byte {}",
                start - data_start,
                end - data_start
            ));
        }
        if start > end {
            return Err(format!(
                "{} bytes before tensor '{name}' belong to no tensor",
                start - end
            ));
        }
        end = start + len;
    }
    if end != file_len {
        return Err(format!("the tensors end at byte {end}, but the file has {file_len} bytes"));
    }
    Ok(())
}

/// A tensor as a header declares it.
#[derive(Deserialize)]
struct RawTensor {
    dtype: Dtype,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl RawTensor {
    /// The tensor, if its offsets lie in the file and fit its shape.
    fn check(
        &self,
        name: &str,
        file_idx: usize,
        data_start: u64,
        file_len: u64,
    ) -> Result<Tensor, String> {
        if name.is_empty() || name.len() > NAME_LEN_MAX || name.chars().any(char::is_control) {
            return Err(format!("'{}' is not a tensor name", name.escape_debug()));
        }
        let data_len = file_len - data_start;
        let (start, end) = self.data_offsets;
        if start > end || end > data_len {
            return Err(format!(
                "tensor '{name}' lies at bytes {start}..{end} of {data_len}; the file is \
                 truncated or damaged"
            ));
        }
        if self.shape.len() > RANK_MAX {
            return Err(format!(
                "tensor '{name}' has {} dimensions, at most {RANK_MAX} are read",
                self.shape.len()
            ));
        }
        let num_bytes = self
            .numel()
            .and_then(|numel| numel.checked_mul(self.dtype.bitsize() as u64))
            .map(|num_bits| num_bits.div_ceil(8));
        if num_bytes != Some(end - start) {
            return Err(format!(
                "tensor '{name}' of type {} and shape {:?} does not fit its {} bytes",
                self.dtype,
                self.shape,
                end - start
            ));
        }
        let too_large = |_| format!("tensor '{name}' of {} bytes is too large", end - start);
        let mut shape = Vec::new();
        for dim in &self.shape {
            shape.push(usize::try_from(*dim).map_err(too_large)?);
        }
        let len = usize::try_from(end - start).map_err(too_large)?;
        Ok(Tensor { dtype: self.dtype, shape, len, file_idx, start: data_start + start })
    }

    /// Number of elements; `None` where any product of the non-zero dimensions overflows.
    fn numel(&self) -> Option<u64> {
        let mut product: u64 = 1;
        for dim in &self.shape {
            product = product.checked_mul((*dim).max(1))?;
        }
        Some(if self.shape.contains(&0) { 0 } else { product })
    }
}

/// The entries of a JSON object in order, duplicates included, `__metadata__` left out.
struct Entries<T>(Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Entries<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor<T>(std::marker::PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for EntriesVisitor<T> {
            type Value = Entries<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries<T>, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(EntriesVisitor(std::marker::PhantomData))
    }
}
