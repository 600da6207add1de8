//! The GGUF container, version 3: metadata, tensor table, tensors one after the other.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::files;
use crate::import::gguf::BlockFormat;

const VERSION: u32 = 3;
/// Tensors start at multiples of it; readers take it for granted where no key says otherwise.
const ALIGNMENT: u64 = 32;

/// A metadata value, by the type it has in the file.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Meta {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    I32s(Vec<i32>),
}

/// A key and its value.
pub(super) type Entry = (String, Meta);

/// A tensor of the table.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct TensorEntry {
    pub(super) name: String,
    /// `[rows, columns]` or `[columns]`
    pub(super) shape: Vec<usize>,
    pub(super) format: BlockFormat,
}

impl TensorEntry {
    /// Size in bytes; columns are whole blocks.
    fn num_bytes(&self) -> u64 {
        let blocks = self.shape.iter().product::<usize>() / self.format.elements();
        blocks as u64 * self.format.bytes() as u64
    }
}

/// A file whose header is written first and whose tensors follow in the order of the table.
pub(super) struct GgufWriter {
    file: BufWriter<File>,
    path: PathBuf,
    tensors: Vec<TensorEntry>,
    /// The tensor at hand, and how much of it is written.
    tensor_idx: usize,
    written: u64,
    /// Size of the whole file.
    total: u64,
}

impl GgufWriter {
    /// Checks that the disk has room, creates the file and writes all but the tensors' bytes.
    pub(super) fn create(
        path: &Path,
        metadata: &[Entry],
        tensors: Vec<TensorEntry>,
    ) -> Result<GgufWriter, Error> {
        let header = header(metadata, &tensors);
        let data: u64 = tensors.iter().map(|t| t.num_bytes().next_multiple_of(ALIGNMENT)).sum();
        let total = header.len() as u64 + data;
        files::ensure_space(path.parent().unwrap_or(path), total)?;
        let fail = |e| files::write_error(path, total, e);
        let file = OpenOptions::new().write(true).create_new(true).open(path).map_err(fail)?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&header).map_err(fail)?;
        let path = path.to_owned();
        Ok(GgufWriter { file, path, tensors, tensor_idx: 0, written: 0, total })
    }

    /// Appends to tensor `name`, which must be the one at hand or, where that is whole, the next.
    pub(super) fn append(&mut self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let current = self.tensors.get(self.tensor_idx).filter(|tensor| tensor.name == name);
        let Some(tensor) = current else {
            return Err(Error::model(&self.path, format!("tensor '{name}' is out of turn")));
        };
        let num_bytes = tensor.num_bytes();
        self.written += bytes.len() as u64;
        if self.written > num_bytes {
            let message = format!("tensor '{name}' got more than its {num_bytes} bytes");
            return Err(Error::model(&self.path, message));
        }
        let (path, total) = (&self.path, self.total);
        let fail = |e| files::write_error(path, total, e);
        self.file.write_all(bytes).map_err(fail)?;
        if self.written == num_bytes {
            let padding = num_bytes.next_multiple_of(ALIGNMENT) - num_bytes;
            self.file.write_all(&[0; ALIGNMENT as usize][..padding as usize]).map_err(fail)?;
            (self.tensor_idx, self.written) = (self.tensor_idx + 1, 0);
        }
        Ok(())
    }

    /// Checks that every tensor is whole, makes the file durable and returns its size.
    pub(super) fn finish(self) -> Result<u64, Error> {
        if let Some(tensor) = self.tensors.get(self.tensor_idx) {
            let message = format!("tensor '{}' has {} bytes", tensor.name, self.written);
            return Err(Error::model(&self.path, message));
        }
        let fail = |e| files::write_error(&self.path, self.total, e);
        let file = self.file.into_inner().map_err(|e| fail(e.into_error()))?;
        file.sync_all().map_err(fail)?;
        Ok(self.total)
    }
}

/// Everything before the tensors' bytes, padded to where they start.
fn header(metadata: &[Entry], tensors: &[TensorEntry]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    push_u32(&mut out, VERSION);
    push_u64(&mut out, tensors.len() as u64);
    push_u64(&mut out, metadata.len() as u64);
    for (key, value) in metadata {
        push_text(&mut out, key);
        push_value(&mut out, value);
    }
    let mut offset = 0;
    for tensor in tensors {
        push_text(&mut out, &tensor.name);
        push_u32(&mut out, tensor.shape.len() as u32);
        // The contiguous dimension comes first.
        tensor.shape.iter().rev().for_each(|&dim| push_u64(&mut out, dim as u64));
        push_u32(&mut out, tensor.format.id());
        push_u64(&mut out, offset);
        offset += tensor.num_bytes().next_multiple_of(ALIGNMENT);
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
    out
}

/// The type of a value, then the value.
fn push_value(out: &mut Vec<u8>, value: &Meta) {
    const ARRAY: u32 = 9;
    match value {
        Meta::U32(value) => {
            push_u32(out, 4);
            push_u32(out, *value);
        }
        Meta::F32(value) => {
            push_u32(out, 6);
            out.extend_from_slice(&value.to_le_bytes());
        }
        Meta::Bool(value) => {
            push_u32(out, 7);
            out.push(u8::from(*value));
        }
        Meta::Text(text) => {
            push_u32(out, 8);
            push_text(out, text);
        }
        Meta::Texts(texts) => {
            push_u32(out, ARRAY);
            push_u32(out, 8);
            push_u64(out, texts.len() as u64);
            texts.iter().for_each(|text| push_text(out, text));
        }
        Meta::I32s(values) => {
            push_u32(out, ARRAY);
            push_u32(out, 5);
            push_u64(out, values.len() as u64);
            values.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
        }
    }
}

fn push_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn push_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn push_text(out: &mut Vec<u8>, text: &str) {
    push_u64(out, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::import::gguf::{Gguf, Value};

    fn tensor(name: &str, len: usize) -> TensorEntry {
        TensorEntry { name: name.to_owned(), shape: vec![len], format: BlockFormat::F32 }
    }

    #[test]
    fn what_is_written_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.gguf");
        let texts = vec!["a".to_owned(), String::new()];
        let metadata = [
            ("u".to_owned(), Meta::U32(7)),
            ("f".to_owned(), Meta::F32(0.5)),
            ("b".to_owned(), Meta::Bool(true)),
            ("t".to_owned(), Meta::Text("é".to_owned())),
            ("ts".to_owned(), Meta::Texts(texts.clone())),
            ("is".to_owned(), Meta::I32s(vec![-1, 2])),
        ];
        let tensors = vec![tensor("x", 3), tensor("y", 1)];
        let mut writer = GgufWriter::create(&path, &metadata, tensors).unwrap();
        writer.append("x", &[1; 8]).unwrap();
        assert!(writer.append("y", &[0; 4]).unwrap_err().to_string().contains("out of turn"));
        writer.append("x", &[2; 4]).unwrap();
        writer.append("y", &[3; 4]).unwrap();
        let num_bytes = writer.finish().unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), num_bytes);
        let mut gguf = Gguf::read(File::open(&path).unwrap(), &path).unwrap();
        assert_eq!(gguf.metadata["u"], Value::Integer(7));
        assert_eq!(gguf.metadata["f"], Value::Float(0.5));
        assert_eq!(gguf.metadata["b"], Value::Bool(true));
        assert_eq!(gguf.metadata["t"], Value::String("é".to_owned()));
        assert_eq!(gguf.metadata["ts"], Value::Strings(texts));
        assert_eq!(gguf.metadata["is"], Value::Integers(vec![-1, 2]));
        let mut bytes = [0; 12];
        gguf.read_at(gguf.tensors["x"].offset, &mut bytes).unwrap();
        assert_eq!(bytes, [1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]);
        gguf.read_at(gguf.tensors["y"].offset, &mut bytes[..4]).unwrap();
        assert_eq!(bytes[..4], [3; 4]);
    }

    #[test]
    fn tensors_that_are_not_whole_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let create = |name: &str| {
            GgufWriter::create(&dir.path().join(name), &[], vec![tensor("x", 2)]).unwrap()
        };
        let error = create("less").finish().unwrap_err().to_string();
        assert!(error.contains("'x' has 0 bytes"), "{error}");
        let error = create("more").append("x", &[0; 12]).unwrap_err().to_string();
        assert!(error.contains("more than its 8 bytes"), "{error}");
    }
}
