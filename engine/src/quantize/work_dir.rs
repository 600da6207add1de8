//! Finished layers beside the folder that is being made, so that a run that was killed goes on
//! where it ended.
//!
//! `.<name>.quantize/` has a file for each layer, written whole or not at all, and
//! `.<name>.quantize.lock` is locked while a process works on them.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use super::layer_file;
use super::quantized_layer::QuantizedLayer;
use crate::error::Error;
use crate::files::{self, IfExists, SidecarLock};

/// The finished layers of one run. They stay when this is dropped.
pub(super) struct WorkDir {
    dir: PathBuf,
    /// Everything that the layers depend on.
    key: blake3::Hash,
    lock: SidecarLock,
}

impl WorkDir {
    /// The work folder of the model folder `target`; [`Error::Busy`] where another process works
    /// on it.
    pub(super) fn open(target: &Path, key: blake3::Hash) -> Result<WorkDir, Error> {
        let (parent, name) = files::split_target(target)?;
        fs::create_dir_all(&parent).map_err(|e| Error::io(&parent, e))?;
        let dir = parent.join(format!(".{name}.quantize"));
        let lock_path = parent.join(format!(".{name}.quantize.lock"));
        let Some(lock) = SidecarLock::try_acquire(&lock_path)? else {
            return Err(Error::Busy(format!(
                "{}: another process is making this model; wait for its end or choose another \
                 output",
                target.display()
            )));
        };
        fs::create_dir_all(&dir).map_err(|e| files::write_error(&dir, 0, e))?;
        files::remove_stale(&dir, "")?;
        Ok(WorkDir { dir, key, lock })
    }

    /// A finished layer; `None` where there is none. Files that are damaged, belong to another run
    /// or have more than `len_max` bytes are removed.
    pub(super) fn read(
        &self,
        layer_idx: usize,
        len_max: u64,
    ) -> Result<Option<QuantizedLayer>, Error> {
        let path = self.path(layer_idx);
        let Ok(file) = File::open(&path) else { return Ok(None) };
        let mut bytes = Vec::new();
        file.take(len_max + 1).read_to_end(&mut bytes).map_err(|e| Error::io(&path, e))?;
        let layer = match bytes.len() as u64 <= len_max {
            true => layer_file::decode(&bytes, &self.key),
            false => None,
        };
        let layer = layer.filter(|layer| layer.layer_idx == layer_idx);
        if layer.is_none() {
            files::remove_any(&path)?;
        }
        Ok(layer)
    }

    pub(super) fn write(&self, layer: &QuantizedLayer) -> Result<(), Error> {
        let path = self.path(layer.layer_idx);
        let bytes = layer_file::encode(layer, &self.key).ok_or_else(|| {
            Error::model(&path, "the errors of the layer are not finite; are its weights damaged?")
        })?;
        files::write_file(&path, &bytes, IfExists::Replace)
    }

    /// Removes all layers.
    pub(super) fn remove(self) -> Result<(), Error> {
        files::remove_any(&self.dir)
    }

    fn path(&self, layer_idx: usize) -> PathBuf {
        self.dir.join(format!("layer-{layer_idx:04}"))
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        // A folder with layers cannot be removed this way and stays. The lock goes while it is
        // held, so that it is nobody else's; one that stays does no harm.
        let _ = fs::remove_dir(&self.dir);
        if !self.dir.exists() {
            let _ = fs::remove_file(&self.lock.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::quantize::quantized_layer::LayerReport;

    fn layer(layer_idx: usize) -> QuantizedLayer {
        QuantizedLayer {
            layer_idx,
            linears: BTreeMap::new(),
            floats: BTreeMap::from([("norm".to_owned(), vec![layer_idx as f32])]),
            factors: BTreeMap::new(),
            report: LayerReport { layer_idx, groups: Vec::new(), seconds: 0.0 },
        }
    }

    #[test]
    fn layers_wait_for_the_next_run() {
        let parent = tempfile::tempdir().unwrap();
        let (target, key) = (parent.path().join("int4"), blake3::hash(b"a run"));
        let work = WorkDir::open(&target, key).unwrap();
        work.write(&layer(0)).unwrap();
        work.write(&layer(1)).unwrap();
        drop(work);

        let work = WorkDir::open(&target, key).unwrap();
        assert_eq!(work.read(1, 4096).unwrap(), Some(layer(1)));
        assert_eq!(work.read(2, 4096).unwrap(), None);
        // Too long, in the wrong place, or cut off.
        assert_eq!(work.read(1, 64).unwrap(), None);
        fs::copy(work.path(0), work.path(2)).unwrap();
        assert_eq!(work.read(2, 4096).unwrap(), None);
        let whole = fs::read(work.path(0)).unwrap();
        fs::write(work.path(3), &whole[..whole.len() - 1]).unwrap();
        assert_eq!(work.read(3, 4096).unwrap(), None);
        drop(work);

        let other = WorkDir::open(&target, blake3::hash(b"another run")).unwrap();
        assert_eq!(other.read(0, 4096).unwrap(), None);
        drop(other);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0, "nothing is left to keep");
    }

    #[test]
    fn one_process_at_a_time() {
        let parent = tempfile::tempdir().unwrap();
        let (target, key) = (parent.path().join("int4"), blake3::hash(b"a run"));
        let work = WorkDir::open(&target, key).unwrap();
        let Err(error) = WorkDir::open(&target, key) else { panic!("two at a time") };
        assert!(matches!(error, Error::Busy(_)) && error.to_string().contains("int4"), "{error}");
        work.write(&layer(0)).unwrap();
        work.remove().unwrap();
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
        assert!(WorkDir::open(&target, key).is_ok());
    }
}
