//! Writes one safetensors file tensor by tensor, so that no more than a piece is in memory.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::json;

use crate::error::Error;
use crate::files;

/// Name, element type and shape of a tensor to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Size in bytes; `None` when it overflows.
    pub fn num_bytes(&self) -> Option<u64> {
        let elements = self.shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64))?;
        elements.checked_mul(self.dtype.bitsize() as u64).map(|bits| bits / 8)
    }
}

/// Where a tensor lies in the file, and how much of it has been written.
struct Slot {
    offset: u64,
    len: u64,
    written: u64,
}

/// A file whose header is written first and whose tensors follow in any order.
pub struct SafetensorsWriter {
    file: File,
    path: PathBuf,
    slots: BTreeMap<String, Slot>,
    /// Size of the whole file.
    total: u64,
}

impl SafetensorsWriter {
    /// Lays out all tensors, checks that the disk has room and writes the header.
    /// Wide elements come first, so that every tensor is aligned to its element size.
    pub fn create(path: &Path, mut specs: Vec<TensorSpec>) -> Result<SafetensorsWriter, Error> {
        specs.sort_by(|a, b| {
            b.dtype.bitsize().cmp(&a.dtype.bitsize()).then_with(|| a.name.cmp(&b.name))
        });
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
        let mut slots = BTreeMap::new();
        let mut end = 0u64;
        for spec in &specs {
            let len = spec.num_bytes();
            let next = len.and_then(|len| end.checked_add(len));
            let (Some(len), Some(next)) = (len, next) else {
                return Err(Error::model(
                    path,
                    format!("tensor '{}' of shape {:?} is too large", spec.name, spec.shape),
                ));
            };
            header.insert(
                spec.name.clone(),
                json!({
                    "dtype": spec.dtype, "shape": spec.shape, "data_offsets": [end, next],
                }),
            );
            if slots.insert(spec.name.clone(), Slot { offset: end, len, written: 0 }).is_some() {
                return Err(Error::model(path, format!("two tensors are named '{}'", spec.name)));
            }
            end = next;
        }
        let header = padded_header(header);
        let data_start = header.len() as u64;
        for slot in slots.values_mut() {
            slot.offset += data_start;
        }
        let total = data_start.saturating_add(end);
        files::ensure_space(path.parent().unwrap_or(path), total)?;
        let fail = |e| files::write_error(path, total, e);
        let mut file = OpenOptions::new().write(true).create_new(true).open(path).map_err(fail)?;
        file.write_all(&header).map_err(fail)?;
        Ok(SafetensorsWriter { file, path: path.to_owned(), slots, total })
    }

    /// Appends `bytes` to what has been written of tensor `name`.
    pub fn append(&mut self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let slot = self.slots.get_mut(name).ok_or_else(|| {
            Error::model(&self.path, format!("tensor '{name}' was not announced"))
        })?;
        let after = slot.written + bytes.len() as u64;
        if after > slot.len {
            return Err(Error::model(
                &self.path,
                format!("tensor '{name}' got {after} bytes, but has {}", slot.len),
            ));
        }
        let (path, total) = (&self.path, self.total);
        let fail = |e| files::write_error(path, total, e);
        self.file.seek(SeekFrom::Start(slot.offset + slot.written)).map_err(fail)?;
        self.file.write_all(bytes).map_err(fail)?;
        slot.written = after;
        Ok(())
    }

    /// Checks that every tensor is whole and makes the file durable.
    pub fn finish(self) -> Result<(), Error> {
        for (name, slot) in &self.slots {
            if slot.written != slot.len {
                return Err(Error::model(
                    &self.path,
                    format!("tensor '{name}' has {} of {} bytes", slot.written, slot.len),
                ));
            }
        }
        self.file.sync_all().map_err(|e| files::write_error(&self.path, self.total, e))
    }
}

/// Length prefix and JSON, padded with spaces so that the data starts at a multiple of 8.
fn padded_header(header: serde_json::Map<String, serde_json::Value>) -> Vec<u8> {
    let json = serde_json::Value::Object(header).to_string();
    let padded = json.len().next_multiple_of(8);
    let mut bytes = Vec::with_capacity(8 + padded);
    bytes.extend_from_slice(&(padded as u64).to_le_bytes());
    bytes.extend_from_slice(json.as_bytes());
    bytes.resize(8 + padded, b' ');
    bytes
}
