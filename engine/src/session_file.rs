//! A session as a file: its tokens, and keys and values for as long as the kernels that computed
//! them are the same.
//!
//! The file is a safetensors file with the tensors `header` (JSON), `tokens` (u32), `kv` (bytes of
//! pages, in order) and `checksum` (BLAKE3 over the other three). It is untrusted when it is read:
//! nothing is taken from it before everything was checked.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::files::{self, IfExists};
use crate::kv_cache::Namespace;
use crate::session::SessionId;

const VERSION: u32 = 1;
const EXTENSION: &str = "session";
/// Beside the pages: header, table of tensors and tokens of the longest context.
const OVERHEAD_BYTES_MAX: u64 = 256 << 20;

/// What tokens and pages belong to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Identity {
    /// Which model: its tokens mean nothing to another one.
    pub(crate) model: String,
    /// Which kernels and which layout of pages: others give other bits.
    pub(crate) layout: String,
}

/// Everything but tokens and pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) identity: Identity,
    pub(crate) namespace: u64,
    pub(crate) name: String,
    pub(crate) seed: u64,
    pub(crate) variant: u64,
    /// Leading tokens that `kv` holds.
    pub(crate) num_kept: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SessionFile {
    pub(crate) header: Header,
    pub(crate) tokens: Vec<u32>,
    /// Whole pages.
    pub(crate) kv: Vec<u8>,
}

impl Header {
    pub(crate) fn new(id: &SessionId, identity: Identity) -> Header {
        Header {
            version: VERSION,
            identity,
            namespace: id.namespace().0,
            name: id.name().to_owned(),
            seed: 0,
            variant: 0,
            num_kept: 0,
        }
    }
}

impl SessionFile {
    /// Where the session `id` is kept in the folder `dir`.
    pub(crate) fn path(dir: &Path, id: &SessionId) -> PathBuf {
        dir.join(format!("{:016x}-{}.{EXTENSION}", id.namespace().0, id.name()))
    }

    /// Session files of a folder, in the order of their names; none where there is no folder.
    pub(crate) fn list(dir: &Path) -> Result<Vec<PathBuf>, Error> {
        let mut paths = Vec::new();
        let entries = match std::fs::read_dir(dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(paths),
            entries => entries.map_err(|error| Error::io(dir, error))?,
        };
        for entry in entries {
            let path = entry.map_err(|error| Error::io(dir, error))?.path();
            if path.extension().is_some_and(|extension| extension == EXTENSION) {
                paths.push(path);
            }
        }
        paths.sort();
        Ok(paths)
    }

    /// Writes the file whole or not at all, over an older one.
    pub(crate) fn write(&self, path: &Path) -> Result<(), Error> {
        let header = serde_json::to_vec(&self.header).expect("a header is plain data");
        let tokens: Vec<u8> = self.tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        let checksum = checksum(&header, &tokens, &self.kv);
        let view = |dtype, len: usize, bytes| TensorView::new(dtype, vec![len], bytes);
        let tensors = [
            ("header", view(Dtype::U8, header.len(), &header)),
            ("tokens", view(Dtype::U32, self.tokens.len(), &tokens)),
            ("kv", view(Dtype::U8, self.kv.len(), &self.kv)),
            ("checksum", view(Dtype::U8, checksum.len(), &checksum)),
        ];
        let sound = "the shapes are those of the bytes";
        let tensors = tensors.map(|(name, tensor)| (name, tensor.expect(sound)));
        let bytes = safetensors::serialize(tensors, None).expect(sound);
        files::write_file(path, &bytes, IfExists::Replace)
    }

    /// Reads and checks a file whose pages take at most `kv_bytes_max`.
    pub(crate) fn read(path: &Path, kv_bytes_max: u64) -> Result<SessionFile, Error> {
        let bytes_max = kv_bytes_max.saturating_add(OVERHEAD_BYTES_MAX);
        let file = File::open(path).map_err(|error| Error::io(path, error))?;
        let mut bytes = Vec::new();
        let io = |error| Error::io(path, error);
        file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() as u64 > bytes_max {
            return Err(Error::model(path, format!("more than {bytes_max} bytes for a session")));
        }
        SessionFile::parse(&bytes).map_err(|message| Error::model(path, message))
    }

    fn parse(bytes: &[u8]) -> Result<SessionFile, String> {
        let damaged = |what: &str| format!("no sound session file: {what}; delete it");
        let tensors = SafeTensors::deserialize(bytes).map_err(|e| damaged(&e.to_string()))?;
        let data = |name: &str, dtype| match tensors.tensor(name) {
            Ok(tensor) if tensor.dtype() == dtype && tensor.shape().len() == 1 => Ok(tensor.data()),
            _ => Err(damaged(&format!("there is no vector '{name}' of {dtype:?}"))),
        };
        let (header, tokens) = (data("header", Dtype::U8)?, data("tokens", Dtype::U32)?);
        let kv = data("kv", Dtype::U8)?;
        if data("checksum", Dtype::U8)? != checksum(header, tokens, kv) {
            return Err(damaged("its checksum is that of other content"));
        }
        let header: Header =
            serde_json::from_slice(header).map_err(|error| damaged(&error.to_string()))?;
        if header.version != VERSION {
            let version = header.version;
            return Err(format!("a session file of version {version}, this is {VERSION}"));
        }
        let tokens = tokens.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
        Ok(SessionFile { header, tokens: tokens.collect(), kv: kv.to_vec() })
    }

    /// The session that the file holds.
    pub(crate) fn id(&self) -> Result<SessionId, Error> {
        SessionId::new(Namespace(self.header.namespace), &self.header.name)
    }
}

fn checksum(header: &[u8], tokens: &[u8], kv: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for part in [header, tokens, kv] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> SessionFile {
        let id = SessionId::new(Namespace(3), "talk").unwrap();
        let identity = Identity { model: "m".to_owned(), layout: "l".to_owned() };
        let header = Header { seed: 9, num_kept: 2, ..Header::new(&id, identity) };
        SessionFile { header, tokens: vec![1, 2, 70000], kv: (0..64).collect() }
    }

    #[test]
    fn what_is_written_is_read_and_anything_else_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = file();
        let path = SessionFile::path(dir.path(), &file.id().unwrap());
        assert!(path.ends_with("0000000000000003-talk.session"));
        file.write(&path).unwrap();
        assert_eq!(SessionFile::list(dir.path()).unwrap(), std::slice::from_ref(&path));
        assert_eq!(SessionFile::read(&path, 64).unwrap(), file);
        let bytes = std::fs::read(&path).unwrap();
        for len in 0..bytes.len() {
            assert!(SessionFile::parse(&bytes[..len]).is_err(), "cut to {len} bytes");
        }
        for idx in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[idx] ^= 1;
            // A changed space of the table of tensors changes nothing.
            let parsed = SessionFile::parse(&changed);
            assert!(parsed.is_err() || parsed.as_ref() == Ok(&file), "byte {idx}: {parsed:?}");
        }
    }

    #[test]
    fn another_version_and_a_missing_folder_are_told_apart_from_damage() {
        let mut file = file();
        file.header.version = 2;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.session");
        file.write(&path).unwrap();
        let error = SessionFile::read(&path, 64).unwrap_err().to_string();
        assert!(error.contains("version 2"), "{error}");
        assert_eq!(SessionFile::list(&dir.path().join("none")).unwrap(), Vec::<PathBuf>::new());
    }
}
