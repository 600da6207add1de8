//! The GGUF container (versions 2 and 3): metadata, tensor table, tensor bytes.
//!
//! The file is foreign: every count and length is compared with the bytes that are left before
//! anything is allocated, and no arithmetic on its numbers can overflow.

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::dequantize::BlockFormat;
use crate::error::Error;

const MAGIC: [u8; 4] = *b"GGUF";
const KEYS_MAX: u64 = 1 << 16;
const TENSORS_MAX: u64 = 1 << 16;
const NAME_BYTES_MAX: u64 = 1 << 16;
const ARRAY_ELEMENTS_MAX: u64 = 1 << 22;
const DIMS_MAX: u32 = 4;
const ALIGNMENT_DEFAULT: u64 = 32;
const ALIGNMENT_MAX: u64 = 1 << 20;

/// A metadata value. Numbers keep their value, not their width.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Integer(i128),
    Float(f64),
    Bool(bool),
    String(String),
    Strings(Vec<String>),
    Integers(Vec<i64>),
    Floats(Vec<f32>),
    /// An array of a type that no importer needs.
    Skipped,
}

/// One tensor of the table, its place checked against the file's size.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Sizes, the contiguous dimension first.
    pub dims: Vec<u64>,
    pub format: BlockFormat,
    /// From the start of the file.
    pub offset: u64,
    pub num_bytes: u64,
}

/// An open GGUF file.
pub struct Gguf<R> {
    reader: R,
    pub path: PathBuf,
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, TensorInfo>,
}

impl<R: Read + Seek> Gguf<R> {
    /// Reads and checks everything but the tensors' bytes. `path` is for messages.
    pub fn read(mut reader: R, path: &Path) -> Result<Gguf<R>, Error> {
        let file_len = reader.seek(SeekFrom::End(0)).map_err(|e| Error::io(path, e))?;
        reader.seek(SeekFrom::Start(0)).map_err(|e| Error::io(path, e))?;
        let mut cursor = Cursor { reader: &mut reader, position: 0, len: file_len, path };
        let (num_tensors, num_keys) = read_counts(&mut cursor)?;
        let metadata = read_metadata(&mut cursor, num_keys)?;
        let alignment = alignment(&metadata, path)?;
        let mut tensors = BTreeMap::new();
        for _ in 0..num_tensors {
            let (name, info) = read_tensor_info(&mut cursor)?;
            if tensors.contains_key(&name) {
                return Err(cursor.error(format!("two tensors are named '{name}'")));
            }
            tensors.insert(name, info);
        }
        let data_start = cursor.position.next_multiple_of(alignment);
        place_tensors(&mut tensors, data_start, alignment, file_len, path)?;
        Ok(Gguf { reader, path: path.to_owned(), metadata, tensors })
    }

    /// Fills `out` with bytes of the file from `offset` on.
    pub fn read_at(&mut self, offset: u64, out: &mut [u8]) -> Result<(), Error> {
        self.reader.seek(SeekFrom::Start(offset)).map_err(|e| Error::io(&self.path, e))?;
        self.reader.read_exact(out).map_err(|e| Error::io(&self.path, e))
    }

    /// An error about this file.
    pub fn error(&self, message: impl Into<String>) -> Error {
        Error::model(&self.path, message)
    }
}

/// Reads forward and never past the end.
struct Cursor<'a, R> {
    reader: &'a mut R,
    position: u64,
    len: u64,
    path: &'a Path,
}

impl<R: Read + Seek> Cursor<'_, R> {
    fn error(&self, message: impl Into<String>) -> Error {
        Error::model(self.path, message)
    }

    fn remaining(&self) -> u64 {
        self.len - self.position
    }

    /// Fails unless `count` elements of at least `size` bytes can still follow.
    fn expect(&self, count: u64, size: u64, what: &str) -> Result<(), Error> {
        match count.checked_mul(size) {
            Some(needed) if needed <= self.remaining() => Ok(()),
            _ => Err(self.error(format!(
                "{what} at byte {} would need {count} × {size} bytes, but the file ends {} bytes \
                 later; the file is damaged or incomplete, fetch it again",
                self.position,
                self.remaining()
            ))),
        }
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Error> {
        self.expect(1, N as u64, what)?;
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes).map_err(|e| Error::io(self.path, e))?;
        self.position += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32, Error> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, Error> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn bytes(&mut self, len: u64, what: &str) -> Result<Vec<u8>, Error> {
        self.expect(len, 1, what)?;
        // The length is at most the file's, which was just checked.
        let mut bytes = vec![0; len as usize];
        self.reader.read_exact(&mut bytes).map_err(|e| Error::io(self.path, e))?;
        self.position += len;
        Ok(bytes)
    }

    fn string(&mut self, len_max: u64, what: &str) -> Result<String, Error> {
        let len = self.u64(what)?;
        if len > len_max {
            return Err(self.error(format!("{what}: length {len} is above {len_max}")));
        }
        let bytes = self.bytes(len, what)?;
        String::from_utf8(bytes).map_err(|_| self.error(format!("{what} is not UTF-8")))
    }

    fn skip(&mut self, count: u64, size: u64, what: &str) -> Result<(), Error> {
        self.expect(count, size, what)?;
        self.position += count * size;
        self.reader
            .seek(SeekFrom::Start(self.position))
            .map(|_| ())
            .map_err(|e| Error::io(self.path, e))
    }
}

/// Magic and version, then the numbers of tensors and of keys.
fn read_counts<R: Read + Seek>(cursor: &mut Cursor<R>) -> Result<(u64, u64), Error> {
    let magic: [u8; 4] = cursor.array("the magic number")?;
    if magic != MAGIC {
        return Err(
            cursor.error(format!("not a GGUF file: it starts with {magic:02x?} instead of 'GGUF'"))
        );
    }
    let version = cursor.u32("the version")?;
    if !(2..=3).contains(&version) {
        let message = if (2..=3).contains(&version.swap_bytes()) {
            "a big-endian GGUF file; only little-endian ones can be read".to_owned()
        } else {
            format!("GGUF version {version}; versions 2 and 3 can be read, convert the file anew")
        };
        return Err(Error::Unsupported(format!("{}: {message}", cursor.path.display())));
    }
    let num_tensors = cursor.u64("the number of tensors")?;
    let num_keys = cursor.u64("the number of keys")?;
    for (count, max, what) in
        [(num_tensors, TENSORS_MAX, "tensors"), (num_keys, KEYS_MAX, "metadata keys")]
    {
        if count > max {
            return Err(cursor.error(format!("{count} {what} declared; at most {max} make sense")));
        }
    }
    // The smallest key takes 8 + 4 + 1 bytes, the smallest tensor entry 8 + 4 + 8 + 4 + 8.
    cursor.expect(num_keys, 13, "the metadata")?;
    cursor.expect(num_tensors, 32, "the tensor table")?;
    Ok((num_tensors, num_keys))
}

fn read_metadata<R: Read + Seek>(
    cursor: &mut Cursor<R>,
    num_keys: u64,
) -> Result<BTreeMap<String, Value>, Error> {
    let mut metadata = BTreeMap::new();
    for _ in 0..num_keys {
        let key = cursor.string(NAME_BYTES_MAX, "a metadata key")?;
        let kind = cursor.u32(&key)?;
        let value =
            if kind == 9 { read_array(cursor, &key)? } else { read_scalar(cursor, kind, &key)? };
        if metadata.insert(key.clone(), value).is_some() {
            return Err(cursor.error(format!("metadata key '{key}' occurs twice")));
        }
    }
    Ok(metadata)
}

fn read_scalar<R: Read + Seek>(
    cursor: &mut Cursor<R>,
    kind: u32,
    key: &str,
) -> Result<Value, Error> {
    Ok(match kind {
        0 => Value::Integer(u8::from_le_bytes(cursor.array(key)?).into()),
        1 => Value::Integer(i8::from_le_bytes(cursor.array(key)?).into()),
        2 => Value::Integer(u16::from_le_bytes(cursor.array(key)?).into()),
        3 => Value::Integer(i16::from_le_bytes(cursor.array(key)?).into()),
        4 => Value::Integer(cursor.u32(key)?.into()),
        5 => Value::Integer(i32::from_le_bytes(cursor.array(key)?).into()),
        6 => Value::Float(shortest_decimal(f32::from_le_bytes(cursor.array(key)?))),
        7 => match cursor.array::<1>(key)?[0] {
            0 => Value::Bool(false),
            1 => Value::Bool(true),
            other => return Err(cursor.error(format!("{key}: {other} is not a truth value"))),
        },
        8 => Value::String(cursor.string(u64::MAX, key)?),
        10 => Value::Integer(cursor.u64(key)?.into()),
        11 => Value::Integer(i64::from_le_bytes(cursor.array(key)?).into()),
        12 => Value::Float(f64::from_le_bytes(cursor.array(key)?)),
        _ => return Err(cursor.error(format!("{key}: unknown value type {kind}"))),
    })
}

/// The float64 a person would have written: 1e-5 and not 9.999999747378752e-6.
fn shortest_decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

fn read_array<R: Read + Seek>(cursor: &mut Cursor<R>, key: &str) -> Result<Value, Error> {
    let kind = cursor.u32(key)?;
    let count = cursor.u64(key)?;
    let size = match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        8 | 10..=12 => 8,
        9 => return Err(cursor.error(format!("{key}: an array of arrays cannot be read"))),
        _ => return Err(cursor.error(format!("{key}: unknown element type {kind}"))),
    };
    if count > ARRAY_ELEMENTS_MAX {
        return Err(cursor.error(format!(
            "{key}: an array of {count} elements; at most {ARRAY_ELEMENTS_MAX} make sense"
        )));
    }
    cursor.expect(count, size, key)?;
    match kind {
        4 | 5 | 10 | 11 => {
            let bytes = cursor.bytes(count * size, key)?;
            Ok(Value::Integers(integers(&bytes, kind)))
        }
        6 => {
            let bytes = cursor.bytes(count * size, key)?;
            let (words, _) = bytes.as_chunks::<4>();
            Ok(Value::Floats(words.iter().map(|w| f32::from_le_bytes(*w)).collect()))
        }
        8 => {
            let mut strings = Vec::new();
            for _ in 0..count {
                strings.push(cursor.string(u64::MAX, key)?);
            }
            Ok(Value::Strings(strings))
        }
        _ => cursor.skip(count, size, key).map(|()| Value::Skipped),
    }
}

/// Elements of value type 4 (u32), 5 (i32), 10 (u64) or 11 (i64). Unsigned 64-bit values above
/// the signed range turn negative, which every user of them refuses.
fn integers(bytes: &[u8], kind: u32) -> Vec<i64> {
    let (words, _) = bytes.as_chunks::<4>();
    let (doubles, _) = bytes.as_chunks::<8>();
    match kind {
        4 => words.iter().map(|w| u32::from_le_bytes(*w).into()).collect(),
        5 => words.iter().map(|w| i32::from_le_bytes(*w).into()).collect(),
        _ => doubles.iter().map(|d| i64::from_le_bytes(*d)).collect(),
    }
}

fn alignment(metadata: &BTreeMap<String, Value>, path: &Path) -> Result<u64, Error> {
    match metadata.get("general.alignment") {
        None => Ok(ALIGNMENT_DEFAULT),
        Some(Value::Integer(value)) => u64::try_from(*value)
            .ok()
            .filter(|a| a.is_power_of_two() && *a <= ALIGNMENT_MAX)
            .ok_or_else(|| {
                Error::model(
                    path,
                    format!(
                        "general.alignment is {value}, not a power of two up to {ALIGNMENT_MAX}"
                    ),
                )
            }),
        Some(_) => Err(Error::model(path, "general.alignment is not an integer")),
    }
}

/// One entry of the tensor table; its offset still counts from the start of the data.
fn read_tensor_info<R: Read + Seek>(cursor: &mut Cursor<R>) -> Result<(String, TensorInfo), Error> {
    let name = cursor.string(NAME_BYTES_MAX, "a tensor name")?;
    let num_dims = cursor.u32(&name)?;
    if !(1..=DIMS_MAX).contains(&num_dims) {
        return Err(cursor.error(format!("tensor '{name}' has {num_dims} dimensions, not 1 to 4")));
    }
    let mut dims = Vec::new();
    for _ in 0..num_dims {
        dims.push(cursor.u64(&name)?);
    }
    let kind = cursor.u32(&name)?;
    let offset = cursor.u64(&name)?;
    let format = BlockFormat::from_id(kind)
        .map_err(|reason| Error::Unsupported(format!("tensor '{name}': {reason}")))?;
    let num_bytes = tensor_bytes(&dims, format).ok_or_else(|| {
        cursor.error(format!(
            "tensor '{name}' of shape {dims:?} cannot be stored as {}: sizes must be above 0, \
             the first a multiple of {}, and the product must fit into 64 bits",
            format.name(),
            format.elements()
        ))
    })?;
    Ok((name, TensorInfo { dims, format, offset, num_bytes }))
}

fn tensor_bytes(dims: &[u64], format: BlockFormat) -> Option<u64> {
    let elements = dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d))?;
    let per_block = format.elements() as u64;
    if elements == 0 || !dims[0].is_multiple_of(per_block) {
        return None;
    }
    (elements / per_block).checked_mul(format.bytes() as u64)
}

/// Turns offsets into places in the file, and refuses those outside it or in another tensor.
fn place_tensors(
    tensors: &mut BTreeMap<String, TensorInfo>,
    data_start: u64,
    alignment: u64,
    file_len: u64,
    path: &Path,
) -> Result<(), Error> {
    for (name, info) in tensors.iter_mut() {
        let start = data_start.checked_add(info.offset);
        let end = start.and_then(|start| start.checked_add(info.num_bytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= file_len && info.offset % alignment == 0 => {
                info.offset = start;
            }
            _ => {
                return Err(Error::model(
                    path,
                    format!(
                        "tensor '{name}': {} bytes at offset {} of the data do not lie in the \
                         file of {file_len} bytes at a multiple of {alignment}; the file is \
                         damaged or incomplete, fetch it again",
                        info.num_bytes, info.offset
                    ),
                ));
            }
        }
    }
    let mut spans: Vec<_> = tensors.iter().map(|(name, t)| (t.offset, t.num_bytes, name)).collect();
    spans.sort_unstable();
    for pair in spans.windows(2) {
        let ((start, len, name), (next_start, _, next_name)) = (pair[0], pair[1]);
        if start + len > next_start {
            return Err(Error::model(
                path,
                format!("tensors '{name}' and '{next_name}' overlap at byte {next_start}"),
            ));
        }
    }
    Ok(())
}
