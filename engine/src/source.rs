//! Where a model comes from: a folder, or the program itself.

use std::borrow::Cow;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::bundle::Bundle;
use crate::error::Error;
use crate::packed::{PackedCache, PackedFile};

/// A model's files and weights.
#[derive(Clone, Debug)]
pub struct ModelSource {
    pub files: ModelFolder,
    pub weights: WeightsSource,
    /// Where packed weights are kept between two loads; `None`: they are packed each time.
    pub packed_cache: Option<PackedCache>,
}

/// Where the small files of a model are: its configuration, tokenizer and chat template.
#[derive(Clone, Debug)]
pub enum ModelFolder {
    Disk(PathBuf),
    Bundle(Arc<Bundle>),
}

/// Where weights are.
#[derive(Clone, Debug)]
pub enum WeightsSource {
    /// A folder with safetensors.
    Folder(PathBuf),
    Packed(PackedFile),
}

impl ModelSource {
    /// A model folder, whose weights are packed each time.
    pub fn folder(dir: impl Into<PathBuf>) -> ModelSource {
        let dir = dir.into();
        ModelSource {
            files: ModelFolder::Disk(dir.clone()),
            weights: WeightsSource::Folder(dir),
            packed_cache: None,
        }
    }
}

impl ModelFolder {
    /// The name of the model: its folder's.
    pub fn name(&self) -> Cow<'_, str> {
        match self {
            ModelFolder::Disk(dir) => {
                dir.file_name().map_or("model".into(), |name| name.to_string_lossy())
            }
            ModelFolder::Bundle(bundle) => bundle.name().into(),
        }
    }

    /// What errors call the file `name`.
    pub fn path(&self, name: &str) -> PathBuf {
        match self {
            ModelFolder::Disk(dir) => dir.join(name),
            ModelFolder::Bundle(bundle) => bundle.path().join(name),
        }
    }

    /// Where the model is: a folder, or a program.
    pub fn root(&self) -> &Path {
        match self {
            ModelFolder::Disk(dir) => dir,
            ModelFolder::Bundle(bundle) => bundle.path(),
        }
    }

    pub fn has(&self, name: &str) -> bool {
        match self {
            ModelFolder::Disk(dir) => dir.join(name).exists(),
            ModelFolder::Bundle(bundle) => bundle.has(name),
        }
    }

    /// The bytes of the file `name`, of at most `bytes_max`, or `None` where there is none.
    pub fn read(&self, name: &str, bytes_max: u64) -> Result<Option<Cow<'_, [u8]>>, Error> {
        let bytes: Option<Cow<'_, [u8]>> = match self {
            ModelFolder::Disk(dir) => read_limited(&dir.join(name), bytes_max)?.map(Cow::Owned),
            ModelFolder::Bundle(bundle) => bundle.file(name)?.map(Cow::Owned),
        };
        match bytes {
            Some(bytes) if bytes.len() as u64 > bytes_max => {
                Err(too_large(&self.path(name), bytes_max))
            }
            bytes => Ok(bytes),
        }
    }

    /// The text of `config.json`.
    pub fn config_text(&self) -> Result<String, Error> {
        let path = self.path("config.json");
        let bytes = self.read("config.json", CONFIG_BYTES_MAX)?;
        let bytes = bytes.ok_or_else(|| Error::io(&path, ErrorKind::NotFound.into()))?;
        let text = String::from_utf8(bytes.into_owned());
        text.map_err(|_| Error::model(path, "the file is not UTF-8"))
    }
}

/// Longest `config.json` that is read.
const CONFIG_BYTES_MAX: u64 = 64 << 20;

/// The bytes of a file of at most `bytes_max`, or `None` where there is no such file.
pub(crate) fn read_limited(path: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>, Error> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(path, error)),
    };
    let mut bytes = Vec::new();
    // NOTE: limited while reading, because a pipe or a growing file has no length to check.
    file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(|error| Error::io(path, error))?;
    if bytes.len() as u64 > bytes_max {
        return Err(too_large(path, bytes_max));
    }
    Ok(Some(bytes))
}

fn too_large(path: &Path, bytes_max: u64) -> Error {
    Error::model(path, format!("the file is larger than {bytes_max} bytes"))
}
