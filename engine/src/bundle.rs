//! A program that brings its model: what is appended to its file.
//!
//! ```text
//! the program
//! packed weights, from the beginning of a page on      (where they are embedded)
//! the model's small files, each deflated, one after the other
//! manifest: JSON
//! trailer: "BSPKEND\n"  version u32  0 u32  offset of the files, of the manifest, length u64
//!          BLAKE3 of files and manifest [32]
//! ```
//!
//! Systems load what a program's own headers name and ignore what follows.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::packed::PackedFile;

/// Of the manifest and of the trailer.
pub const VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"BSPKEND\n";
const TRAILER_LEN: usize = 72;
/// Where weights begin.
const PAGE: u64 = 4096;
/// Most bytes that files and manifest have together, and that a file has when it is inflated: a
/// tokenizer's limit, and the others.
const SMALL_BYTES_MAX: u64 = 256 << 20;

/// Files of a model folder that a program brings, where the folder has them.
pub const FILES: [&str; 5] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];

/// The model that a program brings.
#[derive(Clone, Debug)]
pub struct Bundle {
    path: PathBuf,
    manifest: Manifest,
    /// Files and manifest.
    small: Vec<u8>,
    files_offset: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    name: String,
    /// Of the CPU and of GPUs.
    targets: Vec<String>,
    files: BTreeMap<String, Deflated>,
    weights: Option<Span>,
}

/// A file as it lies in the program, and its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Deflated {
    span: Span,
    len: u64,
}

/// Bytes of the program's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Span {
    offset: u64,
    len: u64,
}

impl Span {
    fn end(&self) -> Option<u64> {
        self.offset.checked_add(self.len)
    }
}

/// What [`append`] appends.
pub struct Contents<'a> {
    pub name: &'a str,
    pub targets: Vec<String>,
    pub files: BTreeMap<String, Vec<u8>>,
    /// A file with packed weights.
    pub weights: Option<&'a Path>,
}

impl Bundle {
    /// The model that the program at `path` brings; `None` where nothing is appended to it.
    pub fn open(path: &Path) -> Result<Option<Bundle>, Error> {
        let fail = |error| Error::io(path, error);
        let mut file = File::open(path).map_err(fail)?;
        let len = file.metadata().map_err(fail)?.len();
        let Some(start) = len.checked_sub(TRAILER_LEN as u64) else { return Ok(None) };
        file.seek(SeekFrom::Start(start)).map_err(fail)?;
        let mut trailer = [0; TRAILER_LEN];
        file.read_exact(&mut trailer).map_err(fail)?;
        match trailer.starts_with(&MAGIC) {
            true => read(file, path, &trailer, len).map(Some),
            false => Ok(None),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model's name.
    pub fn name(&self) -> &str {
        &self.manifest.name
    }

    /// Names of the instruction sets and architectures that it was built for.
    pub fn targets(&self) -> &[String] {
        &self.manifest.targets
    }

    /// Whether the program brings the file `name`.
    pub fn has(&self, name: &str) -> bool {
        self.manifest.files.contains_key(name)
    }

    /// A file of the model's folder; `None` where there is none.
    pub fn file(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        let Some(Deflated { span, len }) = self.manifest.files.get(name) else { return Ok(None) };
        // Every span was compared with the bytes when the bundle was opened.
        let start = (span.offset - self.files_offset) as usize;
        let deflated = &self.small[start..start + span.len as usize];
        let mut bytes = Vec::with_capacity(*len as usize);
        let inflated = DeflateDecoder::new(deflated).take(len + 1).read_to_end(&mut bytes);
        if inflated.is_err() || bytes.len() as u64 != *len {
            return Err(damaged(&self.path, &format!("its {name} cannot be inflated")));
        }
        Ok(Some(bytes))
    }

    /// Names of the files, and the bytes that they take.
    pub fn files(&self) -> impl Iterator<Item = (&str, u64)> {
        self.manifest.files.iter().map(|(name, file)| (name.as_str(), file.span.len))
    }

    /// Bytes of the weights; `None` where there are none in the program.
    pub fn weights_len(&self) -> Option<u64> {
        self.manifest.weights.map(|span| span.len)
    }

    /// The weights, mapped from the program's file.
    pub fn weights(&self) -> Result<Option<PackedFile>, Error> {
        let Some(Span { offset, len }) = self.manifest.weights else { return Ok(None) };
        let file = File::open(&self.path).map_err(|error| Error::io(&self.path, error))?;
        PackedFile::open_part(&file, &self.path, offset, len).map(Some)
    }
}

/// Appends to the program in `out`, which has `program_len` bytes and ends where writing goes on.
/// Gives the length of all.
pub fn append(out: &mut dyn Write, program_len: u64, contents: &Contents<'_>) -> io::Result<u64> {
    let mut at = program_len;
    let mut weights = None;
    if let Some(path) = contents.weights {
        let offset = at.next_multiple_of(PAGE);
        out.write_all(&vec![0; (offset - at) as usize])?;
        let len = io::copy(&mut File::open(path)?, out)?;
        weights = Some(Span { offset, len });
        at = offset + len;
    }
    let files_offset = at;
    let mut small = Vec::new();
    let mut files = BTreeMap::new();
    for (name, bytes) in &contents.files {
        let mut encoder = DeflateEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(bytes)?;
        let deflated = encoder.finish()?;
        let offset = files_offset + small.len() as u64;
        let span = Span { offset, len: deflated.len() as u64 };
        files.insert(name.clone(), Deflated { span, len: bytes.len() as u64 });
        small.extend(deflated);
    }
    let manifest_offset = files_offset + small.len() as u64;
    let (name, targets) = (contents.name.to_owned(), contents.targets.clone());
    small.extend(serde_json::to_vec(&Manifest { name, targets, files, weights })?);
    let len = files_offset + small.len() as u64 + TRAILER_LEN as u64;
    out.write_all(&small)?;
    out.write_all(&MAGIC)?;
    out.write_all(&VERSION.to_le_bytes())?;
    out.write_all(&[0; 4])?;
    for number in [files_offset, manifest_offset, len] {
        out.write_all(&number.to_le_bytes())?;
    }
    out.write_all(blake3::hash(&small).as_bytes())?;
    Ok(len)
}

fn read(
    mut file: File,
    path: &Path,
    trailer: &[u8; TRAILER_LEN],
    len: u64,
) -> Result<Bundle, Error> {
    let damaged = |what: &str| damaged(path, what);
    let number = |at: usize| {
        let bytes = trailer[at..].first_chunk().copied().unwrap_or_default();
        u64::from_le_bytes(bytes)
    };
    if number(8) != u64::from(VERSION) {
        return Err(damaged(&format!("it has version {}, not {VERSION}", number(8))));
    }
    let (files_offset, manifest_offset, expected_len) = (number(16), number(24), number(32));
    if expected_len != len {
        return Err(damaged(&format!("the file has {len} bytes and should have {expected_len}")));
    }
    let end = len - TRAILER_LEN as u64;
    let is_ordered = files_offset <= manifest_offset && manifest_offset <= end;
    if !is_ordered || end - files_offset > SMALL_BYTES_MAX {
        return Err(damaged(&format!("its files are at {files_offset} to {manifest_offset}")));
    }
    let mut small = Vec::new();
    file.seek(SeekFrom::Start(files_offset)).map_err(|error| Error::io(path, error))?;
    file.take(end - files_offset)
        .read_to_end(&mut small)
        .map_err(|error| Error::io(path, error))?;
    if blake3::hash(&small).as_bytes()[..] != trailer[40..] {
        return Err(damaged("its files have another hash"));
    }
    let manifest: Manifest =
        serde_json::from_slice(&small[(manifest_offset - files_offset) as usize..])
            .map_err(|error| damaged(&format!("its manifest says {error}")))?;
    let mut spans = manifest.files.values();
    let is_inside = |Deflated { span, len }: &Deflated| {
        let is_after = span.offset >= files_offset && *len <= SMALL_BYTES_MAX;
        is_after && span.end().is_some_and(|end| end <= manifest_offset)
    };
    let weights_end = manifest.weights.map_or(Some(0), |span| span.end());
    if !spans.all(is_inside) || weights_end.is_none_or(|end| end > files_offset) {
        return Err(damaged("its manifest names bytes that are not there"));
    }
    Ok(Bundle { path: path.to_owned(), manifest, small, files_offset })
}

fn damaged(path: &Path, what: &str) -> Error {
    Error::model(
        path,
        format!("the model in this program is damaged: {what}; get or build the program anew"),
    )
}
