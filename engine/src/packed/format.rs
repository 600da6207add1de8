//! The file: a prefix, a header in JSON, and arrays that are mapped.
//!
//! ```text
//! "BSPKPACK"  version u32  0 u32  length of the header u64  BLAKE3 of the header [32]
//! header: JSON
//! arrays: each at a multiple of 64 bytes, large ones at the beginning of a page
//! ```
//!
//! Numbers are little-endian. Nothing that a file says is believed before it is checked: offsets
//! against its length, lengths against the layouts, contents against their checksums.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use bespoke_kernel_gen::spec::DType;
use serde::{Deserialize, Serialize};

use super::checksum::checksum;
#[cfg(unix)]
use super::checksum::checksum_in_file;
use crate::backend::cpu::memory::{ALIGNMENT, MappedFile, Memory};
use crate::backend::cpu::pack::Panels;
use crate::backend::cpu::packed::{LinearLayout, PanelFormat};
use crate::error::Error;

/// Of the file and of everything in it: rises with any change to how weights are packed.
pub const VERSION: u32 = 1;

pub(super) const MAGIC: [u8; 8] = *b"BSPKPACK";
pub(super) const PREFIX_LEN: usize = 56;
/// Where large arrays begin. The largest page that is in common use.
pub(super) const PAGE: u64 = 4096;

const HEADER_LEN_MAX: u64 = 64 << 20;
const ARRAYS_MAX: usize = 1 << 20;

/// What a file says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Header {
    /// What it was made from, as whoever made it names it.
    pub(super) source: String,
    /// Instruction set that it was packed for.
    pub(super) target: String,
    /// Bytes of all of the file.
    pub(super) file_len: u64,
    pub(super) arrays: BTreeMap<String, Array>,
    /// Layouts of the linears, by name.
    pub(super) linears: BTreeMap<String, Linear>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Array {
    /// From the beginning of the file.
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) checksum: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Linear {
    n: usize,
    k: usize,
    lanes: usize,
    cols: usize,
    format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Format {
    F32,
    F16,
    Bf16,
    #[serde(rename = "bf16-pairs")]
    Bf16Pairs,
    Int8,
    Awq {
        group: usize,
    },
}

/// Packed weights, mapped from a file or from a part of one.
#[derive(Clone, Debug)]
pub struct PackedFile {
    path: PathBuf,
    header: Arc<Header>,
    file: Arc<File>,
    /// Where the packed weights begin in it.
    offset: u64,
    map: Arc<MappedFile>,
    /// What the kernels read, or what is wrong with it, once that was checked.
    checked: Arc<OnceLock<Result<Copied, String>>>,
}

/// The part of the file from [`PackedFile::table_end`] on, where there is a copy of it.
type Copied = Option<Arc<MappedFile>>;

/// The one array of which a step reads a few rows only. It stays where it is, and out of memory as
/// far as nobody asks for it.
pub(super) const TABLE: &str = "embedding";

impl Linear {
    pub(super) fn of(layout: &LinearLayout) -> Linear {
        let Panels { n, k, lanes, cols } = layout.panels;
        let format = match layout.format {
            PanelFormat::Dense(DType::F32) => Format::F32,
            PanelFormat::Dense(DType::F16) => Format::F16,
            PanelFormat::Dense(DType::BF16) => Format::Bf16,
            PanelFormat::Bf16Pairs => Format::Bf16Pairs,
            PanelFormat::Dense(DType::I8) | PanelFormat::Int8 => Format::Int8,
            PanelFormat::Awq { group } => Format::Awq { group },
        };
        Linear { n, k, lanes, cols, format }
    }

    fn layout(&self) -> LinearLayout {
        let Linear { n, k, lanes, cols, format } = *self;
        let format = match format {
            Format::F32 => PanelFormat::Dense(DType::F32),
            Format::F16 => PanelFormat::Dense(DType::F16),
            Format::Bf16 => PanelFormat::Dense(DType::BF16),
            Format::Bf16Pairs => PanelFormat::Bf16Pairs,
            Format::Int8 => PanelFormat::Int8,
            Format::Awq { group } => PanelFormat::Awq { group },
        };
        LinearLayout { panels: Panels { n, k, lanes, cols }, format }
    }
}

impl PackedFile {
    /// Opens the packed weights that are all of the file `path`.
    pub fn open(path: &Path) -> Result<PackedFile, Error> {
        let file = File::open(path).map_err(|error| Error::io(path, error))?;
        let len = file.metadata().map_err(|error| Error::io(path, error))?.len();
        PackedFile::open_part(&file, path, 0, len)
    }

    /// Opens the packed weights that are the `len` bytes from `offset` on of `file`, which is at
    /// `path`. Checks the header; [`PackedFile::check`] checks the weights.
    pub fn open_part(file: &File, path: &Path, offset: u64, len: u64) -> Result<PackedFile, Error> {
        let file_len = file.metadata().map_err(|error| Error::io(path, error))?.len();
        if offset.checked_add(len).is_none_or(|end| end > file_len) {
            return Err(damaged(path, "the file ends before they do"));
        }
        if !offset.is_multiple_of(PAGE) {
            return Err(damaged(path, &format!("they begin at byte {offset}, within a page")));
        }
        let header = read_header(file, path, offset, len)?;
        let map_len = usize::try_from(len).map_err(|_| {
            Error::Resources(format!("{len} bytes of packed weights do not fit an address space"))
        })?;
        let map = Arc::new(MappedFile::open(file, path, offset, map_len)?);
        let file = Arc::new(file.try_clone().map_err(|error| Error::io(path, error))?);
        let (header, checked) = (Arc::new(header), Arc::default());
        Ok(PackedFile { path: path.to_owned(), header, file, offset, map, checked })
    }

    /// Brings what steps read as a whole into memory and compares every array with its checksum, on
    /// `num_threads` threads, or waits for whoever does.
    pub fn check(&self, num_threads: usize) -> Result<(), Error> {
        let checked = self.checked.get_or_init(|| self.load(num_threads));
        checked.as_ref().map(|_| ()).map_err(|what| self.damaged(what))
    }

    /// Where the arrays that are read as a whole begin, as a multiple of a page: behind the table,
    /// which is the first.
    fn table_end(&self) -> u64 {
        let table = self.header.arrays.get(TABLE);
        table.map_or(0, |table| (table.offset + table.len) / PAGE * PAGE)
    }

    fn load(&self, num_threads: usize) -> Result<Copied, String> {
        let start = self.table_end();
        let len = self.map.bytes().len() - start as usize;
        let copied = MappedFile::read(&self.file, self.offset + start, len, num_threads);
        let copied = copied.map_err(|error| format!("reading them: {error}"))?.map(Arc::new);
        self.compare(&copied, num_threads)?;
        Ok(copied)
    }

    /// The checksum of what an array has in the copy, or in the file. Without a copy the whole file
    /// is mapped, and this brings it into memory.
    fn checksum(&self, array: &Array, copied: &Copied) -> Result<u64, String> {
        #[cfg(unix)]
        if copied.is_some() && array.offset < self.table_end() {
            let sum = checksum_in_file(&self.file, self.offset + array.offset, array.len);
            return sum.map_err(|error| format!("reading them: {error}"));
        }
        let (map, start) = self.place(array, copied);
        Ok(checksum(&map.bytes()[start..][..array.len as usize]))
    }

    /// Where an array lies in memory, and from which byte on.
    fn place<'a>(&'a self, array: &Array, copied: &'a Copied) -> (&'a Arc<MappedFile>, usize) {
        match (copied, array.offset.checked_sub(self.table_end())) {
            (Some(copied), Some(start)) => (copied, start as usize),
            _ => (&self.map, array.offset as usize),
        }
    }

    fn compare(&self, copied: &Copied, num_threads: usize) -> Result<(), String> {
        let mut arrays: Vec<(&String, &Array)> = self.header.arrays.iter().collect();
        // The largest first, so that no thread is left with one while the others have ended.
        arrays.sort_by_key(|(_, array)| std::cmp::Reverse(array.len));
        let next = AtomicUsize::new(0);
        let work = || {
            while let Some((name, array)) = arrays.get(next.fetch_add(1, Ordering::Relaxed)) {
                if self.checksum(array, copied)? != array.checksum {
                    return Err(format!("'{name}' has another checksum"));
                }
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..num_threads.clamp(1, 64)).map(|_| scope.spawn(work)).collect();
            let mut result = Ok(());
            for thread in threads {
                let outcome = thread.join();
                result = result.and(outcome.unwrap_or_else(|payload| {
                    std::panic::resume_unwind(payload);
                }));
            }
            result
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it was made from.
    pub fn source(&self) -> &str {
        &self.header.source
    }

    /// Bytes of the file.
    pub fn num_bytes(&self) -> u64 {
        self.header.file_len
    }

    /// The layout of a linear.
    pub(super) fn layout(&self, linear: &str) -> Result<LinearLayout, Error> {
        let found = self.header.linears.get(linear);
        found.map(Linear::layout).ok_or_else(|| self.damaged(&format!("there is no '{linear}'")))
    }

    /// The array `name`, which must have `len` bytes.
    pub(super) fn array(&self, name: &str, len: usize) -> Result<Memory, Error> {
        let array = self.find(name, len)?;
        let (map, start) = self.place(&array, self.copied());
        Ok(Memory::mapped(map, start, len))
    }

    /// As [`PackedFile::array`], of `len` float32 values that are copied.
    pub(super) fn floats(&self, name: &str, len: usize) -> Result<Vec<f32>, Error> {
        let len = len.saturating_mul(4);
        let array = self.find(name, len)?;
        let (map, start) = self.place(&array, self.copied());
        let (words, _) = map.bytes()[start..][..len].as_chunks::<4>();
        Ok(words.iter().map(|word| f32::from_le_bytes(*word)).collect())
    }

    fn find(&self, name: &str, len: usize) -> Result<Array, Error> {
        match self.header.arrays.get(name) {
            Some(array) if array.len == len as u64 => Ok(*array),
            Some(array) => Err(self.damaged(&format!(
                "'{name}' has {} bytes; the model's config asks for {len}",
                array.len
            ))),
            None => Err(self.damaged(&format!("there is no '{name}'"))),
        }
    }

    /// The copy that was checked, if there is one yet.
    fn copied(&self) -> &Copied {
        self.checked.get().and_then(|checked| checked.as_ref().ok()).unwrap_or(&None)
    }

    pub(super) fn damaged(&self, what: &str) -> Error {
        damaged(&self.path, what)
    }
}

fn damaged(path: &Path, what: &str) -> Error {
    Error::model(path, format!("the packed weights are damaged: {what}; make the file anew"))
}

/// Reads and checks the header of the `len` bytes from `offset` on.
fn read_header(mut file: &File, path: &Path, offset: u64, len: u64) -> Result<Header, Error> {
    let io = |error| Error::io(path, error);
    if len < PREFIX_LEN as u64 {
        return Err(damaged(path, &format!("{len} bytes are too few")));
    }
    file.seek(SeekFrom::Start(offset)).map_err(io)?;
    let mut prefix = [0; PREFIX_LEN];
    file.read_exact(&mut prefix).map_err(io)?;
    let (magic, rest) = prefix.split_at(8);
    if magic != MAGIC {
        return Err(damaged(path, "they do not begin as such"));
    }
    let number =
        |at: usize| u32::from_le_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]]);
    if number(0) != VERSION {
        return Err(Error::model(
            path,
            format!(
                "packed weights of version {}, this program reads {VERSION}; make the file anew",
                number(0)
            ),
        ));
    }
    let header_len = u64::from(number(8)) | u64::from(number(12)) << 32;
    if number(4) != 0 || header_len > HEADER_LEN_MAX || header_len > len - PREFIX_LEN as u64 {
        return Err(damaged(path, &format!("a header of {header_len} bytes")));
    }
    let mut text = Vec::new();
    file.take(header_len).read_to_end(&mut text).map_err(io)?;
    if blake3::hash(&text).as_bytes()[..] != rest[16..48] {
        return Err(damaged(path, "the header has another hash"));
    }
    let header: Header = serde_json::from_slice(&text)
        .map_err(|error| damaged(path, &format!("the header says {error}")))?;
    header.check(len, PREFIX_LEN as u64 + header_len).map_err(|what| damaged(path, &what))?;
    Ok(header)
}

impl Header {
    /// Says what cannot be in a file of `len` bytes whose arrays begin at `data_start` or behind.
    fn check(&self, len: u64, data_start: u64) -> Result<(), String> {
        if self.file_len != len {
            return Err(format!("{len} bytes, where there should be {}", self.file_len));
        }
        if self.arrays.len() > ARRAYS_MAX || self.linears.len() > ARRAYS_MAX {
            return Err(format!("{} arrays", self.arrays.len().max(self.linears.len())));
        }
        for (name, array) in &self.arrays {
            let end = array.offset.checked_add(array.len);
            let is_inside = array.offset >= data_start && end.is_some_and(|end| end <= len);
            if !is_inside || !array.offset.is_multiple_of(ALIGNMENT as u64) {
                let Array { offset, len, .. } = array;
                return Err(format!("'{name}' has {len} bytes at {offset}"));
            }
        }
        match self.linears.iter().find(|(_, linear)| !linear.layout().is_sound()) {
            Some((name, linear)) => Err(format!("'{name}' is laid out as {}", linear.layout())),
            None => Ok(()),
        }
    }
}
